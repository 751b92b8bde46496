"""Reading ahead: threads make results before they are asked for, a bounded number of them, in order."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Generic, TypeVar

_PER_THREAD = 4  # items of `map_ahead` that are in work or wait for their turn

T = TypeVar("T")
R = TypeVar("R")


class ReadAhead(Iterator[R], Generic[T, R]):
    """Iterates over `work(item)` for each item, in order. An error of `work` is raised in place of its result.

    Up to `ahead` results are computed before they are asked for, by `threads` threads. With 0 threads the caller's
    thread computes each result when it is asked for. `items` may be endless; the caller's thread takes from it.
    `start_thread` runs first in each new thread.
    """

    def __init__(
        self,
        work: Callable[[T], R],
        items: Iterable[T],
        *,
        ahead: int,
        threads: int = 1,
        name: str = "ahead",
        start_thread: Callable[[], object] | None = None,
    ) -> None:
        self._work, self._items, self._ahead = work, iter(items), ahead
        self._pool = ThreadPoolExecutor(threads, name, start_thread) if threads else None
        self._pending: deque[Future[R]] = deque()
        self.closed = False

    def __next__(self) -> R:
        if self.closed:
            raise StopIteration
        if self._pool is None:
            return self._work(next(self._items))
        for item in itertools.islice(self._items, self._ahead - len(self._pending)):
            self._pending.append(self._pool.submit(self._work, item))
        if not self._pending:
            raise StopIteration
        return self._pending.popleft().result()

    def close(self, *, wait: bool = True) -> None:
        """Stop: begin no more work and give no more results. `wait`: return when the work in progress is done."""
        self.closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=wait, cancel_futures=True)


def map_ahead(work: Callable[[T], R], items: Iterable[T], *, threads: int) -> Iterator[tuple[T, R]]:
    """Each item with its result, in the order of the items."""

    def pair(item: T) -> tuple[T, R]:
        return item, work(item)

    with closing(ReadAhead(pair, items, ahead=threads * _PER_THREAD, threads=threads)) as results:
        yield from results
