"""The loop beside the pages: look at the store, claim a checkpoint nobody has evaluated, evaluate it, look again."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from eval.measure import Checkpoint
from eval.service.claims import MOST_ATTEMPTS, Claim, ClaimMonitor, EvaluationOutcome, claim
from eval.service.index import Index
from eval.service.snapshot import IndexedRun
from eval.service.worker import EvaluationSettings, EvaluationWorker, JudgesNotReady, WorkerDied, name_checkpoint
from infra.errors import UserError
from infra.log import get_logger

log = get_logger("service")


@dataclass(frozen=True)
class ClaimedCheckpoint:
    """A checkpoint that this service has claimed. `deaths`: claims of it that ended without a word."""

    checkpoint: Checkpoint
    claim: Claim
    deaths: int


@dataclass(frozen=True)
class WorkingCheckpoint:
    run: str
    step: int


@dataclass(frozen=True)
class EvaluationStatus:
    """`working` are checkpoints that this service evaluates (since `since`), `elsewhere` counts those that others have
    claimed, `waiting` those that nobody has. `problem` says what keeps the service from its work, "" when nothing does.
    """

    evaluates: bool
    checkpoints: int
    working: list[WorkingCheckpoint]
    since: float
    elsewhere: int
    waiting: int
    failed: int
    problem: str
    looked: float


class Evaluator(Protocol):
    """Who does the work: an `EvaluationWorker`. Returns reasons of the failed, raises WorkerDied or JudgesNotReady."""

    def evaluate(self, checkpoints: Sequence[Checkpoint], keep_alive: Callable[[], None], /) -> dict[str, str]: ...

    def stop(self) -> None: ...


class Watcher:
    """Runs in a thread of its own. `settings` None only watches. `retry`: failed checkpoints get one more attempt."""

    def __init__(
        self, index: Index, settings: EvaluationSettings | None, *, every: float = 10.0, retry: bool = False,
        worker: Evaluator | None = None,
    ) -> None:  # fmt: skip
        self.index, self.settings, self.every = index, settings, every
        self.working: tuple[Checkpoint, ...] = ()
        self.since = 0.0
        self.problem = ""
        self.broken = ""
        self.together = max(1, settings.options.workers) if settings is not None else 1
        self.looked = 0.0
        self._look_again = 0.0
        self.waiting = 0
        self._retry = retry
        self._tried: set[tuple[str, int]] = set()
        self._watch = ClaimMonitor()
        self._worker: Evaluator | None = worker or (EvaluationWorker(settings) if settings is not None else None)
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
            busy = False
            with self._note_problems():
                busy = self.step()
            if not busy:
                self._stopping.wait(self.every)

    @contextlib.contextmanager
    def _note_problems(self) -> Iterator[None]:
        """Inside the block errors are written to the status line and the log, and not raised: the store may come
        back."""
        try:
            yield
            self.problem = ""
        except (UserError, OSError) as error:
            if str(error) != self.problem:
                log.warning("%s", error)
            self.problem = str(error)
        except Exception as error:  # a mistake of ours must not end the watching unseen
            log.exception("the watcher failed and goes on")
            self.problem = f"internal error: {type(error).__name__}: {error}"

    def step(self) -> bool:
        """One look, and one batch of evaluations where there is one to do (True)."""
        self._look()
        if self.settings is None or self.broken:
            return False
        waiting = self._list_waiting()
        batch: list[ClaimedCheckpoint] = []
        for run, step, outcome in waiting:
            if len(batch) == self.together or self._stopping.is_set():
                break
            won = claim(run.run.uri, self.settings.hash, step, after=outcome.attempt)
            if won is not None:
                checkpoint = Checkpoint(run.name, run.run.uri, step, run.weights[step])
                batch.append(ClaimedCheckpoint(checkpoint, won, outcome.deaths + (outcome.state == "running")))
        self.waiting = len(waiting) - len(batch)
        return bool(batch) and self._evaluate(batch)

    def _look(self) -> None:
        self._look_again = time.monotonic() + self.every
        self.index.refresh()
        self.looked = time.time()

    def _list_waiting(self) -> list[tuple[IndexedRun, int, EvaluationOutcome]]:
        found = [
            (run, step, outcome) for run in self.index.snapshot.runs for step, outcome in self._list_open(run).items()
        ]
        # The last checkpoint of every run comes before the last but one of any: a ladder shows its shape early.
        found.sort(key=lambda open_: sum(step > open_[1] for step in open_[0].weights))
        return found

    def _list_open(self, run: IndexedRun) -> dict[int, EvaluationOutcome]:
        """The checkpoints of a run that nobody has evaluated or is evaluating, the newest first."""
        assert self.settings is not None
        known = run.read_outcomes(self.settings.hash)
        steps = sorted(run.weights, reverse=True)
        if self.settings.options.checkpoints == "last":
            steps = steps[:1]
        found = {}
        for step in steps:
            outcome = known.get(step, EvaluationOutcome())
            if self._is_open(run, step, outcome):
                found[step] = outcome
        return found

    def _is_open(self, run: IndexedRun, step: int, outcome: EvaluationOutcome) -> bool:
        assert self.settings is not None
        if outcome.state == "failed":
            return self._retry and (run.name, step) not in self._tried
        if outcome.state == "running":
            return self._watch.is_abandoned(run.run.uri, self.settings.hash, step, outcome.attempt)
        return outcome.state == "new"

    def _evaluate(self, batch: Sequence[ClaimedCheckpoint]) -> bool:
        """Every claim ends here: done, failed with its reason, or given back. False: better wait before the next."""
        assert self._worker is not None
        self._tried.update((claimed.checkpoint.run, claimed.checkpoint.step) for claimed in batch)
        for claimed in batch:
            if claimed.deaths >= MOST_ATTEMPTS:
                reason = f"{claimed.deaths} evaluations of it died without a word (often a lack of memory)"
                claimed.claim.end("failed", reason=reason)
        batch = [claimed for claimed in batch if claimed.deaths < MOST_ATTEMPTS]
        if not batch:
            return True
        self.working, self.since, began = tuple(claimed.checkpoint for claimed in batch), time.time(), time.monotonic()
        log.info("evaluating %s", ", ".join(map(name_checkpoint, self.working)))

        def keep_alive() -> None:
            with contextlib.suppress(UserError, OSError):  # the work goes on while the store does not answer
                for claimed in batch:
                    claimed.claim.beat()
            if time.monotonic() >= self._look_again:  # pages follow runs that train meanwhile
                with self._note_problems():
                    self._look()
                    self.waiting = len(self._list_waiting())

        try:
            reasons = self._worker.evaluate(self.working, keep_alive)
            for claimed in batch:
                reason = reasons.get(name_checkpoint(claimed.checkpoint), "")
                claimed.claim.end("failed" if reason else "done", reason=reason, seconds=time.monotonic() - began)
        except JudgesNotReady as error:
            self.broken = f"nothing is evaluated: {error}; repair that and start the service again"
            log.error("%s", self.broken)
            _give_back(batch, self.broken)
        except WorkerDied as error:
            if self._stopping.is_set() or error.stopped:
                _give_back(batch, "the service was stopped")
                return False
            if len(batch) > 1:  # one of them; alone it will be known which
                self.together = 1
                _give_back(batch, str(error))
            else:
                log.error("%s not evaluated: %s", name_checkpoint(batch[0].checkpoint), error)
                batch[0].claim.end("failed", reason=str(error), seconds=time.monotonic() - began)
        finally:
            self.working = ()
        return True

    def describe(self) -> EvaluationStatus:
        """The state of the evaluation, for the status line of the pages."""
        runs, working = self.index.snapshot.runs, self.working
        settings = self.settings.hash if self.settings is not None else ""
        states = [(run.name, step, state) for run in runs for step, state in run.list_states(settings).items()]
        running = {(run, step) for run, step, state in states if state == "running"}
        return EvaluationStatus(
            evaluates=self.settings is not None,
            checkpoints=sum(len(run.weights) for run in runs),
            working=[WorkingCheckpoint(checkpoint.run, checkpoint.step) for checkpoint in working],
            since=self.since,
            elsewhere=len(running - {(checkpoint.run, checkpoint.step) for checkpoint in working}),
            waiting=self.waiting,
            failed=sum(state == "failed" for _, _, state in states),
            problem=self.problem or self.broken,
            looked=self.looked,
        )


def _give_back(batch: Sequence[ClaimedCheckpoint], reason: str) -> None:
    for claimed in batch:
        claimed.claim.end("released", reason=reason)
