"""LoRA adapters from elsewhere: diffusers' names and kohya's (sd-scripts, OneTrainer), as changes of our weights."""
# Shapes: O outputs, I inputs, R rank.

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.codec import from_json
from infra.errors import UserError, list_some, nearest
from model.backbones.mmdit import MMDiTConfig
from model.files.names import is_swapped, swap_halves, to_diffusers_names, to_sd3_name

# How the module's name and the role of a tensor are written: peft and diffusers; kohya; diffusers before peft.
_DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight")
_UP = (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight")
_PREFIXES = (
    "transformer.", "base_model.model.", "lora_unet_", "lora_transformer_", "model.diffusion_model.",
    "diffusion_model.", "unet.",
)  # fmt: skip
# Where files without a tensor of alpha state it: peft's settings, in the metadata of diffusers or in a file beside.
CONFIG_FILE = "adapter_config.json"
_SETTINGS_KEY = "lora_adapter_metadata"
_WHOLE = -1  # no part of a fused qkv


def read_foreign_adapter(path: Path, config: MMDiTConfig) -> dict[str, Tensor]:
    """Our weight's name -> what the adapter adds to it, (O, I) in fp32.

    A module's scale is its alpha over its rank, 1 where no alpha is stated. UserError names what belongs to no layer.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            settings = _read_settings(path, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error})") from None
    modules, strange = _collect(tensors)
    if not modules:
        raise UserError(f"{path}: no LoRA: expected names that end in {', '.join((*_DOWN[:3], *_UP[:3]))}")
    targets = _list_targets(config)
    parts: dict[tuple[str, bool], dict[int, Tensor]] = {}
    for name, (down_RI, up_OR, alpha) in modules.items():
        target = targets.get(_flatten(name))
        if target is None:
            strange.append(name)
            continue
        if down_RI.shape[0] != up_OR.shape[1]:
            raise UserError(f"{path}: {name} has rank {down_RI.shape[0]} on one side and {up_OR.shape[1]} on the other")
        scale = _find_scale(alpha, settings, down_RI.shape[0])
        ours, swapped, number = target
        parts.setdefault((ours, swapped), {})[number] = scale * (up_OR.float() @ down_RI.float())
    if strange:
        hint = nearest(_flatten(strange[0]), targets)
        raise UserError(
            f"{path}: {len(strange)} tensors belong to no layer of an mmdit of depth {config.depth}: "
            f"{list_some(sorted(strange))}{hint}; prefixes that are read: {', '.join(_PREFIXES)}"
        )
    return {ours: _join(found, swapped) for (ours, swapped), found in parts.items()}


def _read_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings of the adapter; {} where none are stated. UserError for those that we do not compute."""
    beside = path.with_name(CONFIG_FILE)
    if _SETTINGS_KEY in metadata:
        found = from_json(dict[str, Any], metadata[_SETTINGS_KEY], where=f"{path}: {_SETTINGS_KEY}")
        found = {name.removeprefix("transformer."): value for name, value in found.items()}
    else:
        found = from_json(dict[str, Any], beside.read_bytes(), where=str(beside)) if beside.is_file() else {}
    unusual = [name for name in ("use_dora", "alpha_pattern", "fan_in_fan_out") if found.get(name)]
    if unusual:
        raise UserError(f"{path}: {unusual[0]} is {found[unusual[0]]!r}: merge this adapter with peft itself")
    return found


def _find_scale(alpha: float | None, settings: Mapping[str, Any], rank: int) -> float:
    """Alpha over the rank (rsLoRA, arXiv 2312.03732: over its root); a tensor of alpha goes before the settings."""
    if alpha is None and settings.get("lora_alpha") is None:
        return 1.0
    rooted = alpha is None and settings.get("use_rslora")
    return float(settings["lora_alpha"] if alpha is None else alpha) / (math.sqrt(rank) if rooted else rank)


def _collect(tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor, float | None]], list[str]]:
    """Modules with (down, up, alpha), and the names of tensors that are no part of one."""
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    alphas: dict[str, Tensor] = {}
    strange: list[str] = []
    for name, tensor in tensors.items():
        for suffixes, found in ((_DOWN, downs), (_UP, ups), ((".alpha",), alphas)):
            suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), None)
            if suffix is not None:
                found[name.removesuffix(suffix)] = tensor
                break
        else:
            strange.append(name)
    strange += sorted((downs.keys() ^ ups.keys()) | (alphas.keys() - downs.keys()))
    complete = {
        name: (down.flatten(1), ups[name].flatten(1), float(alphas[name]) if name in alphas else None)
        for name, down in downs.items() if name in ups
    }  # fmt: skip
    return complete, strange


def _list_targets(config: MMDiTConfig) -> dict[str, tuple[str, bool, int]]:
    """Flattened module name in either dialect -> (our weight, do its halves change places, part of a fused qkv)."""
    with torch.device("meta"):
        weights = [name for name, p in config.build().named_parameters() if name.endswith(".weight") and p.ndim == 2]
    found = {}
    for name in weights:
        found[_flatten(to_sd3_name(name).removesuffix(".weight"))] = name, False, _WHOLE
        theirs = to_diffusers_names(name)
        for number, part in enumerate(theirs):
            number = number if len(theirs) > 1 else _WHOLE
            found[_flatten(part.removesuffix(".weight"))] = name, is_swapped(name, config), number
    return found


def _flatten(module: str) -> str:
    """Names without prefix and with one separator: kohya writes dots as underscores."""
    while prefix := next((prefix for prefix in _PREFIXES if module.startswith(prefix)), None):
        module = module.removeprefix(prefix)
    return module.replace(".", "_")


def _join(parts: Mapping[int, Tensor], swapped: bool) -> Tensor:
    """The parts of a fused weight; an adapter may leave some of them as they are."""
    like = next(iter(parts.values()))
    if _WHOLE in parts:
        return swap_halves(like) if swapped else like
    return torch.cat([parts.get(number, torch.zeros_like(like)) for number in range(3)])
