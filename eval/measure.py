"""From a checkpoint to rows: draw each picture once, judge it, store rows, protocols and values per prompt.

Measurements that ask for the same words in the same way of drawing share the picture.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.drawing.generate import ImageRequest, Painter, Sampling
from eval.judging.judges import Judges
from eval.judging.metric import JudgedImage, PictureMetric, Prompt, Score, WeightsMetric
from eval.metrics.registry import build_picture_metric
from eval.protocol import hash_protocol, keep_protocol
from infra import storage
from infra.errors import UserError
from infra.log import Progress, get_logger
from infra.results import ResultRow, ResultStore
from infra.values import keep_values
from infra.version import code_version
from model.files.weights import read_meta

log = get_logger("eval")

_CHECKPOINT = re.compile(r"(?P<run>.*?)/?weights/step_(?P<step>\d+)/ema\.safetensors$")


@dataclass(frozen=True)
class Checkpoint:
    """Exported weights of a run at a step."""

    run: str
    run_uri: str
    step: int
    weights: str


@dataclass(frozen=True)
class Measurement:
    """One metric with its prompts and its way of drawing."""

    metric: str
    row: str
    """what its rows are called: the beginning of their slash path"""
    prompts: tuple[Prompt, ...]
    images_per_prompt: int
    sampling: Sampling
    protocol: Mapping[str, Any]
    headline_only: bool = False
    """store the metric's own row alone: neither rows of its parts nor values per prompt"""

    @property
    def hash(self) -> str:
        return hash_protocol(self.protocol)


class Subject:
    """A checkpoint that is measured: who draws with it, where its rows go, and what they say about their origin."""

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        self.weights, self._device = checkpoint.weights, device
        meta = read_meta(storage.localize(checkpoint.weights))
        for key in ("recipe_hash", "images_seen"):
            if key not in meta:
                raise UserError(f"{checkpoint.weights}: its metadata has no {key}; export it with the trainer")
        self.run, self.run_uri = checkpoint.run, checkpoint.run_uri
        self.recipe_hash, self.images_seen = str(meta["recipe_hash"]), int(meta["images_seen"])
        self.store = ResultStore(storage.join(checkpoint.run_uri, "results"))

    @functools.cached_property
    def painter(self) -> Painter:
        """Loaded when something must be drawn: an evaluation that is complete reads no weights."""
        return Painter(self.weights, device=self._device)

    def keep(self, name: str, metric: PictureMetric | WeightsMetric, scores: Iterable[Score], protocol: str) -> None:
        """Store the scores as rows `name/path`."""
        origin = {"run": self.run, "recipe_hash": self.recipe_hash, "images_seen": self.images_seen}
        better = metric.higher_is_better
        self.store.append(to_rows(name, scores, origin=origin, protocol=protocol, higher_is_better=better))

    def has(self, row: str, protocol: str) -> bool:
        """Is this row there, at this checkpoint and under this protocol?"""
        return self.store.has(self.recipe_hash, row, images_seen=self.images_seen, protocol_hash=protocol)

    def find_missing(self, measurements: Sequence[Measurement]) -> list[Measurement]:
        """The measurements that have no rows under their protocol at this checkpoint."""
        done = {
            (row.metric, row.protocol_hash)
            for row in self.store.rows(recipe_hash=self.recipe_hash)
            if row.images_seen == self.images_seen
        }
        return [m for m in measurements if not any(p == m.hash and f"{r}/".startswith(f"{m.row}/") for r, p in done)]


def find_checkpoints(runs: str, which: str = "all") -> list[Checkpoint]:
    """Every exported EMA of every run, by run and step."""
    found: dict[str, list[Checkpoint]] = {}
    root = runs.rstrip("/")
    for uri in storage.list_files(root, suffix="ema.safetensors"):
        match = _CHECKPOINT.match(uri[len(root) :].lstrip("/"))
        if match:
            run_uri = storage.join(root, match["run"]) if match["run"] else root
            name = match["run"] or root.rsplit("/", 1)[-1]
            found.setdefault(run_uri, []).append(Checkpoint(name, run_uri, int(match["step"]), uri))
    if not found:
        raise UserError(f"no checkpoints under {runs}: expected RUN/weights/step_*/ema.safetensors; train first")
    return [c for run in sorted(found) for c in _choose(sorted(found[run], key=lambda c: c.step), which)]


def _choose(checkpoints: list[Checkpoint], which: str) -> list[Checkpoint]:
    if which == "all":
        return checkpoints
    if which != "last" and not (which.isdecimal() and int(which) > 0):
        raise UserError(f"--checkpoints {which!r}: expected all, last or a number from 1 on")
    count = 1 if which == "last" else min(int(which), len(checkpoints))
    return [checkpoints[-1 - (len(checkpoints) * back) // count] for back in reversed(range(count))]


def measure_pictures(subject: Subject, measurements: Sequence[Measurement], judges: Judges) -> None:
    """All rows that the checkpoint lacks. Those of one way of drawing are stored before the next one begins."""
    missing = subject.find_missing(measurements)
    if not missing:
        log.info("%s at %s images: nothing to do", subject.run, f"{subject.images_seen:,}")
    for sampling in dict.fromkeys(measurement.sampling for measurement in missing):
        _measure_drawn_alike(subject, [m for m in missing if m.sampling == sampling], sampling, judges)


def measure_weights(subject: Subject, metric: WeightsMetric, data: str | None) -> None:
    """The trainer measures such metrics while training; here only where it did not."""
    row = f"{metric.name}/{metric.headline}"
    if subject.store.has(subject.recipe_hash, row, images_seen=subject.images_seen):
        if data is not None:
            log.info("%s has its %s already, so --data is not looked at", subject.run, metric.name)
        return
    if data is None:
        log.warning("%s has no %s at %s images: give --data URI", subject.run, metric.name, f"{subject.images_seen:,}")
        return
    scores, protocol, values = metric.measure(subject.painter, data)
    keep_values(subject.store.uri, protocol, subject.recipe_hash, subject.images_seen, values)
    subject.keep(metric.name, metric, scores, protocol)


def _measure_drawn_alike(
    subject: Subject, measurements: Sequence[Measurement], sampling: Sampling, judges: Judges
) -> None:
    metrics = {m.metric: build_picture_metric(m.metric, judges) for m in measurements}
    _draw_and_judge(subject, measurements, sampling, metrics)
    for measurement in measurements:
        keep_protocol(subject.store.uri, measurement.protocol)
        metric = metrics[measurement.metric]
        scores = metric.compute()
        if measurement.headline_only:
            scores = [score for score in scores if not score.path]
        else:
            values = metric.values_per_prompt()
            keep_values(subject.store.uri, measurement.hash, subject.recipe_hash, subject.images_seen, values)
        subject.keep(measurement.row, metric, scores, measurement.hash)
        for score in scores:
            if score.path.startswith("overall") or not score.path:
                log.info("%s %s: %.4f", subject.run, f"{measurement.row}/{score.path}".rstrip("/"), score.value)


def _draw_and_judge(
    subject: Subject,
    measurements: Sequence[Measurement],
    sampling: Sampling,
    metrics: Mapping[str, PictureMetric],
) -> None:
    """Draw every picture once and hand it to each metric that asked for it, a batch at a time."""
    wanted: dict[ImageRequest, list[tuple[str, Prompt, int]]] = {}
    for measurement in measurements:
        for index, prompt in enumerate(measurement.prompts):
            for number in range(measurement.images_per_prompt):
                request = ImageRequest(prompt.text, prompt.source, number)
                wanted.setdefault(request, []).append((measurement.metric, prompt, index))
    label = f"{subject.run} at {subject.images_seen:,}{' without T5' if sampling.without_t5 else ''}"
    with Progress(len(wanted), "images", desc=label) as progress:
        pictures: dict[ImageRequest, np.ndarray] = {}
        for request, image in subject.painter.paint(wanted, sampling):
            pictures[request] = image
            progress.update(1)
            if len(pictures) == sampling.batch:
                _judge(pictures, wanted, metrics)
        _judge(pictures, wanted, metrics)


def _judge(
    pictures: dict[ImageRequest, np.ndarray],
    wanted: Mapping[ImageRequest, list[tuple[str, Prompt, int]]],
    metrics: Mapping[str, PictureMetric],
) -> None:
    """Hand the pictures over and forget them."""
    for name, metric in metrics.items():
        images = [
            JudgedImage(prompt, index, image)
            for request, image in pictures.items()
            for asked, prompt, index in wanted[request]
            if asked == name
        ]
        if images:
            metric.update(images)
    pictures.clear()


def to_rows(
    name: str, scores: Iterable[Score], *, origin: Mapping[str, Any], protocol: str, higher_is_better: bool
) -> list[ResultRow]:
    """Rows `name/path` of the scores; a score's own direction stands before the metric's."""
    return [
        ResultRow(
            **origin,
            code_version=code_version(),
            metric=f"{name}/{score.path}".rstrip("/"),
            value=score.value,
            higher_is_better=higher_is_better if score.higher_is_better is None else score.higher_is_better,
            sample_count=score.sample_count,
            protocol_hash=protocol,
            low=score.low,
            high=score.high,
            details=json.dumps(dict(score.details)) if score.details else "",
        )
        for score in scores
    ]
