"""Rows that go into training shards, on scratch disk: by split, bucket and canonical shard."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.stages.scratch_db import ScratchDatabase


@dataclass(frozen=True)
class RowSelection:
    """Rows of one canonical shard that go to one split and bucket. Where the split is "", `draw_R` will decide it."""

    shard: str
    split: str
    bucket: str
    row_R: np.ndarray
    draw_R: np.ndarray

    def subset(self, chosen_R: np.ndarray, *, split: str | None = None) -> "RowSelection":
        """Some of the rows."""
        return RowSelection(
            self.shard, self.split if split is None else split, self.bucket, self.row_R[chosen_R], self.draw_R[chosen_R]
        )


class RowSelections:
    """One selection for each split, bucket and shard, in that order."""

    def __init__(self, database: ScratchDatabase) -> None:
        self._map = database.new_map("split", "bucket", "shard")

    def put(self, selection: RowSelection) -> None:
        """Replaces the selection of the same split, bucket and shard; one without rows removes it."""
        key = (selection.split, selection.bucket, selection.shard)
        if len(selection.row_R):
            self._map[key] = np.stack([selection.row_R, selection.draw_R]).astype(np.uint32).tobytes()
        elif key in self._map:
            del self._map[key]

    def get(self, split: str, bucket: str, shard: str) -> RowSelection | None:
        """The rows of a shard that go to this split and bucket; None if there are none."""
        key = (split, bucket, shard)
        return _decode_selection(*key, data=self._map[key]) if key in self._map else None

    def __iter__(self) -> Iterator[RowSelection]:
        return (_decode_selection(*map(str, key), data=data) for key, data in self._map.items())

    def __bool__(self) -> bool:
        return any(True for _ in self._map)

    @property
    def buckets(self) -> list[str]:
        """Each bucket once, in order."""
        return self._map.list_distinct("bucket")


def _decode_selection(split: str, bucket: str, shard: str, *, data: bytes) -> RowSelection:
    row_R, draw_R = np.frombuffer(data, np.uint32).reshape(2, -1)
    return RowSelection(shard, split, bucket, row_R.astype(np.int32), draw_R)
