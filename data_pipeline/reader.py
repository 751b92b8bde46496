"""Bytes of samples by (shard, row): positioned reads of local tars, ranged reads of remote ones, each one checked."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data_pipeline.index import RowTables, ShardRows, SplitIndex
from data_pipeline.layout import checksum
from infra import storage
from infra.errors import UnavailableError, UserError

_OPEN_FILES = 128
_REMOTE_THREADS = 16


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
        self._files: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()
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
        """The data region of one sample as bytes (uint8), checked against its sum in the index."""
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

    def read_many(self, places: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Several samples; remote ones at the same time."""
        if not storage.is_remote(self._index.uri):
            return [self.read(*place) for place in places]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_REMOTE_THREADS, thread_name_prefix="samples")
        return list(self._pool.map(lambda place: self.read(*place), places))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def _pread(self, shard: int, uri: str, offset: int, size: int) -> np.ndarray:
        # Not a memory map: a file that is cut while mapped ends the process with SIGBUS instead of an error.
        data = np.empty(size, np.uint8)
        with self._lock:
            handle = self._files.pop(shard, None)
            if handle is None:
                handle = os.open(storage.local_path(uri), os.O_RDONLY)
            self._files[shard] = handle
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            got = os.preadv(handle, [data.data], offset)
        return data[:got]

    def __getstate__(self) -> dict[str, object]:
        return {"index": self._index, "check": self._check}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["index"], check=state["check"])  # type: ignore[misc]
