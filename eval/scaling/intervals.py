"""95 % intervals of a scaling law by a parametric bootstrap over runs, and predictions with them.

The unit of resampling is the run: the points of one curve share its seed, so a bootstrap over points would make every
interval too narrow. How much runs scatter is estimated from the residuals with the degrees of freedom that the fit has
left. That estimate is uncertain too, so each replicate draws its own scatter: with four sizes one degree of freedom
is left, and the interval is wide. coverage.py measures how often these intervals hold the truth.
"""

# Shapes: B replicates, P points, R runs, Q parameters.

from dataclasses import dataclass

import numpy as np

from eval.scaling.frontier import derive_compute_laws
from eval.scaling.laws import (
    Array,
    FitPoints,
    PowerLaw,
    center,
    predict_log_loss,
    predict_with_jacobian,
    refit,
    uncenter,
)
from infra.codec import Number

REPLICATES = 1000
LEAST_SQUARES = 1e3  # a Huber threshold that no residual reaches


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: Number
    low: Number
    high: Number

    @staticmethod
    def of(value: float, value_B: Array) -> "Interval":
        """`value` with the middle 95 % of its replicates."""
        low, high = np.quantile(value_B, [0.025, 0.975])
        return Interval(value, float(low), float(high))


@dataclass(frozen=True)
class Scatter:
    """Residuals of a fit, in log loss: the standard deviation between runs with its degrees of freedom, and the rest.

    `within_P`: what remains of each point's residual once its run's mean residual is taken away.
    """

    between_runs: float
    freedom: float
    within_P: Array


@dataclass(frozen=True)
class Bootstrap:
    """The fitted law, its parameters refitted to each replicate, and each replicate's offset of a new run."""

    law: PowerLaw
    theta_BQ: Array
    new_run_B: Array
    scatter: Scatter

    def exponent(self, term: int) -> Interval:
        return Interval.of(self.law.exponents[term], self.theta_BQ[:, 2 + 2 * term])

    def floor(self) -> Interval:
        return Interval.of(self.law.floor, np.exp(self.theta_BQ[:, 0]))

    def loss(self, *sizes: float, new_run: bool = False) -> Interval:
        """The law's loss there (sizes in natural units); with `new_run` the interval is for one more run's own loss."""
        x_KP = np.log(np.array(sizes, float))[:, None]
        log_B = predict_log_loss(self.theta_BQ, x_KP)[:, 0] + (self.new_run_B if new_run else 0.0)
        return Interval.of(float(self.law(*sizes)[0]), np.exp(log_B))


def estimate_scatter(points: FitPoints, law: PowerLaw) -> Scatter:
    """Between-run variance by the method of moments, as in one-way random effects (Henderson 1953).

    Let Z be the membership of points in runs, Zbar the average over each run and H the hat matrix of the least-squares
    fit. Offsets u of the runs give the run means Zbar (I - H) Z u of the residuals, so their sum of squares has the
    expectation variance * trace(M'M) with M = Zbar (I - H) Z. That trace is the number of degrees of freedom.
    """
    center_K = points.x_KP.mean(axis=1)
    x_KP = points.x_KP - center_K[:, None]
    theta_BQ = refit(center(law.theta_Q[None], center_K), x_KP, points.y_P, delta=LEAST_SQUARES, iterations=100)
    predicted, jacobian = predict_with_jacobian(theta_BQ, x_KP)
    residual_P = points.y_P - predicted[0]
    member_PR = (points.run_P[:, None] == np.unique(points.run_P)[None]).astype(float)
    mean_RP = (member_PR / member_PR.sum(axis=0)).T
    # H = basis basis': the span of the law's derivatives, without directions that the points cannot tell apart.
    basis_PQ, singular, _ = np.linalg.svd(jacobian[0], full_matrices=False)
    basis_PQ = basis_PQ[:, singular > 1e-9 * singular[0]]
    left_RR = mean_RP @ (member_PR - basis_PQ @ (basis_PQ.T @ member_PR))
    freedom = float((left_RR**2).sum())
    offset_R = mean_RP @ residual_P
    variance = float(offset_R @ offset_R) / max(freedom, 1e-9)
    return Scatter(variance**0.5, freedom, residual_P - member_PR @ offset_R)


def bootstrap_law(points: FitPoints, law: PowerLaw, *, replicates: int = REPLICATES, seed: int = 0) -> Bootstrap:
    """Refit the law to `replicates` ladders, in which every run deviates anew and as a whole.

    A run's deviation is an offset from a normal distribution plus its own residual pattern (`within_P`) times a normal
    draw: a wild bootstrap (Wu 1986) whose draws are shared within a run, so that the pattern keeps its correlation.
    """
    scatter = estimate_scatter(points, law)
    rng = np.random.default_rng(seed)
    runs, run_P = np.unique(points.run_P, return_inverse=True)
    freedom = max(scatter.freedom, 1e-2)
    # The variance estimate is its true value times chi-squared / freedom; dividing gives Student's wider tails.
    widen_B = np.sqrt(freedom / rng.chisquare(freedom, replicates))
    offset_BR = widen_B[:, None] * scatter.between_runs * rng.standard_normal((replicates, len(runs)))
    # The fit has absorbed part of the patterns, P / (P - Q) of their variance, and their size is estimated from R runs
    # of which one run's worth of freedom pays for the exponent in images, which all runs share.
    spare = max(len(runs) - 1, 1)
    inflation = len(points.y_P) / max(len(points.y_P) - len(law.theta_Q), 1)
    more_B = np.sqrt(inflation * len(runs) / rng.chisquare(spare, replicates))
    wiggle_BR = more_B[:, None] * rng.standard_normal((replicates, len(runs)))
    center_K = points.x_KP.mean(axis=1)
    x_KP = points.x_KP - center_K[:, None]
    theta_Q = center(law.theta_Q[None], center_K)
    y_BP = predict_log_loss(theta_Q, x_KP) + offset_BR[:, run_P] + wiggle_BR[:, run_P] * scatter.within_P
    theta_BQ = refit(np.repeat(theta_Q, replicates, axis=0), x_KP, y_BP)
    new_run_B = widen_B * scatter.between_runs * rng.standard_normal(replicates)
    return Bootstrap(law, uncenter(theta_BQ, center_K), new_run_B, scatter)


def derive_compute_bootstrap(joint: Bootstrap, factor: float, kappa: float) -> Bootstrap:
    """L(C): what each L(N,D) of the bootstrap gives to models of its own compute-optimal size."""
    law = PowerLaw(derive_compute_laws(joint.law.theta_Q[None], factor, kappa)[0], joint.law.objective)
    return Bootstrap(law, derive_compute_laws(joint.theta_BQ, factor, kappa), joint.new_run_B, joint.scatter)
