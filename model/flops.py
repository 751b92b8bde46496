"""Exact counts for any backbone: parameters in closed form, and FLOPs as torch.utils.flop_counter counts them.

The closed forms stand beside each backbone. A multiply-add is two FLOPs; norms, activations and softmax count as
nothing. Heights and widths are of the latents.
"""
# Symbols: h width, N image tokens, L text tokens, S = N + L.

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.backbones.trunk import TokenConfig


def estimate_train_flops(config: TokenConfig, height: int, width: int, text_tokens: int) -> int:
    """The customary three times the forward pass; the exact backward (inputs need no gradient) is in the config."""
    return 3 * config.count_forward_flops(height, width, text_tokens)


def estimate_adapter_flops(
    config: TokenConfig, height: int, width: int, text_tokens: int, *, adapter_parameters: int,
    forward_passes: int = 1, backward_passes: int = 1,
) -> int:  # fmt: skip
    """An estimate for low-rank adapters on frozen weights. A frozen weight needs no gradient of its own, so a backward
    pass costs what a forward pass does; adapters are counted by their share of the parameters, at the customary three
    forward passes for a forward and a backward one (1.5 a pass)."""
    passes = forward_passes + backward_passes
    share = passes * 1.5 * adapter_parameters / config.count_parameters()
    return round(config.count_forward_flops(height, width, text_tokens) * (passes + share))
