"""Values of a recipe that cannot work, whatever the data and the machine."""

import math
from collections.abc import Iterator, Sequence
from operator import attrgetter

from infra.errors import UserErrors
from trainer.recipe import Recipe

POSITIVE = (
    "images", "global_batch", "shift", "optimizer.lr", "optimizer.eps", "optimizer.clip_norm", "validation.samples",
    "validation.batch", "validation.every", "logging.log_every", "logging.save_every", "logging.save_at",
    "logging.keep", "logging.stall_s", "guard.spike", "parallel.micro_batch", "parallel.hpz", "parallel.reduce_bucket",
    "data.resolution", "data.text_tokens", "data.latent_shape", "dpo.beta", "student.huber", "student.steps",
    "student.teacher_steps", "student.perceptual_weight", "student.difference", "lora.rank", "lora.alpha",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "validation.seed", "optimizer.weight_decay", "schedule.warmup_images", "logging.samples",
    "guard.max_skips", "parallel.persistence_threshold", "parallel.prefetch", "parallel.max_live",
    "student.latent_weight",
)  # fmt: skip
SHARES = (
    "schedule.cooldown", "schedule.final", "data.original_captions", "data.encoder_dropout", "student.equal_times",
    "student.to_zero",
)  # fmt: skip


def check_values(recipe: Recipe) -> None:
    """Refuse values that cannot work, all at once, before anything is built."""
    wrong = [*_check_numbers(recipe), *_check_parallel(recipe), *_check_adapters(recipe)]
    if wrong:
        raise UserErrors(f"recipe {recipe.name}: {line}" for line in wrong)


def _list_numbers(recipe: Recipe, names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """(dotted name, number) of fields, of a tuple each of its numbers; fields that are left out (None, auto) pass."""
    for name in names:
        value = attrgetter(name)(recipe)
        for number in value if isinstance(value, tuple) else (value,):
            if number not in (None, "auto"):
                yield name, number


def _check_numbers(recipe: Recipe) -> Iterator[str]:
    for name, value in _list_numbers(recipe, POSITIVE):
        if not (math.isfinite(value) and value > 0):
            yield f"{name} is {value}, expected a positive number"
    for name, value in _list_numbers(recipe, NOT_NEGATIVE):
        if not (math.isfinite(value) and value >= 0):
            yield f"{name} is {value}, expected zero or more"
    student = recipe.student
    both = ("student.equal_times + student.to_zero", student.equal_times + student.to_zero)
    for name, value in (*_list_numbers(recipe, SHARES), both):
        if not 0 <= value <= 1:
            yield f"{name} is {value}, expected a share between 0 and 1"
    betas = recipe.optimizer.betas
    if not all(0 <= beta < 1 for beta in betas):
        yield f"optimizer.betas are {' '.join(map(str, betas))}, expected numbers from 0 to below 1"
    if not recipe.ema.profiles or len(set(recipe.ema.profiles)) != len(recipe.ema.profiles):
        yield f"ema.profiles {recipe.ema.profiles}: expected at least one, all different"


def _check_parallel(recipe: Recipe) -> list[str]:
    p = recipe.parallel
    wrong = [
        (p.zero_stage == 0 and recipe.precision == "bf16",
         "bf16 needs fp32 master weights: use --parallel.zero-stage 2 or 3"),
        (0 < p.zero_stage < recipe.lowest_stage,
         "stage 1 accumulates bf16 gradients in bf16 only: use --parallel.zero-stage 2, or --no-parallel.fp32-reduce"),
        (p.zero_stage == 0 and p.offload_optimizer, "offload_optimizer needs --parallel.zero-stage 1, 2 or 3"),
        (p.zero_stage != 3 and p.offload_parameters != "no", "offload_parameters needs --parallel.zero-stage 3"),
        (p.zero_stage != 3 and (p.hpz > 1 or p.quantized_weights or p.quantized_gradients),
         "hpz, quantized_weights and quantized_gradients need --parallel.zero-stage 3"),
        (p.offload_parameters == "nvme" and not p.nvme_path,
         "offload_parameters nvme needs --parallel.nvme-path, a folder on a fast local disk"),
        (p.offload_parameters != "no" and not p.offload_optimizer,
         "offload_parameters keeps shards on the host, their masters belong there too: --parallel.offload-optimizer"),
    ]  # fmt: skip
    return [sentence for found, sentence in wrong if found]


def _check_adapters(recipe: Recipe) -> list[str]:
    p, lora = recipe.parallel, recipe.lora
    wrong = [
        (lora.rank is not None and (p.hpz > 1 or p.quantized_weights or p.offload_parameters != "no" or p.compile),
         "frozen weights under adapters do not go with hpz, quantized_weights, offload_parameters or compile: "
         "leave these out"),
    ]  # fmt: skip
    return [sentence for found, sentence in wrong if found]
