"""What a worker does with one unit of work: ingest a source file, add columns to a shard, pack a training shard.

Each task's `open` gives the function of one unit. A unit is JSON; the task's docstring names its keys besides `id`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.formats.schema import ColumnPart, DatasetInfo, Manifest, expand_ranges
from data_pipeline.packing.pack import PlannedShard, pack_shard
from data_pipeline.sources.ingest import Ingest
from data_pipeline.sources.source import Source, SourceUnit
from data_pipeline.stages.columns import Column
from data_pipeline.stages.stage import ShardView, Stage, StageFunction
from infra.codec import from_json, to_json
from infra.runner import UnitResult, WorkUnit


def _read_parts(raw: Sequence[Mapping[str, Any]]) -> list[ColumnPart]:
    return [from_json(ColumnPart, part, where="a unit of work") for part in raw]


def group_parts(manifest: Manifest) -> dict[str, ColumnPart]:
    """The parts of a manifest by shard."""
    return {part.shard: part for part in manifest.parts}


def _sum_counts(manifests: Sequence[Manifest]) -> dict[str, dict[str, int]]:
    """Stage -> status -> number of rows."""
    counts: dict[str, dict[str, int]] = {}
    for manifest in manifests:
        stage_counts = counts.setdefault(manifest.stage, {})
        for status, count in manifest.counts.items():
            stage_counts[status] = stage_counts.get(status, 0) + count
    return counts


def _make_result(rows: int, manifests: Sequence[Manifest]) -> UnitResult:
    return {"rows": rows, "counts": _sum_counts(manifests), "manifests": [to_json(m) for m in manifests]}


@dataclass(frozen=True)
class IngestTask:
    """Writes a source unit as canonical shards, then computes the `light` columns of each: those that are cheap enough
    for every row. Both in one pass, so that images are decoded once.

    Memory stays bounded, whatever the size of a tar: one shard is in work at a time, and of the tables that ingest has
    made at most `keep_bytes` stay in memory for the columns. Keys of a unit: `split`; `where`, which the source
    understands; `known`, shard -> stage -> parts that exist already, empty for a unit that was never ingested.
    """

    root: str
    source: Source
    ingest: Ingest
    column: Column
    light: tuple[tuple[Stage, Column], ...]
    keep_bytes: int = 256 * 2**20

    def open(self) -> Callable[[WorkUnit], UnitResult]:
        workers = [(stage.open(), column) for stage, column in self.light]

        def run(unit: WorkUnit) -> UnitResult:
            known = {
                shard: {stage: _read_parts(parts) for stage, parts in stages.items()}
                for shard, stages in unit["known"].items()
            }
            tables: dict[str, Any] = {}
            manifests: list[Manifest] = []
            if not known:
                source_unit = SourceUnit(unit["id"], unit["split"], unit["where"])
                ingested, tables = self.ingest.run(self.source, source_unit, self.column, keep_bytes=self.keep_bytes)
                manifests.append(ingested)
                known = {part.shard: {"ingest": [part]} for part in ingested.parts}
            for shard, parts in known.items():
                view = ShardView(self.root, shard, parts)
                if shard in tables:
                    view.tables["ingest"] = tables.pop(shard)
                manifests += self._compute_columns(view, workers)
            rows = sum(part.num_rows for parts in known.values() for part in parts["ingest"])
            return _make_result(rows, manifests) | {"split": unit["split"]}

        return run

    def _compute_columns(self, view: ShardView, workers: Sequence[tuple[StageFunction, Column]]) -> list[Manifest]:
        """Write the light columns that a shard still lacks; each later stage reads those before it."""
        manifests = []
        view.rows = range(view.parts["ingest"][0].num_rows)  # light columns are cheap: they cover rows that failed, too
        parts = dict(view.parts)
        for worker, column in workers:
            if column.stage in parts:
                continue
            table = worker(view)
            view.tables[column.stage] = table
            manifest = column.write(view.shard, [(view.shard, table)])
            manifests.append(manifest)
            parts[column.stage] = [group_parts(manifest)[view.shard]]
            view.parts = dict(parts)
        return manifests


@dataclass(frozen=True)
class ColumnTask:
    """Computes the heavy columns (captions, latents, text features) of one shard, one after the other, for the rows
    that each still lacks.

    Keys of a unit: `shard`; `missing`, stage -> ranges of rows; `parts`, stage -> parts that exist already.
    """

    root: str
    stages: tuple[tuple[Stage, Column], ...]

    def open(self) -> Callable[[WorkUnit], UnitResult]:
        workers = [(stage.open(), column) for stage, column in self.stages]

        def run(unit: WorkUnit) -> UnitResult:
            shard = unit["shard"]
            parts = {stage: _read_parts(raw) for stage, raw in unit["parts"].items()}
            view, manifests = ShardView(self.root, shard, parts), []
            for worker, column in workers:
                rows = expand_ranges(unit["missing"].get(column.stage, []))
                if not rows:
                    continue
                view.rows = rows
                number = len(parts.get(column.stage, ()))
                manifest = column.write(shard, [(shard, worker(view))], number=number)
                manifests.append(manifest)
                parts.setdefault(column.stage, []).append(group_parts(manifest)[shard])
                view.tables.pop(column.stage, None)  # it lacks the new rows: the next stage reads it again
            return _make_result(
                max((len(expand_ranges(ranges)) for ranges in unit["missing"].values()), default=0), manifests
            )

        return run


@dataclass(frozen=True)
class PackTask:
    """Writes one planned training shard.

    Keys of a unit: `split`, `bucket`; `rows`, pairs of a canonical shard and ranges of its rows; `parts`, stage ->
    shard -> the parts of its columns.
    """

    root: str
    info: DatasetInfo

    def open(self) -> Callable[[WorkUnit], UnitResult]:
        def run(unit: WorkUnit) -> UnitResult:
            rows = tuple((shard, np.array(expand_ranges(ranges), np.int32)) for shard, ranges in unit["rows"])
            output = PlannedShard(unit["id"], unit["split"], unit["bucket"], rows)
            parts = {
                stage: {shard: _read_parts(raw) for shard, raw in shards.items()}
                for stage, shards in unit["parts"].items()
            }
            entry = pack_shard(self.root, self.info, output, parts)
            return {"rows": entry.num_samples, "counts": {"pack": {"ok": entry.num_samples}}, "entry": to_json(entry)}

        return run
