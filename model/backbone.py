"""What the trainer and the samplers may assume about a network, and the dict of networks that exist."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from infra.errors import UserError, nearest
from model.backbones.cross_dit import CrossDiTConfig
from model.backbones.dit import DiTConfig
from model.backbones.mmdit import MMDiTConfig
from model.backbones.mmdit3 import MMDiT3Config
from model.backbones.trunk import TokenConfig
from model.backbones.uvit import UViTConfig
from model.encoders.text import TextCond


class Backbone(Protocol):
    """Latents, network time and text in, a prediction of the latents' shape out.

    `t` has a number for each sample (B), or for each image token (B, N). `r`, of the same shape, is the second time of
    average velocities; None means r = t.
    """

    def __call__(self, x_BCHW: Tensor, t: Tensor, text: TextCond, r: Tensor | None = None) -> Tensor: ...


BACKBONES: dict[str, type[TokenConfig]] = {
    "mmdit": MMDiTConfig,
    "mmdit3": MMDiT3Config,
    "dit": DiTConfig,
    "cross_dit": CrossDiTConfig,
    "uvit": UViTConfig,
}


def read_config(backbone: str, config: dict[str, Any]) -> TokenConfig:
    """The config of a backbone by its registered name."""
    if backbone not in BACKBONES:
        raise UserError(f"unknown backbone {backbone!r}{nearest(backbone, BACKBONES)}; known: {', '.join(BACKBONES)}")
    return BACKBONES[backbone].from_json(config)
