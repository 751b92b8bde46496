"""The command line: `python -m trainer ...`, or `deepspeed --num_gpus 2 --module trainer train RECIPE ...`."""

import os
import sys
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro

from infra.errors import UserError, nearest, run_cli
from model.errors import ModelError
from trainer.recipe import Recipe
from trainer.recipes import RECIPES, get_family, get_recipe

USAGE = f"""Train SD3-class text-to-image models with DeepSpeed ZeRO.

  deepspeed --num_gpus 2 --module trainer train RECIPE --data URI --out RUN    two ranks (GPUs, or CPU cores)
  python -m trainer train RECIPE --data URI --out RUN                          one process
  python -m trainer ladder world --depths 2 3 4 --data URI --out RUNS          the rungs that are missing
  python -m trainer plan RECIPE --ranks 8                                      parameters, FLOPs, memory
  python -m trainer export RUN --data URI --out FILE                           weights from a checkpoint

Recipes: {", ".join(RECIPES)}
`python -m trainer COMMAND --help` shows every option, `python -m trainer train RECIPE --help` every field of a recipe.
Run the same command again to continue an interrupted run. Exit codes: 0 done, 2 a mistake of yours (one line says
which), 75 stopped by SIGTERM or Ctrl-C after saving.
"""
ROOT = tyro.conf.arg(name="")  # a recipe's fields stand at the top: --images, --optimizer.lr


@dataclass(frozen=True)
class TrainArgs:
    """Train a recipe. Every field of the recipe can be overridden."""

    data: str
    """Dataset made by `python -m data_pipeline run` (folder or s3://)."""
    out: str
    """Run folder (or s3://): checkpoints, weights, results, logs."""
    recipe: Annotated[Recipe, ROOT]
    resume: str = "latest"
    """latest: continue if there is a checkpoint; none: refuse if there is one; or the folder of a checkpoint."""
    init_from: str | None = None
    """Start from these exported weights (Adam and EMA start anew)."""
    dry_run: bool = False
    """Check data, shapes and divisibility, print the plan, write nothing."""


@dataclass(frozen=True)
class LadderArgs:
    """Train the rungs of a ladder that are missing, smallest first; finished rungs are skipped, others continue."""

    data: str
    """Dataset made by `python -m data_pipeline run`."""
    out: str
    """Folder of run folders: RUNS/world-d2, RUNS/world-d3 ..."""
    depths: tuple[int, ...] = (2, 3, 4)
    """Depths of the rungs."""
    images: int | None = None
    """Images per rung; default: the recipe's."""
    num_ranks: int | None = None
    """Processes per run; default: GPUs, or CPU cores up to 2 where there is none."""
    options: tuple[str, ...] = ()
    """Overrides handed to every rung's command, as NAME=VALUE: --options optimizer.lr=1e-3 logging.keep=1."""


@dataclass(frozen=True)
class PlanArgs:
    """What a recipe needs: parameters, FLOPs, bytes per rank by ZeRO stage."""

    recipe: Annotated[Recipe, ROOT]
    ranks: int = 1
    """Number of ranks to plan for."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class ExportArgs:
    """Write weights from a checkpoint as one safetensors file (no DeepSpeed, one process)."""

    run: tyro.conf.Positional[str]
    """Run folder."""
    data: str
    """The dataset it was trained on: its text and VAE settings go into the file."""
    out: str
    """File to write."""
    kind: str = "ema"
    """ema or raw."""
    profile: str | None = None
    """EMA profile; default: the recipe's first."""
    step: int | None = None
    """Step of the checkpoint; default: the newest."""


def main() -> None:
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]  # the deepspeed launcher adds it
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{nearest(command, COMMANDS)}; known: {', '.join(COMMANDS)}")
    COMMANDS[command](rest)


def run_train(arguments: list[str]) -> None:
    recipe, rest = _named_recipe(arguments, "train")
    args = _parse(TrainArgs, rest, "train " + recipe.name, recipe=recipe)
    from trainer.train import train

    train(args.recipe, data=args.data, out=args.out, resume=args.resume, init_from=args.init_from, dry_run=args.dry_run)


def run_ladder(arguments: list[str]) -> None:
    family, rest = _first(arguments, "ladder", "a ladder, for example world")
    get_family(family)
    args = _parse(LadderArgs, rest, "ladder " + family)
    from trainer.ladder import climb

    climb(
        family,
        args.depths,
        data=args.data,
        out=args.out,
        images=args.images,
        num_ranks=args.num_ranks,
        options=args.options,
    )


def run_plan(arguments: list[str]) -> None:
    import json

    from trainer.plan import describe, make_plan

    recipe, rest = _named_recipe(arguments, "plan")
    args = _parse(PlanArgs, rest, "plan " + recipe.name, recipe=recipe)
    plan = make_plan(args.recipe, world=args.ranks)
    print(json.dumps(plan, indent=1) if args.json else describe(plan))


def run_export(arguments: list[str]) -> None:
    args = _parse(ExportArgs, arguments, "export")
    from data_pipeline.loader import open_dataset
    from infra import storage
    from trainer.export import export_checkpoint
    from trainer.zero.checkpoint import candidates

    if args.kind not in ("ema", "raw"):
        raise UserError(f"--kind {args.kind!r}, expected ema or raw")
    folders = candidates(storage.join(args.run, "checkpoints"))
    if args.step is not None:
        folders = [uri for uri in folders if uri.endswith(f"/step_{args.step:07d}")]
    if not folders:
        raise UserError(f"{args.run}: no such checkpoint in {args.run}/checkpoints")
    count = export_checkpoint(
        folders[0], kind=args.kind, profile=args.profile, info=open_dataset(args.data).info,
        run=args.run.rstrip("/").rsplit("/", 1)[-1], out=args.out,
    )  # fmt: skip
    print(f"{args.out}: {count:,} parameters from {folders[0]}")


COMMANDS = {"train": run_train, "ladder": run_ladder, "plan": run_plan, "export": run_export}


def _first(arguments: list[str], command: str, what: str) -> tuple[str, list[str]]:
    """The positional argument that comes first."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        raise UserError(f"python -m trainer {command} needs {what} right after the command; see --help")
    if arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        raise SystemExit(0)
    return arguments[0], arguments[1:]


def _named_recipe(arguments: list[str], command: str) -> tuple[Recipe, list[str]]:
    name, rest = _first(arguments, command, f"a recipe: {', '.join(RECIPES)}")
    return get_recipe(name), rest


def _parse(kind: type, arguments: list[str], prog: str, **defaults: Any) -> Any:
    """tyro refuses unknown options with the nearest known ones (exit code 2); other ranks than 0 keep silent."""
    first = os.environ.get("RANK", "0") == "0"
    if not first:
        import time

        time.sleep(0.0 if _parses(kind, arguments, **defaults) else 3.0)
    return tyro.cli(
        kind, args=arguments, prog=f"trainer {prog}", console_outputs=first, **_with_defaults(kind, defaults)
    )


def _parses(kind: type, arguments: list[str], **defaults: Any) -> bool:
    try:
        tyro.cli(kind, args=arguments, console_outputs=False, **_with_defaults(kind, defaults))
    except SystemExit:
        return False
    return True


def _with_defaults(kind: type, defaults: dict[str, Any]) -> dict[str, Any]:
    if not defaults:
        return {}
    missing = {name: tyro.MISSING for name in ("data", "out") if name in kind.__dataclass_fields__}  # type: ignore[attr-defined]
    return {"default": replace(kind(**missing, **defaults))}


if __name__ == "__main__":
    run_cli(main, also=(ModelError,))
