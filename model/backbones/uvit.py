"""UViT after Hoogeboom et al. (simple diffusion, arXiv 2301.11093): convolutions around a transformer.

1. Residual blocks at the latents' own resolution, with half as many channels as the transformer's width.
2. A patch embedding makes tokens of their output; DiT blocks run over image and text tokens together.
3. The image tokens become a map of the latents' resolution again and are added to the output of step 1 (the skip).
4. Residual blocks as in step 1, then the prediction.
"""
# Shapes: B batch, C channels, H and W of the latents, N image tokens, L text tokens, S = N + L, D width.
# Symbols in counts: h the width, g = h/2 the channels of the residual blocks.

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.errors import UserError
from model.backbones.dit import DiTBlock, DiTBlockCounts
from model.backbones.layers import TIME_CHANNELS, XavierLinear, scale_shift, split_condition, unpatchify
from model.backbones.norms import make_layer_norm
from model.backbones.trunk import MultiplyAdds, TokenBackbone
from model.encoders.text import TextCond
from model.seeding import draw_

GROUPS = 32  # of each GroupNorm; they divide its channels, which are 32 * depth


@dataclass(frozen=True)
class UViTConfig(DiTBlockCounts):
    """`res_blocks` residual blocks on each side of the transformer."""

    res_blocks: int = 2

    @property
    def name(self) -> str:
        return "uvit"

    @property
    def channels(self) -> int:
        return self.width // 2

    def make_module(self) -> UViT:
        return UViT(self)

    def count_parameters(self) -> int:
        h, g = self.width, self.channels
        # Time and pooled text: each Linear, SiLU, Linear. Then the context, one Linear.
        embed = (TIME_CHANNELS + self.pooled_width + 2) * h + 2 * (h * h + h) + (self.context_width + 1) * h
        # Of one residual block: two convolutions, two GroupNorms, the Linear to shift and scale.
        residual = 2 * (9 * g * g + g) + 4 * g + 2 * g * h + 2 * g
        # Of the network: its first convolution, its last GroupNorm and convolution.
        ends = 9 * self.in_channels * g + g + 2 * g + 9 * g * self.in_channels + self.in_channels
        # Patches to tokens, tokens to patches. The LayerNorm between has no parameters.
        patches = self.patch**2 * g * h + h + h * self.patch**2 * g + self.patch**2 * g
        embed += self.interval_parameters
        return embed + ends + patches + 2 * self.res_blocks * residual + self.count_block_parameters()

    def count_multiply_adds(self, height: int, width: int, text_tokens: int) -> MultiplyAdds:
        h, g, area = self.width, self.channels, height * width
        tokens = area // self.patch**2
        conv_in = 9 * self.in_channels * g * area  # the last convolution costs as much: it has the transposed shape
        stem = conv_in + (TIME_CHANNELS + self.pooled_width) * h + self.context_width * h * text_tokens
        interval = h if self.second_time else 0
        residual = 2 * self.res_blocks * (18 * g * g * area + 2 * g * h)
        # To tokens and back; 2 h h below: the second Linears of time and pooled text.
        patches = 2 * self.patch**2 * g * h * tokens
        return MultiplyAdds(
            stem + TIME_CHANNELS * interval,
            2 * h * h
            + interval * h
            + residual
            + patches
            + conv_in
            + self.count_block_multiply_adds(tokens, text_tokens),
        )


class Conv3(nn.Conv2d):
    """A 3x3 convolution that keeps height and width; Xavier weights, zero bias.

    `zero`: its weights start at zero too, as in the last layer of a residual branch and of the network.
    """

    def __init__(self, inputs: int, outputs: int, *, zero: bool = False):
        self.zero = zero
        super().__init__(inputs, outputs, kernel_size=3, padding=1)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight) if self.zero else draw_(self.weight, nn.init.xavier_uniform_)
        assert self.bias is not None
        nn.init.zeros_(self.bias)


class ResBlock(nn.Module):
    """x + conv(SiLU(shift + (1 + scale) * GroupNorm(y))), where y = conv(SiLU(GroupNorm(x))).

    Shift and scale of each channel come from the conditioning, by the Linear `film` (FiLM, arXiv 1709.07871).
    """

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.patch = patch
        self.norm_in = nn.GroupNorm(GROUPS, channels)
        self.conv_in = Conv3(channels, channels)
        self.film = XavierLinear(width, 2 * channels)
        self.norm_out = nn.GroupNorm(GROUPS, channels)
        self.conv_out = Conv3(channels, channels, zero=True)

    def forward(self, x_BCHW: Tensor, c_BD: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W). The conditioning is c_BD, or c_BND where image tokens have times of their own;
        then the shift and scale of a token are used at all pixels of its patch."""
        film = self.film(F.silu(c_BD))
        if film.ndim == 2:
            film = film[..., None, None]  # (B, 2C, 1, 1)
        else:
            # (B, N, 2C) -> (B, 2C, rows, columns) -> (B, 2C, H, W)
            rows, columns = x_BCHW.shape[-2] // self.patch, x_BCHW.shape[-1] // self.patch
            film = film.mT.unflatten(-1, (rows, columns))
            film = film.repeat_interleave(self.patch, -2).repeat_interleave(self.patch, -1)
        shift, scale = film.chunk(2, dim=1)
        inner = self.conv_in(F.silu(self.norm_in(x_BCHW)))
        return x_BCHW + self.conv_out(F.silu(scale_shift(self.norm_out(inner), shift, scale)))


class UViT(TokenBackbone):
    """(x_BCHW, t, text, r) -> prediction_BCHW: noised latents, network times, text conditioning, second times.

    `t` is (B), or (B, N) where image tokens have times of their own. `r` has the shape of `t`; only a network with
    `second_time` takes it. UserError for inputs that do not fit the config.
    """

    config: UViTConfig

    def __init__(self, config: UViTConfig):
        super().__init__(config, patch_channels=config.channels)
        channels, width = config.channels, config.width
        self.conv_in = Conv3(config.in_channels, channels)
        self.down = nn.ModuleList([ResBlock(channels, width, config.patch) for _ in range(config.res_blocks)])
        self.blocks = nn.ModuleList([DiTBlock(config) for _ in range(config.depth)])
        self.norm = make_layer_norm(width, config.norm_backend)
        self.unpatch = XavierLinear(width, config.patch**2 * channels)
        self.up = nn.ModuleList([ResBlock(channels, width, config.patch) for _ in range(config.res_blocks)])
        self.norm_out = nn.GroupNorm(GROUPS, channels)
        self.conv_out = Conv3(channels, config.in_channels, zero=True)

    def forward(self, x_BCHW: Tensor, t: Tensor, text: TextCond, r: Tensor | None = None) -> Tensor:
        if x_BCHW.shape[1] != self.config.in_channels:
            raise UserError(f"latents have {x_BCHW.shape[1]} channels, the model expects {self.config.in_channels}")
        self.check_inputs(x_BCHW, t, text, r)
        c_BD = self.embed_times(t, text, r)
        tokens = x_BCHW.shape[-2] * x_BCHW.shape[-1] // self.config.patch**2
        c_image, _ = split_condition(c_BD, tokens, text.context_BLD.shape[1])
        x_BCHW = self.conv_in(x_BCHW)
        for block in self.down:
            x_BCHW = self.call(block, x_BCHW, c_image)
        e = self.embed(x_BCHW, c_BD, text)
        x_BSD = torch.cat([e.x_BND, e.y_BLD], dim=1)
        for block in self.blocks:
            x_BSD = self.call(block, x_BSD, c_BD, e.bias)
        tokens_BND = self.unpatch(self.norm(x_BSD[:, : e.x_BND.shape[1]]))
        x_BCHW = x_BCHW + unpatchify(tokens_BND, e.rows, e.columns, self.config.patch)
        for block in self.up:
            x_BCHW = self.call(block, x_BCHW, c_image)
        return self.conv_out(F.silu(self.norm_out(x_BCHW)))
