"""The commands of `python -m trainer`: their options, and what each calls."""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import tyro

from data_pipeline.selection.choice import DataChoice
from infra.cli import FLAT, parse, take_name
from infra.errors import UserError
from trainer.checks.values import check_values
from trainer.ladders.launch import ManyRuns
from trainer.overrides import drop_options, expand_exponents, list_option_names
from trainer.recipe import Recipe
from trainer.recipes import FAMILIES, RECIPES, get_family, get_recipe

SHOWN_DEPTH = 2  # of the rung whose fields --help shows


@dataclass(frozen=True)
class TrainArgs:
    """Train a recipe. Every field of the recipe can be overridden."""

    data: Annotated[DataChoice, FLAT]
    out: str
    """Run folder (or s3://): checkpoints, weights, results, logs."""
    recipe: Annotated[Recipe, FLAT]
    resume: str = "latest"
    """latest: continue if there is a checkpoint; none: refuse if there is one; or the folder of a checkpoint."""
    init_from: str | None = None
    """Start from these exported weights (Adam and EMA start anew)."""
    dry_run: bool = False
    """Check data, shapes and divisibility, print the plan, write nothing."""


@dataclass(frozen=True)
class LadderArgs(ManyRuns):
    """Train the rungs of a ladder that are missing, smallest first; finished rungs are skipped, others continue."""

    recipe: Annotated[Recipe, FLAT] = field(kw_only=True)
    depths: tuple[int, ...] = (2, 3, 4)
    """Depths of the rungs."""
    budgets: tuple[float, ...] = ()
    """Budgets of training FLOPs (1e13 3e13 ...): each depth is trained for each, from one run at constant rate."""


@dataclass(frozen=True)
class RateSweepArgs(ManyRuns):
    """Train the rungs of a ladder at several learning rates; what is trained is skipped."""

    recipe: Annotated[Recipe, FLAT] = field(kw_only=True)
    depths: tuple[int, ...] = (2, 3)
    """Rungs."""
    rates: tuple[float, ...] = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
    """Learning rates."""


@dataclass(frozen=True)
class FormulationSweepArgs(ManyRuns):
    """Train a recipe once per formulation; what is trained is skipped."""

    recipe: Annotated[Recipe, FLAT] = field(kw_only=True)
    formulations: tuple[str, ...] = ()
    """Names as `python -m model formulations` lists them; none: all 61."""


@dataclass(frozen=True)
class PlanArgs:
    """What a recipe needs: parameters, FLOPs, bytes per rank by ZeRO stage, seconds, hours, dollars, storage."""

    recipe: Annotated[Recipe, FLAT]
    gpus: int = 1
    """Number of ranks to plan for."""
    gpu: str | None = None
    """Kind of device (a wrong name lists them); default: this machine's."""
    efficiency: float | None = None
    """Share of the peak FLOP/s that a step reaches; default: 0.4 on GPUs."""
    calibrate: str | None = None
    """A small finished run (folder) to learn from. On a device of its kind both recipes are timed as by --trial, and
    what the run took beyond its own trial is added; elsewhere its overall speed counts."""
    trial: bool = False
    """Time real steps of shallow models of the recipe's width, on devices here of the planned kind."""
    dollars_per_gpu_hour: float | None = None
    """Price of one device; default: a guess of ours for each kind."""
    dataset_images: int | None = None
    """Distinct images in the data set: decides whether encoding them once pays off."""
    decoder: str | None = None
    """Of a recipe with a perceptual loss: the autoencoder of its latents (folder, or world:vae)."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class GradeArgs:
    """The plan of a finished run against what it took: parameters, bytes, storage, seconds, each with its goal."""

    run: tyro.conf.Positional[str]
    """Run folder."""
    calibrate: str | None = None
    """A small finished run: the steps are planned anew by what it measured."""
    json: bool = False
    """Print JSON: (planned, measured) by name, and which missed their goal."""


@dataclass(frozen=True)
class VerifyArgs:
    """Prove on this recipe, data and machine that resuming continues the same run, on as many and on other ranks."""

    data: Annotated[DataChoice, FLAT]
    out: str
    """A new folder for the short runs; it can be removed afterwards."""
    recipe: Annotated[Recipe, FLAT]
    steps: int = 40
    """Steps of each run, a multiple of 4; it is resumed after half and after three quarters of them."""
    num_ranks: int = 2
    """Processes."""
    other_ranks: int = 1
    """Processes that the run is continued on."""
    init_from: str | None = None
    """Exported weights that every run starts from: a second stage's, or those that DPO's adapters stand on."""


@dataclass(frozen=True)
class ExportArgs:
    """Write weights from a checkpoint (no DeepSpeed, one process, one tensor in memory at a time)."""

    run: tyro.conf.Positional[str]
    """Run folder."""
    data: str
    """The dataset it was trained on: its text and VAE settings go into the file."""
    out: str
    """File (or, as diffusers, folder) to write, s3:// too."""
    lora: Literal["merged", "adapter"] = "merged"
    """A run that trained adapters: merged into --base, or the adapter alone as a folder in peft's layout (--format
    diffusers: for its load_lora_weights)."""
    base: str | None = None
    """The weights that a run with adapters started from (its --init-from)."""
    format: Literal["beeline", "sd3", "diffusers"] = "beeline"
    """beeline: our safetensors file; sd3: a single file with SD3's names; diffusers: a pipeline folder with model
    card."""
    kind: Literal["ema", "raw"] = "ema"
    """The averaged weights or those that the optimizer holds."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16 halves the file and rounds each weight to 8 significant bits."""
    profile: str | None = None
    """EMA profile; default: the recipe's first."""
    step: int | None = None
    """Step of the checkpoint; default: the newest."""


@dataclass(frozen=True)
class PosthocArgs:
    """Write the average of another width out of the averages that a run stored (EDM2's post-hoc EMA)."""

    run: tyro.conf.Positional[str]
    """Run folder: its exported EMA weights and the profiles in its checkpoints are the material."""
    std: float
    """Relative width of the average, as in power:WIDTH."""
    images: int | None = None
    """The average over the first so many images; default: all that were seen at the last export."""
    out: str | None = None
    """File to write; default: RUN/weights/posthoc_STD.safetensors."""
    dtype: Literal["fp32", "bf16"] = "fp32"


def train(words: list[str]) -> None:
    recipe, rest = _get_named_recipe(words, "train")
    args = parse_options(TrainArgs, rest, "train " + recipe.name, recipe=recipe)
    from trainer.train import train as train_recipe

    train_recipe(
        args.recipe, data=args.data, out=args.out, resume=args.resume, init_from=args.init_from, dry_run=args.dry_run
    )


def ladder(words: list[str]) -> None:
    family, rest = take_name(words, list(FAMILIES), prog="python -m trainer ladder", what="ladder")
    args = _parse_many(LadderArgs, rest, f"ladder {family}", get_family(family)(SHOWN_DEPTH))
    _require_positive(args, "depths", "budgets")
    from trainer.ladders.ladder import train_isoflop, train_ladder

    if args.budgets:
        from trainer.ladders.isoflop import write_summary

        print(write_summary(train_isoflop(family, args.depths, args.budgets, args), out=args.out), end="")
        return
    train_ladder(family, args.depths, args)


def sweep_rates(words: list[str]) -> None:
    family, rest = take_name(words, list(FAMILIES), prog="python -m trainer sweep lr", what="ladder")
    args = _parse_many(RateSweepArgs, rest, f"sweep lr {family}", get_family(family)(SHOWN_DEPTH))
    _require_positive(args, "depths")
    from trainer.ladders.sweep import sweep_rates as sweep

    print(sweep(family, args.depths, args.rates, args))


def sweep_formulations(words: list[str]) -> None:
    recipe, rest = _get_named_recipe(words, "sweep formulations")
    args = _parse_many(FormulationSweepArgs, rest, f"sweep formulations {recipe.name}", recipe)
    from trainer.ladders.sweep import sweep_formulations as sweep

    sweep(recipe.name, args.formulations, args)


def _parse_many(kind: type, words: list[str], prog: str, recipe: Recipe) -> Any:
    """Options of a command that trains many runs; what overrides the recipe stays as words, one for each rung."""
    args = parse_options(kind, words, prog, recipe=recipe)
    _require_positive(args, "num_ranks")
    _require_not_negative(args, "workers")
    check_values(args.recipe)
    return replace(args, overrides=tuple(drop_options(words, list_option_names(kind))))


def plan(words: list[str]) -> None:
    import json

    from infra.codec import to_json
    from trainer.planning.hardware_plan import make_hardware_plan

    recipe, rest = _get_named_recipe(words, "plan")
    args = parse_options(PlanArgs, rest, "plan " + recipe.name, recipe=recipe)
    _check_plan(args)
    from trainer.machines import detect_machine, get_machine
    from trainer.planning.reality import calibrate, run_trial

    more: dict[str, Any] = {"dollars_per_hour": args.dollars_per_gpu_hour, "dataset_images": args.dataset_images}
    if args.decoder is not None:
        from trainer.planning.frozen import count_frozen_of

        more["perceptual"] = count_frozen_of(args.recipe, args.decoder)
    calibration = calibrate(args.calibrate) if args.calibrate else None
    machine = get_machine(args.gpu) if args.gpu else detect_machine(args.recipe.precision)
    if calibration is not None:
        if args.trial or args.efficiency is not None or (args.gpu and machine != calibration.machine):
            raise UserError(
                f"--calibrate plans for {calibration.machine.name} by what {args.calibrate} measured: omit --trial, "
                "--efficiency and any other --gpu"
            )
        plan = calibration.plan(args.recipe, world_size=args.gpus, **more)
    else:
        given = run_trial(args.recipe, machine, world_size=args.gpus) if args.trial else {"efficiency": args.efficiency}
        plan = make_hardware_plan(args.recipe, world_size=args.gpus, machine=machine, **given, **more)
    if args.json:
        print(json.dumps(to_json(plan), indent=1))
        return
    print("\n".join([plan.describe(), *([calibration.describe()] if calibration else [])]))


def _check_plan(args: PlanArgs) -> None:
    """What `train` refuses whatever the data, and numbers that no plan can be made of."""
    from trainer.checks.preflight import Mistakes, check_ranks
    from trainer.objective import check_objective
    from trainer.recipe import count_micro_batches

    _require_positive(args, "gpus", "efficiency", "dataset_images")
    if args.efficiency is not None and args.efficiency > 1:
        raise UserError(f"--efficiency {args.efficiency}: expected a share of the peak, at most 1")
    if (args.decoder is None) != (args.recipe.student.perceptual is None):
        raise UserError(
            "--student.perceptual decodes latents: give --decoder, the folder of their autoencoder (world:vae in the "
            "world)" if args.decoder is None else "--decoder is for recipes with --student.perceptual: omit it"
        )  # fmt: skip
    price = args.dollars_per_gpu_hour
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise UserError(f"--dollars-per-gpu-hour {price}: expected zero or more")
    found = Mistakes()
    found.collect(check_values, args.recipe)
    found.collect(check_objective, args.recipe)
    found.raise_any()
    found.collect(count_micro_batches, args.recipe, args.gpus)
    found.collect(check_ranks, args.recipe.parallel.hpz, args.gpus)
    found.raise_any()


def _require_positive(args: Any, *names: str) -> None:
    """Refuse numbers that are not; what was left out (None) passes."""
    for name in names:
        given = getattr(args, name)
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"--{name.replace('_', '-')} {value}: expected a positive number")


def _require_not_negative(args: Any, name: str) -> None:
    if getattr(args, name) < 0:
        raise UserError(f"--{name} {getattr(args, name)}: expected zero or more")


def grade(words: list[str]) -> None:
    args = parse_options(GradeArgs, words, "grade")
    import json

    from trainer.planning.reality import calibrate, compare, find_missed, grade_run

    calibration = calibrate(args.calibrate) if args.calibrate else None
    if not args.json:
        print(compare(args.run, calibration))
        return
    rows = grade_run(args.run, calibration)
    print(json.dumps({"rows": rows, "missed": find_missed(rows)}, indent=1))


def export(words: list[str]) -> None:
    args = parse_options(ExportArgs, words, "export")
    import torch

    from data_pipeline.loading.loader import open_dataset
    from trainer.exports.adapter import export_adapter, export_diffusers_adapter
    from trainer.exports.export import export_as
    from trainer.runfolder import get_checkpoints_folder, name_step
    from trainer.zero.checkpoint import list_checkpoints

    folders = list_checkpoints(get_checkpoints_folder(args.run))
    if args.step is not None:
        folders = [uri for uri in folders if uri.endswith(f"/{name_step(args.step)}")]
    if not folders:
        raise UserError(f"{args.run}: no such checkpoint in {args.run}/checkpoints")
    given = {"kind": args.kind, "profile": args.profile, "info": open_dataset(args.data).info, "run": args.run}
    if args.lora == "adapter":
        if args.format == "sd3" or args.base is not None:
            raise UserError("--lora adapter writes the adapter alone: omit --base, use --format beeline or diffusers")
        write = export_diffusers_adapter if args.format == "diffusers" else export_adapter
        count = write(folders[0], out=args.out, **given)
    else:
        dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
        count = export_as(args.format, folders[0], out=args.out, base=args.base, dtype=dtype, **given)
    print(f"{args.out}: {count:,} parameters from {folders[0]}")


def posthoc(words: list[str]) -> None:
    args = parse_options(PosthocArgs, words, "posthoc")
    if args.images is not None:
        _require_positive(args, "images")
    import torch

    from trainer.exports.posthoc import reconstruct

    out = args.out or f"{args.run.rstrip('/')}/weights/posthoc_{args.std:g}.safetensors"
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    error = reconstruct(args.run, args.std, out=out, images=args.images, dtype=dtype)
    print(f"{out}: power:{args.std:g}, error of its profile {100 * error:.2g} %")


def verify_resume(words: list[str]) -> None:
    from pathlib import Path

    recipe, rest = _get_named_recipe(words, "verify-resume")
    args = parse_options(VerifyArgs, rest, "verify-resume " + recipe.name, recipe=recipe)
    _require_positive(args, "num_ranks", "other_ranks")
    from trainer.ladders.verify import describe, verify_resume

    for_runs = drop_options(rest, list_option_names(VerifyArgs) - {"init_from"})
    verdicts = verify_resume(
        args.recipe, for_runs, data=args.data, out=Path(args.out), steps=args.steps, ranks=args.num_ranks,
        other_ranks=args.other_ranks,
    )  # fmt: skip
    print(describe(verdicts))
    if not all(verdict.kept for verdict in verdicts):
        raise SystemExit(1)


def _get_named_recipe(words: list[str], command: str) -> tuple[Recipe, list[str]]:
    name, rest = take_name(words, list(RECIPES), prog=f"python -m trainer {command}", what="recipe")
    return get_recipe(name), rest


def parse_options(kind: type, words: list[str], prog: str, **defaults: Any) -> Any:
    """Options of a command; `defaults` are its fields that have their values already, as the recipe."""
    return parse(kind, expand_exponents(words), prog=f"python -m trainer {prog}", **_fill_defaults(kind, defaults))


def _fill_defaults(kind: type, defaults: dict[str, Any]) -> dict[str, Any]:
    if not defaults:
        return {}
    fields = kind.__dataclass_fields__  # type: ignore[attr-defined]
    missing = {"data": DataChoice(tyro.MISSING), "out": tyro.MISSING}
    return {"default": kind(**{name: value for name, value in missing.items() if name in fields}, **defaults)}
