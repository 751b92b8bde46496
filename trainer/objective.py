"""What is minimised. `pretrain`: the formulation's loss at random times (feed.py draws them).

The other objective, on pairs, is in dpo.py.
"""
# Shapes: B batch, C latent channels, H and W latent height and width.

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from model.diffusion.flow import Formulation
from model.encoders.text import TextCond
from trainer.feed import Micro

Predict = Callable[[Tensor, Tensor, TextCond], Tensor]


class Losses(NamedTuple):
    """Loss of each sample (or pair) in fp32, and the time up to which noise was added."""

    loss_B: Tensor
    t_B: Tensor
    figures: Mapping[str, Tensor] = MappingProxyType({})
    """Further figures of each sample, whose means are logged."""


def pretrain(predict: Predict, micro: Micro, *, formulation: Formulation, device: torch.device) -> Losses:
    """Loss per sample."""
    given = micro.to(device)
    sample = formulation.sample(given.x0_BCHW, given.noise_BCHW, given.t_B)
    prediction_BCHW = predict(sample.model_input, sample.network_time_B, given.text)
    return Losses(formulation.loss_B(prediction_BCHW, sample), micro.t_B)
