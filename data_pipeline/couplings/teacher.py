"""The teacher of couplings: exported weights, and the solver that takes noise to latents."""
# Shapes: B batch, C latent channels, H and W latent height and width.

import functools
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.checkpoints import find_weights, resolve
from data_pipeline.formats.couplings import Couplings
from infra.codec import from_json
from infra.errors import UserError
from model.bfloat16 import convert_to_bfloat16
from model.diffusion.few_step import FewStep
from model.diffusion.flow import get_formulation
from model.diffusion.grids import integrates_over_sigma
from model.diffusion.sampler import solve
from model.encoders.networks import load_text_encoders
from model.encoders.text import TextCond, TextSpec, make_unconditional
from model.encoders.vae import Latents
from model.files.weights import load_model, read_meta

NEEDED_META = ("text_spec", "vae", "resolution", "formulation")


class TeacherFile:
    """What a weights file says of itself, without its tensors."""

    def __init__(self, weights: str) -> None:
        self.uri, self.path = weights, find_weights(weights)
        self.meta: dict[str, Any] = read_meta(self.path)
        missing = [key for key in NEEDED_META if key not in self.meta]
        if missing:
            raise UserError(f"{weights}: its metadata lacks {', '.join(missing)}, which a teacher needs: export again")
        self.text_spec = TextSpec.from_json(self.meta["text_spec"])
        self.vae = from_json(Latents, self.meta["vae"], where=f"{weights}: vae")
        self.resolution = int(self.meta["resolution"])

    @property
    def few_step(self) -> Mapping[str, Any]:
        """What a few-step student says of itself; empty for any other weights."""
        return dict(self.meta.get("few_step") or {})

    @property
    def baked_guidance(self) -> float:
        """The guidance that these weights learnt from couplings; 1 where they learnt none."""
        return float(self.few_step["guidance"]) if self.few_step.get("guidance_kind") == "baked" else 1.0

    @functools.cached_property
    def sha256(self) -> str:
        with Path(self.path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


class Teacher:
    """A teacher's network on a device, with everything that couplings say about it."""

    def __init__(self, weights: str, couplings: Couplings, *, device: str) -> None:
        file = TeacherFile(weights)
        if file.sha256 != couplings.teacher:
            raise UserError(f"{weights} changed since the couplings were begun: bring the teacher's file back")
        model, _ = load_model(file.path)
        self.spec, self.device, self._couplings = file.text_spec, device, couplings
        self._student = FewStep.of(file.meta)
        network: Callable[..., Tensor] = model.to(device)
        self._network = convert_to_bfloat16(model, device) if couplings.precision == "bf16" else network

    def solve(self, noise_BCHW: Tensor, text: TextCond) -> Tensor:
        """Normalised latents, fp32 on the CPU. The state and the times of the solver are fp32 or finer, whatever the
        network computes in: t = 750/1000 would be 752 in bf16."""
        text = text.to(self.device, torch.float32)
        if self._couplings.solver != "rk":
            return self._solve(noise_BCHW, text)
        try:
            return self._solve(noise_BCHW, text)
        except AssertionError:  # torchdiffeq's answer to numbers that are not finite, in whichever row they are
            return torch.cat([self._solve_row(noise_BCHW[b : b + 1], text[b : b + 1]) for b in range(len(noise_BCHW))])

    def _solve_row(self, noise_BCHW: Tensor, text: TextCond) -> Tensor:
        try:
            return self._solve(noise_BCHW, text)
        except AssertionError:
            return torch.full_like(noise_BCHW, torch.nan)

    def _solve(self, noise_BCHW: Tensor, text: TextCond) -> Tensor:
        c = self._couplings
        uncond = None if c.guidance == 1.0 else self._make_unconditional(text)
        return solve(
            self._network, noise_BCHW.to(self.device), text, uncond,
            steps=c.steps, guidance=c.guidance, shift=c.shift, solver=c.solver, formulation=c.formulation, grid=c.grid,
            tolerance=c.tolerance, student=self._student,
        ).latents.float().cpu()  # fmt: skip

    def _make_unconditional(self, text: TextCond) -> TextCond:
        if self._couplings.unconditional == "zeros":
            return text.zeros_like()
        return self._empty_prompt[torch.zeros(len(text), dtype=torch.long)].to(self.device)

    @functools.cached_property
    def _empty_prompt(self) -> TextCond:
        return load_text_encoders(self.spec, resolve, device=self.device).encode_empty_prompt(1).to("cpu")


def count_forwards(solver: str, steps: int, *, guidance: float, formulation: str) -> int | None:
    """Passes of the network for one coupling, both branches of guidance counted; None for rk, which chooses its own
    steps."""
    if solver == "rk":
        return None
    passes = 2 * steps if solver == "heun" else steps
    if solver == "heun" and integrates_over_sigma(get_formulation(formulation)):
        passes -= 1  # its last step, to level 0, is Euler's
    return passes * (1 if guidance == 1.0 else 2)


def time_pass(file: TeacherFile, shape: tuple[int, int, int], *, batch: int, precision: str, device: str) -> float:
    """Seconds of one pass for one sample on this machine: the faster of two passes of a batch."""
    model, _ = load_model(file.path)
    model = model.to(device)
    network: Callable[..., Tensor] = convert_to_bfloat16(model, device) if precision == "bf16" else model
    text, x_BCHW = make_unconditional(file.text_spec, batch).to(device), torch.zeros(batch, *shape, device=device)
    seconds = []
    with torch.inference_mode():
        for _ in range(2):
            began = time.monotonic()
            network(x_BCHW, torch.ones(batch, device=device), text).sum().item()
            seconds.append(time.monotonic() - began)
    return min(seconds) / batch
