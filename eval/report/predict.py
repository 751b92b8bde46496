"""Predictions that can be checked: `python -m eval predict` stores what the law says about a depth not yet trained.

The row lies in RUNS/results (immutable, named by its content) and says which curves it was fitted to. Once that depth
is trained, reports grade it: measured value, inside the interval or not, and whether it really came first.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eval.report.data import Run, counted_parameters, read_runs
from eval.report.law import Scaling, curves_of, fit_ladder
from eval.report.series import Comparison, compare, main_loss
from eval.report.style import count_text
from eval.scaling.intervals import Interval
from eval.scaling.laws import interpolate_loss
from infra import storage
from infra.errors import UserError
from infra.results import ResultRow, ResultStore
from infra.version import code_version

PREFIX = "prediction/"


@dataclass(frozen=True)
class Graded:
    """A committed prediction, and what came of it. `first`: committed before the run had any row; None: not trained.

    Where several runs of that depth and backbone are there, the one that began first is graded: none can be picked.
    """

    metric: str
    depth: int
    parameters: int
    images: float
    loss: Interval
    created: str
    fitted_to: tuple[str, ...]
    backbone: str = "mmdit"
    run: str | None = None
    actual: float | None = None
    first: bool | None = None
    reason: str = ""

    @property
    def inside(self) -> bool | None:
        return None if self.actual is None else self.loss.low <= self.actual <= self.loss.high


def predict(runs: str, depth: int | None = None) -> Graded:
    """Fit the ladder under `runs`, and store what it says about `depth` (the next rung unless given).

    What the same curves have said already stands as it was first stored.
    """
    data = read_runs(runs)
    loss = main_loss(data.runs)
    losses = compare(data.runs, loss) if loss else None
    scaling = fit_ladder(data.runs, losses)
    if scaling.reason is not None or losses is None:
        raise UserError(f"{runs}: no prediction, because no law is fitted: {scaling.reason}")
    depth, parameters = _rung(data.runs, scaling, depth)
    kind = next(run.backbone for run in data.runs if run.name == scaling.curves[0].run)
    there = [run.name for run in data.runs if run.depth == depth and run.backbone == kind]
    if there:
        raise UserError(f"depth {depth} is there already ({', '.join(there)}): a prediction must come before its run")
    assert scaling.size is not None
    interval = scaling.size.loss(parameters, new_run=True)
    row = ResultRow(
        run="prediction",
        recipe_hash=_fit_hash(scaling),
        code_version=code_version(),
        images_seen=round(scaling.images),
        metric=f"{PREFIX}{losses.metric}/d{depth}",
        value=interval.value,
        higher_is_better=False,
        sample_count=len(scaling.curves),
        protocol_hash=losses.protocol,
        low=interval.low,
        high=interval.high,
        details=json.dumps(
            {"depth": depth, "backbone": kind, "parameters": parameters,
             "fitted_to": [curve.run for curve in scaling.curves],
             "floor": scaling.size.law.floor, "exponents": scaling.size.law.exponents}
        ),
    )  # fmt: skip
    before = next((earlier for earlier in data.predictions if earlier.key == row.key), None)
    if before is None:
        ResultStore(storage.join(runs, "results")).append([row])
    found = read_prediction(before or row)
    assert found is not None
    return found


def _rung(runs: Sequence[Run], scaling: Scaling, depth: int | None) -> tuple[int, int]:
    """(depth, exact parameters) of what is predicted."""
    ahead = scaling.next_rung
    if depth is None or (ahead is not None and ahead.depth == depth):
        if ahead is None or ahead.depth is None:
            raise UserError("the runs' recipes do not say their depths, so there is no next rung to predict")
        return ahead.depth, ahead.parameters
    fitted = {curve.run for curve in scaling.curves}
    model = next((run.recipe.get("model") for run in reversed(runs) if run.name in fitted), None)
    parameters = counted_parameters({**model, "depth": depth}) if isinstance(model, dict) else None
    if parameters is None:
        raise UserError(f"the parameters of depth {depth} cannot be counted from these runs' recipes")
    return depth, parameters


def _fit_hash(scaling: Scaling) -> str:
    """Of the curves that the law was fitted to: two predictions from the same data are told to be so."""
    told = [[c.run, c.parameters, c.images.tolist(), c.loss.tolist()] for c in scaling.curves]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def read_prediction(row: ResultRow) -> Graded | None:
    """From a stored row, or None where it is not one that can be read."""
    try:
        told: dict[str, Any] = json.loads(row.details)
        if row.low is None or row.high is None:
            return None
        loss = Interval(row.value, row.low, row.high)
        metric = row.metric.removeprefix(PREFIX).rsplit("/", 1)[0]
        fitted_to = tuple(str(run) for run in told["fitted_to"])
        return Graded(
            metric, int(told["depth"]), int(told["parameters"]), float(row.images_seen), loss, row.created, fitted_to,
            str(told.get("backbone", "mmdit")),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def grade(rows: Iterable[ResultRow], runs: Sequence[Run], losses: Comparison | None) -> list[Graded]:
    """Every prediction among the rows beside what was measured at the same images under the same protocol.

    Of two from the same curves the one that was stored first counts.
    """
    stored = sorted((row for row in rows if row.metric.startswith(PREFIX)), key=lambda row: row.created, reverse=True)
    first = {row.key: row for row in stored}
    return [
        _grade(found, row, runs, losses)
        for row in reversed(first.values())
        if (found := read_prediction(row)) is not None
    ]


def _grade(found: Graded, row: ResultRow, runs: Sequence[Run], losses: Comparison | None) -> Graded:
    there = [run for run in runs if run.depth == found.depth and run.backbone == found.backbone]
    there = [run for run in there if losses is not None and run.name in losses.points] or there
    target = min(there, key=lambda run: run.began or "~", default=None)
    if target is None:
        return replace(found, reason="not trained yet")
    if losses is None or losses.metric != found.metric or losses.protocol != row.protocol_hash:
        return replace(found, run=target.name, reason="measured under another protocol than predicted")
    curve = next((c for c in curves_of([target], losses)), None)
    actual = interpolate_loss(curve, found.images) if curve is not None else float("nan")
    if actual != actual:
        return replace(found, run=target.name, reason=f"no loss at {count_text(found.images)} images yet")
    first = target.began > found.created and target.name not in found.fitted_to if target.began else None
    return replace(found, run=target.name, actual=actual, first=first)


@dataclass(frozen=True)
class PredictOptions:
    """Which ladder, which depth."""

    runs: str
    """folder (or s3:// prefix) of run folders"""
    depth: int | None = None
    """the depth to predict; None is the next rung of the ladder"""


def predict_next(options: PredictOptions) -> None:
    """Store what the fitted law says about a depth that is not trained yet; reports grade it once it is."""
    found = predict(options.runs, options.depth)
    print(
        f"depth {found.depth} ({count_text(found.parameters)} parameters): {found.metric} at "
        f"{count_text(found.images)} images will be {found.loss.value:.5g} "
        f"({found.loss.low:.5g} to {found.loss.high:.5g}, 95 %); committed {found.created}"
    )
