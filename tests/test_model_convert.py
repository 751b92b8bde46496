"""Conversions: SD3 files read by diffusers' own converter; what is refused, in one line, before anything is written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_files import CONFIG, META, saved, weights_of, write_sd3_encoders, write_vae
from safetensors.torch import load_file, save_file
from torch import Tensor

from infra.errors import UserError
from model.__main__ import main
from model.backbones.mmdit import MMDiTConfig
from model.describe import describe
from model.encoders.text import EncoderSpec, TextSpec
from model.files.convert import convert
from model.files.names import SD3_PREFIX, to_diffusers, to_sd3
from model.files.weights import META_KEY, load_weights, read_meta, save_weights


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": False},
        {"depth": 3, "dual_attention": [0, 1]},
        {"depth": 3, "dual_attention": [0], "qk_norm": False},
    ],
)
def test_diffusers_own_converter_reads_our_sd3_files(changes: dict) -> None:
    """An independent reader of the reference names: equal keys and values as ours for diffusers."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    config = MMDiTConfig.from_json({**CONFIG.to_json(), **changes})
    state = weights_of(config)
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(dict(to_sd3(config, state)))
    ours = dict(to_diffusers(config, state))
    theirs = {name: tensor for name, tensor in theirs.items() if tensor is not None}
    assert set(theirs) == set(ours)
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name


def sd3_tensors() -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in to_sd3(CONFIG, weights_of())}


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("x_embedder.proj.weight", lambda x: x.flatten(1), r"x_embedder.proj.weight misshapen, \(128, 16\)"),
        ("context_embedder.weight", lambda x: x.flatten(), r"context_embedder.weight misshapen, \(6144,\)"),
        ("y_embedder.mlp.0.weight", lambda x: x[None], r"y_embedder.mlp.0.weight misshapen, \(1, 128, 24\)"),
        ("pos_embed", lambda x: x[:, :-1], r"pos_embed misshapen, \(1, 143, 128\)"),
        ("pos_embed", lambda x: x[0], r"pos_embed misshapen, \(144, 128\)"),
        ("pos_embed", lambda x: x[..., :64], r"pos_embed misshapen, \(1, 144, 64\)"),
        ("final_layer.linear.bias", lambda x: x[:3], r"misshapen .final_layer.linear.bias: \(3,\) instead of \(16,\)"),
        (
            "final_layer.linear.weight",
            lambda x: x.to(torch.float8_e4m3fn),
            "other than fp16, bf16, fp32 .final_layer.linear.weight: torch.float8_e4m3fn",
        ),
    ],
)
def test_misshapen_sd3_tensors_are_named(tmp_path: Path, name: str, change: Callable, says: str) -> None:
    tensors = sd3_tensors()
    tensors[SD3_PREFIX + name] = change(tensors[SD3_PREFIX + name]).contiguous()
    save_file(tensors, tmp_path / "sd3.safetensors")
    with pytest.raises(UserError, match=says):
        convert(tmp_path / "sd3.safetensors", tmp_path / "x.safetensors")


def test_absent_blocks_are_named(tmp_path: Path) -> None:
    less = {name: x for name, x in sd3_tensors().items() if "joint_blocks.1." not in name}
    more = {**sd3_tensors(), f"{SD3_PREFIX}joint_blocks.5.x_block.attn.qkv.bias": torch.zeros(3)}
    for tensors, says in ((less, "joint_blocks 1 missing"), (more, "joint_blocks 5 unexpected")):
        save_file(tensors, tmp_path / "sd3.safetensors")
        with pytest.raises(UserError, match=f"width 128, which SD3 has at depth 2.*{says}"):
            convert(tmp_path / "sd3.safetensors", tmp_path / "x.safetensors")


def test_other_folders_and_broken_json_are_named(tmp_path: Path) -> None:
    encoders = write_sd3_encoders(tmp_path / "encoders")
    for folder in (write_vae(tmp_path / "vae"), encoders["clip_l"]):
        with pytest.raises(UserError, match="SD3Transformer2DModel expected, without the integers num_layers"):
            convert(folder, tmp_path / "x.safetensors")
    convert(saved(tmp_path), tmp_path / "pipe")
    config = tmp_path / "pipe" / "transformer" / "config.json"
    whole = config.read_text()
    for text, says in (
        ("{", r"config\.json is not JSON"),
        ("[1]", r"is \[1\], expected an object"),
        (json.dumps(json.loads(whole) | {"qk_norm": "layer_norm"}), "qk_norm is 'layer_norm'"),
        (json.dumps(json.loads(whole) | {"dual_attention_layers": ["a"]}), "expected a list of block numbers"),
    ):
        config.write_text(text)
        with pytest.raises(UserError, match=says):
            convert(tmp_path / "pipe", tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("{", "metadata is not JSON"),
        ("[]", "expected an object"),
        (json.dumps({**META, "config": 3}), r"lacks \['config'\]"),
        (json.dumps({**META, "backbone": ["mmdit"]}), r"lacks \['backbone'\]"),
        (json.dumps({**META, "config": {**CONFIG.to_json(), "dual_attention": 5}}), "dual_attention is 5"),
    ],
)
def test_broken_metadata_are_named(tmp_path: Path, told: str, says: str) -> None:
    """In our own file and in an SD3 file that carries them."""
    save_file(weights_of(), tmp_path / "ours.safetensors", metadata={META_KEY: told})
    save_file(sd3_tensors(), tmp_path / "sd3.safetensors", metadata={META_KEY: told})
    for read in (
        lambda: load_weights(tmp_path / "ours.safetensors"),
        lambda: convert(tmp_path / "sd3.safetensors", tmp_path / "x.safetensors"),
    ):
        with pytest.raises(UserError, match=says):
            read()


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def resave(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def test_parts_that_would_not_load_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source, vae = saved(tmp_path), write_vae(tmp_path / "vae")
    encoders = write_sd3_encoders(tmp_path / "encoders")
    wide = write_vae(tmp_path / "wide", channels=16)
    bin_only, plain, widths = (tmp_path / name for name in ("bin", "plain", "widths"))
    for folder in (bin_only, plain, widths):
        shutil.copytree(encoders["clip_l"], folder)
    (bin_only / "model.safetensors").rename(bin_only / "pytorch_model.bin")
    resave(plain / "model.safetensors", lambda x: {n: t for n, t in x.items() if n != "text_projection.weight"})
    edit(widths / "config.json", projection_dim=11)
    resave(widths / "model.safetensors", lambda x: {**x, "text_projection.weight": torch.zeros(11, 16)})
    bare = tmp_path / "bare"
    shutil.copytree(vae, bare)
    (bare / "diffusion_pytorch_model.safetensors").unlink()
    for says, asked in (
        ("no autoencoder at nowhere", {"vae": Path("nowhere")}),
        ("cannot load the autoencoder", {"vae": bare}),
        ("class .* expected 'AutoencoderKL'", {"vae": encoders["t5"]}),
        ("16 channels beside a model of 4", {"vae": wide}),
        ("no model.safetensors in", {"encoders": {"clip_l": bin_only}}),
        ("model_type 't5', the clip_l encoder must be 'clip_text_model'", {"encoders": {"clip_l": encoders["t5"]}}),
        ("tensors text_projection.weight are not there", {"encoders": {"clip_l": plain}}),
        ("width 25 do not fit .* pooled_width 24", {"encoders": {**encoders, "clip_l": widths}}),
        ("no config.json in nowhere", {"encoders": {"t5": Path("nowhere")}}),
    ):
        with pytest.raises(UserError, match=says):
            convert(source, tmp_path / "pipe", **asked)
        assert not (tmp_path / "pipe").exists()
    for to in ("sd3", "beeline"):
        with pytest.raises(UserError, match=f"vae, t5 given, but .* not dialect {to}"):
            convert(source, tmp_path / "x.safetensors", to=to, vae=vae, encoders={"t5": encoders["t5"]})


def test_a_source_is_never_overwritten(tmp_path: Path) -> None:
    source = saved(tmp_path)
    before = source.read_bytes()
    for to in ("sd3", "beeline", None):
        with pytest.raises(UserError, match="would overwrite"):
            convert(source, tmp_path / "." / "ema.safetensors", to=to)
    assert source.read_bytes() == before
    convert(source, tmp_path / "pipe")
    with pytest.raises(UserError, match="would overwrite"):
        convert(tmp_path / "pipe" / "transformer", tmp_path / "pipe", to="diffusers")


@pytest.mark.parametrize(("to", "name"), [("sd3", "x"), ("beeline", "x.bin"), ("diffusers", "x.safetensors")])
def test_targets_are_named_as_what_they_are(tmp_path: Path, to: str, name: str) -> None:
    with pytest.raises(UserError, match=f"dialect {to} is "):
        convert(saved(tmp_path), tmp_path / name, to=to)  # type: ignore[arg-type]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = saved(tmp_path), tmp_path / "sd3.safetensors"
    convert(source, target)
    before = target.read_bytes()

    def fail(tensors: dict, path: Path, **more: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(source, target)
    assert target.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ema.safetensors", "sd3.safetensors"]


def test_info_reads_a_files_own_factor_and_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of 12 tokens per side holds 256 px at a factor of 16, not 512."""
    text = TextSpec((EncoderSpec("t5", "x", "t5_hf", 7, 48, 0),), "trimmed", 48)
    vae = {"checkpoint": "x", "channels": 4, "factor": 16, "shift": 0.0, "scale": 1.0}
    told = {**META, "text_spec": text.to_json(), "vae": vae}
    path = save_weights(tmp_path / "w.safetensors", weights_of(), told)
    row = describe(str(path))
    assert (row["text_tokens"], row["pixels_per_latent_pixel"]) == (7, 16)
    assert row["forward_flops_256"] == CONFIG.count_forward_flops(16, 16, 7)
    assert row["activation_bytes_256"] > 0
    assert row["forward_flops_512"] is row["train_flops_512"] is row["activation_bytes_512"] is None
    assert describe(str(path), text_tokens=9)["forward_flops_256"] == CONFIG.count_forward_flops(16, 16, 9)
    plain = save_weights(tmp_path / "plain.safetensors", weights_of(), META)
    assert describe(str(plain))["text_tokens"] == 154
    with pytest.raises(UserError, match="states its own"):
        describe(str(path), qk_norm=False)
    monkeypatch.setattr(sys, "argv", ["model", "info", str(path)])
    main()
    assert read_meta(path)["vae"] == vae


def write_transformer(folder: Path, files: dict[str, int], indices: dict[str, list[str]]) -> dict[str, Tensor]:
    """A diffusers folder: each file holds the same names with values of its own (times a number); shards of halves."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in to_diffusers(CONFIG, weights_of())}
    from model.files.names import make_diffusers_config

    (folder / "config.json").write_text(json.dumps(make_diffusers_config(CONFIG)))
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, times in files.items():
        chosen = halves[int("-00002-" in file)] if "-of-" in file else names
        save_file({n: tensors[n] * (1 if "pos_embed.pos_embed" in n else times) for n in chosen}, folder / file)
    for index, listed in indices.items():
        where = {name: listed[int(name in halves[1])] for name in names}
        (folder / index).write_text(json.dumps({"weight_map": where}))
    return tensors


SHARDS = ("diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors")
PLAIN, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
VARIANT = "diffusion_pytorch_model.non_ema.safetensors"
OLD = tuple(f"diffusion_pytorch_model-0000{n}-of-00003.safetensors" for n in (1, 3))


@pytest.mark.parametrize(
    ("files", "indices"),
    [
        ({PLAIN: 1}, {}),
        ({SHARDS[0]: 1, SHARDS[1]: 1, VARIANT: 3}, {INDEX: list(SHARDS)}),
        ({SHARDS[0]: 1, SHARDS[1]: 1, OLD[0]: 5, OLD[1]: 5, PLAIN: 7}, {INDEX: list(SHARDS)}),
        ({VARIANT: 1}, {}),
        (
            {SHARDS[0]: 1, SHARDS[1]: 1, VARIANT: 3},
            {"diffusion_pytorch_model.safetensors.index.fp16.json": list(SHARDS)},
        ),
        (
            {SHARDS[0]: 1, SHARDS[1]: 1},
            {INDEX: list(SHARDS), "diffusion_pytorch_model.safetensors.index.fp16.json": [PLAIN, PLAIN]},
        ),
    ],
)
def test_an_index_or_a_single_file_decides_which_weights_a_folder_holds(tmp_path, files, indices):
    write_transformer(tmp_path / "t", files, indices)
    convert(tmp_path / "t", tmp_path / "out.safetensors")
    state, _ = load_weights(tmp_path / "out.safetensors")
    for name, tensor in weights_of().items():
        assert torch.equal(state[name], tensor), name


def test_of_a_tensor_in_two_shards_the_one_counts_that_the_index_names(tmp_path):
    tensors = write_transformer(tmp_path / "t", {SHARDS[0]: 1, SHARDS[1]: 1}, {INDEX: list(SHARDS)})
    where = json.loads((tmp_path / "t" / INDEX).read_text())["weight_map"]
    for shard in SHARDS:  # each shard also has an old copy of what the other one holds
        old = {
            name: tensor * (1 if "pos_embed.pos_embed" in name or where[name] == shard else 9)
            for name, tensor in tensors.items()
        }
        save_file(old, tmp_path / "t" / shard)
    convert(tmp_path / "t", tmp_path / "out.safetensors")
    state, _ = load_weights(tmp_path / "out.safetensors")
    for name, tensor in weights_of().items():
        assert torch.equal(state[name], tensor), name
    (tmp_path / "t" / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(UserError, match="no weight_map of file names"):
        convert(tmp_path / "t", tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("files", "indices", "says"),
    [
        ({PLAIN: 1, VARIANT: 3}, {}, "several candidates.*non_ema"),
        ({SHARDS[0]: 1, SHARDS[1]: 1}, {}, "several candidates"),
        ({SHARDS[0]: 1}, {}, "without an index: other shards are missing"),
        ({SHARDS[0]: 1}, {INDEX: list(SHARDS)}, "names files that .* lacks: .*00002-of-00002"),
        ({PLAIN: 1}, {INDEX: ["../x.safetensors", PLAIN]}, "names files that .* lacks"),
        ({VARIANT: 1, PLAIN: 1, SHARDS[0]: 1, SHARDS[1]: 1},
         {"diffusion_pytorch_model.fp16.safetensors.index.json": list(SHARDS)}, "several candidates"),
    ],
)  # fmt: skip
def test_a_folder_that_would_be_a_guess_is_refused_with_the_names(tmp_path, files, indices, says):
    write_transformer(tmp_path / "t", files, indices)
    with pytest.raises(UserError, match=says):
        convert(tmp_path / "t", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_of_the_umask(tmp_path, mask):
    import os

    write_vae(tmp_path / "vae")
    write_transformer(tmp_path / "t", {PLAIN: 1}, {})
    before = os.umask(mask)
    try:
        convert(tmp_path / "t", tmp_path / "ours.safetensors")
        convert(tmp_path / "ours.safetensors", tmp_path / "single.safetensors", to="sd3")
        convert(tmp_path / "ours.safetensors", tmp_path / "pipeline", vae=tmp_path / "vae")
    finally:
        os.umask(before)
    written = [*tmp_path.glob("*.safetensors"), *(tmp_path / "pipeline").rglob("*.*")]
    assert len(written) > 5
    assert {oct(path.stat().st_mode & 0o777) for path in written if path.is_file()} == {oct(0o666 & ~mask)}


def test_a_prefix_that_is_unknown_is_named(tmp_path):
    save_file({f"net.{n.removeprefix(SD3_PREFIX)}": x for n, x in sd3_tensors().items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"take the prefix 'net\.' off"):
        convert(tmp_path / "x.safetensors", tmp_path / "out.safetensors")
