"""report.json: every number of a report, without its drawings. The types here are what it holds and how it is read."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError

from eval.report import tables
from eval.report.analysis import Analysis, LossCorrelation
from eval.report.findings import ReportFinding
from eval.report.law import ScalingLaws
from eval.report.predict import GradedPrediction
from eval.report.runs import RunFolder
from eval.report.series import LeftOut, MetricPoint
from eval.scaling.coverage import Coverage, read_coverage
from infra import storage
from infra.errors import UserError
from infra.version import code_version


@dataclass(frozen=True)
class ReportedRun:
    """`label`: the run's name on the page. `predicted`: what its plan.json said beside what was measured."""

    run: str
    label: str
    depth: int | None
    parameters: int | None
    train_flops_per_image: float | None
    recipe: dict[str, Any]
    cost: tables.TrainingCost
    predicted: tuple[tables.PlannedQuantity, ...]


@dataclass(frozen=True)
class Report:
    """What report.json holds. `losses` and each of `loss_levels` (by noise level t): run -> its curve.

    `scores`: benchmark -> its tasks. `left_out`: values measured under other protocols than those compared.
    `labels`: run -> its name on the page. `coverage`: how often the intervals of such laws hold the truth.
    """

    format: int
    created: str
    code_version: str
    source: str
    findings: list[ReportFinding]
    runs: list[ReportedRun]
    loss_metric: str | None
    losses: dict[str, list[MetricPoint]]
    loss_levels: dict[str, dict[str, list[MetricPoint]]]
    scaling: ScalingLaws
    coverage: Coverage | None
    predictions: list[GradedPrediction]
    scores: dict[str, list[tables.ScoreLine]]
    correlations: list[LossCorrelation]
    calibration: list[tables.CalibrationLine]
    recipe_differences: list[tables.RecipeDifference]
    left_out: list[LeftOut]
    missing: list[str]
    provenance: list[tables.RunProvenance]
    protocols: list[tables.ProtocolUse]
    labels: dict[str, str]


def compose_report(analysis: Analysis) -> Report:
    losses, families = analysis.losses, analysis.families
    compared = {**analysis.found, **{c.metric: c for c in (losses, *analysis.levels.values()) if c}}
    return Report(
        format=1,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        code_version=code_version(),
        source=analysis.data.uri,
        findings=analysis.findings,
        runs=[_describe_run(run, analysis) for run in analysis.runs],
        loss_metric=losses.metric if losses else None,
        losses=losses.points if losses else {},
        loss_levels={f"{t:g}": c.points for t, c in analysis.levels.items()},
        scaling=analysis.fit.summary,
        coverage=read_coverage(),
        predictions=analysis.graded,
        scores={
            family: tables.tabulate_scores(tasks, analysis.found, list(analysis.labels))
            for family, tasks in families.items()
        },
        correlations=analysis.correlations,
        calibration=analysis.calibration,
        recipe_differences=tables.compare_recipes(analysis.runs, ignore=("name", "data.fingerprint")),
        left_out=[left for c in compared.values() for left in c.left_out],
        missing=analysis.missing,
        provenance=tables.trace_provenance(analysis.runs),
        protocols=tables.list_protocols(compared),
        labels=analysis.labels,
    )


def _describe_run(run: RunFolder, analysis: Analysis) -> ReportedRun:
    return ReportedRun(
        run.name,
        analysis.labels[run.name],
        run.depth,
        run.parameters,
        run.flops_per_image,
        dict(run.recipe),
        analysis.costs[run.name],
        tables.compare_plan(run),
    )


def encode_json(value: Any) -> Any:
    """Dataclasses as JSON has them; a number that is not finite becomes null.

    Not pydantic's own: that refuses half a surrogate pair, which JSON can escape and which odd names do hold.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if dataclasses.is_dataclass(value):
        return {field.name: encode_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode_json(inner) for key, inner in value.items()}
    return [encode_json(inner) for inner in value]


def encode_report(report: Report) -> bytes:
    """The bytes of report.json."""
    return (json.dumps(encode_json(report), indent=1, allow_nan=False) + "\n").encode()


def read_report(uri: str) -> Report:
    """A report.json, local or s3://; UserError where it is not one of this version."""
    try:
        return TypeAdapter(Report).validate_json(storage.read_bytes(uri))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{uri}: not a report.json of this version: {place}: {first['msg']}") from error
