"""What a report is made of, before anything is drawn or written: runs compared, fitted, correlated, put into words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.report import findings as words
from eval.report import tables
from eval.report.fewsteps import FewSteps, compare_few_steps, compose_few_steps
from eval.report.headline import list_missing
from eval.report.law import LadderFit, fit_ladder
from eval.report.predict import GradedPrediction, grade
from eval.report.runs import RunFolder, StoredRuns
from eval.report.series import (
    Comparison,
    ScoreTask,
    compare,
    find_main_loss,
    find_noise_levels,
    group_scores,
    interpolate_loss_at_scores,
    is_number,
)
from eval.scaling.correlation import Correlation, correlate_across_runs, correlate_within_runs, find_equal_images


@dataclass(frozen=True)
class LossCorrelation:
    """Correlation of validation loss with one score. `images`: the number of images seen at which runs are compared;
    None if they share no checkpoint."""

    metric: str
    images: int | None
    across_runs: Correlation
    within_runs: Correlation


@dataclass(frozen=True)
class Analysis:
    """Everything that the pages show. `found` has the comparison of each score, `families` their order on the page."""

    data: StoredRuns
    labels: dict[str, str]
    losses: Comparison | None
    levels: dict[float, Comparison]
    families: dict[str, list[ScoreTask]]
    found: dict[str, Comparison]
    fit: LadderFit
    correlations: list[LossCorrelation]
    calibration: list[tables.CalibrationLine]
    costs: dict[str, tables.TrainingCost]
    graded: list[GradedPrediction]
    findings: list[words.ReportFinding]
    missing: list[str]
    few_steps: FewSteps | None = None

    @property
    def runs(self) -> tuple[RunFolder, ...]:
        return self.data.runs


def analyse(data: StoredRuns) -> Analysis:
    runs, labels = data.runs, label_runs(data.runs)
    names = {row.metric for run in runs for row in run.rows if is_number(row)}
    loss = find_main_loss(metric for run in runs for metric in run.metrics)
    losses = compare(runs, loss) if loss else None
    levels = {t: c for t, name in find_noise_levels(names, loss).items() if (c := compare(runs, name))} if loss else {}
    families = group_scores(names)
    metrics = [metric for tasks in families.values() for task in tasks for metric in task.metrics.values()]
    found = {metric: comparison for metric in metrics if (comparison := compare(runs, metric))}
    fit = fit_ladder(runs, losses)
    correlations = [correlate(losses, found[metric]) for metric in list_headline_metrics(families)] if losses else []
    graded = grade(data.predictions, runs, losses)
    calibration = tables.tabulate_calibration(data.calibration)
    costs = {run.name: tables.measure_cost(run) for run in runs}
    sizes = {run.name: run.parameters or run.depth or 0 for run in runs}
    findings = [
        *words.describe_losses(losses, labels, sizes),
        *words.describe_laws(fit.summary),
        *words.describe_predictions(graded),
        *(f for family, tasks in families.items() for f in words.describe_scores(family, tasks, found, labels)),
        *words.describe_calibration(calibration, any(name.startswith("world_") for name in families)),
        *words.describe_correlations([(line.metric, line.across_runs) for line in correlations]),
        *words.describe_costs(costs),
        *words.describe_left_out([left for c in (losses, *found.values()) if c for left in c.left_out]),
    ]
    missing = list_missing(runs, labels, families, calibration)
    return Analysis(
        data, labels, losses, levels, families, found, fit, correlations, calibration, costs, graded, findings,
        missing, compose_few_steps(runs, compare_few_steps(runs), labels),
    )  # fmt: skip


def label_runs(runs: Sequence[RunFolder]) -> dict[str, str]:
    """`depth 4` where depths tell the runs apart, else their names."""
    depths = [run.depth for run in runs]
    unique = None not in depths and len(set(depths)) == len(depths)
    return {run.name: f"depth {run.depth}" if unique else run.name for run in runs}


def list_headline_metrics(families: Mapping[str, Sequence[ScoreTask]]) -> list[str]:
    """Each family's overall score: on seen compositions and, where there are such, on unseen ones."""
    overall = [task for tasks in families.values() for task in tasks if task.task == "overall"]
    return [metric for task in overall for _, metric in sorted(task.metrics.items())]


def correlate(losses: Comparison, scores: Comparison) -> LossCorrelation:
    """Across runs at equal images and within runs, with the loss that each run had when it was scored."""
    x, y = interpolate_loss_at_scores(losses, scores), scores.values()
    images = find_equal_images(x, y)
    both = [run for run in x if images in x[run]] if images is not None else []
    across = (
        correlate_across_runs([x[run][images] for run in both], [y[run][images] for run in both])
        if images
        else correlate_across_runs([], [])
    )
    within = correlate_within_runs([(list(x[run].values()), [y[run][i] for i in x[run]]) for run in x])
    return LossCorrelation(scores.metric, images, across, within)
