"""Eager speed of our MM-DiT and diffusers' with the same weights: `python tests/bench/model_vs_diffusers.py`.

One forward and backward pass each, interleaved, median of 30; CPU seconds beside wall seconds, because on a shared
machine only the former mean something.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from diffusers import SD3Transformer2DModel

from model.mmdit import MMDiTConfig
from model.names import diffusers_config, to_diffusers
from model.text import TextCond

ROUNDS = 30
BATCH = 16


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    config = MMDiTConfig(
        depth=4, in_channels=8, context_width=384, pooled_width=128, pos_max=16, pos_tokens=8, pos_base=8
    )
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
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 3):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run().square().mean().backward()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    flops = BATCH * (config.forward_flops(16, 16, 32) + config.backward_flops(16, 16, 32))
    for name, pairs in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*pairs[3:], strict=True))
        rates = f"{BATCH / wall:.1f} images/s  {flops / cpu / 1e9:.1f} GFLOP per CPU second"
        print(f"{name:10} wall {wall:.4f} s  cpu {cpu:.4f} s  {rates}")


if __name__ == "__main__":
    main()
