"""The tables of a report: cost, plan against reality, recipe differences, calibration of judges, scores, provenance."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.report.runs import RunFolder, parse_finite
from eval.report.series import Comparison, MetricPoint, ScoreTask, is_number
from infra.results import ResultRow

# What judges must give to the world's own scenes, and may give at most to scenes of other captions and to noise.
TRUTH_AT_LEAST, SHUFFLED_AT_MOST, NOISE_AT_MOST = 0.95, 0.10, 0.05
AS_IT_MUST_BE = "as it must be"
# The part of a calibration row's metric name that says which pictures were judged.
CONTROLS = ("ground_truth", "shuffled", "noise")
# SD3 Table 5 (Esser et al. 2024, arXiv 2403.03206): GenEval at 512 px without DPO, in the order of PAPER_TASKS.
PAPER_GENEVAL = {
    18: (0.58, 0.97, 0.72, 0.52, 0.78, 0.16, 0.34),
    24: (0.62, 0.98, 0.74, 0.63, 0.67, 0.34, 0.36),
    30: (0.64, 0.96, 0.80, 0.65, 0.73, 0.33, 0.37),
    38: (0.68, 0.98, 0.84, 0.66, 0.74, 0.40, 0.43),
}
PAPER_TASKS = ("overall", "single_object", "two_object", "counting", "colors", "position", "color_attr")


@dataclass(frozen=True)
class TrainingCost:
    """What a run has cost so far. `efficiency`: achieved over the device's peak FLOPs per second (MFU)."""

    images: int
    seconds: float | None
    images_per_second: float | None
    flops: float | None
    flops_per_second: float | None
    efficiency: float | None


@dataclass(frozen=True)
class PlannedQuantity:
    """A number that a plan predicted, and what was measured. `ratio`: measured over planned."""

    name: str
    planned: float
    measured: float | None
    ratio: float | None


@dataclass(frozen=True)
class RecipeDifference:
    """A dotted field in which recipes differ, and its value in each run as text."""

    field: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class CalibrationLine:
    """What one metric gives to pictures that are right, to right ones of other prompts and to noise.

    `verdict` is null for a metric without a known ceiling, or while a control is missing.
    """

    metric: str
    ground_truth: MetricPoint | None
    shuffled: MetricPoint | None
    noise: MetricPoint | None
    protocols: tuple[str, ...]
    verdict: str | None


@dataclass(frozen=True)
class ScoreLine:
    """One task of a benchmark under one protocol: each run's point, by run name.

    `best`: runs whose order the interval of the best one leaves open; empty where runs are not at equal images.
    `left_out`: runs that were measured under other protocols only -> their hashes.
    """

    task: str
    split: str
    metric: str
    higher_is_better: bool
    runs: dict[str, MetricPoint]
    best: tuple[str, ...]
    left_out: dict[str, str]


@dataclass(frozen=True)
class RunProvenance:
    """Which recipes, code and data a run's rows come from. `last`: when its latest row was written (ISO 8601)."""

    run: str
    recipe_hashes: tuple[str, ...]
    code_versions: tuple[str, ...]
    data_fingerprint: str
    rows: int
    last: str


@dataclass(frozen=True)
class ProtocolUse:
    """The metrics measured under one protocol, and the sample counts of their numbers."""

    protocol: str
    metrics: tuple[str, ...]
    samples: tuple[int, ...]


def measure_cost(run: RunFolder) -> TrainingCost:
    """Time, speed, work and efficiency of one run so far."""
    seconds, speed = _find_last(run, "cost/seconds"), _find_last(run, "cost/images_per_second")
    images = max((row.images_seen for row in run.rows if row.metric.startswith(("cost/", "train_loss"))), default=0)
    images = images or run.images
    speed = speed or (images / seconds if seconds and images else None)
    flops = run.flops_per_image * images if run.flops_per_image and images else None
    peak = parse_finite(run.plan.get("peak_flops_per_second")) or parse_finite(run.plan.get("device_peak_flops"))
    rate = run.flops_per_image * speed if run.flops_per_image and speed else None
    return TrainingCost(images, seconds, speed, flops, rate, rate / peak if rate and peak else None)


def compare_plan(run: RunFolder) -> tuple[PlannedQuantity, ...]:
    """Every number that plan.json predicts (under `predicted`) beside the last measured row of the same name."""
    predicted = run.plan.get("predicted", run.plan.get("predictions"))
    lines = []
    for name, value in sorted(predicted.items()) if isinstance(predicted, Mapping) else []:
        planned = parse_finite(value)
        measured = next((m for m in (_find_last(run, name), _find_last(run, f"cost/{name}")) if m is not None), None)
        if planned is not None:
            ratio = measured / planned if measured is not None and planned else None
            lines.append(PlannedQuantity(str(name), planned, measured, ratio))
    return tuple(lines)


def compare_recipes(runs: Sequence[RunFolder], *, ignore: Sequence[str] = ("name",)) -> list[RecipeDifference]:
    """The fields in which the recipes differ; `ignore` names fields that say which run it is, not what it becomes."""
    flat = [flatten(run.recipe) for run in runs]
    fields = sorted({name for recipe in flat for name in recipe} - set(ignore))
    lines = [RecipeDifference(name, tuple(recipe.get(name, "") for recipe in flat)) for name in fields]
    return [line for line in lines if len(set(line.values)) > 1]


def tabulate_calibration(rows: Sequence[ResultRow]) -> list[CalibrationLine]:
    """One line per judged score: what ground truth, shuffled and noise images get, and whether that is as it should."""
    controls: dict[str, dict[str, MetricPoint]] = {}
    protocols: dict[str, set[str]] = {}
    for row in rows:
        parts = row.metric.split("/")[1:]
        control = next((name for name in CONTROLS if name in parts), None)
        if control is not None and is_number(row):
            name = "/".join(part for part in parts if part != control)
            controls.setdefault(name, {})[control] = MetricPoint.of(row)
            protocols.setdefault(name, set()).add(row.protocol_hash)
    lines = []
    for name in sorted(controls, key=_rank_overall_first):
        truth, shuffled, noise = (controls[name].get(control) for control in CONTROLS)
        verdict = _judge(name, truth, shuffled, noise)
        lines.append(CalibrationLine(name, truth, shuffled, noise, tuple(sorted(protocols[name])), verdict))
    return lines


def tabulate_scores(
    tasks: Sequence[ScoreTask], found: Mapping[str, Comparison], runs: Sequence[str]
) -> list[ScoreLine]:
    """One line per task and split: the last checkpoint's number of each of the named runs."""
    lines = []
    for task in tasks:
        for split, metric in sorted(task.metrics.items()):
            comparison = found[metric]
            points = {run: point for run in runs if (point := comparison.at(run))}
            left_out = {left.run: left.protocol for left in comparison.left_out}
            lines.append(compose_score_line(task, split, points, left_out, higher=comparison.higher_is_better))
    return lines


def compose_score_line(
    task: ScoreTask, split: str, points: dict[str, MetricPoint], left_out: dict[str, str], *, higher: bool
) -> ScoreLine:
    return ScoreLine(task.task, split, task.metrics[split], higher, points, _find_best(points, higher), left_out)


def trace_provenance(runs: Sequence[RunFolder]) -> list[RunProvenance]:
    return [
        RunProvenance(
            run.name,
            recipe_hashes=tuple(sorted({row.recipe_hash for row in run.rows})),
            code_versions=tuple(sorted({row.code_version for row in run.rows})),
            data_fingerprint=str(run.recipe_field("data", "fingerprint") or run.plan.get("data_fingerprint") or ""),
            rows=len(run.rows),
            last=max((row.created for row in run.rows), default=""),
        )
        for run in runs
    ]


def list_protocols(found: Mapping[str, Comparison]) -> list[ProtocolUse]:
    """Each protocol with the metrics measured under it."""
    metrics: dict[str, list[str]] = {}
    samples: dict[str, set[int]] = {}
    for metric, comparison in found.items():
        metrics.setdefault(comparison.protocol, []).append(metric)
        counts = {point.count for points in comparison.points.values() for point in points}
        samples.setdefault(comparison.protocol, set()).update(counts)
    return [ProtocolUse(name, tuple(metrics[name]), tuple(sorted(samples[name]))) for name in metrics]


def _judge(
    metric: str, truth: MetricPoint | None, shuffled: MetricPoint | None, noise: MetricPoint | None
) -> str | None:
    """Shares of right images and means of probabilities have a known ceiling; a CLIP score or a FID has none."""
    if not metric.split("/")[0].endswith(("geneval", "compbench")) or "overall" not in metric:
        return None
    if truth and truth.value < TRUTH_AT_LEAST:
        return f"the judges miss what is there: ground truth gets {truth.value:.2f}, expected at least {TRUTH_AT_LEAST}"
    if shuffled and shuffled.value > SHUFFLED_AT_MOST:
        return f"the judges see too much: shuffled gets {shuffled.value:.2f}, expected at most {SHUFFLED_AT_MOST}"
    if noise and noise.value > NOISE_AT_MOST:
        return f"the judges see things in noise: noise gets {noise.value:.2f}, expected at most {NOISE_AT_MOST}"
    return AS_IT_MUST_BE if truth and shuffled and noise else None


def _find_best(points: Mapping[str, MetricPoint], higher: bool) -> tuple[str, ...]:
    """`find_best`, but none at all where runs are not at equal images."""
    return find_best(points, higher) if len({point.images for point in points.values()}) == 1 else ()


def find_best(points: Mapping[str, MetricPoint], higher: bool) -> tuple[str, ...]:
    """Names whose value lies inside the best one's interval; none where there is nothing to compare."""
    if len(points) < 2:
        return ()
    top = (max if higher else min)(points.values(), key=lambda point: point.value)
    edge = top.low if higher else top.high
    if edge is None:
        edge = top.value
    return tuple(run for run, point in points.items() if (point.value >= edge if higher else point.value <= edge))


def _find_last(run: RunFolder, metric: str) -> float | None:
    rows = [row for row in run.rows if row.metric == metric]
    return parse_finite(max(rows, key=lambda row: (row.images_seen, row.created)).value) if rows else None


def flatten(value: Any, path: str = "") -> dict[str, str]:
    """A recipe as `optimizer.lr` -> its value as text."""
    if isinstance(value, Mapping):
        parts = [flatten(inner, f"{path}.{key}" if path else str(key)) for key, inner in value.items()]
        return {name: text for part in parts for name, text in part.items()}
    if isinstance(value, float):
        return {path: f"{value:.6g}"}
    return {path: json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value}


def _rank_overall_first(name: str) -> tuple[str, bool, str]:
    return name.split("/")[0], "overall" not in name, name
