"""Who evaluates which checkpoint: claims and outcomes as objects in the store, so that no two services do one twice.

RUN/evaluations/<settings>/step_XXXXXXX/0001.claim.json is put only if absent; its owner rewrites 0001.beat.json while
it works and ends with 0001.done.json, 0001.failed.json, or 0001.released.json where the service was stopped. A claim
whose beat stands still is taken over as number 2.
"""

import json
import os
import re
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from infra import storage
from infra.codec import from_json, to_json
from infra.errors import MissingError, UserError
from infra.results import format_now

EvaluationState = Literal["new", "running", "done", "failed"]
_FILE = re.compile(r"evaluations/(?P<settings>[^/]+)/step_(?P<step>\d+)/(?P<attempt>\d+)\.(?P<kind>\w+)\.json$")
BEAT_EVERY = 15.0  # seconds
STANDS_STILL = 90.0
MOST_ATTEMPTS = 3


@dataclass(frozen=True)
class ClaimOwner:
    """A process, such that another on the same machine can see whether it still lives."""

    host: str
    boot: str
    pid: int
    started: str

    @staticmethod
    def find_own() -> "ClaimOwner":
        return ClaimOwner(socket.gethostname(), _identify_boot(), os.getpid(), _find_process_start(os.getpid()))

    @property
    def surely_gone(self) -> bool:
        """True only where that can be known: same machine, and no such process (or another one of that number)."""
        here = (self.host, self.boot) == (socket.gethostname(), _identify_boot())
        return here and _find_process_start(self.pid) != self.started


@dataclass(frozen=True)
class ClaimRecord:
    """N.claim.json."""

    owner: ClaimOwner
    at: str = ""


@dataclass(frozen=True)
class ClaimEnd:
    """N.done.json, N.failed.json or N.released.json."""

    reason: str = ""
    seconds: float = 0.0
    at: str = ""


@dataclass(frozen=True)
class EvaluationOutcome:
    """What is known of one checkpoint's evaluation under one setting, from the names of its files alone."""

    state: EvaluationState = "new"
    attempt: int = 0
    deaths: int = 0  # claims before the last one that ended without a word


def read_outcomes(files: Iterable[str], settings: str) -> dict[int, EvaluationOutcome]:
    """Step -> outcome. `files`: paths relative to the run."""
    kinds: dict[int, dict[int, set[str]]] = {}
    for path in files:
        match = _FILE.match(path)
        if match and match["settings"] == settings:
            kinds.setdefault(int(match["step"]), {}).setdefault(int(match["attempt"]), set()).add(match["kind"])
    return {step: _conclude(attempts) for step, attempts in kinds.items()}


def _conclude(attempts: dict[int, set[str]]) -> EvaluationOutcome:
    last = max(attempts)
    deaths = sum(1 for n, kinds in attempts.items() if n < last and not kinds & {"done", "failed", "released"})
    if any("done" in kinds for kinds in attempts.values()):
        return EvaluationOutcome("done", last, deaths)
    state: EvaluationState = (
        "failed" if "failed" in attempts[last] else "new" if "released" in attempts[last] else "running"
    )
    return EvaluationOutcome(state, last, deaths)


@dataclass
class Claim:
    """The right to evaluate a checkpoint. `beat` says that its owner lives."""

    folder: str
    attempt: int
    _beats: int = 0
    _last: float = field(default_factory=time.monotonic)

    def beat(self) -> None:
        """Cheap to call often: writes every BEAT_EVERY seconds."""
        if time.monotonic() - self._last >= BEAT_EVERY:
            self._beats += 1
            storage.write_bytes(_locate(self.folder, self.attempt, "beat"), _encode({"beat": self._beats}))
            self._last = time.monotonic()

    def end(self, state: Literal["done", "failed", "released"], *, reason: str = "", seconds: float = 0.0) -> None:
        end = ClaimEnd(reason, round(seconds, 1), format_now())
        storage.write_bytes(_locate(self.folder, self.attempt, state), _encode(end))


def claim(run_uri: str, settings: str, step: int, *, after: int = 0) -> Claim | None:
    """The next attempt after number `after`, or None where somebody else was first."""
    folder = storage.join(run_uri, "evaluations", settings, f"step_{step:07d}")
    record = ClaimRecord(ClaimOwner.find_own(), format_now())
    if storage.write_bytes_if_absent(_locate(folder, after + 1, "claim"), _encode(record)):
        return Claim(folder, after + 1)
    return None


class ClaimMonitor:
    """Tells which running claims are abandoned: their owner is gone, or their beat stood still under our own clock."""

    def __init__(self) -> None:
        self._last_beats: dict[str, tuple[bytes, float]] = {}

    def is_abandoned(self, run_uri: str, settings: str, step: int, attempt: int) -> bool:
        folder = storage.join(run_uri, "evaluations", settings, f"step_{step:07d}")
        if _is_surely_gone(_read(_locate(folder, attempt, "claim"))):
            return True
        beat, now = _read(_locate(folder, attempt, "beat")), time.monotonic()
        before = self._last_beats.get(_locate(folder, attempt, "beat"))
        if before is None or before[0] != beat:
            self._last_beats[_locate(folder, attempt, "beat")] = (beat, now)
            return False
        return now - before[1] > STANDS_STILL


def read_reason(run_uri: str, settings: str, step: int, attempt: int) -> tuple[str, str]:
    """(reason, time) of a failed attempt."""
    folder = storage.join(run_uri, "evaluations", settings, f"step_{step:07d}")
    try:
        end = from_json(ClaimEnd, _read(_locate(folder, attempt, "failed")), where="the reason")
        return end.reason, end.at
    except UserError:
        return "failed, and its reason cannot be read", ""


def _locate(folder: str, attempt: int, kind: str) -> str:
    return storage.join(folder, f"{attempt:04d}.{kind}.json")


def _read(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except MissingError:
        return b""


def _encode(record: object) -> bytes:
    return json.dumps(to_json(record)).encode()


def _is_surely_gone(claim_file: bytes) -> bool:
    """Of a claim that cannot be read nothing is sure."""
    try:
        return from_json(ClaimRecord, claim_file, where="the claim").owner.surely_gone
    except UserError:
        return False


def _identify_boot() -> str:
    """Changes with every start of the machine and differs between containers, whose process numbers are their own."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _find_process_start(pid: int) -> str:
    """When the process of that number began, or "" where there is none: numbers are used again."""
    import psutil

    try:
        return f"{psutil.Process(pid).create_time():.2f}"
    except psutil.Error:
        return ""
