"""The compute-optimal frontier of a fitted L(N,D): which size and how many images suit a compute, and L(C) along it."""

# Shapes: B laws side by side.

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.scaling.laws import Array, LossCurve, PowerLaw


@dataclass(frozen=True)
class Frontier:
    """The size N and the images D of least loss for a compute of C FLOPs.

    N = size_factor * C^size_exponent, D = images_factor * C^images_exponent; the reducible loss is
    proportional to C^-loss_exponent.
    """

    size_factor: float
    size_exponent: float
    images_factor: float
    images_exponent: float
    loss_exponent: float


def solve_frontier(law: PowerLaw, flops_factor: float, flops_exponent: float = 1.0) -> Frontier:
    """Exact minimum of E + A/N^alpha + B/D^beta under C = k N^kappa D, by the derivative along that curve.

    With kappa = 1 and k = 6 this is equation 4 of Hoffmann et al. 2022: N_opt = G (C/6)^(beta/(alpha+beta)),
    G = (alpha A/(beta B))^(1/(alpha+beta)). In an MM-DiT a token crosses a third of a block's parameters, so 6 N D
    overstates FLOPs; k (`flops_factor`) and kappa (`flops_exponent`) are fitted to exact counts by `fit_flops_law`.
    """
    (a, b), (alpha, beta), kappa = law.coefficients, law.exponents, flops_exponent
    joint = alpha + kappa * beta
    log_g = (math.log(alpha * a) - math.log(kappa * beta * b)) / joint
    log_k = math.log(flops_factor)
    log_n = log_g - beta / joint * log_k
    log_d = -log_k - kappa * log_n
    return Frontier(math.exp(log_n), beta / joint, math.exp(log_d), alpha / joint, alpha * beta / joint)


def derive_compute_laws(theta_BQ: Array, flops_factor: float, flops_exponent: float = 1.0) -> Array:
    """(B, 3): parameters (e, a_C, gamma) of L(C) = E + A_C C^-gamma, the loss along the frontier of each L(N,D).

    At the minimum of `solve_frontier` both terms fall with the exponent gamma = alpha beta / (alpha + kappa beta), and
    (B/D^beta) / (A/N^alpha) = alpha / (kappa beta), so the size term alone gives the sum of both.
    """
    e_B, log_a_B, alpha_B, log_b_B, beta_B = theta_BQ.T
    joint_B = alpha_B + flops_exponent * beta_B
    log_g_B = (np.log(alpha_B / (flops_exponent * beta_B)) + log_a_B - log_b_B) / joint_B
    log_n_B = log_g_B - beta_B / joint_B * math.log(flops_factor)
    log_size_term_B = log_a_B - alpha_B * log_n_B
    return np.stack(
        [e_B, log_size_term_B + np.log1p(alpha_B / (flops_exponent * beta_B)), alpha_B * beta_B / joint_B], axis=1
    )


def fit_flops_law(curves: Sequence[LossCurve]) -> tuple[float, float]:
    """FLOPs per image = k N^kappa over the rungs, by least squares on logs."""
    kappa, log_k = np.polyfit(
        np.log([c.parameters for c in curves]), np.log([c.flops_per_image for c in curves]), deg=1
    )
    return float(np.exp(log_k)), float(kappa)
