"""How often the 95 % intervals hold the truth: simulated ladders with runs that scatter and curves that wiggle.

`python -m eval.scaling.coverage --trials 1000` writes coverage.json beside it, which every report quotes. Fits start at
the truth (warm starts): what is tested is the interval, not the search, and 1,000 trials take minutes.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.scaling.intervals import Bootstrap, bootstrap, compute_bootstrap
from eval.scaling.laws import (
    Array,
    Curve,
    Law,
    Points,
    center,
    compute_laws,
    flops_law,
    joint_points,
    refit,
    size_points,
    uncenter,
)

TRUTH = {"floor": 0.25, "a": 3.0, "alpha": 0.30, "b": 20.0, "beta": 0.45}
COVERAGE = Path(__file__).parent / "coverage.json"
FLOPS_PER_PARAMETER = 6.0


@dataclass(frozen=True)
class Ladder:
    """`between`: standard deviation of a run's offset in log loss; `within`: of the wiggle along its curve (AR(1))."""

    sizes: int = 5
    decades: float = 2.0
    checkpoints: int = 6
    between: float = 0.003
    within: float = 0.001
    memory: float = 0.8


def study(trials: int, *, ladder: Ladder = Ladder(), replicates: int = 200, seed: int = 0) -> dict[str, Any]:
    """Coverage per quantity with its 95 % binomial (Clopper-Pearson) interval."""
    from tqdm import tqdm

    hits: dict[str, int] = {}
    for trial in tqdm(range(trials), unit="ladders", disable=None):
        for name, hit in _trial(ladder, replicates, np.random.default_rng([seed, trial])).items():
            hits[name] = hits.get(name, 0) + hit
    quantities = [{"name": name, "coverage": hit / trials, **_binomial(hit, trials)} for name, hit in hits.items()]
    return {"trials": trials, "sizes": ladder.sizes, "ladder": vars(ladder), "truth": TRUTH, "quantities": quantities}


def true_loss(parameters: float, images: Array | float) -> Array | float:
    return TRUTH["floor"] + TRUTH["a"] / parameters ** TRUTH["alpha"] + TRUTH["b"] / images ** TRUTH["beta"]


def true_compute_law() -> Law:
    """The least loss for a compute of FLOPS_PER_PARAMETER * parameters * images."""
    theta_Q = [math.log(TRUTH["floor"]), math.log(TRUTH["a"]), TRUTH["alpha"], math.log(TRUTH["b"]), TRUTH["beta"]]
    return Law(compute_laws(np.array([theta_Q]), FLOPS_PER_PARAMETER)[0], 0.0)


def _trial(ladder: Ladder, replicates: int, rng: np.random.Generator) -> dict[str, bool]:
    sizes = np.geomspace(1e6, 1e6 * 10**ladder.decades, ladder.sizes)
    curves = [_curve(ladder, size, rng) for size in sizes]
    images = float(curves[0].images[-1])
    ahead = sizes[-1] * sizes[1] / sizes[0]
    law_there = float(true_loss(ahead, images))
    run_there = float(_curve(ladder, ahead, rng).loss[-1])
    seed = int(rng.integers(2**31))
    by_size = _warm(
        size_points(curves), [TRUTH["floor"] + TRUTH["b"] / images ** TRUTH["beta"], "a", "alpha"], replicates, seed
    )
    joint = _warm(joint_points(curves), [TRUTH["floor"], "a", "alpha", "b", "beta"], replicates, seed)
    by_compute = compute_bootstrap(joint, *flops_law(curves))
    compute_law, most = true_compute_law(), float(curves[-1].compute[-1])
    alpha, beta = TRUTH["alpha"], TRUTH["beta"]
    alpha_B, beta_B = joint.theta_BQ[:, 2], joint.theta_BQ[:, 4]
    low, high = np.quantile(beta_B / (alpha_B + beta_B), [0.025, 0.975])
    checks = {
        "exponent of L(N)": (by_size.exponent(0), alpha),
        "L(N) one rung further": (by_size.loss(ahead), law_there),
        "a new run one rung further": (by_size.loss(ahead, new_run=True), run_there),
        "alpha of L(N,D)": (joint.exponent(0), alpha),
        "beta of L(N,D)": (joint.exponent(1), beta),
        "exponent of L(C)": (by_compute.exponent(0), compute_law.exponents[0]),
        "L(C) at the largest run's compute": (by_compute.loss(most), float(compute_law(most)[0])),
    }
    hits = {name: bool(interval.low <= truth <= interval.high) for name, (interval, truth) in checks.items()}
    return hits | {"frontier exponent": bool(low <= beta / (alpha + beta) <= high)}


def _curve(ladder: Ladder, size: float, rng: np.random.Generator) -> Curve:
    images = np.geomspace(1e5, 1e6, ladder.checkpoints)
    wiggle = np.zeros(ladder.checkpoints)
    fresh = ladder.within * rng.standard_normal(ladder.checkpoints)
    wiggle[0] = fresh[0]
    for t in range(1, ladder.checkpoints):
        wiggle[t] = ladder.memory * wiggle[t - 1] + math.sqrt(1 - ladder.memory**2) * fresh[t]
    loss = np.asarray(true_loss(size, images)) * np.exp(ladder.between * rng.standard_normal() + wiggle)
    return Curve(f"{size:g}", round(size), FLOPS_PER_PARAMETER * size, images, loss)


def _warm(points: Points, truth: list[Any], replicates: int, seed: int) -> Bootstrap:
    """`truth`: floor, then names of coefficient and exponent in turn."""
    values = [math.log(truth[0])]
    values += [TRUTH[name] if i % 2 else math.log(TRUTH[name]) for i, name in enumerate(truth[1:])]
    center_K = points.x_KP.mean(axis=1)
    start = center(np.array([values]), center_K)
    theta_BQ = refit(start, points.x_KP - center_K[:, None], points.y_P, iterations=150)
    return bootstrap(points, Law(uncenter(theta_BQ, center_K)[0], 0.0), replicates=replicates, seed=seed)


def _binomial(hits: int, trials: int) -> dict[str, float]:
    from scipy.stats import binomtest

    interval = binomtest(hits, trials).proportion_ci(0.95)
    return {"low": float(interval.low), "high": float(interval.high)}


def main(trials: int = 1000, out: str = str(COVERAGE)) -> None:
    """Simulate ladders and write how often each interval held the truth."""
    found = study(trials)
    Path(out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for line in found["quantities"]:
        print(f"{line['name']:30} {line['coverage']:.3f} ({line['low']:.3f} to {line['high']:.3f})")


if __name__ == "__main__":
    import sys

    from infra.cli import parse
    from infra.errors import run_cli

    run_cli(lambda: parse(main, sys.argv[1:], prog="python -m eval.scaling.coverage"))
