"""Validation loss of given weights on the val split, the same figure whatever the number of ranks.

Micro-batches have a fixed composition, whole ones go to the ranks in turn, and per-sample losses are summed in sample
order in float64.
"""
# Shapes: B batch, V noise levels.

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

DRAWS = 4  # times and noises of each held-out pair


@dataclass(frozen=True)
class ValidationResult:
    """`per_level` maps noise levels to mean losses; `mean` is what the protocol reports. `by_sample`: what they
    are means of; first the mean's, under the protocol's name, then each level's."""

    protocol: str
    protocol_hash: str
    mean: float
    per_level: dict[float, float]
    sample_count: int
    by_sample: dict[str, Tensor]
    held_out_figures: dict[str, float] = field(default_factory=dict)
    """Mean figures of the objective's own on held-out pairs or couplings; of `held_out_count` samples."""
    held_out_count: int = 0


class Validator:
    """Fixed samples, captions and noise of one recipe."""

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
        """Hash of all that the loss depends on besides the weights: protocol, levels, samples, seed, formulation,
        data."""
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
            for number, mine in take_turns(len(self.batches), group):
                read = self.dataset.read(self.batches[number], seed=v.seed)
                read = read._replace(latent_BCHW=read.latent_BCHW.to(group.device), text=read.text.to(group.device))
                found = compute_validation_losses(engine, read, levels, v.seed, formulation=self.formulation)
                if mine:
                    losses[starts[number] : starts[number + 1]] = found.to(losses)
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
    """The pairs of the val split, with the same times and noise at each call, whatever the number of ranks."""

    def __init__(self, recipe: Recipe, dataset: Dataset) -> None:
        self.recipe, self.dataset, self._partners = recipe, dataset, RejectedLatents(dataset)
        self._batches = dataset.cut_batches(recipe.validation.samples, size=recipe.validation.batch)
        self.count = sum(len(batch) for batch in self._batches)

    def run(self, engine: ZeroEngine, group: Group) -> dict[str, float]:
        """Mean figures of the weights that the engine's forward passes use now. Collective."""
        sums: dict[str, float] = {}
        with engine.inference():
            for number, mine in take_turns(len(self._batches), group):
                for name, value in self._sum_figures(engine, self._batches[number], group.device).items():
                    sums[name] = sums.get(name, 0.0) + value * mine
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
            found = compute(engine, micro.to(device))
            for name, value_P in {f"{recipe.objective}/loss": found.loss_B, **found.figures}.items():
                sums[name] = sums.get(name, 0.0) + value_P.double().sum().item()
        return sums


class HeldOutCouplings:
    """How far a student of few steps arrives from the teacher's latents of the val split, from their own noise."""

    def __init__(self, recipe: Recipe, dataset: Dataset, student: FewStep) -> None:
        self.recipe, self.dataset, self._student = recipe, dataset, student
        self._steps = student.steps or 1
        self._batches = dataset.cut_batches(recipe.validation.samples, size=recipe.validation.batch)
        self.count = sum(len(batch) for batch in self._batches)

    def run(self, engine: ZeroEngine, group: Group) -> dict[str, float]:
        """`<objective>/error`: the mean squared error of the student's latents, in its steps. Collective."""
        total = 0.0
        with engine.inference():
            for number, mine in take_turns(len(self._batches), group):
                batch = self.dataset.read(self._batches[number], seed=self.recipe.validation.seed)
                assert batch.noise_BCHW is not None
                latent_BCHW = solve(
                    engine, batch.noise_BCHW.to(group.device), batch.text.to(group.device), steps=self._steps,
                    shift=self.recipe.shift, formulation=self.recipe.formulation, student=self._student,
                ).latents  # fmt: skip
                error_BCHW = latent_BCHW.double() - batch.latent_BCHW.to(latent_BCHW).double()
                total += error_BCHW.square().flatten(1).mean(1).sum().item() * mine
        [total] = group.sum([total])
        return {f"{self.recipe.objective}/error": total / self.count}


def choose_held_out(recipe: Recipe, dataset: Dataset) -> "HeldOutPairs | HeldOutCouplings | None":
    """What measures figures of the objective's own on the val split; None where it has none."""
    if get_objective(recipe.objective).pairs:
        return HeldOutPairs(recipe, dataset)
    student = FewStep.of(describe_student(recipe, dataset.info))
    whole_steps = student is not None and (student.steps is not None or student.average)
    return HeldOutCouplings(recipe, dataset, student) if student is not None and whole_steps else None


def take_turns(count: int, group: Group) -> Iterator[tuple[int, bool]]:
    """Yields the batch numbers (of `count`) that this rank runs, each with True if the result counts. When fewer
    batches than ranks are left, the other ranks run batch 0 again without counting it: under ZeRO-3 each pass is a
    collective."""
    for first in range(0, count, group.world_size):
        number = first + group.rank
        yield (number, True) if number < count else (0, False)
