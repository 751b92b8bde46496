"""Scaling laws L(N) and L(N,D): their form, their fit, and when there is too little to fit.

Every law has the form L = E + sum_k A_k X_k^-alpha_k, where X_k is a model size N, a compute C or a number of images D.
It is fitted in logs, as log L = logsumexp(e, a_k - alpha_k x_k) with e = log E, a_k = log A_k and x_k = log X_k:
the Huber loss of log residuals (delta 1e-3), minimised by L-BFGS from a grid of starts. This is approach 3 and
equation 3 of Hoffmann et al. 2022 (arXiv 2203.15556, Chinchilla). That paper's own optimiser stopped too early
(Besiroglu et al. 2024, arXiv 2404.10102), so each fit here ends with a second-order polish (`refit`).
"""

# Shapes: B fits side by side, P points, K power-law terms, Q = 1 + 2K parameters (e, a_1, alpha_1, a_2, alpha_2).

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

DELTA = 1e-3  # Huber threshold in log loss, as in Hoffmann et al.: residuals above 0.1 % count linearly, not squared
MIN_SIZES = 4  # L(N) has three parameters: fewer sizes leave no residual, hence no interval
MIN_DECADES = 1.0  # of compute between the cheapest and the costliest run
ALPHA_RANGE = (1e-3, 5.0)
FLOOR_BELOW = 7.0  # E may fall to exp(-7) of the smallest loss seen: "no floor" for every practical purpose


@dataclass(frozen=True)
class LossCurve:
    """One run's validation losses, ordered by images. `flops_per_image`: exact FLOPs of forward and backward."""

    run: str
    parameters: int
    flops_per_image: float
    images: Array
    loss: Array

    @property
    def compute(self) -> Array:
        return self.images * self.flops_per_image


@dataclass(frozen=True)
class FitPoints:
    """What a law is fitted to: logs, and for each point the run that it came from (the unit of resampling)."""

    x_KP: Array
    y_P: Array
    run_P: NDArray[np.int64]
    runs: tuple[str, ...]


@dataclass(frozen=True)
class PowerLaw:
    """L = E + sum_k A_k * X_k^-alpha_k. `objective` is the mean Huber loss in units of delta squared."""

    theta_Q: Array
    objective: float

    @property
    def floor(self) -> float:
        return math.exp(self.theta_Q[0])

    @property
    def coefficients(self) -> list[float]:
        return [math.exp(a) for a in self.theta_Q[1::2]]

    @property
    def exponents(self) -> list[float]:
        return [float(alpha) for alpha in self.theta_Q[2::2]]

    def __call__(self, *sizes: ArrayLike) -> Array:
        """The loss at each size (or compute, or pair of size and images), in natural units, not logs."""
        x_KP = np.log(np.stack([np.atleast_1d(np.asarray(s, float)) for s in np.broadcast_arrays(*sizes)]))
        return np.exp(predict_log_loss(self.theta_Q[None], x_KP)[0])


def collect_size_points(curves: Sequence[LossCurve], images: float | None = None) -> FitPoints:
    """Each run's loss at the same number of images: the largest that all have reached, unless given."""
    at = min(float(c.images[-1]) for c in curves) if images is None else images
    x = np.log([[c.parameters for c in curves]])
    return FitPoints(
        x, np.log([interpolate_loss(c, at) for c in curves]), np.arange(len(curves)), tuple(c.run for c in curves)
    )


def collect_joint_points(curves: Sequence[LossCurve]) -> FitPoints:
    """Every point of every curve, as (parameters, images)."""
    counts = [len(c.images) for c in curves]
    size = np.repeat(np.log([float(c.parameters) for c in curves]), counts)
    x = np.stack([size, np.log(np.concatenate([c.images for c in curves]))])
    y = np.log(np.concatenate([c.loss for c in curves]))
    return FitPoints(x, y, np.repeat(np.arange(len(curves)), counts), tuple(c.run for c in curves))


def interpolate_loss(curve: LossCurve, images: float) -> float:
    """Interpolated between the two checkpoints around it, in logs; nan outside the curve."""
    return float(np.exp(_interpolate(np.array([images]), curve.images, curve.loss))[0])


def thin_curve(curve: LossCurve, *, points: int = 16, from_fraction: float = 0.1) -> LossCurve:
    """The curve at no more than `points` checkpoints, evenly spaced in log images, without its first 10 % (warm-up)."""
    keep = np.flatnonzero((curve.images >= from_fraction * curve.images[-1]) & np.isfinite(curve.loss))
    if len(keep) > points:
        targets = np.geomspace(curve.images[keep[0]], curve.images[keep[-1]], points)
        keep = np.unique([keep[np.argmin(np.abs(curve.images[keep] - t))] for t in targets])
    return LossCurve(curve.run, curve.parameters, curve.flops_per_image, curve.images[keep], curve.loss[keep])


def find_shortage(curves: Sequence[LossCurve]) -> str | None:
    """Why no law may be fitted to these runs, or None. A fit to less says more about the fitter than about the runs."""
    sizes = len({c.parameters for c in curves})
    if sizes < MIN_SIZES:
        return f"{sizes} model size{'s' if sizes != 1 else ''}, and a law with a floor needs at least {MIN_SIZES}"
    spent = [c.compute[-1] for c in curves]
    decades = math.log10(max(spent) / min(spent))
    if decades < MIN_DECADES:
        ratio = 10**decades
        return f"the runs' compute spans a factor of {ratio:.1f}, and at least a decade (a factor of 10) is needed"
    return None


def fit_law(points: FitPoints, *, delta: float = DELTA) -> PowerLaw:
    """Huber on logs, L-BFGS from the best of a grid of starts, then a second-order polish."""
    from scipy.optimize import minimize

    x_KP, y_P = points.x_KP, points.y_P
    if not (np.isfinite(x_KP).all() and np.isfinite(y_P).all()):
        raise ValueError("a law is fitted to finite, positive sizes and losses only")
    center_K = x_KP.mean(axis=1)
    x_KP = x_KP - center_K[:, None]
    starts_BQ = _choose_starts(x_KP, y_P)
    order = np.argsort(huber_loss(starts_BQ, x_KP, y_P, delta=delta), kind="stable")[:12]
    bounds = [(y_P.min() - FLOOR_BELOW, y_P.max())] + [(None, None), ALPHA_RANGE] * len(x_KP)

    def value_and_slope(theta_Q: Array) -> tuple[float, Array]:
        predicted, jacobian = predict_with_jacobian(theta_Q[None], x_KP)
        residual = predicted[0] - y_P
        slope_Q = np.clip(residual, -delta, delta) @ jacobian[0] / len(y_P) / delta**2
        return float(huber_loss(theta_Q[None], x_KP, y_P, delta=delta)[0]), slope_Q

    options = {"maxiter": 300, "ftol": 1e-13, "gtol": 1e-9}
    found = [
        minimize(value_and_slope, starts_BQ[i], jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
        for i in order
    ]
    polished_BQ = refit(np.array(found), x_KP, y_P, delta=delta, iterations=200)
    value_B = huber_loss(polished_BQ, x_KP, y_P, delta=delta)
    best = int(np.argmin(value_B))
    return PowerLaw(uncenter(polished_BQ[best : best + 1], center_K)[0], float(value_B[best]))


def refit(theta_BQ: Array, x_KP: Array, y_BP: Array, *, delta: float = DELTA, iterations: int = 60) -> Array:
    """B fits at once from warm starts, on the objective of `fit_law`.

    Levenberg-Marquardt inside iteratively reweighted least squares: a residual r has the weight min(1, delta / |r|),
    with which the weighted squares have the gradient of the Huber loss (Huber 1964; Holland and Welsch 1977).
    `y_BP` may be one row for all fits. A fit is done after three steps without progress.
    """
    theta_BQ = theta_BQ.copy()
    y_BP = np.broadcast_to(y_BP, (len(theta_BQ), x_KP.shape[1]))
    damping_B = np.full(len(theta_BQ), 1e-3)
    value_B = huber_loss(theta_BQ, x_KP, y_BP, delta=delta)
    settled_B = np.zeros(len(theta_BQ), dtype=int)
    for _ in range(iterations):
        active = np.flatnonzero(settled_B < 3)
        if not len(active):
            break
        y, now = y_BP[active], value_B[active]
        tried = _take_damped_step(theta_BQ[active], x_KP, y, damping_B[active], delta)
        value = huber_loss(tried, x_KP, y, delta=delta)
        better = value <= now
        theta_BQ[active[better]], value_B[active[better]] = tried[better], value[better]
        damping_B[active] = np.clip(damping_B[active] * np.where(better, 0.25, 5.0), 1e-12, 1e8)
        still = np.where(better, now - value <= 1e-7 * now, damping_B[active] >= 1e6)
        settled_B[active] = np.where(still, settled_B[active] + 1, 0)
    return theta_BQ


def _take_damped_step(theta_BQ: Array, x_KP: Array, y_BP: Array, damping_B: Array, delta: float) -> Array:
    """One step of each fit, kept inside the bounds of `fit_law`."""
    predicted_BP, jacobian_BPQ = predict_with_jacobian(theta_BQ, x_KP)
    residual_BP = y_BP - predicted_BP
    weight_BP = np.minimum(1.0, delta / np.maximum(np.abs(residual_BP), 1e-300))
    weighted_BQP = (jacobian_BPQ * weight_BP[..., None]).transpose(0, 2, 1)
    normal_BQQ = weighted_BQP @ jacobian_BPQ
    scale_BQ = np.einsum("bii->bi", normal_BQQ)
    ridge_BQ = damping_B[:, None] * scale_BQ + 1e-12 * scale_BQ.max(axis=1, keepdims=True)
    normal_BQQ = normal_BQQ + ridge_BQ[:, None, :] * np.eye(theta_BQ.shape[1])
    step_BQ = np.linalg.solve(normal_BQQ, weighted_BQP @ residual_BP[..., None])[..., 0]
    tried_BQ = theta_BQ + np.clip(step_BQ, -2, 2)
    tried_BQ[:, 0] = np.maximum(tried_BQ[:, 0], y_BP.min(axis=1) - FLOOR_BELOW)
    tried_BQ[:, 2::2] = np.clip(tried_BQ[:, 2::2], *ALPHA_RANGE)
    return tried_BQ


def predict_log_loss(theta_BQ: Array, x_KP: Array) -> Array:
    """(B, P): log of the loss that each law gives at the logs `x_KP`."""
    return np.logaddexp.reduce(_compute_log_terms(theta_BQ, x_KP), axis=1)


def predict_with_jacobian(theta_BQ: Array, x_KP: Array) -> tuple[Array, Array]:
    """`predict_log_loss` and its derivative (B, P, Q) by each parameter.

    The derivative of logsumexp is a softmax: by e and a_k it is that term's share of the loss, by alpha_k it is
    minus x_k times that share.
    """
    terms_BTP = _compute_log_terms(theta_BQ, x_KP)
    total_BP = np.logaddexp.reduce(terms_BTP, axis=1)
    share_BTP = np.exp(terms_BTP - total_BP[:, None])
    columns = [share_BTP[:, 0]]
    for k in range(len(x_KP)):
        columns += [share_BTP[:, 1 + k], -x_KP[k] * share_BTP[:, 1 + k]]
    return total_BP, np.stack(columns, axis=-1)


def huber_loss(theta_BQ: Array, x_KP: Array, y_BP: Array, *, delta: float = DELTA) -> Array:
    """(B,): mean Huber loss of the log residuals in units of delta^2, whose size suits an optimiser's tolerances."""
    size = np.abs(predict_log_loss(theta_BQ, x_KP) - y_BP) / delta
    return np.where(size <= 1, size**2 / 2, size - 0.5).mean(axis=1)


def uncenter(theta_BQ: Array, center_K: Array) -> Array:
    """Converts parameters of a fit on centred logs to parameters of the fit on plain logs.

    Fits run on centred logs: there coefficient and exponent are nearly independent, so steps are well conditioned.
    """
    theta_BQ = theta_BQ.copy()
    theta_BQ[:, 1::2] += theta_BQ[:, 2::2] * center_K
    return theta_BQ


def center(theta_BQ: Array, center_K: Array) -> Array:
    return uncenter(theta_BQ, -center_K)


def _compute_log_terms(theta_BQ: Array, x_KP: Array) -> Array:
    power = theta_BQ[:, 1::2, None] - theta_BQ[:, 2::2, None] * x_KP[None]
    constant = np.broadcast_to(theta_BQ[:, :1, None], (len(theta_BQ), 1, x_KP.shape[1]))
    return np.concatenate([constant, power], axis=1)


def _choose_starts(x_KP: Array, y_P: Array) -> Array:
    """(B, Q) starts on centred logs: E a share of the lowest loss, the rest of the mean loss split over the terms."""
    lowest, mean = math.exp(y_P.min()), math.exp(y_P.mean())
    splits = [(1.0,)] if len(x_KP) == 1 else [(s, 1 - s) for s in (0.15, 0.5, 0.85)]
    exponents = (0.03, 0.1, 0.25, 0.5, 1.0, 1.8)
    starts = []
    for share, split, alphas in itertools.product(
        (0.02, 0.3, 0.6, 0.85, 0.97), splits, itertools.product(exponents, repeat=len(x_KP))
    ):
        rest = max(mean - share * lowest, 1e-6 * mean)
        pairs = [value for part, alpha in zip(split, alphas) for value in (math.log(part * rest), alpha)]
        starts.append([math.log(share * lowest), *pairs])
    return np.array(starts)


def _interpolate(at: Array, x: Array, y: Array) -> Array:
    return np.interp(np.log(at), np.log(x), np.log(y), left=np.nan, right=np.nan)
