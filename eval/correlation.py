"""Does validation loss predict a score? Pearson and Spearman across runs at equal images, runs resampled.

Points of one curve move together, so a correlation over all points of all curves would claim far more than it knows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.scaling import Array

MIN_RUNS = 3  # below, a coefficient is +1 or -1 by construction
MIN_RUNS_INTERVAL = 5  # below, resampled runs are too often the same two or three
RESAMPLES = 2000


@dataclass(frozen=True)
class Coefficient:
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Correlation:
    """`reason` says why a coefficient or its interval is missing."""

    num_runs: int
    pearson: Coefficient | None = None
    spearman: Coefficient | None = None
    reason: str = ""


def equal_images(one: Mapping[str, Mapping[int, float]], two: Mapping[str, Mapping[int, float]]) -> int | None:
    """The images at which most runs have both numbers, the larger on a tie. Both arguments: run -> images -> value."""
    shared = [images for run in one.keys() & two.keys() for images in one[run].keys() & two[run].keys()]
    return max(set(shared), key=lambda images: (shared.count(images), images), default=None)


def across_runs(x: Sequence[float], y: Sequence[float], *, seed: int = 0) -> Correlation:
    """One point per run."""
    x_R, y_R = np.asarray(x, float), np.asarray(y, float)
    keep = np.isfinite(x_R) & np.isfinite(y_R)
    x_R, y_R = x_R[keep], y_R[keep]
    if len(x_R) < MIN_RUNS:
        return Correlation(len(x_R), reason=f"{_runs(len(x_R))} at equal images, and a coefficient needs {MIN_RUNS}")
    if np.ptp(x_R) == 0 or np.ptp(y_R) == 0:
        return Correlation(len(x_R), reason="all runs have the same value, so there is nothing to correlate")
    pearson, spearman = _pearson(x_R[None], y_R[None])[0], _pearson(_ranks(x_R[None]), _ranks(y_R[None]))[0]
    if len(x_R) < MIN_RUNS_INTERVAL:
        reason = f"no interval: {_runs(len(x_R))}, and resampling runs needs {MIN_RUNS_INTERVAL}"
        return Correlation(len(x_R), Coefficient(pearson), Coefficient(spearman), reason)
    drawn = _resample(x_R, y_R, seed)
    return Correlation(
        len(x_R),
        _interval(pearson, _pearson(x_R[drawn], y_R[drawn])),
        _interval(spearman, _pearson(_ranks(x_R[drawn]), _ranks(y_R[drawn]))),
    )


def within_runs(curves: Sequence[tuple[Sequence[float], Sequence[float]]], *, seed: int = 0) -> Correlation:
    """Mean over runs of each run's own Pearson coefficient along its checkpoints; the interval resamples runs."""
    each = [
        _pearson(np.array([x], float), np.array([y], float))[0]
        for x, y in curves
        if len(x) >= MIN_RUNS and np.ptp(x) > 0 and np.ptp(y) > 0
    ]
    if not each:
        return Correlation(0, reason=f"no run has {MIN_RUNS} checkpoints with both numbers")
    values = np.array(each)
    if len(values) < MIN_RUNS_INTERVAL:
        reason = f"no interval: {_runs(len(values))}, and resampling runs needs {MIN_RUNS_INTERVAL}"
        return Correlation(len(values), Coefficient(float(values.mean())), reason=reason)
    drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    return Correlation(len(values), _interval(float(values.mean()), values[drawn].mean(axis=1)))


def _resample(x_R: Array, y_R: Array, seed: int) -> np.ndarray:
    """Draws of runs with replacement in which both sides still vary (three different runs at least)."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(x_R), size=(4 * RESAMPLES, len(x_R)))
    varied = (np.ptp(x_R[drawn], axis=1) > 0) & (np.ptp(y_R[drawn], axis=1) > 0)
    different = (np.diff(np.sort(drawn, axis=1), axis=1) > 0).sum(axis=1) >= 2
    return drawn[varied & different][:RESAMPLES]


def _pearson(x_BR: Array, y_BR: Array) -> list[float]:
    x_BR = x_BR - x_BR.mean(axis=1, keepdims=True)
    y_BR = y_BR - y_BR.mean(axis=1, keepdims=True)
    scale = np.sqrt((x_BR**2).sum(axis=1) * (y_BR**2).sum(axis=1))
    return [float(v) for v in np.clip((x_BR * y_BR).sum(axis=1) / np.where(scale > 0, scale, np.inf), -1, 1)]


def _ranks(x_BR: Array) -> Array:
    """Ranks along the last axis, ties sharing their mean."""
    below = (x_BR[:, None, :] < x_BR[:, :, None]).sum(axis=2)
    equal = (x_BR[:, None, :] == x_BR[:, :, None]).sum(axis=2)
    return below + (equal - 1) / 2


def _interval(value: float, drawn: Sequence[float] | Array) -> Coefficient:
    low, high = np.quantile(np.asarray(drawn), [0.025, 0.975])
    return Coefficient(value, float(low), float(high))


def _runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"
