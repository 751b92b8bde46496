"""The scaling view: a law takes seconds to fit, so it is fitted in a thread and kept until the curves change."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from eval.report.law import LadderFit, ScalingLaws, fit_ladder, refuse_fit
from eval.report.predict import GradedPrediction, grade
from eval.report.series import Comparison
from eval.scaling.laws import interpolate_loss
from eval.service.snapshot import MetricCurves, Snapshot, round_number, round_numbers
from infra.codec import Number
from infra.log import get_logger

log = get_logger("law")
MOST_RUNS = 60  # a fit over more is slow, and what is asked then is better asked of fewer
KEPT = 8
GRID = 48  # points of a drawn curve


@dataclass(frozen=True)
class FittedRun:
    name: str
    parameters: int
    loss: Number
    images: float


@dataclass(frozen=True)
class LawBand:
    """Columns of equal length: L(N) over sizes with its 95 % interval."""

    parameters: list[float]
    value: list[Number]
    low: list[Number]
    high: list[Number]


@dataclass(frozen=True)
class FrontierCurve:
    """Columns of equal length: L(C) over training FLOPs."""

    compute: list[float]
    value: list[Number]


@dataclass(frozen=True)
class FittingLadder:
    """The law of these runs is being fitted; ask again."""

    state: Literal["fitting"]
    runs: list[str]


@dataclass(frozen=True)
class FittedLadder:
    """`runs`: the measured points of L(N); `band` and `frontier` are null where no law is fitted."""

    state: Literal["done"]
    metric: str | None
    scaling: ScalingLaws
    runs: list[FittedRun]
    band: LawBand | None
    frontier: FrontierCurve | None
    predictions: list[GradedPrediction]


class LawFitter:
    """`find` answers at once: the fit, or that it is being made."""

    def __init__(self) -> None:
        self._done: OrderedDict[str, FittedLadder] = OrderedDict()
        self._running: set[str] = set()
        self._lock = threading.Lock()

    def find(self, snapshot: Snapshot, names: Sequence[str] | None) -> FittedLadder | FittingLadder:
        loss = snapshot.main_loss
        curves = snapshot.select_curves(loss) if loss else None
        if curves is None:
            return _refuse("no run has a validation loss yet")
        chosen = [run.name for run in snapshot.choose(names) if run.name in curves.by_run]
        if len(chosen) > MOST_RUNS:
            return _refuse(f"{len(chosen)} runs are chosen; choose at most {MOST_RUNS} (one ladder) for a fit")
        key = _hash_inputs(snapshot, curves, chosen)
        with self._lock:
            if key in self._done:
                return self._done[key]
            if key not in self._running:
                self._running.add(key)
                threading.Thread(target=self._fit, args=(key, snapshot, curves, chosen), daemon=True).start()
        return FittingLadder("fitting", chosen)

    def _fit(self, key: str, snapshot: Snapshot, curves: MetricCurves, names: Sequence[str]) -> None:
        try:
            answer = fit_laws(snapshot, curves, names)
        except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
            answer = _refuse(f"the fit failed: {error}")
        except Exception as error:  # else the answer would be "fitting" for ever
            log.exception("fitting a law")
            answer = _refuse(f"the fit failed (internal error): {type(error).__name__}: {error}")
        with self._lock:
            self._running.discard(key)
            self._done[key] = answer
            while len(self._done) > KEPT:
                self._done.popitem(last=False)


def _refuse(reason: str) -> FittedLadder:
    return FittedLadder("done", None, refuse_fit(reason).summary, [], None, None, [])


def fit_laws(snapshot: Snapshot, curves: MetricCurves, names: Sequence[str]) -> FittedLadder:
    """Laws, band over sizes, points at equal images, the frontier over compute, and graded predictions."""
    losses = compose_comparison(curves, names)
    fit = fit_ladder([snapshot.by_name[name].run for name in names], losses)
    images = fit.summary.images
    points = []
    for curve in fit.curves:
        loss = interpolate_loss(curve, images) if images else float(curve.loss[-1])
        points.append(FittedRun(curve.run, curve.parameters, round_number(loss), images or float(curve.images[-1])))
    predictions = grade(snapshot.shared, [run.run for run in snapshot.runs], losses)
    return FittedLadder("done", curves.metric, fit.summary, points, _draw_band(fit), _draw_frontier(fit), predictions)


def compose_comparison(curves: MetricCurves, names: Sequence[str]) -> Comparison:
    """The curves of these runs as the report's `Comparison`."""
    points = {name: curves.by_run[name].to_points() for name in names}
    return Comparison(curves.metric, curves.protocol, curves.higher_is_better, points)


def _draw_band(fit: LadderFit) -> LawBand | None:
    if fit.size is None:
        return None
    sizes, ahead = [curve.parameters for curve in fit.curves], fit.summary.next_rung
    grid = np.geomspace(min(sizes) * 0.9, max([*sizes, ahead.parameters if ahead else 0]) * 1.15, GRID)
    bands = [fit.size.loss(size) for size in grid]
    return LawBand(
        parameters=round_numbers(grid),
        value=round_numbers(fit.size.law(grid)),
        low=[round_number(band.low) for band in bands],
        high=[round_number(band.high) for band in bands],
    )


def _draw_frontier(fit: LadderFit) -> FrontierCurve | None:
    if fit.compute is None:
        return None
    low, high = (f(float(c.compute[k]) for c in fit.curves) for f, k in ((min, 0), (max, -1)))
    grid = np.geomspace(low, high, GRID)
    return FrontierCurve(compute=round_numbers(grid), value=round_numbers(fit.compute.law(grid)))


def _hash_inputs(snapshot: Snapshot, curves: MetricCurves, names: Sequence[str]) -> str:
    """A hash of all data that the fit uses."""
    parts = [f"{curves.metric} {curves.protocol} {len(snapshot.shared)}"]
    digest = hashlib.sha256()
    for name in names:
        run, series = snapshot.by_name[name].run, curves.by_run[name]
        parts.append(f"{name} {run.parameters} {run.flops_per_image} {run.depth}")
        digest.update(series.images_P.tobytes() + series.value_P.tobytes())
    digest.update("\n".join(parts).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()
