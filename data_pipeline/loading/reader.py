"""Bytes of samples by (shard, row): positioned reads of local tars, ranged reads of remote ones, each one checked."""

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from data_pipeline.formats.index import ShardRows
from data_pipeline.formats.layout import checksum
from data_pipeline.loading.index import RowTables, SplitIndex
from infra import storage
from infra.errors import UnavailableError, UserError

_OPEN_FILES = 128  # tars kept open, of those read most recently
_REMOTE_THREADS = 16
_LOCAL_THREADS = 2


class ShardError(Exception):
    """A shard that cannot be trusted: missing, cut short, or other bytes than were written."""

    def __init__(self, shard: int, reason: str) -> None:
        super().__init__(reason)
        self.shard, self.reason = shard, reason


class ReadTarget(NamedTuple):
    """Bytes of a sample's data region that are wanted elsewhere: from `offset` on, as many as `target` (uint8) holds.

    Both are multiples of 8, as the sum over the words of the region is made piece by piece.
    """

    offset: int
    target: np.ndarray


class SampleReader:
    """Reads sample data regions. Thread-safe; a copy in another process opens its own files."""

    def __init__(self, index: SplitIndex, *, check: bool = True) -> None:
        self._index, self._check = index, check
        self._remote = index.remote
        self.rows = RowTables(index)
        self._files: OrderedDict[int, io.FileIO] = OrderedDict()
        self._lock, self._scratch = threading.Lock(), threading.local()
        self._pool: ThreadPoolExecutor | None = None
        self._pool_of = 0

    def table(self, shard: int) -> ShardRows:
        """A shard's table of rows; ShardError when it is damaged."""
        try:
            return self.rows[shard]
        except UnavailableError:
            raise
        except UserError as error:
            raise ShardError(shard, str(error)) from error

    def read(self, shard: int, row: int, elsewhere: Sequence[ReadTarget] = ()) -> np.ndarray:
        """The data region of one sample as bytes (uint8), checked against its sum in the index.

        They are good until this thread reads again: a megabyte of fresh memory costs more than reading it. Parts that
        have a place of their own are read straight into it, and nothing of them is in what is returned.
        """
        table = self.table(shard)
        offset, size = int(table.offset_R[row]), int(table.size_R[row])
        data = self._borrow_scratch(size)
        pieces = _split_pieces(data, elsewhere)
        try:
            far = self._remote and storage.is_remote(self._index.tar_uri(shard))  # a mix may hold both kinds
            got, total = (self._fetch if far else self._pread)(shard, offset, pieces)
        except UnavailableError:
            raise
        except (UserError, OSError) as error:
            raise ShardError(shard, str(error)) from error
        if got != size:
            cut = f"{got:,} bytes at {offset:,}, expected {size:,}: cut short"
            raise ShardError(shard, f"{self._index.tar_uri(shard)}: {cut}")
        if self._check and total != int(table.checksum_R[row]):
            reason = f"the bytes of {table.keys[row]} at {offset:,} are not those written"
            raise ShardError(shard, f"{self._index.tar_uri(shard)}: {reason}")
        return data

    def spread(self, count: int, work: Callable[[range], object]) -> None:
        """`work` on parts of range(count), each in a thread. Of several failures the first in order is raised."""
        threads = _REMOTE_THREADS if self._remote else _LOCAL_THREADS
        edges = [count * n // threads for n in range(threads + 1)]
        parts = [range(first, behind) for first, behind in pairwise(edges) if first < behind]
        if len(parts) < 2:
            work(range(count))
            return
        if self._pool is None or self._pool_of != os.getpid():  # a fork inherits the pool without its threads
            self._pool, self._pool_of = ThreadPoolExecutor(threads, thread_name_prefix="samples"), os.getpid()
        futures = [self._pool.submit(work, part) for part in parts]
        wait(futures)
        for future in futures:
            future.result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        with self._lock:
            self._files.clear()

    def _borrow_scratch(self, size: int) -> np.ndarray:
        data = getattr(self._scratch, "data", None)
        if data is None or len(data) < size:
            data = self._scratch.data = np.empty(size, np.uint8)
        return data[:size]

    def _pread(self, shard: int, offset: int, pieces: Sequence[memoryview]) -> tuple[int, int]:
        # Not a memory map: a file that is cut while mapped ends the process with SIGBUS instead of an error.
        with self._lock:
            file = self._files.pop(shard, None) or io.FileIO(storage.local_path(self._index.tar_uri(shard)))
            self._files[shard] = file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)  # closed when the last thread that reads it lets go
        return os.preadv(file.fileno(), pieces, offset), checksum(*pieces)

    def _fetch(self, shard: int, offset: int, pieces: Sequence[memoryview]) -> tuple[int, int]:
        at, body = 0, storage.read_bytes(self._index.tar_uri(shard), offset, sum(map(len, pieces)))
        for piece in pieces:
            part = body[at : at + len(piece)]
            piece[: len(part)] = part
            at += len(piece)
        return len(body), checksum(body)

    def __getstate__(self) -> dict[str, object]:
        return {"index": self._index, "check": self._check}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["index"], check=state["check"])  # type: ignore[misc]


def _split_pieces(data: np.ndarray, elsewhere: Sequence[ReadTarget]) -> list[memoryview]:
    """A data region as it is read: `data` with the targets in place of what goes elsewhere."""
    pieces, at = [], 0
    for offset, target in elsewhere:
        pieces += [data[at:offset].data, target.data]
        at = offset + len(target)
    return [*pieces, data[at:].data] if at < len(data) else pieces
