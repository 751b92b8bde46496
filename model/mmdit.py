"""MM-DiT exactly as in SD3: joint blocks with separate weights per modality, the last one dropping its text output.

`MMDiTConfig(depth=d)` gives width 64*d and d heads. `dual_attention` names the blocks with SD3.5-medium's extra image
self-attention (MMDiT-X). Blocks are modules called with tensors only, as DeepSpeed's hooks and torch.compile want.
"""
# Shapes: B batch, N image tokens, L text tokens, D width, C channels of the latents, P pooled text width.

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import HEAD_WIDTH, QKVProjection, attend, join, key_bias
from model.errors import ModelError, hint
from model.layers import (
    MLP,
    Condition,
    FinalLayer,
    Modulate,
    Modulation,
    PatchEmbed,
    XavierLinear,
    scale_shift,
    unpatchify,
)
from model.norms import NormBackend, layer_norm
from model.position import PositionTable
from model.text import TextCond


@dataclass(frozen=True)
class MMDiTConfig:
    """Everything that decides the weights' shapes; JSON-able. pos_*: see model/position.py."""

    depth: int
    patch: int = 2
    in_channels: int = 16
    context_width: int = 4096
    pooled_width: int = 2048
    qk_norm: bool = True
    dual_attention: tuple[int, ...] = ()
    pos_max: int = 192
    pos_tokens: int = 16
    pos_base: int = 16
    pos_stored: bool = False
    norm_backend: NormBackend = "torch"

    def __post_init__(self) -> None:
        for field in ("depth", "patch", "in_channels", "context_width", "pooled_width", "pos_max", "pos_base"):
            if getattr(self, field) < 1:
                raise ModelError(f"MMDiTConfig.{field} is {getattr(self, field)}, expected at least 1")
        if any(not 0 <= i < self.depth for i in self.dual_attention):
            raise ModelError(f"dual_attention {self.dual_attention} names blocks outside 0..{self.depth - 1}")

    @property
    def name(self) -> str:
        return "mmdit"

    @property
    def width(self) -> int:
        return HEAD_WIDTH * self.depth

    @property
    def heads(self) -> int:
        return self.depth

    def build(self, *, seed: int = 0) -> MMDiT:
        """The module with initial weights drawn from `seed`; under `torch.device("meta")` it costs no memory."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return MMDiT(self)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"dual_attention": list(self.dual_attention)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> MMDiTConfig:
        known = {f.name for f in dataclasses.fields(MMDiTConfig)}
        for key in data:
            if key not in known:
                raise ModelError(f"unknown MMDiTConfig field {key!r}{hint(key, known)}")
        return MMDiTConfig(**{**data, "dual_attention": tuple(data.get("dual_attention", ()))})

    def parameter_count(self) -> int:
        from model.flops import mmdit_parameters

        return mmdit_parameters(self)

    def forward_flops(self, height: int, width: int, text_tokens: int) -> int:
        from model.flops import mmdit_forward_flops

        return mmdit_forward_flops(self, height, width, text_tokens)

    def backward_flops(self, height: int, width: int, text_tokens: int) -> int:
        from model.flops import mmdit_backward_flops

        return mmdit_backward_flops(self, height, width, text_tokens)


class Stream(nn.Module):
    """One modality's weights in a joint block. Not called itself: the block calls its parts in order."""

    def __init__(self, config: MMDiTConfig, *, vectors: int = 6):
        super().__init__()
        width = config.width
        self.modulate = Modulate(width, vectors)
        self.norm = layer_norm(width, config.norm_backend)
        self.qkv = QKVProjection(width, config.heads, qk_norm=config.qk_norm, norm_backend=config.norm_backend)
        self.out = XavierLinear(width, width)
        self.mlp = MLP(width)

    def mlp_step(self, x_BND: Tensor, ada: Modulation) -> Tensor:
        return torch.addcmul(x_BND, ada.gate, self.mlp(scale_shift(self.norm(x_BND), ada.shift, ada.scale)))


class FinalTextStream(nn.Module):
    """The last block's text stream ("pre-only"): it gives keys and values, its own output is dropped."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.modulate = Modulate(config.width, 2)
        self.norm = layer_norm(config.width, config.norm_backend)
        self.qkv = QKVProjection(config.width, config.heads, qk_norm=config.qk_norm, norm_backend=config.norm_backend)


class SelfAttention(nn.Module):
    """MMDiT-X's second attention, over image tokens only."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.qkv = QKVProjection(config.width, config.heads, qk_norm=config.qk_norm, norm_backend=config.norm_backend)
        self.out = XavierLinear(config.width, config.width)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.out(attend(*self.qkv(x_BND)))


class MMDiTBlock(nn.Module):
    """Joint attention over image and text tokens, then one MLP per stream."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.image = Stream(config)
        self.text = Stream(config)

    def forward(self, x_BND: Tensor, y_BLD: Tensor, c_BD: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x_shift, x_scale, x_gate, *x_mlp = self.image.modulate(c_BD)
        y_shift, y_scale, y_gate, *y_mlp = self.text.modulate(c_BD)
        x_qkv = self.image.qkv(scale_shift(self.image.norm(x_BND), x_shift, x_scale))
        y_qkv = self.text.qkv(scale_shift(self.text.norm(y_BLD), y_shift, y_scale))
        x_attn, y_attn = attend(*join(x_qkv, y_qkv), bias).split([x_BND.shape[1], y_BLD.shape[1]], dim=1)
        x_BND = torch.addcmul(x_BND, x_gate, self.image.out(x_attn))
        y_BLD = torch.addcmul(y_BLD, y_gate, self.text.out(y_attn))
        return self.image.mlp_step(x_BND, Modulation(*x_mlp)), self.text.mlp_step(y_BLD, Modulation(*y_mlp))


class DualMMDiTBlock(nn.Module):
    """A joint block whose image stream also attends to itself (MMDiT-X, released in SD3.5-medium)."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.image = Stream(config, vectors=9)
        self.text = Stream(config)
        self.self_attention = SelfAttention(config)

    def forward(self, x_BND: Tensor, y_BLD: Tensor, c_BD: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x_shift, x_scale, x_gate, *x_mlp, s_shift, s_scale, s_gate = self.image.modulate(c_BD)
        y_shift, y_scale, y_gate, *y_mlp = self.text.modulate(c_BD)
        x_normed = self.image.norm(x_BND)
        x_qkv = self.image.qkv(scale_shift(x_normed, x_shift, x_scale))
        y_qkv = self.text.qkv(scale_shift(self.text.norm(y_BLD), y_shift, y_scale))
        x_attn, y_attn = attend(*join(x_qkv, y_qkv), bias).split([x_BND.shape[1], y_BLD.shape[1]], dim=1)
        x_BND = torch.addcmul(x_BND, x_gate, self.image.out(x_attn))
        x_BND = torch.addcmul(x_BND, s_gate, self.self_attention(scale_shift(x_normed, s_shift, s_scale)))
        y_BLD = torch.addcmul(y_BLD, y_gate, self.text.out(y_attn))
        return self.image.mlp_step(x_BND, Modulation(*x_mlp)), self.text.mlp_step(y_BLD, Modulation(*y_mlp))


class FinalMMDiTBlock(nn.Module):
    """The last block: text gives keys and values only, so its queries are not attended with."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.image = Stream(config)
        self.text = FinalTextStream(config)

    def forward(self, x_BND: Tensor, y_BLD: Tensor, c_BD: Tensor, bias: Tensor | None = None) -> Tensor:
        x_shift, x_scale, x_gate, *x_mlp = self.image.modulate(c_BD)
        y_shift, y_scale = self.text.modulate(c_BD)
        x_qkv = self.image.qkv(scale_shift(self.image.norm(x_BND), x_shift, x_scale))
        y_qkv = self.text.qkv(scale_shift(self.text.norm(y_BLD), y_shift, y_scale))
        # Text queries join and are cut off after attention: the same shapes as in other blocks, and every parameter
        # has a gradient (zero for the text queries), as in the reference.
        x_attn = attend(*join(x_qkv, y_qkv), bias)[:, : x_BND.shape[1]]
        x_BND = torch.addcmul(x_BND, x_gate, self.image.out(x_attn))
        return self.image.mlp_step(x_BND, Modulation(*x_mlp))


class MMDiT(nn.Module):
    """(x_BCHW, t_B, text) -> prediction_BCHW. `checkpoint_blocks=True` recomputes each block in the backward pass."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False
        width = config.width
        self.patch_embed = PatchEmbed(config.in_channels, width, config.patch)
        self.positions = PositionTable(
            width, config.pos_max, target=config.pos_tokens, base=config.pos_base, stored=config.pos_stored
        )
        self.condition = Condition(config.pooled_width, width)
        self.context_embed = XavierLinear(config.context_width, width)
        dual = set(config.dual_attention)
        if config.depth - 1 in dual:
            raise ModelError(f"dual_attention names the last block {config.depth - 1}; released models never do")
        self.blocks = nn.ModuleList(
            [DualMMDiTBlock(config) if i in dual else MMDiTBlock(config) for i in range(config.depth - 1)]
            + [FinalMMDiTBlock(config)]
        )
        self.final = FinalLayer(width, config.patch**2 * config.in_channels, config.norm_backend)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, text: TextCond) -> Tensor:
        config = self.config
        if text.context_BLD.shape[-1] != config.context_width or text.pooled_BP.shape[-1] != config.pooled_width:
            raise ModelError(
                f"text of widths {text.context_BLD.shape[-1]} (context), {text.pooled_BP.shape[-1]} (pooled) does not "
                f"fit the model's {config.context_width}, {config.pooled_width}"
            )
        rows, columns = x_BCHW.shape[-2] // config.patch, x_BCHW.shape[-1] // config.patch
        x_BND = self.patch_embed(x_BCHW)
        x_BND = x_BND + self.positions(rows, columns).to(x_BND.dtype)
        c_BD = self.condition(t_B, text.pooled_BP)
        y_BLD = self.context_embed(text.context_BLD)
        bias = None if text.mask_BL is None else key_bias(text.mask_BL, rows * columns, x_BND.dtype)
        for block in self.blocks[:-1]:
            x_BND, y_BLD = self._call(block, x_BND, y_BLD, c_BD, bias)
        x_BND = self._call(self.blocks[-1], x_BND, y_BLD, c_BD, bias)
        return unpatchify(self.final(x_BND, c_BD), rows, columns, config.patch)

    def _call(self, block: nn.Module, *tensors: Tensor | None) -> Any:
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, *tensors, use_reentrant=False)
        return block(*tensors)
