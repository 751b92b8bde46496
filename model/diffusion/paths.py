"""Forward processes z_t = a_t x0 + b_t noise, from data (t=0) to noise (t=1): rectified flow, cosine, LDM-linear, EDM.

Besides `level(t)` each path can be entered by its noise-to-signal ratio b/a, which is how EDM and the discrete linear
schedule are sampled. All in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from infra.errors import UserError
from model.diffusion.timesteps import require_finite

SIGMA_DATA = 0.5  # of latents, as EDM assumes it of images (arXiv 2206.00364, table 1)


@dataclass(frozen=True)
class Level:
    """One noise level per sample: z = a x0 + b noise, the time value given to the network, the factor on its input."""

    a: Tensor
    b: Tensor
    network_time: Tensor
    input_scale: Tensor


class Path(Protocol):
    """A forward process; `formula` is for people."""

    @property
    def formula(self) -> str: ...

    def level(self, t: Tensor) -> Level:
        """Noise levels at times in [0, 1], in the shape of `t`."""
        ...

    def slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(da/dt, db/dt)."""
        ...

    def level_of_ratio(self, ratio: Tensor) -> Level:
        """Noise levels where b/a is `ratio`."""
        ...

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        """The times at which b/a is `ratio`."""
        ...


@dataclass(frozen=True)
class RectifiedFlow:
    """The straight line: a = 1 - t, b = t."""

    formula: str = "a=1-t, b=t"

    def level(self, t: Tensor) -> Level:
        return Level(1 - t, t, t, torch.ones_like(t))

    def slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        return ratio / (1 + ratio)

    def level_of_ratio(self, ratio: Tensor) -> Level:
        return self.level(self.time_of_ratio(ratio))


@dataclass(frozen=True)
class Cosine:
    """Variance preserving on a quarter circle."""

    formula: str = "a=cos(pi t/2), b=sin(pi t/2)"

    def level(self, t: Tensor) -> Level:
        return Level(torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t), t, torch.ones_like(t))

    def slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -math.pi / 2 * torch.sin(math.pi / 2 * t), math.pi / 2 * torch.cos(math.pi / 2 * t)

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(ratio)

    def level_of_ratio(self, ratio: Tensor) -> Level:
        return self.level(self.time_of_ratio(ratio))


@dataclass(frozen=True)
class Linear:
    """The discrete schedule of latent diffusion: 1000 levels, betas squared-linear from 0.00085 to 0.012.

    Level k sits at t = k/1000; between levels log(b/a) is interpolated, which only solvers with free steps see.
    """

    num_levels: int = 1000
    beta_first: float = 0.00085
    beta_last: float = 0.012
    formula: str = "a=sqrt(prod(1-beta)), b=sqrt(1-a^2), 1000 levels"

    @cached_property
    def log_ratio_T(self) -> Tensor:
        root = torch.linspace(self.beta_first**0.5, self.beta_last**0.5, self.num_levels, dtype=torch.float64)
        # ln a^2, as a sum of logs: 1 - a^2 of the first levels, next to 0, keeps its digits through expm1.
        log_signal = torch.log1p(-(root**2)).cumsum(0)
        return 0.5 * (torch.log(-torch.expm1(log_signal)) - log_signal)

    def ratio_of_level(self, k: Tensor) -> Tensor:
        return torch.exp(self.log_ratio_T[k])

    def _locate(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(log ratio, its slope per unit of t, level as a real number) by linear interpolation."""
        table = self.log_ratio_T.to(t.device)
        k = (t.double() * self.num_levels).clamp(0, self.num_levels - 1)
        # Times are built as k/1000 and come back with rounding: snap, or level k would be read just below k.
        k = torch.where((k - k.round()).abs() < 1e-6, k.round(), k)
        below = k.floor().long().clamp(max=self.num_levels - 2)
        step = table[below + 1] - table[below]
        return table[below] + (k - below) * step, step * self.num_levels, k

    def level(self, t: Tensor) -> Level:
        log_ratio, _, k = self._locate(t)
        return self._level(log_ratio, k / self.num_levels)

    def _level(self, log_ratio: Tensor, t: Tensor) -> Level:
        return Level(torch.sigmoid(-2 * log_ratio).sqrt(), torch.sigmoid(2 * log_ratio).sqrt(), t, torch.ones_like(t))

    def slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_ratio, rate, _ = self._locate(t)
        a, b = torch.sigmoid(-2 * log_ratio).sqrt(), torch.sigmoid(2 * log_ratio).sqrt()
        return -a * b * b * rate, a * a * b * rate

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        table = self.log_ratio_T.to(ratio.device)
        wanted = torch.log(ratio.double())
        above = torch.searchsorted(table, wanted).clamp(1, self.num_levels - 1)
        low, high = table[above - 1], table[above]
        k = (above - 1 + (wanted - low) / (high - low)).clamp(0, self.num_levels - 1)
        return k / self.num_levels

    def level_of_ratio(self, ratio: Tensor) -> Level:
        return self._level(torch.log(ratio.double()), self.time_of_ratio(ratio))


@dataclass(frozen=True)
class EDM:
    """a = 1, b = sigma(t), with EDM's input scaling and c_noise; `law` says how sigma depends on uniform t."""

    law: str = "normal"
    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        require_finite(f"edm({self.mean},{self.std})", self.mean, self.std)
        if self.std <= 0:
            raise UserError(f"edm P_s is {self.std}, expected a positive number")

    @property
    def formula(self) -> str:
        sigma = {"normal": f"exp(quantile(t; N({self.mean:g},{self.std:g}^2)))", "rf": "t/(1-t)", "cos": "tan(pi t/2)"}
        return f"a=1, b={sigma[self.law]}"

    def _sigma(self, t: Tensor) -> Tensor:
        if self.law == "normal":
            return torch.exp(self.mean + self.std * torch.special.ndtri(t.double()))
        return t / (1 - t) if self.law == "rf" else torch.tan(math.pi / 2 * t)

    def level(self, t: Tensor) -> Level:
        return self.level_of_ratio(self._sigma(t))

    def slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.law == "normal":
            # dsigma/dt = sigma * std / pdf of the standard normal at its quantile.
            quantile = torch.special.ndtri(t.double())
            rate = self._sigma(t) * self.std * math.sqrt(2 * math.pi) * torch.exp(0.5 * quantile**2)
        else:
            rate = (1 - t) ** -2 if self.law == "rf" else math.pi / 2 / torch.cos(math.pi / 2 * t) ** 2
        return torch.zeros_like(t), rate

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        if self.law == "normal":
            return torch.special.ndtr((torch.log(ratio) - self.mean) / self.std)
        return ratio / (1 + ratio) if self.law == "rf" else 2 / math.pi * torch.atan(ratio)

    def level_of_ratio(self, ratio: Tensor) -> Level:
        # c_in and c_noise of EDM (arXiv 2206.00364, table 1).
        scale = (ratio**2 + SIGMA_DATA**2) ** -0.5
        return Level(torch.ones_like(ratio), ratio, torch.log(ratio) / 4, scale)
