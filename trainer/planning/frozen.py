"""What a perceptual loss adds to a plan: its frozen decoder and network, counted on fake tensors."""
# Shapes: B batch, C latent channels, H and W latent height and width.

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.checkpoints import require_checkpoints, resolve
from infra.errors import UserError
from model.activations import count_kept
from model.encoders.vae import Latents, load_vae
from trainer.perceptual import PerceptualLoss, open_perceptual
from trainer.recipe import Recipe


@dataclass(frozen=True)
class FrozenCost:
    """Of a perceptual loss: FLOPs and kept bytes for each image, bytes of its weights on every rank."""

    flops_per_image: int
    weight_bytes: int
    activation_bytes_per_image: int
    """What is kept while the loss is computed again for the gradient."""

    def describe(self) -> str:
        return (
            f"the perceptual loss is {self.flops_per_image:.3e} of these FLOPs, {self.weight_bytes / 2**30:.3f} GiB of "
            f"weights on every rank and {self.activation_bytes_per_image / 2**30:.3f} GiB an image"
        )

    def count_bytes(self, images: int) -> int:
        return self.weight_bytes + images * self.activation_bytes_per_image


def count_frozen(loss: PerceptualLoss, latent_shape: tuple[int, int, int]) -> FrozenCost:
    """The loss of one image and its gradient, as torch counts FLOPs: the wanted picture once; the student's picture and
    both pictures' features twice, as they are computed again; and the gradient of the student's picture. `latent_shape`
    is CHW. Bytes are those of fused attention. Nothing is computed or allocated."""
    parts = nn.ModuleList(loss.parts)
    weights = {**dict(parts.named_parameters()), **dict(parts.named_buffers())}
    with FakeTensorMode() as mode:
        fake: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in weights.items()}
    with mode, FlopCounterMode(display=False) as counter, _plain_attention():
        _call_with(parts, fake, lambda: loss(*_make_latents(latent_shape)).sum().backward())
    with mode:
        kept = _call_with(parts, fake, lambda: count_kept(fake.values(), lambda: _compare(loss, latent_shape)))
    return FrozenCost(counter.get_total_flops(), sum(tensor.nbytes for tensor in weights.values()), kept)


def count_frozen_of(recipe: Recipe, decoder: str) -> FrozenCost:
    """Of the recipe's perceptual loss with that autoencoder."""
    require_checkpoints([decoder])
    latents = Latents.of(load_vae(resolve(decoder)).config, decoder)
    if latents.channels != recipe.data.latent_shape[0]:
        raise UserError(
            f"--decoder {decoder} decodes latents of {latents.channels} channels, those of recipe {recipe.name} have "
            f"{recipe.data.latent_shape[0]}"
        )
    loss = open_perceptual(recipe, latents, torch.device("cpu"))
    if loss is None:
        raise ValueError(f"recipe {recipe.name} has no perceptual loss")
    return count_frozen(loss, recipe.data.latent_shape)


def _compare(loss: PerceptualLoss, latent_shape: tuple[int, int, int]) -> Tensor:
    student_BCHW, wanted_BCHW = _make_latents(latent_shape)
    with torch.no_grad():
        picture_BCHW = loss.decode(wanted_BCHW)
    return loss.compare(student_BCHW, picture_BCHW)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Fused attention and the fast path of torch's encoder layers would be seen as 0 FLOPs."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _make_latents(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    return torch.empty(1, *shape, requires_grad=True), torch.empty(1, *shape)


class _Holder(nn.Module):
    """Lets `functional_call` put other tensors into `parts` while a function runs."""

    def __init__(self, parts: nn.Module) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def _call_with(parts: nn.Module, tensors: dict[str, Tensor], function: Callable[[], Any]) -> Any:
    return functional_call(_Holder(parts), {f"parts.{name}": tensor for name, tensor in tensors.items()}, (function,))
