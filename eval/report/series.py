"""Result rows as comparable series: one value per run and number of images, all measured under one protocol.

A protocol (prompts, seeds, sampler, judges) is named by its hash. Values under another one are left out and reported.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from eval.report.runs import LOSS, RunFolder
from infra.codec import Number
from infra.results import ResultRow

# First parts of metric names that are not scores of the model.
NOT_SCORES = {"val_loss", "train_loss", "cost", "calibration", "prediction", "plan", "fewstep"}
TASK_ORDER = (
    "overall", "single_object", "two_object", "counting", "colors", "position", "color_attr", "color", "shape",
    "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex",
)  # fmt: skip
SCORES = ("geneval", "compbench", "clip_score", "fid", "inception_fid", "typography", "ocr")


@dataclass(frozen=True)
class MetricPoint:
    """A metric at one number of training images, with its 95 % interval; `count`: samples behind it."""

    images: int
    value: Number
    low: float | None
    high: float | None
    count: int

    @staticmethod
    def of(row: ResultRow) -> "MetricPoint":
        return MetricPoint(row.images_seen, row.value, row.low, row.high, row.sample_count)


@dataclass(frozen=True)
class LeftOut:
    """A run's number that may not stand beside the others."""

    metric: str
    run: str
    value: float
    protocol: str
    kept_protocol: str


@dataclass(frozen=True)
class Comparison:
    """One metric under one protocol: run -> its points by images. `left_out`: runs that only have other protocols."""

    metric: str
    protocol: str
    higher_is_better: bool
    points: dict[str, list[MetricPoint]] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()

    def values(self) -> dict[str, dict[int, float]]:
        return {run: {p.images: p.value for p in points} for run, points in self.points.items()}

    def at(self, run: str, images: int | None = None) -> MetricPoint | None:
        """The point at `images`, or the run's last."""
        points = self.points.get(run, [])
        if images is None:
            return points[-1] if points else None
        return next((p for p in points if p.images == images), None)

    @property
    def last_common(self) -> int | None:
        """The largest number of images at which every run here has a value, or None."""
        common = (
            set.intersection(*({p.images for p in points} for points in self.points.values())) if self.points else set()
        )
        return max(common, default=None)


def compare(runs: Sequence[RunFolder], metric: str) -> Comparison | None:
    """All runs' values of a metric under the protocol that most runs have (then most points, then most samples)."""
    rows = [row for run in runs for row in run.rows if row.metric == metric and is_number(row)]
    if not rows:
        return None
    owner = {id(row): run.name for run in runs for row in run.rows}
    kept = pick_protocol([(owner[id(row)], row.protocol_hash, 1, row.sample_count) for row in rows])
    points: dict[str, list[MetricPoint]] = {}
    other_rows: dict[str, ResultRow] = {}
    for row in sorted(rows, key=lambda row: row.images_seen):
        if row.protocol_hash == kept:
            # A store may hold two recipes of one run name (it was started anew): the later row stands.
            points_of_run = points.setdefault(owner[id(row)], [])
            if points_of_run and points_of_run[-1].images == row.images_seen:
                points_of_run.pop()
            points_of_run.append(MetricPoint.of(row))
        else:
            other_rows[owner[id(row)]] = row
    left = tuple(
        LeftOut(metric, run, row.value, row.protocol_hash, kept) for run, row in other_rows.items() if run not in points
    )
    ordered = {run.name: points[run.name] for run in runs if run.name in points}
    return Comparison(metric, kept, rows[0].higher_is_better, ordered, left)


def is_number(row: ResultRow) -> bool:
    """A diverged run's rows are not; a loss, which is drawn and fitted as its logarithm, must be positive, too."""
    return math.isfinite(row.value) and (row.value > 0 or not row.metric.startswith(LOSS))


def pick_protocol(measured: Sequence[tuple[str, str, int, int]]) -> str:
    """The protocol that most runs have; of several, the one with most points, then most samples. `measured` holds (run,
    protocol, points, sample count)."""
    runs: dict[str, set[str]] = {}
    points: dict[str, int] = {}
    samples: dict[str, int] = {}
    for run, protocol, count, sample_count in measured:
        runs.setdefault(protocol, set()).add(run)
        points[protocol] = points.get(protocol, 0) + count
        samples[protocol] = max(samples.get(protocol, 0), sample_count)
    return max(runs, key=lambda protocol: (len(runs[protocol]), points[protocol], samples[protocol], protocol))


def interpolate_loss_at_scores(losses: Comparison, scores: Comparison) -> dict[str, dict[int, float]]:
    """run -> images of each scored checkpoint -> validation loss there, read between its neighbours on the curve."""
    found: dict[str, dict[int, float]] = {}
    for run in scores.points.keys() & losses.points.keys():
        curve = [p for p in losses.points[run] if p.images > 0]
        if curve:
            x, y = np.log([p.images for p in curve]), np.log([p.value for p in curve])
            at = [p.images for p in scores.points[run] if curve[0].images <= p.images <= curve[-1].images]
            found[run] = {images: float(np.exp(np.interp(np.log(images), x, y))) for images in at}
    return {run: found[run] for run in scores.points if run in found}


def find_main_loss(metrics: Iterable[str]) -> str | None:
    """The validation loss that most runs have, from each run's metric names in one row; the paper's own on a tie."""
    names = [name for name in metrics if is_loss(name)]
    return max(set(names), key=lambda name: (names.count(name), name == f"{LOSS}sd3"), default=None)


def find_noise_levels(metrics: Iterable[str], loss: str) -> dict[float, str]:
    """Noise level -> metric name, for `val_loss/sd3/t0.125` and its siblings."""
    found: dict[float, str] = {}
    for name in (name for name in metrics if name.startswith(f"{loss}/t")):
        try:
            level = float(name.removeprefix(f"{loss}/t"))
        except ValueError:
            continue
        if math.isfinite(level):
            found[level] = name
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class ScoreTask:
    """One task of a benchmark. `metrics`: split ("seen", "unseen" or "all") -> name of the metric."""

    task: str
    metrics: dict[str, str]


def group_scores(metrics: Iterable[str]) -> dict[str, list[ScoreTask]]:
    """`world_geneval` -> its tasks, overall first. Known benchmarks first, then whatever else was measured."""
    names = sorted(name for name in metrics if name.split("/")[0] not in NOT_SCORES)
    families: dict[str, dict[str, dict[str, str]]] = {}
    for name in names:
        family, *path = name.split("/")
        split = path.pop() if path and path[-1] in ("seen", "unseen") else "all"
        families.setdefault(family, {}).setdefault("/".join(path) or "overall", {})[split] = name

    def rank(family: str) -> tuple[int, str]:
        return next((i for i, known in enumerate(SCORES) if family.endswith(known)), len(SCORES)), family

    return {
        family: [ScoreTask(task, families[family][task]) for task in sorted(families[family], key=_task_rank)]
        for family in sorted(families, key=rank)
    }


def _task_rank(task: str) -> tuple[int, str]:
    return TASK_ORDER.index(task) if task in TASK_ORDER else len(TASK_ORDER), task


def is_loss(metric: str) -> bool:
    """`val_loss/sd3`, not its noise levels."""
    return metric.startswith(LOSS) and metric.count("/") == 1
