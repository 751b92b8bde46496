"""Diffusion-DPO (Wallace et al., arXiv 2311.12908, eq. 14): the better picture of a pair against the worse one.

Time and noise are shared within a pair and keyed by its position; the reference is the same network with its adapters
switched off, so there is no second copy of the weights.
"""
# Shapes: P pairs, B = 2P samples (the preferred ones first), C latent channels, H and W latent height and width.

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.loading.collate import Draws
from data_pipeline.loading.loader import Dataset
from data_pipeline.loading.pairs import Partners
from data_pipeline.packing.pairs import CAPTION
from infra.errors import UserError
from model.diffusion.flow import Formulation, get_formulation
from model.encoders.text import TextCond
from trainer.feed import Micro, drawn
from trainer.objective import Losses
from trainer.recipe import Recipe
from trainer.validate import fixed_batches, turns
from trainer.zero.engine import ZeroEngine
from trainer.zero.group import Group

DRAWS = 4  # times and noises of each held-out pair


class Policy(Protocol):
    """What is trained, and the reference inside it."""

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, text: TextCond) -> Tensor: ...

    def reference(self) -> AbstractContextManager[None]: ...


class Errors(NamedTuple):
    """Mean squared errors of each pair: of the policy and of the reference, on the preferred and the rejected one."""

    preferred_P: Tensor
    rejected_P: Tensor
    ref_preferred_P: Tensor
    ref_rejected_P: Tensor

    def reward_P(self, beta: float) -> Tensor:
        """Implicit reward of the preferred over the rejected: the logit that the policy puts on being right."""
        policy_P, reference_P = self.preferred_P - self.rejected_P, self.ref_preferred_P - self.ref_rejected_P
        return -beta / 2 * (policy_P - reference_P)


def preference(policy: Policy, micro: Micro, *, formulation: Formulation, device: torch.device, beta: float) -> Losses:
    """-log sigmoid(reward margin) of each pair; ln 2 while the adapters are zero. Errors are the formulation's own,
    which for rectified flows is the velocity's."""
    if micro.batch.rejected_BCHW is None:
        raise UserError("objective dpo needs pairs, this batch has none")
    given = micro.to(device)
    sample = formulation.sample(given.x0_BCHW, given.noise_BCHW.repeat(2, 1, 1, 1), given.t_B.repeat(2))
    inputs = sample.model_input, sample.network_time_B, TextCond.cat([given.text, given.text])
    with policy.reference():
        reference_B = formulation.loss_B(policy(*inputs), sample)
    policy_B = formulation.loss_B(policy(*inputs), sample)
    errors = Errors(*policy_B.chunk(2), *reference_B.chunk(2))
    return Losses(-F.logsigmoid(errors.reward_P(beta)), micro.t_B, _figures(errors, beta))


@torch.no_grad()
def _figures(m: Errors, beta: float) -> dict[str, Tensor]:
    reward_P = m.reward_P(beta)
    return {
        "dpo/reward_margin": reward_P,
        "dpo/accuracy": (reward_P > 0).float() + 0.5 * (reward_P == 0).float(),
        # Against the reference: both may rise while their difference falls.
        "dpo/preferred_error_change": m.preferred_P - m.ref_preferred_P,
        "dpo/rejected_error_change": m.rejected_P - m.ref_rejected_P,
    }


class HeldOut:
    """The pairs of the val split, with the same times and noise at each call, whatever the number of ranks."""

    def __init__(self, recipe: Recipe, dataset: Dataset) -> None:
        self.recipe, self.dataset, self._partners = recipe, dataset, Partners(dataset)
        self._batches = fixed_batches(dataset, recipe.validation.samples, recipe.validation.batch)
        self.pair_count = sum(len(batch) for batch in self._batches)

    def run(self, engine: ZeroEngine, group: Group) -> dict[str, float]:
        """Mean figures with the weights that the engine now shows. Collective."""
        sums: dict[str, float] = {}
        with engine.inference():
            for number, mine in turns(len(self._batches), group):
                for name, value in self._figures(engine, self._batches[number], group.device).items():
                    sums[name] = sums.get(name, 0.0) + value * mine
        totals = group.sum(list(sums.values()))  # the same names on all ranks
        return {name: total / (self.pair_count * DRAWS) for name, total in zip(sums, totals)}

    def _figures(self, engine: ZeroEngine, numbers: range, device: torch.device) -> dict[str, float]:
        """Sums over the pairs and draws of one batch."""
        recipe, seed = self.recipe, self.recipe.validation.seed
        batch = self.dataset.read(numbers, seed=seed)
        pairs = batch._replace(rejected_BCHW=self._partners(batch, Draws(seed, {CAPTION: 1.0}, 0.0)))
        sums: dict[str, float] = {}
        formulation = get_formulation(recipe.formulation)
        for draw in range(DRAWS):
            micro = drawn(pairs, formulation, seed=seed + draw, shift=recipe.shift)
            found = preference(engine, micro, formulation=formulation, device=device, beta=recipe.dpo.beta)
            for name, value_P in {"dpo/loss": found.loss_B, **found.figures}.items():
                sums[name] = sums.get(name, 0.0) + value_P.double().sum().item()
        return sums
