"""Run by two real ranks (see test_trainer_dpo.py): frozen weights under adapters, stage by stage; one JSON object."""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from trainer_zero_checks import Gathers

from data_pipeline.loading.loader import open_dataset
from data_pipeline.loading.pairs import RejectedLatents
from model.diffusion.flow import get_formulation
from model.encoders.text import TextCond
from model.files.weights import load_model
from trainer.feed import draw_noise
from trainer.objective import bind_objective
from trainer.recipe import DPO, Data, LoRA, Optimizer, Parallel, Recipe
from trainer.state import load_init
from trainer.zero.engine import ZeroEngine
from trainer.zero.group import Group, leave, start

SHARDED = Parallel(persistence_threshold=0, reduce_bucket=2_000_000, prefetch=2_000_000)
VARIANTS = {
    "stage3": SHARDED,
    "persistent": dataclasses.replace(SHARDED, persistence_threshold=100_000),
    "recompute": dataclasses.replace(SHARDED, checkpoint_blocks=True, max_live=0),
    "stage2": Parallel(zero_stage=2),
    "stage1": Parallel(zero_stage=1),
    "stage0": Parallel(zero_stage=0),
}


def recipe_of(model, parallel: Parallel) -> Recipe:
    return Recipe(
        name="tiny-dpo", model=model, images=1000, global_batch=8, precision="fp32", objective="dpo",
        optimizer=Optimizer(lr=3e-3), dpo=DPO(beta=100.0), lora=LoRA(rank=4), data=Data(resolution=32),
        parallel=parallel,
    )  # fmt: skip


def steps(engine: ZeroEngine, group: Group, data: str, count: int) -> list[float]:
    dataset, form = open_dataset(data), get_formulation(engine.recipe.formulation)
    compute = bind_objective(engine.recipe)
    batches = dataset.batches(
        seed=0, global_batch=8, rank=group.rank, world_size=group.world_size, read_rejected=RejectedLatents(dataset)
    )
    losses = []
    for _ in range(count):
        micro = draw_noise(next(batches), form, seed=0, shift=1.0)
        loss_P = compute(engine, micro.to(group.device)).loss_B
        engine.backward(loss_P.mean())
        engine.step(3e-3)
        losses.append(group.sum([loss_P.double().sum().item()])[0] / 8)
    batches.close()
    return losses


def main() -> None:
    data, base, out = sys.argv[1:]
    group = start()
    plain, _ = load_model(base)
    g = torch.Generator().manual_seed(1)
    text = TextCond(torch.randn(3, 16, 48, generator=g), torch.randn(3, 32, generator=g))
    given = torch.randn(3, 4, 8, 8, generator=g), torch.rand(3, generator=g), text
    with torch.no_grad():
        wanted = plain(*given)
    found = {}
    for name, parallel in VARIANTS.items():
        engine = ZeroEngine(recipe_of(plain.config, parallel), group)
        load_init(engine, base)
        with engine.inference():
            first = engine(*given)
        losses = steps(engine, group, data, 3)
        with engine.reference():
            reference = engine(*given)
        with engine.inference():
            trained = engine(*given)
        sizes = engine.count_bytes_by_category()
        found[name] = {
            "losses": losses,
            "first_error": (first - wanted).abs().max().item(),
            "reference_error": (reference - wanted).abs().max().item(),
            "changed": (trained - wanted).abs().max().item(),
            "on": engine.model.training,
            "parameters": engine.describe()["parameters"],
            "trained": int(group.sum([float(engine.describe()["local"])])[0]),
            **sizes,
        }
    # Two forward passes and one backward are one step to DeepSpeed, held-out pairs between two steps or not.
    engine = ZeroEngine(recipe_of(plain.config, dataclasses.replace(SHARDED, max_live=0)), group)
    steps(engine, group, data, 2)
    gathers = Gathers(engine)
    for _ in range(2):
        with gathers.watching():
            steps(engine, group, data, 1)
        with engine.reference():
            engine(*given)
        with engine.inference():
            engine(*given)
    found["wire"] = {"blocks": gathers.blocks, "traced": gathers.traced, "depth": plain.config.depth}
    if group.rank == 0:
        Path(out).write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()
