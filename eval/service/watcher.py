"""The loop beside the pages: look at the store, claim a checkpoint nobody has evaluated, evaluate it, look again."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from eval.run import Checkpoint
from eval.service.claims import MOST_ATTEMPTS, Claim, Outcome, Watch, claim, outcomes
from eval.service.index import Index, IndexedRun
from eval.service.worker import Failed, Settings, Worker
from infra.errors import UserError
from infra.log import get_logger

log = get_logger("service")


@dataclass(frozen=True)
class Working:
    run: str
    step: int
    since: float


class Evaluator(Protocol):
    """Who does the work: a `Worker`. Raises Failed with the reason; calls `alive` every second or so."""

    def evaluate(self, checkpoint: Checkpoint, alive: Callable[[], None], /) -> None: ...

    def stop(self) -> None: ...


class Watcher:
    """Runs in a thread of its own. `settings` None only watches. `retry`: failed checkpoints get one more attempt."""

    def __init__(
        self, index: Index, settings: Settings | None, *, every: float = 10.0, retry: bool = False,
        worker: Evaluator | None = None,
    ) -> None:  # fmt: skip
        self.index, self.settings, self.every = index, settings, every
        self.working: Working | None = None
        self.problem = ""
        self.looked = 0.0
        self.waiting = 0
        self._retry = retry
        self._tried: set[tuple[str, int]] = set()
        self._watch = Watch()
        self._worker: Evaluator | None = worker or (Worker(settings) if settings is not None else None)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """An evaluation under way is cut off and its claim given back."""
        self._stopping.set()
        if self._worker is not None:
            self._worker.stop()
        self._thread.join(15)

    def _loop(self) -> None:
        while not self._stopping.is_set():
            try:
                busy = self.step()
                self.problem = ""
            except (UserError, OSError) as error:  # the store may come back
                if str(error) != self.problem:
                    log.warning("%s", error)
                self.problem, busy = str(error), False
            if not busy:
                self._stopping.wait(self.every)

    def step(self) -> bool:
        """One look, and one evaluation where there is one to do (True)."""
        self.index.refresh()
        self.looked = time.time()
        if self.settings is None:
            return False
        waiting = [
            (run, step, outcome) for run in self.index.snapshot.runs for step, outcome in self._open(run).items()
        ]
        self.waiting = len(waiting)
        for run, step, outcome in waiting:
            if self._stopping.is_set():
                return False
            mine = claim(run.run.uri, self.settings.hash, step, after=outcome.attempt)
            if mine is not None:
                self._evaluate(run, step, mine, outcome)
                return True
        return False

    def _open(self, run: IndexedRun) -> dict[int, Outcome]:
        """The checkpoints of a run that nobody has evaluated or is evaluating, the newest first."""
        assert self.settings is not None
        known = outcomes(run.evaluations, self.settings.hash)
        steps = sorted(run.weights, reverse=True)
        if self.settings.options.checkpoints == "last":
            steps = steps[:1]
        found = {}
        for step in steps:
            outcome = known.get(step, Outcome())
            if self._is_open(run, step, outcome):
                found[step] = outcome
        return found

    def _is_open(self, run: IndexedRun, step: int, outcome: Outcome) -> bool:
        assert self.settings is not None
        if outcome.state == "failed":
            return self._retry and (run.name, step) not in self._tried
        if outcome.state == "running":
            return self._watch.abandoned(run.run.uri, self.settings.hash, step, outcome.attempt)
        return outcome.state == "new"

    def _evaluate(self, run: IndexedRun, step: int, mine: Claim, before: Outcome) -> None:
        assert self.settings is not None
        assert self._worker is not None
        self._tried.add((run.name, step))
        deaths = before.deaths + (before.state == "running")
        if deaths >= MOST_ATTEMPTS:
            mine.end("failed", reason=f"{deaths} evaluations of it died without a word (often a lack of memory)")
            return
        began = time.monotonic()
        self.working = Working(run.name, step, time.time())
        log.info("evaluating %s step %d", run.name, step)
        try:
            checkpoint = Checkpoint(run.name, run.run.uri, step, run.weights[step])
            self._worker.evaluate(checkpoint, mine.beat)
        except Failed as failed:
            if self._stopping.is_set():
                mine.end("released", reason="the service was stopped")
                return
            log.error("%s step %d not evaluated: %s", run.name, step, failed)
            mine.end("failed", reason=str(failed), seconds=time.monotonic() - began)
        else:
            mine.end("done", seconds=time.monotonic() - began)
        finally:
            self.working = None

    def told(self) -> dict[str, Any]:
        """For the status line."""
        working = self.working
        return {
            "evaluates": self.settings is not None,
            "working": {"run": working.run, "step": working.step, "since": working.since} if working else None,
            "waiting": self.waiting,
            "problem": self.problem,
            "looked": self.looked,
        }
