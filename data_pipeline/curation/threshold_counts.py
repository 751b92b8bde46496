"""What each threshold would keep, from the measured columns alone: `python -m data_pipeline report URI`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from data_pipeline.curation.filters import SCORE_LIMITS, Thresholds
from data_pipeline.curation.scores import SCORERS
from data_pipeline.stages.column_state import ColumnState
from data_pipeline.stages.columns import Column, read_parts
from data_pipeline.stages.stage import OK
from infra.errors import UserError

_LIMITS: Mapping[str, tuple[float, ...]] = {
    "min_side": (32, 64, 128, 256, 512, 1024),
    "max_aspect": (1.5, 2, 3, 4),
    "max_caption_chars": (100, 300, 1000, 5000),
    "max_nsfw": (0.05, 0.1, 0.2, 0.3, 0.5, 0.8),
    "min_aesthetic": (3, 4, 4.5, 5, 5.5, 6),
    "min_caption_quality": (0.1, 0.2, 0.3, 0.5, 0.7, 0.9),
    "min_caption_clip": (0.1, 0.15, 0.2, 0.25, 0.28, 0.3),
}


@dataclass(frozen=True)
class KeptCount:
    """One line of the report: this limit alone would keep so many of the rows that could be decoded."""

    threshold: str
    limit: float
    rows: int
    total: int


def count_kept(root: str, columns: Mapping[str, str]) -> list[KeptCount]:
    """One shard after the other; `columns` are fingerprints by stage, as in dataset.json."""
    scorers = [name for name in SCORERS if name in columns]
    unscored = {name for name, (scorer, _) in SCORE_LIMITS.items() if scorer not in scorers}
    kept = {(name, limit): 0 for name, limits in _LIMITS.items() if name not in unscored for limit in limits}
    total = 0
    for values in _iterate_shards(root, columns, scorers):
        total += len(values["min_side"])
        for name, limit in kept:
            value = values[name]
            kept[name, limit] += int((value <= limit).sum() if name.startswith("max") else (value >= limit).sum())
    return [KeptCount(name, limit, rows, total) for (name, limit), rows in kept.items()]


def _iterate_shards(root: str, columns: Mapping[str, str], scorers: list[str]) -> Iterator[dict[str, np.ndarray]]:
    state = ColumnState(root)
    for stage in ("measure", *scorers):
        if stage not in columns:
            raise UserError(f"{root}: no column {stage}: run the pipeline there first")
        for manifest in state.manifests(Column(root, stage, columns[stage]), heal=False):
            state.record(manifest)
            for part in manifest.parts if stage == "measure" else ():
                state.add_shard(part.shard, "")
    for shard in state.shards():
        table = state.read("measure", shard, ["row", "status", "width", "height", "caption"])
        rows = [row for row in table.to_pylist() if row["status"] == OK]
        width, height = (np.array([row[side] for row in rows], float) for side in ("width", "height"))
        values = {
            "min_side": np.minimum(width, height),
            "max_aspect": np.maximum(width / height, height / width),
            "max_caption_chars": np.array([len(row["caption"]) for row in rows], float),
        }
        for name, (scorer, _) in SCORE_LIMITS.items():
            if scorer in scorers:
                found = read_parts(root, state.parts(scorer, shard), ["row", "score"])
                scores = {} if found is None else dict(zip(found["row"].to_pylist(), found["score"].to_pylist()))
                values[name] = np.array([scores.get(row["row"], np.nan) for row in rows], float)
        yield values


def format_kept(lines: list[KeptCount], thresholds: Thresholds | None = None) -> str:
    """Plain text; the limit in force is marked where a plan is given."""
    out = [f"{'threshold':<24}{'limit':>8}{'rows kept':>12}{'share':>9}"]
    for line in lines:
        mark = "  <- in force" if thresholds and getattr(thresholds, line.threshold) == line.limit else ""
        share = line.rows / max(1, line.total)
        out.append(f"{line.threshold:<24}{line.limit:>8g}{line.rows:>12,}{share:>9.1%}{mark}")
    return "\n".join(out)
