"""A network as sampling runs it in bfloat16: half the bytes, and a CPU's matrix units.

On a CPU bfloat16 alone is half of the gain: products then take less time than what stands between them. So linear
layers are packed for oneDNN with GELU inside the product (torch's own is slower than the product itself), and RMSNorm
needs two passes instead of five. The numbers are those of `module.bfloat16()` up to its rounding (tests).
"""
# Shapes: B batch, N tokens, D width, C channels, H and W of the latents.

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from model.backbones.layers import MLP
from model.encoders.text import TextCond

ROWS = 6144  # tokens that packed weights are laid out for; any other number works


def convert_to_bfloat16(model: nn.Module, device: str = "cpu") -> Callable[..., Tensor]:
    """A copy of the network that computes in bf16 and takes and gives float32; times stay float32."""
    half = copy.deepcopy(model).to(device, torch.bfloat16).eval().requires_grad_(False)
    on_cpu = torch.device(device).type == "cpu" and torch.backends.mkldnn.is_available()
    if on_cpu and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pack(half)

    def predict(x_BCHW: Tensor, t: Tensor, text: TextCond, r: Tensor | None = None) -> Tensor:
        return cast(Tensor, half(x_BCHW.bfloat16(), t, text.to(dtype=torch.bfloat16), r)).to(x_BCHW.dtype)

    return predict


def pack(module: nn.Module) -> None:
    """Replace linear layers, MLPs and RMSNorms in place; for inference only."""
    for name, child in module.named_children():
        if isinstance(child, MLP):
            setattr(module, name, PackedMLP(child))
        elif isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child))
        elif isinstance(child, nn.RMSNorm):
            setattr(module, name, QuickRMSNorm(child))
        else:
            pack(child)


class PackedLinear(nn.Module):
    """Slices of joined streams are made contiguous first: torch would multiply each of them by its own copy of the
    weight."""

    def __init__(self, linear: nn.Linear, then: str = "none") -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight, ROWS)
        self.bias, self.then = linear.bias, then

    def forward(self, x_BND: Tensor) -> Tensor:
        algorithm = "tanh" if self.then == "gelu" else ""
        packed = torch.ops.mkldnn._linear_pointwise
        return cast(Tensor, packed(x_BND.contiguous(), self.weight, self.bias, self.then, [], algorithm))


class PackedMLP(nn.Module):
    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.inner, self.outer = PackedLinear(mlp.inner, "gelu"), PackedLinear(mlp.outer)

    def forward(self, x_BND: Tensor) -> Tensor:
        return cast(Tensor, self.outer(self.inner(x_BND)))


class QuickRMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight, with the root of the width folded into the weight."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        (width,) = norm.normalized_shape
        self.weight = norm.weight * width**0.5
        self.floor = width * (norm.eps or 0.0)

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return x * (length.square_().add_(self.floor).rsqrt_().to(x.dtype)) * self.weight
