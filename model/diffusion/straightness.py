"""How straight a flow is, exactly: the straightness S(Z), the length of its paths, and how they bend, by t.

The paths are solved by adaptive Runge-Kutta (Dormand-Prince) and the velocity is read at Gauss-Legendre points between
equal steps of t. So the integrals are exact up to the solver's tolerance wherever the flow is smooth between two steps.
"""
# Shapes: B batch, K intervals of t, G Gauss points of an interval, N numbers of a latent.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infra.errors import UserError
from model.diffusion.flow import Formulation, get_formulation
from model.diffusion.grids import integrates_over_sigma
from model.diffusion.sampler import Predict, add_guidance, compute_path_slope, integrate_adaptive
from model.encoders.text import TextCond


@dataclass(frozen=True)
class Straightness:
    """Of each path (B), and of each interval of t (B, K), from noise to data; float64."""

    edges: Tensor
    """The intervals' ends, K + 1 falling numbers from 1 to 0."""
    straightness_BK: Tensor
    """Integral of |(Z1 - Z0) - v|^2 over each interval: the sum is S(Z) of rectified flow (arXiv 2209.03003, eq. 5)."""
    length_BK: Tensor
    """Integral of |v|. The sum over the displacement is 1 for a straight path."""
    bend_BK: Tensor
    """Integral of |dv/dt| along the path: 0 for a straight path at constant speed."""
    displacement_B: Tensor
    """|Z1 - Z0|."""

    @property
    def straightness_B(self) -> Tensor:
        return self.straightness_BK.sum(1)

    @property
    def length_B(self) -> Tensor:
        return self.length_BK.sum(1)


@torch.no_grad()
def measure_straightness(
    model_fn: Predict,
    noise_BCHW: Tensor,
    text: TextCond,
    uncond: TextCond | None = None,
    *,
    guidance: float = 1.0,
    formulation: Formulation | str = "rf",
    intervals: int = 8,
    points: int = 4,
    tolerance: float = 1e-5,
) -> Straightness:
    """The flow from `noise_BCHW` to data. Norms are over all numbers of a latent, not means.

    UserError for a formulation that is not integrated over t: lines are straight in t alone.
    """
    form = get_formulation(formulation) if isinstance(formulation, str) else formulation
    if integrates_over_sigma(form):
        raise UserError(f"straightness of {form.name}: it is integrated over sigma, not over t; take a rectified flow")
    if intervals < 1 or points < 2:
        raise UserError(f"straightness with {intervals} intervals of {points} points; expected at least 1 of 2")
    predict = add_guidance(model_fn, text, uncond, guidance)
    edges = torch.linspace(1, 0, intervals + 1, dtype=torch.float64)
    node_G, weight_G, derive_GG = _list_gauss_points(points)
    width = 1.0 / intervals
    t_KG = edges[:-1, None] - width * node_G
    kept = torch.cat([edges[:1], t_KG.flatten(), edges[-1:]])
    states = integrate_adaptive(
        lambda y, at: compute_path_slope(form, predict, y, at), noise_BCHW, kept, tolerance=tolerance
    )
    displacement_BN = (states[0] - states[-1]).flatten(1).double()
    found = []
    for k in range(intervals):
        inner = states[1 + k * points : 1 + (k + 1) * points]
        velocity_GBN = torch.stack(
            [compute_path_slope(form, predict, z, t).flatten(1).double() for z, t in zip(inner, t_KG[k])]
        )
        weights = (width * weight_G).to(velocity_GBN.device)
        turn_GBN = torch.einsum("gh,hbn->gbn", derive_GG.to(velocity_GBN.device), velocity_GBN) / width
        integrands = ((displacement_BN - velocity_GBN).square().sum(2), velocity_GBN.norm(dim=2), turn_GBN.norm(dim=2))
        found.append([weights @ values_GB for values_GB in integrands])
    straightness_BK, length_BK, bend_BK = (torch.stack(column, dim=1).cpu() for column in zip(*found))
    return Straightness(edges, straightness_BK, length_BK, bend_BK, displacement_BN.norm(dim=1).cpu())


def _list_gauss_points(points: int) -> tuple[Tensor, Tensor, Tensor]:
    """(points, weights, derivatives of the polynomial through values at the points) on [0, 1]."""
    node, weight = np.polynomial.legendre.leggauss(points)
    node = (node + 1) / 2
    powers = np.vander(node, increasing=True)
    slopes = np.zeros_like(powers)
    slopes[:, 1:] = powers[:, :-1] * np.arange(1, points)
    return torch.from_numpy(node), torch.from_numpy(weight / 2), torch.from_numpy(slopes @ np.linalg.inv(powers))
