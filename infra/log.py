"""Rank-aware logging and progress. Rank 0 talks, other ranks only warn; all on stderr, so stdout stays data."""

import contextlib
import logging
import os
import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm


def get_rank() -> int:
    """This process' rank as the launchers (deepspeed, torchrun) state it; 0 outside of them."""
    value = os.environ.get("RANK", "0")
    return int(value) if value.isdecimal() else 0


class _CurrentStderr(logging.Handler):
    """Writes to whatever sys.stderr is at that moment, above a progress bar if one is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        if get_rank() and record.levelno < logging.WARNING:
            return
        with contextlib.suppress(ValueError, OSError):  # closed at shutdown; a pipe whose reader (`| tee`) is gone
            tqdm.write(self.format(record), file=sys.stderr)


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        prefix = f"[rank {get_rank()}] " if get_rank() else ""
        name = record.name.removeprefix("beeline.")
        line = f"{self.formatTime(record, '%H:%M:%S')} {prefix}{name}: {level}{record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def get_logger(name: str) -> logging.Logger:
    """Logger `beeline.<name>`, ready to use; BEELINE_LOG=debug shows more."""
    root = logging.getLogger("beeline")
    if not root.handlers:
        handler = _CurrentStderr()
        handler.setFormatter(_Line())
        root.addHandler(handler)
        root.setLevel(os.environ.get("BEELINE_LOG", "info").upper())
        root.propagate = False
    return logging.getLogger(f"beeline.{name}")


def format_duration(seconds: float) -> str:
    """A duration as people read it: 45s, 3m07s, 2h05m."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded}s"
    if rounded < 3600:
        return f"{rounded // 60}m{rounded % 60:02d}s"
    return f"{rounded // 3600}h{rounded % 3600 // 60:02d}m"


class Progress:
    """A bar on a terminal, a plain line every `every_s` seconds otherwise; with rate, time left and extra fields.

    with Progress(20_000, "images", desc="encode") as progress:
        progress.update(256, ok=255, corrupt=1)
    """

    def __init__(
        self,
        total: int | None,
        unit: str,
        *,
        desc: str = "",
        initial: int = 0,
        every_s: float = 10.0,
        stream: TextIO | None = None,
    ) -> None:
        self.total, self.unit, self.desc = total, unit, desc
        self.initial, self.done, self.every_s = initial, initial, every_s
        self.fields: dict[str, object] = {}
        self._stream = stream or sys.stderr
        self._start = self._last = time.monotonic()
        self._printed, self._closed = initial - 1, False
        self._silent = get_rank() != 0
        self._bar: tqdm | None = None
        if not self._silent and self._stream.isatty():
            self._bar = tqdm(
                total=total, unit=f" {unit}", desc=desc or None, initial=initial, file=self._stream, dynamic_ncols=True
            )

    def update(self, count: int = 1, **fields: object) -> None:
        """Count `count` more; `fields` replace the extra figures shown beside the rate."""
        self.done += count
        self.fields.update(fields)
        if self._silent:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(self._format_fields(), refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._last >= self.every_s:
            self._say()

    def close(self) -> None:
        """Say where it ended. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._bar is not None:
            self._bar.close()
        elif not self._silent and self.done != self._printed:
            self._say()

    def format_line(self) -> str:
        """The plain line: `encode: 1,200/20,000 images (6%), 75.1 images/s, 4m10s left, corrupt=1`."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = (self.done - self.initial) / elapsed
        parts = [f"{self.done:,} {self.unit}"]
        if self.total:
            parts = [f"{self.done:,}/{self.total:,} {self.unit} ({100 * self.done / self.total:.0f}%)"]
        if rate > 0:
            parts.append(f"{rate:,.1f} {self.unit}/s")
            left = (self.total or 0) - self.done
            parts.append(f"{format_duration(left / rate)} left" if left > 0 else f"{format_duration(elapsed)} taken")
        if self.fields:
            parts.append(self._format_fields())
        return (f"{self.desc}: " if self.desc else "") + ", ".join(parts)

    def _format_fields(self) -> str:
        return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.fields.items())

    def _say(self) -> None:
        self._last, self._printed = time.monotonic(), self.done
        print(self.format_line(), file=self._stream, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
