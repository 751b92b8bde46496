"""What a plan is computed from: bytes on a rank, bytes that are stored and moved, seconds of a step, by formulas."""

import math
from dataclasses import dataclass

from trainer.machines import Machine, estimate_transfer
from trainer.objective import asks_teacher, count_network_passes, count_train_flops, get_objective
from trainer.recipe import Recipe

ADAM_MOMENTS = 2
EXPORTS = 3  # EMA weights under two names and raw weights, all by rank 0 (trainer/state.py)
STORED_PER_SECOND = 0.67e9  # bytes that one core hashes and writes to a local disk in a second, measured on a Xeon
MODEL_STATES = ("weights", "masters", "moments", "gradients", "ema", "teacher")


@dataclass(frozen=True)
class Cost:
    """What something takes: seconds by the clock, and of work of the busiest rank's cores."""

    seconds: float = 0.0
    work: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, self.work + other.work)

    def __mul__(self, times: float) -> "Cost":
        return Cost(times * self.seconds, times * self.work)

    def interpolate(self, other: "Cost", place: float) -> "Cost":
        """The cost on the line between this one (`place` 0) and the other one (`place` 1); `place` may lie beyond."""
        between = Cost(other.seconds - self.seconds, other.work - self.work)
        return self + between * place

    def at_least(self, other: "Cost") -> "Cost":
        """The larger of both, in seconds and in work."""
        return Cost(max(self.seconds, other.seconds), max(self.work, other.work))


NOTHING = Cost()


@dataclass(frozen=True)
class StepCost:
    """What a step costs: a micro-batch (forward and backward), and the update at the end of the step."""

    micro_batch: Cost
    update: Cost


@dataclass(frozen=True)
class StepTime:
    """Of one optimizer step, in seconds. `work` is what computing, communicating, copying and updating come to."""

    compute_seconds: float
    communication_seconds: float
    inside_node_seconds: float
    between_nodes_seconds: float
    copy_seconds: float
    update_seconds: float
    work_seconds: float
    step_seconds: float
    step_seconds_without_overlap: float
    bytes_moved_per_step: float
    hours: float
    """Of the whole run."""
    device_hours: float


def estimate_bytes_per_rank(
    recipe: Recipe, *, stage: int, world_size: int, activations: int = 0, perceptual: int = 0
) -> dict[str, int]:
    """What lies on one rank under a ZeRO stage, by category. The weights that compute are a copy of the fp32 masters,
    except under stage 0, where fp32 weights are their own masters. `gathered` under stage 3: two blocks in use, or
    what may stay for its next use. `teacher`: the frozen weights that an objective asks."""
    p, parameters, trained = recipe.parallel, recipe.model.count_parameters(), recipe.trained_parameters
    compute, gradient = count_element_bytes(recipe)
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
    if asks_teacher(recipe):
        found["teacher"] = trained * compute * share(stage >= 1)
    host = 0.0
    if stage and p.offload_optimizer:
        moved = {name: found[name] for name in ("masters", "moments", "ema", "teacher") if name in found}
        host += sum(moved.values()) + trained * 4 * share(stage >= 1)
        found |= dict.fromkeys(moved, 0.0)
    if stage == 3 and p.offload_parameters != "no":
        host += found["weights"]
        found["weights"] = 0
    if stage == 3:
        two_blocks = 2 * recipe.model.count_block_parameters() / recipe.model.depth
        found["gathered"] = compute * min(parameters, max(two_blocks, p.max_live)) if world_size > 1 else 0
        found["second_copy"] = parameters * compute / p.hpz if p.hpz > 1 else 0
    found["activations"] = activations
    if perceptual:
        found["perceptual"] = perceptual
    num_bytes = {name: math.ceil(value) for name, value in found.items()}
    return num_bytes | {
        "total": sum(num_bytes.get(name, 0) for name in MODEL_STATES),
        "device": sum(num_bytes.values()),
        "host": math.ceil(host),
    }


def count_checkpoint_bytes(recipe: Recipe) -> int:
    """Masters, moments and EMA profiles, in fp32."""
    return 4 * recipe.trained_parameters * (1 + ADAM_MOMENTS + len(recipe.ema.profiles))


def count_storage_bytes(recipe: Recipe) -> int:
    """A run's folder at its end: checkpoints that are kept, EMA weights of every save, final EMA and raw weights."""
    kept, weights = min(recipe.logging.keep, recipe.num_saves), 4 * recipe.model.count_parameters()
    return kept * count_checkpoint_bytes(recipe) + (recipe.num_saves + 2) * weights


def estimate_save_seconds(recipe: Recipe, world_size: int) -> float:
    """Of rank 0, for which all others wait: it writes weights in fp32, and its share of the checkpoint. To S3 all of it
    is sent on after that."""
    weights = EXPORTS * 4 * recipe.model.count_parameters()
    return (weights + count_checkpoint_bytes(recipe) / world_size) / STORED_PER_SECOND


def estimate_step_time(
    recipe: Recipe,
    machine: Machine,
    *,
    world_size: int,
    efficiency: float,
    tried: StepCost | None = None,
    extra: Cost = NOTHING,
    frozen_flops: int = 0,
) -> StepTime:
    """Computing at a stated efficiency, communication from bytes and links, copies around it, the optimizer and the EMA
    from bytes and memory. On CPUs ranks also wait for each other, by the bytes that they exchange. What was `tried`
    stands for all of it but `frozen_flops`, those of a perceptual loss for each image, at the same efficiency although
    they are in fp32; `extra` is what each micro-batch takes beyond the rest."""
    p = recipe.parallel
    per_image = count_train_flops(recipe)
    if p.checkpoint_blocks:
        recomputed = count_network_passes(recipe).backward
        per_image += recomputed * recipe.model.count_forward_flops(*recipe.data.sizes)
    seconds_per_flop = recipe.global_batch / world_size / (machine.flops * efficiency)
    frozen = frozen_flops * seconds_per_flop
    compute = per_image * seconds_per_flop + frozen
    moved = count_bytes_moved(recipe, world_size=world_size)
    inside = min(world_size, machine.per_node, p.hpz) if p.hpz > 1 else 0
    over = {name: inside or world_size if name == "backward" else world_size for name in moved}
    parts = [estimate_transfer(machine, nbytes, over[name]) for name, nbytes in moved.items()]
    communication = sum(max(part) for part in parts)
    copying = count_bytes_copied(recipe, world_size=world_size) / machine.bandwidth
    own_parameters = recipe.trained_parameters / (world_size if p.zero_stage else 1)
    # AdamW reads the gradient, the master and two moments and writes three of them; an EMA reads two and writes one.
    updating = own_parameters * 4 * (7 + 3 * len(recipe.ema.profiles)) / machine.bandwidth
    exchange = communication + copying
    work = (max(compute, exchange) if machine.overlap else compute + exchange) + updating
    step = Cost(work + machine.waiting * communication, work)
    passes = count_passes(recipe, world_size)
    if tried is not None:
        step = tried.micro_batch * passes + tried.update + Cost(frozen, frozen)
    step += extra * passes
    hours = step.seconds * recipe.steps / 3600
    return StepTime(
        compute_seconds=compute,
        communication_seconds=communication,
        inside_node_seconds=sum(local for local, _ in parts),
        between_nodes_seconds=sum(remote for _, remote in parts),
        copy_seconds=copying,
        update_seconds=updating,
        work_seconds=step.work,
        step_seconds=step.seconds,
        step_seconds_without_overlap=compute + exchange + updating,
        bytes_moved_per_step=sum(moved.values()),
        hours=hours,
        device_hours=hours * world_size,
    )


def count_bytes_moved(recipe: Recipe, *, world_size: int) -> dict[str, float]:
    """Bytes gathered or reduced per step: parameters in the forward and backward passes (stage 3, each micro-batch; in
    one of them where all may stay gathered), gradients (stages 2 and 3: each micro-batch), and masters back into the
    weights (stages 1 and 2). A teacher's weights replace those of the network in each micro-batch, and go again."""
    p, (compute, gradient) = recipe.parallel, count_element_bytes(recipe)
    parameters, trained, passes = (
        recipe.model.count_parameters(), recipe.trained_parameters, count_passes(recipe, world_size),
    )  # fmt: skip
    if p.quantized_gradients:
        gradient = 0.5
    weights = 1 if p.quantized_weights else compute
    reductions = passes if p.zero_stage >= 2 else 1
    network = count_network_passes(recipe)
    looks = 2 if get_objective(recipe.objective).reference else network.forward - network.doubled
    stay, changes = parameters <= p.max_live, 2 if asks_teacher(recipe) else 0
    return {
        "forward": parameters * weights * passes * (max(changes, 1) if stay else looks) if p.zero_stage == 3 else 0,
        "backward": parameters * weights * passes * network.backward if p.zero_stage == 3 and not stay else 0,
        # An all-reduce moves twice what a reduce-scatter does.
        "gradients": trained * gradient * reductions * (2 if p.zero_stage == 0 else 1),
        "publish": trained * compute * (1 + changes * passes) if p.zero_stage in (1, 2) else 0,
    }


def count_bytes_copied(recipe: Recipe, *, world_size: int) -> float:
    """Bytes that DeepSpeed reads and writes around the collectives of a step: gathered parts are put together;
    gradients go into a bucket, are widened, laid out by rank and divided (its stage3.py, coalesced_collectives.py)."""
    if world_size == 1 or recipe.parallel.zero_stage < 2:
        return 0.0
    moved, (compute, gradient) = count_bytes_moved(recipe, world_size=world_size), count_element_bytes(recipe)
    reduced = recipe.trained_parameters * count_passes(recipe, world_size)
    return 2 * (moved["forward"] + moved["backward"]) + reduced * (3 * compute + 5 * gradient)


def count_element_bytes(recipe: Recipe) -> tuple[float, float]:
    """Bytes of a weight that computes and of a gradient that is reduced."""
    full = recipe.precision == "fp32"
    return (4.0 if full else 2.0), (4.0 if full or recipe.parallel.fp32_reduce else 2.0)


def choose_micro_batch(recipe: Recipe, world_size: int) -> int:
    """Images of a rank's forward pass, where a batch that the ranks cannot share evenly is planned for, too."""
    return recipe.parallel.micro_batch or math.ceil(recipe.global_batch / world_size)


def count_passes(recipe: Recipe, world_size: int) -> int:
    """Micro-batches of a rank in a step."""
    return math.ceil(math.ceil(recipe.global_batch / world_size) / choose_micro_batch(recipe, world_size))
