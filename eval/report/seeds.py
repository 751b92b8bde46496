"""Runs of one arm that differ in their seed alone: which they are, and their mean with an interval over seeds."""

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from eval.report.runs import RunFolder
from eval.report.series import MetricPoint
from eval.report.tables import flatten

_SEED = re.compile(r"(^|[/._-])seed[-_]?\d+(?=$|[/._-])")
# Recipe fields in which runs of one arm may differ: those that another seed changes, there or in what came before it.
_OF_A_SEED = {"seed", "init_weights", "data.fingerprint"}


def name_arm(run: str) -> str:
    """`seed1/reflow` and `reflow-seed1` are `reflow`; a name without a seed stays."""
    return _SEED.sub("", run).strip("/._-") or run


def group_seeds(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    """Arm -> its runs. Runs form an arm where their names and their recipes differ in nothing but the seed."""
    named: dict[str, list[RunFolder]] = {}
    for run in runs:
        named.setdefault(name_arm(run.name), []).append(run)
    arms: dict[str, list[str]] = {}
    for arm, found in named.items():
        told = {tuple(sorted(_leave_seed_out(run).items())) for run in found}
        seeds = {run.recipe_field("seed") for run in found}
        if len(found) > 1 and len(told) == 1 and len(seeds) == len(found):
            arms[arm] = [run.name for run in found]
        else:
            arms |= {run.name: [run.name] for run in found}
    return arms


def _leave_seed_out(run: RunFolder) -> dict[str, str]:
    return {name: text for name, text in flatten(run.recipe).items() if name not in _OF_A_SEED}


def average_points(points: Sequence[MetricPoint]) -> tuple[MetricPoint, MetricPoint]:
    """The mean of two points or more: with its 95 % interval over them (Student's t), and with the mean of their own
    intervals, which are over prompts. `count` of the first is the number of seeds."""
    from scipy.stats import t

    values = np.array([point.value for point in points])
    mean, n = float(values.mean()), len(values)
    half = float(t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
    over_seeds = MetricPoint(max(point.images for point in points), mean, mean - half, mean + half, n)
    ends = [[end for point in points if (end := getattr(point, name)) is not None] for name in ("low", "high")]
    low, high = (float(np.mean(each)) if len(each) == n else None for each in ends)
    return over_seeds, replace(over_seeds, low=low, high=high, count=points[0].count)


def spread_over(a: MetricPoint, b: MetricPoint) -> MetricPoint:
    """`a` with an interval that holds those of both."""
    lows, highs = ([end for end in ends if end is not None] for ends in ((a.low, b.low), (a.high, b.high)))
    return replace(a, low=min(lows, default=None), high=max(highs, default=None))
