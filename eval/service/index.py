"""Keeps a snapshot of all runs under one URI up to date by reading only what changed."""

import hashlib
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from eval.report.runs import RunFolder, find_run_folders, natural_key, read_run
from eval.report.tables import compare_plan, measure_cost
from eval.service.snapshot import IndexedRun, MetricSeries, Snapshot
from infra import storage
from infra.log import get_logger
from infra.results import ResultRow, ResultStore

log = get_logger("service")
_WEIGHTS = re.compile(r"weights/step_(\d+)/ema\.safetensors$")
_GALLERY = re.compile(r"gallery/step_(\d+)\.png$")
OPEN_STORES = 16  # runs that are still being written keep their parsed rows; the others are read again when they change


class Index:
    """Keeps a Snapshot up to date. `refresh` belongs to one thread; `snapshot` may be read by any."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/") or uri
        self.snapshot = Snapshot(self.uri)
        self.reading: tuple[int, int] | None = None  # (runs read, runs to read) while a refresh reads
        self._signatures: dict[str, str] = {}
        self._runs: dict[str, IndexedRun] = {}
        self._stores: OrderedDict[str, ResultStore] = OrderedDict()
        self._notes: list[str] = []
        self._shared = ResultStore(storage.join(self.uri, "results"))
        self._refreshing = threading.Lock()

    def refresh(self) -> bool:
        """List the store once and read the runs whose files changed. True when the snapshot is a new one."""
        with self._refreshing:
            return self._refresh()

    def _refresh(self) -> bool:
        inside = [file.removeprefix(self.uri).lstrip("/") for file in storage.list_files(self.uri)]
        paths = [path for path in inside if "/checkpoints/" not in f"/{path}" and "/logs/" not in f"/{path}"]
        folders = {_escape_surrogates(name): found for name, found in find_run_folders(self.uri, paths).items()}
        signatures = {name: _hash_names(files) for name, (_, files) in folders.items()}
        changed = [name for name, signature in signatures.items() if signature != self._signatures.get(name)]
        gone = set(self._runs) - set(folders)
        shared = self._read_shared(inside)
        if not changed and not gone and shared == self.snapshot.shared and self.snapshot.generation:
            return False
        for done, name in enumerate(changed):
            self.reading = (done, len(changed))
            self._runs[name] = self._read(name, *folders[name], first=not self._signatures)
        self.reading, self._signatures = None, signatures
        for name in gone:
            del self._runs[name]
        runs = sorted(self._runs.values(), key=lambda r: (r.run.parameters or 0, r.run.depth or 0, natural_key(r.name)))
        notes = tuple(self._notes)
        self.snapshot = Snapshot(self.uri, self.snapshot.generation + 1, tuple(runs), shared, notes, time.time())
        return True

    def _read(self, name: str, uri: str, files: list[str], *, first: bool) -> IndexedRun:
        store = self._stores.pop(name, None) or ResultStore(storage.join(uri, "results"))
        with _collect_warnings("beeline.results") as skipped:
            run = read_run(name, uri, files, store=store)
        if not first:  # at the start every run is new, and most will never change again
            self._stores[name] = store
            while len(self._stores) > OPEN_STORES:
                self._stores.popitem(last=False)
        # A store that is kept has said so before and does not look at the object again.
        before = self._runs[name].skipped if name in self._runs else ()
        skipped += [line for line in before if line not in skipped and any(path in line for path in files)]
        return index_run(run, files, skipped)

    def _read_shared(self, inside: Iterable[str]) -> tuple[ResultRow, ...]:
        """Calibration and predictions, which belong to no run."""
        if not any(path.startswith("results/") for path in inside):
            return ()
        with _collect_warnings("beeline.results") as skipped:
            rows = tuple(self._shared.rows(latest=False))
        self._notes += skipped
        return rows


def index_run(run: RunFolder, files: Iterable[str], skipped: Iterable[str] = ()) -> IndexedRun:
    """Rows become arrays; everything that needs whole rows is worked out now."""
    files = list(files)
    grouped: dict[str, dict[str, list[ResultRow]]] = {}
    for row in run.rows:
        if row.value == row.value:
            grouped.setdefault(row.metric, {}).setdefault(row.protocol_hash, []).append(row)
    series = {metric: {p: _compose_series(rows) for p, rows in found.items()} for metric, found in grouped.items()}
    return IndexedRun(
        run=replace(run, rows=()),
        recipe_hash=run.recipe_hash,
        code_versions=tuple(sorted({row.code_version for row in run.rows})),
        images=run.images,
        last=max((row.created for row in run.rows), default=""),
        series=series,
        cost=measure_cost(run),
        planned=compare_plan(run),
        weights=_match_steps(files, _WEIGHTS, run.uri),
        gallery=_match_steps(files, _GALLERY, run.uri),
        evaluations=tuple(path for path in files if path.startswith("evaluations/")),
        skipped=tuple(skipped),
    )


def _compose_series(rows: list[ResultRow]) -> MetricSeries:
    """Ordered by images; of two rows at the same images (the run was started anew) the later one stands."""
    kept = {row.images_seen: row for row in rows}
    rows = [kept[images] for images in sorted(kept)]
    nan = float("nan")
    return MetricSeries(
        rows[0].protocol_hash,
        rows[0].higher_is_better,
        np.array([row.images_seen for row in rows], np.int64),
        np.array([row.value for row in rows], np.float64),
        np.array([nan if row.low is None else row.low for row in rows], np.float64),
        np.array([nan if row.high is None else row.high for row in rows], np.float64),
        np.array([row.sample_count for row in rows], np.int64),
    )


def _escape_surrogates(name: str) -> str:
    """A folder's name as text. Bytes that are none (lone surrogates) can be in no address: they become \\xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _hash_names(files: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(files).encode("utf-8", "surrogateescape")).hexdigest()


def _match_steps(files: Iterable[str], pattern: re.Pattern[str], uri: str) -> dict[int, str]:
    found = {int(m[1]): storage.join(uri, path) for path in files if (m := pattern.match(path))}
    return dict(sorted(found.items()))


@contextmanager
def _collect_warnings(name: str) -> Iterator[list[str]]:
    """What a library of ours warns about meanwhile (an unreadable result object), to be shown on a page too."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    listener, logger = Listener(level=logging.WARNING), logging.getLogger(name)
    logger.addHandler(listener)
    try:
        yield heard
    finally:
        logger.removeHandler(listener)
