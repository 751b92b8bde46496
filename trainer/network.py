"""What an objective is given and what it gives: the network as it calls it, and one loss per sample."""
# Shapes: B batch, C latent channels, H and W latent height and width.

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import NamedTuple, Protocol

from torch import Tensor

from model.encoders.text import TextCond


class Network(Protocol):
    """The network as an objective calls it: in a run the ZeroEngine, in a test any network."""

    def __call__(self, x_BCHW: Tensor, t: Tensor, text: TextCond, r: Tensor | None = None) -> Tensor: ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside the block forward passes use the frozen weights alone, without adapters and without gradients."""

    def teacher(self) -> AbstractContextManager[None]:
        """Inside the block forward passes use the weights that the run started from, without gradients."""

    def without_gradients(self) -> AbstractContextManager[None]:
        """Inside the block a forward pass keeps nothing for a gradient."""

    def precise(self) -> AbstractContextManager[None]:
        """Inside the block a forward pass keeps no gradients and computes in fp32, whatever the network trains in."""


def no_earlier(scale: float) -> Iterator[Tensor]:
    """One backward pass is all."""
    return iter(())


class Losses(NamedTuple):
    """The losses of a micro-batch: `loss_B` in fp32, one for each sample (for each pair, where samples are pairs)."""

    loss_B: Tensor
    figures: Mapping[str, Tensor] = MappingProxyType({})
    """Other values for each sample, shape (B), by name; their means are logged."""
    earlier: Callable[[float], Iterator[Tensor]] = no_earlier
    """Where the gradient goes back through several passes: further losses, each asked for after the backward pass of
    the one before. Takes the factor by which backward passes scale a loss."""
