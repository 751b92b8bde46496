"""Attention pieces: fused qkv projection with optional QK-RMSNorm, and the softmax attention over joined streams."""
# Shapes: B batch, N tokens of one stream, S keys, D width, H heads, K head width.

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import XavierLinear
from model.norms import NormBackend, rms_norm

HEAD_WIDTH = 64


class QKV(NamedTuple):
    """Queries, keys and values of one stream, each (B, N, H, K)."""

    q: Tensor
    k: Tensor
    v: Tensor


class QKVProjection(nn.Module):
    """One Linear to 3 x heads x 64; with QK-norm, queries and keys of each head are RMS-normalised with a scale."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool, norm_backend: NormBackend = "torch"):
        super().__init__()
        self.heads = heads
        self.linear = XavierLinear(width, 3 * width)
        self.norm_q = rms_norm(width // heads, norm_backend) if qk_norm else None
        self.norm_k = rms_norm(width // heads, norm_backend) if qk_norm else None

    def forward(self, x_BND: Tensor) -> QKV:
        q, k, v = self.linear(x_BND).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        return QKV(q, k, v)


def attend(q_BNHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, bias_B11S: Tensor | None = None) -> Tensor:
    """Softmax attention, scale 1/sqrt(K); returns (B, N, D)."""
    q_BHNK, k_BHSK, v_BHSK = q_BNHK.transpose(1, 2), k_BSHK.transpose(1, 2), v_BSHK.transpose(1, 2)
    if _products and q_BNHK.device.type == "cpu" and q_BNHK.dtype != torch.float32 and torch.is_grad_enabled():
        out = _attend_by_products(q_BHNK, k_BHSK, v_BHSK, bias_B11S)
    else:
        out = F.scaled_dot_product_attention(q_BHNK, k_BHSK, v_BHSK, attn_mask=bias_B11S)
    return out.transpose(1, 2).flatten(2)


_products = True


@contextlib.contextmanager
def always_fused() -> Iterator[None]:
    """As on a GPU: to count on a CPU what will run elsewhere."""
    global _products
    _products = False
    try:
        yield
    finally:
        _products = True


def _attend_by_products(q_BHNK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias_B11S: Tensor | None) -> Tensor:
    """The same from two matrix products. On CPUs the fused kernel's backward pass in bf16 takes five times as long
    (torch 2.14, 96 tokens)."""
    batch, heads, queries, width = q_BHNK.shape
    q, k, v = (x.reshape(batch * heads, -1, width) for x in (q_BHNK, k_BHSK, v_BHSK))
    logits = torch.bmm(q * width**-0.5, k.transpose(1, 2)).view(batch, heads, queries, -1)
    weights = torch.softmax(logits if bias_B11S is None else logits + bias_B11S, dim=-1)
    return torch.bmm(weights.view(batch * heads, queries, -1), v).view(batch, heads, queries, width)


def join(first: QKV, second: QKV) -> QKV:
    """Two streams along the sequence."""
    return QKV(*(torch.cat(pair, dim=1) for pair in zip(first, second, strict=True)))


def key_bias(mask_BL: Tensor, image_tokens: int, dtype: torch.dtype) -> Tensor:
    """Additive bias (B, 1, 1, image + text): 0 on image keys and on text keys that may be attended to, else -inf."""
    bias_BL = torch.zeros(mask_BL.shape, dtype=dtype, device=mask_BL.device).masked_fill(~mask_BL, -torch.inf)
    return F.pad(bias_BL, (image_tokens, 0))[:, None, None, :]
