"""Weights in and out: SD3/SD3.5 single files and diffusers folders to ours, and ours to either.

A whole StableDiffusion3Pipeline folder is written from our weights; encoders and autoencoder join it where given.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from model.errors import ModelError
from model.mmdit import MMDiTConfig
from model.names import (
    SD3_PREFIX,
    config_of_diffusers,
    diffusers_config,
    from_diffusers,
    from_sd3,
    to_diffusers,
    to_sd3,
)
from model.weights import META_KEY, add_qk_norm, check_tensors, load_weights, save_weights

Dialect = Literal["beeline", "sd3", "diffusers"]
# Component -> (class in diffusers or transformers, the encoder's seat).
_ENCODER_PARTS = {
    "clip_l": ("text_encoder", "tokenizer"),
    "clip_g": ("text_encoder_2", "tokenizer_2"),
    "t5": ("text_encoder_3", "tokenizer_3"),
}


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
    else becomes ours. `kind` labels weights that come from elsewhere; `with_qk_norm` adds QK-norm to weights without.
    """
    found, config, state, meta = read_any(Path(source), kind)
    if with_qk_norm:
        changed, state = add_qk_norm("mmdit", config.to_json(), state, str(source))
        config = MMDiTConfig.from_json(changed)
    if to is None:
        to = "beeline" if found != "beeline" else "sd3" if target.suffix == ".safetensors" else "diffusers"
    if to == "beeline":
        save_weights(target, state, {**meta, "backbone": "mmdit", "config": config.to_json()})
    elif to == "sd3":
        write_sd3(target, config, state, meta)
    elif to == "diffusers":
        write_pipeline(target, config, state, meta, vae=vae, encoders=encoders or {})
    else:
        raise ModelError(f"unknown dialect {to!r}; known: beeline, sd3, diffusers")
    count = config.parameter_count()
    return f"{source} ({found}) -> {target} ({to}): mmdit depth {config.depth}, {count:,} parameters, {meta['kind']}"


def read_any(source: Path, kind: str) -> tuple[Dialect, MMDiTConfig, dict[str, Tensor], dict[str, Any]]:
    """(dialect, config, our state dict, metadata)."""
    if source.is_dir():
        return _read_folder(source, kind)
    if not source.is_file():
        raise ModelError(f"nothing at {source}; expected a .safetensors file or a diffusers folder")
    metadata, tensors = _read_safetensors(source)
    if META_KEY in metadata and not any(k.startswith(SD3_PREFIX) for k in tensors):
        state, meta = load_weights(source)
        if meta["backbone"] != "mmdit":
            raise ModelError(f"{source} holds a {meta['backbone']}; only mmdit has other dialects")
        return "beeline", MMDiTConfig.from_json(meta["config"]), state, meta
    config, state = from_sd3(tensors, str(source))
    return "sd3", *_restore(config, state, metadata, kind)


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file ({error})") from None


def _read_folder(source: Path, kind: str) -> tuple[Dialect, MMDiTConfig, dict[str, Tensor], dict[str, Any]]:
    folder = source / "transformer" if (source / "model_index.json").is_file() else source
    if not (folder / "config.json").is_file():
        raise ModelError(f"no config.json in {folder}; expected a diffusers transformer or pipeline folder")
    config = config_of_diffusers(json.loads((folder / "config.json").read_text()), str(folder))
    metadata: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        more, part = _read_safetensors(file)
        metadata, tensors = metadata | more, tensors | part
    if not tensors:
        raise ModelError(f"no diffusion_pytorch_model*.safetensors in {folder}")
    return "diffusers", *_restore(config, from_diffusers(config, tensors, str(folder)), metadata, kind)


def _restore(
    config: MMDiTConfig, state: dict[str, Tensor], metadata: Mapping[str, str], kind: str
) -> tuple[MMDiTConfig, dict[str, Tensor], dict[str, Any]]:
    """Files that we wrote carry our metadata, hence our config: positions are then a formula again."""
    if META_KEY not in metadata:
        return config, state, {"kind": kind}
    meta = json.loads(metadata[META_KEY])
    ours = MMDiTConfig.from_json(meta["config"])
    with torch.device("meta"):
        expected = ours.build().state_dict()
    kept = {name: tensor for name, tensor in state.items() if name in expected}
    check_tensors(kept, expected, "converted weights")
    return ours, kept, meta


def _our_metadata(config: MMDiTConfig, meta: Mapping[str, Any]) -> dict[str, str]:
    described = {**meta, "backbone": "mmdit", "config": config.to_json()}
    return {"format": "pt", META_KEY: json.dumps(described)}


def write_sd3(target: Path, config: MMDiTConfig, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in to_sd3(config, state).items()}
    save_file(tensors, target, metadata=_our_metadata(config, meta))


def write_pipeline(
    target: Path,
    config: MMDiTConfig,
    state: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    vae: Path | None = None,
    encoders: Mapping[str, Path],
) -> None:
    """A folder for StableDiffusion3Pipeline.from_pretrained; parts that are not given are stated as absent."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, __version__
    from safetensors.torch import save_file

    unknown = set(encoders) - set(_ENCODER_PARTS)
    if unknown:
        raise ModelError(f"encoders for unknown seats {sorted(unknown)}; known: {', '.join(_ENCODER_PARTS)}")
    folder = target / "transformer"
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        transformer: Any = SD3Transformer2DModel(**diffusers_config(config))
    transformer.save_config(folder)
    tensors = {name: tensor.contiguous() for name, tensor in to_diffusers(config, state).items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata=_our_metadata(config, meta))
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=meta.get("shift", 1.0))
    scheduler.save_pretrained(target / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": __version__,
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "vae": ["diffusers", "AutoencoderKL"] if vae else [None, None],
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
    }
    if vae:
        AutoencoderKL.from_pretrained(str(vae), local_files_only=True).save_pretrained(target / "vae")
    for seat, parts in _ENCODER_PARTS.items():
        entries = _write_encoder(seat, Path(encoders[seat]), target) if seat in encoders else ([None, None],) * 2
        index.update(zip(parts, entries, strict=True))
    (target / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (target / "README.md").write_text(
        _card(config, meta, [name for name, entry in index.items() if entry == [None, None]])
    )


def _write_encoder(seat: str, source: Path, target: Path) -> tuple[list[str], list[str]]:
    """Copy one encoder and its tokenizer into the pipeline; returns their entries for model_index.json."""
    from model.encoders import load_tokenizer

    model_folder, tokenizer_folder = (target / part for part in _ENCODER_PARTS[seat])
    if not (source / "config.json").is_file():
        raise ModelError(f"no config.json in {source}; the {seat} encoder must be a transformers folder")
    model_folder.mkdir(parents=True, exist_ok=True)
    for file in [source / "config.json", *sorted(source.glob("model*.safetensors*"))]:
        shutil.copy2(file, model_folder)
    tokenizer = load_tokenizer(source)
    tokenizer.save_pretrained(tokenizer_folder)
    model_class = "T5EncoderModel" if seat == "t5" else "CLIPTextModelWithProjection"
    return ["transformers", model_class], ["transformers", type(tokenizer).__name__]


def _card(config: MMDiTConfig, meta: Mapping[str, Any], absent: list[str]) -> str:
    """The model card: what this is, where it comes from, how to load it."""
    optional = ("image_encoder", "feature_extractor")
    needed = [name for name in absent if name not in optional]
    arguments = ", ".join(["FOLDER", *(f"{name}=None" for name in needed)])
    facts = {k: v for k, v in meta.items() if k not in ("config", "text_spec", "vae")}
    lines = [
        "---",
        "library_name: diffusers",
        "tags: [text-to-image, rectified-flow]",
        "---",
        f"# MM-DiT of depth {config.depth}, {config.parameter_count():,} parameters",
        "",
        "Load with:",
        "",
        "```python",
        "from diffusers import StableDiffusion3Pipeline",
        f"pipeline = StableDiffusion3Pipeline.from_pretrained({arguments})",
        "```",
        "",
    ]
    if needed:
        lines += [
            f"Not included, hence passed as None: {', '.join(needed)}. Pass prompt embeddings or latents instead.",
            "",
        ]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    return "\n".join(lines) + "\n"
