"""Arrays of any length on scratch disk: unnamed memory-mapped files below $TMPDIR."""
# Shapes: N values.

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from infra.errors import DISK_FULL, UserError

BLOCK = 2**16  # values that are held in memory at a time


@contextlib.contextmanager
def refuse_full_disk() -> Iterator[None]:
    """Makes a full disk a UserError of one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(f"{tempfile.gettempdir()}: scratch disk full: free some space or set TMPDIR") from error


class Spool:
    """Values that are appended and then read as one array, with `width` values in each row."""

    def __init__(self, dtype: npt.DTypeLike, width: int | None = None) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the object
        self._dtype, self._width, self._count = np.dtype(dtype), width, 0

    def append(self, values: npt.ArrayLike) -> None:
        """Append any number of values, row after row; UserError if the disk is full."""
        data = np.ascontiguousarray(values, self._dtype)
        with refuse_full_disk():
            self._file.write(data.tobytes())
        self._count += data.size

    def read_array(self) -> np.ndarray:
        """(N,) or (N, width), of what was appended so far."""
        shape = (self._count,) if self._width is None else (self._count // self._width, self._width)
        if not self._count:
            return np.zeros(shape, self._dtype)
        with refuse_full_disk():
            self._file.flush()
        return np.memmap(self._file, self._dtype, "r", shape=shape)


def allocate(shape: int | tuple[int, ...], dtype: npt.DTypeLike, fill: int = 0) -> np.ndarray:
    """An array to write to, full of `fill`; UserError where the disk has no room for it."""
    shape = (shape,) if isinstance(shape, int) else shape
    if not np.prod(shape):
        return np.zeros(shape, dtype)
    with tempfile.TemporaryFile() as file, refuse_full_disk():
        # a page that finds no room when it is written to would end the process
        os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        made = np.memmap(file, np.dtype(dtype), "r+", shape=shape)
    if fill:
        for block in iterate_blocks(len(made)):
            made[block] = fill
    return made


def iterate_blocks(count: int, size: int = BLOCK) -> Iterator[slice]:
    """Slices of `size` that cover range(count)."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def gather(values_N: np.ndarray, at_N: np.ndarray) -> np.ndarray:
    """`values_N[at_N]`, on disk."""
    found = allocate((len(at_N), *values_N.shape[1:]), values_N.dtype)
    for block in iterate_blocks(len(at_N)):
        found[block] = values_N[at_N[block]]
    return found


def concatenate(parts: Sequence[np.ndarray]) -> np.ndarray:
    """All parts one after the other, on disk."""
    found, start = allocate(sum(map(len, parts)), parts[0].dtype), 0
    for part in parts:
        found[start : start + len(part)] = part
        start += len(part)
    return found
