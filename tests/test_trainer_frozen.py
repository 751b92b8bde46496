"""Frozen decoder and network of a perceptual loss in the plan: FLOPs as torch counts a real step, bytes, time."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from model_files import write_vae
from test_trainer_reflow import couple_with, write_weights
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from trainer_launch import TINY, read_figure, run_ranks

from data_pipeline.packing.synthetic import write_synthetic
from infra.errors import UserError
from model.encoders.vae import Latents, load_vae
from trainer.commands import plan
from trainer.machines import get_machine
from trainer.objective import count_train_flops
from trainer.perceptual import PerceptualLoss
from trainer.planning.estimates import Cost, StepCost
from trainer.planning.frozen import FrozenCost, count_frozen
from trainer.planning.hardware_plan import make_hardware_plan
from trainer.recipe import Student
from trainer.recipes import get_recipe

SHAPE = (4, 8, 8)
LAYERS, WIDTH, TOKENS = 2, 32, (32 // 8) ** 2 + 1  # of the vision model: patches and the class token


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny autoencoder and a tiny vision model."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("frozen")
    write_vae(folder / "vae")
    config = CLIPVisionConfig(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=2,
                              image_size=32, patch_size=8)  # fmt: skip
    CLIPVisionModel(config).save_pretrained(folder / "vision")
    CLIPImageProcessor().save_pretrained(folder / "vision")
    return folder


@pytest.fixture(scope="module")
def loss(folder) -> PerceptualLoss:
    latents = Latents.of(load_vae(folder / "vae").config, str(folder / "vae"))
    return PerceptualLoss(f"features:{folder / 'vision'}", latents, device=torch.device("cpu"))


def count_flops(function) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts_of_a_real_step(loss):
    latent = torch.randn(3, *SHAPE, requires_grad=True)
    real = count_flops(lambda: loss(latent, torch.randn(3, *SHAPE)).sum().backward())
    assert 3 * count_frozen(loss, SHAPE).flops_per_image == real


def test_flops_are_four_decodings_and_five_looks(loss):
    """Wanted picture once; the student's picture twice and its gradient; features of both twice and one gradient. A
    gradient of the input alone costs a forward pass, but twice that in the products of attention."""
    with torch.no_grad():
        decoding = count_flops(lambda: loss.decode(torch.randn(1, *SHAPE)))
        picture = torch.randn(1, 3, 32, 32)
        looking = count_flops(lambda: loss.parts[1](picture, picture)) / 2
    attention = 4 * (8 * 8) ** 2 * 8 + LAYERS * 4 * TOKENS**2 * WIDTH  # the decoder has one, over all places, 8 wide
    assert count_frozen(loss, SHAPE).flops_per_image == 4 * decoding + 5 * looking + attention


def test_counting_leaves_the_networks_as_they_are(loss):
    before = [tensor.clone() for part in loss.parts for tensor in part.state_dict().values()]
    found = count_frozen(loss, SHAPE)
    after = [tensor for part in loss.parts for tensor in part.state_dict().values()]
    assert all(torch.equal(*both) for both in zip(before, after, strict=True))
    assert found.weight_bytes >= 4 * sum(p.numel() for part in loss.parts for p in part.parameters())
    assert torch.backends.mha.get_fastpath_enabled()


def test_bytes_are_those_that_a_real_step_keeps(loss):
    own = {p.untyped_storage().data_ptr() for part in loss.parts for p in part.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.no_grad():
        wanted = loss.decode(torch.randn(1, *SHAPE))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        distance = loss.compare(torch.randn(1, *SHAPE, requires_grad=True), wanted)
    assert distance.requires_grad
    real = sum(storage.nbytes() for storage in kept.values())
    assert count_frozen(loss, SHAPE).activation_bytes_per_image == pytest.approx(real, rel=0.02)


def test_a_plan_holds_them_in_flops_time_and_bytes():
    recipe = dataclasses.replace(get_recipe("world-distil-d2"), precision="bf16")
    given = {"world_size": 2, "machine": get_machine("h100-80")}
    cost = FrozenCost(flops_per_image=10**9, weight_bytes=1000, activation_bytes_per_image=7)
    plain, frozen = make_hardware_plan(recipe, **given), make_hardware_plan(recipe, **given, perceptual=cost)
    assert frozen.train_flops_per_image == count_train_flops(recipe) + 10**9
    assert frozen.train_flops - plain.train_flops == 10**9 * recipe.images
    slower = frozen.time.compute_seconds - plain.time.compute_seconds
    assert slower == pytest.approx(10**9 * 8 / (989e12 * 0.4))  # 8 of 16 images on each rank
    for stage in plain.bytes_per_rank:
        assert frozen.bytes_per_rank[stage]["device"] - plain.bytes_per_rank[stage]["device"] == 1000 + 8 * 7
    tried = StepCost(Cost(0.5, 0.5), Cost(0.25, 0.25))
    seconds = make_hardware_plan(recipe, **given, perceptual=cost, tried=tried).time.step_seconds
    assert seconds == pytest.approx(0.75 + slower), "no trial knows the perceptual loss"
    assert "perceptual loss" in frozen.describe()
    assert "perceptual loss" not in plain.describe()


def test_the_command_asks_for_the_decoder(tmp_path, capsys):
    name = ["world-distil-d2", "--gpu", "h100-80"]
    perceptual = ["--student.perceptual", "features:world:clip"]
    for words, says in (
        (perceptual, "give --decoder"),
        (["--decoder", "world:vae"], "omit it"),
        ([*perceptual, "--decoder", str(tmp_path)], "no checkpoint|no autoencoder"),
        ([*perceptual, "--decoder", str(write_vae(tmp_path / "vae"))], "latents of 4 channels"),
    ):
        with pytest.raises(UserError, match=says):
            plan([*name, *words])
    plan([*name, *perceptual, "--decoder", "world:vae", "--json"])
    told = json.loads(capsys.readouterr().out)
    recipe = dataclasses.replace(get_recipe("world-distil-d2"), student=Student(perceptual="features:world:clip"))
    assert told["train_flops_per_image"] == count_train_flops(recipe) + told["perceptual"]["flops_per_image"]


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_learns_from_pictures_and_its_plan_counts_them(folder, loss):
    write_synthetic(str(folder / "data"), num_samples=64, val_samples=8, latent_shape=SHAPE, buckets=("32x32",),
                    autoencoder=str(folder / "vae"))  # fmt: skip
    write_weights(folder / "teacher.safetensors", folder)
    couple_with(folder, "teacher.safetensors", "coupled", guidance=1.0)
    run_ranks([
        "-m", "trainer", "train", "world-distil-d2", "--data", str(folder / "coupled"), "--out", str(folder / "run"),
        *TINY, "--init-from", str(folder / "teacher.safetensors"), "--images", "16", "--logging.log-every", "8",
        "--student.perceptual", f"features:{folder / 'vision'}", "--validation.every", "None",
    ], 1)  # fmt: skip
    for figure in ("student/latent", "student/perceptual"):
        values = read_figure(folder / "run", figure)
        assert len(values) == 2, figure
        assert min(values) > 0, figure
    planned = json.loads((folder / "run" / "plan.json").read_text())["perceptual"]
    assert planned == pytest.approx(dataclasses.asdict(count_frozen(loss, SHAPE)), rel=1e-3)
