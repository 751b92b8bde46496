"""From shares to one safetensors file: raw or EMA weights, tensor by tensor, with metadata that names their origin."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.schema import DatasetInfo
from infra import storage
from infra.errors import UserError
from infra.log import get_logger
from infra.version import code_version
from model.errors import ModelError
from model.weights import save_weights
from trainer.recipe import Recipe
from trainer.zero import checkpoint
from trainer.zero.engine import ZeroEngine
from trainer.zero.group import Group
from trainer.zero.partition import Segment
from trainer.zero.rankfile import copy_ranges

log = get_logger("export")


def weights_meta(recipe: Recipe, info: DatasetInfo, *, kind: str, images_seen: int, run: str) -> dict[str, Any]:
    """What a weights file says about itself: enough to sample from it and to trace it."""
    return {
        "kind": kind,
        "backbone": recipe.model.name,
        "config": recipe.model.to_json(),
        "formulation": recipe.formulation,
        "shift": recipe.shift,
        "text_spec": info.text_spec.to_json(),
        "vae": dataclasses.asdict(info.vae),
        "resolution": info.resolution,
        "recipe": recipe.name,
        "recipe_hash": recipe.hash,
        "data_fingerprint": info.fingerprint,
        "images_seen": images_seen,
        "code_version": code_version(),
        "run": run,
        "ema_profile": recipe.ema.profiles[0] if kind == "ema" else None,
    }


def export(engine: ZeroEngine, tensors: list[Tensor], uris: list[str], meta: dict[str, Any], group: Group) -> bool:
    """Write the weights whose shares are `tensors` to every URI; False when that failed. Collective."""
    state_dict: dict[str, Tensor] = {}
    for name in engine.shapes:
        whole = engine.whole(name, tensors)
        if group.rank == 0:
            state_dict[name] = whole
    problem = ""
    if group.rank == 0:
        state_dict |= {n: b for n, b in engine.model.state_dict().items() if n not in engine.shapes}  # stored buffers
        try:
            for uri in uris:
                write(uri, state_dict, meta)
        except (UserError, ModelError, OSError) as error:
            problem = str(error)
            log.warning("weights not exported: %s", problem)
    return not group.any(bool(problem))


def write(uri: str, state_dict: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """One weights file, local or on S3."""
    if not storage.is_remote(uri):
        save_weights(storage.local_path(uri), state_dict, meta)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = save_weights(Path(folder) / "weights.safetensors", state_dict, meta)
        storage.write_bytes(uri, path.read_bytes())


def export_checkpoint(folder: str, *, kind: str, profile: str | None, info: DatasetInfo, run: str, out: str) -> int:
    """Weights from a checkpoint on disk or S3, without DeepSpeed and on one process; the number of parameters."""
    found, reason = checkpoint.inspect(folder, Group(0, 1, torch.device("cpu")))
    if found is None:
        raise UserError(f"{folder}: not a whole checkpoint ({reason})")
    recipe = Recipe.from_json(found.state["recipe"])
    with torch.device("meta"):
        shapes = {name: tuple(param.shape) for name, param in recipe.model.build().named_parameters()}
    name = "master" if kind == "raw" else f"ema/{profile or recipe.ema.profiles[0]}"
    flats = {n: torch.empty(torch.Size(shape).numel()) for n, shape in shapes.items()}
    segments = [(Segment(n, shape, 0, flats[n].numel(), 0),) for n, shape in shapes.items()]
    copy_ranges(found.uri, len(found.manifest["files"]), segments, {name: list(flats.values())})
    state_dict = {n: flats[n].view(shape) for n, shape in shapes.items()}
    buffers = (
        {n: b for n, b in recipe.model.build().state_dict().items() if n not in shapes}
        if recipe.model.pos_stored
        else {}
    )
    meta = weights_meta(recipe, info, kind=kind, images_seen=int(found.state["images_seen"]), run=run)
    if kind == "ema" and profile:
        meta["ema_profile"] = profile
    write(out, state_dict | buffers, meta)
    return sum(flat.numel() for flat in flats.values())
