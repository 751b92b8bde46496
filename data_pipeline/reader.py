"""Bytes of samples by (shard, row): positioned reads of local tars, ranged reads of remote ones, each one checked."""

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise

import numpy as np

from data_pipeline.index import RowTables, ShardRows, SplitIndex
from data_pipeline.layout import checksum
from infra import storage
from infra.errors import UnavailableError, UserError

_OPEN_FILES = 128
_REMOTE_THREADS = 16
_LOCAL_THREADS = 2


class ShardError(Exception):
    """A shard that cannot be trusted: missing, cut short, or other bytes than were written."""

    def __init__(self, shard: int, reason: str) -> None:
        super().__init__(reason)
        self.shard, self.reason = shard, reason


class SampleReader:
    """Reads sample data regions. Thread-safe; a copy in another process opens its own files."""

    def __init__(self, index: SplitIndex, *, check: bool = True) -> None:
        self._index, self._check = index, check
        self.rows = RowTables(index)
        self._files: OrderedDict[int, io.FileIO] = OrderedDict()
        self._lock, self._scratch = threading.Lock(), threading.local()
        self._pool: ThreadPoolExecutor | None = None

    def table(self, shard: int) -> ShardRows:
        """A shard's table of rows; ShardError when it is damaged."""
        try:
            return self.rows[shard]
        except UnavailableError:
            raise
        except UserError as error:
            raise ShardError(shard, str(error)) from error

    def read(self, shard: int, row: int) -> np.ndarray:
        """The data region of one sample as bytes (uint8), checked against its sum in the index.

        They are good until this thread reads again: a megabyte of fresh memory costs more than reading it.
        """
        table = self.table(shard)
        offset, size = int(table.offset_R[row]), int(table.size_R[row])
        uri = storage.join(self._index.uri, self._index.tars[shard])
        try:
            if storage.is_remote(uri):
                data = np.frombuffer(bytearray(storage.read_bytes(uri, offset, size)), np.uint8)
            else:
                data = self._pread(shard, uri, offset, size)
        except UnavailableError:
            raise
        except (UserError, OSError) as error:
            raise ShardError(shard, str(error)) from error
        if len(data) != size:
            raise ShardError(shard, f"{uri}: {len(data):,} bytes at {offset:,}, expected {size:,}: cut short")
        if self._check and checksum(data.data) != int(table.checksum_R[row]):
            raise ShardError(shard, f"{uri}: the bytes of {table.keys[row]} at {offset:,} are not those written")
        return data

    def spread(self, count: int, work: Callable[[range], object]) -> None:
        """`work` on parts of range(count), each in a thread. Of several failures the first in order is raised."""
        threads = _REMOTE_THREADS if storage.is_remote(self._index.uri) else _LOCAL_THREADS
        edges = [count * n // threads for n in range(threads + 1)]
        parts = [range(first, behind) for first, behind in pairwise(edges) if first < behind]
        if len(parts) < 2:
            work(range(count))
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="samples")
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

    def _pread(self, shard: int, uri: str, offset: int, size: int) -> np.ndarray:
        # Not a memory map: a file that is cut while mapped ends the process with SIGBUS instead of an error.
        data = getattr(self._scratch, "data", None)
        if data is None or len(data) < size:
            data = self._scratch.data = np.empty(size, np.uint8)
        with self._lock:
            file = self._files.pop(shard, None) or io.FileIO(storage.local_path(uri))
            self._files[shard] = file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)  # closed when the last thread that reads it lets go
        return data[: os.preadv(file.fileno(), [data[:size].data], offset)]

    def __getstate__(self) -> dict[str, object]:
        return {"index": self._index, "check": self._check}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["index"], check=state["check"])  # type: ignore[misc]
