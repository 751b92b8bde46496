"""What the trainer and the samplers may assume about a network, and the dict of networks that exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from model.errors import ModelError, hint
from model.mmdit import MMDiTConfig
from model.text import TextCond


class Backbone(Protocol):
    """Latents, network time and text in, a prediction of the latents' shape out."""

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, text: TextCond) -> Tensor: ...


class BackboneConfig(Protocol):
    """Frozen, JSON-able description; `.build()` makes the module with weights drawn from `seed`."""

    @property
    def name(self) -> str: ...

    @property
    def width(self) -> int: ...

    def build(self, *, seed: int = 0) -> nn.Module: ...

    def to_json(self) -> dict[str, Any]: ...

    def forward_flops(self, height: int, width: int, text_tokens: int) -> int: ...

    def backward_flops(self, height: int, width: int, text_tokens: int) -> int: ...

    def parameter_count(self) -> int: ...


BACKBONES: dict[str, Callable[[dict[str, Any]], BackboneConfig]] = {
    "mmdit": MMDiTConfig.from_json,
}


def config_from_json(backbone: str, config: dict[str, Any]) -> BackboneConfig:
    """The config of a backbone by its registered name."""
    if backbone not in BACKBONES:
        raise ModelError(f"unknown backbone {backbone!r}{hint(backbone, BACKBONES)}; known: {', '.join(BACKBONES)}")
    return BACKBONES[backbone](config)
