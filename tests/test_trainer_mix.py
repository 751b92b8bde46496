"""A run on a mix with a filter by real ranks: bit-equal resume, losses by dataset, and data that changed meanwhile."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from trainer_launch import TINY, read_log, run_ranks

from data_pipeline.packing.synthetic import write_synthetic
from infra.errors import UserErrors
from model.files.weights import load_weights
from trainer.__main__ import main
from trainer.runfolder import read_recipe

pytestmark = pytest.mark.dist
STEPS = 8
CADENCE = ["--logging.log-every", "8", "--logging.save-every", "32", "--validation.every", "64"]


@pytest.fixture(scope="module")
def choice(tmp_path_factory) -> list[str]:
    """Two datasets, of one only the rows that a table of scores allows."""
    folder, words = tmp_path_factory.mktemp("data"), ["--data"]
    for name, buckets in (("a", ("32x32", "24x40")), ("b", ("32x32",))):
        write_synthetic(str(folder / name), num_samples=64, val_samples=16, latent_shape=(4, 8, 8), buckets=buckets,
                        shard_rows=16)  # fmt: skip
        words.append(f"{name}={folder / name}")
    keys = [f"train-32x32-{number:06d}" for number in range(32)] + [f"train-24x40-{number:06d}" for number in range(32)]
    pq.write_table(pa.table({"key": keys, "score": np.arange(64) % 4}), folder / "scores.parquet")
    return [*words, "--where", "a: score > 0", "--columns", f"a={folder / 'scores.parquet'}"]


def command(choice: list[str], run: Path, *more: str) -> list[str]:
    mix = [] if "--mix" in more else ["--mix", "a=1", "b=3"]
    words = ["-m", "trainer", "train", "world-d2", *choice, *mix, "--out", str(run), "--images", str(8 * STEPS)]
    return [*words, *TINY, *CADENCE, *more]


@pytest.fixture(scope="module")
def straight(choice, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "straight"
    run_ranks(command(choice, run), 2)
    return run


@pytest.fixture
def interrupted(straight, tmp_path) -> Path:
    """The run as a kill after its first checkpoint would have left it."""
    run = tmp_path / "run"
    shutil.copytree(straight, run, ignore=shutil.ignore_patterns("tensorboard", "step_0000008"))
    for name in ("ema", "raw"):
        (run / "weights" / f"{name}.safetensors").unlink()
    (run / "checkpoints" / "latest").write_text("step_0000004")
    return run


def dry_run(monkeypatch, choice: list[str], run: Path, *more: str) -> None:
    monkeypatch.setattr(sys, "argv", ["trainer", *command(choice, run, *more)[2:], "--dry-run"])
    main()


def test_each_dataset_has_its_loss_in_the_log(straight):
    lines = read_log(straight)
    assert len(lines) == STEPS
    for line in lines:
        parts = [(line.get(f"data/{name}/loss", 0.0), line[f"data/{name}/share"]) for name in "ab"]
        assert sum(share for _, share in parts) == pytest.approx(1)
        assert sum(loss * share for loss, share in parts) == pytest.approx(line["loss"], rel=1e-5)
    told = json.loads((straight / "trained_on.json").read_text())
    assert {name: part["weight"] for name, part in told["parts"].items()} == {"a": "1/4", "b": "3/4"}
    assert told["where"] == ["a: score > 0"]


def test_a_resume_on_two_ranks_is_bit_equal(choice, straight, interrupted):
    run_ranks(command(choice, interrupted), 2)
    assert {line["images_seen"]: line["loss"] for line in read_log(interrupted)} == {
        line["images_seen"]: line["loss"] for line in read_log(straight)
    }
    for kind in ("ema", "raw"):
        one, two = (load_weights(run / "weights" / f"{kind}.safetensors")[0] for run in (straight, interrupted))
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_changed_data_are_refused_with_what_changed_unless_allowed(choice, interrupted, monkeypatch, capsys):
    def refused(words: list[str], *more: str) -> str:
        with pytest.raises(UserErrors) as caught:
            dry_run(monkeypatch, words, interrupted, *more)
        [line] = caught.value.lines
        assert "was begun with other data" in line
        assert "--allow-other-data" in line
        return line

    assert "weight of a: 1/4 -> 1/2; weight of b: 3/4 -> 1/2" in refused(choice, "--mix", "a=1", "b=1")
    assert "where: a: score > 0 -> a: score > 1" in refused([w.replace("> 0", "> 1") for w in choice])
    assert "max_repeats: none -> 7" in refused(choice, "--max-repeats", "7")
    dry_run(monkeypatch, choice, interrupted, "--mix", "a=1", "b=1", "--allow-other-data")
    assert "the run continues at 32 images" in capsys.readouterr().out


def test_a_changed_mix_that_is_allowed_trains_on(choice, straight, interrupted):
    run_ranks(command(choice, interrupted, "--mix", "a=1", "b=1", "--allow-other-data"), 1)
    old, new = read_recipe(str(straight)), read_recipe(str(interrupted))
    assert old.data.fingerprint != new.data.fingerprint
    assert old.hash != new.hash
    one, two = (
        {line["images_seen"]: line["data/b/share"] for line in read_log(run)} for run in (straight, interrupted)
    )
    assert one.keys() == two.keys()
    assert [one[images] for images in range(8, 40, 8)] == [two[images] for images in range(8, 40, 8)]
    assert sum(two[images] for images in range(40, 72, 8)) < sum(one[images] for images in range(40, 72, 8))


def test_a_mix_that_does_not_last_is_refused_before_any_work(choice, tmp_path, monkeypatch):
    with pytest.raises(UserErrors) as caught:
        dry_run(monkeypatch, choice, tmp_path / "new", "--max-repeats", "1", "--images", "8000")
    [line] = caught.value.lines
    assert "every dataset of the mix (a, b) is used up" in line
