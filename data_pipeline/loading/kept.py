"""Which rows of a split are trained on: one bit per row, shard by shard. Nothing is packed again for it."""
# Shapes: N samples, R rows of one shard.

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa

from data_pipeline.formats.parquet_io import decode_table, encode_table
from data_pipeline.loading.index import SplitIndex
from infra import storage
from infra.errors import UserError

_SHARDS = 64  # whose row numbers stay in memory


class KeptRows:
    """The kept rows of a split, one bit per row in memory (125 MB for a billion)."""

    def __init__(self, kept_R: Iterable[np.ndarray]) -> None:
        """`kept_R`: for each shard of the index, in its order, a bool per row."""
        masks = list(kept_R)
        self.sizes = np.array([len(mask) for mask in masks], np.int64)
        self.counts = np.array([int(mask.sum()) for mask in masks], np.int64)
        self._bits = [np.packbits(mask) for mask in masks]
        self._rows: OrderedDict[int, np.ndarray] = OrderedDict()

    @property
    def num_kept(self) -> int:
        return int(self.counts.sum())

    def rows_of(self, shard: int) -> np.ndarray:
        """Row numbers of a shard that are kept, ascending."""
        if shard not in self._rows:
            bits = np.unpackbits(self._bits[shard], count=int(self.sizes[shard]))
            self._rows[shard] = np.flatnonzero(bits)
            if len(self._rows) > _SHARDS:
                self._rows.popitem(last=False)
        return self._rows[shard]

    def to_rows(self, shard_N: np.ndarray, number_N: np.ndarray) -> np.ndarray:
        """The row of each `number`-th kept row of a shard."""
        row_N = np.empty_like(number_N)
        for shard in np.unique(shard_N):
            in_shard_N = shard_N == shard
            row_N[in_shard_N] = self.rows_of(int(shard))[number_N[in_shard_N]]
        return row_N

    def to_bytes(self, index: SplitIndex, about: Mapping[str, str]) -> bytes:
        """A parquet file with a line per shard; `about` says what was asked."""
        table = pa.table(
            {
                "tar": pa.array(index.tars, pa.string()),
                "num_samples": pa.array(self.sizes, pa.int64()),
                "kept": pa.array([bits.tobytes() for bits in self._bits], pa.binary()),
            }
        )
        return encode_table(table.replace_schema_metadata(dict(about)))


def read_kept_rows(uri: str, index: SplitIndex) -> tuple[KeptRows, dict[str, str]]:
    """What `KeptRows.to_bytes` wrote, and what it said about itself; UserError where it is of other shards."""
    table = decode_table(storage.read_bytes(uri), uri)
    if table.column_names != ["tar", "num_samples", "kept"] or table["tar"].to_pylist() != index.tars:
        raise UserError(f"{uri}: rows of other shards than the dataset's: delete this file, it is made again")
    lines = zip(table["kept"], table["num_samples"].to_pylist())
    masks = (np.unpackbits(np.frombuffer(bits.as_buffer(), np.uint8), count=size) for bits, size in lines)
    about = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    return KeptRows(mask.astype(bool) for mask in masks), about
