"""Exponential moving averages of the weights. Each rank averages its own share of the fp32 masters, without
collectives.

A profile costs 4 bytes per parameter, divided by the number of ranks. Power-function profiles follow EDM2 (arXiv
2312.02696, section 3.1 and appendix C). `decay:0.99@102400` is the classic average, here updated every 102,400 images.
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
    """How fast an average forgets: a power function (`gamma`), or a constant `factor`, used once `every` so many
    images."""

    name: str
    gamma: float | None = None
    factor: float | None = None
    every: int | None = None

    def compute_beta(self, images_seen: int, batch: int) -> float:
        """Weight of the old average after a step, 0 to 1, when training has seen `images_seen` images, `batch` of them
        in this step. 1 means no update. Power profile: (1 - batch/images_seen)^(gamma + 1), the update of EDM2's
        section 3.1."""
        if self.gamma is not None:
            return (1 - min(batch / images_seen, 1.0)) ** (self.gamma + 1)
        assert self.factor is not None
        if self.every is None:
            return self.factor
        return self.factor if images_seen // self.every > (images_seen - batch) // self.every else 1.0


def solve_gamma(width: float) -> float:
    """Exponent of the power profile whose standard deviation is `width` of the run.

    EDM2 eq. 126: width^2 = (g+1) / ((g+2)^2 (g+3)), that is g^3 + 7 g^2 + (16 - width^-2) g + 12 - width^-2 = 0.
    """
    roots = np.roots([1.0, 7.0, 16.0 - width**-2, 12.0 - width**-2])
    return float(roots.real.max())


def parse_profile(text: str) -> EMAProfile:
    """The profile that a text such as `power:0.10`, `decay:0.999` or `decay:0.99@102400` names; UserError for
    others."""
    found = re.fullmatch(r"(power|decay):([0-9.]+)(?:@([0-9]+))?", text)
    try:
        if not found:
            raise ValueError
        value, every = float(found[2]), int(found[3]) if found[3] else None
    except ValueError:
        raise UserError(f"EMA profile {text!r} is not understood, expected {FORMS}") from None
    if found[1] == "power" and 0 < value < 0.28 and every is None:
        return EMAProfile(text, gamma=solve_gamma(value))
    if found[1] == "decay" and 0 < value < 1 and every != 0:
        return EMAProfile(text, factor=value, every=every)
    raise UserError(f"EMA profile {text!r} is out of range, expected {FORMS}")


class ShardedEMA:
    """For each profile one flat tensor per master of this rank, in the same layout (`shards[profile name]`)."""

    def __init__(self, profiles: Sequence[str], masters: Sequence[Tensor]) -> None:
        self.profiles = [parse_profile(text) for text in profiles]
        self.shards = {p.name: [m.detach().clone() for m in masters] for p in self.profiles}

    @torch.no_grad()
    def update(self, masters: Sequence[Tensor], images_seen: int, batch: int) -> None:
        """Take the masters into all averages. Call it after each step; `images_seen` and `batch`: see
        `compute_beta`."""
        for profile in self.profiles:
            beta = profile.compute_beta(images_seen, batch)
            if beta < 1:
                torch._foreach_lerp_(self.shards[profile.name], list(masters), 1 - beta)

    @property
    def first(self) -> list[Tensor]:
        """The average under the recipe's first profile: the one that is validated and exported."""
        return self.shards[self.profiles[0].name]
