"""Objectives: functions that turn a micro-batch into one loss per sample.

To add one, write a function `(network, batch, *, formulation, **options) -> Losses` and a line in OBJECTIVES. A recipe
selects it by name (`--objective NAME`). Loop, engine, validation and planner look it up in OBJECTIVES.
"""
# Shapes: B batch, P pairs, C latent channels, H and W latent height and width.

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.checkpoints import require_checkpoints
from infra.errors import UserError, nearest
from model.diffusion.flow import Formulation, get_formulation
from model.diffusion.grids import make_sampling_grid
from model.diffusion.paths import RectifiedFlow
from model.diffusion.validation import COUPLED
from model.encoders.text import TextCond
from model.flops import estimate_adapter_flops, estimate_train_flops
from model.perceptual import PERCEPTUAL
from trainer.feed import DeviceBatch
from trainer.network import Losses, Network
from trainer.recipe import Recipe
from trainer.students import StudentLoss, distil, meanflow, perflow, reflow


class Passes(NamedTuple):
    """Passes of the network for each sample of a step."""

    forward: int = 1
    backward: int = 1
    doubled: int = 0
    """Of the forward passes, those that go through the network together with another one (guidance)."""


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
    """It learns from couplings: a sample is a latent and the noise that a teacher made it of."""
    asks_teacher: bool = False
    """It learns from the frozen weights that the run started from, on ordinary data. Where `couplings` is True as well,
    --student.guidance chooses this."""
    passes: Callable[[Recipe], Passes] = lambda recipe: Passes()
    """For each sample."""
    second_time: bool = False
    """The network takes a second time and predicts average velocities (MeanFlow)."""
    formulation: str = "rf/ushape(4)"
    """Of a student: the formulation whose density of times it is made for."""
    few_step: Callable[[Recipe], Mapping[str, Any]] = lambda recipe: {}
    """What the weights say under `few_step` for this objective alone (model/diffusion/few_step.py)."""
    reference: bool = False
    """True if each forward pass is repeated with the reference (the weights without adapters): the run needs
    adapters."""
    higher_is_better: frozenset[str] = frozenset()
    """Names of those `figures` for which higher is better."""

    @property
    def images_per_sample(self) -> int:
        return 2 if self.pairs else 1

    @property
    def student(self) -> bool:
        """It learns from a teacher, and the function takes a `StudentLoss` as `loss`."""
        return self.couplings or self.asks_teacher


def pretrain(network: Network, batch: DeviceBatch, *, formulation: Formulation) -> Losses:
    """The formulation's own loss at random times (SD3, section 2)."""
    sample = formulation.sample(batch.x0_BCHW, batch.noise_BCHW, batch.t_B)
    prediction_BCHW = network(sample.model_input, sample.network_time_B, batch.text)
    return Losses(formulation.compute_loss_B(prediction_BCHW, sample))


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


def _count_rollout(recipe: Recipe) -> Passes:
    """Where a student rolls out: a pass for each step but the last one, then each step again with its gradient."""
    steps = recipe.student.steps if recipe.student.states == "rollout" else 1
    return Passes(2 * steps - 1, steps)


def _count_teacher(recipe: Recipe, own: int, steps: int) -> Passes:
    """`own` forward passes of the student, and those of a teacher that takes `steps` steps: none on couplings, two a
    step where it is guided."""
    guidance = recipe.student.guidance
    if guidance is None:
        return Passes(forward=own)
    doubled = 0 if guidance == 1 else steps
    return Passes(forward=own + steps + doubled, doubled=doubled)


def _describe_grid(recipe: Recipe) -> dict[str, Any]:
    steps = recipe.student.steps
    grid = make_sampling_grid(get_formulation(recipe.formulation), steps, shift=recipe.shift)
    return {"steps": steps, "sigmas": grid.tolist()}


OBJECTIVES: dict[str, Objective] = {
    "pretrain": Objective(pretrain),
    "dpo": Objective(
        prefer, options=lambda recipe: {"beta": recipe.dpo.beta}, pairs=True, reference=True,
        higher_is_better=frozenset({"dpo/accuracy", "dpo/reward_margin"}),
    ),
    "reflow": Objective(reflow, couplings=True),
    "distil": Objective(
        distil, couplings=True, passes=_count_rollout, formulation="rf",
        few_step=lambda recipe: _describe_grid(recipe) | {"states": recipe.student.states},
        options=lambda recipe: {
            "steps": recipe.student.steps, "states": recipe.student.states, "shift": recipe.shift
        },
    ),
    "meanflow": Objective(
        meanflow, couplings=True, asks_teacher=True, second_time=True, few_step=lambda recipe: {"average": True},
        passes=lambda recipe: _count_teacher(recipe, 3, 1),
        options=lambda recipe: {"difference": recipe.student.difference, "guidance": recipe.student.guidance},
    ),
    "perflow": Objective(
        perflow, asks_teacher=True, formulation="rf", few_step=_describe_grid,
        passes=lambda recipe: _count_teacher(recipe, 1, recipe.student.teacher_steps),
        options=lambda recipe: {
            "windows": recipe.student.steps, "shift": recipe.shift, "guidance": recipe.student.guidance,
            "teacher_steps": recipe.student.teacher_steps,
        },
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
    if recipe.model.second_time != objective.second_time:
        raise UserError(
            f"recipe {recipe.name}: objective meanflow and a network with a second time belong together: "
            + ("give --objective meanflow" if recipe.model.second_time else "give --model.second-time")
        )
    check_teacher(recipe)
    if objective.student:
        check_student(recipe)
    if objective.reference and recipe.lora.rank is None:
        raise UserError(
            f"recipe {recipe.name}: objective {recipe.objective} takes the model without its adapters as reference: "
            "give --lora.rank, 128 in the paper"
        )


def reads_couplings(recipe: Recipe) -> bool:
    """Is a sample of the run a coupling?"""
    return get_objective(recipe.objective).couplings and recipe.student.guidance is None


def asks_teacher(recipe: Recipe) -> bool:
    """Are the weights that the run starts from asked in training, as a frozen teacher?"""
    return get_objective(recipe.objective).asks_teacher and recipe.student.guidance is not None


def check_teacher(recipe: Recipe) -> None:
    """Refuse an objective without what it learns from: couplings, or a guidance of the teacher that it asks."""
    objective, guidance = get_objective(recipe.objective), recipe.student.guidance
    start = f"recipe {recipe.name}: objective {recipe.objective}"
    if guidance is None and objective.asks_teacher and not objective.couplings:
        raise UserError(f"{start} asks a frozen teacher: give --student.guidance, 1 for none")
    if guidance is not None and not objective.asks_teacher:
        raise UserError(f"{start} asks no teacher in training: leave --student.guidance out")
    if guidance is not None and not math.isfinite(guidance):
        raise UserError(f"--student.guidance {guidance}: expected a finite number")


def check_student(recipe: Recipe) -> None:
    """A student regresses velocities of straight lines. On couplings its density of times is its own: the loss of
    reflow is highest at both ends, where the densities of pretraining are thin (2-rectified flow++)."""
    formulation, advised = get_formulation(recipe.formulation), get_objective(recipe.objective).formulation
    if not (isinstance(formulation.path, RectifiedFlow) and formulation.target == "velocity"):
        raise UserError(
            f"recipe {recipe.name}: objective {recipe.objective} regresses the velocity of a rectified flow, not "
            f"{recipe.formulation}: give --formulation '{advised}'"
        )
    if recipe.student.perceptual is not None:
        check_perceptual(recipe)
    family = formulation.density.name.partition("(")[0]
    coupled, protocol = reads_couplings(recipe), recipe.validation.protocol
    if coupled and family not in ("ushape", "uniform") and not recipe.student.any_density:
        raise UserError(
            f"recipe {recipe.name}: {recipe.formulation} draws times as pretraining does, and objective "
            f"{recipe.objective} has its own: give --formulation '{advised}', or --student.any-density to keep it"
        )
    if recipe.validation.every is not None and coupled != (protocol == COUPLED):
        where = f"held-out couplings: give --validation.protocol {COUPLED}" if coupled else (
            "ordinary held-out data: give another --validation.protocol"
        )  # fmt: skip
        raise UserError(f"recipe {recipe.name}: objective {recipe.objective} is validated on {where}")
    if recipe.lora.rank is not None:
        raise UserError(f"recipe {recipe.name}: objective {recipe.objective} trains all weights: leave --lora.rank out")


def check_perceptual(recipe: Recipe) -> None:
    """Refuse a perceptual loss that is not there, or that the objective has no picture for."""
    name = recipe.objective
    if get_objective(name).asks_teacher:
        raise UserError(f"recipe {recipe.name}: objective {name} has no perceptual loss: omit --student.perceptual")
    kind, _, path = str(recipe.student.perceptual).partition(":")
    if kind not in PERCEPTUAL or not path:
        raise UserError(
            f"--student.perceptual {recipe.student.perceptual}: expected KIND:PATH with KIND {', '.join(PERCEPTUAL)}"
        )
    require_checkpoints([path])


def count_network_passes(recipe: Recipe) -> Passes:
    """Passes of the network for each sample of a step."""
    return get_objective(recipe.objective).passes(recipe)


def bind_objective(
    recipe: Recipe, *, perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Callable[[Network, DeviceBatch], Losses]:
    """The recipe's objective with its formulation and options bound. `perceptual`: distance of latents as pictures, for
    students."""
    objective, student = get_objective(recipe.objective), recipe.student
    options = dict(objective.options(recipe))
    if objective.student:
        options["loss"] = StudentLoss(
            student.loss, student.huber, student.latent_weight, student.perceptual_weight, perceptual
        )
    return partial(objective.compute, formulation=get_formulation(recipe.formulation), **options)


def count_train_flops(recipe: Recipe) -> int:
    """FLOPs of training on one image (on one pair, where samples are pairs): forward and backward. A frozen decoder and
    what looks at its pictures are not counted."""
    _, height, width = recipe.data.latent_shape
    shape = height, width, recipe.data.text_tokens
    objective = get_objective(recipe.objective)
    passes = count_network_passes(recipe)
    if recipe.lora.rank is None:
        further = (passes.forward - passes.backward) * recipe.model.count_forward_flops(*shape)
        return passes.backward * estimate_train_flops(recipe.model, *shape) + further
    return estimate_adapter_flops(
        recipe.model, *shape, adapter_parameters=recipe.trained_parameters,
        forward_passes=objective.images_per_sample * (2 if objective.reference else 1),
        backward_passes=objective.images_per_sample,
    )  # fmt: skip
