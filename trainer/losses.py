"""The objectives of a recipe, in one place: `pretrain` is in objective.py, `dpo` in dpo.py."""

import torch

from model.diffusion.flow import Formulation
from trainer.dpo import preference
from trainer.feed import Micro
from trainer.objective import Losses, pretrain
from trainer.recipe import Recipe
from trainer.zero.engine import ZeroEngine


def losses_of(
    recipe: Recipe, engine: ZeroEngine, micro: Micro, formulation: Formulation, device: torch.device
) -> Losses:
    """What the recipe's objective gives for a micro-batch."""
    if recipe.objective == "dpo":
        return preference(engine, micro, formulation=formulation, device=device, beta=recipe.dpo.beta)
    return pretrain(engine, micro, formulation=formulation, device=device)
