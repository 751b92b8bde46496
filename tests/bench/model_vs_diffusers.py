"""Eager speed of our MM-DiT and diffusers' with the same weights: `python tests/bench/model_vs_diffusers.py [THREADS]`.

Training step (forward and backward) and sampling step (forward alone) at depths 2 and 4, with and without QK-norm:
interleaved, each first in every other round, median of 30 after 3 rounds of warm-up. The paired ratio is the median
over rounds of theirs / ours, so drifts of the machine cancel; CPU seconds stand beside wall seconds, because on a
shared machine only the former mean something.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from diffusers import SD3Transformer2DModel

from model.mmdit import MMDiTConfig
from model.names import diffusers_config, to_diffusers
from model.text import TextCond

ROUNDS, WARM_UP, BATCH = 30, 3, 16


class Seconds(NamedTuple):
    wall: float
    cpu: float


def pair(config: MMDiTConfig) -> dict[str, Callable[[], torch.Tensor]]:
    """A forward pass of each, on the same latents, times and text, checked to be the same function."""
    torch.manual_seed(0)
    ours = config.build()
    for parameter in ours.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    theirs = SD3Transformer2DModel(**diffusers_config(config))
    theirs.load_state_dict(to_diffusers(config, ours.state_dict()))
    x, t_B = torch.randn(BATCH, 8, 16, 16), torch.rand(BATCH)
    text = TextCond(torch.randn(BATCH, 32, 384), torch.randn(BATCH, 128))
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "beeline": lambda: ours(x, t_B, text),
        "diffusers": lambda: theirs(x, text.context_BLD, text.pooled_BP, 1000 * t_B, return_dict=False)[0],
    }
    torch.testing.assert_close(*(run() for run in runs.values()), atol=1e-4, rtol=1e-4)
    return runs


def measure(runs: dict[str, Callable[[], torch.Tensor]], *, train: bool) -> dict[str, list[Seconds]]:
    """Seconds of every round; the parameters' gradients accumulate in both alike."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in runs}
    with torch.set_grad_enabled(train):
        for number in range(ROUNDS + WARM_UP):
            order = list(runs) if number % 2 else list(runs)[::-1]
            for name in order:
                wall, cpu = time.perf_counter(), time.process_time()
                out = runs[name]()
                if train:
                    out.square().mean().backward()
                seconds[name].append(Seconds(time.perf_counter() - wall, time.process_time() - cpu))
    return {name: rows[WARM_UP:] for name, rows in seconds.items()}


def main() -> None:
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    torch.set_num_threads(threads)
    print(f"{threads} threads, fp32, batch {BATCH}, 64 image and 32 text tokens, median of {ROUNDS} (wall / CPU)")
    print(f"{'':32}{'beeline ms':>18}{'diffusers ms':>18}{'theirs/ours, paired':>22}")
    for depth in (2, 4):
        for qk_norm in (True, False):
            config = MMDiTConfig(
                depth=depth, in_channels=8, context_width=384, pooled_width=128, qk_norm=qk_norm,
                pos_max=16, pos_tokens=8, pos_base=8,
            )  # fmt: skip
            runs = pair(config)
            for train in (True, False):
                rows = measure(runs, train=train)
                label = f"d{depth} {'QK-norm' if qk_norm else 'plain':8}{'train step' if train else 'forward'}"
                cells = [
                    f"{1e3 * statistics.median(s.wall for s in rows[name]):.1f} / "
                    f"{1e3 * statistics.median(s.cpu for s in rows[name]):.1f}"
                    for name in runs
                ]
                ratios = [
                    statistics.median(
                        getattr(b, clock) / getattr(a, clock)
                        for a, b in zip(rows["beeline"], rows["diffusers"], strict=True)
                    )
                    for clock in ("wall", "cpu")
                ]
                print(f"{label:32}{cells[0]:>18}{cells[1]:>18}{ratios[0]:>14.3f} / {ratios[1]:.3f}", flush=True)


if __name__ == "__main__":
    main()
