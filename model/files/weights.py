"""Exported weights: one safetensors file with metadata that describe it (key "beeline", JSON). Nothing is unpickled.

meta: {"kind": "raw"|"ema", "backbone", "config", "formulation", "shift", "text_spec", "vae", "resolution",
"recipe_hash", "data_fingerprint", "images_seen", "code_version", "run"}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infra.codec import from_json
from infra.errors import UserError, list_some
from model.backbone import read_config
from model.backbones.trunk import TokenConfig

META_KEY = "beeline"
REQUIRED_META: dict[str, type] = {"kind": str, "backbone": str, "config": dict}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """UserError that names missing and extra tensors, and those of another shape, of fp8 or integers, or not finite."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    shapes = [
        f"{name}: {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(set(found) & set(expected))
        if found[name].shape != expected[name].shape
    ]
    types = [f"{name}: {x.dtype}" for name, x in found.items() if x.dtype not in FLOATS]
    broken = [n for n, x in found.items() if x.dtype in FLOATS and not x.is_meta and not torch.isfinite(x).all()]
    named = (
        ("missing", missing),
        ("unexpected", extra),
        ("misshapen", shapes),
        ("of a type other than fp16, bf16, fp32", types),
        ("not finite", broken),
    )
    problems = [f"{len(names)} {what} ({list_some(names)})" for what, names in named if names]
    if problems:
        raise UserError(f"{source}: tensors {'; '.join(problems)}; these weights do not fit the model")


def save_weights(path: str | Path, state_dict: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Write the file atomically. UserError unless the tensors fit the backbone that `meta` describes. (Under ZeRO-3 a
    module's own tensors are empty and do not fit.)"""
    check_meta(meta, str(path))
    check_tensors(state_dict, list_expected_tensors(meta), str(path))
    return write_safetensors(Path(path), state_dict, meta)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Write any tensors with our metadata, atomically."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        save_file(contiguous, partial, metadata={META_KEY: json.dumps(dict(meta)), "format": "pt"})
        apply_umask(partial)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def apply_umask(*paths: Path) -> None:
    """Give files the usual permissions: safetensors' writer makes them readable for their owner alone (0600)."""
    mask = os.umask(0)
    os.umask(mask)
    for path in paths:
        path.chmod(0o666 & ~mask)


def read_meta(path: str | Path) -> dict[str, Any]:
    """The metadata alone, without reading tensors."""
    return _open(path)[1]


def _open(path: str | Path) -> tuple[Any, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise UserError(f"no weights file at {path}; expected a .safetensors file that the trainer exported")
    try:
        file = safe_open(str(path), framework="pt")
        text = (file.metadata() or {}).get(META_KEY)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error})") from None
    if text is None:
        raise UserError(f"{path} has no {META_KEY!r} metadata; SD3 or diffusers: `python -m model convert` first")
    meta = from_json(dict[str, Any], text, where=f"{path}: {META_KEY} metadata")
    check_meta(meta, str(path))
    return file, meta


def add_config(config: TokenConfig, meta: Mapping[str, Any]) -> dict[str, Any]:
    """`meta` with the backbone and config of these weights."""
    return {**meta, "backbone": config.name, "config": config.to_json()}


def check_meta(meta: Mapping[str, Any], source: str) -> None:
    wrong = [key for key, kind in REQUIRED_META.items() if not isinstance(meta.get(key), kind)]
    if wrong or meta["kind"] not in ("raw", "ema"):
        raise UserError(f"{source}: weights metadata lacks {wrong or 'kind raw|ema'}; found keys {sorted(meta)}")


def list_expected_tensors(meta: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names and shapes that the described backbone has, on the meta device."""
    with torch.device("meta"):
        return read_config(meta["backbone"], meta["config"]).build().state_dict()


def add_qk_norm(
    backbone: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Add QK-norm with scales 1 to weights that were trained without it (SD3 section 5.3.2): (config, weights).

    The network then computes something else, as logits are now bounded by 8. Training continues from these weights.
    """
    if config.get("qk_norm"):
        raise UserError(f"{source} has QK-norm already")
    normed = {**config, "qk_norm": True}
    expected = list_expected_tensors({"backbone": backbone, "config": normed})
    scales = {n: torch.ones(x.shape) for n, x in expected.items() if n not in state_dict and ".norm_" in n}
    dtype = next(iter(state_dict.values())).dtype
    return normed, {**state_dict, **{name: scale.to(dtype) for name, scale in scales.items()}}


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state_dict, meta), checked against the backbone that the file describes."""
    file, meta = _open(path)
    state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    check_tensors(state_dict, list_expected_tensors(meta), str(path))
    return state_dict, meta


def load_model(path: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """The module with its weights, in eval mode, and the file's metadata."""
    state_dict, meta = load_weights(path)
    model = read_config(meta["backbone"], meta["config"]).build()
    model.load_state_dict(state_dict)
    return model.to(dtype).eval(), meta
