"""Eager speed of our MM-DiT and diffusers' with the same weights: `python tests/bench/model_vs_diffusers.py [THREADS]`.

Training step (forward and backward), forward pass, and sampling step (both branches of guidance, Euler) in fp32 and
bf16: interleaved, each first in every other round, median of 30 after 3 rounds of warm-up. The paired ratio is the
median over rounds of theirs / ours, so drifts of the machine cancel; CPU seconds stand beside wall seconds, because on
a shared machine only the former mean something.
"""
# Shapes: B batch, C latent channels, H and W of the latents, L text tokens, D context width.

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from model.backbones.mmdit import MMDiTConfig
from model.diffusion.sampler import solve
from model.encoders.text import TextCond
from model.files.names import make_diffusers_config, to_diffusers

ROUNDS, WARM_UP, BATCH = 30, 3, 16
GUIDANCE, STEPS = 4.0, 2
CASES = ((2, True), (4, True), (4, False))
Run = Callable[[], Tensor]


class Seconds(NamedTuple):
    wall: float
    cpu: float


def runs_of(config: MMDiTConfig, dtype: torch.dtype) -> dict[str, dict[str, Run]]:
    """What to do -> whose model -> one go, on the same weights, latents, times and text; checked to be the same."""
    torch.manual_seed(0)
    ours = config.build()
    for parameter in ours.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    theirs: Any = SD3Transformer2DModel(**make_diffusers_config(config))
    theirs.load_state_dict(dict(to_diffusers(config, ours.state_dict())))
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    x, t_B = torch.randn(BATCH, 8, 16, 16).to(dtype), torch.rand(BATCH)
    text, nothing = (TextCond(torch.randn(BATCH, 32, 384), torch.randn(BATCH, 128)).to(dtype=dtype) for _ in range(2))
    both = TextCond.cat([nothing, text])

    def call(latents: Tensor, cond: TextCond, levels: Tensor) -> Tensor:
        return theirs(latents, cond.context_BLD, cond.pooled_BP, levels, return_dict=False)[0]

    def denoise() -> Tensor:
        """The loop of StableDiffusion3Pipeline."""
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(STEPS)
        latents = x
        for t in scheduler.timesteps:
            without, with_text = call(torch.cat([latents] * 2), both, t.expand(2 * BATCH)).chunk(2)
            guided = without + GUIDANCE * (with_text - without)
            latents = scheduler.step(guided, t, latents, return_dict=False)[0]
        return latents

    def sampled() -> Tensor:
        return solve(
            ours, x, text, nothing, steps=STEPS, guidance=GUIDANCE, shift=3.0, formulation="rf", grid="released"
        ).latents

    def predict() -> dict[str, Run]:
        return {"beeline": lambda: ours(x, t_B, text), "diffusers": lambda: call(x, text, 1000 * t_B)}

    out = {"train": predict(), "forward": predict(), "sample": {"beeline": sampled, "diffusers": denoise}}
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    for pair in out.values():
        with torch.no_grad():
            torch.testing.assert_close(*(run().float() for run in pair.values()), **close)
    return out


def measure(runs: Mapping[str, Run], *, train: bool) -> dict[str, list[Seconds]]:
    """Seconds of every round; the parameters' gradients accumulate in both alike."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in runs}
    with torch.set_grad_enabled(train):
        for number in range(ROUNDS + WARM_UP):
            order = list(runs) if number % 2 else list(runs)[::-1]
            for name in order:
                wall, cpu = time.perf_counter(), time.process_time()
                out = runs[name]()
                if train:
                    out.float().square().mean().backward()
                seconds[name].append(Seconds(time.perf_counter() - wall, time.process_time() - cpu))
    return {name: rows[WARM_UP:] for name, rows in seconds.items()}


def line(label: str, rows: Mapping[str, list[Seconds]], per: int) -> str:
    cells = [
        f"{1e3 / per * statistics.median(s.wall for s in seconds):.1f} / "
        f"{1e3 / per * statistics.median(s.cpu for s in seconds):.1f}"
        for seconds in rows.values()
    ]
    pairs = list(zip(rows["beeline"], rows["diffusers"], strict=True))
    wall, cpu = (
        statistics.median(getattr(b, clock) / getattr(a, clock) for a, b in pairs) for clock in Seconds._fields
    )
    return f"{label:32}{cells[0]:>18}{cells[1]:>18}{wall:>14.3f} / {cpu:.3f}"


def main() -> None:
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    torch.set_num_threads(threads)
    print(f"{threads} threads, batch {BATCH}, 64 image and 32 text tokens, median of {ROUNDS} (wall / CPU)")
    print(f"{'':32}{'beeline ms':>18}{'diffusers ms':>18}{'theirs/ours, paired':>22}")
    for dtype in (torch.float32, torch.bfloat16):
        for depth, qk_norm in CASES:
            config = MMDiTConfig(
                depth=depth, in_channels=8, context_width=384, pooled_width=128, qk_norm=qk_norm,
                pos_max=16, pos_tokens=8, pos_base=8,
            )  # fmt: skip
            for what, runs in runs_of(config, dtype).items():
                rows = measure(runs, train=what == "train")
                label = f"{str(dtype)[6:]:9}d{depth} {'QK-norm' if qk_norm else 'plain':8}{what}"
                print(line(label, rows, STEPS if what == "sample" else 1), flush=True)


if __name__ == "__main__":
    main()
