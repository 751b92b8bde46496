"""Run by two real ranks (see test_trainer_zero.py): measures what ZeRO does and prints one JSON object from rank 0."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data_pipeline.loading.loader import open_dataset
from infra.errors import UserError
from model.backbones.mmdit import MMDiTConfig
from model.diffusion.flow import get_formulation
from model.encoders.text import TextCond
from model.files.weights import save_weights
from trainer.exports.card import describe_weights
from trainer.exports.export import export
from trainer.feed import draw_noise
from trainer.objective import pretrain
from trainer.recipe import EMA, Data, Optimizer, Parallel, Recipe, Validation
from trainer.validate import Validator
from trainer.zero.ema import ShardedEMA, solve_gamma
from trainer.zero.engine import ZeroEngine
from trainer.zero.group import Group, leave, start

CONFIG = MMDiTConfig(depth=2, in_channels=4, context_width=48, pooled_width=32)
RECIPE = Recipe(
    name="tiny",
    model=CONFIG,
    images=1000,
    global_batch=8,
    precision="fp32",
    optimizer=Optimizer(lr=1e-2),
    ema=EMA(profiles=("power:0.20",)),
    data=Data(resolution=32),
    parallel=Parallel(persistence_threshold=0, reduce_bucket=2_000_000, prefetch=2_000_000),
    validation=Validation(samples=40, batch=16),
)
FORM = get_formulation(RECIPE.formulation)


class Gathers:
    """Counts what goes over the wire, at the functions that DeepSpeed's backend holds. Each list: an entry a step."""

    def __init__(self, engine: ZeroEngine) -> None:
        sizes = [sum(p.ds_numel for p in block.parameters()) for block in engine.model.blocks]
        self._least = min(sizes) / 2  # no other layer is half as large as the smallest block
        self.blocks: list[list[int]] = []
        """Elements of each all-gather that brings blocks."""
        self.traced: list[int] = []
        """How many of them DeepSpeed did with a whole trace of the modules, by which it prefetches."""
        self.reduced: list[list[int]] = []
        """Elements that go into each reduce-scatter, over all ranks."""
        self.dtypes: set[str] = set()
        """Of what goes into them."""
        self._coordinator = engine._engine.optimizer.parameter_offload.get_param_coordinator()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around the passes of one step."""
        from deepspeed.comm.comm import cdb

        saved = cdb.all_gather_function, cdb.reduce_scatter_function
        gathered: list[int] = []
        reduced: list[int] = []
        self.blocks.append(gathered)
        self.reduced.append(reduced)
        self.traced.append(0)

        def gather(*args: Any, **more: Any) -> Any:
            output = more.get("output_tensor", args[0] if args else None)
            if output.numel() >= self._least:
                gathered.append(output.numel())
                self.traced[-1] += self._coordinator.is_complete_trace()
            return saved[0](*args, **more)

        def reduce(*args: Any, **more: Any) -> Any:
            given = args[1] if len(args) > 1 else more["input_tensor"]
            reduced.append(given.numel())
            self.dtypes.add(str(given.dtype))
            return saved[1](*args, **more)

        cdb.all_gather_function, cdb.reduce_scatter_function = gather, reduce
        try:
            yield
        finally:
            cdb.all_gather_function, cdb.reduce_scatter_function = saved


def steps(engine: ZeroEngine, group: Group, data: str, count: int, ema: ShardedEMA | None = None, micro: int = 1):
    """(losses, masters in float64 after each step): `count` steps on the data set."""
    batches = open_dataset(data).batches(
        seed=0, global_batch=8, rank=group.rank, world_size=group.world_size, micro_batch=8 // group.world_size // micro
    )
    losses, seen = [], []
    for number in range(count):
        total = 0.0
        for _ in range(micro):
            micro_batch = draw_noise(next(batches), FORM, seed=0, shift=1.0)
            loss_B = pretrain(engine, micro_batch.to(group.device), formulation=FORM).loss_B
            engine.backward(loss_B.mean())
            total += loss_B.double().sum().item()
        engine.step(1e-2)
        losses.append(group.sum([total])[0] / 8)
        seen.append([m.double().clone() for m in engine.masters])
        if ema is not None:
            ema.update(engine.masters, 8 * (number + 1), 8)
    batches.close()
    return losses, seen


def probe(engine: ZeroEngine, *, teacher: bool = False) -> torch.Tensor:
    """A fixed forward pass, of the frozen teacher if asked."""
    g = torch.Generator().manual_seed(1)
    text = TextCond(torch.randn(3, 16, 48, generator=g), torch.randn(3, 32, generator=g))
    with engine.teacher() if teacher else engine.inference():
        return engine(torch.randn(3, 4, 8, 8, generator=g), torch.rand(3, generator=g), text).double()


def validate(engine: ZeroEngine, group: Group, data: str, weights: list[torch.Tensor], protocol: str) -> list[float]:
    """Mean and levels of a protocol, computed with these weights."""
    recipe = dataclasses.replace(RECIPE, validation=dataclasses.replace(RECIPE.validation, protocol=protocol))
    validator = Validator(recipe, open_dataset(data, split="val"))
    with engine.use_weights(weights):
        result = validator.run(engine, group)
    return [result.mean, *result.per_level.values()]


def discards(engine: ZeroEngine, group: Group) -> dict[str, bool]:
    """Gradients thrown away, by our decision or because one is not finite, leave no trace; the next step is clean."""
    g = torch.Generator().manual_seed(group.rank)
    text = TextCond(torch.randn(4, 16, 48, generator=g), torch.randn(4, 32, generator=g))
    inputs = torch.randn(4, 4, 8, 8, generator=g), torch.rand(4, generator=g), text
    kept, taken = [m.clone() for m in engine.masters], engine.adam_steps
    engine.backward(engine(*inputs).square().mean() * 1e6)
    thrown = engine.discard()
    engine.backward(engine(*inputs).mean() * float("nan"))
    skipped = engine.step(1e-2)
    same = all(torch.equal(a, b) for a, b in zip(kept, engine.masters)) and engine.adam_steps == taken
    engine.backward(engine(*inputs).square().mean())
    once = engine.step(0.0).grad_norm
    engine.backward(engine(*inputs).square().mean())
    twice = engine.step(0.0).grad_norm
    return {
        "seen": not thrown.applied and not skipped.applied, "same": same,
        "clean": abs(once - twice) <= 1e-5 * twice, "counted": engine.adam_steps == taken + 2,
    }  # fmt: skip


def spoil(engine: ZeroEngine, group: Group) -> tuple[bool, bool]:
    """A gradient that is not finite on one rank: does the engine say that it skipped, are the masters as before?"""
    g = torch.Generator().manual_seed(1)
    text = TextCond(torch.randn(4, 16, 48, generator=g), torch.randn(4, 32, generator=g))
    loss = engine(torch.randn(4, 4, 8, 8, generator=g), torch.rand(4, generator=g), text).mean()
    engine.backward(loss * float("inf") if group.rank == 1 else loss)
    kept = [m.clone() for m in engine.masters]
    skipped = not engine.step(1e-2).applied
    return skipped, all(torch.equal(a, b) for a, b in zip(kept, engine.masters))


def train(engine: ZeroEngine, group: Group, data: str) -> tuple[ShardedEMA, dict[str, Any]]:
    """Four steps, and how far the EMA on shards is from the unsharded formula in float64."""
    ema = ShardedEMA(RECIPE.ema.profiles, engine.masters)
    losses, seen = steps(engine, group, data, 4, ema)
    g, reference = solve_gamma(0.20), None
    for n, masters in enumerate(seen, start=1):
        beta = (1 - 1 / n) ** (g + 1)
        reference = masters if reference is None else [r * beta + m * (1 - beta) for r, m in zip(reference, masters)]
    errors = [
        (a.double() - r)[s.offset : s.offset + s.numel].abs().max().item()
        for flat, a, r in zip(engine.partition.flats, ema.first, reference)
        for s in flat.segments
    ]
    return ema, {"losses": losses, "ema_error": max(errors)}


def swap_weights(engine: ZeroEngine) -> dict[str, Any]:
    """With zeros swapped in, the model must compute like the zero model, and restoring is bit-exact."""
    before = probe(engine)
    with engine.use_weights([torch.zeros_like(m) for m in engine.masters]):
        found = {"zero_output": probe(engine).abs().max().item()}
    found |= {"normal_output": before.abs().max().item(), "restored": torch.equal(probe(engine), before)}
    # The trap itself: writing the partitions without emptying the cache changes nothing.
    for target in engine.partition._optimizer.fp16_partitioned_groups_flat:
        target.zero_()
    found["trap"] = torch.equal(probe(engine), before)
    engine.publish()
    return found


def validate_all(engine: ZeroEngine, group: Group, data: str, ema: ShardedEMA) -> dict[str, Any]:
    """Validation by EMA weights under every protocol, and by zeros."""
    validator = Validator(RECIPE, open_dataset(data, split="val"))
    with engine.use_weights(ema.first):
        result = validator.run(engine, group)
    zeros = [torch.zeros_like(average) for average in ema.first]
    return {
        "validation": [result.mean, *result.per_level.values()],
        "validation_count": result.sample_count,
        "protocols": {name: validate(engine, group, data, ema.first, name) for name in ("mlperf", "midpoint")},
        "zero_validation": validate(engine, group, data, zeros, RECIPE.validation.protocol),
    }


def export_all(engine: ZeroEngine, group: Group, data: str, out: str, ema: ShardedEMA) -> dict[str, Any]:
    """Exported files beside what all ranks' shards put together give; a place that takes no file; empty tensors."""
    import deepspeed

    info = open_dataset(data).info
    meta = {kind: describe_weights(RECIPE, info, kind=kind, images_seen=32, run="t") for kind in ("ema", "raw")}
    found: dict[str, Any] = {"exported": export(engine, ema.first, [f"{out}/ema.safetensors"], meta["ema"], group)}
    found["exported"] &= export(engine, engine.masters, [f"{out}/raw.safetensors"], meta["raw"], group)
    with deepspeed.zero.GatheredParameters(list(engine.model.parameters())):
        if group.rank == 0:
            torch.save({n: p.detach().clone() for n, p in engine.model.named_parameters()}, f"{out}/gathered.pt")
    found["refused"] = not export(engine, engine.masters, ["/proc/nowhere/x.safetensors"], meta["raw"], group)
    # What a stage-3 module holds between steps: empty tensors, which look like weights to whoever saves them.
    try:
        save_weights(f"{out}/empty_{group.rank}.safetensors", engine.model.state_dict(), meta["raw"])
    except UserError as error:
        found["empty"] = str(error)
    return found


VARIANTS = {
    "stage0": Parallel(zero_stage=0),
    "stage1": Parallel(zero_stage=1),
    "stage2": Parallel(zero_stage=2),
    "accumulate": dataclasses.replace(RECIPE.parallel, micro_batch=2),
    "checkpoint": dataclasses.replace(RECIPE.parallel, checkpoint_blocks=True, max_live=0),
    "persistent": dataclasses.replace(RECIPE.parallel, persistence_threshold=100_000),
}


def train_variant(name: str, group: Group, data: str) -> dict[str, Any]:
    """The same run under another stage, with accumulation, recomputation, or small parameters kept whole."""
    micro = 2 if name == "accumulate" else 1
    engine = ZeroEngine(dataclasses.replace(RECIPE, parallel=VARIANTS[name]), group, accumulation=micro)
    ema = ShardedEMA(RECIPE.ema.profiles, engine.masters)
    start = probe(engine)
    engine.keep_teacher()
    losses, _ = steps(engine, group, data, 4, ema, micro)
    here = probe(engine)
    taught = probe(engine, teacher=True)
    with engine.use_weights([torch.zeros_like(m) for m in engine.masters]):
        zero = probe(engine).abs().max().item()
    with engine.use_weights(ema.first):
        mean = Validator(RECIPE, open_dataset(data, split="val")).run(engine, group).mean
    found = {
        "losses": losses,
        "zero_output": zero,
        "restored": torch.equal(probe(engine), here),
        "teacher": torch.equal(taught, start) and not torch.equal(taught, here),
        "teacher_bytes": engine.count_bytes_by_category()["teacher"],
        "validation": mean,
        "local": engine.describe()["local"],
        "adam_steps": engine.adam_steps,
    }
    if micro == 1:
        found["discards"] = discards(engine, group)
        if engine.stage:
            found["discards"]["spoiled_by_one"] = all(spoil(engine, group))
    if name == "stage2":
        whole = {n: engine.gather_whole(n, engine.masters) for n in list(engine.shapes)[:6]}
        mine = dict(engine.model.named_parameters())
        found["whole_matches"] = all(torch.equal(whole[n], mine[n].float()) for n in whole)
    return found


def count_gathers(group: Group, data: str) -> dict[str, Any]:
    """One all-gather per block forward, one backward, one reduce-scatter: leaf modules at work."""
    config = dataclasses.replace(CONFIG, depth=3)
    sizes = [sum(p.numel() for p in block.parameters()) for block in config.build().blocks]
    strict = dataclasses.replace(RECIPE.parallel, max_live=0, reduce_bucket=max(sizes), prefetch=0)
    engine = ZeroEngine(dataclasses.replace(RECIPE, parallel=strict, model=config), group)
    steps(engine, group, data, 2)
    gathers = Gathers(engine)
    with gathers.watching():
        steps(engine, group, data, 1)
    whole = sum(engine.partition.flats[0].master.numel() for _ in range(group.world_size))
    return {"sizes": sizes, "blocks": gathers.blocks[0], "reduced": gathers.reduced[0], "whole": whole}


def train_bf16(group: Group, data: str) -> dict[str, Any]:
    """In which types gradients are reduced and kept, and that masters stay fp32."""
    half = dataclasses.replace(RECIPE, precision="bf16")
    found: dict[str, Any] = {"reductions": {}}
    for fp32_reduce in (False, True):
        parallel = dataclasses.replace(half.parallel, fp32_reduce=fp32_reduce)
        engine = ZeroEngine(dataclasses.replace(half, parallel=parallel), group)
        gathers = Gathers(engine)
        with gathers.watching():
            found["bf16_losses"], _ = steps(engine, group, data, 2)
        kept = sorted({str(gradient.dtype) for gradient in engine.partition.list_gradients()})
        found["reductions"][str(fp32_reduce)] = {"sent": sorted(gathers.dtypes), "kept": kept}
    found["bf16_skip_seen"], found["bf16_skip_kept"] = spoil(engine, group)
    found["bf16_skips"] = {}
    for stage, clip_norm in ((1, 1.0), (1, None), (2, 1.0), (2, None)):
        optimizer = dataclasses.replace(half.optimizer, clip_norm=clip_norm)
        parallel = Parallel(zero_stage=stage, fp32_reduce=stage == 2)
        engine = ZeroEngine(dataclasses.replace(half, optimizer=optimizer, parallel=parallel), group)
        seen = discards(engine, group) | {"spoiled_by_one": all(spoil(engine, group))}
        wrong = [name for name, right in seen.items() if not right]
        found["bf16_skips"][f"stage {stage}, clipped at {clip_norm}"] = wrong
    found["bf16_masters"] = {str(m.dtype) for m in engine.masters} == {"torch.float32"}
    return found


def main() -> None:
    data, out = sys.argv[1:]
    group = start()
    engine = ZeroEngine(RECIPE, group)
    found: dict[str, Any] = {"sizes": engine.describe()}
    found["live_before"] = sum(p.numel() for p in engine.model.parameters())
    ema, trained = train(engine, group, data)
    found |= trained
    found |= swap_weights(engine)
    found |= validate_all(engine, group, data, ema)
    found |= export_all(engine, group, data, out, ema)
    found["skip_seen"], found["skip_kept"] = spoil(engine, group)
    found["stages"] = {name: train_variant(name, group, data) for name in VARIANTS}
    found["whole_matches"] = found["stages"]["stage2"].pop("whole_matches")
    found["wire"] = count_gathers(group, data)
    found |= train_bf16(group, data)
    if group.rank == 0:
        Path(out, "found.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()
