"""The end of a run: which split a row goes to, the dead-letter table, the index of each split, dataset.json last."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import pyarrow as pa

from data_pipeline.index import ShardEntry, table_bytes, write_split
from data_pipeline.pack import RowRef
from data_pipeline.schema import DATASET_FILE, DatasetInfo, SplitInfo
from data_pipeline.stage import OK
from infra import storage

Statuses = Mapping[str, Mapping[int, tuple[str, str]]]  # shard -> row -> (status, reason)


def assign_splits(accepted: Sequence[tuple[RowRef, str]], val_fraction: float) -> list[RowRef]:
    """Rows without a split go to val by the hash of their pixels: growing data never moves a row to the other side."""
    undecided = [digest for ref, digest in accepted if not ref.split]
    limit = int(val_fraction * 2**32)

    def value(digest: str) -> int:
        return int.from_bytes(hashlib.sha256(f"val/{digest}".encode()).digest()[:4], "big")

    lowest = min(map(value, undecided), default=0)
    if undecided and val_fraction > 0 and len(undecided) > 1:
        limit = max(limit, lowest + 1)  # at least one row
    return [
        ref if ref.split else RowRef(ref.shard, ref.row, "val" if value(digest) < limit else "train", ref.bucket)
        for ref, digest in accepted
    ]


def write_rejected(root: str, statuses: Statuses, measured: Mapping[str, pa.Table]) -> str:
    """The dead-letter table: every row that did not make it, with its reason. Returns where it is."""
    bad = [(s, r, found) for s, rows in statuses.items() for r, found in rows.items() if found[0] != OK]
    names = {s: dict(zip(t["row"].to_pylist(), t["source"].to_pylist())) for s, t in measured.items()}
    table = pa.table(
        {
            "status": pa.array([status for *_, (status, _) in bad], pa.string()),
            "reason": pa.array([reason for *_, (_, reason) in bad], pa.string()),
            "source": pa.array([names[shard][row] for shard, row, _ in bad], pa.string()),
            "shard": pa.array([shard for shard, *_ in bad], pa.string()),
            "row": pa.array([row for _, row, _ in bad], pa.int32()),
        }
    )
    data = table_bytes(table)
    uri = storage.join(root, f"rejected/{storage.sha256_hex(data)[:16]}.parquet")
    storage.write_bytes(uri, data)
    return uri


def publish(root: str, info: DatasetInfo, entries: Sequence[ShardEntry], statuses: Statuses) -> DatasetInfo:
    """Write each split's index, then dataset.json, which makes all of it visible at once."""
    splits = {}
    for split in sorted({entry.tar.split("/", 1)[0] for entry in entries}):
        mine = [entry for entry in entries if entry.tar.startswith(f"{split}/")]
        buckets: Counter[str] = Counter()
        for entry in mine:
            buckets[entry.bucket] += entry.num_samples
        splits[split] = SplitInfo(write_split(root, split, mine), buckets.total(), len(mine), dict(buckets))
    final = Counter(status for rows in statuses.values() for status, _ in rows.values())
    info = DatasetInfo(**{**vars(info), "splits": splits, "counts": dict(final)})
    path, data = storage.join(root, DATASET_FILE), info.to_bytes()
    if not storage.exists(path) or storage.read_bytes(path) != data:
        storage.write_bytes(path, data)
    return info
