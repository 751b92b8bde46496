"""The scaling view: a law takes seconds to fit, so it is fitted in a thread and kept until the curves change."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from eval.report.as_json import plain, scaling_json
from eval.report.law import Scaling, fit_ladder
from eval.report.predict import Graded, grade
from eval.report.series import Comparison, Point
from eval.report.style import count_text
from eval.scaling.laws import interpolate_loss
from eval.service import shapes
from eval.service.index import Curves, Snapshot
from eval.service.views import chosen, main_loss, number, numbers
from infra.log import get_logger

log = get_logger("law")
MOST_RUNS = 60  # a fit over more is slow, and what is asked then is better asked of fewer
KEPT = 8


class LawView:
    """`told` answers at once: the fit, or that it is being made."""

    def __init__(self) -> None:
        self._done: OrderedDict[str, shapes.Fitted] = OrderedDict()
        self._running: set[str] = set()
        self._lock = threading.Lock()

    def told(self, snapshot: Snapshot, names: Sequence[str]) -> shapes.Fitted | shapes.Fitting:
        runs = chosen(snapshot, names)
        loss = main_loss(snapshot)
        curves = snapshot.curves(loss) if loss else None
        if curves is None:
            return _unfitted("no run has a validation loss yet")
        mine = [run.name for run in runs if run.name in curves.by_run]
        if len(mine) > MOST_RUNS:
            return _unfitted(f"{len(mine)} runs are chosen; choose at most {MOST_RUNS} (one ladder) for a fit")
        key = _key(snapshot, curves, mine)
        with self._lock:
            if key in self._done:
                return self._done[key]
            if key not in self._running:
                self._running.add(key)
                threading.Thread(target=self._fit, args=(key, snapshot, curves, mine), daemon=True).start()
        return {"state": "fitting", "runs": mine}

    def _fit(self, key: str, snapshot: Snapshot, curves: Curves, names: Sequence[str]) -> None:
        try:
            answer = law_of(snapshot, curves, names)
        except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
            answer = _unfitted(f"the fit failed: {error}")
        except Exception as error:  # else the answer would be "fitting" for ever
            log.exception("fitting a law")
            answer = _unfitted(f"the fit failed (internal error): {type(error).__name__}: {error}")
        with self._lock:
            self._running.discard(key)
            self._done[key] = answer
            while len(self._done) > KEPT:
                self._done.popitem(last=False)


def _unfitted(reason: str) -> shapes.Fitted:
    return {
        "state": "done", "metric": None, "scaling": {"reason": reason}, "runs": [], "band": None, "frontier": None,
        "predictions": [],
    }  # fmt: skip


def law_of(snapshot: Snapshot, curves: Curves, names: Sequence[str]) -> shapes.Fitted:
    """Law, band over sizes, points at equal images, the frontier over compute, and graded predictions."""
    runs = [snapshot.by_name[name].run for name in names]
    losses = comparison(curves, names)
    scaling = fit_ladder(runs, losses)
    told = plain(scaling_json(scaling))
    told.pop("coverage", None)
    return {
        "state": "done",
        "metric": curves.metric,
        "scaling": told,
        "runs": [
            {"name": c.run, "parameters": c.parameters,
             "loss": number(float(c.loss[-1]) if scaling.reason else interpolate_loss(c, scaling.images)),
             "images": scaling.images or float(c.images[-1])}
            for c in scaling.curves
        ],
        "band": _band(scaling),
        "frontier": _frontier(scaling),
        "predictions": [
            _told(found) for found in grade(snapshot.shared, [run.run for run in snapshot.runs], losses)
        ],
    }  # fmt: skip


def _told(found: Graded) -> shapes.GradedPrediction:
    title = f"depth {found.depth}, {count_text(found.parameters)}"
    told: shapes.GradedPrediction = plain({**vars(found), "inside": found.inside, "title": title})
    return told


def comparison(curves: Curves, names: Sequence[str]) -> Comparison:
    """The same as the report has it."""
    points = {}
    for name in names:
        s = curves.by_run[name]
        columns = zip(s.images_P.tolist(), s.value_P.tolist(), s.low_P.tolist(), s.high_P.tolist(), s.count_P.tolist())
        points[name] = [Point(i, v, _known(low), _known(high), n) for i, v, low, high, n in columns]
    return Comparison(curves.metric, curves.protocol, curves.higher_is_better, points)


def _known(value: float) -> float | None:
    return value if value == value else None


def _band(scaling: Scaling) -> shapes.Band | None:
    if scaling.size is None:
        return None
    sizes = [curve.parameters for curve in scaling.curves]
    last = max([*sizes, scaling.next_rung.parameters if scaling.next_rung else 0])
    grid = np.geomspace(min(sizes) * 0.9, last * 1.15, 48)
    bands = [scaling.size.loss(size) for size in grid]
    return {
        "parameters": numbers(grid),
        "value": numbers(scaling.size.law(grid)),
        "low": [number(band.low) for band in bands],
        "high": [number(band.high) for band in bands],
    }


def _frontier(scaling: Scaling) -> shapes.FrontierCurve | None:
    if scaling.compute is None:
        return None
    low, high = (f(float(c.compute[k]) for c in scaling.curves) for f, k in ((min, 0), (max, -1)))
    grid = np.geomspace(low, high, 48)
    return {"compute": numbers(grid), "value": numbers(scaling.compute.law(grid))}


def _key(snapshot: Snapshot, curves: Curves, names: Sequence[str]) -> str:
    """Of everything that the answer is made of."""
    told = [f"{curves.metric} {curves.protocol} {len(snapshot.shared)}"]
    digest = hashlib.sha256()
    for name in names:
        run, series = snapshot.by_name[name].run, curves.by_run[name]
        told.append(f"{name} {run.parameters} {run.flops_per_image} {run.depth}")
        digest.update(series.images_P.tobytes() + series.value_P.tobytes())
    digest.update("\n".join(told).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()
