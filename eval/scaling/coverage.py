"""How often the 95 % intervals hold the truth: simulated ladders with runs that scatter and curves that wander.

`python -m eval.scaling.coverage --trials 1000` writes coverage.json beside this file, which every report quotes. Each
fit starts at the true parameters: what is tested is the interval, not the search for the minimum, and 1,000 trials
take minutes.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from eval.scaling.frontier import derive_compute_laws, fit_flops_law
from eval.scaling.intervals import Bootstrap, bootstrap_law, derive_compute_bootstrap
from eval.scaling.laws import (
    Array,
    FitPoints,
    LossCurve,
    PowerLaw,
    center,
    collect_joint_points,
    collect_size_points,
    refit,
    uncenter,
)
from infra.codec import from_json

TRUTH = {"floor": 0.25, "a": 3.0, "alpha": 0.30, "b": 20.0, "beta": 0.45}  # near the world's own losses
COVERAGE = Path(__file__).parent / "coverage.json"
FLOPS_PER_PARAMETER = 6.0


@dataclass(frozen=True)
class SimulatedLadder:
    """Runs of the true law. Deviations are standard deviations in log loss.

    `between`: one offset per run; `within`: deviations along a curve, an AR(1) process whose correlation from one
    checkpoint to the next is `memory`. Sizes span `decades` powers of ten.
    """

    sizes: int = 5
    decades: float = 2.0
    checkpoints: int = 6
    between: float = 0.003
    within: float = 0.001
    memory: float = 0.8


@dataclass(frozen=True)
class QuantityCoverage:
    """`coverage`: share of the trials whose interval held the truth; `low`, `high`: its 95 % binomial interval."""

    name: str
    coverage: float
    low: float
    high: float


@dataclass(frozen=True)
class Coverage:
    """What coverage.json holds. `truth`: parameters of the law that the simulated runs follow."""

    trials: int
    ladder: SimulatedLadder
    truth: dict[str, float]
    quantities: tuple[QuantityCoverage, ...]


def read_coverage() -> Coverage | None:
    """The published simulation, or None before there is one."""
    return from_json(Coverage, COVERAGE.read_bytes(), where=str(COVERAGE)) if COVERAGE.exists() else None


def simulate_coverage(
    trials: int, *, ladder: SimulatedLadder = SimulatedLadder(), replicates: int = 200, seed: int = 0
) -> Coverage:
    """Fit `trials` simulated ladders, `replicates` bootstrap replicates each, and count intervals that hold the truth.

    Intervals of the counts are Clopper and Pearson's (1934).
    """
    from scipy.stats import binomtest
    from tqdm import tqdm

    hits: dict[str, int] = {}
    for trial in tqdm(range(trials), unit="ladders", disable=None):
        for name, hit in _check_intervals(ladder, replicates, np.random.default_rng([seed, trial])).items():
            hits[name] = hits.get(name, 0) + hit
    quantities = []
    for name, count in hits.items():
        interval = binomtest(count, trials).proportion_ci(0.95)
        quantities.append(QuantityCoverage(name, count / trials, float(interval.low), float(interval.high)))
    return Coverage(trials, ladder, TRUTH, tuple(quantities))


def compute_true_loss(parameters: float, images: Array | float) -> Array | float:
    return TRUTH["floor"] + TRUTH["a"] / parameters ** TRUTH["alpha"] + TRUTH["b"] / images ** TRUTH["beta"]


def derive_true_compute_law() -> PowerLaw:
    """The least loss for a compute of FLOPS_PER_PARAMETER * parameters * images."""
    theta_Q = [math.log(TRUTH["floor"]), math.log(TRUTH["a"]), TRUTH["alpha"], math.log(TRUTH["b"]), TRUTH["beta"]]
    return PowerLaw(derive_compute_laws(np.array([theta_Q]), FLOPS_PER_PARAMETER)[0], 0.0)


def _check_intervals(ladder: SimulatedLadder, replicates: int, rng: np.random.Generator) -> dict[str, bool]:
    """Simulate one ladder, fit it, and say of each quantity whether its interval holds the truth."""
    sizes = np.geomspace(1e6, 1e6 * 10**ladder.decades, ladder.sizes)
    curves = [_simulate_curve(ladder, size, rng) for size in sizes]
    images = float(curves[0].images[-1])
    ahead = sizes[-1] * sizes[1] / sizes[0]
    law_there = float(compute_true_loss(ahead, images))
    run_there = float(_simulate_curve(ladder, ahead, rng).loss[-1])
    seed = int(rng.integers(2**31))
    floor = TRUTH["floor"] + TRUTH["b"] / images ** TRUTH["beta"]
    by_size = _fit_from_truth(collect_size_points(curves), floor, ["a", "alpha"], replicates, seed)
    terms = ["a", "alpha", "b", "beta"]
    joint = _fit_from_truth(collect_joint_points(curves), TRUTH["floor"], terms, replicates, seed)
    by_compute = derive_compute_bootstrap(joint, *fit_flops_law(curves))
    compute_law, most = derive_true_compute_law(), float(curves[-1].compute[-1])
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


def _simulate_curve(ladder: SimulatedLadder, size: float, rng: np.random.Generator) -> LossCurve:
    images = np.geomspace(1e5, 1e6, ladder.checkpoints)
    deviation = np.zeros(ladder.checkpoints)
    fresh = ladder.within * rng.standard_normal(ladder.checkpoints)
    deviation[0] = fresh[0]
    for t in range(1, ladder.checkpoints):  # AR(1) whose variance is the same at every checkpoint
        deviation[t] = ladder.memory * deviation[t - 1] + math.sqrt(1 - ladder.memory**2) * fresh[t]
    loss = np.asarray(compute_true_loss(size, images)) * np.exp(ladder.between * rng.standard_normal() + deviation)
    return LossCurve(f"{size:g}", round(size), FLOPS_PER_PARAMETER * size, images, loss)


def _fit_from_truth(points: FitPoints, floor: float, terms: Sequence[str], replicates: int, seed: int) -> Bootstrap:
    """`terms`: names in TRUTH of coefficient and exponent in turn, from which the fit starts."""
    values = [math.log(floor), *(TRUTH[name] if i % 2 else math.log(TRUTH[name]) for i, name in enumerate(terms))]
    center_K = points.x_KP.mean(axis=1)
    start = center(np.array([values]), center_K)
    theta_BQ = refit(start, points.x_KP - center_K[:, None], points.y_P, iterations=150)
    return bootstrap_law(points, PowerLaw(uncenter(theta_BQ, center_K)[0], 0.0), replicates=replicates, seed=seed)


def main(trials: int = 1000, out: str = str(COVERAGE)) -> None:
    """Simulate ladders and write how often each interval held the truth."""
    found = simulate_coverage(trials)
    Path(out).write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    for line in found.quantities:
        print(f"{line.name:30} {line.coverage:.3f} ({line.low:.3f} to {line.high:.3f})")


if __name__ == "__main__":
    import sys

    from infra.cli import run_command
    from infra.errors import run_cli

    run_cli(lambda: run_command(main, sys.argv[1:], prog="python -m eval.scaling.coverage"))
