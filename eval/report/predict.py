"""Predictions that can be checked: `python -m eval predict` stores what the law says of a depth not yet trained.

The row is in RUNS/results (immutable, named by its content) and says which curves the law was fitted to. Once that
depth is trained, reports grade the prediction: the measured value, whether it is inside the interval, and whether the
prediction came before the run.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from eval.report.law import LadderFit, Prediction, collect_curves, fit_ladder, is_inside
from eval.report.runs import RunFolder, count_parameters, read_runs
from eval.report.series import Comparison, compare, find_main_loss
from eval.report.text import format_count
from eval.scaling.intervals import Interval
from eval.scaling.laws import LossCurve, interpolate_loss
from infra import storage
from infra.codec import Number, from_json, to_json
from infra.errors import UserError
from infra.results import ResultRow, ResultStore
from infra.version import code_version

PREFIX = "prediction/"


@dataclass(frozen=True)
class PredictionDetails:
    """The details of a prediction's row."""

    depth: int
    parameters: int
    fitted_to: tuple[str, ...]
    floor: Number
    exponents: tuple[Number, ...]
    backbone: str = "mmdit"


@dataclass(frozen=True)
class GradedPrediction(Prediction):
    """A prediction as committed, and what came of it: `run` is the run of that depth, if there is one.

    Of several runs of that depth and backbone the one that began first is graded: none can be picked. `first`: it was
    committed before that run had any row; null, as `actual`, where `reason` says why it is not graded.
    """

    metric: str
    created: str
    fitted_to: tuple[str, ...]
    backbone: str
    run: str | None
    first: bool | None
    reason: str


def predict(runs: str, depth: int | None = None) -> GradedPrediction:
    """Fit the ladder under `runs`, and store what it says about `depth` (the next rung unless given).

    What the same curves have said already stands as it was first stored.
    """
    data = read_runs(runs)
    loss = find_main_loss(metric for run in data.runs for metric in run.metrics)
    losses = compare(data.runs, loss) if loss else None
    fit = fit_ladder(data.runs, losses)
    if fit.size is None or losses is None:
        raise UserError(f"{runs}: no prediction, because no law is fitted: {fit.summary.reason}")
    depth, parameters = _choose_rung(data.runs, fit, depth)
    kind = next(run.backbone for run in data.runs if run.name == fit.curves[0].run)
    there = [run.name for run in data.runs if run.depth == depth and run.backbone == kind]
    if there:
        raise UserError(f"depth {depth} is there already ({', '.join(there)}): a prediction must come before its run")
    interval, law = fit.size.loss(parameters, new_run=True), fit.size.law
    fitted_to = tuple(curve.run for curve in fit.curves)
    details = PredictionDetails(depth, parameters, fitted_to, law.floor, tuple(law.exponents), kind)
    row = ResultRow(
        run="prediction",
        recipe_hash=_hash_curves(fit.curves),
        code_version=code_version(),
        images_seen=round(fit.summary.images),
        metric=f"{PREFIX}{losses.metric}/d{depth}",
        value=interval.value,
        higher_is_better=False,
        sample_count=len(fit.curves),
        protocol_hash=losses.protocol,
        low=interval.low,
        high=interval.high,
        details=json.dumps(to_json(details)),
    )
    before = next((earlier for earlier in data.predictions if earlier.key == row.key), None)
    if before is None:
        ResultStore(storage.join(runs, "results")).append([row])
    found = read_prediction(before or row)
    assert found is not None
    return found


def _choose_rung(runs: Sequence[RunFolder], fit: LadderFit, depth: int | None) -> tuple[int, int]:
    """(depth, exact parameters) of what is predicted."""
    ahead = fit.summary.next_rung
    if depth is None or (ahead is not None and ahead.depth == depth):
        if ahead is None or ahead.depth is None:
            raise UserError("the runs' recipes do not say their depths, so there is no next rung to predict")
        return ahead.depth, ahead.parameters
    fitted = {curve.run for curve in fit.curves}
    model = next((run.recipe_field("model") for run in reversed(runs) if run.name in fitted), None)
    parameters = count_parameters(model, depth=depth)
    if parameters is None:
        raise UserError(f"the parameters of depth {depth} cannot be counted from these runs' recipes")
    return depth, parameters


def _hash_curves(curves: Sequence[LossCurve]) -> str:
    """A hash of the curves that the law was fitted to: predictions from the same data have the same hash."""
    content = [[c.run, c.parameters, c.images.tolist(), c.loss.tolist()] for c in curves]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def read_prediction(row: ResultRow) -> GradedPrediction | None:
    """The prediction in a stored row; None if the row cannot be read as one."""
    if row.low is None or row.high is None:
        return None
    try:
        details = from_json(PredictionDetails, row.details, where="details of a prediction")
    except UserError:
        return None
    return GradedPrediction(
        details.depth, details.parameters, float(row.images_seen), Interval(row.value, row.low, row.high),
        actual=None, inside=None,
        metric=row.metric.removeprefix(PREFIX).rsplit("/", 1)[0], created=row.created,
        fitted_to=details.fitted_to, backbone=details.backbone, run=None, first=None, reason="",
    )  # fmt: skip


def grade(rows: Iterable[ResultRow], runs: Sequence[RunFolder], losses: Comparison | None) -> list[GradedPrediction]:
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


def _grade(
    found: GradedPrediction, row: ResultRow, runs: Sequence[RunFolder], losses: Comparison | None
) -> GradedPrediction:
    candidates = [run for run in runs if run.depth == found.depth and run.backbone == found.backbone]
    candidates = [run for run in candidates if losses is not None and run.name in losses.points] or candidates
    target = min(candidates, key=lambda run: run.began or "~", default=None)
    if target is None:
        return replace(found, reason="not trained yet")
    if losses is None or losses.metric != found.metric or losses.protocol != row.protocol_hash:
        return replace(found, run=target.name, reason="measured under another protocol than predicted")
    curve = next((c for c in collect_curves([target], losses)), None)
    actual = interpolate_loss(curve, found.images) if curve is not None else float("nan")
    if actual != actual:
        return replace(found, run=target.name, reason=f"no loss at {format_count(found.images)} images yet")
    first = target.began > found.created and target.name not in found.fitted_to if target.began else None
    return replace(found, run=target.name, actual=actual, inside=is_inside(found.loss, actual), first=first)


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
        f"depth {found.depth} ({format_count(found.parameters)} parameters): {found.metric} at "
        f"{format_count(found.images)} images will be {found.loss.value:.5g} "
        f"({found.loss.low:.5g} to {found.loss.high:.5g}, 95 %); committed {found.created}"
    )
