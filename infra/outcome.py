"""What came of a job's ranks, in files that whatever started them can read.

Launchers lose exit codes: srun reports the highest one, so that the 137 of a killed rank hides the 76 of all others,
and torchrun makes 1 of every code. So each rank leaves a file named after its exit code in the folder that the
environment names, and rank 0 writes there the step of each new checkpoint. All ranks of a job must reach the folder.
"""

import contextlib
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

FOLDER = "BEELINE_OUTCOME"  # the environment variable that names the folder; without it nothing is written
SAVED = "saved"  # the file with the step of the newest checkpoint
MISTAKE = 2  # exit code: a user's mistake, which another try would repeat
UNAVAILABLE = 69  # exit code: storage or a rank did not answer, another try may work (EX_UNAVAILABLE of sysexits.h)
PREEMPTED = 75  # exit code after SIGTERM or Ctrl-C: saved, the same command continues (EX_TEMPFAIL of sysexits.h)
LOST = 76  # exit code when another rank was lost: the same command continues from the last checkpoint
TERMINATED = 128 + 15  # exit code of a process that SIGTERM ended before it could react


def report_code(code: int) -> None:
    """This process ends with that exit code. Its rank stands in the file."""
    _write(str(code), os.environ.get("RANK", "0"))


def report_saved(step: int) -> None:
    """A whole checkpoint of that step is stored."""
    _write(SAVED, str(step))


@contextlib.contextmanager
def report_outcome() -> Iterator[None]:
    """However the block ends, its exit code is reported."""
    try:
        yield
    except SystemExit as error:
        code = error.code
        report_code(code if isinstance(code, int) else int(code is not None))
        raise
    except BaseException:
        report_code(1)
        raise
    report_code(0)


def read_codes(folder: str) -> set[int]:
    """The exit codes that ranks have reported."""
    with contextlib.suppress(FileNotFoundError):
        return {int(name) for name in os.listdir(folder) if name.isdecimal()}
    return set()


def judge(reported: Iterable[int], ended: Iterable[int], *, stopped: bool) -> int:
    """The exit code of a job whose ranks reported some codes and whose processes ended with some. `stopped`: it was
    asked to stop. A user's mistake counts first, then what continues: stopped ranks, lost ranks, no answer."""
    reported, ended = set(reported), list(ended)
    codes = reported.union(ended)
    if 0 in reported and not any(ended):
        codes -= {LOST, UNAVAILABLE}  # a launcher started the ranks again, and they finished
    for code in (MISTAKE, PREEMPTED, LOST):
        if code in codes:
            return code
    if stopped and TERMINATED in codes:
        return PREEMPTED  # before there was anything to save
    if UNAVAILABLE in codes:
        return UNAVAILABLE
    return next((code for code in ended if code), 0)


def _write(name: str, text: str) -> None:
    """Atomically: a reader sees no file or a whole one. A folder that is gone or full must not change the outcome."""
    if not os.environ.get(FOLDER):
        return
    path = Path(os.environ[FOLDER], name)
    part = path.with_name(f".{name}-{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        part.write_text(text + "\n")
        part.replace(path)
