"""Everything that can be refused before any work, all at once: `prepare` goes on after a mistake.

The data against the recipe is in fitting.py, what one machine may lack in host.py.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ParamSpec, TypeVar, cast

import torch

from data_pipeline.checkpoints import find_weights
from data_pipeline.loading.loader import Dataset
from data_pipeline.loading.pairs import RejectedLatents
from data_pipeline.selection.choice import DataChoice, TrainedOn, describe_choice
from infra import storage
from infra.device import ResolvedPrecision, resolve_precision, warn_if_slow
from infra.errors import UnavailableError, UserError, UserErrors, choose_code
from model.diffusion.flow import get_formulation
from model.diffusion.validation import get_protocol
from model.files.weights import read_meta
from trainer.checks.fitting import check_data, check_made_alike, check_mix, check_same_choice, check_val
from trainer.checks.host import check_compiler, check_gpu, check_hostfile, check_out, check_port, check_swapping
from trainer.checks.students import check_couplings, check_start
from trainer.checks.values import check_values
from trainer.objective import OBJECTIVES, check_objective
from trainer.recipe import Recipe, count_micro_batches, find_differences
from trainer.runfolder import RECIPE, get_checkpoints_folder, read_kept_precision, read_recipe
from trainer.watching.trackers import check_trackers
from trainer.zero import checkpoint
from trainer.zero.ema import parse_profile
from trainer.zero.group import Group
from trainer.zero.optim import check_kernel
from trainer.zero.rankfile import hash_file

P = ParamSpec("P")
T = TypeVar("T")


class Refusal(UserErrors):
    """All that was found. `here`: what may be true of this machine alone."""

    def __init__(self, lines: list[str], here: list[str], *, may_pass: bool = False) -> None:
        super().__init__([*lines, *here], may_pass=may_pass)
        self.here = here


class Mistakes:
    """Mistakes so far."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._here: list[str] = []
        self._may_pass = True

    def collect(self, question: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """The answer; None when it is a refusal, which is kept."""
        return self._collect(self._lines, question, *args, **kwargs)

    def collect_here(self, question: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """As `collect`, for mistakes that concern this machine alone, such as a missing library. So may an outage."""
        return self._collect(self._here, question, *args, **kwargs)

    def _collect(self, lines: list[str], question: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return question(*args, **kwargs)
        except UnavailableError as error:
            if str(error) not in self._here:  # storage that does not answer one question seldom answers the next
                self._here.append(str(error))
        except UserError as error:
            lines.extend(error.lines if isinstance(error, UserErrors) else [str(error)])
            self._may_pass = False
        return None

    def raise_any(self) -> None:
        """Raise a Refusal if there were any."""
        if self._lines or self._here:
            raise Refusal(self._lines, self._here, may_pass=self._may_pass)


@dataclass(frozen=True)
class PreparedRun:
    """A run that may begin."""

    recipe: Recipe
    """Knows its data and the weights it starts from."""
    dataset: Dataset
    val: Dataset | None
    out: str
    resume: str
    init_from: str | None
    continues_at: str
    """In words; "" for a new run, and where nobody looked (`thorough`)."""
    trained_on: TrainedOn | None = None
    """What the run folder keeps of a filter or mix."""
    free: tuple[str, ...] = ()
    """Fields of the recipe in which the checkpoint may differ (--allow-other-data)."""


@contextlib.contextmanager
def report_once() -> Iterator[None]:
    """Rank 0 reports what it finds; the others exit quietly afterwards. What may be true of another node alone is
    reported by that node's first rank, with the node's name."""
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            raise
        if os.environ.get("LOCAL_RANK") == "0" and isinstance(error, Refusal):
            for line in error.here:
                print(f"error: {socket.gethostname()}: {line}", file=sys.stderr, flush=True)
        time.sleep(3)
        raise SystemExit(choose_code(error)) from None


def settle_precision(recipe: Recipe, out: str, resume: str) -> Recipe:
    """The recipe with a precision. `auto` is what the run was started in, or that of the checkpoint it branches from;
    a new run takes what this machine does best."""
    found = (
        recipe.precision if recipe.precision != "auto" else read_kept_precision(out) or _read_branched_precision(resume)
    )
    settled = resolve_precision(found or "auto", "auto")
    if found:
        warn_if_slow(settled, "auto")
    return dataclasses.replace(recipe, precision=settled)


def _read_branched_precision(resume: str) -> ResolvedPrecision | None:
    if resume in ("latest", "none"):
        return None
    try:
        state = json.loads(storage.read_bytes(storage.join(resume, checkpoint.MANIFEST)))["state"]
        return cast(ResolvedPrecision, state["recipe"]["precision"])
    except UnavailableError:
        raise
    except (UserError, ValueError, KeyError, TypeError):
        return None  # not there or damaged: refused with its reason later


def agree_on_precision(prepared: PreparedRun, group: Group) -> PreparedRun:
    """Ranks on unlike machines may have resolved `auto` unlike: the answer of rank 0 is everybody's. Collective."""
    precision = cast(ResolvedPrecision, group.gather(prepared.recipe.precision)[0])
    return dataclasses.replace(prepared, recipe=dataclasses.replace(prepared.recipe, precision=precision))


def prepare(
    recipe: Recipe, *, data: DataChoice, out: str, resume: str, init_from: str | None, world_size: int, thorough: bool
) -> PreparedRun:
    """Every check that needs no other rank and no network's weights. `thorough` (--dry-run) also reads every byte of
    the checkpoint that would be continued and tries the port, as the run itself does when it comes to them."""
    found = Mistakes()
    recipe = found.collect(settle_precision, recipe, out, resume) or dataclasses.replace(recipe, precision="fp32")
    found.collect_here(check_hostfile)
    _check_recipe(found, recipe, world_size)
    for question in (check_gpu, check_compiler, check_swapping):
        found.collect_here(question, recipe.parallel)
    found.collect_here(check_kernel, recipe.optimizer.kernel)
    found.collect_here(check_out, out)
    resume = found.collect(prefer_own_checkpoint, out, resume) or resume
    started, dataset = found.collect(set_init_weights, recipe, init_from), found.collect(data.open)
    val, trained_on = None, None
    known: object = dataset
    if dataset is not None:
        val = _check_splits(found, recipe, data, dataset)
        trained_on = describe_choice(data, dataset)
        if started is not None:
            found.collect(check_couplings, started, dataset, init_from)
        begun = out if resume in ("latest", "none") else resume.rstrip("/").rsplit("/checkpoints/", 1)[0]
        if data.allow_other_data:
            known = None
        elif checkpoint.list_checkpoints(get_checkpoints_folder(begun)):
            found.collect(check_made_alike, dataset, begun)
            known = found.collect(check_same_choice, trained_on, begun, plain=data.plain)
    if started is not None:
        found.collect(check_start, recipe, init_from)
    complete = _set_fingerprint(started or recipe, dataset)
    unknown = [name for name, there in (("data.fingerprint", known), ("init_weights", started)) if there is None]
    continues_at = found.collect(check_run_folder, complete, out, resume, thorough=thorough, unknown=tuple(unknown))
    if thorough:
        found.collect_here(check_port)
    found.raise_any()
    assert dataset is not None
    assert continues_at is not None
    free = ("data.fingerprint",) if data.allow_other_data else ()
    kept = None if data.plain else trained_on
    return PreparedRun(complete, dataset, val, out, resume, init_from, continues_at, kept, free)


def _check_recipe(found: Mistakes, recipe: Recipe, world_size: int) -> None:
    found.collect(check_values, recipe)
    found.collect(check_objective, recipe)
    found.collect(check_trackers, recipe.logging)
    formulation = found.collect(get_formulation, recipe.formulation)
    if formulation is not None:
        found.collect(get_protocol, recipe.validation.protocol, formulation)
    for profile in recipe.ema.profiles:
        found.collect(parse_profile, profile)
    if recipe.global_batch > 0 and (recipe.parallel.micro_batch or 1) > 0:
        found.collect(count_micro_batches, recipe, world_size)
    found.collect(check_ranks, recipe.parallel.hpz, world_size)


def check_ranks(hpz: int, world_size: int) -> None:
    if hpz > 1 and world_size % hpz:
        raise UserError(f"parallel.hpz {hpz} does not divide the {world_size} ranks: use the ranks of a node")


def _check_splits(found: Mistakes, recipe: Recipe, data: DataChoice, dataset: Dataset) -> Dataset | None:
    """The val split, opened, where the recipe wants it."""
    found.collect(check_data, recipe, dataset)
    val = found.collect(data.open_val) if recipe.validation.every is not None else None
    if val is not None:
        found.collect(check_val, recipe, val)
    objective = OBJECTIVES.get(recipe.objective)
    if dataset.datasets:
        found.collect(check_mix, recipe, dataset)
    elif objective is not None and objective.pairs:
        for split in (dataset, val):
            if split is not None:
                found.collect(RejectedLatents, split)  # refuses what are no pairs
    return val


def _set_fingerprint(recipe: Recipe, dataset: Dataset | None) -> Recipe:
    if dataset is None:
        return recipe
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, fingerprint=dataset.fingerprint))


def set_init_weights(recipe: Recipe, init_from: str | None) -> Recipe:
    """The recipe that starts from a weights file; refused when that file is for another model."""
    if init_from is None:
        if recipe.lora.rank is not None:
            raise UserError(
                f"recipe {recipe.name} trains adapters on frozen weights: give --init-from RUN/weights/ema.safetensors"
            )
        return recipe
    path = find_weights(init_from)
    meta = read_meta(path)
    wanted = recipe.model.to_json() | {"second_time": recipe.model.second_time}
    # Positions are a formula. QK-norm may be added to weights without it (paper, section 5.3.2), and so may a second
    # time, whose branch starts at zero.
    free = {"norm_backend"} | {key for key in wanted if key.startswith("pos_")}
    found = {"backbone": meta["backbone"], "second_time": False} | meta["config"]
    wrong = [
        f"{key}: weights {found.get(key)}, recipe {value}"
        for key, value in ({"backbone": recipe.model.name} | wanted).items()
        if key not in free and found.get(key) != value and not (key in ("qk_norm", "second_time") and value)
    ]
    if wrong:
        raise UserError(f"{init_from} is for another model than recipe {recipe.name}: {'; '.join(wrong)}")
    return dataclasses.replace(recipe, init_weights=hash_file(str(path)))


def prefer_own_checkpoint(out: str, resume: str) -> str:
    """Where to resume: from the run's own newest checkpoint if it has one, else from `resume` (a checkpoint of another
    run to branch from). So the command that began a branch also continues it."""
    if resume in ("latest", "none") or not checkpoint.list_checkpoints(get_checkpoints_folder(out)):
        return resume
    return "latest"


def check_run_folder(
    recipe: Recipe, out: str, resume: str, *, thorough: bool = False, unknown: tuple[str, ...] = ()
) -> str:
    """An existing run continues only with the recipe that it was started with. Where it would continue, in words;
    `thorough` reads every byte of that checkpoint, as the run itself does before its first step. `unknown` fields of
    the recipe, which other mistakes left open, are not compared."""
    root, found = get_checkpoints_folder(out), Mistakes()
    folders = checkpoint.list_checkpoints(root)
    if resume == "none" and folders:
        raise UserError(f"{out} holds checkpoints and --resume is none: choose another --out, or remove that folder")
    if folders:
        found.collect(_check_started, recipe, out, unknown)
    elif resume == "latest":
        found.collect(_check_copy, root)
    started = bool(folders)
    if resume not in ("latest", "none"):
        started = found.collect(_check_copied, resume) is not None
        if started:
            found.collect(_check_branch, recipe, resume, unknown)
    continues_at = found.collect(_look_through, root, resume) if thorough and started else ""
    found.raise_any()
    return continues_at or ""


def _check_started(recipe: Recipe, out: str, unknown: tuple[str, ...]) -> None:
    uri = storage.join(out, RECIPE)
    if not storage.exists(uri):
        return
    try:
        old = read_recipe(out)
    except UnavailableError:
        raise
    except ValueError as error:
        raise UserError(f"{uri} cannot be read ({error}): choose another --out, or remove that folder") from error
    changed = [line for line in find_differences(old, recipe) if not line.startswith(unknown)]
    if changed:
        change = "; ".join(changed)
        raise UserError(f"{out} was started with another recipe ({change}): choose another --out or the same options")


def _check_copy(root: str) -> None:
    """`latest` follows the manifest of what it names: alone it came here in a copy that was cut off."""
    uri = storage.join(root, checkpoint.LATEST)
    if storage.exists(uri):
        name = storage.read_bytes(uri).decode(errors="replace").strip()
        raise UserError(
            f"{root} names {name} as its latest checkpoint, but that has no {checkpoint.MANIFEST}: it is half copied; "
            f"copy it again, or remove {uri} to start over"
        )


def _check_copied(folder: str) -> bool:
    if not storage.exists(storage.join(folder, checkpoint.MANIFEST)):
        half = f" (half copied: its {checkpoint.MANIFEST} is missing)" if storage.list_files(folder) else ""
        raise UserError(
            f"--resume {folder}: no checkpoint there{half}; give latest, none, or a folder RUN/checkpoints/step_..."
        )
    return True


def _check_branch(recipe: Recipe, folder: str, unknown: tuple[str, ...]) -> None:
    try:
        state = json.loads(storage.read_bytes(storage.join(folder, checkpoint.MANIFEST)))["state"]
    except UnavailableError:
        raise
    except (ValueError, KeyError, TypeError):
        return  # damaged: told with its reason when every byte is read
    checkpoint.check_same_recipe(folder, state, recipe, resume=folder, unknown=unknown)


def _look_through(root: str, resume: str) -> str:
    alone = Group(0, 1, torch.device("cpu"))
    if resume == "latest":
        found = checkpoint.find_newest(root, alone)
        assert found is not None
    else:
        found = checkpoint.require_whole(resume, alone)
    return f"{found.uri} is whole: the run continues at {found.state['images_seen']:,} images"
