"""Timestep densities on (0, 1) as pairs of a map u -> t and its exact pdf, and the resolution shift (SD3 3.1, 5.3.2).

To add a density: a function that returns a Density, one line in DENSITIES. Everything is float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from infra.errors import UserError, nearest

MODE_LIMIT = 2 / (math.pi - 2)


@dataclass(frozen=True)
class Density:
    """t = draw(u) for u ~ U(0, 1) has density pdf(t)."""

    name: str
    draw: Callable[[Tensor], Tensor]
    pdf: Callable[[Tensor], Tensor]


def format_number(x: float) -> str:
    """A number as it stands in names of densities: two decimals, or more if two are not exact."""
    return f"{x:.2f}" if float(f"{x:.2f}") == x else repr(float(x))


def require_finite(name: str, *numbers: float) -> None:
    """Refuse nan and infinity among a density's parameters."""
    if not all(math.isfinite(number) for number in numbers):
        raise UserError(f"{name}: expected finite numbers")


def make_uniform() -> Density:
    return Density("uniform", lambda u: u, torch.ones_like)


# The three densities below: SD3 section 3.1. Drawing t from pdf(t) is the loss weight t/(1-t) * pdf(t) (eq. 18), so it
# must not be applied a second time as a factor on the loss.
def make_lognorm(mean: float, std: float) -> Density:
    """Logit-normal: logit(t) ~ N(mean, std**2); mean < 0 favours data, > 0 noise."""
    require_finite(f"lognorm({mean},{std})", mean, std)
    if std <= 0:
        raise UserError(f"lognorm std is {std}, expected a positive number")

    def pdf(t: Tensor) -> Tensor:
        z = (torch.logit(t) - mean) / std
        return torch.exp(-0.5 * z * z) / (std * math.sqrt(2 * math.pi) * t * (1 - t))

    name = f"lognorm({format_number(mean)},{format_number(std)})"
    return Density(name, lambda u: torch.sigmoid(mean + std * torch.special.ndtri(u)), pdf)


def _map_mode(u: Tensor, scale: float) -> Tensor:
    # f(u; s) of SD3 section 3.1. It falls: u = 0 is noise, u = 1 is data.
    return 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


def _invert_mode(t: Tensor, scale: float) -> Tensor:
    """u with f(u) = t by bisection: f falls from 1 to 0 and is flat at 1/2 for the largest scale, so no Newton."""
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):
        middle = (low + high) / 2
        above = _map_mode(middle, scale) > t
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def make_mode(scale: float) -> Density:
    """Mode sampling with heavy tails: scale > 0 favours the middle, < 0 the ends. Monotone only inside the limits."""
    if not -1 <= scale <= MODE_LIMIT:
        raise UserError(f"mode scale is {scale}, expected -1 <= s <= 2/(pi-2) = {MODE_LIMIT:.4f}")

    def pdf(t: Tensor) -> Tensor:
        # 1/|f'(u)| at u = f^-1(t): the density of a transformed uniform variable.
        slope = 1 + scale - math.pi / 2 * scale * torch.sin(math.pi * _invert_mode(t, scale))
        return 1 / slope

    return Density(f"mode({format_number(scale)})", lambda u: _map_mode(u, scale), pdf)


def make_cosmap() -> Density:
    """t whose rectified-flow log-SNR is distributed as that of the cosine schedule under uniform t."""
    return Density(
        "cosmap",
        lambda u: 1 - 1 / (torch.tan(math.pi / 2 * u) + 1),
        lambda t: 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t * t),
    )


def make_ushape(a: float) -> Density:
    """Dense at both ends, where the loss of reflow is largest: pdf a (e^(at) + e^(a(1-t))) / (2 (e^a - 1)).

    2-rectified flow++ (arXiv 2405.20320) with a = 4, as its code draws it: half from e^(at), half mirrored. The formula
    it prints, e^(at) + e^(-at), is monotone on [0, 1] and is not what was trained.
    """
    require_finite(f"ushape({a})", a)
    if not 0 < a <= 100:
        raise UserError(f"ushape is {a}, expected a number above 0 and at most 100")
    top = math.exp(a)

    def draw(u: Tensor) -> Tensor:
        # CDF (y - 1 + e^a - e^a / y) / (2 (e^a - 1)) = u with y = e^(at): quadratic in y, its positive root.
        b = (top - 1) * (1 - 2 * u)
        root = torch.sqrt(b * b + 4 * top)
        return torch.log(torch.where(b > 0, 2 * top / (b + root), (root - b) / 2)) / a

    def pdf(t: Tensor) -> Tensor:
        return a * (torch.exp(a * t) + torch.exp(a * (1 - t))) / (2 * (top - 1))

    return Density(f"ushape({format_number(a)})", draw, pdf)


DENSITIES: dict[str, Callable[..., Density]] = {
    "uniform": make_uniform,
    "lognorm": make_lognorm,
    "mode": make_mode,
    "cosmap": make_cosmap,
    "ushape": make_ushape,
}

_CALL = re.compile(r"^([a-z][a-z0-9_]*)(?:\(([^()]*)\))?$")


def parse_call(name: str) -> tuple[str, tuple[float, ...]]:
    """ "lognorm(0.5,1)" -> ("lognorm", (0.5, 1.0))."""
    match = _CALL.match(name)
    try:
        assert match is not None
        return match[1], tuple(float(x) for x in match[2].split(",")) if match[2] else ()
    except (AssertionError, ValueError):
        raise UserError(f"cannot read {name!r}; expected name or name(number,...)") from None


def get_density(name: str) -> Density:
    """A density by name and parameters, as in "lognorm(0.00,1.00)"."""
    family, numbers = parse_call(name)
    if family not in DENSITIES:
        known = ", ".join(DENSITIES)
        raise UserError(f"unknown timestep density {family!r}{nearest(family, DENSITIES)}; known: {known}")
    try:
        return DENSITIES[family](*numbers)
    except TypeError:
        raise UserError(f"timestep density {name!r}: {len(numbers)} parameters do not fit {family}") from None
    except ArithmeticError as error:
        raise UserError(f"timestep density {name!r}: {error}") from None


def require_shift(shift: float) -> None:
    """Refuse a resolution shift that is no positive number."""
    if not 0 < shift < math.inf:
        raise UserError(f"resolution shift is {shift}, expected a positive number")


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """t at n pixels to the t of equal uncertainty at m pixels, shift = sqrt(m/n) (eq. 23)."""
    require_shift(shift)
    return shift * t / (1 + (shift - 1) * t)
