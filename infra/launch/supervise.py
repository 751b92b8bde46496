"""The first process of a container, or of a job on one node: it starts ranks, and stays until all of them are gone.

As PID 1 of a container it is all that Kubernetes signals. A launcher would not do there: the kernel ignores SIGTERM to
a PID 1 without a handler, as `deepspeed` is; anywhere else `deepspeed` dies of it before its ranks have saved, and the
container ends with its first process.
"""

import contextlib
import ctypes
import errno
import math
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence

import psutil

from infra import outcome
from infra.errors import UnavailableError, UserError
from infra.launch.job import MASTER_ADDR, MASTER_PORT, NODE_RANK, PORT, find_launcher

PATIENCE_S = 120.0  # the other ranks notice a lost one within a minute, unless they have not met yet
KILL_S = 30.0  # after SIGTERM to ranks that wait for a lost one
PR_SET_CHILD_SUBREAPER = 36  # of prctl(2): orphans below this process become its children


def supervise(command: Sequence[str], *, ranks: int | None = None, nodes: int = 1) -> int:
    """Start the command and wait until it and all ranks below it are gone; the job's exit code (`outcome.judge`).

    `ranks`: start it so many times, each with its RANK and the like; without, once: it may be a launcher. SIGTERM and
    Ctrl-C are passed on to whom they make save: the ranks, or torchrun, which would start ranks again that end.
    """
    came: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: came.append(number))
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault(outcome.FOLDER, folder)
        below = Supervised(command, list_environments(ranks, nodes) if ranks else [{}])
        passed = 0
        while not below.is_gone():
            if len(came) > passed:
                below.pass_on(came[passed])
                passed += 1
            elif not came:
                below.end_the_rest()
            time.sleep(0.1)
        reported = outcome.read_codes(os.environ[outcome.FOLDER])
    return outcome.judge(reported, below.list_codes(), stopped=bool(came))


def list_environments(ranks: int, nodes: int) -> list[dict[str, str]]:
    """What each rank of this node finds in its environment, by the names of torch.distributed and DeepSpeed."""
    first, port = int(os.environ.get(NODE_RANK, "0")) * ranks, os.environ.get(MASTER_PORT)
    if port is None and nodes == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
    meet = {MASTER_ADDR: os.environ.get(MASTER_ADDR, "127.0.0.1"), MASTER_PORT: port or str(PORT)}
    sizes = {"WORLD_SIZE": str(ranks * nodes), "LOCAL_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [{"RANK": str(first + local), "LOCAL_RANK": str(local), **sizes, **meet} for local in range(ranks)]


class Supervised:
    """Processes of one command, each in a session of its own, and all that they start."""

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        self._ranks = "RANK" in environments[0]
        self._launcher = find_launcher(command)
        self._means, self._deadline = [signal.SIGTERM, signal.SIGKILL], math.inf
        self._started: list[subprocess.Popen[bytes]] = []
        try:
            for more in environments:
                self._started += [subprocess.Popen(command, env={**os.environ, **more}, start_new_session=True)]
        except OSError as error:
            self._kill()
            why = f"cannot run {command[0]!r} ({error.strerror})"
            if isinstance(error, FileNotFoundError | PermissionError) or error.errno == errno.ENOEXEC:
                raise UserError(f"{why}: is it installed and on PATH?") from error
            raise UnavailableError(f"{why}: has this machine run out of memory or processes?") from error

    def is_gone(self) -> bool:
        """Have all ended? A launcher may leave ranks behind that still save."""
        self._reap()
        alive = any(process.returncode is None for process in self._started)
        return not alive and not (self._launcher and find_ranks())

    def list_codes(self) -> list[int]:
        """Exit codes as shells count them: 128 + the signal."""
        codes = [process.returncode or 0 for process in self._started]
        return [code if code >= 0 else 128 - code for code in codes]

    def pass_on(self, number: int) -> None:
        """Send a signal to those whom it makes save."""
        ranks = find_ranks() if self._launcher == "deepspeed" else []
        for process in ranks or [p for p in self._started if p.returncode is None] or find_ranks():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                os.kill(process.pid, number)

    def end_the_rest(self) -> None:
        """When a rank has failed and others still wait for it after a while, end them: SIGTERM, then SIGKILL."""
        failed = any(code not in (0, outcome.PREEMPTED) for code in self.list_codes())
        now = time.monotonic()
        if self._ranks and failed and self._deadline == math.inf:
            self._deadline = now + PATIENCE_S
        if now > self._deadline and self._means:
            self.pass_on(self._means.pop(0))
            self._deadline = now + KILL_S

    def _kill(self) -> None:
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _reap(self) -> None:
        """Take the exit codes of all that ended, orphans too. (`Popen.poll` would lose them to each other.)"""
        started = {process.pid: process for process in self._started}
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] in started:
                    started[found[0]].returncode = os.waitstatus_to_exitcode(found[1])


def find_ranks() -> list[psutil.Process]:
    """The ranks below this process: launchers have told them their RANK, and a rank has none above it."""
    all_below = psutil.Process().children(recursive=True)
    ranks = {process.pid for process in all_below if _has_rank(process)}
    found = []
    for process in all_below:
        with contextlib.suppress(psutil.Error):
            if process.pid in ranks and process.ppid() not in ranks and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _has_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "LOCAL_RANK" in process.environ()
    return False
