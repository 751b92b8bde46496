"""Micro-batches as passes take them: with times and noise drawn; for a GPU ahead of the loop, in page-locked memory."""
# Shapes: B batch, C latent channels, H and W latent height and width.

import itertools
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.loading.batch import LatentBatch
from data_pipeline.loading.loader import Batches, Dataset
from data_pipeline.loading.order import DataExceptions
from infra.ahead import ReadAhead
from model.diffusion.flow import Formulation, get_formulation
from model.encoders.text import TextCond
from model.seeding import keyed_normal, keyed_uniform
from trainer.recipe import Recipe

AHEAD = 2  # micro-batches that are made while the GPU computes


class MicroBatch(NamedTuple):
    """A micro-batch and its draws, which depend on (seed, position) only, never on rank or batch."""

    batch: LatentBatch
    t_B: Tensor
    """Training times, float64 on the CPU."""
    noise_BCHW: Tensor
    exceptions: DataExceptions = DataExceptions()
    """What had been left out of the data when it was read: a checkpoint keeps it."""
    pinned: bool = False
    """All of it lies in page-locked memory."""

    def pin_memory(self) -> "MicroBatch":
        """In page-locked memory, from which a GPU copies by itself."""
        latent_BCHW, text, rejected = self.batch.latent_BCHW, self.batch.text, self.batch.rejected_BCHW
        batch = self.batch._replace(
            latent_BCHW=latent_BCHW.pin_memory(), text=text.pin_memory(),
            rejected_BCHW=None if rejected is None else rejected.pin_memory(),
        )  # fmt: skip
        return MicroBatch(batch, self.t_B.pin_memory(), self.noise_BCHW.pin_memory(), self.exceptions, pinned=True)

    def to(self, device: torch.device) -> "DeviceBatch":
        """What a pass computes with, on the device. Nothing waits where all is in page-locked memory. From other memory
        a copy that nobody waits for may read what was overwritten meanwhile, at least where a GPU reads the host's
        memory by itself."""

        def send(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=self.pinned)

        x0_BCHW, rejected_BCHW = send(self.batch.latent_BCHW), self.batch.rejected_BCHW
        if rejected_BCHW is not None:
            x0_BCHW = torch.cat([x0_BCHW, send(rejected_BCHW)])
        text = self.batch.text.to(device, non_blocking=self.pinned)
        return DeviceBatch(x0_BCHW, send(self.noise_BCHW), send(self.t_B), text)


class DeviceBatch(NamedTuple):
    """A micro-batch on its device."""

    x0_BCHW: Tensor
    """Latents; of pairs the preferred ones, then the rejected ones."""
    noise_BCHW: Tensor
    t_B: Tensor
    text: TextCond


def draw_noise(batch: LatentBatch, formulation: Formulation, *, seed: int, shift: float) -> MicroBatch:
    """A batch with its times and noise."""
    t_B = formulation.timesteps(keyed_uniform(seed, batch.positions, "timestep"), shift)
    return MicroBatch(batch, t_B, keyed_normal(seed, batch.positions, "noise", batch.latent_BCHW.shape[1:]))


def choose_caption_weights(recipe: Recipe, dataset: Dataset) -> dict[str, float]:
    """How often each caption is taken, of those that the recipe wants and the data has."""
    wanted = {"original": recipe.data.original_captions, "synthetic": 1 - recipe.data.original_captions}
    return {name: weight for name, weight in wanted.items() if weight > 0 and name in dataset.info.captions}


class Prefetcher(Iterator[MicroBatch]):
    """The micro-batches of `batches`, drawn by a recipe. Where the device is a GPU a thread makes them ahead: of
    148 ms of a pass of 64 images (d15 on an H200) copies from ordinary memory took 13, and 28 more were the host's."""

    def __init__(self, batches: Batches, recipe: Recipe, device: torch.device) -> None:
        self._batches, self._recipe = batches, recipe
        self._formulation = get_formulation(recipe.formulation)
        self._pinned = device.type == "cuda"
        # One thread, so that micro-batches stay in order.
        self._made = ReadAhead(
            self._make, itertools.repeat(None), ahead=AHEAD + 1, threads=int(self._pinned), name="feed",
            start_thread=partial(_choose_gpu, device),
        )  # fmt: skip

    def __next__(self) -> MicroBatch:
        return next(self._made)

    def _make(self, _: None) -> MicroBatch:
        micro = draw_noise(next(self._batches), self._formulation, seed=self._recipe.seed, shift=self._recipe.shift)
        micro = micro._replace(exceptions=self._batches.exceptions)
        return micro.pin_memory() if self._pinned else micro

    def close(self) -> None:
        """Stop reading ahead."""
        self._made.close(wait=False)
        self._batches.close()


def _choose_gpu(gpu: torch.device) -> None:
    """In a new thread: what it asks of CUDA concerns this rank's GPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(gpu)
