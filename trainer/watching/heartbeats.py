"""Heartbeats of the ranks, through the store where they met. The store's work grows with the ranks, not their square.

Each rank sets its own heartbeat. Rank 0 reads all of them, and its own heartbeat names the ranks in trouble: those that
failed and those that are quiet. The others read that one alone; where rank 0 itself is silent, they read all of them.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

SURE_S = 12.0  # without a heartbeat, a rank counts as dead where a collective has failed already
QUIET_S = SURE_S / 2  # the same, for rank 0 to name it
RUNNING, LEFT, FAILED = range(3)


@dataclass
class RankStatus:
    """The last heartbeat of a rank, and the time (`at`, monotonic seconds) at which this rank saw it change."""

    count: int
    at: float
    step: int
    phase: str
    done: int
    state: int
    waits: bool

    def is_in_trouble(self, *, after_s: float) -> bool:
        """Has the rank failed, or run without a heartbeat for so long?"""
        return self.state == FAILED or (self.state == RUNNING and time.monotonic() - self.at > after_s)


class Heartbeats:
    """This rank's heartbeat, and `statuses`, what it knows of the others': rank 0 of all, the others of rank 0 and of
    the ranks in trouble."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._started: set[int] = set()
        self.statuses: dict[int, RankStatus] = {}

    def send(self, count: int, *, step: int, phase: str, done: int, state: int, waits: bool) -> None:
        """Set this rank's heartbeat. `count` differs from that of the last one."""
        now, troubled = time.monotonic(), {}
        if self._rank == 0:
            troubled = {
                rank: [now - s.at, s.count, s.step, s.phase, s.done, s.state, s.waits]
                for rank, s in self.statuses.items() if rank and s.is_in_trouble(after_s=QUIET_S)
            }  # fmt: skip
        self._store.set(_name_key(self._rank), json.dumps([count, step, phase, done, state, waits, troubled]))

    def read(self) -> None:
        """Read what this rank needs of the others' heartbeats."""
        first = self.statuses.get(0)
        if self._rank == 0 or (first is not None and first.is_in_trouble(after_s=SURE_S)):
            everybody = self._fetch(range(self._world_size)).items()
            self.statuses = self.statuses | {rank: status for rank, (status, _) in everybody}
            return
        for status, troubled in self._fetch([0]).values():
            now = time.monotonic()
            others = {
                int(rank): RankStatus(count, now - age, *rest) for rank, (age, count, *rest) in troubled.items()
            }  # fmt: skip
            self.statuses = {0: status} | others

    def _fetch(self, ranks: Iterable[int]) -> dict[int, tuple[RankStatus, dict[str, Any]]]:
        """Status, and ranks in trouble by its word, of those of `ranks` that have set a heartbeat."""
        # The store waits for a key that is not there.
        there = [r for r in ranks if r in self._started or self._store.check([_name_key(r)])]
        self._started.update(there)
        now, found = time.monotonic(), {}
        for rank, text in zip(there, self._store.multi_get([_name_key(r) for r in there])):
            count, *rest, troubled = json.loads(text)
            old = self.statuses.get(rank)
            at = now if old is None or old.count != count else old.at
            found[rank] = RankStatus(count, at, *rest), troubled
        return found


def _name_key(rank: int) -> str:
    return f"beeline/beat/{rank}"
