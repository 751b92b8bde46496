"""Latents compared as pictures: the frozen decoder, and a network that tells how alike its pictures look."""
# Shapes: B batch, C latent channels, H and W latent height and width.

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data_pipeline.checkpoints import resolve
from data_pipeline.loading.loader import Dataset
from infra.log import get_logger
from model.encoders.vae import Latents, load_vae
from model.perceptual import load_perceptual
from trainer.recipe import Recipe
from trainer.zero.group import Group

log = get_logger("perceptual")


def open_perceptual(recipe: Recipe, dataset: Dataset, group: Group) -> "PerceptualLoss | None":
    """The recipe's perceptual loss; None where it asks for none."""
    where = recipe.student.perceptual
    return None if where is None else PerceptualLoss(where, dataset.vae, device=group.device)


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
            wanted_BCHW = self._decode(b_BCHW.float())
        # What decoder and network keep for the gradient is large at 1024 pixels: it is computed again instead.
        distance_B = checkpoint(self._compare, a_BCHW.float(), wanted_BCHW, use_reentrant=False)
        assert isinstance(distance_B, Tensor)
        return distance_B

    def _compare(self, a_BCHW: Tensor, wanted_BCHW: Tensor) -> Tensor:
        return self._network(self._decode(a_BCHW), wanted_BCHW)

    def _decode(self, latent_BCHW: Tensor) -> Tensor:
        """Pictures in [-1, 1], more or less: not clamped, as a clamped pixel has no gradient."""
        return self._vae.decode(self._latents.denormalise(latent_BCHW)).sample
