"""Validation loss on the val split: the same number for the same weights, whatever the number of ranks.

Three things make it so. Each batch always has the same samples. A batch is computed by one rank; the ranks take turns.
The losses are averaged over the samples in float64, exactly rounded.
"""
# Shapes: B batch, V noise levels, P pairs, C latent channels, H and W latent height and width.

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data_pipeline.loading.collate import DrawSettings
from data_pipeline.loading.loader import Dataset
from data_pipeline.loading.pairs import RejectedLatents
from data_pipeline.packing.pairs import CAPTION
from model.diffusion.few_step import FewStep
from model.diffusion.flow import get_formulation
from model.diffusion.sampler import solve
from model.diffusion.validation import compute_validation_losses, get_protocol
from trainer.exports.card import describe_student
from trainer.feed import draw_noise
from trainer.objective import bind_objective, get_objective
from trainer.recipe import Recipe
from trainer.zero.engine import ZeroEngine
from trainer.zero.group import Group

DRAWS = 4  # draws of time and noise for each held-out pair


@dataclass(frozen=True)
class ValidationResult:
    """`per_level` maps noise levels t to mean losses; `mean` is the number that the protocol reports. `by_sample`: the
    losses (samples) behind those means: first those of `mean`, under the protocol's name, then those of each level."""

    protocol: str
    protocol_hash: str
    mean: float
    per_level: dict[float, float]
    sample_count: int
    by_sample: dict[str, Tensor]
    held_out_figures: dict[str, float] = field(default_factory=dict)
    """Means of figures that only the recipe's objective has, over `held_out_count` held-out pairs or couplings."""
    held_out_count: int = 0


class Validator:
    """Computes the validation loss of one recipe, on the same samples, captions and noise at each call."""

    def __init__(self, recipe: Recipe, dataset: Dataset) -> None:
        self.recipe, self.dataset = recipe, dataset
        self.batches = dataset.cut_batches(recipe.validation.samples, size=recipe.validation.batch)
        self.formulation = get_formulation(recipe.formulation)
        self.protocol = get_protocol(recipe.validation.protocol, self.formulation)
        self.held_out = choose_held_out(recipe, dataset)

    @property
    def sample_count(self) -> int:
        return sum(len(batch) for batch in self.batches)

    @property
    def protocol_hash(self) -> str:
        """Hash (16 hex digits) of all that the loss depends on besides the weights: protocol, levels, samples, seed,
        formulation, data."""
        recipe, fingerprint = self.recipe, self.dataset.fingerprint
        return recipe.validation.hash(
            samples=self.sample_count, formulation=recipe.formulation, fingerprint=fingerprint
        )

    def run(self, engine: ZeroEngine, group: Group) -> ValidationResult:
        """Validation loss of the weights that the engine's forward passes use now. Collective: every rank makes the
        same number of passes."""
        v, levels = self.recipe.validation, self.protocol.levels
        losses = torch.zeros(self.sample_count, len(levels), dtype=torch.float64, device=group.device)
        starts = [0]
        for batch in self.batches:
            starts.append(starts[-1] + len(batch))
        with engine.inference():
            for number, counts in take_turns(len(self.batches), group):
                samples = self.dataset.read(self.batches[number], seed=v.seed)
                samples = samples._replace(
                    latent_BCHW=samples.latent_BCHW.to(group.device), text=samples.text.to(group.device)
                )
                loss_BV = compute_validation_losses(engine, samples, levels, v.seed, formulation=self.formulation)
                if counts:
                    losses[starts[number] : starts[number + 1]] = loss_BV.to(losses)
        # Each row was written by one rank and is zero on the others, so the sum over the ranks is exact.
        losses_BV = group.sum_(losses).cpu()
        return self._summarise(losses_BV, self.held_out.run(engine, group) if self.held_out is not None else {})

    def _summarise(self, losses_BV: Tensor, held_out_figures: dict[str, float]) -> ValidationResult:
        means = [math.fsum(column) / len(losses_BV) for column in losses_BV.T.tolist()]
        averaged = means[: self.protocol.averaged]
        return ValidationResult(
            protocol=self.recipe.validation.protocol,
            protocol_hash=self.protocol_hash,
            mean=math.fsum(averaged) / len(averaged),
            per_level=dict(zip(self.protocol.levels, means)),
            sample_count=self.sample_count,
            by_sample=self.protocol.by_sample(self.recipe.validation.protocol, losses_BV),
            held_out_figures=held_out_figures,
            held_out_count=self.held_out.count if self.held_out is not None else 0,
        )


class HeldOutPairs:
    """Figures of the objective on preference pairs of the val split, with the same times and noise at each call,
    whatever the number of ranks. `count`: pairs."""

    def __init__(self, recipe: Recipe, dataset: Dataset) -> None:
        self.recipe, self.dataset, self._partners = recipe, dataset, RejectedLatents(dataset)
        self._batches = dataset.cut_batches(recipe.validation.samples, size=recipe.validation.batch)
        self.count = sum(len(batch) for batch in self._batches)

    def run(self, engine: ZeroEngine, group: Group) -> dict[str, float]:
        """Mean figures, by name, of the weights that the engine's forward passes use now. Collective."""
        sums: dict[str, float] = {}
        with engine.inference():
            for number, counts in take_turns(len(self._batches), group):
                for name, value in self._sum_figures(engine, self._batches[number], group.device).items():
                    sums[name] = sums.get(name, 0.0) + value * counts
        totals = group.sum(list(sums.values()))  # the same names on all ranks
        return {name: total / (self.count * DRAWS) for name, total in zip(sums, totals)}

    def _sum_figures(self, engine: ZeroEngine, numbers: range, device: torch.device) -> dict[str, float]:
        """Sums of the figures over the pairs of one batch and all DRAWS of times and noise."""
        recipe, seed = self.recipe, self.recipe.validation.seed
        batch = self.dataset.read(numbers, seed=seed)
        pairs = batch._replace(rejected_BCHW=self._partners(batch, DrawSettings(seed, {CAPTION: 1.0}, 0.0)))
        formulation, compute = get_formulation(recipe.formulation), bind_objective(recipe)
        sums: dict[str, float] = {}
        for number in range(DRAWS):
            micro = draw_noise(pairs, formulation, seed=seed + number, shift=recipe.shift)
            losses = compute(engine, micro.to(device))
            for name, value_P in {f"{recipe.objective}/loss": losses.loss_B, **losses.figures}.items():
                sums[name] = sums.get(name, 0.0) + value_P.double().sum().item()
        return sums


class HeldOutCouplings:
    """The distance between a student's latents and its teacher's, on couplings of the val split: both start from the
    same noise, and the student takes its own few steps. `count`: couplings."""

    def __init__(self, recipe: Recipe, dataset: Dataset, student: FewStep) -> None:
        self.recipe, self.dataset, self._student = recipe, dataset, student
        self._steps = student.default_steps or 1
        self._batches = dataset.cut_batches(recipe.validation.samples, size=recipe.validation.batch)
        self.count = sum(len(batch) for batch in self._batches)

    def run(self, engine: ZeroEngine, group: Group) -> dict[str, float]:
        """`<objective>/error`: the mean squared error of the student's latents against the teacher's, over samples and
        elements. Collective."""
        total = 0.0
        with engine.inference():
            for number, counts in take_turns(len(self._batches), group):
                batch = self.dataset.read(self._batches[number], seed=self.recipe.validation.seed)
                assert batch.noise_BCHW is not None
                latent_BCHW = solve(
                    engine, batch.noise_BCHW.to(group.device), batch.text.to(group.device), steps=self._steps,
                    shift=self.recipe.shift, formulation=self.recipe.formulation, student=self._student,
                ).latents  # fmt: skip
                error_BCHW = latent_BCHW.double() - batch.latent_BCHW.to(latent_BCHW).double()
                total += error_BCHW.square().flatten(1).mean(1).sum().item() * counts
        [total] = group.sum([total])
        return {f"{self.recipe.objective}/error": total / self.count}


def choose_held_out(recipe: Recipe, dataset: Dataset) -> "HeldOutPairs | HeldOutCouplings | None":
    """What measures the figures that only this objective has: pairs for a preference objective, couplings for a student
    of whole steps; None for others."""
    if get_objective(recipe.objective).pairs:
        return HeldOutPairs(recipe, dataset)
    student = FewStep.of(describe_student(recipe, dataset.info)) if dataset.info.couplings is not None else None
    if student is None or student.default_steps is None:
        return None
    return HeldOutCouplings(recipe, dataset, student)


def take_turns(count: int, group: Group) -> Iterator[tuple[int, bool]]:
    """Yield the batch numbers (of `count`) that this rank runs, each with True if its result counts.

    Under ZeRO-3 each forward pass is a collective. So when fewer batches than ranks are left, the other ranks run batch
    0 again, and its result does not count.
    """
    for first in range(0, count, group.world_size):
        number = first + group.rank
        yield (number, True) if number < count else (0, False)
