"""What the JSON API answers, as plain data from a Snapshot. Nothing here reads the store."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.report.as_json import plain
from eval.report.data import MARKS, NOT_BEGUN, finite, positive
from eval.report.series import Task, families_of, levels_among, most_common_loss
from eval.report.tables import PAPER_GENEVAL, PAPER_TASKS, calibration_table, flatten
from eval.service import shapes
from eval.service.index import Curves, IndexedRun, Series, Snapshot

MOST_FIELDS = 60


def main_loss(snapshot: Snapshot) -> str | None:
    return most_common_loss(metric for run in snapshot.runs for metric in run.series)


def families(snapshot: Snapshot) -> dict[str, list[Task]]:
    return families_of(snapshot.metrics)


def chosen(snapshot: Snapshot, names: Sequence[str]) -> tuple[IndexedRun, ...]:
    """The named runs, in the order of the pages (by size); all where none is named."""
    return tuple(run for run in snapshot.runs if run.name in set(names)) if names else snapshot.runs


def run_list(snapshot: Snapshot, settings: str) -> shapes.RunList:
    """One line per run: size, progress, last loss, overall scores, how far its evaluation is."""
    loss = main_loss(snapshot)
    headline = {
        metric: snapshot.curves(metric)
        for tasks in families(snapshot).values()
        for metric in tasks[0].metrics.values()
        if tasks[0].name == "overall"
    }
    losses = snapshot.curves(loss) if loss else None
    return {"runs": [_run_line(run, settings, losses, headline) for run in snapshot.runs], "metric": loss}


def _run_line(
    run: IndexedRun, settings: str, losses: Curves | None, headline: Mapping[str, Curves | None]
) -> shapes.RunLine:
    states = list(run.states(settings).values())
    scores = {m: last_point(c.by_run.get(run.name)) for m, c in headline.items() if c is not None}
    return {
        "name": run.name,
        "depth": run.run.depth,
        "parameters": run.run.parameters,
        "flops_per_image": run.run.flops_per_image,
        "images": run.images,
        "planned_images": positive(run.run.recipe.get("images")),
        "recipe_hash": run.recipe_hash,
        "last": run.last,
        "loss": last_point(losses.by_run.get(run.name)) if losses else None,
        "scores": {metric: point for metric, point in scores.items() if point},
        "cost": plain(run.cost),
        "checkpoints": len(run.weights),
        "evaluated": states.count("done"),
        "failed": states.count("failed"),
        "running": states.count("running"),
        "problems": len(problems_of(run)),
        "pictures": bool(run.gallery or run.run.samples),
    }


def problems_of(run: IndexedRun) -> list[str]:
    """What of the run's files cannot be read; that a run has only just begun is no fault of its files."""
    missing = [f"{piece} is missing" if piece in MARKS else piece for piece in run.run.missing if piece != NOT_BEGUN]
    return [*missing, *run.skipped]


def last_point(series: Series | None) -> shapes.Point | None:
    return point_at(series, None)


def point_at(series: Series | None, images: int | None) -> shapes.Point | None:
    """The point at that many images, or the last."""
    if series is None or not len(series.images_P):
        return None
    at = len(series.images_P) - 1 if images is None else int(np.searchsorted(series.images_P, images))
    if at >= len(series.images_P) or (images is not None and series.images_P[at] != images):
        return None
    value, low, high = (number(a[at]) for a in (series.value_P, series.low_P, series.high_P))
    return {
        "images": int(series.images_P[at]), "value": value, "low": low, "high": high, "count": int(series.count_P[at])
    }  # fmt: skip


def curves_of(snapshot: Snapshot, metric: str, names: Sequence[str], *, points: int) -> shapes.SeriesOf:
    """A metric's points per run, at most `points` of each, and which runs were measured otherwise."""
    found = snapshot.curves(metric)
    if found is None:
        return {"metric": metric, "runs": [], "left_out": {}, "higher_is_better": False, "protocol": None}
    runs = chosen(snapshot, names)
    return {
        "metric": metric,
        "protocol": found.protocol,
        "higher_is_better": found.higher_is_better,
        "left_out": _left_out(found, runs),
        "runs": [_thinned(run, found.by_run[run.name], points) for run in runs if run.name in found.by_run],
    }


def _left_out(curves: Curves, runs: Sequence[IndexedRun]) -> dict[str, str]:
    return {run.name: curves.left_out[run.name] for run in runs if run.name in curves.left_out}


def _thinned(run: IndexedRun, series: Series, points: int) -> shapes.RunSeries:
    """Columns for a chart; a longer series is thinned evenly, its first and last point kept."""
    pick = np.arange(len(series.images_P))
    if len(pick) > points:
        pick = np.unique(np.linspace(0, len(pick) - 1, points).round().astype(int))
    return {
        "name": run.name,
        "parameters": run.run.parameters,
        "depth": run.run.depth,
        "flops_per_image": run.run.flops_per_image,
        "images": series.images_P[pick].tolist(),
        "value": numbers(series.value_P[pick]),
        "low": numbers(series.low_P[pick]),
        "high": numbers(series.high_P[pick]),
        "count": series.count_P[pick].tolist(),
    }


def levels_of(snapshot: Snapshot, names: Sequence[str], images: int | None) -> shapes.Levels:
    """Loss at each noise level, per run, at its last checkpoint or at `images`."""
    loss = main_loss(snapshot)
    levels = levels_among(snapshot.metrics, loss) if loss else {}
    found = {t: snapshot.curves(metric) for t, metric in levels.items()}
    runs: list[shapes.RunLevels] = []
    for run in chosen(snapshot, names):
        points = [(t, point_at(c.by_run.get(run.name), images)) for t, c in found.items() if c is not None]
        told = [(t, point) for t, point in points if point]
        if told:
            runs.append({
                "name": run.name, "images": told[0][1]["images"], "t": [t for t, _ in told],
                "value": [point["value"] for _, point in told],
            })  # fmt: skip
    return {"metric": loss, "levels": {f"{t:g}": metric for t, metric in levels.items()}, "runs": runs}


def scores_of(snapshot: Snapshot, family: str, names: Sequence[str], images: int | None) -> shapes.Scores:
    """A benchmark's tasks with intervals: each run's last value, or the one at `images`."""
    tasks = families(snapshot).get(family, [])
    runs = chosen(snapshot, names)
    lines: list[shapes.ScoreLine] = []
    for task in tasks:
        for split, metric in sorted(task.metrics.items()):
            found = snapshot.curves(metric)
            cells = {run.name: point_at(found.by_run.get(run.name), images) for run in runs if found}
            lines.append(
                {"task": task.name, "split": split, "metric": metric,
                 "higher_is_better": bool(found and found.higher_is_better),
                 "runs": {name: cell for name, cell in cells.items() if cell},
                 "left_out": _left_out(found, runs) if found else {}}
            )  # fmt: skip
    # Only the official benchmark may have the paper's own figures beside it.
    paper = {f"SD3 depth {depth}": dict(zip(PAPER_TASKS, values)) for depth, values in PAPER_GENEVAL.items()}
    return {
        "family": family,
        "world": family.startswith("world_"),
        "lines": lines,
        "published": paper if family == "geneval" else {},
    }


def run_details(snapshot: Snapshot, name: str, settings: str) -> shapes.RunDetails | None:
    run = snapshot.by_name.get(name)
    if run is None:
        return None
    numbers_of = {metric: last_point(c.by_run.get(name)) for metric in run.series if (c := snapshot.curves(metric))}
    return {
        "name": name,
        "depth": run.run.depth,
        "parameters": run.run.parameters,
        "images": run.images,
        "recipe_hash": run.recipe_hash,
        "code_versions": list(run.code_versions),
        "last": run.last,
        "recipe": flatten(run.run.recipe),
        "cost": plain(run.cost),
        "numbers": {metric: point for metric, point in sorted(numbers_of.items(), key=_scores_first) if point},
        "checkpoints": [{"step": step, "state": state} for step, state in _states(run, settings).items()],
        "problems": problems_of(run),
    }


def _scores_first(item: tuple[str, Any]) -> tuple[int, str]:
    """Validation losses, then scores, then what it cost."""
    name = item[0]
    return (0 if name.startswith("val_loss") else 2 if name.startswith(("train_loss", "cost/")) else 1), name


def _states(run: IndexedRun, settings: str) -> dict[int, shapes.State]:
    known = run.states(settings)
    return {step: known.get(step, "new") for step in run.weights}


def metrics(snapshot: Snapshot) -> shapes.Metrics:
    """Every metric's name; benchmarks with their tasks."""
    found: dict[str, list[shapes.TaskMetrics]] = {
        name: [{"task": task.name, "metrics": task.metrics} for task in tasks]
        for name, tasks in families(snapshot).items()
    }
    return {"loss": main_loss(snapshot), "families": found, "metrics": list(snapshot.metrics)}


def recipes(snapshot: Snapshot, names: Sequence[str]) -> shapes.Recipes:
    """Fields in which the chosen runs' recipes differ, one row per run."""
    runs = chosen(snapshot, names)
    flat = {run.name: flatten(run.run.recipe) for run in runs}
    fields = sorted({field for recipe in flat.values() for field in recipe} - {"name"})
    differ = [f for f in fields if len({recipe.get(f, "") for recipe in flat.values()}) > 1]
    shown = differ[:MOST_FIELDS]
    return {
        "fields": shown,
        "more": len(differ) - len(shown),
        "same": len(fields) - len(differ),
        "runs": [{"name": run, "values": [recipe.get(f, "") for f in shown]} for run, recipe in flat.items()],
    }


def plans(snapshot: Snapshot, names: Sequence[str]) -> shapes.Plans:
    """Plan against reality: what plan.json says, and what was measured so far."""
    found = []
    for run in chosen(snapshot, names):
        plan, cost = run.run.plan, run.cost
        images = positive(plan.get("images")) or positive(run.run.recipe.get("images"))
        lines = [
            _planned("images", images, cost["images"]),
            _planned("training FLOPs", positive(plan.get("train_flops")) or _times(images, run), cost["flops"]),
            *sorted(map(dict, run.planned), key=lambda line: ("bytes" in line["name"], line["name"])),
        ]
        found.append({
            "name": run.name, "parameters": run.run.parameters, "progress": _ratio(cost["images"], images),
            "lines": [line for line in lines if line["planned"] is not None], "cost": plain(cost),
        })  # fmt: skip
    return {"runs": plain(found)}


def _planned(name: str, planned: Any, measured: Any) -> dict[str, Any]:
    return {"name": name, "planned": planned, "measured": measured or None, "ratio": _ratio(measured, planned)}


def _times(images: Any, run: IndexedRun) -> float | None:
    return finite(images * run.run.flops_per_image) if images and run.run.flops_per_image else None


def _ratio(measured: Any, planned: Any) -> float | None:
    return measured / planned if measured and planned else None


def sheets(snapshot: Snapshot, names: Sequence[str]) -> shapes.Sheets:
    """Which pictures each run has: galleries drawn by the service, else the trainer's sample grids."""
    found: list[shapes.RunPictures] = []
    for run in chosen(snapshot, names):
        batch = positive(run.run.recipe.get("global_batch"))
        listed: list[tuple[str, int | None]] = [(str(step), step) for step in run.gallery]
        listed = listed or [(uri.rsplit("/", 1)[-1], _digits(uri)) for uri in run.run.samples]
        files: list[shapes.Picture] = [
            {"file": file, "step": step, "images": step * int(batch) if batch and step is not None else None}
            for file, step in listed
        ]
        if files:
            found.append({"name": run.name, "kind": "gallery" if run.gallery else "samples", "files": files})
    return {"runs": found}


def calibration(snapshot: Snapshot) -> shapes.Calibration:
    """What the judges give to ground truth, to shuffled scenes and to noise."""
    rows = {row.key: row for row in snapshot.shared if row.metric.startswith("calibration/")}
    lines = calibration_table(list(rows.values()))
    return {"lines": plain([line for line in lines if "overall" in line["metric"] or "/" not in line["metric"]])}


def number(value: float) -> float | None:
    """Six digits are more than any of these numbers has; JSON knows no nan."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def numbers(values_P: NDArray[np.float64]) -> list[float | None]:
    return [number(value) for value in values_P.tolist()]


def _digits(uri: str) -> int | None:
    """The step in a sample's file name."""
    digits = "".join(c for c in uri.rsplit("/", 1)[-1] if c.isdecimal())
    return int(digits) if digits else None
