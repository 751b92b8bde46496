"""What the trainer and the samplers may assume about a network, and the dict of networks that exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from model.cross_dit import CrossDiTConfig
from model.dit import DiTConfig
from model.errors import ModelError, hint
from model.mmdit import MMDiTConfig
from model.mmdit3 import MMDiT3Config
from model.text import TextCond
from model.trunk import TokenConfig
from model.uvit import UViTConfig


class Backbone(Protocol):
    """Latents, network time and text in, a prediction of the latents' shape out."""

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, text: TextCond) -> Tensor: ...


BACKBONES: dict[str, Callable[[dict[str, Any]], TokenConfig]] = {
    "mmdit": MMDiTConfig.from_json,
    "mmdit3": MMDiT3Config.from_json,
    "dit": DiTConfig.from_json,
    "cross_dit": CrossDiTConfig.from_json,
    "uvit": UViTConfig.from_json,
}


def config_from_json(backbone: str, config: dict[str, Any]) -> TokenConfig:
    """The config of a backbone by its registered name."""
    if backbone not in BACKBONES:
        raise ModelError(f"unknown backbone {backbone!r}{hint(backbone, BACKBONES)}; known: {', '.join(BACKBONES)}")
    return BACKBONES[backbone](config)
