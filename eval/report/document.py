"""report.json: every number of a report, without its drawings. The types here are what it holds and how it is read."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from eval.report import tables
from eval.report.analysis import Analysis, LossCorrelation
from eval.report.findings import ReportFinding
from eval.report.law import ScalingLaws
from eval.report.predict import GradedPrediction
from eval.report.runs import RunFolder
from eval.report.series import LeftOut, MetricPoint
from eval.scaling.coverage import Coverage, read_coverage
from infra import storage
from infra.codec import from_json, to_json
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


def encode_report(report: Report) -> bytes:
    """The bytes of report.json; a number that is not finite is null.

    Numbers have the types of their fields, as they do when they are read (a plan has whole numbers for some floats): so
    a report that is read and written again keeps its bytes.
    """
    typed = from_json(Report, to_json(report, finite=True), where="the report")
    return (json.dumps(to_json(typed, finite=True), indent=1, allow_nan=False) + "\n").encode()


def read_report(uri: str) -> Report:
    """A report.json, local or s3://; UserError where it is not one of this version."""
    advice = "not a report of this version; write it again from its runs (python -m eval report)"
    return from_json(Report, storage.read_bytes(uri), where=uri, advice=advice)
