"""Training on one real GPU: the same losses as on the CPU under every ZeRO stage and switch, bit-equal resuming,
checkpoints that go from one kind of device to the other, and what a plan says of bytes and speed there."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_launch import ROOT, TINY, finish, read_log, start_ranks

from data_pipeline.packing.synthetic import write_synthetic
from infra.results import ResultStore
from model.files.weights import load_weights
from trainer.ladders.verify import cut_back, read_losses
from trainer.machines import detect_machine
from trainer.planning.reality import grade_run, run_trial
from trainer.recipes import world

pytestmark = [pytest.mark.gpu, pytest.mark.dist]
STEPS, BATCH = 12, 8
COMMON = [
    *TINY, "--images", str(STEPS * BATCH), "--logging.log-every", str(BATCH), "--validation.every", "48",
    "--schedule.warmup-images", "0", "--logging.save-every", "48", "--parallel.micro-batch", "4",
]  # fmt: skip
EXACT = {
    "stage3": [],
    "stage2": ["--parallel.zero-stage", "2"],
    "stage1": ["--parallel.zero-stage", "1"],
    "stage0": ["--parallel.zero-stage", "0"],
    "recomputed": ["--parallel.checkpoint-blocks"],
    "gathered_at_need": ["--parallel.max-live", "0"],
}
OFFLOAD = ["--parallel.offload-optimizer"]
COMPILED = {  # something is, at first use: blocks, or kernels of DeepSpeed's
    "blocks_stage3": ["--parallel.compile"],
    "blocks_stage2": ["--parallel.compile", "--parallel.zero-stage", "2"],
    "deepspeed_fused": ["--optimizer.kernel", "deepspeed_fused"],
    "deepspeed_cpu": [*OFFLOAD, "--optimizer.kernel", "deepspeed_cpu"],
    "parameters_in_memory": [*OFFLOAD, "--parallel.offload-parameters", "cpu"],
    "optimizer_in_memory": OFFLOAD,
}
BF16 = ["--precision", "bf16"]


def train(folder: Path, *jobs: tuple[str, list[str]], gpu: bool) -> None:
    """Runs one after the other in one process, by the words that a person would type."""
    told = [{"words": ["world-d2", "--data", str(folder / "data"), "--out", str(folder / name), *COMMON, *more]}
            for name, more in jobs]  # fmt: skip
    path = folder / f"jobs-{jobs[0][0]}.json"
    path.write_text(json.dumps(told))
    where = {"DS_ACCELERATOR": "cuda"} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    ranks = start_ranks([str(ROOT / "tests" / "trainer_many_runs.py"), str(path)], 1, of_rank={0: where})
    codes, said = finish(ranks, timeout=400)
    assert codes == [0], said


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gpu")
    write_synthetic(str(path / "data"), num_samples=128, val_samples=16, latent_shape=(4, 8, 8), buckets=("32x32",))
    train(path, ("cpu", []), ("cpu_bf16", BF16), gpu=False)
    train(path, *EXACT.items(), ("bf16", BF16), gpu=True)
    return path


def validation(run: Path) -> list[float]:
    return [row.value for row in ResultStore(str(run / "results")).rows(metric="val_loss/sd3")]


def assert_same(run: Path, other: Path) -> None:
    """Two runs computed the same, but for the order of sums."""
    mine, theirs = read_losses(run), read_losses(other)
    assert list(mine) == list(theirs) == [BATCH * step for step in range(1, STEPS + 1)]
    assert list(mine.values()) == pytest.approx(list(theirs.values()), rel=1e-3)
    for kind in ("raw", "ema"):
        here, there = (load_weights(path / "weights" / f"{kind}.safetensors")[0] for path in (run, other))
        moved = sum((here[n] - there[n]).norm() ** 2 for n in there) ** 0.5
        assert moved < 1e-2 * sum(there[n].norm() ** 2 for n in there) ** 0.5


@pytest.mark.parametrize("name", EXACT)
def test_a_gpu_computes_what_a_cpu_does(folder, name):
    assert_same(folder / name, folder / "cpu")


@pytest.mark.parametrize("name", COMPILED)
def test_with_what_is_compiled_or_lies_in_memory_it_computes_the_same(folder, name):
    train(folder, (name, COMPILED[name]), gpu=True)
    assert_same(folder / name, folder / "cpu")


def test_in_bf16_it_computes_nearly_what_a_cpu_does(folder):
    assert list(read_losses(folder / "bf16").values()) == pytest.approx(
        list(read_losses(folder / "cpu_bf16").values()), rel=0.03
    )


def test_validation_is_the_same_number_on_both(folder):
    found = validation(folder / "stage3")
    assert len(found) == 2
    assert found == pytest.approx(validation(folder / "cpu"), rel=1e-3)


@pytest.mark.parametrize("name", ["stage3", "stage2", "bf16"])
def test_a_run_that_was_cut_ends_bit_by_bit_as_if_it_had_not_been(folder, name):
    copy = f"{name}_cut"
    cut_back(folder / name, folder / copy, step=6)
    train(folder, (copy, {**EXACT, "bf16": BF16}[name]), gpu=True)
    assert read_losses(folder / copy) == read_losses(folder / name)
    for kind in ("raw", "ema"):
        mine, theirs = (load_weights(folder / run / "weights" / f"{kind}.safetensors")[0] for run in (copy, name))
        assert all(torch.equal(mine[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize(("begun", "gpu"), [("stage3", False), ("cpu", True)])
def test_checkpoints_go_from_one_kind_of_device_to_the_other(folder, begun, gpu):
    copy = f"{begun}_elsewhere"
    cut_back(folder / begun, folder / copy, step=6)
    train(folder, (copy, []), gpu=gpu)
    assert list(read_losses(folder / copy).values()) == pytest.approx(
        list(read_losses(folder / "cpu").values()), rel=1e-3
    )


def test_the_log_tells_speed_and_memory(folder):
    last = read_log(folder / "bf16")[-1]
    assert 0 < last["mfu"] < 1
    assert 0 < last["memory_gib"] < torch.cuda.get_device_properties(0).total_memory / 2**30
    assert "cpu_cores" not in last


@pytest.mark.parametrize("name", ["stage3", "stage2", "bf16"])
def test_the_plan_is_right_about_bytes_there(folder, name):
    rows = grade_run(str(folder / name))
    for part in ("weights", "masters", "moments", "gradients", "ema", "activations"):
        planned, measured = rows[f"bytes_per_rank/{part}"]
        assert planned == pytest.approx(measured, rel=0.05), part


def test_the_launcher_takes_the_gpu(folder):
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "1", "--module", "trainer", "train"]
    words = ["world-d2", "--data", str(folder / "data"), "--out", str(folder / "launched"), *COMMON]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_losses(folder / "launched") == read_losses(folder / "stage3")


def test_a_trial_tells_how_near_the_device_comes_to_its_peak():
    base: Any = world(6)
    recipe = dataclasses.replace(base, global_batch=64, precision="bf16")
    machine = detect_machine("bf16")
    assert machine.overlap
    assert 0 < run_trial(recipe, machine, world_size=1)["efficiency"] < 1
