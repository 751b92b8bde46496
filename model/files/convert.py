"""Weights in and out: SD3/SD3.5 single files and diffusers folders to ours, and ours to either (`pipeline.py`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from infra.codec import from_json
from infra.errors import UserError, list_some
from model.backbones.mmdit import MMDiTConfig
from model.files.names import SD3_PREFIX, from_diffusers, from_sd3, read_diffusers_config, to_sd3
from model.files.pipeline import TRANSFORMER, write_pipeline
from model.files.weights import (
    META_KEY,
    add_config,
    add_qk_norm,
    check_meta,
    check_tensors,
    load_weights,
    save_weights,
    write_safetensors,
)

_SHARD = re.compile(r"-\d+-of-\d+")
Dialect = Literal["beeline", "sd3", "diffusers"]


def convert(
    source: Path,
    target: Path,
    *,
    to: Dialect | None = None,
    kind: Literal["raw", "ema"] = "ema",
    with_qk_norm: bool = False,
    vae: Path | None = None,
    encoders: Mapping[str, Path] | None = None,
) -> str:
    """Read `source` in whatever dialect it has, write `target`; returns one line that says what was done.

    Without `to`: our weights become a diffusers folder (or an SD3 file where target ends in .safetensors), anything
    else becomes ours. `kind` labels weights that come from elsewhere; `with_qk_norm` adds QK-norm where it is missing.
    """
    source, target = Path(source), Path(target)
    found, config, state, meta = read_any(source, kind)
    if with_qk_norm:
        changed, state = add_qk_norm("mmdit", config.to_json(), state, str(source))
        config = MMDiTConfig.from_json(changed)
    if to is None:
        to = "beeline" if found != "beeline" else "sd3" if target.suffix == ".safetensors" else "diffusers"
    if source.resolve() in (target.resolve(), (target / "transformer").resolve()):
        raise UserError(f"{target} would overwrite {source}, which it is made from; give another target")
    check_target(target, to)
    given = [*(["vae"] if vae else []), *(encoders or {})]
    if given and to != "diffusers":
        raise UserError(f"{', '.join(given)} given, but only a diffusers pipeline carries them, not dialect {to}")
    if to == "diffusers":
        write_pipeline(target, config, state, meta, vae=vae, encoders=encoders or {})
    elif to == "sd3":
        write_safetensors(target, dict(to_sd3(config, state)), add_config(config, meta))
    else:
        save_weights(target, state, add_config(config, meta))
    count = config.count_parameters()
    return f"{source} ({found}) -> {target} ({to}): mmdit depth {config.depth}, {count:,} parameters, {meta['kind']}"


def check_target(target: Path, to: str) -> None:
    """Refuse a name that does not say what will be there: a file, or a folder."""
    if to not in get_args(Dialect):
        raise UserError(f"unknown dialect {to!r}; known: {', '.join(get_args(Dialect))}")
    if to == "diffusers":
        if target.suffix == ".safetensors" or target.is_file():
            raise UserError(f"{target}: dialect diffusers is a folder; give the name of one")
    elif target.suffix != ".safetensors" or target.is_dir():
        raise UserError(f"{target}: dialect {to} is one file; give a name that ends in .safetensors")


def read_any(source: Path, kind: str) -> tuple[Dialect, MMDiTConfig, dict[str, Tensor], dict[str, Any]]:
    """(dialect, config, our state dict, metadata)."""
    if source.is_dir():
        return _read_folder(source, kind)
    if not source.is_file():
        raise UserError(f"nothing at {source}; expected a .safetensors file or a diffusers folder")
    metadata, tensors = _read_safetensors(source)
    if META_KEY in metadata and not any(k.startswith(SD3_PREFIX) for k in tensors):
        state, meta = load_weights(source)
        if meta["backbone"] != "mmdit":
            raise UserError(f"{source} holds a {meta['backbone']}; only mmdit has other dialects")
        return "beeline", MMDiTConfig.from_json(meta["config"]), state, meta
    config, state = from_sd3(tensors, str(source))
    return "sd3", *_restore(config, state, metadata, kind)


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error})") from None


def _read_folder(source: Path, kind: str) -> tuple[Dialect, MMDiTConfig, dict[str, Tensor], dict[str, Any]]:
    folder = source / "transformer" if (source / "model_index.json").is_file() else source
    if not (folder / "config.json").is_file():
        raise UserError(f"no config.json in {folder}; expected a diffusers transformer or pipeline folder")
    fields = from_json(dict[str, Any], (folder / "config.json").read_bytes(), where=f"{folder}/config.json")
    config = read_diffusers_config(fields, str(folder))
    metadata: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    spare: dict[str, Tensor] = {}
    index = _find_index(folder)
    file_of = _read_weight_map(index) if index else {}
    for file in list_weight_files(folder):
        more, part = _read_safetensors(file)
        metadata = metadata | more
        for name, tensor in part.items():  # of a tensor in several files the one that the index names counts
            (tensors if file_of.get(name, file.name) == file.name else spare)[name] = tensor
    return "diffusers", *_restore(config, from_diffusers(config, spare | tensors, str(folder)), metadata, kind)


def list_weight_files(folder: Path) -> list[Path]:
    """The files of one set of weights in a folder of diffusers; UserError where it would be a guess.

    An index decides alone, whatever else lies beside it. Without one there must be a single candidate: variants
    (fp16, non_ema) and left-over shards are other weights.
    """
    if index := _find_index(folder):
        files = [folder / name for name in sorted(set(_read_weight_map(index).values()))]
        missing = [file.name for file in files if not file.is_file() or file.parent != folder]
        if missing:
            raise UserError(f"{index.name} names files that {folder} lacks: {list_some(missing)}")
        return files
    indices = _list_indices(folder)
    single = folder / f"{TRANSFORMER}.safetensors"
    found = sorted(folder.glob(f"{TRANSFORMER}*.safetensors"))
    candidates = (
        [file.name for file in (*indices, *([single] if single in found else []))]
        if indices
        else [file.name for file in found]
    )
    if not found:
        raise UserError(f"no {TRANSFORMER}*.safetensors in {folder}")
    if len(candidates) > 1:
        raise UserError(
            f"{folder} holds several candidates and no {single.name}.index.json that decides: {list_some(candidates)}; "
            "keep one, or give the file itself"
        )
    if _SHARD.search(found[0].name):
        raise UserError(f"{folder} holds {found[0].name} without an index: other shards are missing")
    return found


def _find_index(folder: Path) -> Path | None:
    """The index that decides: the plain one, or that of a variant where there is nothing else."""
    indices = _list_indices(folder)
    plain, single = folder / f"{TRANSFORMER}.safetensors.index.json", folder / f"{TRANSFORMER}.safetensors"
    if plain in indices:
        return plain
    return indices[0] if len(indices) == 1 and not single.is_file() else None


def _list_indices(folder: Path) -> list[Path]:
    """diffusers puts the variant behind `index`: diffusion_pytorch_model.safetensors.index.fp16.json."""
    return sorted(folder.glob(f"{TRANSFORMER}*.safetensors.index*.json"))


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = from_json(dict[str, Any], index.read_bytes(), where=str(index)).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict) or {type(name) for name in weight_map.values()} != {str}:
        raise UserError(f"{index}: no weight_map of file names; download the folder again")
    return weight_map


def _restore(
    config: MMDiTConfig, state: dict[str, Tensor], metadata: Mapping[str, str], kind: str
) -> tuple[MMDiTConfig, dict[str, Tensor], dict[str, Any]]:
    """Files that we wrote carry our metadata, hence our config: positions are then a formula again."""
    if META_KEY not in metadata:
        return config, state, {"kind": kind}
    meta = from_json(dict[str, Any], metadata[META_KEY], where=f"{META_KEY} metadata")
    check_meta(meta, f"{META_KEY} metadata")
    ours = MMDiTConfig.from_json(meta["config"])
    with torch.device("meta"):
        expected = ours.build().state_dict()
    kept = {name: tensor for name, tensor in state.items() if name in expected}
    check_tensors(kept, expected, "converted weights")
    return ours, kept, meta
