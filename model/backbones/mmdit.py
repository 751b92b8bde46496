"""MM-DiT exactly as in SD3: joint blocks with separate weights per modality, the last one dropping its text output.

`MMDiTConfig(depth=d)` gives width 64*d and d heads. `dual_attention` names the blocks with SD3.5-medium's extra image
self-attention (MMDiT-X). Blocks are modules called with tensors only, as DeepSpeed's hooks and torch.compile want.
"""
# Shapes: B batch, N image tokens, L text tokens, D width, C channels of the latents. Symbols in counts: h the width.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infra.errors import UserError
from model.backbones.attention import QKVProjection, attend, join, separate
from model.backbones.layers import MLP, Modulate, Modulation, XavierLinear, scale_shift, split_condition
from model.backbones.norms import make_layer_norm
from model.backbones.trunk import TokenBackbone, TokenConfig
from model.encoders.text import TextCond


@dataclass(frozen=True)
class MMDiTConfig(TokenConfig):
    """SD3's network; `dual_attention` names blocks by index."""

    dual_attention: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.dual_attention, tuple) or any(type(i) is not int for i in self.dual_attention):
            raise UserError(f"dual_attention is {self.dual_attention!r}, expected a list of block numbers")
        # Released models never have it in the last block, whose text stream is pre-only.
        if any(not 0 <= i < self.depth - 1 for i in self.dual_attention):
            raise UserError(f"dual_attention {self.dual_attention} names blocks outside 0..{self.depth - 2}")
        if len(set(self.dual_attention)) < len(self.dual_attention):
            raise UserError(f"dual_attention {self.dual_attention} names a block twice")

    @property
    def name(self) -> str:
        return "mmdit"

    def make_module(self) -> MMDiT:
        return MMDiT(self)

    def count_block_parameters(self) -> int:
        h, qk = self.width, self.qk_parameters
        # A stream: modulation 6 h h + 6 h, qkv 3 h h + 3 h, output h h + h, MLP 8 h h + 5 h. The last block's text
        # stream: modulation 2 h h + 2 h and qkv. A second attention: three vectors more, qkv and output.
        stream, final_text = 18 * h * h + 15 * h + qk, 5 * h * h + 5 * h + qk
        dual = len(self.dual_attention) * (3 * h * h + 3 * h + 4 * h * h + 4 * h + qk)
        return (2 * self.depth - 1) * stream + final_text + dual

    def count_block_multiply_adds(self, tokens: int, text_tokens: int) -> int:
        h, s = self.width, tokens + text_tokens
        # A token takes 12 h h: qkv 3, output 1, MLP 8. An image takes h h for each modulation vector of its streams,
        # and h s s for each of two products in attention (queries with keys, weights with values).
        joint = 12 * h * h * s + 12 * h * h + 2 * h * s * s
        last = 12 * h * h * tokens + 3 * h * h * text_tokens + 8 * h * h + 2 * h * s * s
        dual = len(self.dual_attention) * (4 * h * h * tokens + 3 * h * h + 2 * h * tokens * tokens)
        return (self.depth - 1) * joint + last + dual


class Stream(nn.Module):
    """One modality's weights in a joint block. It has no `forward`: the block calls its parts in order.

    `vectors`: modulation vectors from the conditioning; 6, or 9 with a second attention.
    """

    def __init__(self, config: TokenConfig, *, vectors: int = 6):
        super().__init__()
        width = config.width
        self.modulate = Modulate(width, vectors)
        self.norm = make_layer_norm(width, config.norm_backend)
        self.qkv = QKVProjection(width, config.heads, qk_norm=config.qk_norm, norm_backend=config.norm_backend)
        self.out = XavierLinear(width, width)
        self.mlp = MLP(width)

    def add_mlp(self, x_BND: Tensor, ada: Modulation) -> Tensor:
        """x + gate * MLP(norm(x) * (1 + scale) + shift)."""
        return torch.addcmul(x_BND, ada.gate, self.mlp(scale_shift(self.norm(x_BND), ada.shift, ada.scale)))


class FinalTextStream(nn.Module):
    """The last block's text stream ("pre-only" in the reference). Image tokens attend to its keys and values; nothing
    follows its attention."""

    def __init__(self, config: TokenConfig):
        super().__init__()
        self.modulate = Modulate(config.width, 2)
        self.norm = make_layer_norm(config.width, config.norm_backend)
        self.qkv = QKVProjection(config.width, config.heads, qk_norm=config.qk_norm, norm_backend=config.norm_backend)


class SelfAttention(nn.Module):
    """MMDiT-X's second attention, over image tokens only: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: TokenConfig):
        super().__init__()
        self.qkv = QKVProjection(config.width, config.heads, qk_norm=config.qk_norm, norm_backend=config.norm_backend)
        self.out = XavierLinear(config.width, config.width)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.out(attend(*self.qkv(x_BND)))


class MMDiTBlock(nn.Module):
    """Joint attention over image and text tokens, then one MLP per stream: (x_BND, y_BLD) -> (x_BND, y_BLD).

    In this and the other blocks the conditioning is c_BD, or (B, N + L, D) where image tokens have times of their own.
    `bias`: (B, 1, 1, N + L), -inf at text tokens that are padding; None: no token is.
    """

    def __init__(self, config: TokenConfig):
        super().__init__()
        self.image = Stream(config)
        self.text = Stream(config)

    def forward(self, x_BND: Tensor, y_BLD: Tensor, c_BD: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # Six vectors per stream, in the order of the reference (names.py relies on it): shift, scale and gate of the
        # attention, then of the MLP.
        c_x, c_y = split_condition(c_BD, x_BND.shape[1], y_BLD.shape[1])
        x_shift, x_scale, x_gate, *x_mlp = self.image.modulate(c_x)
        y_shift, y_scale, y_gate, *y_mlp = self.text.modulate(c_y)
        x_qkv = self.image.qkv(scale_shift(self.image.norm(x_BND), x_shift, x_scale))
        y_qkv = self.text.qkv(scale_shift(self.text.norm(y_BLD), y_shift, y_scale))
        x_attn, y_attn = separate(attend(*join(x_qkv, y_qkv), bias), x_BND.shape[1], y_BLD.shape[1])
        x_BND = torch.addcmul(x_BND, x_gate, self.image.out(x_attn))
        y_BLD = torch.addcmul(y_BLD, y_gate, self.text.out(y_attn))
        return self.image.add_mlp(x_BND, Modulation(*x_mlp)), self.text.add_mlp(y_BLD, Modulation(*y_mlp))


class DualMMDiTBlock(nn.Module):
    """A joint block whose image stream also attends to itself (MMDiT-X, released in SD3.5-medium)."""

    def __init__(self, config: TokenConfig):
        super().__init__()
        self.image = Stream(config, vectors=9)
        self.text = Stream(config)
        self.self_attention = SelfAttention(config)

    def forward(self, x_BND: Tensor, y_BLD: Tensor, c_BD: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # Nine vectors for the image, in the order of the reference: shift, scale and gate of the joint attention, of
        # the MLP, of the second attention. Both attentions read the same normalised input.
        c_x, c_y = split_condition(c_BD, x_BND.shape[1], y_BLD.shape[1])
        x_shift, x_scale, x_gate, *x_mlp, s_shift, s_scale, s_gate = self.image.modulate(c_x)
        y_shift, y_scale, y_gate, *y_mlp = self.text.modulate(c_y)
        x_normed = self.image.norm(x_BND)
        x_qkv = self.image.qkv(scale_shift(x_normed, x_shift, x_scale))
        y_qkv = self.text.qkv(scale_shift(self.text.norm(y_BLD), y_shift, y_scale))
        x_attn, y_attn = separate(attend(*join(x_qkv, y_qkv), bias), x_BND.shape[1], y_BLD.shape[1])
        x_BND = torch.addcmul(x_BND, x_gate, self.image.out(x_attn))
        x_BND = torch.addcmul(x_BND, s_gate, self.self_attention(scale_shift(x_normed, s_shift, s_scale)))
        y_BLD = torch.addcmul(y_BLD, y_gate, self.text.out(y_attn))
        return self.image.add_mlp(x_BND, Modulation(*x_mlp)), self.text.add_mlp(y_BLD, Modulation(*y_mlp))


class FinalMMDiTBlock(nn.Module):
    """The last block: image tokens attend to the text, which has no output of its own. (x_BND, y_BLD) -> x_BND."""

    def __init__(self, config: TokenConfig):
        super().__init__()
        self.image = Stream(config)
        self.text = FinalTextStream(config)

    def forward(self, x_BND: Tensor, y_BLD: Tensor, c_BD: Tensor, bias: Tensor | None = None) -> Tensor:
        c_x, c_y = split_condition(c_BD, x_BND.shape[1], y_BLD.shape[1])
        x_shift, x_scale, x_gate, *x_mlp = self.image.modulate(c_x)
        y_shift, y_scale = self.text.modulate(c_y)
        x_qkv = self.image.qkv(scale_shift(self.image.norm(x_BND), x_shift, x_scale))
        y_qkv = self.text.qkv(scale_shift(self.text.norm(y_BLD), y_shift, y_scale))
        # Text queries join and are cut off after attention: the same shapes as in other blocks, and every parameter
        # has a gradient (zero for the text queries), as in the reference.
        x_attn = attend(*join(x_qkv, y_qkv), bias)[:, : x_BND.shape[1]].contiguous()
        x_BND = torch.addcmul(x_BND, x_gate, self.image.out(x_attn))
        return self.image.add_mlp(x_BND, Modulation(*x_mlp))


class MMDiT(TokenBackbone):
    """(x_BCHW, t, text, r) -> prediction_BCHW: noised latents, network times, text conditioning, second times.

    `t` is (B), or (B, N) where image tokens have times of their own. `r` has the shape of `t`; only a network with
    `second_time` takes it. UserError for inputs that do not fit the config.
    """

    config: MMDiTConfig

    def __init__(self, config: MMDiTConfig):
        super().__init__(config)
        dual = set(config.dual_attention)
        self.blocks = nn.ModuleList(
            [DualMMDiTBlock(config) if i in dual else MMDiTBlock(config) for i in range(config.depth - 1)]
            + [FinalMMDiTBlock(config)]
        )
        self.final = self.make_final()

    def forward(self, x_BCHW: Tensor, t: Tensor, text: TextCond, r: Tensor | None = None) -> Tensor:
        self.check_inputs(x_BCHW, t, text, r)
        e = self.embed(x_BCHW, self.embed_times(t, text, r), text)
        x_BND, y_BLD = e.x_BND, e.y_BLD
        for block in self.blocks[:-1]:
            x_BND, y_BLD = self.call(block, x_BND, y_BLD, e.c_BD, e.bias)
        x_BND = self.call(self.blocks[-1], x_BND, y_BLD, e.c_BD, e.bias)
        return self.output(self.final, x_BND, e)
