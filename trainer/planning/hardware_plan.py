"""What a run will need, before it starts: parameters, FLOPs exactly; bytes, seconds, dollars by a stated model."""

from dataclasses import dataclass, replace

import torch

from infra.device import resolve_precision
from infra.log import format_duration
from model.activations import Activations, count_activations
from trainer.machines import Machine, detect_machine
from trainer.objective import count_train_flops, get_objective
from trainer.planning.estimates import (
    NOTHING,
    Cost,
    StepCost,
    StepTime,
    choose_micro_batch,
    count_checkpoint_bytes,
    count_storage_bytes,
    estimate_bytes_per_rank,
    estimate_save_seconds,
    estimate_step_time,
)  # fmt: skip
from trainer.planning.frozen import FrozenCost
from trainer.recipe import Recipe

USABLE = 0.9  # of a device's memory: the rest goes to the allocator, kernels and NCCL
STORED_BYTES_PER_IMAGE = 65_536 + 121_344 + 202_240 + 630_784  # SD3 paper, table 7: latent, CLIP-L, CLIP-G, T5
DOLLARS_PER_GB_MONTH = 0.023  # of object storage: a list price from memory
HOURS_PER_MONTH = 730
MEASURED = ("weights", "masters", "moments", "gradients", "ema", "teacher", "activations")  # a run counts these too


@dataclass(frozen=True)
class Precomputing:
    """Encode once and store, or encode at every pass over the data?"""

    passes: float
    online_device_hours: float
    once_device_hours: float
    stored_bytes: int
    storing_dollars: float
    saved_dollars: float
    pays: bool


@dataclass(frozen=True)
class CalibratedBy:
    """The small run that a plan's steps were planned by."""

    run: str
    extra: Cost
    by_trial: bool


@dataclass(frozen=True)
class HardwarePlan:
    """plan.json. FLOPs and activations are those of one image, or of one pair; dollars are those of the whole run."""

    recipe: str
    recipe_hash: str
    depth: int
    parameters: int
    trained_parameters: int
    image_tokens: int
    text_tokens: int
    forward_flops_per_image: int
    train_flops_per_image: int
    images: int
    steps: int
    train_flops: int
    world_size: int
    zero_stage: int
    micro_batch: int
    machine: str
    device_peak_flops: float
    """Of all devices together."""
    efficiency: float
    bytes_per_rank: dict[str, dict[str, int]]
    """By ZeRO stage (`stage0` ...) and category."""
    activation_bytes_per_image: dict[str, int]
    advice: str
    checkpoint_bytes: int
    storage_bytes: int
    time: StepTime
    tried: StepCost | None
    dollars: float
    precompute: Precomputing
    predicted: dict[str, float]
    """What a run measures, under the names of its result rows."""
    calibration: CalibratedBy | None = None
    save_seconds: float = 0.0
    """For which training stands still at a save: SIGTERM must leave that long before SIGKILL."""
    perceptual: FrozenCost | None = None
    """Part of `train_flops_per_image` and of the bytes."""

    def describe(self) -> str:
        """The plan as people read it."""
        time, pre = self.time, self.precompute
        names = list(self.bytes_per_rank["stage3"])
        lines = [
            f"{self.recipe} ({self.recipe_hash}): depth {self.depth}, {self.parameters:,} parameters, "
            f"{self.image_tokens} image + {self.text_tokens} text tokens",
            f"{self.images:,} images in {self.steps:,} steps, {self.train_flops_per_image:.3e} FLOPs an image to "
            f"train, {self.train_flops:.3e} in all",
            *([self.perceptual.describe()] if self.perceptual else []),
            f"bytes per rank on {self.world_size} rank(s) of {self.machine}, GiB (the recipe uses stage "
            f"{self.zero_stage}, {self.micro_batch} image(s) at once; total: model states alone):",
            "         " + "".join(f"{name:>12}" for name in names),
        ]
        for stage, sizes in self.bytes_per_rank.items():
            lines.append(f"  {stage}" + "".join(f"{sizes.get(name, 0) / 2**30:12.3f}" for name in names))
        lines += [
            self.advice,
            f"a step takes {time.step_seconds:.3g} s ({self._describe_step()}); the run "
            + format_duration(3600 * time.hours)
            + (f", {time.device_hours:,.0f} device-hours, ${self.dollars:,.0f}" if self.dollars >= 1 else ""),
            f"a checkpoint takes {self.checkpoint_bytes / 2**30:.3f} GiB, the run folder "
            f"{self.storage_bytes / 2**30:.3f} GiB; a save takes {self.save_seconds:.3g} s on a local disk",
        ]
        if pre.online_device_hours >= 1:  # of a smaller run nobody asks what encoding costs
            lines.append(
                f"encoding once {'pays' if pre.pays else 'does not pay'}: {pre.once_device_hours:,.1f} device-hours "
                f"and {pre.stored_bytes / 1e9:,.0f} GB instead of {pre.online_device_hours:,.1f} device-hours "
                f"({pre.passes:.3g} passes)"
            )
        return "\n".join(lines)

    def _describe_step(self) -> str:
        time, tried = self.time, self.tried
        if tried:
            each, update = tried.micro_batch.seconds, tried.update.seconds
            return f"tried here: {each:.3g} s a micro-batch, {update:.3g} s an update"
        waiting = time.step_seconds - time.work_seconds
        return (
            f"{time.compute_seconds:.3g} s computing at {self.efficiency:.3g} of the peak, "
            f"{time.communication_seconds:.3g} s communicating, {time.copy_seconds + time.update_seconds:.3g} s "
            "copying and updating" + (f", {waiting:.3g} s waiting" if waiting > 0 else "")
        )


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
    perceptual: FrozenCost | None = None,
) -> HardwarePlan:
    """`tried`: what trials of this recipe took, which then is its step; `extra`: what each micro-batch takes beyond the
    rest; `perceptual`: what a perceptual loss adds, which no trial knows."""
    recipe = plan_precision(recipe, machine)
    machine = machine or detect_machine(recipe.precision)
    efficiency = machine.efficiency if efficiency is None else efficiency
    price = machine.dollars_per_hour if dollars_per_hour is None else dollars_per_hour
    height, width, tokens = recipe.data.sizes
    micro, kept = choose_micro_batch(recipe, world_size), _count_activations(recipe)
    pictures = micro * get_objective(recipe.objective).images_per_sample
    activations = kept.kept(recompute=recipe.parallel.checkpoint_blocks) * pictures
    frozen_flops, frozen_bytes = (perceptual.flops_per_image, perceptual.count_bytes(micro)) if perceptual else (0, 0)
    given = {"world_size": world_size, "activations": activations, "perceptual": frozen_bytes}
    per_stage = {f"stage{n}": estimate_bytes_per_rank(recipe, stage=n, **given) for n in range(4)}
    time = estimate_step_time(
        recipe, machine, world_size=world_size, efficiency=efficiency, tried=tried, extra=extra,
        frozen_flops=frozen_flops,
    )  # fmt: skip
    train_flops = count_train_flops(recipe) + frozen_flops
    return HardwarePlan(
        recipe=recipe.name,
        recipe_hash=recipe.hash,
        depth=recipe.model.depth,
        parameters=recipe.model.count_parameters(),
        trained_parameters=recipe.trained_parameters,
        image_tokens=(height // recipe.model.patch) * (width // recipe.model.patch),
        text_tokens=tokens,
        forward_flops_per_image=recipe.model.count_forward_flops(height, width, tokens),
        train_flops_per_image=train_flops,
        images=recipe.images,
        steps=recipe.steps,
        train_flops=train_flops * recipe.steps * recipe.global_batch,
        world_size=world_size,
        zero_stage=recipe.parallel.zero_stage,
        micro_batch=micro,
        machine=machine.name,
        device_peak_flops=machine.flops * world_size,
        efficiency=efficiency,
        bytes_per_rank=per_stage,
        activation_bytes_per_image={"kept": kept.kept(recompute=False), "recomputed": kept.kept(recompute=True)},
        advice=advise(recipe, per_stage, machine),
        checkpoint_bytes=count_checkpoint_bytes(recipe),
        storage_bytes=count_storage_bytes(recipe),
        time=time,
        tried=tried,
        dollars=time.device_hours * price,
        precompute=compare_precomputing(
            recipe.images, machine, price=price, hours=time.hours, dataset_images=dataset_images
        ),
        save_seconds=estimate_save_seconds(recipe, world_size),
        predicted=_list_predictions(recipe, machine, time, per_stage[f"stage{recipe.parallel.zero_stage}"]),
        perceptual=perceptual,
    )


def _count_activations(recipe: Recipe) -> Activations:
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    return count_activations(recipe.model, recipe.data.latent_shape, recipe.data.text_tokens, dtype)


def _list_predictions(recipe: Recipe, machine: Machine, time: StepTime, per_rank: dict[str, int]) -> dict[str, float]:
    return {
        "cost/parameters": recipe.model.count_parameters(),
        "cost/checkpoint_bytes": count_checkpoint_bytes(recipe),
        "cost/storage_bytes": count_storage_bytes(recipe),
        "cost/images_per_second": recipe.global_batch / time.step_seconds,
        "cost/step_seconds": time.step_seconds,
        **({} if machine.overlap else {"cost/step_cpu_seconds": time.work_seconds}),
        **{f"cost/bytes_per_rank/{name}": value for name, value in per_rank.items() if name in MEASURED},
    }


def advise(recipe: Recipe, per_stage: dict[str, dict[str, int]], machine: Machine) -> str:
    """The cheapest stage that fits: each higher one communicates more or earlier."""
    room = USABLE * machine.memory
    fitting = [stage for stage in range(recipe.lowest_stage, 4) if per_stage[f"stage{stage}"]["device"] <= room]
    own_bytes = per_stage[f"stage{recipe.parallel.zero_stage}"]
    if not fitting:
        largest = max((n for n in own_bytes if n not in ("total", "device", "host")), key=lambda n: own_bytes[n])
        advice = {"activations": "a smaller --parallel.micro-batch or --parallel.checkpoint-blocks"}.get(
            largest, "more ranks or --parallel.offload-optimizer"
        )
        return f"no stage fits {room / 2**30:.0f} GiB of a {machine.name}, most of it {largest}: use {advice}"
    if own_bytes["device"] > room:
        return f"stage {recipe.parallel.zero_stage} does not fit {room / 2**30:.0f} GiB; stage {fitting[0]} does"
    used = per_stage[f"stage{fitting[0]}"]["device"] / 2**30
    return f"stage {fitting[0]} is enough: {used:.1f} of {room / 2**30:.0f} GiB"


def compare_precomputing(
    images: int, machine: Machine, *, price: float, hours: float, dataset_images: int | None
) -> Precomputing:
    """For `images` with repetition. Storage counts for as long as the run lasts, a month at least."""
    unique = min(dataset_images or images, images)
    online = images * machine.encode_seconds / 3600
    once = unique * machine.encode_seconds / 3600
    stored = unique * STORED_BYTES_PER_IMAGE
    storing = stored / 1e9 * DOLLARS_PER_GB_MONTH * max(1.0, hours / HOURS_PER_MONTH)
    saved = (online - once) * price
    return Precomputing(
        passes=images / unique,
        online_device_hours=online,
        once_device_hours=once,
        stored_bytes=stored,
        storing_dollars=storing,
        saved_dollars=saved - storing,
        pays=saved > storing,
    )
