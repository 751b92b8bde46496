"""Micro-batches with their times and noise. For a GPU a thread makes them ahead of the loop, in page-locked memory."""
# Shapes: B batch, C latent channels, H and W latent height and width.

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.loading.batch import LatentBatch
from data_pipeline.loading.loader import Batches, Dataset, share_captions
from data_pipeline.loading.order import DataExceptions
from infra.ahead import ReadAhead
from infra.errors import UserError, nearest
from model.diffusion.flow import Formulation, get_formulation
from model.encoders.text import TextCond
from model.seeding import keyed_normal, keyed_uniform
from trainer.recipe import Data, Recipe, read_caption_weights

AHEAD = 2  # micro-batches that are made while the GPU computes


class MicroBatch(NamedTuple):
    """A micro-batch and its draws, which depend on (seed, position) only, never on rank or batch."""

    batch: LatentBatch
    t_B: Tensor
    """Training times, float64 on the CPU."""
    noise_BCHW: Tensor
    exceptions: DataExceptions = DataExceptions()
    """Shards and positions that were left out of the data when this micro-batch was read; a checkpoint keeps them."""
    r_B: Tensor | None = None
    """Second times, for networks that take them."""
    pinned: bool = False
    """All of it lies in page-locked memory."""

    def pin_memory(self) -> "MicroBatch":
        """A copy in page-locked (pinned) memory, from which a GPU copies while the CPU goes on."""
        latent_BCHW, text, rejected = self.batch.latent_BCHW, self.batch.text, self.batch.rejected_BCHW
        batch = self.batch._replace(
            latent_BCHW=latent_BCHW.pin_memory(), text=text.pin_memory(),
            rejected_BCHW=None if rejected is None else rejected.pin_memory(), noise_BCHW=None,
        )  # fmt: skip
        r_B = None if self.r_B is None else self.r_B.pin_memory()
        return MicroBatch(
            batch, self.t_B.pin_memory(), self.noise_BCHW.pin_memory(), self.exceptions, r_B=r_B, pinned=True
        )

    def to(self, device: torch.device) -> "DeviceBatch":
        """The micro-batch on the device. From page-locked memory the copies are asynchronous. From ordinary memory they
        are not: the CPU could overwrite that memory before the GPU has read it."""

        def send(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=self.pinned)

        x0_BCHW, rejected_BCHW = send(self.batch.latent_BCHW), self.batch.rejected_BCHW
        if rejected_BCHW is not None:
            x0_BCHW = torch.cat([x0_BCHW, send(rejected_BCHW)])
        text = self.batch.text.to(device, non_blocking=self.pinned)
        r_B = None if self.r_B is None else send(self.r_B)
        return DeviceBatch(x0_BCHW, send(self.noise_BCHW), send(self.t_B), text, r_B)


class DeviceBatch(NamedTuple):
    """A micro-batch on its device."""

    x0_BCHW: Tensor
    """Clean latents. For pairs (2B of them): first the B preferred ones, then the B rejected ones."""
    noise_BCHW: Tensor
    t_B: Tensor
    text: TextCond
    r_B: Tensor | None = None


def draw_noise(batch: LatentBatch, formulation: Formulation, *, seed: int, shift: float) -> MicroBatch:
    """The batch with a time and noise for each sample, keyed by (seed, position); of couplings, the noise that their
    latents were made of."""
    t_B = formulation.draw_timesteps(keyed_uniform(seed, batch.positions, "timestep"), shift)
    if batch.noise_BCHW is not None:
        return MicroBatch(batch, t_B, batch.noise_BCHW)
    return MicroBatch(batch, t_B, keyed_normal(seed, batch.positions, "noise", batch.latent_BCHW.shape[1:]))


def draw_for(recipe: Recipe, batch: LatentBatch) -> MicroBatch:
    """The batch with all that the recipe's objective draws: times and noise, and second times r <= t where its network
    takes them: r = t for a share `equal_times` (there the loss is flow matching's), r = 0 for a share `to_zero` (what
    the last step asks), else uniform between."""
    micro = draw_noise(batch, get_formulation(recipe.formulation), seed=recipe.seed, shift=recipe.shift)
    if not recipe.model.second_time:
        return micro
    equal, zero = recipe.student.equal_times, recipe.student.to_zero
    u_B = keyed_uniform(recipe.seed, batch.positions, "second time")
    between_B = (u_B - equal - zero) / max(1 - equal - zero, 1e-12)
    r_B = torch.where(u_B < equal + zero, torch.zeros_like(micro.t_B), micro.t_B * between_B.clamp(0, 1))
    return micro._replace(r_B=torch.where(u_B < equal, micro.t_B, r_B))


def choose_caption_weights(data: Data, dataset: Dataset) -> dict[str, float]:
    """The probability of each caption by name, for those that the dataset has. Not normalised."""
    names = dataset.info.captions
    if not data.caption_weights:
        return share_captions(names, original=data.original_captions)
    wanted = read_caption_weights(data.caption_weights)
    missing = next((name for name in wanted if name not in names), None)
    if missing is not None:
        known = f"{nearest(missing, names)}: one of {', '.join(names)}"
        raise UserError(f"--data.caption-weights: {dataset.uri} has no caption {missing!r}{known}")
    return {name: weight for name, weight in wanted.items() if weight > 0}


class Prefetcher(Iterator[MicroBatch]):
    """Iterates over the micro-batches of `batches`, with times and noise. On a GPU a thread makes them ahead of the
    loop. Without it a pass of 64 images (d15 on an H200) took 148 ms, of which copies from ordinary memory took 13 ms
    and other work of the CPU 28 ms."""

    def __init__(self, batches: Batches, draw: Callable[[LatentBatch], MicroBatch], *, device: torch.device) -> None:
        """`draw` gives a batch its times and noise (`draw_for` of a recipe)."""
        self._batches, self._draw = batches, draw
        self._pinned = device.type == "cuda"
        # One thread, so that micro-batches stay in order.
        self._ahead = ReadAhead(
            self._make, itertools.repeat(None), ahead=AHEAD + 1, threads=int(self._pinned), name="feed",
            start_thread=partial(_choose_gpu, device),
        )  # fmt: skip

    def __next__(self) -> MicroBatch:
        return next(self._ahead)

    def _make(self, _: None) -> MicroBatch:
        micro = self._draw(next(self._batches))._replace(exceptions=self._batches.exceptions)
        return micro.pin_memory() if self._pinned else micro

    def close(self) -> None:
        """Stop reading ahead."""
        self._ahead.close(wait=False)
        self._batches.close()


def _choose_gpu(gpu: torch.device) -> None:
    """Called first in a new thread: select this rank's GPU, as CUDA's current device is set per thread."""
    if torch.cuda.is_available():
        torch.cuda.set_device(gpu)
