"""The only file of this package that knows apex: RMSNorm and LayerNorm by torch or by apex's fused kernels.

Asking for apex where it is not installed is an error, never a silent downgrade.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from model.errors import ModelError

NormBackend = Literal["torch", "apex"]
EPS = 1e-6


def apex_available() -> bool:
    """True when NVIDIA's apex is built with its CUDA kernels; the PyPI package of that name is another project.

    Built without them, apex.normalization can be imported and fails at the first layer: so ask for the kernels.
    """
    if importlib.util.find_spec("apex") is None or importlib.util.find_spec("fused_layer_norm_cuda") is None:
        return False
    return importlib.util.find_spec("apex.normalization") is not None


def _require(backend: str) -> None:
    if backend not in ("torch", "apex"):
        raise ModelError(f"norm backend {backend!r} is not one of torch, apex")
    if backend == "apex" and not apex_available():
        raise ModelError(
            "norm_backend=apex was asked for, but NVIDIA apex with its CUDA kernels (fused_layer_norm_cuda) is not "
            "installed; build it or use torch"
        )


def rms_norm(width: int, backend: NormBackend = "torch") -> nn.Module:
    """RMSNorm with a learnable scale over the last axis."""
    _require(backend)
    if backend == "apex":
        from apex.normalization import FusedRMSNorm

        return FusedRMSNorm(width, eps=EPS)
    return nn.RMSNorm(width, eps=EPS)


class PlainLayerNorm(nn.Module):
    """LayerNorm without affine parameters (adaLN supplies shift and scale)."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), eps=EPS)


def layer_norm(width: int, backend: NormBackend = "torch") -> nn.Module:
    """LayerNorm without affine parameters over the last axis."""
    _require(backend)
    if backend == "apex":
        from apex.normalization import FusedLayerNorm

        return FusedLayerNorm(width, eps=EPS, elementwise_affine=False)
    return PlainLayerNorm(width)
