"""The processes that start ranks. Each handles SIGTERM differently: ranks watch them, the ladder signals ranks itself.

`deepspeed` dies of it and leaves its second process and the ranks running; that second one and torchrun pass it on to
their ranks and kill those still there after 30 s.
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

PREEMPTED = 75  # exit code after SIGTERM or Ctrl-C: saved, the same command continues (EX_TEMPFAIL of sysexits.h)
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
    process's; None: unset."""
    folder = Path(sys.executable).parent
    ours = os.environ | {"PATH": os.pathsep.join([str(folder), os.environ.get("PATH", "")])}
    ours.setdefault("PYTHONPATH", str(Path(__file__).parent.parent))
    ours.setdefault("GLIBC_TUNABLES", HUGE_PAGES)
    changed = {name: value for name, value in {**ours, **environment}.items() if value is not None}
    return subprocess.Popen(
        [str(folder / command[0]), *command[1:]], env=changed, start_new_session=True, stdout=output,
        stderr=subprocess.STDOUT if output else None,
    )  # fmt: skip


def wait_for_end(process: subprocess.Popen[bytes]) -> int:
    """Exit code of a started training. A launcher that was killed itself leaves ranks behind, which save. Never blocks
    for long, as `ray.cancel` interrupts no blocking call."""
    while process.poll() is None or find_trainers(process.pid):
        time.sleep(0.2 if process.returncode is None else 0.5)
    return process.returncode


@contextlib.contextmanager
def on_stop(react: Callable[[], None]) -> Iterator[list[int]]:
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
    """What this process was started by and must not outlive. No shells: those end at a logout, under nohup too."""
    return [parent for parent in psutil.Process().parents() if is_launcher(parent)]


def launcher_has_ended(launchers: list[psutil.Process]) -> bool:
    """Was this rank started by a launcher that ended before the rank could find it among `launchers`?

    Only where nothing else explains it: ranks of torchrun and deepspeed have a Python program above them, and on one
    host deepspeed's second process has the first as its parent (elsewhere ssh or a scheduler starts it).
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
    """By its words; a trainer that starts other trainers counts."""
    words: set[str] = set()
    with contextlib.suppress(psutil.Error):
        words = {Path(word).name for word in process.cmdline()[:6]} if process is not None else words
    return bool(words & {*COMMANDS, RAY_WORKER} or ("trainer" in words and words & MANY_RUNS))


def has_ended(launchers: list[psutil.Process]) -> bool:
    """Has one of them ended? A process whose parent ends gets another at once, even if the dead one is never reaped."""
    return bool(launchers) and not set(launchers) <= set(psutil.Process().parents())


def find_trainers(session: int) -> list[psutil.Process]:
    """Launchers and ranks of a session that live, whatever became of those that started them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session and "trainer" in process.cmdline():
                found.append(process)
    return found


def ask_to_stop(session: int) -> None:
    """SIGTERM to the ranks alone, who then end their launchers with their own code; before there are any, to all."""
    processes = find_trainers(session)
    for process in [p for p in processes if not is_launcher(p)] or processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
