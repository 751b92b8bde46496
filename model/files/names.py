"""Names of MM-DiT tensors in three dialects: ours, the SD3 reference's single files, diffusers' SD3Transformer2DModel.

SD3 differs from ours in names only. diffusers splits qkv, and stores scale before shift in the two 2-way modulations.
"""
# Shapes: P grid positions per axis, D width.

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from infra.errors import UserError, list_some
from model.backbones.attention import HEAD_WIDTH
from model.backbones.mmdit import MMDiTConfig
from model.backbones.position import PositionTable
from model.backbones.trunk import TokenConfig
from model.files.weights import check_tensors

SD3_PREFIX = "model.diffusion_model."
POSITIONS = "positions.axes_2PD"

# ours -> SD3, as (pattern, replacement); the inverse is the same table read backwards.
_SD3_TOP = {
    "patch_embed.proj": "x_embedder.proj",
    "condition.time.inner": "t_embedder.mlp.0",
    "condition.time.outer": "t_embedder.mlp.2",
    "condition.pooled.inner": "y_embedder.mlp.0",
    "condition.pooled.outer": "y_embedder.mlp.2",
    "context_embed": "context_embedder",
    "final.modulate.linear": "final_layer.adaLN_modulation.1",
    "final.linear": "final_layer.linear",
}
_SD3_STREAM = {
    "modulate.linear": "adaLN_modulation.1",
    "qkv.linear": "attn.qkv",
    "qkv.norm_q": "attn.ln_q",
    "qkv.norm_k": "attn.ln_k",
    "out": "attn.proj",
    "mlp.inner": "mlp.fc1",
    "mlp.outer": "mlp.fc2",
}
_SD3_SELF = {"qkv.linear": "attn2.qkv", "qkv.norm_q": "attn2.ln_q", "qkv.norm_k": "attn2.ln_k", "out": "attn2.proj"}

_DIFFUSERS_TOP = {
    "patch_embed.proj": "pos_embed.proj",
    "condition.time.inner": "time_text_embed.timestep_embedder.linear_1",
    "condition.time.outer": "time_text_embed.timestep_embedder.linear_2",
    "condition.pooled.inner": "time_text_embed.text_embedder.linear_1",
    "condition.pooled.outer": "time_text_embed.text_embedder.linear_2",
    "context_embed": "context_embedder",
    "final.modulate.linear": "norm_out.linear",
    "final.linear": "proj_out",
}
_DIFFUSERS_PART = {
    "image.modulate.linear": "norm1.linear",
    "image.qkv.linear": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "image.qkv.norm_q": "attn.norm_q",
    "image.qkv.norm_k": "attn.norm_k",
    "image.out": "attn.to_out.0",
    "image.mlp.inner": "ff.net.0.proj",
    "image.mlp.outer": "ff.net.2",
    "text.modulate.linear": "norm1_context.linear",
    "text.qkv.linear": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "text.qkv.norm_q": "attn.norm_added_q",
    "text.qkv.norm_k": "attn.norm_added_k",
    "text.out": "attn.to_add_out",
    "text.mlp.inner": "ff_context.net.0.proj",
    "text.mlp.outer": "ff_context.net.2",
    "self_attention.qkv.linear": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "self_attention.qkv.norm_q": "attn2.norm_q",
    "self_attention.qkv.norm_k": "attn2.norm_k",
    "self_attention.out": "attn2.to_out.0",
}


def to_sd3_name(ours: str) -> str:
    """Our parameter name in the SD3 dialect, without prefix."""
    stem, leaf = ours.rsplit(".", 1)
    if not stem.startswith("blocks."):
        return f"{_SD3_TOP[stem]}.{leaf}"
    _, index, part, rest = stem.split(".", 3)
    if part == "self_attention":
        return f"joint_blocks.{index}.x_block.{_SD3_SELF[rest]}.{leaf}"
    return f"joint_blocks.{index}.{'x' if part == 'image' else 'context'}_block.{_SD3_STREAM[rest]}.{leaf}"


def to_diffusers_names(ours: str) -> tuple[str, ...]:
    """Our parameter name in the diffusers dialect: one name, or three for a fused qkv."""
    stem, leaf = ours.rsplit(".", 1)
    if not stem.startswith("blocks."):
        return (f"{_DIFFUSERS_TOP[stem]}.{leaf}",)
    _, index, rest = stem.split(".", 2)
    names = _DIFFUSERS_PART[rest]
    return tuple(f"transformer_blocks.{index}.{n}.{leaf}" for n in ([names] if isinstance(names, str) else names))


def is_swapped(ours: str, config: MMDiTConfig) -> bool:
    """Does diffusers store scale before shift in this parameter?"""
    last_text = f"blocks.{config.depth - 1}.text.modulate.linear"
    return ours.startswith((last_text, "final.modulate.linear"))


def swap_halves(x: Tensor) -> Tensor:
    """Exchange the two halves along the first axis: one format has shift before scale, the other scale before shift."""
    return torch.cat(x.chunk(2)[::-1])


def _list_parameters(config: MMDiTConfig) -> dict[str, Tensor]:
    """Our parameters by name on the meta device."""
    with torch.device("meta"):
        return dict(config.build().named_parameters())


def make_position_table(config: TokenConfig) -> PositionTable:
    """The positions of a model by its config's formula."""
    return PositionTable(config.width, config.pos_max, target=config.pos_tokens, base=config.pos_base)


def make_full_positions(config: MMDiTConfig, state: Mapping[str, Tensor]) -> Tensor:
    """The (1, P*P, D) table of a model."""
    table = make_position_table(config)
    if POSITIONS in state:
        table.axes_2PD = state[POSITIONS].float()
    return table.make_full_table()


def find_position_axes(table_1ND: Tensor, source: str) -> Tensor:
    """Our (2, P, D/2) axes from a full table, which must be a table of row and column codes as SD3's are."""
    count, width = math.isqrt(table_1ND.shape[1]), table_1ND.shape[2]
    grid = table_1ND.float().view(count, count, width)
    axes = torch.stack([grid[0, :, : width // 2], grid[:, 0, width // 2 :]])
    columns, rows = axes[0].expand(count, count, -1), axes[1][:, None].expand(count, count, -1)
    if not torch.equal(torch.cat([columns, rows], -1), grid):
        raise UserError(f"{source}: pos_embed is not a grid of column and row codes; only SD3's fixed tables fit")
    return axes.clone()


def _refuse_second_time(config: MMDiTConfig) -> None:
    if config.second_time:
        raise UserError(
            "SD3 and diffusers have no seat for a second time (MeanFlow): these weights keep our own format"
        )


def to_sd3(config: MMDiTConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our weights as an SD3 single file has them (prefix included), one after the other: `state` may read them then."""
    _refuse_second_time(config)
    for name in _list_parameters(config):
        yield SD3_PREFIX + to_sd3_name(name), state[name]
    yield f"{SD3_PREFIX}pos_embed", make_full_positions(config, state).to(state["context_embed.weight"].dtype)


def _describe_stored_positions(count: int) -> dict[str, Any]:
    """Config fields for a table that comes with the weights; target and base then mean nothing."""
    return {"pos_max": count, "pos_tokens": min(16, count), "pos_base": min(16, count), "pos_stored": True}


def from_sd3(state: Mapping[str, Tensor], source: str) -> tuple[MMDiTConfig, dict[str, Tensor]]:
    """Config and our weights from an SD3 single file; autoencoder and encoders that it may carry are left alone."""
    prefix = SD3_PREFIX if any(k.startswith(SD3_PREFIX) for k in state) else ""
    found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    patch = _need(found, "x_embedder.proj.weight", 4, source)
    context, pooled = (_need(found, f"{name}.weight", 2, source) for name in ("context_embedder", "y_embedder.mlp.0"))
    table = _need(found, "pos_embed", 3, source)
    width, count = patch.shape[0], math.isqrt(table.shape[1])
    if table.shape != (1, count**2, width):
        raise UserError(f"{source}: pos_embed misshapen, {tuple(table.shape)} instead of (1, side * side, {width})")
    config = MMDiTConfig(
        depth=_find_depth(width, found, source),
        patch=patch.shape[2],
        in_channels=patch.shape[1],
        context_width=context.shape[1],
        pooled_width=pooled.shape[1],
        qk_norm=any(k.endswith("attn.ln_q.weight") for k in found),
        dual_attention=tuple(sorted(_find_blocks(found, r"x_block\.attn2\."))),
        **_describe_stored_positions(count),
    )
    positions = found.pop("pos_embed")
    expected = {to_sd3_name(name): (name, like) for name, like in _list_parameters(config).items()}
    check_tensors(found, {theirs: like for theirs, (_, like) in expected.items()}, source)
    ours = {name: found[theirs] for theirs, (name, _) in expected.items()}
    return config, {**ours, POSITIONS: find_position_axes(positions, source)}


def _find_blocks(found: Mapping[str, Tensor], part: str = "") -> set[int]:
    """Numbers of the blocks that have tensors of a part."""
    return {int(m[1]) for name in found if (m := re.match(rf"joint_blocks\.(\d+)\.{part}", name))}


def _find_depth(width: int, found: Mapping[str, Tensor], source: str) -> int:
    """The depth, from the width (64 * depth in SD3). UserError unless exactly so many blocks have tensors."""
    blocks, depth = _find_blocks(found), width // HEAD_WIDTH
    missing, extra = sorted(set(range(depth)) - blocks), sorted(blocks - set(range(depth)))
    if width % HEAD_WIDTH or missing or extra:
        lists = (("missing", missing), ("unexpected", extra))
        named = "; ".join(f"joint_blocks {list_some([str(i) for i in b])} {what}" for what, b in lists if b)
        raise UserError(
            f"{source}: x_embedder.proj.weight of width {width}, which SD3 has at depth {width / HEAD_WIDTH:g}, "
            f"with {len(blocks)} blocks ({named or 'none missing'})"
        )
    return depth


def _need(found: Mapping[str, Tensor], name: str, dims: int, source: str) -> Tensor:
    if name not in found:
        prefixes = [other.removesuffix(name) for other in found if other.endswith(f".{name}")]
        hint = f"; it has {prefixes[0] + name!r}: take the prefix {prefixes[0]!r} off its names" if prefixes else ""
        raise UserError(f"{source} has no tensor {name!r}: not an SD3 file with reference names{hint}")
    if found[name].ndim != dims:
        raise UserError(f"{source}: {name} misshapen, {tuple(found[name].shape)} instead of {dims} dimensions")
    return found[name]


def make_diffusers_config(config: MMDiTConfig) -> dict[str, Any]:
    """Arguments of SD3Transformer2DModel."""
    return {
        "sample_size": config.pos_tokens * config.patch,
        "patch_size": config.patch,
        "in_channels": config.in_channels,
        "num_layers": config.depth,
        "attention_head_dim": HEAD_WIDTH,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.context_width,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": config.pooled_width,
        "out_channels": config.in_channels,
        "pos_embed_max_size": config.pos_max,
        "dual_attention_layers": list(config.dual_attention),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


_DIFFUSERS_NEEDS = (
    "num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "in_channels", "joint_attention_dim",
    "pooled_projection_dim", "pos_embed_max_size",
)  # fmt: skip


def read_diffusers_config(data: Mapping[str, Any], source: str) -> MMDiTConfig:
    """Our config from a diffusers transformer's config.json."""
    absent = [key for key in _DIFFUSERS_NEEDS if type(data.get(key)) is not int]
    if absent:
        found = f"; it is of class {data['_class_name']}" if "_class_name" in data else ""
        raise UserError(
            f"{source}: config.json of an SD3Transformer2DModel expected, without the integers "
            f"{list_some(absent)}{found}"
        )
    if data.get("qk_norm") not in (None, "rms_norm"):
        raise UserError(f"{source}: qk_norm is {data['qk_norm']!r}, expected 'rms_norm' or none")
    dual = data.get("dual_attention_layers") or ()
    depth, heads = data["num_layers"], data["num_attention_heads"]
    if heads != depth or data["attention_head_dim"] != HEAD_WIDTH:
        raise UserError(
            f"{source}: {depth} layers with {heads} heads of {data['attention_head_dim']}; SD3 has d heads of 64"
        )
    return MMDiTConfig(
        depth=depth,
        patch=data["patch_size"],
        in_channels=data["in_channels"],
        context_width=data["joint_attention_dim"],
        pooled_width=data["pooled_projection_dim"],
        qk_norm=data.get("qk_norm") == "rms_norm",
        dual_attention=tuple(dual) if isinstance(dual, list | tuple) else dual,
        **_describe_stored_positions(data["pos_embed_max_size"]),
    )


def to_diffusers(config: MMDiTConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our weights in the diffusers dialect, one after the other: `state` may read them then."""
    _refuse_second_time(config)
    for name in _list_parameters(config):
        tensor = swap_halves(state[name]) if is_swapped(name, config) else state[name]
        theirs = to_diffusers_names(name)
        yield from zip(theirs, tensor.chunk(len(theirs)), strict=True)
    yield "pos_embed.pos_embed", make_full_positions(config, state).to(state["context_embed.weight"].dtype)


def adapter_to_diffusers(
    config: MMDiTConfig, adapters: Iterable[tuple[str, Tensor, Tensor]], *, scale: float
) -> Iterator[tuple[str, Tensor]]:
    """Adapters (weight's name, A, B) as StableDiffusion3Pipeline.load_lora_weights reads them, one after the other: B
    carries the scale, a fused qkv gives three layers with the same A."""
    for name, a_RI, b_OR in adapters:
        b_OR = scale * (swap_halves(b_OR) if is_swapped(name, config) else b_OR)
        theirs = to_diffusers_names(name)
        for weight, part_OR in zip(theirs, b_OR.chunk(len(theirs)), strict=True):
            module = f"transformer.{weight.removesuffix('.weight')}"
            yield f"{module}.lora_A.weight", a_RI
            yield f"{module}.lora_B.weight", part_OR


def from_diffusers(config: MMDiTConfig, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Our weights (positions stored) from the diffusers dialect."""
    parameters = _list_parameters(config)
    expected = {
        theirs: torch.empty(like.shape[0] // len(to_diffusers_names(name)), *like.shape[1:], device="meta")
        for name, like in parameters.items()
        for theirs in to_diffusers_names(name)
    }
    positions = torch.empty(1, config.pos_max**2, config.width, device="meta")
    check_tensors(state, {**expected, "pos_embed.pos_embed": positions}, source)
    ours = {}
    for name in parameters:
        tensor = torch.cat([state[theirs] for theirs in to_diffusers_names(name)])
        ours[name] = swap_halves(tensor) if is_swapped(name, config) else tensor
    return {**ours, POSITIONS: find_position_axes(state["pos_embed.pos_embed"], source)}
