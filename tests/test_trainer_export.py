"""Weights leave a checkpoint in every format: tensors bit-equal on a disk and on S3, memory far below a file's size."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainer_launch import ROOT

from data_pipeline.formats.schema import DatasetInfo
from data_pipeline.loading.loader import open_dataset
from data_pipeline.packing.synthetic import write_synthetic
from infra import storage
from infra.errors import UserError
from model.backbones.mmdit import MMDiTConfig
from model.files.convert import convert
from model.files.weights import load_weights, read_meta
from trainer.exports.export import Weights, export_as, write_as
from trainer.recipes import get_recipe
from trainer.zero import checkpoint
from trainer.zero.group import Group
from trainer.zero.partition import Segment

CONFIG = MMDiTConfig(
    depth=3, in_channels=8, context_width=48, pooled_width=32, pos_max=12, pos_tokens=8, qk_norm=True,
    dual_attention=(0,),
)  # fmt: skip
FORMATS = (("beeline", "ours.safetensors"), ("sd3", "sd3.safetensors"), ("diffusers", "folder"))


def weights_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: param.shape for name, param in CONFIG.build().named_parameters()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def flat(state: dict[str, torch.Tensor]) -> tuple[tuple[Segment, ...], torch.Tensor]:
    segments, at = [], 0
    for name, tensor in state.items():
        segments.append(Segment(name, tuple(tensor.shape), 0, tensor.numel(), at))
        at += tensor.numel()
    return tuple(segments), torch.cat([tensor.reshape(-1) for tensor in state.values()])


@pytest.fixture(scope="module")
def info(tmp_path_factory) -> DatasetInfo:
    uri = str(tmp_path_factory.mktemp("data"))
    write_synthetic(uri, num_samples=8, val_samples=8, autoencoder="world:vae")
    return open_dataset(uri).info


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with a checkpoint: raw weights of seed 1, EMA weights of seed 2."""
    out = tmp_path_factory.mktemp("runs") / "world-d2"
    recipe = dataclasses.replace(get_recipe("world-d2"), model=CONFIG, precision="fp32")
    (segments, master), (_, average) = flat(weights_of(1)), flat(weights_of(2))
    share = checkpoint.RankShare([segments], {"master": [master], f"ema/{recipe.ema.profiles[0]}": [average]})
    state = {"recipe": recipe.to_json(), "images_seen": 64}
    assert checkpoint.save(
        str(out / "checkpoints"), share, Group(0, 1, torch.device("cpu")), step=1, state=state, keep=1
    )
    return out


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("kind", "seed"), [("raw", 1), ("ema", 2)])
@pytest.mark.parametrize("parts", [1, 3])
def test_every_format_on_a_disk_and_on_s3_holds_the_same_bits(run, info, s3, tmp_path, monkeypatch, kind, seed, parts):
    from diffusers import SD3Transformer2DModel

    if parts > 1:
        monkeypatch.setattr("model.files.pipeline.MAX_FILE", 5_000_000)
    monkeypatch.setattr(storage, "localize", None)  # nothing that was sent is fetched again
    for place in (str(tmp_path), s3):
        for form, name in FORMATS:
            given = {"kind": kind, "profile": None, "info": info, "run": str(run), "out": f"{place}/{name}"}
            count = export_as(form, str(run / "checkpoints" / "step_0000001"), **given)
            assert count == CONFIG.count_parameters()
    there = {uri.removeprefix(s3): storage.read_bytes(uri) for uri in storage.list_files(s3)}
    here = {uri.removeprefix(str(tmp_path)): storage.read_bytes(uri) for uri in storage.list_files(str(tmp_path))}
    assert there == here
    same(load_weights(tmp_path / "ours.safetensors")[0], weights_of(seed))
    assert read_meta(tmp_path / "ours.safetensors")["kind"] == kind
    # What conversion of a whole file in memory gives.
    convert(tmp_path / "ours.safetensors", tmp_path / "whole.safetensors", to="sd3")
    convert(tmp_path / "ours.safetensors", tmp_path / "whole", to="diffusers")
    same(load_file(tmp_path / "sd3.safetensors"), load_file(tmp_path / "whole.safetensors"))
    first, second = ({}, {})
    for folder, state in (("folder", first), ("whole", second)):
        files = sorted((tmp_path / folder / "transformer").glob("*.safetensors"))
        assert len(files) >= parts
        for file in files:
            state |= load_file(file)
    same(first, second)
    # ... and what diffusers loads from the folder, one file or several.
    theirs = SD3Transformer2DModel.from_pretrained(tmp_path / "folder" / "transformer", local_files_only=True)
    same(dict(theirs.state_dict()), second)
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    same(load_weights(tmp_path / "back.safetensors")[0], weights_of(seed))


def test_files_of_an_earlier_split_do_not_stay(run, info, tmp_path, monkeypatch):
    given = {"kind": "raw", "profile": None, "info": info, "run": str(run), "out": str(tmp_path / "folder")}
    for size in (5_000_000, 10**10):
        monkeypatch.setattr("model.files.pipeline.MAX_FILE", size)
        export_as("diffusers", str(run / "checkpoints" / "step_0000001"), **given)
    found = {path.name for path in (tmp_path / "folder" / "transformer").iterdir()}
    assert found == {"config.json", "diffusion_pytorch_model.safetensors"}


@pytest.mark.parametrize(("form", "name"), FORMATS)
def test_a_wrong_tensor_is_refused_in_every_format(info, tmp_path, form, name):
    state, meta = weights_of(1), {"kind": "raw", "backbone": "mmdit", "config": CONFIG.to_json(), "run": "r"}
    shapes = {known: tuple(tensor.shape) for known, tensor in state.items()}
    last = "blocks.1.text.qkv.linear.weight"
    for spoil, says in (
        (lambda x: x.new_empty(0), r"\(0,\) or not finite"),
        (lambda x: x.T, "or not finite, expected finite"),
        (lambda x: x * float("nan"), "or not finite"),
    ):
        weights = Weights(shapes, lambda n, spoil=spoil: spoil(state[n]) if n == last else state[n], meta)
        with pytest.raises(UserError, match=f"raw weights: {last} is .*{says}"):
            write_as(form, str(tmp_path / name), weights, info=info, run=str(tmp_path / "run"))
    missing = Weights({n: shapes[n] for n in shapes if n != last}, state.__getitem__, meta)
    with pytest.raises(UserError, match="1 tensors do not fit the model"):
        write_as(form, str(tmp_path / name), missing, info=info, run=str(tmp_path / "run"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("where", ["disk", "s3://bucket"])
def test_memory_of_an_export_is_bounded(tmp_path, where):
    script = str(ROOT / "tests" / "trainer_export_memory.py")
    place = str(tmp_path) if where == "disk" else where
    done = subprocess.run(
        [sys.executable, script, str(tmp_path), place],
        env=os.environ | {"PYTHONPATH": str(ROOT), "BEELINE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    size, added = map(int, done.stdout.split())
    assert size > 150e6
    assert added < 50e6  # the largest tensor is 6 MB
    folder = tmp_path if where == "disk" else tmp_path / "sent"
    assert min((folder / name).stat().st_size for name in ("ours.safetensors", "sd3.safetensors")) > size
    parts = [path.stat().st_size for path in tmp_path.rglob("diffusion_pytorch_model-*-of-*.safetensors")]
    assert len(parts) > 1
    assert max(parts) < 60.1e6
    assert sum(parts) > size
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
