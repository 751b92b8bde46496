"""Intervals of a scaling law by a bootstrap over runs, and predictions with them.

The unit that varies is the run: two points of one curve share its seed, so resampling points would shrink every
interval. How much runs scatter is estimated from the residuals with the degrees of freedom that the fit has left, and
that estimate's own uncertainty is drawn too: with four sizes one degree is left, and the honest interval is wide.
"""

# Shapes: B replicates, P points, R runs, Q parameters.

from dataclasses import dataclass

import numpy as np

from eval.scaling.laws import Array, Law, Points, center, compute_laws, log_loss, log_loss_jacobian, refit, uncenter

REPLICATES = 1000
LEAST_SQUARES = 1e3  # a Huber threshold that no residual reaches


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float
    level: float = 0.95


@dataclass(frozen=True)
class Scatter:
    """What the fit leaves over: standard deviation between runs (in log loss), its degrees of freedom, the rest."""

    between_runs: float
    freedom: float
    within_P: Array


@dataclass(frozen=True)
class Bootstrap:
    """Parameters of the law refitted to each replicate, and each replicate's scatter of a new run."""

    law: Law
    theta_BQ: Array
    new_run_B: Array
    scatter: Scatter

    def exponent(self, term: int) -> Interval:
        return self._interval(self.law.exponents[term], self.theta_BQ[:, 2 + 2 * term])

    def floor(self) -> Interval:
        return self._interval(self.law.floor, np.exp(self.theta_BQ[:, 0]))

    def loss(self, *sizes: float, new_run: bool = False) -> Interval:
        """The law at given sizes; with `new_run` the interval for one more run's own loss there."""
        x_KP = np.log(np.array(sizes, float))[:, None]
        log_B = log_loss(self.theta_BQ, x_KP)[:, 0] + (self.new_run_B if new_run else 0.0)
        return self._interval(float(self.law(*sizes)[0]), np.exp(log_B))

    @staticmethod
    def _interval(value: float, value_B: Array) -> Interval:
        low, high = np.quantile(value_B, [0.025, 0.975])
        return Interval(value, float(low), float(high))


def scatter_of(points: Points, law: Law) -> Scatter:
    """Between-run variance by moments: run means of residuals have E[sum of squares] = variance * trace(M'M),
    M = Zbar (I - H) Z with Zbar the averaging per run, Z its membership and H the hat matrix.
    """
    center_K = points.x_KP.mean(axis=1)
    x_KP = points.x_KP - center_K[:, None]
    theta_BQ = refit(center(law.theta_Q[None], center_K), x_KP, points.y_P, delta=LEAST_SQUARES, iterations=100)
    predicted, jacobian = log_loss_jacobian(theta_BQ, x_KP)
    residual_P = points.y_P - predicted[0]
    member_PR = (points.run_P[:, None] == np.unique(points.run_P)[None]).astype(float)
    mean_RP = (member_PR / member_PR.sum(axis=0)).T
    basis_PQ, singular, _ = np.linalg.svd(jacobian[0], full_matrices=False)
    basis_PQ = basis_PQ[:, singular > 1e-9 * singular[0]]
    left_RR = mean_RP @ (member_PR - basis_PQ @ (basis_PQ.T @ member_PR))
    freedom = float((left_RR**2).sum())
    offset_R = mean_RP @ residual_P
    variance = float(offset_R @ offset_R) / max(freedom, 1e-9)
    return Scatter(variance**0.5, freedom, residual_P - member_PR @ offset_R)


def bootstrap(points: Points, law: Law, *, replicates: int = REPLICATES, seed: int = 0) -> Bootstrap:
    """Refit to curves whose runs deviate anew, each as a whole: an offset, and its own wiggle times a normal draw."""
    scatter = scatter_of(points, law)
    rng = np.random.default_rng(seed)
    runs, run_P = np.unique(points.run_P, return_inverse=True)
    freedom = max(scatter.freedom, 1e-2)
    widen_B = np.sqrt(freedom / rng.chisquare(freedom, replicates))
    offset_BR = widen_B[:, None] * scatter.between_runs * rng.standard_normal((replicates, len(runs)))
    # The fit has taken up part of the wiggles too; one run's worth of freedom pays for the shared exponent in images.
    spare = max(len(runs) - 1, 1)
    taken = len(points.y_P) / max(len(points.y_P) - len(law.theta_Q), 1)
    more_B = np.sqrt(taken * len(runs) / rng.chisquare(spare, replicates))
    wiggle_BR = more_B[:, None] * rng.standard_normal((replicates, len(runs)))
    center_K = points.x_KP.mean(axis=1)
    x_KP = points.x_KP - center_K[:, None]
    theta_Q = center(law.theta_Q[None], center_K)
    y_BP = log_loss(theta_Q, x_KP) + offset_BR[:, run_P] + wiggle_BR[:, run_P] * scatter.within_P
    theta_BQ = refit(np.repeat(theta_Q, replicates, axis=0), x_KP, y_BP)
    new_run_B = widen_B * scatter.between_runs * rng.standard_normal(replicates)
    return Bootstrap(law, uncenter(theta_BQ, center_K), new_run_B, scatter)


def compute_bootstrap(joint: Bootstrap, factor: float, kappa: float) -> Bootstrap:
    """L(C): what each L(N,D) of the bootstrap gives to models of its own compute-optimal size."""
    law = Law(compute_laws(joint.law.theta_Q[None], factor, kappa)[0], joint.law.objective)
    return Bootstrap(law, compute_laws(joint.theta_BQ, factor, kappa), joint.new_run_B, joint.scatter)
