"""What a run will need, before it starts: parameters, FLOPs exactly; bytes, seconds, dollars by a stated model."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from infra.device import resolve_precision
from infra.log import format_duration
from model.activations import activations_per_image
from model.flops import forward_flops_per_image, parameter_count
from trainer.machines import Machine, estimate_transfer, this_machine
from trainer.objective import count_train_flops, get_objective
from trainer.recipe import Recipe

ADAM_MOMENTS = 2
USABLE = 0.9  # of a device's memory: the rest goes to the allocator, kernels and NCCL
STORED_BYTES_PER_IMAGE = 65_536 + 121_344 + 202_240 + 630_784  # SD3 paper, table 7: latent, CLIP-L, CLIP-G, T5
DOLLARS_PER_GB_MONTH = 0.023  # of object storage: a list price from memory
HOURS_PER_MONTH = 730


class Cost(NamedTuple):
    """What something takes: seconds by the clock, and of work of the busiest rank's cores."""

    seconds: float = 0.0
    work: float = 0.0

    def towards(self, other: "Cost", place: float) -> "Cost":
        """The cost on the line between this one (`place` 0) and the other one (`place` 1); `place` may lie beyond."""
        return Cost(*(a + place * (b - a) for a, b in zip(self, other)))


NOTHING = Cost()


class StepCost(NamedTuple):
    """What a step costs: a micro-batch (forward and backward), and the update at the end of the step."""

    micro_batch: Cost
    update: Cost


def plan_precision(recipe: Recipe, machine: Machine | None) -> Recipe:
    """The recipe with what `auto` precision is on that machine; None: on this one."""
    if recipe.precision != "auto":
        return recipe
    return replace(recipe, precision=machine.precision if machine else resolve_precision("auto", "auto"))


def make_hardware_plan(
    recipe: Recipe,
    *,
    world_size: int,
    machine: Machine | None = None,
    efficiency: float | None = None,
    dollars_per_hour: float | None = None,
    dataset_images: int | None = None,
    tried: StepCost | None = None,
    extra: Cost = NOTHING,
) -> dict[str, Any]:
    """plan.json. `predicted` holds what a run measures under the same names (result rows). `tried`: what trials of
    this recipe took, which then is its step; `extra`: what each micro-batch takes beyond the rest."""
    recipe = plan_precision(recipe, machine)
    machine = machine or this_machine(recipe.precision)
    efficiency = machine.efficiency if efficiency is None else efficiency
    _, height, width = recipe.data.latent_shape
    tokens = recipe.data.text_tokens
    parameters = parameter_count(recipe.model)
    train_flops = count_train_flops(recipe)
    micro = recipe.parallel.micro_batch or math.ceil(recipe.global_batch / world_size)
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    kept = activations_per_image(recipe.model, recipe.data.latent_shape, tokens, dtype)
    pictures = micro * get_objective(recipe.objective).images_per_sample
    activation = kept.kept(recompute=recipe.parallel.checkpoint_blocks) * pictures
    per_stage = {
        f"stage{stage}": estimate_bytes_per_rank(
            recipe, parameters, stage=stage, world_size=world_size, activations=activation
        )
        for stage in range(4)
    }
    stage = recipe.parallel.zero_stage
    time = estimate_step_time(
        recipe, parameters, machine, world_size=world_size, efficiency=efficiency, tried=tried, extra=extra
    )
    hours = time["step_seconds"] * recipe.steps / 3600
    price = machine.dollars_per_hour if dollars_per_hour is None else dollars_per_hour
    return {
        "recipe": recipe.name,
        "recipe_hash": recipe.hash,
        "depth": recipe.model.depth,
        "parameters": parameters,
        "trained_parameters": count_trained_parameters(recipe, parameters),
        "image_tokens": (height // recipe.model.patch) * (width // recipe.model.patch),
        "text_tokens": tokens,
        "forward_flops_per_image": forward_flops_per_image(recipe.model, height, width, tokens),
        "train_flops_per_image": train_flops,
        "images": recipe.images,
        "steps": recipe.steps,
        "train_flops": train_flops * recipe.steps * recipe.global_batch,
        "world_size": world_size,
        "zero_stage": stage,
        "micro_batch": micro,
        "machine": machine.name,
        "device_peak_flops": machine.flops * world_size,
        "efficiency": efficiency,
        "bytes_per_rank": per_stage,
        "activation_bytes_per_image": {
            "kept": kept.kept(recompute=False), "recomputed": kept.kept(recompute=True),
        },
        "advice": advise(recipe, per_stage, machine),
        "checkpoint_bytes": count_checkpoint_bytes(recipe, parameters),
        "storage_bytes": count_storage_bytes(recipe, parameters),
        "time": time | {"hours": hours, "device_hours": hours * world_size},
        "tried": tried and {name: cost._asdict() for name, cost in tried._asdict().items()},
        "dollars": hours * world_size * price,
        "precompute": compare_precomputing(recipe, machine, price=price, hours=hours, dataset_images=dataset_images),
        "predicted": _list_predictions(recipe, machine, parameters, time, per_stage[f"stage{stage}"]),
    }  # fmt: skip


def _list_predictions(
    recipe: Recipe, machine: Machine, parameters: int, time: dict[str, float], per_rank: dict[str, int]
) -> dict[str, float]:
    """What a run measures, under the names of its result rows."""
    measured = ("weights", "masters", "moments", "gradients", "ema", "activations")
    return {
        "cost/parameters": parameters,
        "cost/checkpoint_bytes": count_checkpoint_bytes(recipe, parameters),
        "cost/storage_bytes": count_storage_bytes(recipe, parameters),
        "cost/images_per_second": recipe.global_batch / time["step_seconds"],
        "cost/step_seconds": time["step_seconds"],
        **({} if machine.overlap else {"cost/step_cpu_seconds": time["work_seconds"]}),
        **{f"cost/bytes_per_rank/{name}": value for name, value in per_rank.items() if name in measured},
    }


def count_trained_parameters(recipe: Recipe, parameters: int) -> int:
    """Number of parameters with masters, moments, gradients and EMA: all `parameters` of a network, or its adapters."""
    return parameters if recipe.lora.rank is None else recipe.trained_parameters


def estimate_bytes_per_rank(
    recipe: Recipe, parameters: int, *, stage: int, world_size: int, activations: int = 0
) -> dict[str, int]:
    """What lies on one rank under a ZeRO stage, by category. The weights that compute are a copy of the fp32 masters,
    except under stage 0, where fp32 weights are their own masters. `gathered` under stage 3: two blocks in use, or
    what may stay for its next use."""
    p = recipe.parallel
    compute, gradient = count_element_bytes(recipe)
    trained = count_trained_parameters(recipe, parameters)
    frozen = 0 if recipe.lora.rank is None else parameters

    def share(sharded: bool) -> float:
        return 1 / world_size if sharded else 1.0

    found: dict[str, float] = {
        "weights": (trained + frozen) * compute * share(stage >= 3),
        "masters": trained * 4 * share(stage >= 1) if stage else 0,
        "moments": trained * 4 * ADAM_MOMENTS * share(stage >= 1),
        "gradients": trained * gradient * share(stage >= 2),
        "ema": trained * 4 * len(recipe.ema.profiles) * share(stage >= 1),
    }
    host = 0.0
    if stage and p.offload_optimizer:
        host += found["masters"] + found["moments"] + found["ema"] + trained * 4 * share(stage >= 1)
        found |= {"masters": 0, "moments": 0, "ema": 0}
    if stage == 3 and p.offload_parameters != "no":
        host += found["weights"]
        found["weights"] = 0
    if stage == 3:
        two_blocks = 2 * recipe.model.block_parameters() / recipe.model.depth
        found["gathered"] = compute * min(parameters, max(two_blocks, p.max_live)) if world_size > 1 else 0
        found["second_copy"] = parameters * compute / p.hpz if p.hpz > 1 else 0
    found["activations"] = activations
    whole = {name: math.ceil(value) for name, value in found.items()}
    states = ("weights", "masters", "moments", "gradients", "ema")
    return whole | {
        "total": sum(whole[name] for name in states),
        "device": sum(whole.values()),
        "host": math.ceil(host),
    }


def advise(recipe: Recipe, per_stage: dict[str, dict[str, int]], machine: Machine) -> str:
    """The cheapest stage that fits: each higher one communicates more or earlier."""
    room = USABLE * machine.memory
    fitting = [stage for stage in range(recipe.lowest_stage, 4) if per_stage[f"stage{stage}"]["device"] <= room]
    mine = per_stage[f"stage{recipe.parallel.zero_stage}"]
    if not fitting:
        largest = max((n for n in mine if n not in ("total", "device", "host")), key=lambda n: mine[n])
        how = {"activations": "a smaller --parallel.micro-batch or --parallel.checkpoint-blocks"}.get(
            largest, "more ranks or --parallel.offload-optimizer"
        )
        return f"no stage fits {room / 2**30:.0f} GiB of a {machine.name}, most of it {largest}: use {how}"
    if mine["device"] > room:
        return f"stage {recipe.parallel.zero_stage} does not fit {room / 2**30:.0f} GiB; stage {fitting[0]} does"
    used = per_stage[f"stage{fitting[0]}"]["device"] / 2**30
    return f"stage {fitting[0]} is enough: {used:.1f} of {room / 2**30:.0f} GiB"


def count_checkpoint_bytes(recipe: Recipe, parameters: int) -> int:
    """Masters, moments and EMA profiles, in fp32."""
    return 4 * count_trained_parameters(recipe, parameters) * (1 + ADAM_MOMENTS + len(recipe.ema.profiles))


def count_storage_bytes(recipe: Recipe, parameters: int) -> int:
    """A run's folder at its end: checkpoints that are kept, EMA weights of every save, final EMA and raw weights."""
    kept = min(recipe.logging.keep, recipe.num_saves)
    return kept * count_checkpoint_bytes(recipe, parameters) + (recipe.num_saves + 2) * 4 * parameters


def estimate_step_time(
    recipe: Recipe,
    parameters: int,
    machine: Machine,
    *,
    world_size: int,
    efficiency: float,
    tried: StepCost | None = None,
    extra: Cost = NOTHING,
) -> dict[str, float]:
    """Seconds of one optimizer step: computing at a stated efficiency, communication from bytes and links, copies
    around it, the optimizer and the EMA from bytes and memory. `work` is what that comes to; on CPUs ranks also wait
    for each other, by the bytes that they exchange. What was `tried` stands for all of it."""
    p, (_, height, width) = recipe.parallel, recipe.data.latent_shape
    per_image = count_train_flops(recipe)
    if p.checkpoint_blocks:
        per_image += forward_flops_per_image(recipe.model, height, width, recipe.data.text_tokens)
    compute = per_image * recipe.global_batch / world_size / (machine.flops * efficiency)
    moved = count_bytes_moved(recipe, parameters, world_size=world_size)
    inside = min(world_size, machine.per_node, p.hpz) if p.hpz > 1 else 0
    over = {name: inside or world_size if name == "backward" else world_size for name in moved}
    parts = [estimate_transfer(machine, nbytes, over[name]) for name, nbytes in moved.items()]
    communication = sum(max(part) for part in parts)
    copying = count_bytes_copied(recipe, parameters, world_size=world_size) / machine.bandwidth
    mine = count_trained_parameters(recipe, parameters) / (world_size if p.zero_stage else 1)
    # AdamW reads the gradient, the master and two moments and writes three of them; an EMA reads two and writes one.
    updating = mine * 4 * (7 + 3 * len(recipe.ema.profiles)) / machine.bandwidth
    exchange = communication + copying
    work = (max(compute, exchange) if machine.overlap else compute + exchange) + updating
    step = Cost(work + machine.waiting * communication, work)
    passes = count_passes(recipe, world_size)
    if tried is not None:
        step = Cost(*(passes * one + update for one, update in zip(tried.micro_batch, tried.update)))
    step = Cost(*(known + passes * more for known, more in zip(step, extra)))
    return {
        "compute_seconds": compute,
        "communication_seconds": communication,
        "inside_node_seconds": sum(local for local, _ in parts),
        "between_nodes_seconds": sum(remote for _, remote in parts),
        "copy_seconds": copying,
        "update_seconds": updating,
        "work_seconds": step.work,
        "step_seconds": step.seconds,
        "step_seconds_without_overlap": compute + exchange + updating,
        "bytes_moved_per_step": sum(moved.values()),
    }


def count_bytes_moved(recipe: Recipe, parameters: int, *, world_size: int) -> dict[str, float]:
    """Bytes gathered or reduced per step: parameters in the forward and backward passes (stage 3, each micro-batch; in
    one of them where all may stay gathered), gradients (stages 2 and 3: each micro-batch), and masters back into the
    weights (stages 1 and 2)."""
    p, (compute, gradient) = recipe.parallel, count_element_bytes(recipe)
    passes = count_passes(recipe, world_size)
    if p.quantized_gradients:
        gradient = 0.5
    weights = 1 if p.quantized_weights else compute
    reductions = passes if p.zero_stage >= 2 else 1
    trained, looks = count_trained_parameters(recipe, parameters), 2 if get_objective(recipe.objective).reference else 1
    stay = parameters <= p.max_live
    return {
        "forward": parameters * weights * passes * (1 if stay else looks) if p.zero_stage == 3 else 0,
        "backward": parameters * weights * passes if p.zero_stage == 3 and not stay else 0,
        # An all-reduce moves twice what a reduce-scatter does.
        "gradients": trained * gradient * reductions * (2 if p.zero_stage == 0 else 1),
        "publish": trained * compute if p.zero_stage in (1, 2) else 0,
    }


def count_bytes_copied(recipe: Recipe, parameters: int, *, world_size: int) -> float:
    """Bytes that DeepSpeed reads and writes around the collectives of a step: gathered parts are put together;
    gradients go into a bucket, are widened, laid out by rank and divided (its stage3.py, coalesced_collectives.py)."""
    if world_size == 1 or recipe.parallel.zero_stage < 2:
        return 0.0
    moved, (compute, gradient) = (
        count_bytes_moved(recipe, parameters, world_size=world_size),
        count_element_bytes(recipe),
    )
    reduced = count_trained_parameters(recipe, parameters) * count_passes(recipe, world_size)
    return 2 * (moved["forward"] + moved["backward"]) + reduced * (3 * compute + 5 * gradient)


def count_element_bytes(recipe: Recipe) -> tuple[float, float]:
    """Bytes of a weight that computes and of a gradient that is reduced."""
    full = recipe.precision == "fp32"
    return (4.0 if full else 2.0), (4.0 if full or recipe.parallel.fp32_reduce else 2.0)


def count_passes(recipe: Recipe, world_size: int) -> int:
    """Micro-batches of a rank in a step."""
    share = math.ceil(recipe.global_batch / world_size)
    return math.ceil(share / (recipe.parallel.micro_batch or share))


def compare_precomputing(
    recipe: Recipe, machine: Machine, *, price: float, hours: float, dataset_images: int | None
) -> dict[str, Any]:
    """Encode once and store, or encode at every pass? Storage counts for as long as the run lasts, a month at least."""
    unique = min(dataset_images or recipe.images, recipe.images)
    online = recipe.images * machine.encode_seconds / 3600
    once = unique * machine.encode_seconds / 3600
    stored = unique * STORED_BYTES_PER_IMAGE
    storing = stored / 1e9 * DOLLARS_PER_GB_MONTH * max(1.0, hours / HOURS_PER_MONTH)
    return {
        "passes": recipe.images / unique,
        "online_device_hours": online,
        "once_device_hours": once,
        "stored_bytes": stored,
        "storing_dollars": storing,
        "saved_dollars": (online - once) * price - storing,
        "pays": (online - once) * price > storing,
    }


def describe(plan: dict[str, Any]) -> str:
    """The plan as people read it."""
    lines = [
        f"{plan['recipe']} ({plan['recipe_hash']}): depth {plan['depth']}, {plan['parameters']:,} parameters, "
        f"{plan['image_tokens']} image + {plan['text_tokens']} text tokens",
        f"{plan['images']:,} images in {plan['steps']:,} steps, {plan['train_flops_per_image']:.3e} FLOPs an image to "
        f"train, {plan['train_flops']:.3e} in all",
        f"bytes per rank on {plan['world_size']} rank(s) of {plan['machine']}, GiB (the recipe uses stage "
        f"{plan['zero_stage']}, {plan['micro_batch']} image(s) at once; total: model states alone):",
    ]
    names = list(plan["bytes_per_rank"]["stage3"])
    lines.append("         " + "".join(f"{name:>12}" for name in names))
    for stage, sizes in plan["bytes_per_rank"].items():
        lines.append(f"  {stage}" + "".join(f"{sizes.get(name, 0) / 2**30:12.3f}" for name in names))
    time, pre = plan["time"], plan["precompute"]
    lines += [
        plan["advice"],
        f"a step takes {time['step_seconds']:.3g} s ({_describe_step(plan)}); the run "
        + format_duration(3600 * time["hours"])
        + (f", {time['device_hours']:,.0f} device-hours, ${plan['dollars']:,.0f}" if plan["dollars"] >= 1 else ""),
        f"a checkpoint takes {plan['checkpoint_bytes'] / 2**30:.3f} GiB, the run folder "
        f"{plan['storage_bytes'] / 2**30:.3f} GiB",
    ]
    if pre["online_device_hours"] < 1:
        return "\n".join(lines)  # of a run so small nobody asks what encoding costs
    lines.append(
        f"encoding once {'pays' if pre['pays'] else 'does not pay'}: {pre['once_device_hours']:,.1f} device-hours and "
        f"{pre['stored_bytes'] / 1e9:,.0f} GB instead of {pre['online_device_hours']:,.1f} device-hours "
        f"({pre['passes']:.3g} passes)"
    )
    return "\n".join(lines)


def _describe_step(plan: dict[str, Any]) -> str:
    time, tried = plan["time"], plan["tried"]
    if tried:
        each, update = (tried[name]["seconds"] for name in ("micro_batch", "update"))
        return f"tried here: {each:.3g} s a micro-batch, {update:.3g} s an update"
    waiting = time["step_seconds"] - time["work_seconds"]
    return (
        f"{time['compute_seconds']:.3g} s computing at {plan['efficiency']:.3g} of the peak, "
        f"{time['communication_seconds']:.3g} s communicating, {time['copy_seconds'] + time['update_seconds']:.3g} s "
        "copying and updating" + (f", {waiting:.3g} s waiting" if waiting > 0 else "")
    )
