"""Named points at which a process sends itself a signal: before data, between data and manifest, after the manifest."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from infra import storage

POINTS = ("before data", "between data and manifest", "after manifest")


def is_of(stage: str, uri: str, *, manifest: bool) -> bool:
    """Is this the write of a stage's data or of its manifest?"""
    if stage == "pack":
        return uri.endswith(".json") and "/pack/" in uri if manifest else uri.endswith(".tar")
    return f"/columns/{stage}/" in uri and uri.endswith(".json" if manifest else ".parquet")


def struck(point: str, stage: str, count: int, mark: Path, signum: int) -> Callable[[], None]:
    """Gives a function that makes this process send itself a signal at the count-th passage of a point."""
    passed = Counter()

    def strike(at: str, uri: str, *, manifest: bool) -> None:
        if at == point and is_of(stage, uri, manifest=manifest):
            passed[at] += 1
            if passed[at] == count:
                with contextlib.suppress(FileExistsError), mark.open("x") as file:  # of several processes one is struck
                    file.write(uri)
                    file.flush()
                    os.kill(os.getpid(), signum)

    def install() -> None:
        put, put_if_absent = storage.write_bytes, storage.write_bytes_if_absent

        def write(uri: str, data: bytes) -> None:
            strike("before data", uri, manifest=False)
            put(uri, data)

        def write_if_absent(uri: str, data: bytes) -> bool:
            strike("between data and manifest", uri, manifest=True)
            first = put_if_absent(uri, data)
            strike("after manifest", uri, manifest=True)
            return first

        storage.write_bytes, storage.write_bytes_if_absent = write, write_if_absent

    return install
