"""Bytes that autograd keeps for the backward pass, counted on the meta device."""
# Shapes: B batch, C latent channels, H and W latent height and width, L text tokens.

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.text import TextCond
from model.trunk import TokenConfig
from trainer.recipe import Recipe


class Kept:
    """Counts each storage once; parameters and (on the meta device) attention matrices, which fused kernels never
    keep, do not count."""

    def __init__(self, model: nn.Module, *, matrices: int | None = None) -> None:
        self._matrices = matrices
        self._own = {p.untyped_storage()._cdata for p in model.parameters()}
        self._found: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        return sum(self._found.values())

    @contextlib.contextmanager
    def watching(self) -> Iterator["Kept"]:
        """Around a forward pass."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield self

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own and tensor.shape[-2:] != (self._matrices, self._matrices):
            self._found[storage._cdata] = storage.nbytes()
        return tensor


@dataclass(frozen=True)
class Activations:
    """Bytes for one image."""

    whole: int
    """Kept by a forward pass of the whole network."""
    blocks: int
    """Of it, by the blocks."""
    largest_block: int
    inputs: int
    """Of the blocks' inputs: what stays when blocks are recomputed."""

    def kept(self, *, recompute: bool) -> int:
        return self.whole - self.blocks + self.inputs + self.largest_block if recompute else self.whole


def activations_per_image(recipe: Recipe) -> Activations:
    """Exact for the network in the recipe's precision, without allocating it."""
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    return _count(recipe.model, recipe.data.latent_shape, recipe.data.text_tokens, dtype)


@functools.lru_cache
def _count(config: TokenConfig, latent_shape: tuple[int, int, int], tokens: int, dtype: torch.dtype) -> Activations:
    channels, height, width = latent_shape
    everything = (height // config.patch) * (width // config.patch) + tokens
    with torch.device("meta"):
        model: Any = config.build().to(dtype)
        text = TextCond(
            torch.empty(1, tokens, config.context_width, dtype=dtype), torch.empty(1, config.pooled_width, dtype=dtype)
        )
        inputs = (torch.empty(1, channels, height, width, dtype=dtype), torch.empty(1), text)
    calls: list[tuple[nn.Module, tuple[Any, ...]]] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, given: calls.append((module, given)))
    whole = _kept(model, everything, lambda: model(*inputs))
    found, of_class = list(calls), {}
    for block, given in found:
        if type(block) not in of_class:
            of_class[type(block)] = _kept(block, everything, _call(block, given))
    each = [of_class[type(block)] for block, _ in found]
    # Tokens and text; conditioning and masks are shared by all blocks.
    size = sum(x.nbytes for _, given in found for x in given if isinstance(x, Tensor) and x.dim() == 3)
    return Activations(whole, sum(each), max(each), size)


def _call(block: nn.Module, given: tuple[Any, ...]) -> Callable[[], Any]:
    fresh = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in given]
    return lambda: block(*fresh)


def _kept(module: nn.Module, matrices: int, forward: Callable[[], Any]) -> int:
    with Kept(module, matrices=matrices).watching() as kept:
        out = forward()
    del out
    return kept.nbytes
