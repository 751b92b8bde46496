"""Records logits and entropies of every attention in a forward pass, without a change to the model.

QK-RMSNorm prevents that logits grow and that the entropy falls to 0 (SD3 section 5.3.2, Figure 5).
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


class AttentionStatistics(NamedTuple):
    """One attention over a batch, in float32: the largest |q.k|/sqrt(K), the mean and the least entropy of a query's
    softmax in nats, and the number of keys S."""

    max_logit: float
    mean_entropy: float
    min_entropy: float
    keys: int

    @property
    def entropy_share(self) -> float:
        """Mean entropy over log(keys), the entropy of uniform attention: 1 attends to all keys alike, 0 to one."""
        return self.mean_entropy / math.log(self.keys)


@torch.no_grad()
def measure_attention(q_BHNK: Tensor, k_BHSK: Tensor, bias: Tensor | None = None) -> AttentionStatistics:
    """Statistics of softmax(q k^T / sqrt(K) + bias); masked keys count neither as logits nor in the entropy."""
    largest, entropies = 0.0, []
    for head in range(q_BHNK.shape[1]):  # one at a time: at 1024 px a matrix has 18 million entries
        logits_BNS = q_BHNK[:, head].float() @ k_BHSK[:, head].float().mT / math.sqrt(q_BHNK.shape[-1])
        if bias is not None:  # one bias for all heads: (B or 1, 1, N or 1, S)
            masked = torch.isneginf(bias[:, 0])
            largest = max(largest, float(logits_BNS.masked_fill(masked, 0.0).abs().max()))
            logits_BNS = logits_BNS + bias[:, 0].float()
        else:
            largest = max(largest, float(logits_BNS.abs().max()))
        entropies.append(torch.special.entr(logits_BNS.softmax(-1)).sum(-1))
    entropy_HBN = torch.stack(entropies)
    return AttentionStatistics(largest, float(entropy_HBN.mean()), float(entropy_HBN.min()), k_BHSK.shape[2])


class AttentionProbe(TorchFunctionMode):
    """Records every scaled_dot_product_attention that is called inside the `with`; its results stay the same.

    `samples`: measure only so many samples of a batch, the first. Blocks must not be compiled: they would be traced
    anew.
    """

    def __init__(self, *, samples: int | None = None) -> None:
        super().__init__()
        self.seen: list[AttentionStatistics] = []
        self._samples = slice(samples)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            bias = kwargs.get("attn_mask")
            few = None if bias is None else bias[self._samples]
            self.seen.append(measure_attention(args[0][self._samples], args[1][self._samples], few))
        return func(*args, **kwargs)
