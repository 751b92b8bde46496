"""Sweeps: learning rates on some rungs of a ladder, and any of the 61 formulations. What is trained is skipped."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from infra import storage
from infra.errors import UserError, nearest
from model.diffusion.flow import FORMULATIONS, STUDY
from trainer.ladders.ladder import TrainingTask, make_rungs, train_missing
from trainer.ladders.launch import ManyRuns
from trainer.ladders.picture import draw_loss_curves
from trainer.overrides import override_recipe, refuse_decided
from trainer.recipe import Recipe
from trainer.recipes import get_recipe
from trainer.runfolder import read_last_val_loss

SAFE = {"/": "-", "(": "_", ")": "", ",": "_"}  # a formulation's name as a folder's


@dataclass(frozen=True)
class RateResult:
    """One run of a sweep: its learning rate and the EMA validation loss at its end (nan: diverged)."""

    depth: int
    width: int
    rate: float
    loss: float


def sweep_rates(family: str, depths: Sequence[int], rates: Sequence[float], launch: ManyRuns) -> str:
    """Train every depth at every rate; write OUT/sweep.json and OUT/sweep.png; the table and the law as text."""
    refuse_decided(launch.overrides, {"optimizer.lr": "--rates"})
    if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise UserError(f"--rates {' '.join(map(str, rates))}: expected some positive learning rates")
    launch.data.open()  # refused here, in one line, rather than by the first run's ranks
    tasks, places = [], []
    for recipe in make_rungs(family, depths, launch):
        for rate in sorted(set(rates)):
            run = storage.join(launch.out, f"{recipe.name}-lr{rate:g}")
            words = (*launch.overrides, "--optimizer.lr", repr(rate))
            tasks.append(TrainingTask(recipe, run, recipe.images, words))
            places.append((recipe, rate, run))
    train_missing(tasks, launch, unstable_is_a_result=True)
    points = [RateResult(r.model.depth, r.model.width, rate, read_final_loss(run, r)) for r, rate, run in places]
    law = fit_transfer_law(points)
    record = {"points": [vars(point) for point in points], "law": law}
    storage.write_bytes(storage.join(launch.out, "sweep.json"), json.dumps(record, indent=1).encode())
    storage.write_bytes(storage.join(launch.out, "sweep.png"), draw_curves(points))
    return format_table(points, law)


def sweep_formulations(name: str, formulations: Sequence[str], launch: ManyRuns) -> list[str]:
    """Train a recipe once per formulation into OUT/<recipe>-<formulation>; the run folders. No name: all 61."""
    refuse_decided(launch.overrides, {"formulation": "--formulations"})
    recipe = override_recipe(get_recipe(name), launch.overrides)
    chosen = list(formulations or STUDY)
    for one in chosen:
        if one not in FORMULATIONS:
            raise UserError(
                f"unknown formulation {one!r}{nearest(one, FORMULATIONS)}; all: python -m model formulations"
            )
    launch.data.open()
    tasks = [
        TrainingTask(
            recipe, storage.join(launch.out, f"{name}-{name_folder(one)}"), recipe.images,
            (*launch.overrides, "--formulation", one),
        )
        for one in chosen
    ]  # fmt: skip
    return train_missing(tasks, launch, unstable_is_a_result=True)


def name_folder(formulation: str) -> str:
    for found, instead in SAFE.items():
        formulation = formulation.replace(found, instead)
    return formulation


def read_final_loss(run: str, recipe: Recipe) -> float:
    """EMA validation loss at the end of a run; nan when it has none."""
    row = read_last_val_loss(run, recipe)
    return math.nan if row is None else row.value


def fit_best_rate(points: Sequence[RateResult]) -> float | None:
    """Minimum of a parabola in log(rate) through the best point and its neighbours; None at the edge of the sweep."""
    finite = sorted((p for p in points if math.isfinite(p.loss)), key=lambda p: p.rate)
    if len(finite) < 3:
        return None
    at = min(range(len(finite)), key=lambda i: finite[i].loss)
    if at in (0, len(finite) - 1):
        return None
    x = [math.log(p.rate) for p in finite[at - 1 : at + 2]]
    y = [p.loss for p in finite[at - 1 : at + 2]]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    curvature = (right - left) / (x[2] - x[0])
    return math.exp((x[0] + x[1]) / 2 - left / (2 * curvature))


def fit_transfer_law(points: Sequence[RateResult]) -> dict[str, Any]:
    """rate = scale * width^exponent through the best rates of the rungs. muP's hidden layers want -1; the recipes take
    -1/2. With two rungs the line is exact; with more it is least squares."""
    best = {p.width: fit_best_rate([q for q in points if q.width == p.width]) for p in points}
    known = {width: rate for width, rate in best.items() if rate is not None}
    law: dict[str, Any] = {"best": best, "exponent": None, "scale": None}
    if len(known) >= 2:
        x, y = [math.log(w) for w in known], [math.log(r) for r in known.values()]
        mx, my = math.fsum(x) / len(x), math.fsum(y) / len(y)
        slope = sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)
        law |= {"exponent": slope, "scale": math.exp(my - slope * mx)}
    return law


def format_table(points: Sequence[RateResult], law: dict[str, Any]) -> str:
    """The sweep as people read it."""
    lines = ["depth      rate  validation loss"]
    lines += [f"{p.depth:5}  {p.rate:8.2g}  {p.loss:.5f}" for p in points]
    for width, rate in law["best"].items():
        found = f"{rate:.3g}" if rate else "at the edge of the sweep, or too few runs: add rates"
        lines.append(f"best rate at width {width}: {found}")
    if law["exponent"] is not None:
        lines.append(f"rate = {law['scale']:.3g} * width^{law['exponent']:.2f} (recipes: -0.50, muP: -1.00)")
    return "\n".join(lines)


def draw_curves(points: Sequence[RateResult]) -> bytes:
    """Loss against rate, a line per depth, as PNG."""
    depths = sorted({p.depth for p in points})
    lines = {f"depth {depth}": sorted((p.rate, p.loss) for p in points if p.depth == depth) for depth in depths}
    return draw_loss_curves(lines, xlabel="learning rate")
