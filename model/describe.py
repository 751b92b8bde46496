"""What `python -m model info` and `formulations` print, as plain dicts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from infra.codec import from_json
from infra.errors import UserError, nearest
from model.activations import count_activations
from model.backbone import BACKBONES, read_config
from model.backbones.trunk import TokenConfig
from model.diffusion.flow import FORMULATIONS, Formulation
from model.diffusion.grids import get_level, integrates_over_sigma, make_sampling_grid
from model.diffusion.paths import EDM
from model.encoders.text import TextSpec
from model.encoders.vae import Latents
from model.files.weights import read_meta
from model.flops import estimate_train_flops

RESOLUTIONS = (256, 512, 1024)
# SD3's: pixels per latent pixel, 77 CLIP and 77 T5 tokens.
LATENT_FACTOR, TEXT_TOKENS = 8, 154
MAX_DEPTH = 256


def describe(model: str, *, qk_norm: bool = True, text_tokens: int | None = None) -> dict[str, Any]:
    """Parameters and costs of "d24", "dit-d24" or of an exported weights file, whose metadata name its autoencoder's
    factor and its text's length. None: more tokens than its position table holds."""
    factor, tokens = LATENT_FACTOR, TEXT_TOKENS
    if Path(model).suffix == ".safetensors":
        if not qk_norm:
            raise UserError(f"--no-qk-norm describes a depth, not {model}, which states its own")
        meta = read_meta(model)
        config = read_config(meta["backbone"], meta["config"])
        row: dict[str, Any] = {k: v for k, v in meta.items() if k not in ("config", "text_spec", "vae")}
        if meta.get("vae"):
            factor = from_json(Latents, meta["vae"], where=f"{model}: vae").factor
        if meta.get("text_spec"):
            tokens = TextSpec.from_json(meta["text_spec"]).context_tokens
    else:
        config, row = _read_name(model, qk_norm), {"backbone": model}
    tokens = tokens if text_tokens is None else text_tokens
    if tokens < 1:
        raise UserError(f"{tokens} text tokens; expected at least 1")
    row |= {
        "width": config.width,
        "parameters": config.count_parameters(),
        "text_tokens": tokens,
        "pixels_per_latent_pixel": factor,
        "config": config.to_json(),
    }
    for resolution in RESOLUTIONS:
        side = resolution // factor
        fits = side // config.patch <= config.pos_max
        row[f"forward_flops_{resolution}"] = config.count_forward_flops(side, side, tokens) if fits else None
        row[f"train_flops_{resolution}"] = estimate_train_flops(config, side, side, tokens) if fits else None
        shape = (config.in_channels, side, side)
        kept = count_activations(config, shape, tokens, torch.bfloat16).whole if fits else None
        row[f"activation_bytes_{resolution}"] = kept
    return row


def _read_name(model: str, qk_norm: bool) -> TokenConfig:
    match = re.fullmatch(r"(?:([a-z0-9_]+)-)?d(\d+)", model)
    if match is None:
        raise UserError(f"cannot read model {model!r}; expected d24, dit-d24, ... or a .safetensors file")
    backbone, depth = match[1] or "mmdit", int(match[2])
    if depth > MAX_DEPTH:
        raise UserError(f"a depth of {depth} would take long to describe; expected at most {MAX_DEPTH}")
    if backbone not in BACKBONES:
        raise UserError(f"unknown backbone {backbone!r}{nearest(backbone, BACKBONES)}; known: {', '.join(BACKBONES)}")
    return read_config(backbone, {"depth": depth, "qk_norm": qk_norm})


def list_formulations() -> list[dict[str, Any]]:
    return [_describe_formulation(form) for form in FORMULATIONS.values()]


def _describe_formulation(form: Formulation) -> dict[str, Any]:
    grid = make_sampling_grid(form, 25)
    terminal = get_level(form, grid[0])
    edm = isinstance(form.path, EDM)
    return {
        "name": form.name,
        "path": form.path.formula,
        "target": form.target,
        "input_scale": "1/sqrt(sigma^2+0.25)" if edm else "1",
        "network_time": "ln(sigma)/4" if edm else "t",
        "weight": form.weight_formula,
        "loss_over_unified_loss": form.weight_constant,
        "density": form.density.name,
        "sampling_grid": {
            "coordinate": "sigma" if integrates_over_sigma(form) else "t",
            "spacing": _describe_spacing(form),
            "start": float(grid[0]),
            "end": 0.0,
            "terminal": {"a": float(terminal.a), "b": float(terminal.b)},
        },
    }


def _describe_spacing(form: Formulation) -> str:
    if isinstance(form.path, EDM):
        return "Karras, rho 7, sigma 80 to 0.002, then 0"
    return "trailing levels, then 0" if integrates_over_sigma(form) else "uniform in t"
