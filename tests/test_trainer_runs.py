"""Features of a run together on real ranks: mixed buckets, --init-from, grids, compiled and offloaded steps, bf16 on
other ranks, branches by path, a gradient that is infinite, a rank that stands still. Three launches serve all.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from trainer_launch import ROOT, TINY, read_figure, run_ranks

from data_pipeline.loading.loader import open_dataset
from data_pipeline.packing.synthetic import write_synthetic
from model.backbones.mmdit import MMDiTConfig
from model.diffusion.flow import get_formulation
from model.encoders.text import TextCond
from model.files.weights import load_model, load_weights, read_meta, save_weights
from trainer.__main__ import main
from trainer.feed import draw_noise
from trainer.ladders.verify import compare_drift, cut_back, describe, measure_loss_gaps, read_losses
from trainer.objective import pretrain
from trainer.state import DEAL_LANES

pytestmark = [pytest.mark.slow, pytest.mark.dist]
# Latents of 4x4, 3x5 and 5x3 tokens; and, at the higher resolution, 6x6 and 5x7.
MIXED, LARGE = ("32x32", "24x40", "40x24"), ("48x48", "40x56")
COMMON = [
    *TINY, "--model.in-channels", "8", "--data.latent-shape", "8", "8", "8", "--logging.log-every", "8",
    "--validation.every", "None", "--schedule.warmup-images", "0", "--schedule.cooldown", "0",
]  # fmt: skip
SECOND = [
    *("--model.pos-max", "8", "--model.pos-tokens", "6", "--model.pos-base", "4", "--shift", "3"),
    *("--data.resolution", "48", "--data.latent-shape", "8", "12", "12", "--images", "64"),
]
BF16 = ["--precision", "bf16", "--images", "144", "--logging.save-every", "48"]
OFFLOAD = ["--parallel.offload-optimizer", "--optimizer.kernel", "deepspeed_cpu", "--images", "48"]
POISONED = 9  # the step whose gradient is infinite on rank 1


def job(folder: Path, name: str, *words: str, data: str = "mixed", **more: Any) -> dict[str, Any]:
    """What trainer_many_runs.py takes."""
    return {"words": ["world-d2", "--data", str(folder / data), "--out", str(folder / name), *COMMON, *words], **more}


def run_all(folder: Path, ranks: int, *jobs: dict[str, Any]) -> str:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return run_ranks([str(ROOT / "tests" / "trainer_many_runs.py"), str(folder / "jobs.json")], ranks)


def seen(run: Path, rank: int) -> list[dict[str, Any]]:
    return json.loads((run / f"seen_{rank}.json").read_text())["seen"]


def mixed(folder: Path, name: str) -> dict[str, Any]:
    more = ["--images", "128", "--logging.save-every", "64", "--validation.every", "64", "--logging.samples", "5"]
    return job(folder, name, *more)


def second_stage(folder: Path, name: str) -> dict[str, Any]:
    start = str(folder / "first_stage.safetensors")
    return job(folder, name, *SECOND, "--init-from", start, data="large", start=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data at two resolutions, and weights of a first stage without QK-norm."""
    path = tmp_path_factory.mktemp("runs")
    made = {"num_samples": 128, "val_samples": 16, "autoencoder": "world:vae"}
    write_synthetic(str(path / "mixed"), latent_shape=(8, 8, 8), buckets=MIXED, **made)
    write_synthetic(str(path / "large"), latent_shape=(8, 12, 12), buckets=LARGE, **made)
    config = MMDiTConfig(
        depth=2, in_channels=8, context_width=48, pooled_width=32, qk_norm=False, pos_max=4, pos_tokens=4, pos_base=4
    )
    generator = torch.Generator().manual_seed(5)
    # No layer is zero, as none is after training.
    state = {n: x + 0.02 * torch.randn(x.shape, generator=generator) for n, x in config.build().state_dict().items()}
    meta = {"kind": "ema", "backbone": "mmdit", "config": config.to_json()}
    save_weights(path / "first_stage.safetensors", state, meta)
    return path


@pytest.fixture(scope="module")
def two(folder) -> Path:
    """Everything that starts on two ranks."""
    batches = open_dataset(str(folder / "mixed")).batches(
        seed=0, start=8 * POISONED, global_batch=8, rank=1, world_size=2
    )
    key = next(batches).keys[2]  # in the second micro-batch of rank 1
    batches.close()
    poisoned = ["--images", "128", "--logging.save-every", "32", "--parallel.micro-batch", "2"]
    said = run_all(
        folder, 2,
        mixed(folder, "two"),
        second_stage(folder, "second_two"),
        job(folder, "compiled", "--images", "48", "--parallel.compile"),
        job(folder, "cpu_adam", *OFFLOAD, "--logging.save-every", "24"),
        job(folder, "parameters", "--images", "48", "--parallel.offload-optimizer", "--parallel.offload-parameters",
            "cpu"),
        job(folder, "bf16", *BF16),
        job(folder, "poisoned", *poisoned, poison=key),
        job(folder, "held", "--images", "32", "--logging.stall-s", "10", hold=19),
    )  # fmt: skip
    (folder / "said_two.txt").write_text(said)
    (folder / "poison.txt").write_text(key)
    return folder


@pytest.fixture(scope="module")
def one(two) -> Path:
    """The same on one rank, and the bf16 run continued from its sixth step."""
    cut_back(two / "bf16", two / "bf16_one", step=6)
    run_all(two, 1, mixed(two, "one"), second_stage(two, "second_one"), job(two, "bf16_one", *BF16))
    return two


@pytest.fixture(scope="module")
def again(one) -> Path:
    """New processes on two ranks: back from one rank, with exchanged shares, and branches by path."""
    cut_back(one / "bf16_one", one / "bf16_back", step=12)
    cut_back(one / "bf16", one / "bf16_exchanged", step=6)
    middle = ["--resume", str(one / "two" / "checkpoints" / "step_0000008")]
    branch = mixed(one, "branch")
    cooled = job(one, "cooled", "--images", "96", "--schedule.cooldown", "0.3", *middle)
    run_all(
        one, 2,
        job(one, "bf16_back", *BF16),
        job(one, "bf16_exchanged", *BF16, environment={DEAL_LANES: "1"}),
        branch | {"words": [*branch["words"], *middle]},
        cooled,
        job(one, "cpu_adam_branch", *OFFLOAD, "--resume", str(one / "cpu_adam" / "checkpoints" / "step_0000003")),
    )  # fmt: skip
    return one


def test_mixed_buckets_train_as_on_one_rank(one):
    ranks = [seen(one / "two", rank) for rank in range(2)]
    assert [step["shape"] for step in ranks[0]] == [step["shape"] for step in ranks[1]]
    assert {tuple(step["shape"]) for step in ranks[0]} == {(8, 8, 8), (8, 6, 10), (8, 10, 6)}
    alone = seen(one / "one", 0)
    assert [a["positions"] + b["positions"] for a, b in zip(*ranks)] == [step["positions"] for step in alone]
    assert [step["positions"] for step in alone] == [list(range(8 * n, 8 * n + 8)) for n in range(16)]
    found, wanted = read_losses(one / "two"), read_losses(one / "one")
    assert list(found) == list(wanted) == list(range(8, 129, 8))
    assert list(found.values()) == pytest.approx(list(wanted.values()), rel=1e-5)


def test_validation_over_mixed_buckets_is_that_of_one_rank(one):
    found, wanted = (read_figure(one / run, "loss/sd3", "val") for run in ("two", "one"))
    assert len(found) == 2
    assert found == pytest.approx(wanted, rel=1e-5)


def test_grids_drawn_on_two_ranks_are_those_of_one(one):
    for name in ("step_0000008.png", "step_0000016.png"):
        a, b = (np.asarray(Image.open(one / run / "samples" / name)).astype(int) for run in ("two", "one"))
        assert a.shape == b.shape
        assert a.std() > 10  # there is a picture
        # The weights behind them differ in the last bit, so a value may round to the neighbouring level.
        assert abs(a - b).max() <= 1
        assert (a != b).mean() < 0.01


def test_a_second_stage_starts_from_the_first_ones_weights(one):
    source, _ = load_weights(one / "first_stage.safetensors")
    for run in ("second_two", "second_one"):
        for kind in ("raw", "ema"):
            start = load_file(one / run / f"start_{kind}.safetensors")
            added = start.keys() - source.keys()
            assert all(torch.equal(start[name], source[name]) for name in source)
            assert len(added) == 2 * 2 * 2  # of queries and keys, both streams, two blocks
            assert all(".norm_" in name and bool((start[name] == 1).all()) for name in added)


def test_a_second_stage_computes_with_the_extended_grid_and_goes_on(one):
    """Its first loss is that of one plain process whose positions are the paper's for the larger grid."""
    found, wanted = read_losses(one / "second_two"), read_losses(one / "second_one")
    assert list(found.values()) == pytest.approx(list(wanted.values()), rel=1e-5)
    assert list(found)[-1] == 64
    recipe = json.loads((one / "second_two" / "recipe.json").read_text())
    model = MMDiTConfig.from_json(recipe["model"]).build()
    model.load_state_dict(load_file(one / "second_two" / "start_raw.safetensors"))
    dataset = open_dataset(str(one / "large"))
    batches = dataset.batches(seed=0, global_batch=8, encoder_dropout=recipe["data"]["encoder_dropout"])
    form = get_formulation(recipe["formulation"])
    with torch.no_grad():
        micro = draw_noise(next(batches), form, seed=0, shift=3.0)
        first = pretrain(model, micro.to(torch.device("cpu")), formulation=form)
    batches.close()
    assert found[8] == pytest.approx(first.loss_B.double().mean().item(), rel=1e-5)
    ended, meta = load_weights(one / "second_two" / "weights" / "raw.safetensors")
    assert (meta["config"]["pos_max"], meta["config"]["qk_norm"], meta["shift"]) == (8, True, 3.0)
    still = [name for name, tensor in model.state_dict().items() if torch.equal(ended[name], tensor)]
    assert still == ["blocks.1.text.qkv.norm_q.weight"]  # the last block's text queries are not attended with


@pytest.mark.parametrize(("run", "within"), [("compiled", 1e-5), ("cpu_adam", 1e-5), ("parameters", 1e-5)])
def test_compiled_and_offloaded_steps_are_the_plain_ones(two, run, within):
    plain, found = read_losses(two / "two"), read_losses(two / run)
    assert list(found) == list(range(8, 49, 8))
    assert list(found.values()) == pytest.approx([plain[images] for images in found], rel=within)


def test_compiling_costs_a_graph_per_block_and_number_of_tokens(two):
    """Two kinds of block; 3x5 and 5x3 tokens are the same to them."""
    assert len({tuple(step["shape"]) for step in seen(two / "compiled", 0)}) == 3
    for rank in range(2):
        assert json.loads((two / "compiled" / f"seen_{rank}.json").read_text())["graphs"] == 2 * 2


def test_bf16_goes_from_two_ranks_to_one_and_back(again):
    straight, alone, back, exchanged = (again / name for name in ("bf16", "bf16_one", "bf16_back", "bf16_exchanged"))
    assert measure_loss_gaps(straight, alone)[8 * 7] <= 1e-5  # the first step on one rank
    assert measure_loss_gaps(alone, back)[8 * 13] <= 1e-5  # and the first one on two again
    assert max(measure_loss_gaps(straight, exchanged).values()) > 1e-6, (
        "the exchange changes nothing, so it measures nothing"
    )
    verdicts = compare_drift(straight, back, exchanged, "2 -> 1 -> 2", first=7)
    assert [v.kept for v in verdicts] == [True, True, True], describe(verdicts)


def test_a_branch_by_path_continues_bit_by_bit(again):
    trunk, branch = read_losses(again / "two"), read_losses(again / "branch")
    assert branch == {images: loss for images, loss in trunk.items() if images > 64}
    for kind in ("raw", "ema"):
        a, b = (load_weights(again / run / "weights" / f"{kind}.safetensors")[0] for run in ("two", "branch"))
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert (again / "branch" / "checkpoints" / "latest").read_text() == "step_0000016\n"
    assert read_losses(again / "cpu_adam_branch") == {
        n: v for n, v in read_losses(again / "cpu_adam").items() if n > 24
    }


def test_a_branch_may_end_earlier_under_another_schedule(again):
    trunk, cooled = read_losses(again / "two"), read_losses(again / "cooled")
    assert list(cooled) == [72, 80, 88, 96]
    assert cooled[72] == trunk[72]  # the rate has not changed before it
    assert cooled[96] != trunk[96]
    assert read_meta(again / "cooled" / "weights" / "ema.safetensors")["images_seen"] == 96


def test_an_infinite_gradient_under_a_finite_loss_is_never_stepped(two):
    """It is in the last of two micro-batches, on rank 1 alone: both go back, and leave the same images out."""
    run, key = two / "poisoned", (two / "poison.txt").read_text()
    line = next(line for line in (two / "said_two.txt").read_text().splitlines() if "the step was not taken" in line)
    assert f"the gradient is not finite at images {8 * POISONED} to {8 * POISONED + 7}" in line
    assert "back to the checkpoint at 64 images, without that batch (1 of 3)" in line
    dumps = [json.loads((run / "skipped" / f"step_{POISONED:07d}_rank_{r:05d}.json").read_text()) for r in range(2)]
    assert [dump["images_seen"] for dump in dumps] == [8 * POISONED] * 2
    assert [key in dump["keys"] for dump in dumps] == [False, True]
    assert len({name for dump in dumps for name in dump["keys"]}) == 8
    for rank in range(2):
        firsts = [step["positions"][0] - 4 * rank for step in seen(run, rank)[::2]]
        assert firsts == [*range(0, 8 * POISONED + 1, 8), *range(64, 128, 8)]
    found, plain = read_losses(run), read_losses(two / "two")
    assert list(found) == list(range(8, 129, 8))
    before = [images for images in plain if images <= 8 * POISONED]
    assert [found[n] for n in before] == pytest.approx([plain[n] for n in before], rel=1e-5)
    kept = json.loads((run / "checkpoints" / "step_0000016" / "manifest.json").read_text())["state"]
    assert (kept["images_seen"], kept["adam_steps"], kept["skips"]) == (128, 16, 1)
    weights, _ = load_weights(run / "weights" / "raw.safetensors")  # refuses what is not finite
    assert weights


def test_a_rank_that_stands_still_is_told_with_all_stacks(two):
    said = (two / "said_two.txt").read_text()  # on a busy machine the start may have been told too
    told = [line for line in said.splitlines() if "no progress for" in line]
    assert any("longest without progress: rank 1 at step 2: computing; stack traces" in line for line in told), told
    logs = two / "held" / "logs"
    stacks = [(logs / f"stall_rank_{rank:05d}_step_0000002.txt").read_text() for rank in range(2)]
    assert "trainer_many_runs.py" in stacks[1].split("Thread")[-1].splitlines()[1]  # there it sleeps
    assert "fetch_sub_module" in stacks[0]  # while the other wants its share of the weights
    assert list(read_losses(two / "held")) == [8, 16, 24, 32]


def test_whole_weights_go_to_diffusers(two, tmp_path, monkeypatch):
    from diffusers import SD3Transformer2DModel

    ours, theirs = tmp_path / "ema.safetensors", tmp_path / "diffusers"
    for form, out in (("beeline", ours), ("diffusers", theirs)):
        words = ["export", str(two / "two"), "--data", str(two / "mixed"), "--format", form, "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["trainer", *words])
        main()
    model, _ = load_model(ours)
    twin = SD3Transformer2DModel.from_pretrained(theirs, subfolder="transformer", local_files_only=True).eval()
    g = torch.Generator().manual_seed(1)
    text = TextCond(torch.randn(3, 16, 48, generator=g), torch.randn(3, 32, generator=g))
    for height, width in ((8, 8), (6, 10)):
        x_BCHW, t_B = torch.randn(3, 8, height, width, generator=g), torch.rand(3, generator=g)
        with torch.no_grad():
            wanted = model(x_BCHW, t_B, text)
            found = twin(x_BCHW, text.context_BLD, text.pooled_BP, 1000 * t_B, return_dict=False)[0]
        assert wanted.abs().max() > 0.1
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert "val_loss/sd3" in (theirs / "README.md").read_text()
