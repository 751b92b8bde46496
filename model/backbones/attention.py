"""Parts of attention: the qkv projection with optional QK-RMSNorm, and softmax attention over joined streams."""
# Shapes: B batch, N tokens of one stream (queries), S keys, D width, H heads, X batch times heads, K head width.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbones.layers import XavierLinear
from model.backbones.norms import NormBackend, make_rms_norm

HEAD_WIDTH = 64
# Up to this many keys _ShortAttention is faster than torch's kernel, in bfloat16 on a CPU
# (tests/bench/model_kernels.py).
SHORT = 256


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
        self.norm_q = make_rms_norm(width // heads, norm_backend) if qk_norm else None
        self.norm_k = make_rms_norm(width // heads, norm_backend) if qk_norm else None

    def forward(self, x_BND: Tensor) -> QKV:
        q, k, v = self.linear(x_BND).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        return QKV(q, k, v)


def attend(q_BNHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, bias_B11S: Tensor | None = None) -> Tensor:
    """Softmax attention, scale 1/sqrt(K); returns (B, N, D)."""
    q_BHNK, k_BHSK, v_BHSK = (x.transpose(1, 2) for x in (q_BNHK, k_BSHK, v_BSHK))
    slow = q_BHNK.is_cpu and q_BHNK.dtype == torch.bfloat16 and q_BHNK.requires_grad
    if slow and k_BHSK.shape[2] <= SHORT:
        short = _multiply if torch.compiler.is_compiling() else _ShortAttention.apply
        out_BHNK = short(q_BHNK, k_BHSK, v_BHSK, bias_B11S)
    else:
        out_BHNK = F.scaled_dot_product_attention(q_BHNK, k_BHSK, v_BHSK, attn_mask=bias_B11S)
    return out_BHNK.transpose(1, 2).flatten(2)


def _multiply(q_BHNK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias_B11S: Tensor | None) -> Tensor:
    """As `_ShortAttention`, but in plain operations, which torch.compile can fuse; logits are rounded to bfloat16."""
    batch, heads, queries, width = q_BHNK.shape
    q, k, v = (x.reshape(batch * heads, -1, width) for x in (q_BHNK, k_BHSK, v_BHSK))
    logits = torch.bmm(q * width**-0.5, k.mT).view(batch, heads, queries, -1).float()
    weights = torch.softmax(logits if bias_B11S is None else logits + bias_B11S, dim=-1).to(q.dtype)
    return torch.bmm(weights.view(batch * heads, queries, -1), v).view(batch, heads, queries, width)


class _ShortAttention(torch.autograd.Function):
    """Torch's fused forward pass, and a backward pass made of matrix products, with logits and softmax in float32.

    Why: in bfloat16 on a CPU the backward pass of torch's fused kernel (2.14) takes ten times its forward pass.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *qkv, bias = ctx.saved_tensors
        batch, heads = qkv[0].shape[:2]
        q, k, v, g = (x.reshape(batch * heads, *x.shape[2:]) for x in (*qkv, *gradients))
        scale = q.shape[-1] ** -0.5
        logits_XNS = torch.bmm(q.float() * scale, k.float().mT)
        if bias is not None:
            logits_XNS.unflatten(0, (batch, heads)).add_(bias)
        with torch.enable_grad():
            p_XNS = torch.softmax(logits_XNS.requires_grad_(), dim=-1)
        (ds_XNS,) = torch.autograd.grad(p_XNS, logits_XNS, torch.bmm(g, v.mT).float())
        p_XNS, ds_XNS = p_XNS.detach().to(q.dtype), ds_XNS.to(q.dtype)
        out = torch.bmm(ds_XNS, k * scale), torch.bmm(ds_XNS.mT, q * scale), torch.bmm(p_XNS.mT, g)
        # The gradients get the inputs' memory layout, tokens before heads, which makes the next steps faster.
        return *(x.unflatten(0, (batch, heads)).transpose(1, 2).contiguous().transpose(1, 2) for x in out), None


def join(first: QKV, second: QKV) -> QKV:
    """Both streams, one after the other along the tokens."""
    return QKV(*(torch.cat(pair, dim=1) for pair in zip(first, second, strict=True)))


def separate(joined_BSD: Tensor, *tokens: int) -> tuple[Tensor, ...]:
    """Split a joined sequence (B, S, D) into its streams of `tokens` tokens each. Each is contiguous: given a slice,
    torch's linear layers on a CPU copy the weight once per sample (2 to 6 % of a forward pass at depth 4)."""
    return tuple(x.contiguous() for x in joined_BSD.split(tokens, dim=1))


def make_key_bias(mask_BL: Tensor, image_tokens: int, dtype: torch.dtype) -> Tensor:
    """Additive bias (B, 1, 1, image + text): 0 on image keys and on text keys that may be attended to, else -inf."""
    bias_BL = torch.zeros(mask_BL.shape, dtype=dtype, device=mask_BL.device).masked_fill(~mask_BL, -torch.inf)
    return F.pad(bias_BL, (image_tokens, 0))[:, None, None, :]
