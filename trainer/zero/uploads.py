"""Run folders on S3: a save writes to a local disk, and a thread uploads its files while training continues.

Each rank uploads its own files and reports the outcome in the rendezvous store. When all files are there, rank 0
publishes the checkpoint (the manifest, then `latest`) and reports whether that worked. There is one upload at a time:
the loop asks `busy` first.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra import storage
from infra.errors import UserError
from infra.log import get_logger
from trainer.runfolder import name_rank
from trainer.zero.group import Group, open_rendezvous_store

log = get_logger("upload")
POLL_S = 0.2


class Uploads:
    """`place` is where a save writes: the run folder itself, or on S3 a local tree that mirrors it."""

    def __init__(self, group: Group, out: str, *, store: Any = None) -> None:
        self.group, self.out, self.remote = group, out, storage.is_remote(out)
        self.place = out
        self._store: Any = None
        self._thread: threading.Thread | None = None
        self._number, self._arrived = 0, True
        if self.remote:
            self.place = str(get_staging_folder(out, group.rank))
            self._clear()  # what a killed run left
            self._store = store or (open_rendezvous_store() if group.world_size > 1 else None)

    @property
    def busy(self) -> bool:
        """Is an upload running? Ranks may differ for a moment."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, first: list[Callable[[], None]], publish: Callable[[], None]) -> None:
        """Begin to upload all files in `place`. Rank 0 first runs the tasks in `first`, and runs `publish` when the
        files of all ranks are there. All ranks must call it; it returns at once."""
        assert not self.busy, "one upload at a time"
        self._number, self._arrived = self._number + 1, False
        files = sorted(path for path in Path(self.place).rglob("*") if path.is_file())
        work = self._number, files, first if self.group.rank == 0 else [], publish
        self._thread = threading.Thread(target=self._send, args=work, name="upload", daemon=True)
        self._thread.start()

    def wait(self) -> bool:
        """Wait until no upload runs. True if the last one succeeded; the answer is the same on all ranks."""
        if self._thread is not None:
            self._thread.join()
        return self._arrived

    def close(self) -> None:
        """Wait, and leave no file behind."""
        self.wait()
        if self.remote:
            self._clear()

    def _clear(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)

    def _send(
        self, number: int, files: list[Path], first: list[Callable[[], None]], publish: Callable[[], None]
    ) -> None:
        problem = ""
        try:
            for task in first:
                task()
            for path in files:
                storage.upload(path, storage.join(self.out, path.relative_to(self.place).as_posix()))
                path.unlink()
        except (UserError, OSError) as error:
            problem = str(error)
        except Exception as error:  # the other ranks must not wait for a word that never comes
            problem = f"{type(error).__name__}: {error}"
        if problem:
            log.warning("upload: %s", problem)
            for path in files:
                path.unlink(missing_ok=True)
        self._arrived = self._agree(number, problem, publish)

    def _agree(self, number: int, problem: str, publish: Callable[[], None]) -> bool:
        """Report how this rank's upload ended, wait for the reports of the others, publish (rank 0); True if the
        checkpoint is published."""
        own_key, verdict = f"beeline/upload/{number}/{self.group.rank}", f"beeline/upload/{number}/verdict"
        try:
            if self._store is not None:
                self._store.set(own_key, json.dumps(problem))
            if self.group.rank > 0:
                return not self._hear(verdict)
            problems = [problem] + [self._hear(f"beeline/upload/{number}/{r}") for r in range(1, self.group.world_size)]
            problem = next(filter(None, problems), "")
            if not problem:
                try:
                    publish()
                except (UserError, OSError) as error:
                    problem = str(error)
            if problem:
                log.warning("the checkpoint was not saved (%s); the last good one stands, training goes on", problem)
            if self._store is not None:
                self._store.set(verdict, json.dumps(problem))
        except RuntimeError:  # the store is gone, and the watch ends this rank
            return False
        return not problem

    def _hear(self, key: str) -> str:
        while not self._store.check([key]):
            time.sleep(POLL_S)
        return json.loads(self._store.get(key))


def get_staging_folder(out: str, rank: int) -> Path:
    """Where a rank keeps what is still to be uploaded."""
    return storage.cache_folder() / "staging" / storage.sha256_hex(out.encode())[:16] / name_rank(rank)
