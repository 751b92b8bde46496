"""What a run will need, before it starts: parameters, FLOPs, bytes per rank by ZeRO stage, bytes on disk."""

import math
from typing import Any

from model.flops import forward_flops_per_image, parameter_count, train_flops_per_image
from trainer.recipe import Recipe

ADAM_MOMENTS = 2


def make_plan(recipe: Recipe, *, world: int) -> dict[str, Any]:
    """plan.json. Parameters and FLOPs are exact; bytes are of the model's states, without activations and buffers."""
    _, height, width = recipe.data.latent_shape
    tokens = recipe.data.text_tokens
    parameters = parameter_count(recipe.model)
    train_flops = train_flops_per_image(recipe.model, height, width, tokens)
    return {
        "recipe": recipe.name,
        "recipe_hash": recipe.hash,
        "depth": recipe.model.depth,
        "parameters": parameters,
        "image_tokens": (height // recipe.model.patch) * (width // recipe.model.patch),
        "text_tokens": tokens,
        "forward_flops_per_image": forward_flops_per_image(recipe.model, height, width, tokens),
        "train_flops_per_image": train_flops,
        "images": recipe.images,
        "steps": recipe.steps,
        "train_flops": train_flops * recipe.steps * recipe.global_batch,
        "world_size": world,
        "zero_stage": recipe.parallel.zero_stage,
        "micro_batch": recipe.parallel.micro_batch or math.ceil(recipe.global_batch / world),
        "bytes_per_rank": {
            f"stage{stage}": bytes_per_rank(recipe, parameters, stage=stage, world=world) for stage in range(4)
        },
        "checkpoint_bytes": 4 * parameters * (1 + ADAM_MOMENTS + len(recipe.ema.profiles)),
    }


def bytes_per_rank(recipe: Recipe, parameters: int, *, stage: int, world: int) -> dict[str, int]:
    """Model states on one rank under a ZeRO stage. The weights that compute are a copy of the fp32 masters, except
    under stage 0, where fp32 weights are their own masters."""
    compute = 2 if recipe.precision == "bf16" else 4
    gradient = 4 if recipe.precision == "fp32" or recipe.parallel.fp32_reduce else 2

    def share(sharded: bool) -> float:
        return 1 / world if sharded else 1.0

    found = {
        "weights": parameters * compute * share(stage >= 3),
        "masters": parameters * 4 * share(stage >= 1) if stage else 0,
        "moments": parameters * 4 * ADAM_MOMENTS * share(stage >= 1),
        "gradients": parameters * gradient * share(stage >= 2),
        "ema": parameters * 4 * len(recipe.ema.profiles) * share(stage >= 1),
    }
    whole = {name: math.ceil(value) for name, value in found.items()}
    return whole | {"total": sum(whole.values())}


def describe(plan: dict[str, Any]) -> str:
    """The plan as people read it."""
    lines = [
        f"{plan['recipe']} ({plan['recipe_hash']}): depth {plan['depth']}, {plan['parameters']:,} parameters, "
        f"{plan['image_tokens']} image + {plan['text_tokens']} text tokens",
        f"{plan['images']:,} images in {plan['steps']:,} steps, {plan['train_flops_per_image']:.3e} FLOPs an image to "
        f"train, {plan['train_flops']:.3e} in all",
        f"model states per rank on {plan['world_size']} rank(s), GiB (the recipe uses stage {plan['zero_stage']}):",
    ]
    names = list(next(iter(plan["bytes_per_rank"].values())))
    lines.append("         " + "".join(f"{name:>11}" for name in names))
    for stage, sizes in plan["bytes_per_rank"].items():
        lines.append(f"  {stage}" + "".join(f"{sizes[name] / 2**30:11.3f}" for name in names))
    lines.append(f"a checkpoint takes {plan['checkpoint_bytes'] / 2**30:.3f} GiB")
    return "\n".join(lines)
