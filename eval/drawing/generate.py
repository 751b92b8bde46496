"""Images from exported weights: one seed per (prompt, image), so that a picture never depends on the batch it came in.

Shapes: B images in a batch, C latent channels, H and W latent height and width.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor

from data_pipeline.checkpoints import find_weights, resolve
from infra.codec import from_json
from infra.device import Precision, resolve_device, resolve_precision
from infra.errors import MissingError, UserError
from model.bfloat16 import convert_to_bfloat16
from model.diffusion.few_step import FewStep
from model.diffusion.sampler import Solver, solve
from model.encoders.networks import TextEncoders, load_text_encoders
from model.encoders.text import TextCond, TextSpec, assemble, make_unconditional
from model.encoders.vae import Latents, load_vae
from model.files.weights import load_model
from model.seeding import keyed_normal

NEEDED_META = ("text_spec", "vae", "resolution", "formulation")
DECODED = 16  # pictures that leave the autoencoder at once: more of them fall out of a core's cache


@dataclass(frozen=True)
class Sampling:
    """How an image is generated. All fields but `batch` and `device` change the result and enter the protocol hash."""

    steps: int = 25
    guidance: float = 4.0
    """classifier-free guidance; 1 turns it off"""
    solver: Solver = "euler"
    """dpm: DPM-Solver++(2M), of second order at Euler's cost"""
    shift: float | None = None
    """resolution shift of the timesteps; None takes the weights' own"""
    unconditional: Literal["zeros", "empty_prompt"] = "zeros"
    """what guidance moves away from: dropped encoders (our training) or the empty caption (released SD3)"""
    seed: int = 0
    without_t5: Annotated[bool, tyro.conf.Suppress] = False
    """--t5 without: zeros in the T5 seat, as where that encoder is left out to save memory"""
    precision: Precision = "auto"
    """of the network: fp32, bf16 (two to four times as fast where hardware has it), or auto: what this machine does
    best"""
    batch: int = 64
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N"""

    def resolve(self) -> "Sampling":
        """The settings with `auto` precision resolved for this machine, so that they mean the same on any other."""
        return replace(self, precision=resolve_precision(self.precision, self.device))

    def describe(self) -> dict[str, Any]:
        """All that decides the pictures, as it was asked for. A device decides none; the precision does, and `auto` is
        an answer that is not given yet."""
        stated = {name: value for name, value in asdict(self).items() if name not in ("batch", "device")}
        # As protocols were written before there was a choice: their hashes stay.
        if not self.without_t5:
            del stated["without_t5"]
        if stated["precision"] == "fp32":
            del stated["precision"]
        return stated

    def protocol(self) -> dict[str, Any]:
        """The settings as a number's protocol holds them; the precision must be resolved before."""
        if self.precision == "auto":
            raise ValueError("a protocol needs a precision: settle `auto` where the evaluation starts")
        return self.describe()


class ImageRequest(NamedTuple):
    """One image to draw. `source` tells apart prompts that share their words."""

    text: str
    source: str = ""
    number: int = 0

    @property
    def purpose(self) -> str:
        """A part of the random key of the noise, beside seed and number. A change of this text would change all
        pictures."""
        return f"eval image/{self.source}/{self.text}"


class SolverInputs(NamedTuple):
    """What a solver starts from, for a batch of pictures."""

    noise_BCHW: Tensor
    text: TextCond
    unconditional: TextCond


class Painter:
    """Exported weights with the encoders and the autoencoder that they were trained with."""

    def __init__(self, weights: str | Path, *, device: str = "cpu") -> None:
        device = resolve_device(device)
        advice = (
            "give a run's weights/ema.safetensors, or write one from its checkpoint: "
            "python -m trainer export RUN --data URI --out FILE"
        )
        try:
            local = find_weights(weights)
        except MissingError as error:
            raise MissingError(f"{error}; {advice}") from error
        try:
            self._loaded, self.meta = load_model(local)
        except UserError as error:
            raise UserError(f"{error}; {advice}") from error
        missing = [key for key in NEEDED_META if key not in self.meta]
        if missing:
            raise UserError(
                f"{weights}: its metadata lacks {', '.join(missing)}, which sampling needs; export it again"
            )
        self.device = device
        self.student = FewStep.of(self.meta)
        self.spec = TextSpec.from_json(self.meta["text_spec"])
        self.latents = from_json(Latents, self.meta["vae"], where=f"{weights}: vae")
        side = self.meta["resolution"] // self.latents.factor
        self.shape_CHW = (self.latents.channels, side, side)

    @functools.cached_property
    def model(self) -> torch.nn.Module:
        """The network in float32; it is moved to the device at first use."""
        return self._loaded.to(self.device)

    @functools.cached_property
    def _half(self) -> Callable[..., Tensor]:
        return convert_to_bfloat16(self._loaded, self.device)

    def check(self, sampling: Sampling) -> None:
        """UserError for settings with which these weights are not drawn."""
        if sampling.batch < 1:
            raise UserError(f"--batch {sampling.batch}: expected 1 or more")
        if self.student is not None:
            self.student.check(steps=sampling.steps, guidance=sampling.guidance, solver=sampling.solver)

    def paint(self, requests: Iterable[ImageRequest], sampling: Sampling) -> Iterator[tuple[ImageRequest, np.ndarray]]:
        """(request, uint8 RGB image) in the order of the requests, a batch at a time."""
        self.check(sampling)
        sampling = sampling.resolve()
        waiting: list[ImageRequest] = []
        for request in requests:
            waiting.append(request)
            if len(waiting) == sampling.batch:
                yield from zip(waiting, self._draw_batch(waiting, sampling))
                waiting = []
        if waiting:
            yield from zip(waiting, self._draw_batch(waiting, sampling))

    def _draw_batch(self, requests: Sequence[ImageRequest], sampling: Sampling) -> list[np.ndarray]:
        return self.decode(self.solve(self.prepare(requests, sampling), sampling))

    @torch.inference_mode()
    def prepare(self, requests: Sequence[ImageRequest], sampling: Sampling) -> SolverInputs:
        """Noise, text and the unconditional input of these pictures, on the device."""
        text = self._condition([request.text for request in requests], sampling.without_t5)
        if sampling.unconditional == "zeros":
            nothing = make_unconditional(self.spec, len(requests)).to(self.device)
        else:
            nothing = self._condition([""] * len(requests), sampling.without_t5)
        noise = [keyed_normal(sampling.seed, [r.number], r.purpose, self.shape_CHW) for r in requests]
        return SolverInputs(torch.cat(noise).to(self.device), text, nothing)

    @torch.inference_mode()
    def solve(self, inputs: SolverInputs, sampling: Sampling) -> Tensor:
        """Normalised latents B x C x H x W; UserError where they are not finite."""
        network = self._half if sampling.precision == "bf16" else self.model
        latent_BCHW = solve(
            network,
            inputs.noise_BCHW,
            inputs.text,
            inputs.unconditional,
            steps=sampling.steps,
            guidance=sampling.guidance,
            shift=self.meta.get("shift", 1.0) if sampling.shift is None else sampling.shift,
            solver=sampling.solver,
            formulation=self.meta["formulation"],
            student=self.student,
        ).latents
        if not torch.isfinite(latent_BCHW).all():
            raise UserError(f"{self.meta.get('run', 'these weights')}: sampling gave numbers that are not finite")
        return latent_BCHW

    @torch.inference_mode()
    def decode(self, latent_BCHW: Tensor) -> list[np.ndarray]:
        """uint8 RGB pictures."""
        vae = _load_vae(self.meta["vae"]["checkpoint"], self.device)
        decoded = (self.latents.decode(vae, part_BCHW) for part_BCHW in latent_BCHW.split(DECODED))
        return [picture for images_BCHW in decoded for picture in to_pictures(images_BCHW)]

    def _condition(self, captions: Sequence[str], without_t5: bool) -> TextCond:
        """Each different caption goes through the encoders once."""
        known = list(dict.fromkeys(captions))
        if without_t5:
            spec = _drop_t5(self.spec)
            encoded = assemble(self.spec, _load_encoders(spec, self.device).encode(known))  # a missing seat gives zeros
        else:
            encoded = _load_encoders(self.spec, self.device).condition(known)
        rows = torch.tensor([known.index(caption) for caption in captions])
        return encoded[rows].to(self.device)


def _drop_t5(spec: TextSpec) -> TextSpec:
    """The spec whose T5 is never loaded: what leaving it out saves."""
    if spec.t5 is None:
        raise UserError("these weights have no T5 seat, so there is nothing to leave out; drop --t5 without")
    return replace(spec, encoders=tuple(encoder for encoder in spec.encoders if encoder.seat != "t5"))


@functools.lru_cache(maxsize=2)
def _load_encoders(spec: TextSpec, device: str) -> TextEncoders:
    """Shared by all checkpoints of a ladder."""
    return load_text_encoders(spec, resolve, device=device)


@functools.lru_cache(maxsize=2)
def _load_vae(checkpoint: str, device: str) -> Any:
    return load_vae(resolve(checkpoint)).to(device, memory_format=torch.channels_last)


def to_pictures(images_BCHW: Tensor) -> list[np.ndarray]:
    """uint8 H x W x 3 from [-1, 1]."""
    pixels_BHWC = ((images_BCHW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return list(pixels_BHWC.cpu().numpy())
