"""Memory of batches, reused: fresh pages, which the system must find and clear, cost as much as reading samples."""

import weakref
from collections import deque

import numpy as np

KEPT = 8  # arrays of three kinds, of some three batches


class ArrayPool:
    """Arrays that were lent and that nobody holds any more; a few of them are kept. Safe for threads."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=KEPT)

    def lend(self, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
        """Zeros, or what the last borrower of as much left. It comes back when this very array dies, not its views:
        hand it to torch, whose tensors and their slices keep it."""
        array = self._find_fitting(shape, dtype)
        lent = array.view()
        weakref.finalize(lent, self._free.append, array).atexit = False
        return lent

    def _find_fitting(self, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
        for _ in range(len(self._free)):
            try:
                array = self._free.popleft()
            except IndexError:  # another thread has taken it
                break
            if array.shape == shape and array.dtype == dtype:
                return array
            self._free.append(array)
        return np.zeros(shape, dtype)  # numpy asks for huge pages, torch does not

    def __reduce__(self) -> tuple[type["ArrayPool"], tuple[()]]:
        return ArrayPool, ()  # a copy starts empty
