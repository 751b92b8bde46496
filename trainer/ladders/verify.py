"""`verify-resume`: the promises about resuming, proved on the user's own recipe, data and machine.

Short runs of the same recipe, each by the command a person would type: straight through; continued from the middle on
as many ranks; on other ranks, and from there on as many as at first; and, where the precision is bf16, with images of
each batch exchanged between the ranks, which shows how far rounding alone lets two runs drift.
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.selection.choice import DataChoice
from infra.device import resolve_precision
from infra.errors import UserError
from infra.log import get_logger
from model.files.weights import load_weights
from trainer.ladders.ladder import build_train_command, run_command
from trainer.recipe import Recipe
from trainer.state import DEAL_LANES

log = get_logger("verify")
CLOSE = 1e-5  # relative difference of two losses that differ by the order of fp32 sums
CLOSE_WEIGHTS = 1e-3  # Adam divides by the root of a moment: where a gradient is all rounding, so is the step
TWICE = 2.0  # the two drifts are one draw each of the same rounding errors


@dataclass(frozen=True)
class CheckedPromise:
    """One line of the answer."""

    promise: str
    kept: bool
    found: str


def verify_resume(
    recipe: Recipe,
    arguments: Sequence[str],
    *,
    data: DataChoice,
    out: Path,
    steps: int,
    ranks: int,
    other_ranks: int,
) -> list[CheckedPromise]:
    """Run and compare; `arguments` made the recipe, or name weights to begin with: each run gets them."""
    if steps < 4 or steps % 4:
        raise UserError(f"--steps {steps}: expected a multiple of 4: runs resume after half and three quarters of them")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: give a new folder; it can be removed afterwards")
    batch, half = recipe.global_batch, steps // 2
    precision = resolve_precision(recipe.precision, "auto")
    cadence = [
        "--precision", precision, "--images", str(batch * steps), "--logging.log-every", str(batch),
        "--logging.save-every", str(batch * (half // 2)), "--logging.keep", "4", "--logging.samples", "0",
    ]  # fmt: skip
    if recipe.validation.every is not None:
        cadence += ["--validation.every", str(batch * steps)]

    def run(name: str, num_ranks: int, *, deal_lanes: bool = False) -> Path:
        words = [*arguments, *cadence]
        command = build_train_command(recipe.name, words, data=data, run=str(out / name), ranks=num_ranks)
        log.info("%s: %d rank(s)", name, num_ranks)
        run_command(command, str(out / name), environment={DEAL_LANES: "1"} if deal_lanes else {})
        return out / name

    straight = run("straight", ranks)
    cut_back(straight, out / "resumed", step=half)
    resumed = run("resumed", ranks)
    verdicts = [*compare_bits(straight, resumed, f"{ranks} -> {ranks} ranks")]
    if other_ranks != ranks:
        cut_back(straight, out / "other", step=half)
        cut_back(run("other", other_ranks), out / "back", step=half + half // 2)
        back, what = run("back", ranks), f"{ranks} -> {other_ranks} -> {ranks} ranks, {precision}"
        if precision == "fp32":
            verdicts += compare_closely(straight, back, what)
        else:
            cut_back(straight, out / "exchanged", step=half)
            exchanged = run("exchanged", ranks, deal_lanes=True) if ranks > 1 else None
            verdicts += compare_drift(straight, back, exchanged, what, first=half + 1)
    return verdicts


def cut_back(run: Path, copy: Path, *, step: int) -> None:
    """A copy of a run as a kill right after the checkpoint of `step` would have left it."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("tensorboard"))
    for folder in (copy / "checkpoints").glob("step_*"):
        if int(folder.name.removeprefix("step_")) != step:
            shutil.rmtree(folder)
    for name in ("ema", "raw"):
        (copy / "weights" / f"{name}.safetensors").unlink()


def read_losses(run: Path) -> dict[int, float]:
    """Images seen -> training loss of each step."""
    lines = [json.loads(line) for line in (run / "logs" / "train.jsonl").read_text().splitlines()]
    return {line["images_seen"]: line["loss"] for line in lines if line["kind"] == "train"}


def compare_bits(one: Path, two: Path, what: str) -> list[CheckedPromise]:
    """Losses and weights bit by bit."""
    a, b = read_losses(one), read_losses(two)
    differing = [images for images in a.keys() | b.keys() if a.get(images) != b.get(images)]
    where = f"{len(a)} steps, first difference at {min(differing):,} images" if differing else f"{len(a)} steps, equal"
    found = [CheckedPromise(f"{what}: losses bit-equal", not differing, where)]
    for kind in ("raw", "ema"):
        pair = [load_weights(run / "weights" / f"{kind}.safetensors")[0] for run in (one, two)]
        wrong = [name for name in pair[0] if not torch.equal(pair[0][name], pair[1][name])]
        count = f"{len(pair[0])} tensors"
        figures = f"{len(wrong)} of {count} differ ({wrong[0]} ...)" if wrong else count
        found.append(CheckedPromise(f"{what}: {kind} weights bit-equal", not wrong, figures))
    return found


def measure_loss_gaps(one: Path, two: Path) -> dict[int, float]:
    """Relative difference of the losses at each step."""
    a, b = read_losses(one), read_losses(two)
    if a.keys() != b.keys():
        raise UserError(f"{two} logged other steps than {one}: was it run with the same options?")
    return {images: abs(b[images] - a[images]) / max(abs(a[images]), 1e-12) for images in a}


def measure_weight_distance(one: Path, two: Path) -> float:
    """How far the EMA weights of two runs are apart, over their own size (Euclidean norms)."""
    a, b = (load_weights(run / "weights" / "ema.safetensors")[0] for run in (one, two))
    pairs = [(a[name].double(), b[name].double()) for name in a]
    between, size = sum(float((x - y).square().sum()) for x, y in pairs), sum(float(x.square().sum()) for x, _ in pairs)
    return math.sqrt(between / max(size, 1e-300))


def compare_closely(one: Path, two: Path, what: str) -> list[CheckedPromise]:
    """Promises for two runs that may differ only by the order in which floats are added."""
    largest, weights = max(measure_loss_gaps(one, two).values()), measure_weight_distance(one, two)
    close = weights <= CLOSE_WEIGHTS
    return [
        CheckedPromise(
            f"{what}: losses within {CLOSE:g}", largest <= CLOSE, f"largest relative difference {largest:.2g}"
        ),
        CheckedPromise(f"{what}: ema weights within {CLOSE_WEIGHTS:g}", close, f"{weights:.2g} of their size"),
    ]


def compare_drift(one: Path, two: Path, exchanged: Path | None, what: str, *, first: int) -> list[CheckedPromise]:
    """bf16: the first step after the resume agrees; then rounding alone may part the runs."""
    found = measure_loss_gaps(one, two)
    after = list(found.values())[first - 1 :]
    verdicts = [CheckedPromise(f"{what}: first step within {CLOSE:g}", after[0] <= CLOSE, f"{after[0]:.2g}")]
    if exchanged is not None:
        allowed = max(list(measure_loss_gaps(one, exchanged).values())[first - 1 :])
        figures = f"{max(after):.2g}, rounding alone {allowed:.2g}"
        kept = max(after) <= max(TWICE * allowed, CLOSE)
        verdicts.append(CheckedPromise(f"{what}: drift at most twice that of rounding", kept, figures))
        weights, allowed = measure_weight_distance(one, two), measure_weight_distance(one, exchanged)
        kept = weights <= max(TWICE * allowed, CLOSE_WEIGHTS)
        figures = f"{weights:.2g} of their size, rounding alone {allowed:.2g}"
        verdicts.append(CheckedPromise(f"{what}: ema weights no further than that either", kept, figures))
    return verdicts


def describe(verdicts: Sequence[CheckedPromise]) -> str:
    """One line of text for each promise."""
    return "\n".join(f"{'kept  ' if v.kept else 'BROKEN'}  {v.promise}: {v.found}" for v in verdicts)
