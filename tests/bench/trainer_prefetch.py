"""Prefetching under one and two passes: gathers of blocks, how many of them ahead of need, CPU seconds per step.

python tests/bench/trainer_prefetch.py [--depth 3] [--steps 6]

Pretraining passes once forward and backward, DPO once forward without adapters, then forward and backward. DeepSpeed
prefetches by a recorded trace of modules, which every forward pass begins anew. Two CPU ranks; with gloo a prefetch
hides nothing, so the counts are the finding and the seconds only show that it costs nothing.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LIVE = 3_000_000  # elements that may stay gathered: two blocks of depth 3
CASES = [(what, prefetch) for what in ("pretrain", "dpo") for prefetch in (0, 4_000_000, 50_000_000)]


def measure(depth: int, steps: int, data: str) -> list[dict[str, object]]:
    import torch
    from trainer_zero_checks import Gathers

    from data_pipeline.loading.loader import open_dataset
    from data_pipeline.loading.pairs import RejectedLatents
    from model.diffusion.flow import get_formulation
    from trainer.feed import draw_noise
    from trainer.objective import bind_objective
    from trainer.recipes import world, world_dpo
    from trainer.zero.engine import ZeroEngine
    from trainer.zero.group import leave, start

    group, found, dataset = start(), [], open_dataset(data)
    for what, prefetch in CASES:
        recipe = world(depth) if what == "pretrain" else world_dpo(depth)
        model = replace(recipe.model, in_channels=4, context_width=48, pooled_width=32)
        parallel = replace(recipe.parallel, max_live=LIVE, prefetch=prefetch)
        engine = ZeroEngine(replace(recipe, model=model, parallel=parallel, global_batch=8), group)
        batches = dataset.batches(
            seed=0, global_batch=8, rank=group.rank, world_size=group.world_size,
            read_rejected=RejectedLatents(dataset) if what == "dpo" else None,
        )  # fmt: skip
        form, compute = get_formulation(recipe.formulation), bind_objective(recipe)
        cpu = []
        gathers = Gathers(engine)
        for _ in range(steps):
            micro, began = draw_noise(next(batches), form, seed=0, shift=1.0), time.process_time()
            with gathers.watching():
                engine.backward(compute(engine, micro.to(group.device)).loss_B.mean())
            engine.step(1e-4)
            cpu.append(time.process_time() - began)
        batches.close()
        found.append({
            "what": what, "prefetch": prefetch, "gathers": [len(calls) for calls in gathers.blocks[-4:]],
            "all": sum(p.ds_numel for block in engine.model.blocks for p in block.parameters()),
            "elements": [sum(calls) for calls in gathers.blocks[-4:]], "traced": gathers.traced[-4:],
            "cpu": group.max([statistics.median(cpu[2:])])[0],
        })  # fmt: skip
        del engine
        torch.distributed.barrier()
    leave()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        found = measure(args.depth, args.steps, args.child)
        if os.environ["RANK"] == "0":
            print("FOUND " + json.dumps(found))
        return
    from trainer_launch import run_ranks

    from data_pipeline.packing.synthetic import write_synthetic

    with tempfile.TemporaryDirectory() as folder:
        write_synthetic(folder, num_samples=64, val_samples=8, latent_shape=(4, 8, 8), buckets=("32x32",), pairs=True)
        words = [__file__, "--depth", str(args.depth), "--steps", str(args.steps), "--child", folder]
        said = run_ranks(words, 2)
    rows = json.loads(next(line for line in said.splitlines() if line.startswith("FOUND ")).removeprefix("FOUND "))
    print(f"depth {args.depth}, 2 ranks; of each of the last steps:")
    for row in rows:
        brought = [round(elements / row["all"], 1) for elements in row["elements"]]
        print(
            f"{row['what']:9} prefetch {row['prefetch']:>10,}: gathers of blocks {row['gathers']}, with a whole trace "
            f"{row['traced']}, bringing {brought} times all blocks; {row['cpu']:.3f} CPU s"
        )


if __name__ == "__main__":
    main()
