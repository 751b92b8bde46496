"""Ranks that are threads of the test's process: collectives without a process group."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from trainer.zero.group import Group


@dataclass(frozen=True)
class ThreadGroup(Group):
    """A rank of `run_threads`. Ranks exchange through a list."""

    barrier_: threading.Barrier
    places: list[Any]

    def _exchange(self, value: Any) -> list[Any]:
        self.places[self.rank] = value
        self.barrier_.wait(60)
        found = list(self.places)
        self.barrier_.wait(60)
        return found

    def sum(self, numbers):
        return [sum(column) for column in zip(*self._exchange(list(numbers)))]

    def gather(self, text: str) -> list[str]:
        return self._exchange(text)


def run_threads(count: int, work: Callable[[ThreadGroup], Any]) -> list[Any]:
    """What `work` gives on each of `count` ranks; the thread of a rank bears its number as name."""
    barrier, places = threading.Barrier(count), [None] * count

    def run(rank: int) -> Any:
        threading.current_thread().name = str(rank)
        return work(ThreadGroup(rank, count, torch.device("cpu"), barrier, places))

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
