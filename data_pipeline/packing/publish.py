"""The end of a run: which split a row goes to, the dead-letter table, the index of each split, dataset.json last."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import pyarrow as pa

from data_pipeline.formats.index import ShardEntry, write_split
from data_pipeline.formats.parquet_io import write_tables
from data_pipeline.formats.schema import DATASET_FILE, DatasetInfo, SplitInfo
from data_pipeline.packing.selections import RowSelection
from data_pipeline.stages.row_status import select_rejected
from infra import storage


def draw_split_number(digest: str) -> int:
    """A number from 0 to 2**32 - 1 by which a row goes to train or val, from the hash (`digest`) of its pixels."""
    return int.from_bytes(hashlib.sha256(f"val/{digest}".encode()).digest()[:4], "big")


def assign_splits(selections: Iterable[RowSelection], val_fraction: float) -> Iterator[RowSelection]:
    """Rows without a split go to val by the hash of their pixels: growing data moves no row to the other side (except
    one row, where val would be empty in a set of a few dozen). `selections` are walked twice."""
    limit, count, least = int(val_fraction * 2**32), 0, 2**32
    for selection in selections:
        if not selection.split and len(selection.row_R):
            count, least = count + len(selection.row_R), min(least, int(selection.draw_R.min()))
    if val_fraction > 0 and count > 1:
        limit = max(limit, least + 1)  # at least one row
    for selection in selections:
        if selection.split:
            yield selection
            continue
        val_R = selection.draw_R < limit
        parts = (selection.subset(~val_R, split="train"), selection.subset(val_R, split="val"))
        yield from (part for part in parts if len(part.row_R))


def make_rejected_table(shard: str, judged: pa.Table, sources: Mapping[int, str]) -> pa.Table:
    """A shard's dead letters: rows that did not make it, why, and where they came from."""
    bad = select_rejected(judged)
    columns = {
        "status": bad["status"].cast(pa.string()),
        "reason": bad["reason"],
        "source": pa.array([sources[row] for row in bad["row"].to_pylist()], pa.string()),
        "shard": pa.array([shard] * len(bad), pa.string()),
        "row": bad["row"],
    }
    return pa.table(columns)


def write_rejected(root: str, tables: Iterable[pa.Table]) -> str:
    """The dead-letter table of all shards. Returns its name relative to the root."""
    return write_tables(root, "rejected/", tables)


def publish(
    root: str, info: DatasetInfo, entries: Sequence[ShardEntry], counts: Mapping[str, int], *, rejected: str = ""
) -> DatasetInfo:
    """Write each split's index, then dataset.json, which makes all of it visible at once. `counts`: rows by status."""
    splits = {}
    for split in sorted({entry.tar.split("/", 1)[0] for entry in entries}):
        of_split = [entry for entry in entries if entry.tar.startswith(f"{split}/")]
        buckets: Counter[str] = Counter()
        for entry in of_split:
            buckets[entry.bucket] += entry.num_samples
        splits[split] = SplitInfo(write_split(root, split, of_split), buckets.total(), len(of_split), dict(buckets))
    info = DatasetInfo(**{**vars(info), "splits": splits, "counts": dict(counts), "rejected": rejected})
    path, data = storage.join(root, DATASET_FILE), info.to_bytes()
    if not storage.exists(path) or storage.read_bytes(path) != data:
        storage.write_bytes(path, data)
    return info
