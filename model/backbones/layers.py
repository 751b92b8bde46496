"""Small layers that every backbone shares: initialised linears, patch embedding, conditioning MLPs, modulation.

Initial weights follow DiT (SD3 prints none): Xavier linears, N(0, 0.02) in the conditioning MLPs, zeros for every
modulation and for the output. Each class draws inside its own constructor, before DeepSpeed's zero.Init shards it.
"""
# Shapes: B batch, N tokens, D width, C channels, F frequencies.

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.errors import UserError
from model.backbones.norms import NormBackend, make_layer_norm
from model.seeding import draw_

TIME_CHANNELS = 256


class XavierLinear(nn.Linear):
    def reset_parameters(self) -> None:
        draw_(self.weight, nn.init.xavier_uniform_)
        nn.init.zeros_(self.bias)


class ZeroLinear(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class NormalLinear(nn.Linear):
    def reset_parameters(self) -> None:
        draw_(self.weight, lambda weight: nn.init.normal_(weight, std=0.02))
        nn.init.zeros_(self.bias)


class PatchConv(nn.Conv2d):
    """Kernel = stride = patch; initialised as the linear layer that it is."""

    def reset_parameters(self) -> None:
        draw_(self.weight.view(self.out_channels, -1), nn.init.xavier_uniform_)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class PatchEmbed(nn.Module):
    """Latents to tokens, row by row."""

    def __init__(self, in_channels: int, width: int, patch: int):
        super().__init__()
        self.patch, self.in_channels = patch, in_channels
        self.proj = PatchConv(in_channels, width, kernel_size=patch, stride=patch)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        channels, height, width = x_BCHW.shape[1:]
        if channels != self.in_channels:
            raise UserError(f"latents have {channels} channels, the model expects {self.in_channels}")
        if height % self.patch or width % self.patch:
            raise UserError(f"latents of {height}x{width} are not divisible by the patch size {self.patch}")
        # A transposed layout would go on through every block, whose norms would copy it (8 % of a step at depth 4).
        return self.proj(x_BCHW).flatten(2).transpose(1, 2).contiguous()


def unpatchify(tokens_BNC: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """Tokens whose channels are ordered (row p, column q, channel) back to latents."""
    batch, _, features = tokens_BNC.shape
    x = tokens_BNC.view(batch, rows, columns, patch, patch, features // patch**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, rows * patch, columns * patch)


def embed_time(t: Tensor, channels: int = TIME_CHANNELS) -> Tensor:
    """Cosines then sines of 1000*t, maximum period 10000 (reference order), in float32, along a new last axis."""
    half = channels // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = 1000.0 * t.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class ConditionMLP(nn.Module):
    """Linear, SiLU, Linear: for time features and for the pooled text. `zero`: its output starts at zero."""

    def __init__(self, inputs: int, width: int, *, zero: bool = False):
        super().__init__()
        self.inner = NormalLinear(inputs, width)
        self.outer = ZeroLinear(width, width) if zero else NormalLinear(width, width)

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.outer(F.silu(self.inner(x_BF)))


class Condition(nn.Module):
    """Time plus pooled text: the conditioning vector, c_BD for times t_B, c_BSD for times of tokens t_BS.

    With `second_time` there is a third part, of the interval t - r (MeanFlow). Its output starts at zero: a student
    that begins from a teacher without it computes the teacher's numbers, to the bit.
    """

    def __init__(self, pooled_width: int, width: int, *, second_time: bool = False):
        super().__init__()
        self.time = ConditionMLP(TIME_CHANNELS, width)
        self.pooled = ConditionMLP(pooled_width, width)
        self.interval = ConditionMLP(TIME_CHANNELS, width, zero=True) if second_time else None

    def forward(self, t: Tensor, pooled_BP: Tensor, r: Tensor | None = None) -> Tensor:
        pooled = self.pooled(pooled_BP)
        c = self.time(embed_time(t).to(pooled_BP.dtype)) + (pooled if t.ndim == 1 else pooled.unsqueeze(1))
        if self.interval is None:
            return c
        interval = torch.zeros_like(t) if r is None else t - r
        return c + self.interval(embed_time(interval).to(pooled_BP.dtype))


class Modulation(NamedTuple):
    """adaLN of one sub-layer; each of shape (B, 1, D), or (B, N, D) where tokens have times of their own."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulate(nn.Module):
    """The adaLN projection: `count` vectors per sample from the conditioning vector (SiLU is applied here)."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.count = count
        self.linear = ZeroLinear(width, count * width)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        vectors = self.linear(F.silu(c))
        return (vectors if vectors.ndim == 3 else vectors.unsqueeze(1)).chunk(self.count, dim=-1)


def split_condition(c: Tensor, *tokens: int) -> tuple[Tensor, ...]:
    """The conditioning of each stream of `tokens` tokens: the same c_BD for all, or each stream's part of c_BSD."""
    return c.split(tokens, dim=1) if c.ndim == 3 else (c,) * len(tokens)


def scale_shift(x_BND: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    # 1 + scale, as in DiT: the modulation starts at zero, so that a fresh block leaves its norm as it is.
    return torch.addcmul(shift, x_BND, 1 + scale)


class MLP(nn.Module):
    """Linear to four times the width, GELU (tanh), Linear back."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = XavierLinear(width, 4 * width)
        self.outer = XavierLinear(4 * width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.outer(F.gelu(self.inner(x_BND), approximate="tanh"))


class FinalLayer(nn.Module):
    """adaLN with shift and scale, then the projection to patch pixels; both start at zero."""

    def __init__(self, width: int, outputs: int, norm_backend: NormBackend = "torch"):
        super().__init__()
        self.modulate = Modulate(width, 2)
        self.norm = make_layer_norm(width, norm_backend)
        self.linear = ZeroLinear(width, outputs)

    def forward(self, x_BND: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = self.modulate(c_BD)
        return self.linear(scale_shift(self.norm(x_BND), shift, scale))
