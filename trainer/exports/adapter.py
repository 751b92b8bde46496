"""The adapters of a run alone: in peft's layout under our names, or as diffusers' `load_lora_weights` takes them."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from data_pipeline.formats.schema import DatasetInfo
from infra import storage
from infra.codec import to_json
from infra.errors import UserError
from model.backbones.mmdit import MMDiTConfig
from model.files.adapters import CONFIG_FILE
from model.files.names import adapter_to_diffusers
from model.files.weights import list_expected_tensors
from model.lora import WEIGHTS_FILE, make_peft_config, name_adapter, to_peft_name
from trainer.exports.card import describe_weights, format_model_card
from trainer.exports.export import StoredWeights, Weights, stream_file
from trainer.runfolder import name_run
from trainer.zero.rankfile import put_hashed

DIFFUSERS_ADAPTER = "pytorch_lora_weights.safetensors"


def export_adapter(folder: str, *, kind: str, profile: str | None, info: DatasetInfo, run: str, out: str) -> int:
    """The adapters of a checkpoint alone, as a folder in peft's layout; the number of parameters."""
    stored = StoredWeights(folder, kind=kind, profile=profile)
    recipe = stored.recipe
    if recipe.lora.rank is None:
        raise UserError(f"{folder}: this run trained all of its weights and has no adapter: omit --lora")
    meta = _describe_adapter(stored, info, kind=kind, run=run)
    shapes = {to_peft_name(name): shape for name, shape in stored.shapes.items()}
    ours = {to_peft_name(name): name for name in stored.shapes}
    weights = Weights(shapes, lambda name: stored(ours[name]), meta)
    put_hashed(storage.join(out, WEIGHTS_FILE), stream_file(shapes, weights.items(), meta))
    config = make_peft_config(stored.shapes, rank=recipe.lora.rank, alpha=recipe.lora_alpha)
    storage.write_bytes(storage.join(out, CONFIG_FILE), json.dumps(to_json(config), indent=1).encode())
    storage.write_bytes(storage.join(out, "README.md"), format_model_card(run, meta, file=WEIGHTS_FILE).encode())
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def export_diffusers_adapter(
    folder: str, *, kind: str, profile: str | None, info: DatasetInfo, run: str, out: str
) -> int:
    """The adapters of a checkpoint for diffusers' `load_lora_weights`: one file in the folder `out`."""
    stored = StoredWeights(folder, kind=kind, profile=profile)
    recipe = stored.recipe
    if recipe.lora.rank is None or not isinstance(recipe.model, MMDiTConfig):
        raise UserError(f"{folder}: no adapters on an MM-DiT, so nothing that diffusers could read: omit --lora")
    names = list_expected_tensors({"backbone": "mmdit", "config": recipe.model.to_json()})
    adapters = {name: name_adapter(name) for name in names if name_adapter(name)[0] in stored.shapes}
    model, scale = recipe.model, recipe.lora_alpha / recipe.lora.rank
    meta = _describe_adapter(stored, info, kind=kind, run=run)

    def to_theirs(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        ours = ((name, state[a], state[b]) for name, (a, b) in adapters.items())
        return adapter_to_diffusers(model, ours, scale=scale)

    likes = {name: torch.empty(shape, device="meta") for name, shape in stored.shapes.items()}
    shapes = {name: tuple(like.shape) for name, like in to_theirs(likes)}
    put_hashed(
        storage.join(out, DIFFUSERS_ADAPTER), stream_file(shapes, to_theirs(Weights(stored.shapes, stored, meta)), meta)
    )
    card = format_model_card(run, meta, file=DIFFUSERS_ADAPTER)
    storage.write_bytes(storage.join(out, "README.md"), card.encode())
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def _describe_adapter(stored: StoredWeights, info: DatasetInfo, *, kind: str, run: str) -> dict[str, Any]:
    meta = describe_weights(stored.recipe, info, kind=kind, images_seen=stored.images_seen, run=name_run(run))
    return meta | {"init_weights": stored.recipe.init_weights}
