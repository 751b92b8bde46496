"""What the manifests of one root prove so far, by shard and stage, and how the driver reads it, shard by shard."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from data_pipeline.formats.schema import ColumnPart, Manifest
from data_pipeline.stages.columns import Column, count_readers, read_parts
from data_pipeline.stages.row_status import status_table
from data_pipeline.stages.scratch_db import ScratchDatabase
from data_pipeline.stages.stage import OK
from infra import storage
from infra.ahead import map_ahead
from infra.codec import from_json, to_json
from infra.errors import UserError
from infra.log import get_logger

log = get_logger("columns")

_READERS = 8  # threads that read columns from S3

R = TypeVar("R")


class ColumnState:
    """Parts of columns and splits of shards, on scratch disk; only `counts` (rows by stage and status) is in memory."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.database = ScratchDatabase()
        self.counts: dict[str, dict[str, int]] = {}
        self._parts = self.database.new_map("shard", "stage", "number")
        self._with_bad_rows = self.database.new_map("stage", "shard")  # with rows that are not ok
        self._splits = self.database.new_map("shard")

    def manifests(self, column: Column, *, prefix: str = "", heal: bool = True) -> Iterator[Manifest]:
        """Manifests of a column by unit and number, of units whose names begin with `prefix`.

        `heal` deletes those that name an object which is gone: their rows are then made again.
        """
        found, objects = self.database.new_map("unit", "number"), self.database.new_map("object")
        for unit, number, data in column.manifests(prefix=prefix):
            found[unit, number] = data
        # listed last: objects are written before the manifest that names them
        for name in column.objects() if heal else ():
            objects[name,] = b""
        for key in found:
            unit, number = str(key[0]), int(key[1])
            manifest = column.manifest(unit, number, found[key])
            if heal and not all((part.object,) in objects for part in manifest.parts):
                log.warning("%s names an object that is gone; its rows are made again", column.uri(unit, number))
                storage.delete(column.uri(unit, number))
                continue
            yield manifest
        found.drop()
        objects.drop()

    def record(self, manifest: Manifest) -> None:
        """Note the parts and counts of a manifest. The parts of a shard keep the order in which they are recorded."""
        by_status = self.counts.setdefault(manifest.stage, {})
        for status, count in manifest.counts.items():
            by_status[status] = by_status.get(status, 0) + count
        for part in manifest.parts:
            if set(manifest.counts) - {OK}:
                self._with_bad_rows[manifest.stage, part.shard] = b""
            described = json.dumps(to_json(part)).encode()
            before = [data for _, data in self._parts.items(part.shard, manifest.stage)]
            if described not in before:
                self._parts[part.shard, manifest.stage, len(before)] = described

    def record_column(self, column: Column, *, prefix: str = "", first: bool = False) -> None:
        """All that is proven of a column (the first manifest of each unit, if so asked), for shards that are known."""
        for _, manifests in groupby(self.manifests(column, prefix=prefix), lambda manifest: manifest.unit):
            for manifest in list(manifests)[: 1 if first else None]:
                if manifest.parts and manifest.parts[0].shard in self:
                    self.record(manifest)

    def add_shard(self, shard: str, split: str) -> None:
        """A shard of this run's source, with the split that the source gives it ("" for none)."""
        self._splits[shard,] = split.encode()

    def remove_shard(self, shard: str) -> None:
        del self._splits[shard,]

    def __contains__(self, shard: str) -> bool:
        return (shard,) in self._splits

    def __len__(self) -> int:
        return len(self._splits)

    def shards(self) -> Iterator[str]:
        """Names of the shards of this run's sources, in order."""
        return (str(shard) for (shard,) in self._splits)

    def split(self, shard: str) -> str:
        """The split that the source gives a shard ("" if none); KeyError for a shard that is not part of this run."""
        return self._splits[shard,].decode()

    def parts(self, stage: str, shard: str) -> list[ColumnPart]:
        """The parts of a shard's column, in the order in which they were recorded; [] if no manifest names one."""
        return [from_json(ColumnPart, data, where=f"{stage} of {shard}") for _, data in self._parts.items(shard, stage)]

    def has(self, stage: str, shard: str) -> bool:
        """Is there a part?"""
        return (shard, stage, 0) in self._parts

    def has_bad_rows(self, stage: str, shard: str) -> bool:
        """Are there rows that are not ok?"""
        return (stage, shard) in self._with_bad_rows

    def describe_parts(self, shard: str) -> dict[str, list[dict[str, Any]]]:
        """All parts of a shard by stage, as JSON: for units of work."""
        found: dict[str, list[dict[str, Any]]] = {}
        for (_, stage, _), data in self._parts.items(shard):
            found.setdefault(str(stage), []).append(json.loads(data))
        return found

    def rows_done(self, stage: str, shard: str) -> np.ndarray:
        """Rows of a shard that have their part of a column, ascending."""
        ranges = [pair for _, data in self._parts.items(shard, stage) for pair in json.loads(data)["rows"]]
        first_R, behind_R = np.array(ranges, np.int64).reshape(-1, 2).T
        length_R = behind_R - first_R
        start_R = np.cumsum(length_R) - length_R  # where each range begins among all rows
        return np.unique(np.repeat(first_R - start_R, length_R) + np.arange(length_R.sum()))

    def map_shards(self, work: Callable[[str], R], shards: Iterable[str] | None = None) -> Iterator[tuple[str, R]]:
        """(shard, work(shard)) for each shard, in order. Threads work ahead; tables of a shard are freed when it is
        done."""
        return map_ahead(work, self.shards() if shards is None else shards, threads=count_readers(self.root, _READERS))

    def read(self, stage: str, shard: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A shard's table of a stage, by row."""
        table = read_parts(self.root, self.parts(stage, shard), columns)
        if table is None:
            raise UserError(f"{self.root}: column {stage} has nothing for shard {shard}: run the same command again")
        return table

    def field(self, stage: str, shard: str, name: str) -> dict[int, Any]:
        """One field of it, by row."""
        table = self.read(stage, shard, ["row", name])
        return dict(zip(table["row"].to_pylist(), table[name].to_pylist()))

    def status(self, stage: str, shard: str) -> pa.Table:
        """Row, status and reason that a stage gave to a shard's rows; an empty table if the stage has no such
        column."""
        if not self.has(stage, shard):
            return status_table([], [], [])
        table = self.read(stage, shard, ["row", "status", "reason"])
        return status_table(*(table[name].to_pylist() for name in ("row", "status", "reason")))
