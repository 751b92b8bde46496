"""CrossDiT: DiT over image tokens that reads the text through cross-attention (SD3 section 5.2.3).

The cross-attention follows PixArt: between self-attention and MLP, not modulated, its output starting at zero.
"""
# Shapes: B batch, N image tokens, L text tokens, D width, H heads, K head width.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.backbones.attention import attend
from model.backbones.layers import Modulation, XavierLinear, ZeroLinear, scale_shift, split_condition
from model.backbones.mmdit import Stream
from model.backbones.norms import make_layer_norm, make_rms_norm
from model.backbones.trunk import TokenBackbone, TokenConfig
from model.encoders.text import TextCond


@dataclass(frozen=True)
class CrossDiTConfig(TokenConfig):
    """DiT with cross-attention."""

    @property
    def name(self) -> str:
        return "cross_dit"

    def make_module(self) -> CrossDiT:
        return CrossDiT(self)

    def count_block_parameters(self) -> int:
        h = self.width
        return self.depth * (22 * h * h + 19 * h + 2 * self.qk_parameters)

    def count_block_multiply_adds(self, tokens: int, text_tokens: int) -> int:
        h = self.width
        own = 12 * h * h * tokens + 6 * h * h + 2 * h * tokens * tokens
        cross = 2 * h * h * tokens + 2 * h * h * text_tokens + 2 * h * tokens * text_tokens
        return self.depth * (own + cross)


class CrossAttention(nn.Module):
    """Image queries over text keys."""

    def __init__(self, config: TokenConfig):
        super().__init__()
        width, backend = config.width, config.norm_backend
        self.heads = config.heads
        self.norm = make_layer_norm(width, backend)
        self.q = XavierLinear(width, width)
        self.kv = XavierLinear(width, 2 * width)
        self.norm_q = make_rms_norm(width // self.heads, backend) if config.qk_norm else nn.Identity()
        self.norm_k = make_rms_norm(width // self.heads, backend) if config.qk_norm else nn.Identity()
        self.out = ZeroLinear(width, width)

    def forward(self, x_BND: Tensor, y_BLD: Tensor, bias: Tensor | None) -> Tensor:
        q_BNHK = self.q(self.norm(x_BND)).unflatten(-1, (self.heads, -1))
        k_BLHK, v_BLHK = self.kv(y_BLD).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return self.out(attend(self.norm_q(q_BNHK), self.norm_k(k_BLHK), v_BLHK, bias))


class CrossDiTBlock(nn.Module):
    """Self-attention, cross-attention, MLP."""

    def __init__(self, config: TokenConfig):
        super().__init__()
        self.stream = Stream(config)
        self.cross = CrossAttention(config)

    def forward(self, x_BND: Tensor, y_BLD: Tensor, c_BD: Tensor, bias: Tensor | None = None) -> Tensor:
        shift, scale, gate, *mlp = self.stream.modulate(c_BD)
        seen = attend(*self.stream.qkv(scale_shift(self.stream.norm(x_BND), shift, scale)))
        x_BND = torch.addcmul(x_BND, gate, self.stream.out(seen))
        x_BND = x_BND + self.cross(x_BND, y_BLD, bias)
        return self.stream.add_mlp(x_BND, Modulation(*mlp))


class CrossDiT(TokenBackbone):
    """(x_BCHW, t, text, r) -> prediction_BCHW."""

    config: CrossDiTConfig

    def __init__(self, config: CrossDiTConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList([CrossDiTBlock(config) for _ in range(config.depth)])
        self.final = self.make_final()

    def forward(self, x_BCHW: Tensor, t: Tensor, text: TextCond, r: Tensor | None = None) -> Tensor:
        self.check_inputs(x_BCHW, t, text, r)
        e = self.embed(x_BCHW, self.embed_times(t, text, r), text)
        # No view: fused attention on a GPU wants a bias that begins at a multiple of 16 bytes.
        c_BD, _ = split_condition(e.c_BD, e.x_BND.shape[1], e.y_BLD.shape[1])
        x_BND, bias = e.x_BND, None if e.bias is None else e.bias[..., e.x_BND.shape[1] :].contiguous()
        for block in self.blocks:
            x_BND = self.call(block, x_BND, e.y_BLD, c_BD, bias)
        return self.output(self.final, x_BND, e)
