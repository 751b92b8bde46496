"""Exact counts for the backbones: parameters in closed form, and FLOPs as torch.utils.flop_counter counts them.

A multiply-add is two FLOPs; norms, activations and softmax count as nothing. Heights and widths are of the latents.
"""
# Symbols: h width, N image tokens, L text tokens, S = N + L.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from model.layers import TIME_CHANNELS

if TYPE_CHECKING:
    from model.backbone import BackboneConfig
    from model.mmdit import MMDiTConfig


def forward_flops_per_image(config: BackboneConfig, height: int, width: int, text_tokens: int) -> int:
    """FLOPs of one forward pass for one image of height x width latent pixels."""
    return config.forward_flops(height, width, text_tokens)


def train_flops_per_image(config: BackboneConfig, height: int, width: int, text_tokens: int) -> int:
    """The customary three times the forward pass; the exact backward (inputs need no gradient) is in the config."""
    return 3 * config.forward_flops(height, width, text_tokens)


def activation_bytes_per_image(config: MMDiTConfig, height: int, width: int, text_tokens: int) -> int:
    """Bytes in bf16 that the joint blocks keep per image for the backward pass, without recomputation.

    What autograd saves in one block on the meta device, without parameters and without attention matrices (fused
    attention keeps none), times the depth.
    """
    from model.mmdit import MMDiTBlock

    tokens, bf16 = _tokens(config, height, width), torch.bfloat16
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


def parameter_count(config: BackboneConfig) -> int:
    return config.parameter_count()


def mmdit_parameters(config: MMDiTConfig) -> int:
    """Closed form of facts A.4, with other channel counts, QK-norm (256 per block) and dual attention."""
    h, pixels = config.width, config.patch**2 * config.in_channels
    qk = 2 * (h // config.heads) if config.qk_norm else 0
    stream, final_text = 18 * h * h + 15 * h + qk, 5 * h * h + 5 * h + qk
    dual = len(config.dual_attention) * (3 * h * h + 3 * h + 4 * h * h + 4 * h + qk)
    embed = (pixels + 1) * h + (TIME_CHANNELS + 1 + config.pooled_width + 1) * h + 2 * (h * h + h)
    embed += (config.context_width + 1) * h
    last = 2 * h * h + 2 * h + pixels * h + pixels
    return (2 * config.depth - 1) * stream + final_text + dual + embed + last


def _mmdit_inner(config: MMDiTConfig, tokens: int, text_tokens: int) -> int:
    """Multiply-adds of the forward pass whose inputs all carry gradients: blocks and final layer."""
    h, pixels, s = config.width, config.patch**2 * config.in_channels, tokens + text_tokens
    joint = 12 * h * h * s + 12 * h * h + 2 * h * s * s
    last = 12 * h * h * tokens + 3 * h * h * text_tokens + 8 * h * h + 2 * h * s * s
    dual = len(config.dual_attention) * (4 * h * h * tokens + 3 * h * h + 2 * h * tokens * tokens)
    return (config.depth - 1) * joint + last + dual + 2 * h * h + pixels * h * tokens


def _mmdit_stem(config: MMDiTConfig, tokens: int, text_tokens: int) -> int:
    """Multiply-adds of the layers that read data: their inputs need no gradient."""
    h, pixels = config.width, config.patch**2 * config.in_channels
    return pixels * h * tokens + (TIME_CHANNELS + config.pooled_width) * h + config.context_width * h * text_tokens


def _tokens(config: MMDiTConfig, height: int, width: int) -> int:
    return (height // config.patch) * (width // config.patch)


def mmdit_forward_flops(config: MMDiTConfig, height: int, width: int, text_tokens: int) -> int:
    tokens, h = _tokens(config, height, width), config.width
    stem = _mmdit_stem(config, tokens, text_tokens) + 2 * h * h
    return 2 * (stem + _mmdit_inner(config, tokens, text_tokens))


def mmdit_backward_flops(config: MMDiTConfig, height: int, width: int, text_tokens: int) -> int:
    tokens, h = _tokens(config, height, width), config.width
    inner = _mmdit_inner(config, tokens, text_tokens) + 2 * h * h
    return 2 * (2 * inner + _mmdit_stem(config, tokens, text_tokens))
