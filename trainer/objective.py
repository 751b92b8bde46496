"""What is minimised. `pretrain`: the formulation's loss at random times; each draw is keyed by a sample's position.

The other objective, on pairs, is in dpo.py.
"""
# Shapes: B batch, C latent channels, H and W latent height and width.

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.loading.batch import LatentBatch
from model.diffusion.flow import Formulation
from model.encoders.text import TextCond
from model.seeding import keyed_normal, keyed_uniform

Predict = Callable[[Tensor, Tensor, TextCond], Tensor]


class Losses(NamedTuple):
    """Loss of each sample (or pair) in fp32, and the time up to which noise was added."""

    loss_B: Tensor
    t_B: Tensor
    figures: Mapping[str, Tensor] = MappingProxyType({})
    """Further figures of each sample, whose means are logged."""


def pretrain(
    predict: Predict, batch: LatentBatch, *, formulation: Formulation, seed: int, shift: float, device: torch.device
) -> Losses:
    """Loss per sample. Times and noise depend on (seed, position) only, never on rank or batch."""
    x0_BCHW = batch.latent_BCHW.to(device, non_blocking=True)
    t_B = formulation.timesteps(keyed_uniform(seed, batch.positions, "timestep"), shift)
    noise_BCHW = keyed_normal(seed, batch.positions, "noise", x0_BCHW.shape[1:]).to(device, non_blocking=True)
    drawn = formulation.sample(x0_BCHW, noise_BCHW, t_B)
    prediction_BCHW = predict(drawn.model_input, drawn.network_time_B, batch.text.to(device))
    return Losses(formulation.loss_B(prediction_BCHW, drawn), t_B)
