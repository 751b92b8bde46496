"""Does validation loss predict a score? Pearson and Spearman correlation across runs at equal images, and within runs.

The points of one curve move together, so the unit is the run, never the point. Intervals across runs use Fisher's z
transform (1921): a bootstrap of five runs is too narrow, because it draws the same few runs again and again. For
Spearman's coefficient the variance of z is 1 + r^2 / 2 over n - 3 (Bonett and Wright 2000), with a correction for
continuity of half the smallest step that the coefficient of n ranks can make.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.scaling.laws import Array

MIN_RUNS = 3  # two points give +1 or -1, whatever they are
MIN_RUNS_INTERVAL = 4  # Fisher's z has the variance 1 / (runs - 3)
Z = 1.959964  # 97.5 % point of the normal distribution: a two-sided interval of 95 %


@dataclass(frozen=True)
class Coefficient:
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Correlation:
    """`num_runs` counts the runs it is over; `reason` says why a coefficient or its interval is missing, else ""."""

    num_runs: int
    pearson: Coefficient | None = None
    spearman: Coefficient | None = None
    reason: str = ""


def find_equal_images(one: Mapping[str, Mapping[int, float]], two: Mapping[str, Mapping[int, float]]) -> int | None:
    """The images at which most runs have both numbers, the larger on a tie. Both arguments: run -> images -> value."""
    shared = [images for run in one.keys() & two.keys() for images in one[run].keys() & two[run].keys()]
    return max(set(shared), key=lambda images: (shared.count(images), images), default=None)


def correlate_across_runs(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Pearson and Spearman coefficient of one point per run; pairs with a value that is not finite are left out."""
    from scipy.stats import rankdata

    x_R, y_R = np.asarray(x, float), np.asarray(y, float)
    keep = np.isfinite(x_R) & np.isfinite(y_R)
    x_R, y_R = x_R[keep], y_R[keep]
    if len(x_R) < MIN_RUNS:
        return Correlation(
            len(x_R), reason=f"{_count_runs(len(x_R))} at equal images, and a coefficient needs {MIN_RUNS}"
        )
    if np.ptp(x_R) == 0 or np.ptp(y_R) == 0:
        return Correlation(len(x_R), reason="all runs have the same value, so there is nothing to correlate")
    pearson, spearman = _pearson(x_R, y_R), _pearson(rankdata(x_R), rankdata(y_R))
    if len(x_R) < MIN_RUNS_INTERVAL:
        reason = f"no interval: {_count_runs(len(x_R))}, and one needs {MIN_RUNS_INTERVAL}"
        return Correlation(len(x_R), Coefficient(pearson), Coefficient(spearman), reason)
    # Spearman's r = 1 - 6 sum(d^2) / (n (n^2 - 1)), and sum(d^2) changes by 2 at least: half of that step.
    half_step = 6 / (len(x_R) * (len(x_R) ** 2 - 1))
    return Correlation(
        len(x_R),
        _fisher(pearson, len(x_R), variance=1.0, step=0.0),
        _fisher(spearman, len(x_R), variance=1 + spearman**2 / 2, step=half_step),
    )


def correlate_within_runs(curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Correlation:
    """Mean over runs of each run's own Pearson coefficient along its checkpoints, with Student's interval over runs."""
    from scipy.stats import t

    enough = [(np.array(x, float), np.array(y, float)) for x, y in curves if len(x) >= MIN_RUNS]
    if not enough:
        return Correlation(0, reason=f"no run has {MIN_RUNS} checkpoints with both numbers")
    each = [_pearson(x, y) for x, y in enough if np.ptp(x) > 0 and np.ptp(y) > 0]
    if not each:
        return Correlation(0, reason="no run's values change from one checkpoint to another")
    value, count = float(np.mean(each)), len(each)
    if count < MIN_RUNS:
        reason = f"no interval: {_count_runs(count)}, and one needs {MIN_RUNS}"
        return Correlation(count, Coefficient(value), reason=reason)
    half = float(t.ppf(0.975, count - 1) * np.std(each, ddof=1) / math.sqrt(count))
    return Correlation(count, Coefficient(value, max(-1.0, value - half), min(1.0, value + half)))


def _fisher(value: float, count: int, *, variance: float, step: float) -> Coefficient:
    """tanh(atanh(r) +- 1.96 sqrt(variance / (n - 3))); `step` draws a coefficient of ranks away from +1 and -1."""
    inner = math.copysign(min(max(abs(value) - step, 0.0), 1 - 1e-12), value)
    half = Z * math.sqrt(variance / (count - 3))
    low, high = math.tanh(math.atanh(inner) - half), math.tanh(math.atanh(inner) + half)
    return Coefficient(value, min(low, value), max(high, value))


def _pearson(x_R: Array, y_R: Array) -> float:
    x_R, y_R = x_R - x_R.mean(), y_R - y_R.mean()
    return float(np.clip((x_R * y_R).sum() / math.sqrt((x_R**2).sum() * (y_R**2).sum()), -1, 1))


def _count_runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"
