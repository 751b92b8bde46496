"""Looks into every attention of a forward pass without touching the model: the largest logit, the smallest entropy.

Growing logits and an entropy that falls to 0 are what QK-RMSNorm is there to prevent (SD3 section 5.3.2, Figure 5).
    with AttentionProbe() as probe: model(x, t, text)     # then probe.seen: one entry per attention, in order of call
"""
# Shapes: B batch, H heads, N queries, S keys, K head width.

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class AttentionSeen(NamedTuple):
    """Of one attention over a batch, in float32: largest |q.k|/sqrt(K), and the entropy in nats over queries."""

    max_logit: float
    mean_entropy: float
    min_entropy: float
    keys: int

    @property
    def entropy_share(self) -> float:
        """Mean entropy over that of uniform attention to all keys: 1 looks everywhere, 0 at a single token."""
        return self.mean_entropy / math.log(self.keys)


@torch.no_grad()
def attention_seen(q_BHNK: Tensor, k_BHSK: Tensor, bias: Tensor | None = None) -> AttentionSeen:
    """Statistics of softmax(q k^T / sqrt(K) + bias); masked keys count in neither figure."""
    logits_BHNS = q_BHNK.float() @ k_BHSK.float().mT / math.sqrt(q_BHNK.shape[-1])
    biased = logits_BHNS if bias is None else logits_BHNS + bias.float()
    entropy_BHN = torch.special.entr(biased.softmax(-1)).sum(-1)
    reachable = logits_BHNS if bias is None else logits_BHNS.masked_fill(torch.isneginf(bias), 0.0)
    return AttentionSeen(
        float(reachable.abs().max()), float(entropy_BHN.mean()), float(entropy_BHN.min()), k_BHSK.shape[2]
    )


class AttentionProbe(TorchFunctionMode):
    """Records every scaled_dot_product_attention called inside the `with`; what it returns is unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[AttentionSeen] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.seen.append(attention_seen(args[0], args[1], kwargs.get("attn_mask")))
        return func(*args, **kwargs)
