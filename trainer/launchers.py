"""The processes that start ranks. SIGTERM does something else to each: ranks watch them, the ladder goes past them.

`deepspeed` dies of it and leaves its second process and the ranks alone; that second one and torchrun tell their ranks
and kill what is still there after 30 s.
"""

import contextlib
import os
from pathlib import Path

import psutil

PREEMPTED = 75  # exit code after SIGTERM or Ctrl-C: saved, the same command continues (EX_TEMPFAIL of sysexits.h)
COMMANDS = {"deepspeed", "torchrun", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "torch.distributed.run"}
MANY_RUNS = {"ladder", "sweep", "verify-resume"}


def launchers_above() -> list[psutil.Process]:
    """What this process was started by and must not outlive. No shells: those end at a logout, under nohup too."""
    return [parent for parent in psutil.Process().parents() if is_launcher(parent)]


def is_launcher(process: psutil.Process | None) -> bool:
    """By its words; a trainer that starts other trainers counts."""
    words: set[str] = set()
    with contextlib.suppress(psutil.Error):
        words = {Path(word).name for word in process.cmdline()[:6]} if process is not None else words
    return bool(words & COMMANDS or ("trainer" in words and words & MANY_RUNS))


def gone(launchers: list[psutil.Process]) -> bool:
    """Has one of them ended? Whoever's parent ends gets another one at once, also where nobody reaps the dead."""
    return bool(launchers) and not set(launchers) <= set(psutil.Process().parents())


def trainers_of(session: int) -> list[psutil.Process]:
    """Launchers and ranks of a session that live, whatever became of those that started them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session and "trainer" in process.cmdline():
                found.append(process)
    return found


def ask_to_stop(session: int) -> None:
    """SIGTERM to the ranks alone, who then end their launchers with their own code; before there are any, to all."""
    processes = trainers_of(session)
    for process in [p for p in processes if not is_launcher(p)] or processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
