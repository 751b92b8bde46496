"""Data that grows: full training shards that are published stay as they are, whatever is added, and wherever it sorts.

A row that was set aside since, or went to another split or bucket, sets the rest of its shard free for a new one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data_pipeline.loading.index import ShardEntry, read_split, read_table
from data_pipeline.packing.pack import Output, RowRun, read_outputs
from data_pipeline.schema import DATASET_FILE, DatasetInfo, read_dataset_info
from infra import storage
from infra.errors import UnavailableError, UserError
from infra.log import get_logger

log = get_logger("pack")


@dataclass(frozen=True)
class Published:
    """The dataset that stands: its full shards, and in which generation each of its tars came."""

    outputs: tuple[Output, ...] = ()
    generation_of: Mapping[str, int] = field(default_factory=dict)

    def numbered(self, entry: ShardEntry) -> ShardEntry:
        """With its generation: shards that are not published yet make up the next one."""
        newest = max(self.generation_of.values(), default=-1)
        return replace(entry, generation=self.generation_of.get(entry.tar, newest + 1))


def published(
    root: str, info: DatasetInfo, proofs: Mapping[str, ShardEntry], *, shard_rows: Mapping[str, int]
) -> Published:
    """What dataset.json shows at this moment; nothing where there is none, or one of another encoding.

    `shard_rows`: samples of a full shard, by bucket."""
    entries = _shown(root, info.encoding)
    generation_of = {entry.tar: entry.generation for entry in entries}
    full = {name for name, entry in proofs.items() if entry.num_samples == shard_rows.get(entry.bucket)}
    wanted = {name for name in full if proofs[name].tar in generation_of}
    outputs: dict[str, Output] = {}
    for uri in storage.list_files(storage.join(root, "pack"), suffix=".parquet", recursive=False):
        if missing := wanted - outputs.keys():
            outputs |= {o.id: o for o in read_outputs(read_table(storage.read_bytes(uri), uri), missing)}
    return Published(tuple(outputs[name] for name in sorted(outputs)), generation_of)


def standing(root: str) -> DatasetInfo | None:
    """The description that is there; a damaged one must not stand in the way of the next."""
    if not storage.exists(storage.join(root, DATASET_FILE)):
        return None
    try:
        return read_dataset_info(root)
    except UnavailableError:
        raise
    except UserError as error:
        log.warning("%s; packing it anew", error)
        return None


def _shown(root: str, encoding: str) -> list[ShardEntry]:
    stands = standing(root)
    if stands is None or stands.encoding != encoding:
        return []
    try:
        return [entry for split in stands.splits.values() for entry in read_split(root, split.index)]
    except UnavailableError:
        raise
    except UserError as error:
        log.warning("%s; packing it anew", error)
        return []


def keep_published(runs: Sequence[RowRun], outputs: Sequence[Output]) -> tuple[list[Output], list[RowRun]]:
    """(outputs whose rows all still go the same way, what is left of the runs)."""
    free = {(run.shard, run.split, run.bucket): run.row_R for run in runs}
    kept = []
    for output in outputs:
        ways = [((shard, output.split, output.bucket), rows) for shard, rows in output.rows]
        if all(way in free and np.isin(rows, free[way]).all() for way, rows in ways):
            kept.append(output)
            for way, rows in ways:
                free[way] = np.setdiff1d(free[way], rows)
    left = [run.only(np.isin(run.row_R, free[run.shard, run.split, run.bucket])) for run in runs]
    return kept, [run for run in left if len(run.row_R)]
