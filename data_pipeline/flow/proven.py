"""What is proven so far of one root, by stage and shard, and how the driver reads it: small things, shard by shard."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from data_pipeline.flow.columns import Column, read_parts
from data_pipeline.flow.stage import OK
from data_pipeline.flow.verdicts import Verdicts, verdict_table
from data_pipeline.schema import Manifest, Part
from infra.errors import UserError

_READERS = 8


class Proven:
    """`splits` names the shards of this run's source, each with the split that the source gives it ("" for none)."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.parts: dict[str, dict[str, list[Part]]] = {}
        self.splits: dict[str, str] = {}
        self.counts: dict[str, dict[str, int]] = {}
        self.flawed: set[tuple[str, str]] = set()  # (stage, shard) with rows that are not ok

    def take(self, manifest: Manifest) -> None:
        mine = self.counts.setdefault(manifest.stage, {})
        for status, count in manifest.counts.items():
            mine[status] = mine.get(status, 0) + count
        if set(manifest.counts) - {OK}:
            self.flawed |= {(manifest.stage, part.shard) for part in manifest.parts}
        for part in manifest.parts:
            parts = self.parts.setdefault(manifest.stage, {}).setdefault(part.shard, [])
            if part not in parts:
                parts.append(part)

    def take_column(self, column: Column) -> None:
        """All that is proven of a column, for shards of this source."""
        for manifests in column.manifests(heal=True).values():
            for manifest in manifests:
                if manifest.parts[0].shard in self.splits:
                    self.take(manifest)

    def rows_done(self, stage: str, shard: str) -> list[int]:
        """Rows of a shard that have their part of a column."""
        return sorted(set().union(*(part.row_numbers() for part in self.parts.get(stage, {}).get(shard, []))))

    def each_shard(self, work: Callable[[str], Any]) -> dict[str, Any]:
        """Small results of every shard, in order; what is read for one is gone when it is done."""
        shards = sorted(self.splits)
        with ThreadPoolExecutor(_READERS) as pool:
            return dict(zip(shards, pool.map(work, shards)))

    def read(self, stage: str, shard: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A shard's table of a stage, by row."""
        table = read_parts(self.root, self.parts[stage].get(shard, []), columns)
        if table is None:
            raise UserError(f"{self.root}: column {stage} has nothing for shard {shard}: run the same command again")
        return table

    def field(self, stage: str, shard: str, name: str) -> dict[int, str]:
        """One field of it, by row."""
        table = self.read(stage, shard, ["row", name])
        return dict(zip(table["row"].to_pylist(), table[name].to_pylist()))

    def verdicts(self, stage: str) -> Verdicts:
        """What a stage says of its rows; a shard of which it says nothing has no rows."""

        def of(shard: str) -> pa.Table:
            if shard not in self.parts[stage]:
                return verdict_table([], [], [])
            table = self.read(stage, shard, ["row", "status", "reason"])
            return verdict_table(*(table[name].to_pylist() for name in ("row", "status", "reason")))

        return self.each_shard(of)
