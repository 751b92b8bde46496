"""What a report says, before anything is drawn or written: run folders compared, fitted, correlated, put into words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.report import findings as words
from eval.report import tables
from eval.report.data import ReportData, Run
from eval.report.law import Scaling, fit_ladder
from eval.report.predict import Graded, grade
from eval.report.series import Comparison, Task, compare, level_metrics, loss_when_scored, main_loss, score_families
from eval.scaling.correlation import Correlation, correlate_across_runs, correlate_within_runs, find_equal_images


@dataclass(frozen=True)
class Report:
    """Everything that the pages show, before it is drawn."""

    data: ReportData
    labels: dict[str, str]
    losses: Comparison | None
    levels: dict[float, Comparison]
    families: dict[str, list[Task]]
    found: dict[str, Comparison]
    scaling: Scaling
    correlations: list[tuple[str, int | None, Correlation, Correlation]]
    calibration: list[dict[str, Any]]
    costs: dict[str, dict[str, Any]]
    graded: list[Graded]
    findings: list[words.Finding]
    missing: list[str]

    @property
    def runs(self) -> tuple[Run, ...]:
        return self.data.runs


def analyse(data: ReportData) -> Report:
    runs, labels = data.runs, label_runs(data.runs)
    loss = main_loss(runs)
    losses = compare(runs, loss) if loss else None
    levels = {t: c for t, name in level_metrics(runs, loss).items() if (c := compare(runs, name))} if loss else {}
    families = score_families(runs)
    found = {
        metric: comparison
        for tasks in families.values()
        for task in tasks
        for metric in task.metrics.values()
        if (comparison := compare(runs, metric))
    }
    scaling = fit_ladder(runs, losses)
    correlations = [
        (metric, *correlate(losses, found[metric])) for metric in headline_metrics(families) if losses is not None
    ]
    graded = grade(data.predictions, runs, losses)
    calibration = tables.calibration_table(data.calibration)
    costs = {run.name: tables.cost_of(run) for run in runs}
    sizes = {run.name: run.parameters or run.depth or 0 for run in runs}
    findings = [
        *words.loss_findings(losses, labels, sizes),
        *words.law_findings(scaling),
        *words.prediction_findings(graded),
        *(f for family, tasks in families.items() for f in words.score_findings(family, tasks, found, labels)),
        *words.calibration_findings(calibration, any(name.startswith("world_") for name in families)),
        *words.correlation_findings([(metric, across) for metric, _, across, _ in correlations]),
        *words.cost_findings(costs),
        *words.protocol_findings([left for c in (losses, *found.values()) if c for left in c.left_out]),
    ]
    missing = words.missing_findings(runs, labels, families, calibration)
    return Report(
        data, labels, losses, levels, families, found, scaling, correlations, calibration, costs, graded, findings,
        missing,
    )  # fmt: skip


def label_runs(runs: Sequence[Run]) -> dict[str, str]:
    """`depth 4` where depths tell the runs apart, else their names."""
    depths = [run.depth for run in runs]
    unique = None not in depths and len(set(depths)) == len(depths)
    return {run.name: f"depth {run.depth}" if unique else run.name for run in runs}


def headline_metrics(families: Mapping[str, Sequence[Task]]) -> list[str]:
    """Each family's overall score: on seen compositions and, where there are such, on unseen ones."""
    overall = [task for tasks in families.values() for task in tasks if task.name == "overall"]
    return [metric for task in overall for _, metric in sorted(task.metrics.items())]


def correlate(losses: Comparison, scores: Comparison) -> tuple[int | None, Correlation, Correlation]:
    """(images, across runs at those images, within runs), with the loss that each run had when it was scored."""
    x, y = loss_when_scored(losses, scores), scores.values()
    images = find_equal_images(x, y)
    both = [run for run in x if images in x[run]] if images is not None else []
    across = (
        correlate_across_runs([x[run][images] for run in both], [y[run][images] for run in both])
        if images
        else correlate_across_runs([], [])
    )
    return images, across, correlate_within_runs([(list(x[run].values()), [y[run][i] for i in x[run]]) for run in x])
