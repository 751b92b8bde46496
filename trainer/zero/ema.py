"""Exponential moving averages on each rank's own fp32 partition: no collective, no full copy.

4 bytes per parameter, profile and rank's share. Power-function profiles follow EDM2 (arXiv 2312.02696, section 3.1 and
appendix C); `decay:0.99@102400` is the classic average, updated every so many images.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infra.errors import UserError

FORMS = "power:WIDTH (0 < WIDTH < 0.28), decay:FACTOR or decay:FACTOR@IMAGES (0 < FACTOR < 1)"


@dataclass(frozen=True)
class EMAProfile:
    """How much of the old average survives an update."""

    name: str
    gamma: float | None = None
    factor: float | None = None
    every: int | None = None

    def beta(self, images_seen: int, batch: int) -> float:
        """Weight of the old average when `images_seen` images are behind, `batch` of them new; 1 means no update."""
        if self.gamma is not None:
            return (1 - min(batch / images_seen, 1.0)) ** (self.gamma + 1)
        assert self.factor is not None
        if self.every is None:
            return self.factor
        return self.factor if images_seen // self.every > (images_seen - batch) // self.every else 1.0


def gamma_of_width(width: float) -> float:
    """Exponent of the power profile whose standard deviation is `width` of the run.

    EDM2 eq. 126: width^2 = (g+1) / ((g+2)^2 (g+3)), that is g^3 + 7 g^2 + (16 - width^-2) g + 12 - width^-2 = 0.
    """
    roots = np.roots([1.0, 7.0, 16.0 - width**-2, 12.0 - width**-2])
    return float(roots.real.max())


def parse_profile(text: str) -> EMAProfile:
    """`power:0.10`, `decay:0.999`, `decay:0.99@102400`."""
    found = re.fullmatch(r"(power|decay):([0-9.]+)(?:@([0-9]+))?", text)
    try:
        if not found:
            raise ValueError
        value, every = float(found[2]), int(found[3]) if found[3] else None
    except ValueError:
        raise UserError(f"EMA profile {text!r} is not understood, expected {FORMS}") from None
    if found[1] == "power" and 0 < value < 0.28 and every is None:
        return EMAProfile(text, gamma=gamma_of_width(value))
    if found[1] == "decay" and 0 < value < 1 and every != 0:
        return EMAProfile(text, factor=value, every=every)
    raise UserError(f"EMA profile {text!r} is out of range, expected {FORMS}")


class ShardedEMA:
    """One list of shards per profile, laid out as the masters are."""

    def __init__(self, profiles: Sequence[str], masters: Sequence[Tensor]) -> None:
        self.profiles = [parse_profile(text) for text in profiles]
        self.shards = {p.name: [m.detach().clone() for m in masters] for p in self.profiles}

    @torch.no_grad()
    def update(self, masters: Sequence[Tensor], images_seen: int, batch: int) -> None:
        """After each step."""
        for profile in self.profiles:
            beta = profile.beta(images_seen, batch)
            if beta < 1:
                torch._foreach_lerp_(self.shards[profile.name], list(masters), 1 - beta)

    @property
    def first(self) -> list[Tensor]:
        """The profile that is validated and exported."""
        return self.shards[self.profiles[0].name]
