"""How near one GPU comes to its peak: `python tests/bench/trainer_gpu.py [--cases d24/6:32+compile ...] [--profile]`.

A case is RECIPE[/BLOCKS]:MICRO_BATCH, with + for a switch (+compile, +checkpoint_blocks): real ZeRO-3 steps of two
micro-batches with the recipe's EMA, as `plan --trial` takes them, beside the same network's bare forward and backward
pass and diffusers' SD3 with the same weights. Medians of three; shares are of the model's FLOPs, without recomputing.
"""
# Shapes: B batch, C latent channels, H and W of the latents, L text tokens, D context width, P pooled width.

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from model.diffusion.flow import get_formulation
from model.encoders.text import TextCond
from model.files.names import make_diffusers_config, to_diffusers
from trainer.feed import MicroBatch
from trainer.machines import detect_machine
from trainer.objective import count_train_flops, pretrain
from trainer.planning.trial import make_shallow, make_up_batch, take_steps
from trainer.recipe import Recipe
from trainer.recipes import get_recipe
from trainer.zero.engine import compile_blocks
from trainer.zero.group import Group, leave, start

CASES = ("d15:64", "d15:64+compile", "d24/6:32", "d24/6:32+compile", "d38/4:32", "d38/4:32+compile")
ROUNDS = 3


def case(text: str) -> tuple[Recipe, int]:
    """A recipe cut to its blocks, and images per micro-batch."""
    head, *switches = text.split("+")
    name, micro = head.split(":")
    name, _, blocks = name.partition("/")
    recipe = get_recipe(name)
    config = make_shallow(recipe.model, int(blocks)) if blocks else recipe.model
    parallel = replace(recipe.parallel, zero_stage=3, checkpoint_blocks=False, **dict.fromkeys(switches, True))
    return replace(recipe, name=text, model=config, parallel=parallel), int(micro)


def seconds(run: Callable[[], Any]) -> float:
    """Median of a few calls after one that warms up."""
    found = []
    for _ in range(1 + ROUNDS):
        torch.cuda.synchronize()
        since = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - since)
    return statistics.median(found[1:])


def bare(recipe: Recipe, device: torch.device) -> Callable[..., Tensor]:
    """The network alone, without DeepSpeed."""
    model: Any = recipe.model.build(seed=0).to(device, torch.bfloat16)
    model.checkpoint_blocks = recipe.parallel.checkpoint_blocks
    if recipe.parallel.compile:
        compile_blocks(model)
    return lambda x_BCHW, t_B, text: model(x_BCHW.bfloat16(), t_B, text.to(dtype=torch.bfloat16)).float()


def diffusers(recipe: Recipe, device: torch.device) -> Callable[..., Tensor]:
    """diffusers' network with the same weights."""
    from diffusers import SD3Transformer2DModel

    model: Any = SD3Transformer2DModel(**make_diffusers_config(recipe.model))
    model.load_state_dict(dict(to_diffusers(recipe.model, recipe.model.build(seed=0).state_dict())))
    model = model.to(device, torch.bfloat16)
    if recipe.parallel.checkpoint_blocks:
        model.enable_gradient_checkpointing()
    if recipe.parallel.compile:
        for block in model.transformer_blocks:
            block.forward = torch.compile(block.forward, dynamic=False)

    def predict(x_BCHW: Tensor, t_B: Tensor, text: TextCond) -> Tensor:
        text = text.to(dtype=torch.bfloat16)
        return model(x_BCHW.bfloat16(), text.context_BLD, text.pooled_BP, 1000 * t_B, return_dict=False)[0].float()

    return predict


def one_pass(predict: Any, recipe: Recipe, micro: MicroBatch, device: torch.device) -> None:
    """The loss's forward and backward pass."""
    losses = pretrain(predict, micro.to(device), formulation=get_formulation(recipe.formulation))
    losses.loss_B.mean().backward()


def profile(run: Callable[[], None]) -> None:
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    print(seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=14, max_name_column_width=70))


def measure(text: str, group: Group, *, profiled: bool) -> str:
    recipe, micro = case(text)
    flops = count_train_flops(recipe) * micro
    peak = detect_machine("bf16").flops
    torch.cuda.reset_peak_memory_stats()
    cost = take_steps(recipe, group, blocks=recipe.model.depth, micro_batch=micro)
    memory = torch.cuda.max_memory_allocated() / 2**30
    batch = make_up_batch(recipe, micro).pin_memory()
    found = {"zero3": cost.micro_batch.seconds}
    for name, make in (("bare", bare), ("diffusers", diffusers)):
        clean()
        run = partial(one_pass, make(recipe, group.device), recipe, batch, group.device)
        found[name] = seconds(run)
        if profiled and name == "bare":
            profile(run)
        del run
    clean()
    cells = "".join(f"{value * 1e3:9.1f} {flops / value / peak:6.1%}" for value in found.values())
    return f"{text:26}{cells}{cost.update.seconds * 1e3:10.1f}{memory:10.1f}"


def clean() -> None:
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--profile", action="store_true", help="the bare pass's kernels that take most time")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing to measure")
        return
    group = start()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; ms a micro-batch and share of the peak")
    print(f"{'':26}{'ZeRO-3':>16}{'bare':>16}{'diffusers':>16}{'update ms':>10}{'peak GiB':>10}")
    for text in args.cases:
        print(measure(text, group, profiled=args.profile), flush=True)
    leave()


if __name__ == "__main__":
    main()
