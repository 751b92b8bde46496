"""The end of a run: which split a row goes to, the dead-letter table, the index of each split, dataset.json last."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import pyarrow as pa

from data_pipeline.flow.verdicts import rejected
from data_pipeline.loading.index import ShardEntry, table_bytes, write_split
from data_pipeline.packing.pack import RowRun
from data_pipeline.schema import DATASET_FILE, DatasetInfo, SplitInfo
from infra import storage


def draw_of(digest: str) -> int:
    """Where the pixels of a row without a split fall between train and val, of 2**32."""
    return int.from_bytes(hashlib.sha256(f"val/{digest}".encode()).digest()[:4], "big")


def assign_splits(runs: Sequence[RowRun], val_fraction: float) -> list[RowRun]:
    """Rows without a split go to val by the hash of their pixels: growing data moves no row to the other side (but the
    one row of a val split that would else be empty, in sets of a few dozen)."""
    undecided = [run for run in runs if not run.split]
    limit = int(val_fraction * 2**32)
    if val_fraction > 0 and sum(len(run.row_R) for run in undecided) > 1:
        limit = max(limit, min(int(run.draw_R.min()) for run in undecided) + 1)  # at least one row
    decided = []
    for run in runs:
        if run.split:
            decided.append(run)
            continue
        val_R = run.draw_R < limit
        parts = (run.only(~val_R, split="train"), run.only(val_R, split="val"))
        decided += [part for part in parts if len(part.row_R)]
    return decided


def rejected_rows(shard: str, verdict: pa.Table, sources: Mapping[int, str]) -> pa.Table:
    """A shard's dead letters: rows that did not make it, why, and where they came from."""
    bad = rejected(verdict)
    columns = {
        "status": bad["status"].cast(pa.string()),
        "reason": bad["reason"],
        "source": pa.array([sources[row] for row in bad["row"].to_pylist()], pa.string()),
        "shard": pa.array([shard] * len(bad), pa.string()),
        "row": bad["row"],
    }
    return pa.table(columns)


def write_rejected(root: str, tables: Sequence[pa.Table]) -> str:
    """The dead-letter table of all shards. Returns its name relative to the root."""
    data = table_bytes(pa.concat_tables(tables).combine_chunks())
    name = f"rejected/{storage.sha256_hex(data)[:16]}.parquet"
    storage.write_bytes(storage.join(root, name), data)
    return name


def publish(
    root: str, info: DatasetInfo, entries: Sequence[ShardEntry], counts: Mapping[str, int], *, rejected: str = ""
) -> DatasetInfo:
    """Write each split's index, then dataset.json, which makes all of it visible at once. `counts`: rows by status."""
    splits = {}
    for split in sorted({entry.tar.split("/", 1)[0] for entry in entries}):
        mine = [entry for entry in entries if entry.tar.startswith(f"{split}/")]
        buckets: Counter[str] = Counter()
        for entry in mine:
            buckets[entry.bucket] += entry.num_samples
        splits[split] = SplitInfo(write_split(root, split, mine), buckets.total(), len(mine), dict(buckets))
    info = DatasetInfo(**{**vars(info), "splits": splits, "counts": dict(counts), "rejected": rejected})
    path, data = storage.join(root, DATASET_FILE), info.to_bytes()
    if not storage.exists(path) or storage.read_bytes(path) != data:
        storage.write_bytes(path, data)
    return info
