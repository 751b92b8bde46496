"""The two gradients that we write out for CPUs against torch's own: `python tests/bench/model_kernels.py`.

Forward and backward of attention in bf16 by number of tokens (4 heads; where ours stops being faster is SHORT in
model/backbones/attention.py) and of RMSNorm: interleaved, paired ratios of CPU seconds, median of 30, one thread.
"""
# Shapes: B batch, N tokens, H heads, K head width.

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from model.backbones import attention
from model.backbones.norms import EPS, CPURMSNorm

ROUNDS, WARM_UP, TOKENS_IN_ALL = 30, 3, 1536
CASES = (48, 96, 192, 256, 384, 512)


def torchs_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2).flatten(2)


def own_norm(x: Tensor, weight: Tensor) -> Tensor:
    return CPURMSNorm.apply(x, weight, EPS)


def torchs_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (64,), weight, EPS)


def ratio(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """Torch's CPU seconds over ours."""
    ratios = []
    for number in range(ROUNDS + WARM_UP):
        seconds = {}
        for run in (ours, theirs) if number % 2 else (theirs, ours):
            start = time.process_time()
            out = run(*inputs)
            torch.autograd.grad(out, inputs, out.detach())
            seconds[run] = time.process_time() - start
        ratios.append(seconds[theirs] / seconds[ours])
    return statistics.median(ratios[WARM_UP:])


def main() -> None:
    torch.set_num_threads(1)
    attention.SHORT = max(CASES)
    for tokens in CASES:
        shape = (TOKENS_IN_ALL // tokens, tokens, 4, 64)
        qkv = [torch.randn(shape).bfloat16().requires_grad_() for _ in range(3)]
        print(f"attention, bf16, {tokens:4} tokens: {ratio(attention.attend, torchs_attention, qkv):.2f}", flush=True)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(16, 96, 4, 64).to(dtype).requires_grad_()
        weight = torch.ones(64, dtype=dtype, requires_grad=True)
        print(f"RMSNorm, {str(dtype)[6:]}: {ratio(own_norm, torchs_norm, [x, weight]):.2f}", flush=True)


if __name__ == "__main__":
    main()
