"""Where samplers evaluate: the coordinate in which each formulation is integrated, and the named grids on it.

Rectified flow and cosine are integrated over t. EDM and the discrete linear schedule are integrated over the ratio
b/a (sigma), in y = z/a, where dy/dsigma is the predicted noise (Euler there is DDIM). All grids end at 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from infra.errors import UserError
from model.diffusion.flow import Formulation
from model.diffusion.paths import EDM, Cosine, Level, Linear
from model.diffusion.timesteps import require_shift, shift_timesteps

Grid = Literal["default", "released"]

# eps/cos divides by a, which is 0 at t = 1: start one thousandth before.
COSINE_EPS_START = 0.999
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # EDM (arXiv 2206.00364), table 1 and eq. 5


def integrates_over_sigma(formulation: Formulation) -> bool:
    """Is it integrated over sigma = b/a, not over t?"""
    return isinstance(formulation.path, (EDM, Linear))


def find_lowest_ratio(formulation: Formulation) -> float:
    """The smallest sigma above 0 of a formulation that is integrated over sigma."""
    path = formulation.path
    return path.log_ratio_T[0].exp().item() if isinstance(path, Linear) else SIGMA_MIN


def get_level(formulation: Formulation, coordinate: Tensor) -> Level:
    """The noise level at a point of the sampling coordinate."""
    path = formulation.path
    return path.level_of_ratio(coordinate) if integrates_over_sigma(formulation) else path.level(coordinate)


def make_sampling_grid(formulation: Formulation, steps: int, *, shift: float = 1.0, grid: Grid = "default") -> Tensor:
    """steps + 1 falling coordinates, float64, from the terminal noise level to 0."""
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"sampling with {steps} steps; expected an integer of at least 1")
    require_shift(shift)
    if grid == "released":
        return make_released_grid(formulation, steps, shift)
    if grid != "default":
        raise UserError(f"unknown sampling grid {grid!r}; known: default, released")
    path = formulation.path
    zero = torch.zeros(1, dtype=torch.float64)
    if isinstance(path, EDM):
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64) if steps > 1 else zero
        high, low = (SIGMA_MAX * shift) ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
        return torch.cat([(high + ramp * (low - high)) ** RHO, zero])
    if isinstance(path, Linear):
        # "Trailing" spacing: starts at the last level, so the terminal noise level is the one of training.
        k = torch.linspace(path.num_levels, 0, steps + 1, dtype=torch.float64)[:-1].round().long() - 1
        return torch.cat([shift * path.ratio_of_level(k.clamp(min=0)), zero])
    start = COSINE_EPS_START if isinstance(path, Cosine) and formulation.target == "eps" else 1.0
    t = torch.linspace(start, 0, steps + 1, dtype=torch.float64)
    if shift == 1.0:
        return t
    if isinstance(path, Cosine):
        inner = path.time_of_ratio(shift * torch.tan(torch.pi / 2 * t[t < 1]))
        return torch.cat([t[t >= 1], inner])
    return shift_timesteps(t, shift)


def make_released_grid(formulation: Formulation, steps: int, shift: float) -> Tensor:
    """The steps that sd3-ref and diffusers really take: their table of 1000 levels is shifted already, and the points
    picked between its ends are shifted a second time."""
    if integrates_over_sigma(formulation) or isinstance(formulation.path, Cosine):
        raise UserError(f"grid released is SD3's and needs a rectified flow, not {formulation.name}")
    first = torch.ones(1, dtype=torch.float64)
    last = shift_timesteps(first / 1000, shift)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64) if steps > 1 else 0 * first
    return torch.cat([shift_timesteps(first + ramp * (last - first), shift), 0 * first])


def make_start_state(formulation: Formulation, noise: Tensor, coordinate: Tensor) -> Tensor:
    """The state that replaces a noised image at the terminal level: z = noise, or sigma * noise for EDM."""
    if isinstance(formulation.path, EDM):
        return noise * coordinate.to(noise.dtype)
    if isinstance(formulation.path, Linear):
        return noise * (1 + coordinate**2).sqrt().to(noise.dtype)
    return noise.clone()
