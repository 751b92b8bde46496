"""The ranking of SD3's section 5.1: non-dominated sorting on (CLIP score, FID) under every control, averaged.

With several seeds each seed is a tournament of its own; how a variant's rank moves between seeds is the noise, and
inside the noise no order is drawn.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

# Average rank over the 24 controls of the paper's 61 variants (Table 1, column "all").
TABLE_1 = {
    "rf/lognorm(0.00,1.00)": 1.54, "rf/lognorm(1.00,0.60)": 2.08, "rf/lognorm(0.50,0.60)": 2.71, "rf/mode(1.29)": 2.75,
    "rf/lognorm(0.50,1.00)": 2.83, "eps/linear": 2.88, "rf/mode(1.75)": 3.33, "rf/cosmap": 4.13,
    "edm(0.00,0.60)": 5.63, "rf": 5.67, "v/linear": 6.83, "edm(0.60,1.20)": 9.00, "v/cos": 9.17, "edm/cos": 11.04,
    "edm/rf": 13.04, "edm(-1.20,1.20)": 15.58,
}  # fmt: skip


class StudyCell(NamedTuple):
    """What one run gave under one control (dataset, weights, sampler setting)."""

    variant: str
    seed: int
    control: tuple[str, str, str]
    clip: float
    fid: float


@dataclass(frozen=True)
class Ranked:
    """A variant's average rank: over all controls, and over those of a number of steps."""

    variant: str
    overall: float
    by_seed: Mapping[int, float]
    few_steps: float
    many_steps: float
    groups: tuple[int, ...] = ()
    """variants that share one are closer than the noise between seeds; one may stand between two groups, in both"""


@dataclass(frozen=True)
class Ranking:
    rows: Sequence[Ranked]
    seed_noise: float
    """standard deviation of one seed's average rank, pooled over variants; nan with a single seed"""
    least_difference: float
    """differences below this are noise (95 %, two-sided t); nan with a single seed"""
    seeds: Sequence[int]
    controls: int
    left_out: Mapping[str, str]


def number_fronts(clip: Sequence[float], fid: Sequence[float]) -> list[int]:
    """1 for the Pareto-optimal points (CLIP up, FID down), 2 for those of the rest, and so on. Equal points share."""
    points = list(zip(clip, fid, strict=True))
    if not all(math.isfinite(value) for point in points for value in point):
        raise ValueError("a CLIP score or FID that is not finite cannot be ranked")
    numbers, left, number = [0] * len(points), set(range(len(points))), 0
    while left:
        number += 1
        front = {i for i in left if not any(_dominates(points[j], points[i]) for j in left)}
        for i in front:
            numbers[i] = number
        left -= front
    return numbers


def _dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] >= b[0] and a[1] <= b[1] and a != b


def rank(cells: Sequence[StudyCell]) -> Ranking:
    """Variants that lack a cell which another one has are left out, with the reason: a tournament needs all to play."""
    seeds = sorted({cell.seed for cell in cells})
    controls = sorted({cell.control for cell in cells})
    table = {(c.variant, c.seed, c.control): c for c in cells if math.isfinite(c.clip) and math.isfinite(c.fid)}
    variants, left_out = [], {}
    for variant in sorted({cell.variant for cell in cells}):
        missing = [(s, c) for s in seeds for c in controls if (variant, s, c) not in table]
        if missing:
            seed, control = missing[0]
            left_out[variant] = (
                f"{_count_cells(len(missing))} missing or not finite, e.g. seed {seed}, {'/'.join(control)}"
            )
        else:
            variants.append(variant)
    ranks_VSC = np.zeros((len(variants), len(seeds), len(controls)))
    for s, seed in enumerate(seeds):
        for c, control in enumerate(controls):
            found = [table[variant, seed, control] for variant in variants]
            ranks_VSC[:, s, c] = number_fronts([x.clip for x in found], [x.fid for x in found])
    noise, least = estimate_seed_noise(ranks_VSC.mean(2)) if variants else (math.nan, math.nan)
    rows = [_average_ranks(name, ranks_SC, seeds, controls) for name, ranks_SC in zip(variants, ranks_VSC)]
    return Ranking(_group(rows, least), noise, least, seeds, len(controls), left_out)


def _count_cells(count: int) -> str:
    return f"{count} cell{' is' if count == 1 else 's are'}"


def _average_ranks(
    name: str, ranks_SC: np.ndarray, seeds: Sequence[int], controls: Sequence[tuple[str, str, str]]
) -> Ranked:
    steps = [int(control[2].split("x")[0]) for control in controls]
    # The paper's "50 steps" averages one guidance only (its values are multiples of 1/4): the highest, 5.0.
    guidance = [float(control[2].split("x")[1]) for control in controls]
    many = [i for i, n in enumerate(steps) if n == max(steps)]
    many = [i for i in many if guidance[i] == max(guidance[j] for j in many)]
    few = [i for i, n in enumerate(steps) if n == min(steps)]
    return Ranked(
        name,
        overall=float(ranks_SC.mean()),
        by_seed={seed: float(value) for seed, value in zip(seeds, ranks_SC.mean(1))},
        few_steps=float(ranks_SC[:, few].mean()),
        many_steps=float(ranks_SC[:, many].mean()),
    )


def estimate_seed_noise(rank_VS: np.ndarray) -> tuple[float, float]:
    """Pooled standard deviation between seeds, and the least difference of two variants' means that is no noise."""
    num_variants, num_seeds = rank_VS.shape
    if num_seeds < 2:
        return math.nan, math.nan
    from scipy.stats import t

    spread = float(np.sqrt(rank_VS.var(axis=1, ddof=1).mean()))
    quantile = float(t.ppf(0.975, num_variants * (num_seeds - 1)))
    return spread, quantile * spread * math.sqrt(2 / num_seeds)


def _group(rows: Sequence[Ranked], least: float) -> list[Ranked]:
    """The variants by rank, each with the numbers of its groups. A group is a largest set of variants whose differences
    noise can explain: two variants share a group exactly when they are at most `least` apart. Groups may overlap; with
    disjoint tiers, near neighbours could fall into different ones."""
    ordered = sorted(rows, key=lambda row: (row.overall, row.variant))
    ends = [
        max(j for j, row in enumerate(ordered) if not row.overall - first.overall > least) for first in ordered
    ]  # with an unknown `least` (nan) nothing is further apart
    spans = [(i, end) for i, end in enumerate(ends) if i == 0 or end > ends[i - 1]]
    groups = [tuple(n for n, (i, end) in enumerate(spans, 1) if i <= place <= end) for place in range(len(ordered))]
    return [replace(row, groups=group) for row, group in zip(ordered, groups)]


def compare_with_paper(ranking: Ranking, *, resamples: int = 2000, seed: int = 0) -> dict[str, float] | None:
    """Spearman's correlation with Table 1 over the variants in common, bootstrap over variants; None below four."""
    both = [row for row in ranking.rows if row.variant in TABLE_1]
    if len(both) < 4:
        return None
    ours, paper = np.array([row.overall for row in both]), np.array([TABLE_1[row.variant] for row in both])
    rng = np.random.default_rng(seed)
    drawn = [_spearman(ours[i], paper[i]) for i in rng.integers(len(both), size=(resamples, len(both)))]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return {"spearman": _spearman(ours, paper), "low": float(low), "high": float(high), "variants": len(both)}


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import rankdata

    x, y = rankdata(a), rankdata(b)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else math.nan
