"""The data behind the pages: all runs under one URI as they were at one moment, in a compact form.

600,000 result rows as Python objects would take half a gigabyte. Here each series is five arrays.
"""

# Shapes: P points of one series, ordered by images seen.

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from eval.report.runs import RunFolder
from eval.report.series import MetricPoint, ScoreTask, find_main_loss, group_scores, pick_protocol
from eval.report.tables import PlannedQuantity, TrainingCost
from eval.service.claims import EvaluationOutcome, EvaluationState, read_outcomes
from infra.results import ResultRow

TRAINERS_ROWS = ("val_loss", "train_loss", "cost/")  # the trainer writes these: they do not show that a judge has run


@dataclass(frozen=True)
class MetricSeries:
    """One metric of one run under one protocol. Missing interval ends are nan."""

    protocol: str
    higher_is_better: bool
    images_P: NDArray[np.int64]
    value_P: NDArray[np.float64]
    low_P: NDArray[np.float64]
    high_P: NDArray[np.float64]
    count_P: NDArray[np.int64]

    def to_points(self) -> list[MetricPoint]:
        """All points with all their digits, as a report has them."""
        columns = zip(*(a.tolist() for a in (self.images_P, self.value_P, self.low_P, self.high_P, self.count_P)))
        return [MetricPoint(i, v, _blank_nan(low), _blank_nan(high), n) for i, v, low, high, n in columns]


@dataclass(frozen=True)
class IndexedRun:
    """A run without its rows: `run` has recipe, plan and sample files, `series` the numbers by metric and protocol."""

    run: RunFolder
    recipe_hash: str
    code_versions: tuple[str, ...]
    images: int
    last: str
    series: Mapping[str, Mapping[str, MetricSeries]]
    cost: TrainingCost
    planned: tuple[PlannedQuantity, ...]
    weights: Mapping[int, str]
    gallery: Mapping[int, str]
    evaluations: tuple[str, ...]
    skipped: tuple[str, ...]
    _outcomes: dict[str, dict[int, EvaluationOutcome]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.run.name

    def read_outcomes(self, settings: str) -> dict[int, EvaluationOutcome]:
        """Step -> how its evaluation under these settings stands; nothing where `settings` is empty."""
        if settings not in self._outcomes:
            self._outcomes[settings] = read_outcomes(self.evaluations, settings) if settings else {}
        return self._outcomes[settings]

    def list_states(self, settings: str) -> dict[int, EvaluationState]:
        """Step -> how its evaluation stands; where `settings` is empty, whether any service or `eval run` judged it."""
        if settings:
            return {step: outcome.state for step, outcome in self.read_outcomes(settings).items()}
        known = {path.split("/")[1] for path in self.evaluations}
        done = (step for one in known for step, state in self.list_states(one).items() if state == "done")
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
class MetricCurves:
    """One metric of all runs under one protocol; `left_out` names runs that only have another one."""

    metric: str
    protocol: str
    higher_is_better: bool
    by_run: Mapping[str, MetricSeries]
    left_out: Mapping[str, str]

    def find_point(self, run: str, images: int | None = None) -> MetricPoint | None:
        """The run's point at that many images, or its last, in six digits."""
        series = self.by_run.get(run)
        if series is None or not len(series.images_P):
            return None
        at = len(series.images_P) - 1 if images is None else int(np.searchsorted(series.images_P, images))
        if at >= len(series.images_P) or (images is not None and series.images_P[at] != images):
            return None
        value, low, high = (round_number(float(a[at])) for a in (series.value_P, series.low_P, series.high_P))
        return MetricPoint(int(series.images_P[at]), value, _blank_nan(low), _blank_nan(high), int(series.count_P[at]))


@dataclass(frozen=True)
class Snapshot:
    """All that was known at one moment. It never changes, so results computed from it can be cached."""

    uri: str
    generation: int = 0
    runs: tuple[IndexedRun, ...] = ()
    shared: tuple[ResultRow, ...] = ()
    notes: tuple[str, ...] = ()
    created: float = 0.0
    _curves: dict[str, MetricCurves | None] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def by_name(self) -> dict[str, IndexedRun]:
        return {run.name: run for run in self.runs}

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        return tuple(sorted({metric for run in self.runs for metric in run.series}))

    @cached_property
    def main_loss(self) -> str | None:
        """The validation loss that most runs have."""
        return find_main_loss(metric for run in self.runs for metric in run.series)

    @cached_property
    def families(self) -> dict[str, list[ScoreTask]]:
        """Benchmark -> its tasks."""
        return group_scores(self.metrics)

    def choose(self, names: Sequence[str] | None) -> tuple[IndexedRun, ...]:
        """The named runs, in the order of the pages (by size); all where none is named."""
        return tuple(run for run in self.runs if run.name in set(names)) if names else self.runs

    def select_curves(self, metric: str) -> MetricCurves | None:
        """The metric under the protocol that most runs have: numbers of other protocols never stand beside it."""
        if metric not in self._curves:
            self._curves[metric] = self._choose(metric)
        return self._curves[metric]

    def _choose(self, metric: str) -> MetricCurves | None:
        having = [(run.name, run.series[metric]) for run in self.runs if metric in run.series]
        if not having:
            return None
        kept = pick_protocol(
            [(run, p, len(s.images_P), int(s.count_P.max())) for run, found in having for p, s in found.items()]
        )
        by_run = {run: found[kept] for run, found in having if kept in found}
        left = {run: ", ".join(sorted(found)) for run, found in having if kept not in found}
        return MetricCurves(metric, kept, next(iter(by_run.values())).higher_is_better, by_run, left)


def round_number(value: float) -> float:
    """The value in six digits; no stored number is exact to more."""
    return float(f"{value:.6g}")


def round_numbers(values_P: NDArray[np.float64]) -> list[float]:
    return [round_number(value) for value in values_P.tolist()]


def _blank_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
