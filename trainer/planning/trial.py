"""How fast this device runs the very blocks of a recipe: what a plan is made with before any run.

    python -m trainer plan d38 --gpus 64 --trial

One block of each class, forward and backward, with tensors of the recipe's shapes; no other layer, no communication.
On CPUs, where exchanges are work of the cores as well, a block's weights and gradients are exchanged, too.
"""
# Shapes: B images of a micro-batch.

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model.encoders.text import TextCond
from trainer.planning.machines import Machine
from trainer.planning.plan import widths
from trainer.recipe import Recipe

ROUNDS = 5
Given = list[tuple[torch.Size, torch.dtype] | None]


def efficiency_here(recipe: Recipe, machine: Machine, *, micro_batch: int, ranks: int = 1) -> float:
    """FLOP/s of the recipe's blocks on this device over the machine's peak.

    On a CPU it is one core's, while as many of the others work as there are `ranks`: they share caches, memory and
    clock (two cores of a virtual Xeon: 75 GFLOP/s each at depth 4, one alone 95).
    """
    beside = 0 if torch.cuda.is_available() else min(ranks, len(os.sched_getaffinity(0))) - 1
    others = [_start(recipe, "busy", str(micro_batch)) for _ in range(beside)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tasks = _tasks(recipe, micro_batch)
        for other in others:
            other.stdout.readline()  # type: ignore[union-attr]  # it has begun, or died
        seconds = sum(count * statistics.median(_timed(once) for _ in range(ROUNDS)) for once, count in tasks)
    finally:
        torch.set_num_threads(threads)
        for other in others:
            other.kill()
            other.communicate()
    _, height, width = recipe.data.latent_shape
    tokens = (height // recipe.model.patch) * (width // recipe.model.patch)
    forward = 2 * recipe.model.block_multiply_adds(tokens, recipe.data.text_tokens)
    return 3 * forward * micro_batch / seconds / machine.flops


def links_here(recipe: Recipe, machine: Machine, *, ranks: int) -> Machine:
    """A CPU with the links that two or more of its cores show: bytes per second of one core's work, over gloo."""
    ranks = 1 if machine.overlap else min(ranks, len(os.sched_getaffinity(0)))
    if ranks < 2:
        return machine
    with tempfile.TemporaryDirectory() as folder:
        processes = [_start(recipe, "exchange", str(rank), str(ranks), f"{folder}/store") for rank in range(ranks)]
        told = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        return machine  # no loopback, for one
    speed = statistics.mean(map(float, told))
    return replace(machine, link_inside=speed, link_between=speed)


def _exchange(recipe: Recipe, rank: int, ranks: int, store: str) -> float:
    """What ZeRO-3 does of one block, as if alone: weights gathered forward and backward, gradients reduced."""
    compute, gradient = (torch.bfloat16 if size == 2 else torch.float32 for size in widths(recipe))
    numel = recipe.model.block_parameters() // recipe.model.depth // ranks * ranks
    part = torch.zeros(numel // ranks, dtype=compute)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    seconds = []
    for _ in range(1 + ROUNDS):
        start = time.process_time()
        for _ in range(2):
            dist.all_gather_into_tensor(torch.empty(numel, dtype=compute), part)
        dist.reduce_scatter_tensor(torch.empty(numel // ranks, dtype=gradient), torch.zeros(numel, dtype=gradient))
        seconds.append(time.process_time() - start)
    dist.destroy_process_group()
    taken = numel * (ranks - 1) / ranks * (2 * compute.itemsize + gradient.itemsize)
    return taken / statistics.median(seconds[1:])


def _start(recipe: Recipe, *words: str) -> subprocess.Popen[str]:
    """This module as another process, which reads the recipe."""
    command = [sys.executable, "-W", "ignore", "-m", "trainer.planning.trial", *words]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin is not None
    process.stdin.write(json.dumps(recipe.to_json()))
    process.stdin.close()
    process.stdin = None
    return process


def _be_busy(recipe: Recipe, micro_batch: int) -> None:
    """What another rank does meanwhile, until it is killed."""
    tasks = _tasks(recipe, micro_batch)
    print("ready", flush=True)
    while True:
        for once, _ in tasks:
            once()


def _tasks(recipe: Recipe, micro_batch: int) -> list[tuple[Callable[[], None], int]]:
    """(a forward and backward pass, how often a step has it) for each class of blocks, warmed up."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    tasks = [(_pass(block.to(device, dtype), given, device), count)
             for block, given, count in _blocks(recipe, micro_batch, dtype, device)]  # fmt: skip
    for once, _ in tasks:
        once()
    return tasks


def _blocks(recipe: Recipe, batch: int, dtype: torch.dtype, device: torch.device) -> list[tuple[nn.Module, Given, int]]:
    """(a real block, shapes of what it is given, how many there are) of each class."""
    config, given = recipe.model, _given(recipe, batch, dtype)
    with torch.device("meta"):
        blocks: Any = config.build().blocks
    first: dict[type, int] = {}
    count: dict[type, int] = {}
    for number, block in enumerate(blocks):
        first.setdefault(type(block), number)
        count[type(block)] = count.get(type(block), 0) + 1
    found = []
    for kind, number in first.items():
        block = copy.deepcopy(blocks[number]).to_empty(device=device)
        for tensor in (*block.parameters(), *block.buffers()):
            nn.init.normal_(tensor, std=0.02)
        found.append((block, given[number], count[kind]))
    return found


def _given(recipe: Recipe, batch: int, dtype: torch.dtype) -> list[Given]:
    """What each block is called with, from a forward pass of fake tensors."""
    config, found = recipe.model, []
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(), torch.no_grad():
            model: Any = config.build()
            for block in model.blocks:
                block.register_forward_pre_hook(lambda module, args: found.append(args))
            context = torch.empty(batch, recipe.data.text_tokens, config.context_width)
            text = TextCond(context, torch.empty(batch, config.pooled_width))
            model(torch.empty(batch, *recipe.data.latent_shape), torch.empty(batch, dtype=torch.float32), text)
    finally:
        torch.set_default_dtype(default)
    return [[(x.shape, x.dtype) if isinstance(x, Tensor) else None for x in args] for args in found]


def _pass(block: nn.Module, given: Given, device: torch.device) -> Callable[[], None]:
    inputs = [
        None if one is None else torch.randn(one[0], device=device).to(one[1]).requires_grad_(one[1].is_floating_point)
        for one in given
    ]

    def once() -> None:
        out = block(*inputs)
        sum(x.float().sum() for x in (out if isinstance(out, tuple) else (out,))).backward()

    return once


def _timed(once: Callable[[], None]) -> float:
    """Seconds; on a CPU seconds of work, whoever else works there."""
    if not torch.cuda.is_available():
        start = time.process_time()
        once()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    once()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    recipe = Recipe.from_json(json.load(sys.stdin))
    torch.set_num_threads(1)
    if sys.argv[1] == "busy":
        _be_busy(recipe, int(sys.argv[2]))
    rank, ranks, store = sys.argv[2:]
    print(_exchange(recipe, int(rank), int(ranks), store))


if __name__ == "__main__":
    main()
