"""The processes that start ranks, and how SIGTERM reaches the ranks below them.

`deepspeed` dies of SIGTERM and leaves its second process and the ranks running. That second process and torchrun pass
the signal on to their ranks, and kill ranks that still run after 30 s. So ranks watch their launchers, and a ladder
signals the ranks itself.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

import psutil

from infra import outcome

COMMANDS = {"deepspeed", "torchrun", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "torch.distributed.run"}
TOLD = ("CROSS_SIZE", "TORCHELASTIC_RUN_ID")  # in the environment of deepspeed's ranks and of torchrun's
MANY_RUNS = {"ladder", "sweep", "verify-resume"}
RAY_WORKER = "ray::train_here"  # what Ray calls a process that works on trainer/ladders/workers.py's task
# glibc's malloc asks for huge pages. On CPUs every gather and gradient is fresh memory, and in pages of 4 KiB the
# kernel takes a quarter of a step's time (depth 15, two ranks: 27 CPU seconds a step, with huge pages 20).
HUGE_PAGES = "glibc.malloc.hugetlb=1"


def start_training(
    command: list[str], *, environment: Mapping[str, str | None] = {}, output: IO[str] | None = None
) -> subprocess.Popen[bytes]:
    """The command in a session of its own, by which `find_trainers` knows it. `environment`: what differs from this
    process's; None: unset. What comes of its ranks is no part of what comes of this process."""
    folder = Path(sys.executable).parent
    ours = os.environ | {"PATH": os.pathsep.join([str(folder), os.environ.get("PATH", "")])}
    ours.setdefault("PYTHONPATH", str(Path(__file__).parent.parent))
    ours.setdefault("GLIBC_TUNABLES", HUGE_PAGES)
    ours.pop(outcome.FOLDER, None)
    changed = {name: value for name, value in {**ours, **environment}.items() if value is not None}
    return subprocess.Popen(
        [str(folder / command[0]), *command[1:]], env=changed, start_new_session=True, stdout=output,
        stderr=subprocess.STDOUT if output else None,
    )  # fmt: skip


def wait_for_end(process: subprocess.Popen[bytes]) -> int:
    """Wait until the training and all its ranks have ended; its exit code. A launcher that is killed leaves ranks
    behind, which still save. Waits in short sleeps, because `ray.cancel` cannot interrupt a blocking call."""
    while process.poll() is None or find_trainers(process.pid):
        time.sleep(0.2 if process.returncode is None else 0.5)
    return process.returncode


@contextlib.contextmanager
def call_on_stop(react: Callable[[], None]) -> Iterator[list[int]]:
    """Inside the block SIGTERM and Ctrl-C call `react`; the list holds the signals that came."""
    came: list[int] = []

    def handle(number: int, frame: object) -> None:
        came.append(number)
        react()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def find_launchers() -> list[psutil.Process]:
    """The launchers above this process, which it must not outlive, nearest first. Shells do not count: a shell ends at
    a logout, also when its training runs under nohup."""
    return [parent for parent in psutil.Process().parents() if is_launcher(parent)]


def launcher_has_ended(launchers: list[psutil.Process]) -> bool:
    """Was this rank started by a launcher that ended before the rank could find it among `launchers`?

    True in two cases. The environment says that a launcher started this rank, but no Python program is above it. Or
    deepspeed's second process, on one host, has lost the first one, its parent (on several hosts ssh or a scheduler
    starts the second process).
    """
    if not launchers:
        above = psutil.Process().parents()
        return any(name in os.environ for name in TOLD) and not any(_runs_python(parent) for parent in above)
    with contextlib.suppress(psutil.Error, OSError):
        top, session = launchers[-1], os.getsid(launchers[-1].pid)
        second = "deepspeed.launcher.launch" in top.cmdline() and os.environ.get("CROSS_SIZE") == "1"
        parent = top.ppid()
        return second and top.pid != session and (parent == 1 or os.getsid(parent) != session)
    return False


def _runs_python(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error, IndexError):
        return Path(process.cmdline()[0]).name.startswith("python")
    return False


def is_launcher(process: psutil.Process | None) -> bool:
    """Does this process start ranks? Its command line decides; `supervise`, `ladder`, `sweep` and `verify-resume`
    count too."""
    words: set[str] = set()
    with contextlib.suppress(psutil.Error):
        words = {Path(word).name for word in process.cmdline()[:6]} if process is not None else words
    own = ("trainer" in words and words & MANY_RUNS) or {"infra", "supervise"} <= words
    return bool(words & {*COMMANDS, RAY_WORKER} or own)


def has_ended(launchers: list[psutil.Process]) -> bool:
    """Has one of them ended? A process whose parent ends gets another at once, even if the dead one is never reaped."""
    return bool(launchers) and not set(launchers) <= set(psutil.Process().parents())


def find_trainers(session: int) -> list[psutil.Process]:
    """Launchers and ranks of a session that are alive, also those whose parents have ended."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session and "trainer" in process.cmdline():
                found.append(process)
    return found


def ask_to_stop(session: int) -> None:
    """Send SIGTERM to the ranks of a session alone; launchers then exit with the ranks' code. Before there are ranks,
    send it to all processes."""
    processes = find_trainers(session)
    for process in [p for p in processes if not is_launcher(p)] or processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
