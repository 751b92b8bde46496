"""Where samples are: the table of shards of one split, and the tables of rows, read when they are first needed."""

import threading
from collections import OrderedDict

import numpy as np

from data_pipeline.formats.index import ShardRows, decode_rows
from data_pipeline.formats.parquet_io import decode_table
from infra import storage
from infra.errors import UserError


class SplitIndex:
    """The table of shards of one split. Shards of a bucket lie together, so a bucket is a range of samples."""

    def __init__(self, uri: str, name: str) -> None:
        self.uri = uri
        path = storage.join(uri, name)
        table = decode_table(storage.read_bytes(path), path)
        columns = {key: table[key] for key in ("tar", "rows", "bucket", "encoding")}
        self.tars: list[str] = columns["tar"].to_pylist()
        self.rows: list[str] = columns["rows"].to_pylist()
        self.buckets: list[str] = columns["bucket"].to_pylist()
        self.encodings: set[str] = set(columns["encoding"].unique().to_pylist())
        self.num_samples_per_shard = table["num_samples"].to_numpy()
        self.starts = np.concatenate([[0], np.cumsum(self.num_samples_per_shard)]).astype(np.int64)

    @property
    def num_samples(self) -> int:
        return int(self.starts[-1])

    @property
    def remote(self) -> bool:
        """Is any of it on S3?"""
        return storage.is_remote(self.uri)

    def tar_uri(self, shard: int) -> str:
        """Where a shard lies."""
        return storage.join(self.uri, self.tars[shard])

    def rows_uri(self, shard: int) -> str:
        """Where its table of rows lies."""
        return storage.join(self.uri, self.rows[shard])

    def shards_of(self, bucket: str) -> np.ndarray:
        """Numbers of the shards that hold a bucket."""
        return np.flatnonzero(np.array(self.buckets, dtype=object) == bucket)

    def bucket_ranges(self) -> dict[str, range]:
        """Each bucket's samples as a range of global indices."""
        ranges = {}
        for bucket in sorted(set(self.buckets)):
            shards = self.shards_of(bucket)
            ranges[bucket] = range(int(self.starts[shards[0]]), int(self.starts[shards[-1] + 1]))
        return ranges

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard number, row) of global sample indices."""
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        return shards, indices - self.starts[shards]


class RowTables:
    """Tables of rows, loaded when needed; the most recently used ones stay in memory. Safe for threads."""

    def __init__(self, index: SplitIndex, keep: int = 256) -> None:
        self._index, self._keep = index, keep
        self._tables: OrderedDict[int, ShardRows] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, shard: int) -> ShardRows:
        with self._lock:
            if shard in self._tables:
                self._tables.move_to_end(shard)
                return self._tables[shard]
        path = self._index.rows_uri(shard)
        rows = decode_rows(storage.read_bytes(path), path)
        if len(rows) != self._index.num_samples_per_shard[shard]:
            raise UserError(
                f"{path}: {len(rows)} rows, the index says {self._index.num_samples_per_shard[shard]}: "
                f"run `python -m data_pipeline verify {self._index.uri}`"
            )
        with self._lock:
            self._tables[shard] = rows
            while len(self._tables) > self._keep:
                self._tables.popitem(last=False)
        return rows
