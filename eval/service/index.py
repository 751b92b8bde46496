"""What the pages are made of: all runs under one URI in a compact form, refreshed by reading only what changed.

600,000 result rows as Python objects would be half a gigabyte; here each series is five arrays.
"""

# Shapes: P points of one series, ordered by images seen.

import hashlib
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.report.data import Run, natural_key, read_run, run_folders
from eval.report.series import pick_protocol
from eval.report.tables import cost_of, plan_against_reality
from eval.service.claims import Outcome, State, outcomes
from infra import storage
from infra.log import get_logger
from infra.results import ResultRow, ResultStore

log = get_logger("service")
_WEIGHTS = re.compile(r"weights/step_(\d+)/ema\.safetensors$")
_GALLERY = re.compile(r"gallery/step_(\d+)\.png$")
TRAINERS_ROWS = ("val_loss", "train_loss", "cost/")  # written while training: no sign of a judge
OPEN_STORES = 16  # runs that are still being written keep their parsed rows; the others are read again when they change


@dataclass(frozen=True)
class Series:
    """One metric of one run under one protocol. Missing interval ends are nan."""

    protocol: str
    higher_is_better: bool
    images_P: NDArray[np.int64]
    value_P: NDArray[np.float64]
    low_P: NDArray[np.float64]
    high_P: NDArray[np.float64]
    count_P: NDArray[np.int64]


@dataclass(frozen=True)
class IndexedRun:
    """A run without its rows: `run` has recipe, plan and sample files, `series` the numbers by metric and protocol."""

    run: Run
    recipe_hash: str
    code_versions: tuple[str, ...]
    images: int
    last: str
    series: Mapping[str, Mapping[str, Series]]
    cost: Mapping[str, Any]
    planned: tuple[Mapping[str, Any], ...]
    weights: Mapping[int, str]
    gallery: Mapping[int, str]
    evaluations: tuple[str, ...]
    skipped: tuple[str, ...]
    _outcomes: dict[str, dict[int, Outcome]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.run.name

    def outcomes(self, settings: str) -> dict[int, Outcome]:
        """Step -> how its evaluation under these settings stands; nothing where `settings` is empty."""
        if settings not in self._outcomes:
            self._outcomes[settings] = outcomes(self.evaluations, settings) if settings else {}
        return self._outcomes[settings]

    def states(self, settings: str) -> dict[int, State]:
        """Step -> how its evaluation stands; where `settings` is empty, whether any service or `eval run` judged it."""
        if settings:
            return {step: outcome.state for step, outcome in self.outcomes(settings).items()}
        known = {path.split("/")[1] for path in self.evaluations}
        done = (step for one in known for step, state in self.states(one).items() if state == "done")
        return dict.fromkeys((*done, *self._judged), "done")

    @cached_property
    def _judged(self) -> list[int]:
        """Steps of exported weights with rows that no trainer writes."""
        batch = self.run.recipe.get("global_batch")
        by_judges = [
            series.images_P
            for metric, by_protocol in self.series.items()
            if not metric.startswith(TRAINERS_ROWS)
            for series in by_protocol.values()
        ]
        if not by_judges or not isinstance(batch, int):
            return []
        images = set(np.unique(np.concatenate(by_judges)).tolist())
        return [step for step in self.weights if step * batch in images]


@dataclass(frozen=True)
class Curves:
    """One metric of all runs under one protocol; `left_out` names runs that only have another one."""

    metric: str
    protocol: str
    higher_is_better: bool
    by_run: Mapping[str, Series]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class Snapshot:
    """All that was known at one moment. Never changes, so what is derived from it can be kept."""

    uri: str
    generation: int = 0
    runs: tuple[IndexedRun, ...] = ()
    shared: tuple[ResultRow, ...] = ()
    notes: tuple[str, ...] = ()
    created: float = 0.0
    _curves: dict[str, Curves | None] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def by_name(self) -> dict[str, IndexedRun]:
        return {run.name: run for run in self.runs}

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        return tuple(sorted({metric for run in self.runs for metric in run.series}))

    def curves(self, metric: str) -> Curves | None:
        """The metric under the protocol that most runs have: numbers of other protocols never stand beside it."""
        if metric not in self._curves:
            self._curves[metric] = self._choose(metric)
        return self._curves[metric]

    def _choose(self, metric: str) -> Curves | None:
        having = [(run.name, run.series[metric]) for run in self.runs if metric in run.series]
        if not having:
            return None
        kept = pick_protocol(
            [(run, p, len(s.images_P), int(s.count_P.max())) for run, found in having for p, s in found.items()]
        )
        by_run = {run: found[kept] for run, found in having if kept in found}
        left = {run: ", ".join(sorted(found)) for run, found in having if kept not in found}
        return Curves(metric, kept, next(iter(by_run.values())).higher_is_better, by_run, left)


class Index:
    """Keeps a Snapshot up to date. `refresh` belongs to one thread; `snapshot` may be read by any."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/") or uri
        self.snapshot = Snapshot(self.uri)
        self.reading: tuple[int, int] | None = None  # (runs read, runs to read) while a refresh reads
        self._seen: dict[str, str] = {}
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
        told = [path for path in inside if "/checkpoints/" not in f"/{path}" and "/logs/" not in f"/{path}"]
        folders = {_printable(name): found for name, found in run_folders(self.uri, told).items()}
        signatures = {name: _signature(files) for name, (_, files) in folders.items()}
        changed = [name for name, signature in signatures.items() if signature != self._seen.get(name)]
        gone = set(self._runs) - set(folders)
        shared = self._read_shared(inside)
        if not changed and not gone and shared == self.snapshot.shared and self.snapshot.generation:
            return False
        for done, name in enumerate(changed):
            self.reading = (done, len(changed))
            self._runs[name] = self._read(name, *folders[name], first=not self._seen)
        self.reading, self._seen = None, signatures
        for name in gone:
            del self._runs[name]
        runs = sorted(self._runs.values(), key=lambda r: (r.run.parameters or 0, r.run.depth or 0, natural_key(r.name)))
        notes = tuple(self._notes)
        self.snapshot = Snapshot(self.uri, self.snapshot.generation + 1, tuple(runs), shared, notes, time.time())
        return True

    def _read(self, name: str, uri: str, files: list[str], *, first: bool) -> IndexedRun:
        store = self._stores.pop(name, None) or ResultStore(storage.join(uri, "results"))
        with _warnings("beeline.results") as skipped:
            run = read_run(name, uri, files, store=store)
        if not first:  # at the start every run is new, and most will never change again
            self._stores[name] = store
            while len(self._stores) > OPEN_STORES:
                self._stores.popitem(last=False)
        # A store that is kept has said so before and does not look at the object again.
        before = self._runs[name].skipped if name in self._runs else ()
        skipped += [said for said in before if said not in skipped and any(path in said for path in files)]
        return index_run(run, files, skipped)

    def _read_shared(self, inside: Iterable[str]) -> tuple[ResultRow, ...]:
        """Calibration and predictions, which belong to no run."""
        if not any(path.startswith("results/") for path in inside):
            return ()
        with _warnings("beeline.results") as skipped:
            rows = tuple(self._shared.rows(latest=False))
        self._notes += skipped
        return rows


def index_run(run: Run, files: Iterable[str], skipped: Iterable[str] = ()) -> IndexedRun:
    """Rows become arrays; everything that needs whole rows is worked out now."""
    files = list(files)
    grouped: dict[str, dict[str, list[ResultRow]]] = {}
    for row in run.rows:
        if row.value == row.value:
            grouped.setdefault(row.metric, {}).setdefault(row.protocol_hash, []).append(row)
    series = {metric: {p: _series(rows) for p, rows in found.items()} for metric, found in grouped.items()}
    return IndexedRun(
        run=replace(run, rows=()),
        recipe_hash=run.recipe_hash,
        code_versions=tuple(sorted({row.code_version for row in run.rows})),
        images=run.images,
        last=max((row.created for row in run.rows), default=""),
        series=series,
        cost=cost_of(run),
        planned=tuple(plan_against_reality(run)),
        weights=_steps(files, _WEIGHTS, run.uri),
        gallery=_steps(files, _GALLERY, run.uri),
        evaluations=tuple(path for path in files if path.startswith("evaluations/")),
        skipped=tuple(skipped),
    )


def _series(rows: list[ResultRow]) -> Series:
    """Ordered by images; of two rows at the same images (the run was started anew) the later one stands."""
    kept = {row.images_seen: row for row in rows}
    rows = [kept[images] for images in sorted(kept)]
    nan = float("nan")
    return Series(
        rows[0].protocol_hash,
        rows[0].higher_is_better,
        np.array([row.images_seen for row in rows], np.int64),
        np.array([row.value for row in rows], np.float64),
        np.array([nan if row.low is None else row.low for row in rows], np.float64),
        np.array([nan if row.high is None else row.high for row in rows], np.float64),
        np.array([row.sample_count for row in rows], np.int64),
    )


def _printable(name: str) -> str:
    """A folder's name as text. Bytes that are none (lone surrogates) can be in no address: they become \\xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _signature(files: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(files).encode("utf-8", "surrogateescape")).hexdigest()


def _steps(files: Iterable[str], pattern: re.Pattern[str], uri: str) -> dict[int, str]:
    found = {int(m[1]): storage.join(uri, path) for path in files if (m := pattern.match(path))}
    return dict(sorted(found.items()))


@contextmanager
def _warnings(name: str) -> Iterator[list[str]]:
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
