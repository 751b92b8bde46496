"""Data that grows: full training shards that are published stay as they are, whatever is added, and wherever it sorts.

A row that was set aside since, or went to another split or bucket, sets the rest of its shard free for a new one.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from data_pipeline.formats.index import ShardEntry, read_split
from data_pipeline.formats.parquet_io import read_batches
from data_pipeline.formats.schema import DATASET_FILE, DatasetInfo, read_dataset_info
from data_pipeline.packing.pack import PlannedShard, read_planned_shards
from data_pipeline.packing.selections import RowSelections
from infra import storage
from infra.errors import UnavailableError, UserError
from infra.log import get_logger

log = get_logger("pack")


class PublishedShards:
    """The dataset that dataset.json shows at this moment; nothing where there is none, or one of another encoding.

    Its table of shards is in memory, as at the end of a run (about a kB per training shard), its rows are not.
    """

    def __init__(self, root: str, info: DatasetInfo) -> None:
        self._root = root
        self._generation_of = {entry.tar: entry.generation for entry in _list_published(root, info.encoding)}
        self._next = max(self._generation_of.values(), default=-1) + 1

    def list_full_shards(
        self, proofs: Mapping[str, ShardEntry], *, shard_rows: Mapping[str, int]
    ) -> Iterator[PlannedShard]:
        """Its full shards, out of the plans that made them. `shard_rows`: samples of a full shard, by bucket."""
        full = {name for name, entry in proofs.items() if entry.num_samples == shard_rows.get(entry.bucket)}
        missing = {name for name in full if proofs[name].tar in self._generation_of}
        for uri in storage.list_files(storage.join(self._root, "pack"), suffix=".parquet", recursive=False):
            if missing:
                for output in read_planned_shards(read_batches(uri), frozenset(missing)):
                    missing.discard(output.id)
                    yield output

    def number_entry(self, entry: ShardEntry) -> ShardEntry:
        """The entry with its generation. Shards that are not published yet form the next generation."""
        return replace(entry, generation=self._generation_of.get(entry.tar, self._next))


def read_published(root: str) -> DatasetInfo | None:
    """The published dataset.json. A damaged one counts as absent, so that it can be written anew."""
    if not storage.exists(storage.join(root, DATASET_FILE)):
        return None
    try:
        return read_dataset_info(root)
    except UnavailableError:
        raise
    except UserError as error:
        log.warning("%s; packing it again", error)
        return None


def _list_published(root: str, encoding: str) -> list[ShardEntry]:
    stands = read_published(root)
    if stands is None or stands.encoding != encoding:
        return []
    try:
        return [entry for split in stands.splits.values() for entry in read_split(root, split.index)]
    except UnavailableError:
        raise
    except UserError as error:
        log.warning("%s; packing it again", error)
        return []


def keep_published(selections: RowSelections, outputs: Iterable[PlannedShard]) -> Iterator[PlannedShard]:
    """The published shards whose rows all still belong to the same split and bucket. Their rows are removed from
    `selections`."""
    for output in outputs:
        ways = [(selections.get(output.split, output.bucket, shard), rows) for shard, rows in output.rows]
        if all(selection is not None and np.isin(rows, selection.row_R).all() for selection, rows in ways):
            for selection, rows in ways:
                assert selection is not None
                selections.put(selection.subset(~np.isin(selection.row_R, rows)))
            yield output
