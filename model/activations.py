"""Bytes that autograd keeps of a forward pass for the backward pass, counted on fake tensors: nothing is allocated."""
# Shapes: B batch, C latent channels, H and W latent height and width, L text tokens.

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model.backbones.trunk import TokenConfig
from model.encoders.text import TextCond


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


@functools.lru_cache
def count_activations(
    config: TokenConfig, latent_shape: tuple[int, int, int], text_tokens: int, dtype: torch.dtype
) -> Activations:
    """Exact for fused attention, which keeps no matrix of tokens by tokens. Any backbone; `latent_shape` is CHW."""
    mode, model = _fake_model(config, dtype)
    with mode, _default_dtype(dtype):
        x_BCHW = torch.empty(1, *latent_shape)
        text = TextCond(torch.empty(1, text_tokens, config.context_width), torch.empty(1, config.pooled_width))
        calls: list[tuple[nn.Module, tuple[Any, ...]]] = []
        hooks = [
            block.register_forward_pre_hook(lambda module, given: calls.append((module, given)))
            for block in model.blocks
        ]
        all_kept = count_kept(model.parameters(), lambda: model(x_BCHW, torch.empty(1, dtype=torch.float32), text))
        for hook in hooks:
            hook.remove()
        found, of_class = calls, {}
        for block, given in found:
            if type(block) not in of_class:
                of_class[type(block)] = count_kept(block.parameters(), _bind(block, given))
    each = [of_class[type(block)] for block, _ in found]
    # Tokens and text; conditioning and masks are shared by all blocks.
    size = sum(x.nbytes for _, given in found for x in given if isinstance(x, Tensor) and x.dim() == 3)
    return Activations(all_kept, sum(each), max(each), size)


@functools.lru_cache(maxsize=1)
def _fake_model(config: TokenConfig, dtype: torch.dtype) -> tuple[FakeTensorMode, Any]:
    """The last one is kept: building a deep network takes longer than counting it."""
    mode = FakeTensorMode()
    with mode, _default_dtype(dtype):
        return mode, config.build()


def _bind(block: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], Any]:
    fresh = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
    return lambda: block(*fresh)


def count_kept(parameters: Iterable[Tensor], forward: Callable[[], Any]) -> int:
    """Bytes that `forward` keeps for its backward pass: each storage once; `parameters` do not count."""
    own = {p.untyped_storage()._cdata for p in parameters}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out  # until here it held what was kept, so that no storage took another's place
    return sum(found.values())


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
