"""Mistakes a user can make, and the one place that turns them into a line and an exit code."""

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """One line: what was found, what was expected, what to do. Never a traceback."""


class MissingError(UserError, FileNotFoundError):
    """The file, object or bucket is not there."""

    __str__ = ValueError.__str__


class UnavailableError(UserError, ConnectionError):
    """The storage did not answer; the same call may work later."""

    __str__ = ValueError.__str__


class UserErrors(UserError):
    """Several mistakes found at once; `run_cli` prints each on a line of its own."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = tuple(lines)
        super().__init__("; ".join(self.lines))


def nearest(name: str, known: Iterable[str]) -> str:
    """The tail of a refusal: " (did you mean 'world-d4'?)", or "" when nothing known is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def list_some(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def run_cli(main: Callable[[], None]) -> NoReturn:
    """Run `main` and exit: 0; 2 with one line on stderr for each mistake of the user; 130 on Ctrl-C."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        for line in error.lines if isinstance(error, UserErrors) else [str(error)]:
            _say(line)
        sys.exit(2)
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
