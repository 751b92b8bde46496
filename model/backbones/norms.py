"""The only file of this package that knows apex: RMSNorm and LayerNorm by torch or by apex's fused kernels.

Asking for apex where it is not installed is an error, never a silent downgrade.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.errors import UserError

NormBackend = Literal["torch", "apex"]
EPS = 1e-6


def is_apex_available() -> bool:
    """True when NVIDIA's apex is built with its CUDA kernels; the PyPI package of that name is another project.

    Built without them, apex.normalization can be imported and fails at the first layer: so ask for the kernels.
    """
    if importlib.util.find_spec("apex") is None or importlib.util.find_spec("fused_layer_norm_cuda") is None:
        return False
    return importlib.util.find_spec("apex.normalization") is not None


def _require(backend: str) -> None:
    if backend not in ("torch", "apex"):
        raise UserError(f"norm backend {backend!r} is not one of torch, apex")
    if backend == "apex" and not is_apex_available():
        raise UserError(
            "norm_backend=apex was asked for, but NVIDIA apex with its CUDA kernels (fused_layer_norm_cuda) is not "
            "installed; build it or use torch"
        )


def make_rms_norm(width: int, backend: NormBackend = "torch") -> nn.Module:
    """RMSNorm with a learnable scale over the last axis."""
    _require(backend)
    if backend == "apex":
        from apex.normalization import FusedRMSNorm

        return FusedRMSNorm(width, eps=EPS)
    return RMSNorm(width, eps=EPS)


class RMSNorm(nn.RMSNorm):
    """Torch's, with the gradient written out on a CPU, where torch makes it of a dozen operations."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu or torch.compiler.is_compiling():
            return super().forward(x)
        return CPURMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return]


class CPURMSNorm(torch.autograd.Function):
    """y = x r w with r = 1/rms(x); keeps x and r, as the fused kernel of a GPU does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        r = (wide.square().sum(-1, keepdim=True) / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (wide * r).mul_(weight.to(r.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        wide, w, g = (value.to(r.dtype) for value in (x, weight, gradients[0]))
        n = wide * r
        gn = g * n
        mean = (torch.matmul(gn, w) / x.shape[-1]).unsqueeze(-1)
        dx = (g * w).sub_(n.mul_(mean)).mul_(r)
        return dx.to(x.dtype), gn.flatten(0, -2).sum(0).to(weight.dtype), None


class PlainLayerNorm(nn.Module):
    """LayerNorm without affine parameters (adaLN supplies shift and scale)."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), eps=EPS)


def make_layer_norm(width: int, backend: NormBackend = "torch") -> nn.Module:
    """LayerNorm without affine parameters over the last axis."""
    _require(backend)
    if backend == "apex":
        from apex.normalization import FusedLayerNorm

        return FusedLayerNorm(width, eps=EPS, elementwise_affine=False)
    return PlainLayerNorm(width)
