"""What ZeRO-3 costs on CPU ranks: images/s of a world-d4 step against the bare model loop on the same cores.

python tests/bench/trainer_step.py [--depth 4] [--batch 64] [--ranks 2] [--rounds 3]

Bare: forward, backward, clipping, fused AdamW in one process with one thread per rank. Rounds alternate, so that other
load on the machine falls on both alike. CPU seconds (of the bare loop on one thread: waiting threads spin) are compared
too, because they hardly see other load.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def inputs(batch: int):
    import torch

    from model.encoders.text import TextCond

    g = torch.Generator().manual_seed(0)
    mask = torch.rand(batch, 32, generator=g) < 0.7
    text = TextCond(torch.randn(batch, 32, 384, generator=g), torch.randn(batch, 128, generator=g), mask)
    return torch.randn(batch, 8, 16, 16, generator=g), torch.rand(batch, generator=g), text


def timed(step, count: int) -> dict[str, float]:
    """Medians over `count` steps after two for warming up."""
    wall, cpu = [], []
    for _ in range(count + 2):
        a, b = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - a)
        cpu.append(time.process_time() - b)
    return {"wall": sorted(wall[2:])[count // 2], "cpu": sorted(cpu[2:])[count // 2]}


def bare(depth: int, batch: int, threads: int, count: int) -> dict[str, float]:
    import torch

    from trainer.recipes import world

    torch.set_num_threads(threads)
    model = world(depth).model.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x, t, text = inputs(batch)

    def step() -> None:
        (model(x, t, text) - x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, count)


def zero(depth: int, batch: int, count: int, options: dict[str, int]) -> dict[str, float]:
    from dataclasses import replace

    from trainer.recipes import world
    from trainer.zero.ema import ShardedEMA
    from trainer.zero.engine import ZeroEngine
    from trainer.zero.group import leave, start

    group = start()
    recipe = replace(world(depth), global_batch=batch)
    recipe = replace(recipe, parallel=replace(recipe.parallel, **options))
    engine = ZeroEngine(recipe, group)
    ema = ShardedEMA(recipe.ema.profiles, engine.masters)
    share = batch // group.world_size
    x, t, text = inputs(batch)
    mine = slice(group.rank * share, (group.rank + 1) * share)
    x, t, text = x[mine], t[mine], text[mine]

    def step() -> None:
        engine.backward((engine(x, t, text) - x).square().mean())
        engine.step(1e-4)
        ema.update(engine.masters, 10 * batch, batch)

    found = timed(step, count)
    found["cpu"] = group.sum([found["cpu"]])[0]
    leave()
    return found


def child(args: argparse.Namespace, kind: str) -> dict[str, float]:
    words = [__file__, "--child", kind, "--depth", args.depth, "--batch", args.batch, "--ranks", args.ranks]
    command = [str(word) for word in [*words, "--steps", args.steps, "--options", args.options]]
    if kind != "zero":
        command[command.index("--ranks") + 1] = threads = str(args.ranks if kind == "bare" else 1)
        environment = os.environ | {"OMP_NUM_THREADS": threads}
        said = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=True)
        return json.loads(said.stdout.splitlines()[-1])
    from trainer_launch import run_ranks

    return json.loads(next(line for line in run_ranks(command, args.ranks).splitlines() if line.startswith('{"wall"')))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("depth", 4), ("batch", 64), ("ranks", 2), ("rounds", 3), ("steps", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--options", default="{}", help="JSON of recipe.parallel fields to change")
    parser.add_argument("--child", choices=("bare", "bare1", "zero"))
    args = parser.parse_args()
    if args.child in ("bare", "bare1"):
        print(json.dumps(bare(args.depth, args.batch, args.ranks, args.steps)))
    elif args.child == "zero":
        found = zero(args.depth, args.batch, args.steps, json.loads(args.options))
        if os.environ["RANK"] == "0":
            print(json.dumps(found))
    else:
        best: dict[str, dict[str, float]] = {}
        for _ in range(args.rounds):
            for kind in ("bare", "zero", "bare1"):
                found = child(args, kind)
                best[kind] = {k: min(v, best.get(kind, found)[k]) for k, v in found.items()}
        rates = {kind: args.batch / best[kind]["wall"] for kind in best}
        by_cpu = best["bare1"]["cpu"] / best["zero"]["cpu"]
        print(f"world-d{args.depth}, batch {args.batch}, {args.ranks} cores, options {args.options}")
        print(f"bare {rates['bare']:.1f} images/s, ZeRO-3 with EMA {rates['zero']:.1f} images/s")
        print(f"ratio {rates['zero'] / rates['bare']:.3f} by wall, {by_cpu:.3f} by CPU")


if __name__ == "__main__":
    main()
