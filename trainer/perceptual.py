"""Latents compared as pictures: the frozen decoder, and a network that tells how alike its pictures look."""
# Shapes: B batch, C latent channels, H and W latent height and width.

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_pipeline.checkpoints import resolve
from infra.log import get_logger
from model.encoders.vae import Latents, load_vae
from model.perceptual import load_perceptual
from trainer.recipe import Recipe

log = get_logger("perceptual")


def open_perceptual(recipe: Recipe, latents: Latents, device: torch.device) -> "PerceptualLoss | None":
    """The recipe's perceptual loss, with the autoencoder of `latents`; None where it asks for none."""
    where = recipe.student.perceptual
    return None if where is None else PerceptualLoss(where, latents, device=device)


class PerceptualLoss:
    """Distance of two batches of normalised latents as pictures, (B), in fp32; the first ones get a gradient.

    `where`: KIND:CHECKPOINT, features:FOLDER or lpips-vgg:FILE (model/perceptual.py). Decoder and network are frozen
    and whole on every rank.
    """

    def __init__(self, where: str, latents: Latents, *, device: torch.device) -> None:
        kind, _, path = where.partition(":")
        self._latents = latents
        self._network = load_perceptual(kind, resolve(path)).to(device)
        self._vae: Any = load_vae(resolve(latents.checkpoint)).to(device)
        if path == "world:clip":
            log.info("perceptual loss: features of the world's tiny CLIP, which knows the world's drawings and no more")

    def __call__(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        with torch.no_grad():
            wanted_BCHW = self.decode(b_BCHW.float())
        # What decoder and network keep for the gradient is large at 1024 pixels: it is computed again instead.
        distance_B = checkpoint(self.compare, a_BCHW.float(), wanted_BCHW, use_reentrant=False)
        assert isinstance(distance_B, Tensor)
        return distance_B

    @property
    def parts(self) -> tuple[nn.Module, nn.Module]:
        """Autoencoder and network."""
        return self._vae, self._network

    def compare(self, a_BCHW: Tensor, wanted_BCHW: Tensor) -> Tensor:
        """Distance of the pictures of latents from pictures."""
        return self._network(self.decode(a_BCHW), wanted_BCHW)

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Pictures in [-1, 1], more or less: not clamped, as a clamped pixel has no gradient."""
        return self._vae.decode(self._latents.denormalise(latent_BCHW)).sample
