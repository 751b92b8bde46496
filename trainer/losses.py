"""The objectives of a recipe, in one place: `pretrain` is in objective.py, `dpo` in dpo.py."""

import torch

from data_pipeline.loading.batch import LatentBatch
from model.diffusion.flow import Formulation
from trainer.dpo import preference
from trainer.objective import Losses, pretrain
from trainer.recipe import Recipe
from trainer.zero.engine import ZeroEngine


def losses_of(
    recipe: Recipe, engine: ZeroEngine, micro: LatentBatch, formulation: Formulation, device: torch.device
) -> Losses:
    """What the recipe's objective gives for a micro-batch."""
    if recipe.objective == "dpo":
        return preference(
            engine, micro, formulation=formulation, seed=recipe.seed, shift=recipe.shift, device=device,
            beta=recipe.dpo.beta,
        )  # fmt: skip
    return pretrain(engine, micro, formulation=formulation, seed=recipe.seed, shift=recipe.shift, device=device)
