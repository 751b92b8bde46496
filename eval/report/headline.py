"""The head of a report: its main numbers, and a list of what is missing in the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.report.findings import find_best_runs, join_names
from eval.report.runs import RunFolder
from eval.report.series import Comparison, ScoreTask, is_loss, is_number
from eval.report.tables import TrainingCost
from eval.report.text import format_count, format_duration


def list_missing(
    runs: Sequence[RunFolder],
    labels: Mapping[str, str],
    families: Mapping[str, Sequence[ScoreTask]],
    calibration: Sequence[Any],
) -> list[str]:
    """Sentences, without a full stop, about what a reader would look for in the report and not find.

    `labels`: name of a run -> how the report calls it. `families`: benchmark -> its tasks. `calibration`: lines about
    the judges; [] if there are none.
    """

    def name(run: RunFolder) -> str:
        return run.name if labels[run.name] == run.name else f"{labels[run.name]} ({run.name})"

    missing = [f"{name(run)}: no {piece}" for run in runs for piece in run.missing]
    for run in runs:
        bad = [row.images_seen for row in run.rows if is_loss(row.metric) and not is_number(row)]
        if bad:
            missing.append(
                f"{name(run)}: no usable validation loss at {len(bad)} of its checkpoints (nan, infinite or not "
                f"positive), the first at {format_count(min(bad))} images"
            )
    missing += [f"{name(run)}: no sample images" for run in runs if not run.samples]
    judged = families.keys()
    missing += [
        f"{name(run)}: no scores"
        for run in runs
        if judged and not judged & {metric.split("/")[0] for metric in run.metrics}
    ]
    if not families:
        missing.append("no scores (python -m eval run judges images of the checkpoints)")
    if families and not calibration:
        missing.append("no calibration of the judges (ground truth, shuffled scenes and noise)")
    if len(runs) == 1:
        missing.append("only one run, so nothing is compared")
    return missing


@dataclass(frozen=True)
class HeadlineNumber:
    """A formatted number, and the words below it that say what it is."""

    value: str
    text: str


def choose_headlines(
    losses: Comparison | None,
    families: Mapping[str, Sequence[ScoreTask]],
    found: Mapping[str, Comparison],
    costs: Mapping[str, TrainingCost],
    labels: Mapping[str, str],
) -> list[HeadlineNumber]:
    """At most five numbers: the lowest loss, the best overall scores of two benchmarks, images, time.

    `families`: benchmark -> its tasks, overall first. `found`: metric -> its values. Scores of seen compositions are
    preferred where a benchmark has them.
    """
    numbers = []
    if losses:
        run = min(losses.points, key=lambda name: losses.points[name][-1].value)
        numbers.append(HeadlineNumber(f"{losses.points[run][-1].value:.4g}", f"lowest validation loss ({labels[run]})"))
    for family, tasks in list(families.items())[:2]:
        metric = next(iter(sorted(tasks[0].metrics.items(), key=lambda item: item[0] != "seen")))[1]
        ends = {run: points[-1].value for run, points in found[metric].points.items()}
        best = find_best_runs(ends, found[metric].higher_is_better)
        where = ", seen compositions" if metric.endswith("/seen") else ""
        whose = join_names([labels[run] for run in best]) if len(ends) == 1 or len(best) < len(ends) else "every run"
        numbers.append(HeadlineNumber(f"{ends[best[0]]:.3g}", f"best {family}{where} ({whose})"))
    images = [cost.images for cost in costs.values() if cost.images]
    seconds = [cost.seconds for cost in costs.values() if cost.seconds is not None]
    if images:
        numbers.append(HeadlineNumber(format_count(max(images)), f"images seen by the longest of {len(costs)} runs"))
    if seconds:
        numbers.append(HeadlineNumber(format_duration(sum(seconds)), "training time of all runs"))
    return numbers
