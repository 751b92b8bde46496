"""What a worker does with one unit: ingest a source file, add columns to a shard, pack an output shard."""

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
    return {part.shard: part for part in manifest.parts}


def _sum_counts(manifests: Sequence[Manifest]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for manifest in manifests:
        of_stage = counts.setdefault(manifest.stage, {})
        for status, count in manifest.counts.items():
            of_stage[status] = of_stage.get(status, 0) + count
    return counts


def _make_result(rows: int, manifests: Sequence[Manifest]) -> UnitResult:
    return {"rows": rows, "counts": _sum_counts(manifests), "manifests": [to_json(m) for m in manifests]}


@dataclass(frozen=True)
class IngestTask:
    """A source unit to canonical shards, and at once the light columns of each shard (images are decoded once).

    Memory stays bounded, whatever the size of a tar: one shard is in work, and what was read before is kept for the
    columns up to `keep_bytes`. A unit that was ingested before names its shards and the parts they have (`known`).
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
            made: list[Manifest] = []
            if not known:
                found = SourceUnit(unit["id"], unit["split"], unit["where"])
                ingested, tables = self.ingest.run(self.source, found, self.column, keep_bytes=self.keep_bytes)
                made.append(ingested)
                known = {part.shard: {"ingest": [part]} for part in ingested.parts}
            for shard, parts in known.items():
                view = ShardView(self.root, shard, parts)
                if shard in tables:
                    view.tables["ingest"] = tables.pop(shard)
                made += self._compute_columns(view, workers)
            rows = sum(part.num_rows for parts in known.values() for part in parts["ingest"])
            return _make_result(rows, made) | {"split": unit["split"]}

        return run

    def _compute_columns(self, view: ShardView, workers: Sequence[tuple[StageFunction, Column]]) -> list[Manifest]:
        made = []
        view.rows = range(view.parts["ingest"][0].num_rows)  # light columns are cheap: they cover rows that failed, too
        parts = dict(view.parts)
        for worker, column in workers:
            if column.stage in parts:
                continue
            table = worker(view)
            view.tables[column.stage] = table
            manifest = column.write(view.shard, [(view.shard, table)])
            made.append(manifest)
            parts[column.stage] = [group_parts(manifest)[view.shard]]
            view.parts = dict(parts)
        return made


@dataclass(frozen=True)
class ColumnTask:
    """Heavy columns of one shard, one after the other, for the rows that each still lacks."""

    root: str
    stages: tuple[tuple[Stage, Column], ...]

    def open(self) -> Callable[[WorkUnit], UnitResult]:
        workers = [(stage.open(), column) for stage, column in self.stages]

        def run(unit: WorkUnit) -> UnitResult:
            shard = unit["shard"]
            parts = {stage: _read_parts(found) for stage, found in unit["parts"].items()}
            view, made = ShardView(self.root, shard, parts), []
            for worker, column in workers:
                rows = expand_ranges(unit["missing"].get(column.stage, []))
                if not rows:
                    continue
                view.rows = rows
                number = len(parts.get(column.stage, ()))
                manifest = column.write(shard, [(shard, worker(view))], number=number)
                made.append(manifest)
                parts.setdefault(column.stage, []).append(group_parts(manifest)[shard])
                view.tables.pop(column.stage, None)
            return _make_result(max((len(expand_ranges(found)) for found in unit["missing"].values()), default=0), made)

        return run


@dataclass(frozen=True)
class PackTask:
    """One planned output shard."""

    root: str
    info: DatasetInfo

    def open(self) -> Callable[[WorkUnit], UnitResult]:
        def run(unit: WorkUnit) -> UnitResult:
            rows = tuple((shard, np.array(expand_ranges(ranges), np.int32)) for shard, ranges in unit["rows"])
            output = PlannedShard(unit["id"], unit["split"], unit["bucket"], rows)
            parts = {
                stage: {shard: _read_parts(found) for shard, found in shards.items()}
                for stage, shards in unit["parts"].items()
            }
            entry = pack_shard(self.root, self.info, output, parts)
            return {"rows": entry.num_samples, "counts": {"pack": {"ok": entry.num_samples}}, "entry": to_json(entry)}

        return run
