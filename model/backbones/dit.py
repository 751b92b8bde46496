"""DiT for text to image: text and image tokens in one sequence through one set of weights (SD3 section 5.2.3)."""
# Shapes: B batch, S all tokens (image first), D width.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.backbones.attention import attend
from model.backbones.layers import Modulation, scale_shift
from model.backbones.mmdit import Stream
from model.backbones.trunk import TokenBackbone, TokenConfig
from model.encoders.text import TextCond


class DiTBlockCounts(TokenConfig):
    """The counts of `depth` DiT blocks."""

    def count_block_parameters(self) -> int:
        h = self.width
        return self.depth * (18 * h * h + 15 * h + self.qk_parameters)

    def count_block_multiply_adds(self, tokens: int, text_tokens: int) -> int:
        h, s = self.width, tokens + text_tokens
        return self.depth * (12 * h * h * s + 6 * h * h + 2 * h * s * s)


@dataclass(frozen=True)
class DiTConfig(DiTBlockCounts):
    """MM-DiT with a single stream."""

    @property
    def name(self) -> str:
        return "dit"

    def make_module(self) -> DiT:
        return DiT(self)


class DiTBlock(nn.Module):
    """adaLN-Zero self-attention and MLP over all tokens."""

    def __init__(self, config: TokenConfig):
        super().__init__()
        self.stream = Stream(config)

    def forward(self, x_BSD: Tensor, c_BD: Tensor, bias: Tensor | None = None) -> Tensor:
        shift, scale, gate, *mlp = self.stream.modulate(c_BD)
        q, k, v = self.stream.qkv(scale_shift(self.stream.norm(x_BSD), shift, scale))
        seen = attend(q, k, v, bias)
        x_BSD = torch.addcmul(x_BSD, gate, self.stream.out(seen))
        return self.stream.add_mlp(x_BSD, Modulation(*mlp))


class DiT(TokenBackbone):
    """(x_BCHW, t, text, r) -> prediction_BCHW."""

    config: DiTConfig

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList([DiTBlock(config) for _ in range(config.depth)])
        self.final = self.make_final()

    def forward(self, x_BCHW: Tensor, t: Tensor, text: TextCond, r: Tensor | None = None) -> Tensor:
        self.check_inputs(x_BCHW, t, text, r)
        e = self.embed(x_BCHW, self.embed_times(t, text, r), text)
        x_BSD = torch.cat([e.x_BND, e.y_BLD], dim=1)
        for block in self.blocks:
            x_BSD = self.call(block, x_BSD, e.c_BD, e.bias)
        return self.output(self.final, x_BSD[:, : e.x_BND.shape[1]], e)
