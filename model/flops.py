"""Exact counts for any backbone: parameters in closed form, and FLOPs as torch.utils.flop_counter counts them.

The closed forms stand beside each backbone. A multiply-add is two FLOPs; norms, activations and softmax count as
nothing. Heights and widths are of the latents.
"""
# Symbols: h width, N image tokens, L text tokens, S = N + L.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from model.mmdit import MMDiTConfig
    from model.trunk import TokenConfig


def forward_flops_per_image(config: TokenConfig, height: int, width: int, text_tokens: int) -> int:
    """FLOPs of one forward pass for one image of height x width latent pixels."""
    return config.forward_flops(height, width, text_tokens)


def train_flops_per_image(config: TokenConfig, height: int, width: int, text_tokens: int) -> int:
    """The customary three times the forward pass; the exact backward (inputs need no gradient) is in the config."""
    return 3 * config.forward_flops(height, width, text_tokens)


def activation_bytes_per_image(config: MMDiTConfig, height: int, width: int, text_tokens: int) -> int:
    """Bytes in bf16 that the joint blocks keep per image for the backward pass, without recomputation.

    What autograd saves in one block on the meta device, without parameters and without attention matrices (fused
    attention keeps none), times the depth.
    """
    from model.mmdit import MMDiTBlock

    tokens, bf16 = (height // config.patch) * (width // config.patch), torch.bfloat16
    with torch.device("meta"):
        block = MMDiTBlock(config).to(bf16)
        shapes = ((1, tokens, config.width), (1, text_tokens, config.width), (1, config.width))
        inputs = [torch.empty(shape, dtype=bf16, requires_grad=True) for shape in shapes]
    own = {p.untyped_storage()._cdata for p in block.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and tensor.shape[-2:] != (tokens + text_tokens,) * 2:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(*inputs)
    assert out[0].shape == inputs[0].shape
    return sum(kept.values()) * config.depth


def parameter_count(config: TokenConfig) -> int:
    return config.parameter_count()
