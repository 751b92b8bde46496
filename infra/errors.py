"""Mistakes a user can make, and the one place that turns them into a line and an exit code."""

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from infra.outcome import MISTAKE, UNAVAILABLE

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """One line: what was found, what was expected, what to do. Never a traceback."""


class MissingError(UserError, FileNotFoundError):
    """The file, object or bucket is not there."""

    __str__ = ValueError.__str__


class UnavailableError(UserError, ConnectionError):
    """Storage or another rank did not answer; the same call may work later."""

    __str__ = ValueError.__str__


class UserErrors(UserError):
    """Several mistakes found at once; `run_cli` prints each on a line of its own. `may_pass`: each of them is an
    UnavailableError."""

    def __init__(self, lines: Iterable[str], *, may_pass: bool = False) -> None:
        self.lines, self.may_pass = tuple(lines), may_pass
        super().__init__("; ".join(self.lines))


def nearest(name: str, known: Iterable[str]) -> str:
    """The tail of a refusal: " (did you mean 'world-d4'?)", or "" when nothing known is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def list_some(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def choose_code(error: UserError) -> int:
    """The exit code of a process that this error ends."""
    may_pass = error.may_pass if isinstance(error, UserErrors) else isinstance(error, UnavailableError)
    return UNAVAILABLE if may_pass else MISTAKE


def run_cli(main: Callable[[], None]) -> NoReturn:
    """Run `main` and exit: 0; 2 with one line on stderr for each mistake of the user; 69 with one line where something
    did not answer; 130 on Ctrl-C."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        for line in error.lines if isinstance(error, UserErrors) else [str(error)]:
            _say(line)
        sys.exit(choose_code(error))
    except KeyboardInterrupt:
        _say("interrupted; the same command continues where it stopped")
        sys.exit(130)
    except BrokenPipeError:
        # `... | head` closed our stdout: point it elsewhere so that the interpreter's last flush stays silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno in DISK_FULL:
            where = f" while writing {error.filename}" if error.filename else ""
            _say(f"disk full{where}: free some space or choose another place, then run the same command again")
        elif error.filename is not None and os.environ.get("BEELINE_LOG") != "debug":
            _say(f"{error.filename}: {error.strerror}; BEELINE_LOG=debug shows where")
        else:
            raise
        sys.exit(2)
    sys.exit(0)


def _say(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
