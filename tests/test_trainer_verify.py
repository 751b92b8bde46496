"""`verify-resume`: what it compares, on folders made by hand; and the command itself, with real ranks."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer_launch import TINY

from data_pipeline.packing.synthetic import write_synthetic
from data_pipeline.selection.choice import DataChoice
from infra.errors import UserError
from model.files.weights import save_weights
from trainer.ladders.verify import compare_bits, compare_closely, compare_drift, cut_back, describe, verify_resume
from trainer.overrides import drop_options
from trainer.recipes import get_recipe

CONFIG = dataclasses.replace(get_recipe("world-d1").model, in_channels=4, context_width=16, pooled_width=16)


def make(path: Path, losses: list[float], weight: float = 0.5) -> Path:
    """A run folder with these losses, one a step of 8 images, and constant weights."""
    (path / "logs").mkdir(parents=True)
    lines = [{"kind": "train", "images_seen": 8 * n, "loss": loss} for n, loss in enumerate(losses, start=1)]
    (path / "logs" / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = {name: torch.full_like(x, weight) for name, x in CONFIG.build().state_dict().items()}
    for kind in ("ema", "raw"):
        meta = {"kind": kind, "backbone": "mmdit", "config": CONFIG.to_json()}
        save_weights(path / "weights" / f"{kind}.safetensors", state, meta)
    return path


def test_equal_runs_are_equal_and_others_are_not(tmp_path):
    one = make(tmp_path / "one", [2.0, 1.5, 1.0, 0.5])
    assert all(v.kept for v in compare_bits(one, make(tmp_path / "two", [2.0, 1.5, 1.0, 0.5]), "x"))
    found = compare_bits(one, make(tmp_path / "three", [2.0, 1.5, 1.0 + 1e-15, 0.5], 0.5 + 1e-7), "x")
    assert [v.kept for v in found] == [False, False, False]
    assert "first difference at 24 images" in found[0].found
    assert describe(found).startswith("BROKEN  x: losses bit-equal")


def test_fp32_may_differ_by_rounding_only(tmp_path):
    one = make(tmp_path / "one", [2.0, 1.5, 1.0, 0.5])
    near, far = 0.5 * (1 + 9e-4), 0.5 * (1 + 2e-3)
    for name, loss, weight, kept in (
        ("two", 0.5 * (1 + 9e-6), near, [True, True]),
        ("three", 0.5 * (1 + 2e-5), near, [False, True]),
        ("five", 0.5, far, [True, False]),
    ):
        assert [v.kept for v in compare_closely(one, make(tmp_path / name, [2.0, 1.5, 1.0, loss], weight), "x")] == kept
    with pytest.raises(UserError, match="logged other steps"):
        compare_closely(one, make(tmp_path / "four", [2.0, 1.5]), "x")


def test_bf16_may_drift_as_far_as_exchanging_the_ranks_makes_it(tmp_path):
    one = make(tmp_path / "one", [2.0, 1.5, 1.0, 0.5])
    other = make(tmp_path / "other", [2.0, 1.5, 1.0 + 5e-6, 0.5 * 1.002])
    wide, narrow = (make(tmp_path / n, [2.0, 1.5, 1.0, 0.5 * (1 + e)]) for n, e in (("wide", 0.003), ("narrow", 1e-4)))
    assert [v.kept for v in compare_drift(one, other, wide, "x", first=3)] == [True, True, True]
    assert [v.kept for v in compare_drift(one, other, narrow, "x", first=3)] == [True, False, True]
    astray = make(tmp_path / "astray", [2.0, 1.5, 1.0, 0.5], 0.6)
    assert [v.kept for v in compare_drift(one, astray, wide, "x", first=3)] == [True, True, False]
    assert not compare_drift(one, make(tmp_path / "off", [2.0, 1.5, 1.1, 0.5]), wide, "x", first=3)[0].kept


def test_a_cut_run_is_what_a_kill_would_have_left(tmp_path):
    one = make(tmp_path / "one", [2.0, 1.5])
    for step in (1, 2):
        (one / "checkpoints" / f"step_{step:07d}").mkdir(parents=True)
    cut_back(one, tmp_path / "two", step=1)
    assert [p.name for p in (tmp_path / "two" / "checkpoints").iterdir()] == ["step_0000001"]
    assert list((tmp_path / "two" / "weights").iterdir()) == []


def test_mistakes(tmp_path):
    (tmp_path / "x").touch()
    more = {"data": DataChoice(("d",)), "ranks": 2, "other_ranks": 1}
    with pytest.raises(UserError, match="is not empty"):
        verify_resume(get_recipe("world-d2"), [], out=tmp_path, steps=4, **more)
    with pytest.raises(UserError, match="--steps 6: expected a multiple of 4"):
        verify_resume(get_recipe("world-d2"), [], out=tmp_path / "new", steps=6, **more)


def test_the_user_s_own_overrides_reach_every_run():
    words = [
        "--data",
        "D",
        "--optimizer.lr",
        "1e-3",
        "--steps",
        "8",
        "--data.latent-shape",
        "4",
        "8",
        "8",
        "--num_ranks=2",
    ]
    assert drop_options(words, {"data", "steps", "num_ranks"}) == [
        "--optimizer.lr", "1e-3", "--data.latent-shape", "4", "8", "8",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("precision", "elsewhere"),
    [
        ("fp32", ["losses within 1e-05", "ema weights within 0.001"]),
        ("bf16", ["first step within 1e-05", "drift at most twice that", "ema weights no further"]),
    ],
)
def test_the_command_proves_it_with_real_ranks(tmp_path, precision, elsewhere):
    write_synthetic(str(tmp_path / "data"), num_samples=128, val_samples=16, latent_shape=(4, 8, 8), buckets=("32x32",))
    words = ["world-d2", "--data", str(tmp_path / "data"), *TINY, "--precision", precision]

    def trainer(name: str, out: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "trainer", name, *words, "--out", str(tmp_path / out), *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)

    more = []
    if precision == "fp32":  # a second stage
        assert trainer("train", "first", "--images", "16").returncode == 0
        more = ["--init-from", str(tmp_path / "first" / "weights" / "ema.safetensors")]
    done = trainer("verify-resume", "runs", "--steps", "8", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith(("kept", "BROKEN"))]
    assert all(line.startswith("kept") for line in told)
    assert len(told) == 3 + len(elsewhere)
    for line, wanted in zip(told[3:], elsewhere, strict=True):
        assert f"2 -> 1 -> 2 ranks, {precision}: {wanted}" in line
