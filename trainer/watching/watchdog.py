"""The watchdog: each rank writes heartbeats to the rendezvous store, and a thread of each rank learns who is in
trouble.

When the process of a rank is gone, the others exit within a minute with one line that names it. They do not wait for
the backend (NCCL would wait for its own timeout). When a rank is alive but makes no progress, stack traces of all ranks
are written. When the launcher is gone, its ranks save and stop: DeepSpeed's launcher dies of a SIGTERM without a word
to its ranks.
"""

import contextlib
import faulthandler
import io
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil

from infra import storage
from infra.errors import UserError, choose_code
from infra.log import get_logger
from infra.outcome import LOST, report_code
from trainer.launchers import has_ended
from trainer.runfolder import name_rank, name_step
from trainer.watching.heartbeats import FAILED, LEFT, RUNNING, SURE_S, Heartbeats, RankStatus
from trainer.zero.group import Group, is_lost_peer, open_rendezvous_store, settle

log = get_logger("watch")
BEAT_S, DEAD_S = 3.0, 40.0  # between heartbeats; without one, a rank counts as dead


class Watchdog:
    """The main thread calls `begin` with what it does. Two threads send heartbeats, read others, and report."""

    def __init__(
        self, group: Group, out: str, *, stall_s: float, store: Any = None, launchers: Sequence[psutil.Process] = ()
    ) -> None:
        self.group, self.out, self.stall_s = group, out, stall_s
        self._launchers = list(launchers)
        self._step, self._phase, self._moved = 0, "start", time.monotonic()
        self._done = 0  # things begun: ranks begin the same things in the same order, so who has fewer is behind
        self._reported: tuple[int, str] | None = None
        self._state = RUNNING
        self._stop, self._ending = threading.Event(), threading.Lock()
        store = store or (open_rendezvous_store() if group.world_size > 1 else None)
        self._heartbeats = Heartbeats(store, group.rank, group.world_size) if store is not None else None
        self._contact = time.monotonic()
        # Talking to the store may block when the network is gone; judging must not.
        self._talker = threading.Thread(target=self._talk, name="watch-talk", daemon=True)
        self._judge_thread = threading.Thread(target=self._judge, name="watch", daemon=True)
        self._talker.start()
        self._judge_thread.start()

    def begin(self, phase: str, step: int) -> None:
        """The main thread begins `phase` at this step; this also counts as progress."""
        self._step, self._phase, self._moved = step, phase, time.monotonic()
        self._done += 1

    def close(self, state: int = LEFT) -> None:
        """End in order, so that the other ranks do not take this one for dead. With FAILED they end, too."""
        self._state = state
        self._stop.set()
        self._talker.join(timeout=10)
        if state == FAILED and self._heartbeats is not None:
            time.sleep(2 * BEAT_S)  # rank 0 may hold the store: let the others read it

    # --- the threads

    def _talk(self) -> None:
        if self._heartbeats is None:
            return
        count = 0
        try:
            while not self._stop.wait(BEAT_S):
                count += 1
                self._heartbeats.read()  # before the beat, with which rank 0 passes on what it has read
                self._beat(self._heartbeats, count)
                self._contact = time.monotonic()
            self._beat(self._heartbeats, -1)
        except RuntimeError:  # the store is gone, and with it the rank (or the launcher) that held it
            self._contact = -math.inf

    def _judge(self) -> None:
        while not self._stop.wait(min(BEAT_S, self.stall_s / 4)):
            if has_ended(self._launchers):
                self._launchers = []
                log.warning("the launcher is gone: that counts as a SIGTERM")
                os.kill(os.getpid(), signal.SIGTERM)
            dead = self._find_dead()
            # What fails on one rank may fail on all alike: the main thread then has its own line to say.
            if dead and not self._stop.wait(BEAT_S):
                self.end(dead)
            self._report_stall()

    def _beat(self, heartbeats: Heartbeats, count: int) -> None:
        heartbeats.send(
            count, step=self._step, phase=self._phase, done=self._done, state=self._state, waits=waits_for_others()
        )

    def _find_dead(self, after_s: float = DEAD_S) -> list[int]:
        if self._heartbeats is None:
            return []
        if self.group.rank > 0 and time.monotonic() - self._contact > after_s:
            return [0]
        statuses = self._statuses.items()
        return [rank for rank, s in statuses if rank != self.group.rank and s.is_in_trouble(after_s=after_s)]

    def wait_for_verdict(self) -> list[int]:
        """After a collective failed: wait until heartbeats show which ranks are gone; [] if none is (24 s)."""
        deadline = time.monotonic() + SURE_S + 4 * BEAT_S
        while time.monotonic() < deadline:
            if dead := self._find_dead(SURE_S):
                return dead
            time.sleep(0.5)
        return []

    def has_rank_0_failed(self) -> bool:
        """After closing as FAILED: did rank 0 fail as well? Then a user's mistake is reported by rank 0 alone."""
        if self.group.rank == 0 or self._heartbeats is None:
            return False
        try:
            self._heartbeats.read()
        except RuntimeError:
            return True
        first = self._statuses.get(0)
        return first is not None and first.state == FAILED

    def end(self, dead: list[int]) -> None:
        """Report the dead ranks and end this process: the main thread may wait in a collective for ever."""
        self._ending.acquire()  # for good: whichever thread comes second waits here
        failed = [rank for rank in dead if rank in self._statuses and self._statuses[rank].state == FAILED]
        report_lost(dead, self.group, self._step, failed=bool(failed))
        sys.stderr.flush()
        if self.group.rank == 0 and len(dead) + 1 < self.group.world_size:
            time.sleep(2 * BEAT_S)  # its heartbeats tell the others who is dead
        report_code(LOST)
        os._exit(LOST)

    @property
    def _statuses(self) -> dict[int, RankStatus]:
        return {} if self._heartbeats is None else self._heartbeats.statuses

    def _report_stall(self) -> None:
        still = time.monotonic() - self._moved
        here = self._step, self._phase
        if still < self.stall_s or self._reported == here:
            return
        self._reported = here
        name = f"stall_{name_rank(self.group.rank)}_{name_step(self._step)}.txt"
        uri = storage.join(self.out, "logs", name)
        with contextlib.suppress(UserError, OSError):
            storage.write_bytes(uri, dump_stacks().encode())
        if self.group.rank == self._choose_speaker():
            log.warning("no progress for %.0f s; %s; stack traces of each rank: %s", still, self._describe_stuck(), uri)

    def _find_silent(self) -> list[int]:
        return [rank for rank in self._find_dead(SURE_S) if rank in self._statuses]

    def _choose_speaker(self) -> int:
        """The lowest rank that is not silent, which writes the report: a stopped rank cannot."""
        silent = self._find_silent()
        return min((rank for rank in range(self.group.world_size) if rank not in silent), default=self.group.rank)

    def _describe_stuck(self) -> str:
        """Text that names the ranks for which the others wait. These are ranks without heartbeats (stopped); else those
        that have begun the fewest phases and are not inside a collective; else all with the fewest phases."""
        if not self._statuses:
            return f"this rank is at step {self._step}: {self._phase}"
        silent = self._find_silent()
        least = min(status.done for status in self._statuses.values())
        behind = [rank for rank, status in self._statuses.items() if status.done == least]
        stuck = silent or [rank for rank in behind if not self._statuses[rank].waits] or behind
        described = [f"rank {r} at step {self._statuses[r].step}: {self._statuses[r].phase}" for r in sorted(stuck)[:4]]
        return ("without a sign of life: " if silent else "longest without progress: ") + ", ".join(described)


def waits_for_others() -> bool:
    """Is the main thread inside a collective, as far as Python can see?"""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    where = frame.f_code.co_filename if frame is not None else ""
    return "/torch/distributed/" in where or "/deepspeed/" in where


def dump_stacks() -> str:
    """Stack traces of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0, io.SEEK_SET)
        return file.read()


def report_lost(dead: list[int], group: Group, step: int, *, failed: bool) -> None:
    """Print one line that names the dead ranks, on the lowest rank that is alive."""
    alive = [rank for rank in range(group.world_size) if rank not in dead]
    if alive and group.rank == alive[0]:
        ranks = f"rank{'s' if len(dead) > 1 else ''} {', '.join(map(str, dead[:8]))}"
        ended = "ended without a word (killed, stopped or out of reach)"
        ending = "stopped with an error of its own" if failed else ended
        line = f"error: {ranks} {ending} at step {step}"
        print(f"{line}: the same command continues from the last checkpoint", file=sys.stderr, flush=True)


@contextlib.contextmanager
def end_together(watch: Watchdog) -> Iterator[Watchdog]:
    """Inside the block: when a collective fails because another rank is gone, the rest report that in one line and
    exit with code LOST."""
    try:
        yield watch
    except BaseException as error:
        settle()
        if not is_lost_peer(error):
            watch.close(FAILED)
            if isinstance(error, UserError) and watch.has_rank_0_failed():
                raise SystemExit(choose_code(error)) from None
            raise
        dead = watch.wait_for_verdict()
        if not dead:
            watch.close(FAILED)
            raise
        watch.end(dead)
    watch.group.barrier()  # rank 0 may hold the store: it leaves with the others
    watch.close()
