"""Run by two real ranks (see test_trainer_faults.py): an exchange is over, and gloo's threads, which get a core only
where nothing else wants it, still hold its tensor when the process ends."""

import os
from pathlib import Path

from trainer.zero.group import settle, start


def starve() -> None:
    """Both ranks on one core, gloo's threads behind all others."""
    (core, *_) = os.sched_getaffinity(0)
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})
        if (thread / "comm").read_text().strip() == "pt_gloo_runloop":
            os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))


if __name__ == "__main__":
    group = start()
    group.sum([1.0])  # the threads are there
    starve()
    for _ in range(3):
        group.sum([1.0])
    settle(limit_s=120)  # what `leave` ends with; without this, most of such exits abort
