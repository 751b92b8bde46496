"""Routes about numbers: metrics over images, noise levels, scores with intervals, calibration, scaling laws."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from fastapi import FastAPI, HTTPException, Query, Response

from eval.report.series import ScoreTask, find_noise_levels
from eval.report.tables import (
    PAPER_GENEVAL,
    PAPER_TASKS,
    CalibrationLine,
    ScoreLine,
    compose_score_line,
    tabulate_calibration,
)
from eval.service.answers import Answers, AtImages, JsonAnswer, RunNames, describe_refusals
from eval.service.law import FittedLadder, FittingLadder
from eval.service.snapshot import IndexedRun, MetricCurves, MetricSeries, Snapshot, round_numbers
from infra.codec import Number


@dataclass(frozen=True)
class MetricList:
    """`families`: benchmark -> its tasks; `loss`: the validation loss that most runs have."""

    loss: str | None
    families: dict[str, list[ScoreTask]]
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class RunSeries:
    """Columns of equal length."""

    name: str
    parameters: int | None
    depth: int | None
    flops_per_image: float | None
    images: list[int]
    value: list[Number]
    low: list[Number]
    high: list[Number]
    count: list[int]


@dataclass(frozen=True)
class SeriesList:
    """`left_out`: runs measured under other protocols only -> their hashes."""

    metric: str
    protocol: str | None
    higher_is_better: bool
    left_out: dict[str, str]
    runs: list[RunSeries]


@dataclass(frozen=True)
class RunLevels:
    """Columns of equal length: noise level t (1 is noise) and the loss there."""

    name: str
    images: int
    t: list[float]
    value: list[Number]


@dataclass(frozen=True)
class LevelList:
    """`levels`: noise level -> name of the metric."""

    metric: str | None
    levels: dict[str, str]
    runs: list[RunLevels]


@dataclass(frozen=True)
class ScoreTable:
    """`world`: judged by the world's small judges, so never comparable with `published` (model -> task -> score)."""

    family: str
    world: bool
    lines: list[ScoreLine]
    published: dict[str, dict[str, float]]


@dataclass(frozen=True)
class CalibrationTable:
    lines: list[CalibrationLine]


def add_number_routes(app: FastAPI, answers: Answers) -> None:
    @app.get("/api/metrics", response_model=MetricList, tags=["numbers"],
             summary="Names of metrics; benchmarks with their tasks")  # fmt: skip
    def metrics() -> Response:
        now = answers.now
        return JsonAnswer(MetricList(now.main_loss, now.families, now.metrics))

    @app.get("/api/series", response_model=SeriesList, tags=["numbers"],
             summary="One metric over images, per run, under one protocol")  # fmt: skip
    def series(metric: str, run: RunNames = None, points: Annotated[int, Query(ge=2, le=5000)] = 300) -> Response:
        return answers.answer(
            ("series", metric, points, *(run or [])), lambda now: list_series(now, metric, run, points=points)
        )

    @app.get("/api/levels", response_model=LevelList, tags=["numbers"], summary="Validation loss per noise level")
    def levels(run: RunNames = None, images: AtImages = None) -> Response:
        return answers.answer(("levels", images, *(run or [])), lambda now: list_levels(now, run, images))

    @app.get("/api/scores", response_model=ScoreTable, tags=["numbers"],
             summary="A benchmark's tasks with intervals",
             responses=describe_refusals(_404="no such family"))  # fmt: skip
    def scores(family: str, run: RunNames = None, images: AtImages = None) -> Response:
        if family not in answers.now.families:
            raise HTTPException(404, f"no metric family named {family!r}")
        return answers.answer(
            ("scores", family, images, *(run or [])), lambda now: list_scores(now, family, run, images)
        )

    @app.get("/api/calibration", response_model=CalibrationTable, tags=["numbers"],
             summary="What the judges give to truth, shuffled scenes and noise")  # fmt: skip
    def calibration() -> Response:
        return JsonAnswer(list_calibration(answers.now))

    @app.get("/api/scaling", response_model=FittedLadder | FittingLadder, tags=["numbers"],
             summary="Laws, frontier, predictions, or that they are being fitted")  # fmt: skip
    def scaling(run: RunNames = None) -> Response:
        return JsonAnswer(answers.law.find(answers.now, run))


def list_series(snapshot: Snapshot, metric: str, names: Sequence[str] | None, *, points: int) -> SeriesList:
    """A metric's points per run, at most `points` of each, and which runs were measured otherwise."""
    found = snapshot.select_curves(metric)
    if found is None:
        return SeriesList(metric, None, False, {}, [])
    runs = snapshot.choose(names)
    thinned = [_thin(run, found.by_run[run.name], points) for run in runs if run.name in found.by_run]
    return SeriesList(metric, found.protocol, found.higher_is_better, _list_left_out(found, runs), thinned)


def _list_left_out(curves: MetricCurves, runs: Sequence[IndexedRun]) -> dict[str, str]:
    return {run.name: curves.left_out[run.name] for run in runs if run.name in curves.left_out}


def _thin(run: IndexedRun, series: MetricSeries, points: int) -> RunSeries:
    """Columns for a chart; a longer series is thinned evenly, its first and last point kept."""
    pick = np.arange(len(series.images_P))
    if len(pick) > points:
        pick = np.unique(np.linspace(0, len(pick) - 1, points).round().astype(int))
    return RunSeries(
        run.name,
        run.run.parameters,
        run.run.depth,
        run.run.flops_per_image,
        images=series.images_P[pick].tolist(),
        value=round_numbers(series.value_P[pick]),
        low=round_numbers(series.low_P[pick]),
        high=round_numbers(series.high_P[pick]),
        count=series.count_P[pick].tolist(),
    )


def list_levels(snapshot: Snapshot, names: Sequence[str] | None, images: int | None) -> LevelList:
    """Loss at each noise level, per run, at its last checkpoint or at `images`."""
    loss = snapshot.main_loss
    levels = find_noise_levels(snapshot.metrics, loss) if loss else {}
    found = {t: curves for t, metric in levels.items() if (curves := snapshot.select_curves(metric))}
    runs = []
    for run in snapshot.choose(names):
        points = {t: point for t, curves in found.items() if (point := curves.find_point(run.name, images))}
        if points:
            first, values = next(iter(points.values())), [point.value for point in points.values()]
            runs.append(RunLevels(run.name, first.images, list(points), values))
    return LevelList(loss, {f"{t:g}": metric for t, metric in levels.items()}, runs)


def list_scores(snapshot: Snapshot, family: str, names: Sequence[str] | None, images: int | None) -> ScoreTable:
    """A benchmark's tasks with intervals: each run's last value, or the one at `images`."""
    runs = snapshot.choose(names)
    lines = []
    for task in snapshot.families.get(family, []):
        for split, metric in sorted(task.metrics.items()):
            if found := snapshot.select_curves(metric):
                points = {run.name: point for run in runs if (point := found.find_point(run.name, images))}
                left_out = _list_left_out(found, runs)
                lines.append(compose_score_line(task, split, points, left_out, higher=found.higher_is_better))
    # Only the official benchmark may have the paper's own figures beside it.
    paper = {f"SD3 depth {depth}": dict(zip(PAPER_TASKS, values)) for depth, values in PAPER_GENEVAL.items()}
    return ScoreTable(family, family.startswith("world_"), lines, paper if family == "geneval" else {})


def list_calibration(snapshot: Snapshot) -> CalibrationTable:
    """What the judges give to ground truth, to shuffled scenes and to noise: overall scores only."""
    rows = {row.key: row for row in snapshot.shared if row.metric.startswith("calibration/")}
    lines = tabulate_calibration(list(rows.values()))
    return CalibrationTable([line for line in lines if "overall" in line.metric or "/" not in line.metric])
