"""A grid of sample pictures at each save: the EMA weights draw the same captions from the same noise."""
# Shapes: B batch, C latent channels, H and W latent height and width.

import io
import math

import torch
from torch import Tensor

from data_pipeline.checkpoints import resolve
from data_pipeline.loading.loader import Dataset
from infra import storage
from infra.errors import UserError
from infra.log import get_logger
from model.diffusion.few_step import FewStep
from model.diffusion.sampler import solve
from model.encoders.vae import load_vae
from model.seeding import keyed_normal
from trainer.exports.card import describe_student
from trainer.recipe import Recipe
from trainer.zero.engine import ZeroEngine
from trainer.zero.group import Group

log = get_logger("samples")
STEPS, GUIDANCE = 20, 4.0  # our choice, for a quick look; evaluation has settings of its own


class Sampler:
    """Draws the first captions of the val split by Euler's method, with classifier-free guidance whose unconditional
    input is zeros."""

    def __init__(self, recipe: Recipe, dataset: Dataset, group: Group) -> None:
        self.recipe, self.dataset, self.group = recipe, dataset, group
        bucket = next(iter(dataset.bucket_ranges.values()))
        self.student = FewStep.of(describe_student(recipe, dataset.info))
        # A student with baked guidance has learnt its teacher's; guidance while sampling would multiply with it.
        self.guidance = GUIDANCE if self.student is None or self.student.guidance_kind == "kept" else 1.0
        self.steps = (self.student and self.student.default_steps) or STEPS
        self.batch = dataset.read(bucket[: recipe.logging.samples])
        # Captions that each rank draws.
        self.share = math.ceil(len(self.batch.keys) / group.world_size)

    def draw(self, engine: ZeroEngine, uri: str) -> None:
        """Draw the grid with the weights that the engine's forward passes use now, and write it as PNG to `uri`.
        Collective."""
        group, batch = self.group, self.batch
        # The last rank may have fewer captions of its own; it repeats some, as every pass is a collective.
        rows = torch.arange(group.rank * self.share, (group.rank + 1) * self.share) % len(batch.keys)
        text = batch.text[rows].to(group.device)
        if batch.noise_BCHW is None:
            noise_BCHW = keyed_normal(self.recipe.seed, rows, "samples", batch.latent_BCHW.shape[1:])
        else:
            noise_BCHW = batch.noise_BCHW[rows]  # of couplings: the noise that the teacher started from
        with engine.inference():
            drawn_BCHW = solve(
                engine,
                noise_BCHW.to(group.device),
                text,
                text.zeros_like(),
                steps=self.steps,
                guidance=self.guidance,
                shift=self.recipe.shift,
                formulation=self.recipe.formulation,
                student=self.student,
            ).latents
        all_BCHW = torch.zeros(group.world_size * self.share, *drawn_BCHW.shape[1:], device=group.device)
        all_BCHW[group.rank * self.share : (group.rank + 1) * self.share] = drawn_BCHW
        latents_BCHW = group.sum_(all_BCHW).cpu()[: len(batch.keys)]
        if group.rank == 0:
            self._write(latents_BCHW, uri)

    def _write(self, latents_BCHW: Tensor, uri: str) -> None:
        """Decode the latents and write the grid, and captions.txt beside it. A failure must not end the training: it is
        logged."""
        try:
            vae = load_vae(resolve(self.dataset.vae.checkpoint))
            images = self.dataset.vae.decode(vae, latents_BCHW)
            storage.write_bytes(uri, draw_grid(images))
            captions = "\n".join(self.batch.captions) + "\n"
            storage.write_bytes(uri.rsplit("/", 1)[0] + "/captions.txt", captions.encode())
        except (UserError, OSError) as error:
            log.warning("no sample grid: %s", error)


def draw_grid(images_BCHW: Tensor, *, columns: int = 4) -> bytes:
    """A PNG of the images (values from -1 to 1), row by row, `columns` in a row."""
    from PIL import Image
    from torchvision.utils import make_grid

    grid = make_grid(images_BCHW, nrow=columns, padding=2, normalize=True, value_range=(-1, 1), pad_value=1.0)
    buffer = io.BytesIO()
    Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
