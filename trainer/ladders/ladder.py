"""Train the rungs of a ladder that are missing, each by the same command that a person would type; it is printed."""

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.selection.choice import DataChoice
from infra import storage
from infra.device import ResolvedPrecision, resolve_precision
from infra.errors import UnavailableError, UserError
from infra.log import get_logger
from infra.outcome import MISTAKE, PREEMPTED
from model.files.weights import META_KEY
from model.flops import estimate_train_flops
from trainer.ladders.launch import ManyRuns
from trainer.launchers import ask_to_stop, call_on_stop, start_training, wait_for_end
from trainer.overrides import override_recipe, refuse_decided
from trainer.recipe import Recipe
from trainer.recipes import RECIPES, get_family
from trainer.runfolder import RECIPE, UNSTABLE, get_checkpoints_folder, name_step, read_kept_precision
from trainer.zero.group import find_free_port

log = get_logger("ladder")


@dataclass(frozen=True)
class TrainingTask:
    """A run to train unless it exists: `images` of a recipe into a folder; `words` override what its name says."""

    recipe: Recipe
    run: str
    images: int
    words: tuple[str, ...] = ()


def train_ladder(family: str, depths: Sequence[int], launch: ManyRuns) -> list[str]:
    """Train each depth into OUT/<recipe>; finished ones are skipped. The run folders, in order of depth."""
    recipes = make_rungs(family, depths, launch)
    return train_missing(
        [TrainingTask(r, storage.join(launch.out, r.name), r.images, launch.overrides) for r in recipes], launch
    )


def train_isoflop(
    family: str, depths: Sequence[int], budgets: Sequence[float], launch: ManyRuns, *, cooldown: float = 0.2
) -> list[str]:
    """Train every depth for every budget of training FLOPs; the run folders.

    One run at constant rate (OUT/<recipe>-trunk) serves all horizons of a depth: each horizon branches off where its
    cooldown begins, into OUT/<recipe>-<budget>.
    """
    refuse_decided(launch.overrides, {"images": "--budgets"})
    trunks: list[TrainingTask] = []
    branches: list[TrainingTask] = []
    for recipe in make_rungs(family, depths, launch):
        horizons = {budget: count_images(recipe, budget) for budget in sorted(set(budgets))}
        starts = {budget: find_branch_point(recipe, images, cooldown) for budget, images in horizons.items()}
        trunk, longest = storage.join(launch.out, f"{recipe.name}-trunk"), max(starts.values())
        saves = [str(start) for start in sorted(set(starts.values()))]
        constant = [
            "--images", str(longest), "--schedule.cooldown", "0", "--logging.save-at", *saves,
            "--logging.keep", str(len(starts) + 1),
        ]  # fmt: skip
        trunks.append(TrainingTask(recipe, trunk, longest, (*launch.overrides, *constant)))
        for budget, images in horizons.items():
            source = storage.join(get_checkpoints_folder(trunk), name_step(starts[budget] // recipe.global_batch))
            branch = ("--images", str(images), "--resume", source, "--schedule.cooldown", str(cooldown))
            run = storage.join(launch.out, f"{recipe.name}-{budget:g}".replace("+", ""))
            branches.append(TrainingTask(recipe, run, images, (*launch.overrides, *branch)))
    precision = settle_precision([*trunks, *branches], launch)
    trunks, branches = ([_with_precision(task, precision) for task in tasks] for tasks in (trunks, branches))
    train_missing(trunks, launch)
    return train_missing(branches, launch)


def count_images(recipe: Recipe, budget: float) -> int:
    """Images that a budget of training FLOPs pays for, in whole batches."""
    _, height, width = recipe.data.latent_shape
    images = budget / estimate_train_flops(recipe.model, height, width, recipe.data.text_tokens)
    steps = round(images / recipe.global_batch)
    if steps < 10:
        raise UserError(f"{budget:g} FLOPs pay for {steps} steps of {recipe.name}: give a larger budget or less depth")
    return steps * recipe.global_batch


def find_branch_point(recipe: Recipe, images: int, cooldown: float) -> int:
    """Where the cooldown of a run of so many images begins, in whole batches."""
    return int(images * (1 - cooldown)) // recipe.global_batch * recipe.global_batch


def make_rungs(family: str, depths: Sequence[int], launch: ManyRuns) -> list[Recipe]:
    """The recipes of a ladder, smallest first, with the fields that `launch` overrides."""
    refuse_decided(launch.overrides, {"model.depth": "--depths"})
    recipes = [override_recipe(get_family(family)(depth), launch.overrides) for depth in sorted(set(depths))]
    unknown = [recipe.name for recipe in recipes if recipe.name not in RECIPES]
    if unknown:
        raise UserError(f"no recipe {', '.join(unknown)}; known: {', '.join(RECIPES)}")
    return recipes


def train_missing(tasks: Sequence[TrainingTask], launch: ManyRuns, *, unstable_is_a_result: bool = False) -> list[str]:
    """Train what is not trained yet, one after another or shared among Ray workers; the run folders.

    `unstable_is_a_result`: a run that its guard ended is reported and passed over, as sweeps want.
    """
    ranks, precision = launch.num_ranks or count_default_ranks(), settle_precision(tasks, launch)
    tasks = [_with_precision(task, precision) for task in tasks]
    missing: list[tuple[str, list[str], str]] = []  # run, command, the line that is printed
    for number, task in enumerate(tasks, start=1):
        done = count_trained_images(task.run)
        if done is not None and done >= task.images:
            log.info("%d/%d: %s is trained (%s images)", number, len(tasks), task.run, f"{done:,}")
        elif unstable_is_a_result and _is_unstable(task.run):
            log.info("%d/%d: %s was unstable", number, len(tasks), task.run)
        else:
            command = build_train_command(task.recipe.name, task.words, data=launch.data, run=task.run, ranks=ranks)
            missing.append((task.run, command, f"{number}/{len(tasks)}: {shlex.join(command)}"))
    if launch.workers and missing:
        _train_on_ray(missing, workers=launch.workers, ranks=ranks, unstable_is_a_result=unstable_is_a_result)
    else:
        for run, command, announcement in missing:
            print(announcement, flush=True)
            with _pass_over(run, unstable_is_a_result):
                run_command(command, run)
    return [task.run for task in tasks]


def settle_precision(tasks: Sequence[TrainingTask], launch: ManyRuns) -> ResolvedPrecision | None:
    """What `auto` is for all of these runs, so that they can be compared: what the first of them that exists computes
    in, else what this machine (or the Ray cluster) does best. None: no run asks."""
    if not any(task.recipe.precision == "auto" for task in tasks):
        return None
    kept: ResolvedPrecision | None = next(filter(None, (read_kept_precision(task.run) for task in tasks)), None)
    if kept is None and launch.workers:
        from trainer.ladders.workers import find_worker_device

        return resolve_precision(
            "auto", find_worker_device(launch.workers, ranks=launch.num_ranks or count_default_ranks())
        )
    return kept or resolve_precision("auto", "auto")


def _with_precision(task: TrainingTask, precision: ResolvedPrecision | None) -> TrainingTask:
    if precision is None or task.recipe.precision != "auto":
        return task
    recipe = replace(task.recipe, precision=precision)
    return replace(task, recipe=recipe, words=(*task.words, "--precision", precision))


def _train_on_ray(
    missing: Sequence[tuple[str, list[str], str]], *, workers: int, ranks: int, unstable_is_a_result: bool
) -> None:
    """Train the missing runs on Ray, `workers` at a time. After an error no other run begins; those in progress finish,
    then the error is raised."""
    from trainer.ladders.workers import train_on_ray

    wrong: list[BaseException] = []

    def begin(index: int) -> None:
        print(missing[index][2], flush=True)

    def ended(index: int, code: int, output: str) -> bool:
        run = missing[index][0]
        try:
            with _pass_over(run, unstable_is_a_result):
                check_finished(run, code)
                log.info("%s is trained", run)
        except (UserError, SystemExit) as error:
            print(output, end="", file=sys.stderr, flush=True)
            wrong.append(error)
        return not wrong

    commands = [command for _, command, _ in missing]
    train_on_ray(commands, workers=min(workers, len(missing)), ranks=ranks, begin=begin, ended=ended)
    if wrong:
        raise wrong[0]


@contextmanager
def _pass_over(run: str, unstable_is_a_result: bool) -> Iterator[None]:
    try:
        yield
    except UserError:
        if not (unstable_is_a_result and _is_unstable(run)):
            raise
        log.warning("%s was unstable: it counts as diverged", run)


def _is_unstable(run: str) -> bool:
    return storage.exists(storage.join(run, UNSTABLE))


def count_default_ranks() -> int:
    """One rank per GPU; on the CPU one per core, two at most."""
    import torch

    return torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))


def build_train_command(recipe: str, words: Sequence[str], *, data: DataChoice, run: str, ranks: int) -> list[str]:
    """`deepspeed --num_gpus N --module trainer train ...`, or `python -m trainer train ...` for one rank."""
    arguments = ["train", recipe, *data.words(), "--out", run, *words]
    if ranks == 1:
        return ["python", "-m", "trainer", *arguments]
    # Not the launcher's own 29500: two trainings that start at once would both find it free, seconds before they meet.
    port = ["--master_port", str(find_free_port())]
    return ["deepspeed", "--num_gpus", str(ranks), *port, "--module", "trainer", *arguments]


def count_trained_images(run: str) -> int | None:
    """Images behind the final weights of a finished run, else None."""
    uris = [storage.join(run, "weights", f"{kind}.safetensors") for kind in ("ema", "raw")]
    if not all(storage.exists(uri) for uri in uris):
        return None
    return min(int(_read_metadata(uri)["images_seen"]) for uri in uris)


def is_done(run: str) -> bool:
    """Has this run seen all its images? The run folder decides, as `deepspeed` exits with 0 even when its second
    process is killed."""
    uri = storage.join(run, RECIPE)
    return storage.exists(uri) and (count_trained_images(run) or 0) >= json.loads(storage.read_bytes(uri))["images"]


def _read_metadata(uri: str) -> dict[str, Any]:
    """The metadata of a weights file, reading its header only (s3:// too)."""
    length = int.from_bytes(storage.read_bytes(uri, 0, 8), "little")
    header = json.loads(storage.read_bytes(uri, 8, length))
    return json.loads(header["__metadata__"][META_KEY])


def run_command(command: list[str], run: str, *, environment: Mapping[str, str] = {}) -> None:
    """The command, here. A signal to the ladder goes to its ranks, which save and leave; so does the ladder then, with
    their exit code."""
    process = start_training(command, environment=environment)

    def forward() -> None:
        log.info("asking %s to save and stop", run)
        ask_to_stop(process.pid)

    with call_on_stop(forward) as stopped:
        code = wait_for_end(process)
    check_finished(run, PREEMPTED if stopped else code)


def check_finished(run: str, code: int) -> None:
    """Leave with the code of a training that was stopped. Where it did not finish: UserError after a user's mistake,
    otherwise UnavailableError."""
    if code in (PREEMPTED, -signal.SIGTERM):
        raise SystemExit(PREEMPTED)
    if code != 0 or not is_done(run):
        why = f"{run}: training ended unfinished, exit code {code}; its own message stands above"
        if code == MISTAKE:
            raise UserError(f"{why}: fix that first")
        raise UnavailableError(f"{why}: run the same command again")
