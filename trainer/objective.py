"""Objectives: functions that turn a micro-batch into one loss per sample.

To add one, write a function `(network, batch, *, formulation, **options) -> Losses` and a line in OBJECTIVES. A recipe
selects it by name (`--objective NAME`). Loop, engine, validation and planner look it up in OBJECTIVES.
"""
# Shapes: B batch, P pairs, C latent channels, H and W latent height and width.

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.errors import UserError, nearest
from model.diffusion.flow import Formulation, get_formulation
from model.diffusion.paths import RectifiedFlow
from model.diffusion.validation import COUPLED
from model.encoders.text import TextCond
from model.flops import estimate_adapter_flops, estimate_train_flops
from trainer.feed import DeviceBatch
from trainer.recipe import Recipe
from trainer.regression import RegressionLoss, compute_regression_loss


class Network(Protocol):
    """The network as an objective calls it: in a run the ZeroEngine, in a test any network."""

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, text: TextCond) -> Tensor: ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside the block forward passes use the frozen weights alone, without adapters and without gradients."""


class Losses(NamedTuple):
    """The losses of a micro-batch: `loss_B` in fp32, one for each sample (for each pair, where samples are pairs)."""

    loss_B: Tensor
    figures: Mapping[str, Tensor] = MappingProxyType({})
    """Other values for each sample, shape (B), by name; their means are logged."""


@dataclass(frozen=True)
class Objective:
    """A loss function and its properties."""

    compute: Callable[..., Losses]
    """Called with (network, batch, formulation=..., **options)."""
    options: Callable[[Recipe], Mapping[str, Any]] = lambda recipe: {}
    """The function's further keyword arguments, taken from a recipe."""
    pairs: bool = False
    """A sample is a preferred and a rejected image; `images`, `global_batch` and `micro_batch` then count pairs."""
    couplings: bool = False
    """A sample is a latent and the noise that a teacher made it of."""
    reference: bool = False
    """True if each forward pass is repeated with the reference (the weights without adapters): the run needs
    adapters."""
    higher_is_better: frozenset[str] = frozenset()
    """Names of those `figures` for which higher is better."""

    @property
    def images_per_sample(self) -> int:
        return 2 if self.pairs else 1


def pretrain(network: Network, batch: DeviceBatch, *, formulation: Formulation) -> Losses:
    """The formulation's own loss at random times (SD3, section 2)."""
    sample = formulation.sample(batch.x0_BCHW, batch.noise_BCHW, batch.t_B)
    prediction_BCHW = network(sample.model_input, sample.network_time_B, batch.text)
    return Losses(formulation.compute_loss_B(prediction_BCHW, sample))


def reflow(
    network: Network, batch: DeviceBatch, *, formulation: Formulation, loss: RegressionLoss, huber: float
) -> Losses:
    """Rectified flow of a teacher's couplings (Liu et al., arXiv 2209.03003): |v((1-t) x0 + t e, t) - (e - x0)|^2.

    The pair (e, x0) is the teacher's own: e goes to x0 along its flow. At the optimum the student keeps the marginals
    and is straighter. A flow that is straight already has the loss 0 and stays as it is.
    """
    sample = formulation.sample(batch.x0_BCHW, batch.noise_BCHW, batch.t_B)
    prediction_BCHW = network(sample.model_input, sample.network_time_B, batch.text)
    return Losses(compute_regression_loss(prediction_BCHW, sample.target, loss=loss, huber=huber))


class PairErrors(NamedTuple):
    """Mean squared errors of each pair: of the policy and of the reference, on the preferred and the rejected one."""

    preferred_P: Tensor
    rejected_P: Tensor
    ref_preferred_P: Tensor
    ref_rejected_P: Tensor

    def compute_reward_P(self, beta: float) -> Tensor:
        """Reward margin of each pair: the logit of the probability that the policy ranks the pair correctly (the
        argument of log sigmoid in eq. 14)."""
        policy_P, reference_P = self.preferred_P - self.rejected_P, self.ref_preferred_P - self.ref_rejected_P
        return -beta / 2 * (policy_P - reference_P)


def prefer(network: Network, batch: DeviceBatch, *, formulation: Formulation, beta: float) -> Losses:
    """Diffusion-DPO (Wallace et al., arXiv 2311.12908, eq. 14): -log sigmoid(reward margin) of each pair.

    Time and noise are shared within a pair. The loss is ln 2 while the adapters are zero, as policy and reference then
    agree. Errors are the formulation's own, which for rectified flows is the velocity's.
    """
    if len(batch.x0_BCHW) != 2 * len(batch.noise_BCHW):
        raise UserError("objective dpo needs pairs, this batch has none")
    sample = formulation.sample(batch.x0_BCHW, batch.noise_BCHW.repeat(2, 1, 1, 1), batch.t_B.repeat(2))
    inputs = sample.model_input, sample.network_time_B, TextCond.cat([batch.text, batch.text])
    # The reference is the same network with its adapters switched off: there is no second copy of the weights.
    with network.reference():
        reference_B = formulation.compute_loss_B(network(*inputs), sample)
    policy_B = formulation.compute_loss_B(network(*inputs), sample)
    errors = PairErrors(*policy_B.chunk(2), *reference_B.chunk(2))
    return Losses(-F.logsigmoid(errors.compute_reward_P(beta)), _describe_pairs(errors, beta))


@torch.no_grad()
def _describe_pairs(m: PairErrors, beta: float) -> dict[str, Tensor]:
    reward_P = m.compute_reward_P(beta)
    return {
        "dpo/reward_margin": reward_P,
        "dpo/accuracy": (reward_P > 0).float() + 0.5 * (reward_P == 0).float(),
        # Against the reference: both may rise while their difference falls.
        "dpo/preferred_error_change": m.preferred_P - m.ref_preferred_P,
        "dpo/rejected_error_change": m.rejected_P - m.ref_rejected_P,
    }


OBJECTIVES: dict[str, Objective] = {
    "pretrain": Objective(pretrain),
    "dpo": Objective(
        prefer, options=lambda recipe: {"beta": recipe.dpo.beta}, pairs=True, reference=True,
        higher_is_better=frozenset({"dpo/accuracy", "dpo/reward_margin"}),
    ),
    "reflow": Objective(
        reflow, options=lambda recipe: {"loss": recipe.student.loss, "huber": recipe.student.huber}, couplings=True
    ),
}  # fmt: skip


def get_objective(name: str) -> Objective:
    """An objective by name; UserError with the nearest known one."""
    if name not in OBJECTIVES:
        raise UserError(f"unknown objective {name!r}{nearest(name, OBJECTIVES)}; known: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def check_objective(recipe: Recipe) -> None:
    """Refuse an objective that is unknown or that lacks the adapters, the path or the times it needs."""
    objective = get_objective(recipe.objective)
    if objective.couplings:
        check_student(recipe)
    if objective.reference and recipe.lora.rank is None:
        raise UserError(
            f"recipe {recipe.name}: objective {recipe.objective} takes the model without its adapters as reference: "
            "give --lora.rank, 128 in the paper"
        )


def check_student(recipe: Recipe) -> None:
    """A student regresses velocities of straight lines, and its density of times is its own: the loss of reflow is
    highest at both ends, where the densities of pretraining are thin (2-rectified flow++)."""
    formulation = get_formulation(recipe.formulation)
    if not (isinstance(formulation.path, RectifiedFlow) and formulation.target == "velocity"):
        raise UserError(
            f"recipe {recipe.name}: objective {recipe.objective} regresses the velocity of a rectified flow, not "
            f"{recipe.formulation}: give --formulation 'rf/ushape(4)'"
        )
    family = formulation.density.name.partition("(")[0]
    if family not in ("ushape", "uniform") and not recipe.student.any_density:
        raise UserError(
            f"recipe {recipe.name}: {recipe.formulation} draws times as pretraining does, and objective "
            f"{recipe.objective} has its own: give --formulation 'rf/ushape(4)', or --student.any-density to keep it"
        )
    if recipe.validation.every is not None and recipe.validation.protocol != COUPLED:
        raise UserError(
            f"recipe {recipe.name}: objective {recipe.objective} is validated on held-out couplings: give "
            f"--validation.protocol {COUPLED}"
        )
    if recipe.lora.rank is not None:
        raise UserError(f"recipe {recipe.name}: objective {recipe.objective} trains all weights: leave --lora.rank out")


def bind_objective(recipe: Recipe) -> Callable[[Network, DeviceBatch], Losses]:
    """The recipe's objective with its formulation and options bound."""
    objective = get_objective(recipe.objective)
    return partial(objective.compute, formulation=get_formulation(recipe.formulation), **objective.options(recipe))


def count_train_flops(recipe: Recipe) -> int:
    """FLOPs of training on one image (on one pair, where samples are pairs): forward and backward."""
    _, height, width = recipe.data.latent_shape
    shape = height, width, recipe.data.text_tokens
    if recipe.lora.rank is None:
        return estimate_train_flops(recipe.model, *shape)
    objective = get_objective(recipe.objective)
    return estimate_adapter_flops(
        recipe.model, *shape, adapter_parameters=recipe.trained_parameters,
        forward_passes=objective.images_per_sample * (2 if objective.reference else 1),
        backward_passes=objective.images_per_sample,
    )  # fmt: skip
