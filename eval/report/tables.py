"""The tables of a report as plain data: cost, plan against reality, recipe differences, judges, scores, origin."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from eval.report.data import Run, finite
from eval.report.series import Comparison, Point, Task, is_number
from infra.results import ResultRow

# Scoring the world's own scenes must give this much, and scenes under other captions at most that.
TRUTH_AT_LEAST, SHUFFLED_AT_MOST, NOISE_AT_MOST = 0.95, 0.10, 0.05
# What a calibration row compares with: the part of its metric name that says so.
CONTROLS = ("ground_truth", "shuffled", "noise")
# SD3 Table 5 (Esser et al. 2024): GenEval at 512 px without DPO, in the order of PAPER_TASKS.
PAPER_GENEVAL = {
    18: (0.58, 0.97, 0.72, 0.52, 0.78, 0.16, 0.34),
    24: (0.62, 0.98, 0.74, 0.63, 0.67, 0.34, 0.36),
    30: (0.64, 0.96, 0.80, 0.65, 0.73, 0.33, 0.37),
    38: (0.68, 0.98, 0.84, 0.66, 0.74, 0.40, 0.43),
}
PAPER_TASKS = ("overall", "single_object", "two_object", "counting", "colors", "position", "color_attr")
# Recipe fields that name the run rather than decide what it becomes.
UNTOLD = {"name", "data.fingerprint"}


def cost_of(run: Run) -> dict[str, Any]:
    """Time, speed, work and efficiency of one run; None where it was not measured."""
    seconds, speed = _last(run, "cost/seconds"), _last(run, "cost/images_per_second")
    images = max((row.images_seen for row in run.rows if row.metric.startswith(("cost/", "train_loss"))), default=0)
    images = images or run.images
    speed = speed or (images / seconds if seconds and images else None)
    flops = run.flops_per_image * images if run.flops_per_image and images else None
    peak = finite(run.plan.get("peak_flops_per_second")) or finite(run.plan.get("device_peak_flops"))
    rate = run.flops_per_image * speed if run.flops_per_image and speed else None
    return {
        "images": images,
        "seconds": seconds,
        "images_per_second": speed,
        "flops": flops,
        "flops_per_second": rate,
        "efficiency": rate / peak if rate and peak else None,
    }


def plan_against_reality(run: Run) -> list[dict[str, Any]]:
    """Every number that plan.json predicts (under `predicted`) beside the last measured row of the same name."""
    predicted = run.plan.get("predicted", run.plan.get("predictions"))
    lines = []
    for name, value in sorted(predicted.items()) if isinstance(predicted, Mapping) else []:
        planned = finite(value)
        measured = next((m for m in (_last(run, name), _last(run, f"cost/{name}")) if m is not None), None)
        if planned is not None:
            ratio = measured / planned if measured is not None and planned else None
            lines.append({"name": str(name), "planned": planned, "measured": measured, "ratio": ratio})
    return lines


def recipe_differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Fields in which the recipes differ: {"field": ..., "values": one text per run}."""
    flat = [flatten(run.recipe) for run in runs]
    fields = sorted({name for recipe in flat for name in recipe} - UNTOLD)
    lines = [(name, [recipe.get(name, "") for recipe in flat]) for name in fields]
    return [{"field": name, "values": values} for name, values in lines if len(set(values)) > 1]


def calibration_table(rows: Sequence[ResultRow]) -> list[dict[str, Any]]:
    """One line per judged score: what ground truth, shuffled and noise images get, and whether that is as it should."""
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        parts = row.metric.split("/")[1:]
        control = next((name for name in CONTROLS if name in parts), None)
        if control is None or not is_number(row):
            continue
        name = "/".join(part for part in parts if part != control)
        line = lines.setdefault(name, {"metric": name, **dict.fromkeys(CONTROLS), "protocols": set()})
        line[control] = {"value": row.value, "low": row.low, "high": row.high, "count": row.sample_count}
        line["protocols"].add(row.protocol_hash)
    for line in lines.values():
        line["verdict"] = _verdict(line)
        line["protocols"] = sorted(line["protocols"])
    return [lines[name] for name in sorted(lines, key=_overall_first)]


def score_rows(
    family: str, tasks: Sequence[Task], found: Mapping[str, Comparison], labels: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One line per task and split, one cell per run: its last checkpoint's number with interval and images seen."""
    lines = []
    for task in tasks:
        for split, metric in sorted(task.metrics.items()):
            comparison = found[metric]
            cells = {run: _cell(comparison.at(run)) for run in labels}
            best = _best(cells, comparison.higher_is_better)
            lines.append(
                {"family": family, "task": task.name, "split": split, "metric": metric, "cells": cells, "best": best}
            )
    return lines


def provenance(runs: Sequence[Run]) -> list[dict[str, Any]]:
    return [
        {
            "run": run.name,
            "recipe_hashes": sorted({row.recipe_hash for row in run.rows}),
            "code_versions": sorted({row.code_version for row in run.rows}),
            "data_fingerprint": _fingerprint(run),
            "rows": len(run.rows),
            "last": max((row.created for row in run.rows), default=""),
        }
        for run in runs
    ]


def protocols(found: Mapping[str, Comparison]) -> list[dict[str, Any]]:
    """Protocol hash -> the metrics measured under it and how many samples each number stands on."""
    lines: dict[str, dict[str, Any]] = {}
    for metric, comparison in found.items():
        line = lines.setdefault(comparison.protocol, {"protocol": comparison.protocol, "metrics": [], "samples": set()})
        line["metrics"].append(metric)
        line["samples"].update(p.count for points in comparison.points.values() for p in points)
    return [{**line, "samples": sorted(line["samples"])} for line in lines.values()]


def _verdict(line: Mapping[str, Any]) -> str | None:
    """Shares of right images and means of probabilities have a known ceiling; a CLIP score or a FID has none."""
    if not line["metric"].split("/")[0].endswith(("geneval", "compbench")) or "overall" not in line["metric"]:
        return None
    truth, shuffled, noise = (line.get(control) for control in CONTROLS)
    if truth and truth["value"] < TRUTH_AT_LEAST:
        return (
            f"the judges miss what is there: ground truth gets {truth['value']:.2f}, expected at least {TRUTH_AT_LEAST}"
        )
    if shuffled and shuffled["value"] > SHUFFLED_AT_MOST:
        return f"the judges see too much: shuffled gets {shuffled['value']:.2f}, expected at most {SHUFFLED_AT_MOST}"
    if noise and noise["value"] > NOISE_AT_MOST:
        return f"the judges see things in noise: noise gets {noise['value']:.2f}, expected at most {NOISE_AT_MOST}"
    return "as it must be" if truth and shuffled and noise else None


def _best(cells: Mapping[str, Mapping[str, Any] | None], higher: bool) -> list[str]:
    """Runs whose interval touches the best run's: inside it no order is drawn. Only at equal images."""
    known = {run: cell for run, cell in cells.items() if cell}
    if len(known) < 2 or len({cell["images"] for cell in known.values()}) > 1:
        return []
    top = (max if higher else min)(known.values(), key=lambda cell: cell["value"])
    edge = top["low"] if higher else top["high"]
    if edge is None:
        return [run for run, cell in known.items() if cell["value"] == top["value"]]
    return [run for run, cell in known.items() if (cell["value"] >= edge if higher else cell["value"] <= edge)]


def _cell(point: Point | None) -> dict[str, Any] | None:
    if point is None:
        return None
    return {"value": point.value, "low": point.low, "high": point.high, "images": point.images, "count": point.count}


def _last(run: Run, metric: str) -> float | None:
    rows = [row for row in run.rows if row.metric == metric]
    return max(rows, key=lambda row: (row.images_seen, row.created)).value if rows else None


def flatten(value: Any, path: str = "") -> dict[str, str]:
    """A recipe as `optimizer.lr` -> its value in words."""
    if isinstance(value, Mapping):
        parts = [flatten(inner, f"{path}.{key}" if path else str(key)) for key, inner in value.items()]
        return {name: text for part in parts for name, text in part.items()}
    if isinstance(value, float):
        return {path: f"{value:.6g}"}
    return {path: json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value}


def recipe_field(run: Run, *path: str) -> Any:
    """`recipe_field(run, "schedule", "cooldown")`, or None where the recipe has no such field."""
    value: Any = run.recipe
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _fingerprint(run: Run) -> str:
    return str(recipe_field(run, "data", "fingerprint") or run.plan.get("data_fingerprint") or "")


def _overall_first(name: str) -> tuple[str, bool, str]:
    return name.split("/")[0], "overall" not in name, name
