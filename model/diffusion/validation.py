"""Validation loss at fixed noise levels with fixed noise per sample. Protocols have names and are never compared.

`sd3`: t = k/8, k = 1..8, reported as the mean over the first 7. `mlperf`: t = i/8, i = 0..7 (MLPerf Flux.1).
`midpoint`: t = (i + 1/2)/8 (torchtitan). `coupled`: t = k/8, k = 0..8, with the noise that each latent was made of
(held-out couplings of a teacher).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from infra.errors import UserError, nearest
from model.diffusion.flow import Formulation, get_formulation
from model.encoders.text import TextCond
from model.seeding import keyed_normal


class Batch(Protocol):
    """What a batch for validation must have; data_pipeline's LatentBatch is one."""

    @property
    def latent_BCHW(self) -> Tensor: ...

    @property
    def text(self) -> TextCond: ...

    @property
    def positions(self) -> Tensor: ...

    @property
    def noise_BCHW(self) -> Tensor | None: ...


@dataclass(frozen=True)
class ValProtocol:
    """Noise levels, and how many of them (the first ones) enter the mean."""

    levels: tuple[float, ...]
    averaged: int

    def mean(self, losses_BV: Tensor) -> float:
        """One number from losses per sample and level."""
        return losses_BV[:, : self.averaged].double().mean().item()

    def by_sample(self, name: str, losses_BV: Tensor) -> dict[str, Tensor]:
        """The figures of each sample, shape (B): its mean over the levels, under the protocol's name, and its loss at
        each level (t0.125)."""
        levels = {f"t{level:.3f}": losses_BV[:, k] for k, level in enumerate(self.levels)}
        return {name: losses_BV[:, : self.averaged].mean(1), **levels}


def compute_half_interval(loss_B: Tensor) -> float | None:
    """Half the width of a mean's normal 95 % interval: other samples could have been taken. None for a single one."""
    return 1.96 * loss_B.std().item() / len(loss_B) ** 0.5 if len(loss_B) > 1 else None


COUPLED = "coupled"
VAL_PROTOCOLS: dict[str, ValProtocol] = {
    "sd3": ValProtocol(tuple(k / 8 for k in range(1, 9)), 7),
    "mlperf": ValProtocol(tuple(i / 8 for i in range(8)), 8),
    "midpoint": ValProtocol(tuple((i + 0.5) / 8 for i in range(8)), 8),
    COUPLED: ValProtocol(tuple(k / 8 for k in range(9)), 9),
}


def get_protocol(name: str, formulation: Formulation | None = None) -> ValProtocol:
    """The protocol for a formulation. It leaves out levels at which the formulation has no finite loss and that do not
    enter the mean (EDM's sigma is infinite at t = 1).

    A protocol whose mean needs such a level (`mlperf` has t = 0, where EDM's network time is -inf) is refused.
    """
    if name not in VAL_PROTOCOLS:
        raise UserError(f"unknown validation protocol {name!r}{nearest(name, VAL_PROTOCOLS)}")
    protocol = VAL_PROTOCOLS[name]
    if formulation is None:
        return protocol
    for level in protocol.levels[: protocol.averaged]:
        _require_level(formulation, level)
    averaged, rest = protocol.levels[: protocol.averaged], protocol.levels[protocol.averaged :]
    return ValProtocol((*averaged, *(level for level in rest if _has_level(formulation, level))), protocol.averaged)


@dataclass(frozen=True)
class ValSettings:
    """What a validation loss is measured with. Trainer and eval share the defaults: rows of both are one curve."""

    samples: int = 2048
    batch: int = 32
    """Images per forward pass: fixed, so that the figures do not depend on the number of ranks."""
    protocol: str = "sd3"
    seed: int = 0

    def hash(self, *, samples: int, formulation: str, fingerprint: str) -> str:
        """16 hex digits that name everything that a loss depends on besides the weights. `samples`: how many the data
        had; `fingerprint`: the dataset's."""
        stated = [self.protocol, get_protocol(self.protocol).levels, samples, self.seed, formulation, fingerprint]
        return hashlib.sha256(json.dumps(stated).encode()).hexdigest()[:16]


def _has_level(formulation: Formulation, t: float) -> bool:
    level = formulation.path.level(torch.tensor(t, dtype=torch.float64))
    return all(bool(torch.isfinite(x)) for x in (level.a, level.b, level.network_time, level.input_scale))


def _require_level(formulation: Formulation, t: float) -> None:
    if not _has_level(formulation, t):
        raise UserError(f"{formulation.name} has no noise level t={t:g} to validate at; use protocol sd3 or midpoint")


@torch.no_grad()
def compute_validation_losses(
    predict: Callable[[Tensor, Tensor, TextCond], Tensor],
    batch: Batch,
    levels: tuple[float, ...],
    seed: int,
    *,
    formulation: Formulation | str = "rf",
) -> Tensor:
    """Loss per sample and level, float64 (B, len(levels)), on the CPU; noise is keyed by (seed, position, level), or
    the batch's own where its latents are coupled to it."""
    form = get_formulation(formulation) if isinstance(formulation, str) else formulation
    x0 = batch.latent_BCHW
    columns = []
    for level in levels:
        _require_level(form, level)
        noise = batch.noise_BCHW
        if noise is None:
            noise = keyed_normal(seed, batch.positions, f"validation/{level:.6f}", x0.shape[1:])
        noise = noise.to(x0.device, x0.dtype)
        t_B = torch.full((len(x0),), level, dtype=torch.float64)
        sample = form.sample(x0, noise, t_B)
        prediction = predict(sample.model_input, sample.network_time_B, batch.text)
        columns.append(form.compute_loss_B(prediction.double(), sample).cpu())
    return torch.stack(columns, dim=1)
