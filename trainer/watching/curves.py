"""TensorBoard's curves, over images. They are dispensable: a full disk must not end a run for them."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.log import get_logger

log = get_logger("train")


class CurveWriter:
    """Curves in FOLDER. What cannot be written is reported once and dropped; `flush` begins a new file where it can."""

    def __init__(self, folder: Path, images_seen: int) -> None:
        self._folder, self._silent = folder, False
        self._writer: Any = None
        with self._switch_off_on_failure():
            self._open(images_seen)

    def add_scalar(self, name: str, value: float, images_seen: int) -> None:
        if self._writer is not None:
            with self._switch_off_on_failure():
                self._writer.add_scalar(name, value, images_seen)

    def flush(self, images_seen: int) -> None:
        """Curves go to disk; those since the last flush are lost where that fails."""
        with self._switch_off_on_failure():
            if self._writer is None:
                self._open(images_seen)
            self._writer.flush()
            self._silent = False

    def close(self) -> None:
        if self._writer is not None:
            with self._switch_off_on_failure():
                self._writer.close()

    def _open(self, images_seen: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _quiet_writers()
        self._writer = SummaryWriter(str(self._folder), purge_step=images_seen, flush_secs=10)

    @contextlib.contextmanager
    def _switch_off_on_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            if not self._silent:
                log.warning("no curves for TensorBoard until the next save (%s); training goes on", error.strerror)
            self._silent = True


def _quiet_writers() -> None:
    """TensorBoard's writer thread keeps its exception for the next call and also raises it: once is enough."""
    hook = threading.excepthook
    if getattr(hook, "quiet_writers", False):
        return

    def quiet(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            hook(args)

    quiet.quiet_writers = True  # type: ignore[attr-defined]
    threading.excepthook = quiet
