"""What lies where in a run's folder, a local one or s3://; every name that more than one file needs is here.

recipe.json, plan.json, data.json (dataset.json as it stood)    written when the run starts
trained_on.json                                                 the filter or mix, where there is one
takedowns.json                                                  images that the run was told to leave out, since when
checkpoints/step_0000100/rank_00000.safetensors ...             see trainer/zero/checkpoint.py
weights/ema.safetensors, raw.safetensors, step_0000100/         exported weights
results/, logs/, samples/, skipped/                             rows, lines, pictures, keys of batches left out
unstable.json                                                   only where the guard ended the run
"""

import json
from typing import cast

from data_pipeline.loading.loader import Dataset
from data_pipeline.loading.taken_down import EFFECTIVE, note_takedowns
from data_pipeline.selection.choice import TRAINED_ON, TrainedOn
from infra import storage
from infra.codec import from_json, to_json
from infra.device import ResolvedPrecision
from infra.errors import UnavailableError
from infra.results import ResultRow, ResultStore
from trainer.recipe import Recipe

RECIPE, PLAN, DATA, UNSTABLE = "recipe.json", "plan.json", "data.json", "unstable.json"


def name_run(run: str) -> str:
    """The folder's own name, under which results are stored."""
    return run.rstrip("/").rsplit("/", 1)[-1]


def name_step(step: int) -> str:
    """Names a checkpoint and what was made with it; names sort as steps do."""
    return f"step_{step:07d}"


def name_rank(rank: int) -> str:
    """Names what one rank wrote."""
    return f"rank_{rank:05d}"


def get_checkpoints_folder(run: str) -> str:
    """URI of the folder of checkpoints."""
    return storage.join(run, "checkpoints")


def read_recipe(run: str) -> Recipe:
    """The recipe that a run was started with; UserError (a ValueError) when it cannot be read."""
    uri = storage.join(run, RECIPE)
    return Recipe.from_json(storage.read_bytes(uri), where=uri)


def read_kept_precision(run: str) -> ResolvedPrecision | None:
    """What the run computes in; None where none was started."""
    uri = storage.join(run, RECIPE)
    try:
        found = json.loads(storage.read_bytes(uri))["precision"] if storage.exists(uri) else None
    except UnavailableError:
        raise
    except (ValueError, KeyError, TypeError):
        return None  # damaged: refused with its reason before anything is trained
    return cast(ResolvedPrecision, found) if found in ("fp32", "bf16") else None


def write_data(run: str, dataset: Dataset, trained_on: TrainedOn | None, *, images_seen: int) -> None:
    """What the run trains on from now on, `images_seen` into it."""
    storage.write_bytes(storage.join(run, DATA), dataset.info.to_bytes())
    uri = storage.join(run, TRAINED_ON)
    if trained_on is not None:
        storage.write_bytes(uri, json.dumps(to_json(trained_on), indent=1).encode())
    else:
        storage.delete(uri)
    if dataset.takedowns:
        note_takedowns(storage.join(run, EFFECTIVE), dataset.takedowns, images_seen=images_seen)


def read_trained_on(run: str) -> TrainedOn | None:
    """The filter or mix that a run was started with; None where there is none."""
    uri = storage.join(run, TRAINED_ON)
    return from_json(TrainedOn, storage.read_bytes(uri), where=uri) if storage.exists(uri) else None


def read_last_val_loss(run: str, recipe: Recipe) -> ResultRow | None:
    """The last validation loss of a run's EMA weights; None where it was never measured."""
    rows = ResultStore(storage.join(run, "results")).rows(metric=f"val_loss/{recipe.validation.protocol}")
    return rows[-1] if rows else None
