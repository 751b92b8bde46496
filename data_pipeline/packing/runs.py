"""Rows on their way into training shards, on scratch disk: by split, bucket and shard, however many there are."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.stages.scratch_db import ScratchDatabase


@dataclass(frozen=True)
class RowRun:
    """Rows of one canonical shard that made it, with one way to go. `draw_R` decides where the split is still ""."""

    shard: str
    split: str
    bucket: str
    row_R: np.ndarray
    draw_R: np.ndarray

    def only(self, chosen_R: np.ndarray, *, split: str | None = None) -> "RowRun":
        """Some of the rows."""
        return RowRun(
            self.shard, self.split if split is None else split, self.bucket, self.row_R[chosen_R], self.draw_R[chosen_R]
        )


class Runs:
    """One run for each split, bucket and shard, in that order."""

    def __init__(self, database: ScratchDatabase) -> None:
        self._map = database.new_map("split", "bucket", "shard")

    def put(self, run: RowRun) -> None:
        """It takes the place of the one with the same way to go; a run without rows is none."""
        key = (run.split, run.bucket, run.shard)
        if len(run.row_R):
            self._map[key] = np.stack([run.row_R, run.draw_R]).astype(np.uint32).tobytes()
        elif key in self._map:
            del self._map[key]

    def get(self, split: str, bucket: str, shard: str) -> RowRun | None:
        """The run with this way to go, None without one."""
        key = (split, bucket, shard)
        return _run(*key, data=self._map[key]) if key in self._map else None

    def __iter__(self) -> Iterator[RowRun]:
        return (_run(*map(str, key), data=data) for key, data in self._map.items())

    def __bool__(self) -> bool:
        return any(True for _ in self._map)

    @property
    def buckets(self) -> list[str]:
        """Each bucket once, in order."""
        return self._map.list_distinct("bucket")


def _run(split: str, bucket: str, shard: str, *, data: bytes) -> RowRun:
    row_R, draw_R = np.frombuffer(data, np.uint32).reshape(2, -1)
    return RowRun(shard, split, bucket, row_R.astype(np.int32), draw_R)
