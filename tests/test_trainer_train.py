"""Whole runs by real ranks: the plain command, bit-equal and elastic resume, damage, SIGTERM, nan, the ladder."""

import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from trainer_launch import TINY, finish, read_log, run_ranks, start_ranks

from data_pipeline.loading.loader import open_dataset
from data_pipeline.selection.choice import DataChoice
from eval.studies.compare import compare_runs, read_run
from infra import storage
from infra.errors import UserError, UserErrors
from infra.results import ResultStore
from infra.values import read_values
from model.files.convert import convert
from model.files.weights import load_model, load_weights, read_meta
from trainer.__main__ import main
from trainer.checks.fitting import check_data
from trainer.checks.preflight import prefer_own_checkpoint
from trainer.ladders.ladder import count_trained_images, train_ladder
from trainer.ladders.launch import ManyRuns
from trainer.ladders.verify import read_losses
from trainer.runfolder import read_recipe

pytestmark = pytest.mark.dist
IMAGES, EVERY = 240, 80  # 30 steps of 8 images; a checkpoint every 10 steps
CADENCE = ["--logging.log-every", "8", "--logging.save-every", str(EVERY), "--validation.every", str(EVERY)]
OVERRIDES = (
    "--images", str(IMAGES), "--model.in-channels", "4", "--model.context-width", "48", "--model.pooled-width", "32",
    "--data.resolution", "32", "--data.text-tokens", "16", "--data.latent-shape", "4", "8", "8", "--global-batch", "8",
    "--optimizer.lr", "3e-3", "--validation.samples", "16", "--validation.batch", "8", "--logging.samples", "0",
    "--logging.log-every", "8", "--logging.save-every", str(EVERY), "--validation.every", str(EVERY),
    "--precision", "fp32",
)  # fmt: skip


def command(data: Path, out: Path, *more: str) -> list[str]:
    arguments = ["-m", "trainer", "train", "world-d2", "--data", str(data), "--out", str(out), "--images", str(IMAGES)]
    return [*arguments, *TINY, *CADENCE, *more]


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """One uninterrupted run on two ranks, through the ladder and the deepspeed launcher."""
    out = tmp_path_factory.mktemp("runs")
    assert train_ladder("world", [2], ManyRuns(DataChoice((str(data),)), str(out), num_ranks=2, overrides=OVERRIDES))
    return out / "world-d2"


@pytest.fixture(scope="module")
def resumed(data, straight, tmp_path_factory) -> tuple[Path, str]:
    """The same run cut back to steps 10 and 20, step 20 damaged, continued on two ranks; and what it said."""
    run = tmp_path_factory.mktemp("resumed") / "world-d2"
    cut(straight, run, keep=(10, 20))
    path = run / "checkpoints" / "step_0000020" / "rank_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    return run, run_ranks(command(data, run), 2)


@pytest.fixture(scope="module")
def elastic(data, straight, tmp_path_factory) -> Path:
    """Two ranks to step 10, one rank to step 30, cut back to step 20, two ranks to step 30."""
    one = tmp_path_factory.mktemp("elastic") / "world-d2"
    cut(straight, one, keep=(10,))
    run_ranks(command(data, one), 1)
    two = tmp_path_factory.mktemp("elastic") / "world-d2"
    cut(one, two, keep=(20,))
    run_ranks(command(data, two), 2)
    return two


def cut(run: Path, copy: Path, *, keep: tuple[int, ...]) -> None:
    """A copy of a run as a kill right after checkpoint `keep[-1]` would have left it."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("tensorboard"))
    for folder in (copy / "checkpoints").glob("step_*"):
        if int(folder.name.removeprefix("step_")) not in keep:
            shutil.rmtree(folder)
    for name in ("ema", "raw"):
        (copy / "weights" / f"{name}.safetensors").unlink()


def test_run_folder_is_complete(straight):
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == [
        "latest", "step_0000010", "step_0000020", "step_0000030",
    ]  # fmt: skip
    assert (straight / "checkpoints" / "latest").read_text() == "step_0000030\n"
    assert sorted(path.name for path in (straight / "weights").iterdir()) == [
        "ema.safetensors", "raw.safetensors", "step_0000010", "step_0000020", "step_0000030",
    ]  # fmt: skip
    plan = json.loads((straight / "plan.json").read_text())
    state, meta = load_weights(straight / "weights" / "ema.safetensors")
    assert plan["parameters"] == sum(tensor.numel() for tensor in state.values())
    recipe = json.loads((straight / "recipe.json").read_text())
    assert recipe["data"]["fingerprint"] == meta["data_fingerprint"]
    assert (meta["images_seen"], meta["run"], meta["kind"]) == (IMAGES, "world-d2", "ema")
    assert read_meta(straight / "weights" / "step_0000010" / "ema.safetensors")["images_seen"] == 80


def test_every_curve_is_in_the_log_and_over_images_in_tensorboard(straight):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = read_log(straight)
    names = {
        "loss", "grad_norm", "attention/max_logit", "attention/entropy", "lr", "images_per_second", "data_wait", "mfu",
        "memory_gib", "ranks/slowest", "ranks/slowest_speed", "ranks/longest_data_wait",
    }  # fmt: skip
    assert all(line.keys() >= names and 0 <= line["data_wait"] <= 1 for line in lines)
    bins = {name for line in lines for name in line if name.startswith("loss/t")}
    assert len(bins) > 1
    board = EventAccumulator(str(straight / "logs" / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    for name in names | bins:
        found = {event.step: event.value for event in board.Scalars(f"train/{name}")}
        assert found == pytest.approx({line["images_seen"]: line[name] for line in lines if name in line}, rel=1e-6)


def test_results_tell_losses_and_cost(straight):
    store = ResultStore(str(straight / "results"))
    values = {row.images_seen: row.value for row in store.rows(metric="val_loss/sd3")}
    assert list(values) == [80, 160, 240]
    assert values[240] < values[80]
    levels = store.rows(prefix="val_loss/sd3")
    assert {row.metric for row in levels} >= {"val_loss/sd3/t0.125", "val_loss/sd3/t1.000"}
    assert all(row.sample_count == 16 and row.protocol_hash for row in levels)
    trained = [row.value for row in store.rows(metric="train_loss")]
    assert len(trained) == 30
    assert trained[-1] < trained[0]
    assert store.rows(metric="cost/seconds")[-1].value > 0


def test_validation_has_intervals_and_keeps_its_samples(straight):
    """Each figure lies inside its interval and is the mean of what was kept; checkpoints are then paired by sample."""
    store = ResultStore(str(straight / "results"))
    rows = store.rows(prefix="val_loss/sd3")
    assert len(rows) == 3 * 9
    for row in rows:
        assert row.low < row.value < row.high
        kept = read_values(store.uri, row.protocol_hash, row.recipe_hash, row.images_seen)
        mine = kept["stratum"] == row.metric.rsplit("/", 1)[-1]
        assert kept["sum"][mine].mean() == pytest.approx(row.value, rel=1e-12)
        assert (kept["cluster"][mine].tolist(), kept["count"][mine].sum()) == (list(range(16)), 16)

    differences, refused = compare_runs(read_run(f"{straight}@80"), read_run(f"{straight}@240"), ["val_loss"])
    assert not refused
    assert {d.how for d in differences} == {"paired"}
    mean = next(d for d in differences if d.metric == "val_loss/sd3")
    wide = [row.high - row.low for row in rows if row.metric == "val_loss/sd3"]
    assert mean.verdict == "better"
    assert mean.high - mean.low < min(wide), "pairing is sharper than either interval"


def test_a_resume_keeps_the_same_samples(straight, resumed):
    def values(run):
        return {path.name: path.read_bytes() for path in (run / "results" / "values").rglob("*.npz")}

    assert len(values(straight)) == 3
    assert {name.rsplit("-")[-1] for name in values(straight)} == {"80.npz", "160.npz", "240.npz"}
    assert values(resumed[0]).keys() == values(straight).keys()


def test_the_ladder_skips_what_is_trained(straight, data, capfd):
    assert count_trained_images(str(straight)) == IMAGES
    out = str(straight.parent)
    train_ladder("world", [2], ManyRuns(DataChoice((str(data),)), out, num_ranks=2, overrides=OVERRIDES))
    told = capfd.readouterr()
    assert "deepspeed" not in told.out
    assert "is trained (240 images)" in told.err


def test_resume_is_bit_equal_and_passes_over_a_damaged_checkpoint(straight, resumed):
    run, said = resumed
    assert "step_0000020 is damaged" in said
    assert "falling back" in said
    assert "resumed" in said
    assert read_losses(run) == read_losses(straight)
    for name in ("ema", "raw"):
        one, _ = load_weights(straight / "weights" / f"{name}.safetensors")
        two, _ = load_weights(run / "weights" / f"{name}.safetensors")
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_each_figure_is_told_once_after_a_resume(straight, resumed):
    run, _ = resumed
    seen = [json.loads(line) for line in (run / "logs" / "train.jsonl").read_text().splitlines()]
    keys = [(line["kind"], line["images_seen"]) for line in seen]
    assert len(keys) == len(set(keys)) == 30 + 3
    rows = ResultStore(str(run / "results")).rows(metric="train_loss")
    assert [row.images_seen for row in rows] == [8 * n for n in range(1, 31)]


def test_resume_on_other_numbers_of_ranks_continues_the_same_run(straight, elastic):
    one, two = read_losses(straight), read_losses(elastic)
    assert one.keys() == two.keys()
    assert sum(images > EVERY for images in two) == 20  # steps after the first change of ranks
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)
    a, _ = load_weights(straight / "weights" / "ema.safetensors")
    b, _ = load_weights(elastic / "weights" / "ema.safetensors")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    values = [ResultStore(str(run / "results")).rows(metric="val_loss/sd3")[-1].value for run in (straight, elastic)]
    assert values[1] == pytest.approx(values[0], rel=1e-5)


def test_sigterm_to_one_rank_saves_and_ends_all_with_their_own_code(data, tmp_path):
    processes = start_ranks(command(data, tmp_path / "run", "--images", "80000", "--logging.save-every", "80000"), 2)
    while not (tmp_path / "run" / "plan.json").exists() and processes[0].poll() is None:
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    codes, said = finish(processes)
    assert codes == [75, 75], said
    assert "stopped by signal" in said
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()


def test_a_run_folder_may_be_on_s3(data, s3, tmp_path):
    run_ranks([*command(data, tmp_path), "--out", f"{s3}/run", "--images", "16", "--logging.save-every", "8"], 1)
    said = run_ranks([*command(data, tmp_path), "--out", f"{s3}/run", "--images", "16", "--logging.save-every", "8"], 1)
    assert "resumed" in said
    assert "is trained already" in said
    names = {uri.removeprefix(f"{s3}/run/") for uri in storage.list_files(f"{s3}/run")}
    assert names >= {"recipe.json", "plan.json", "checkpoints/latest", "weights/ema.safetensors"}
    assert count_trained_images(f"{s3}/run") == 16
    assert ResultStore(f"{s3}/run/results").rows(metric="val_loss/sd3")
    for start in ("logs/train-", "logs/tensorboard/events"):
        assert any(name.startswith(start) for name in names)


def test_a_run_that_cannot_go_on_stops_with_a_line(data, tmp_path):
    more = ["--optimizer.lr", "1e30", "--optimizer.clip-norm", "None", "--guard.max-skips", "1"]
    codes, said = finish(start_ranks(command(data, tmp_path / "run", *more), 1))
    assert codes == [2], said
    assert "no checkpoint yet: going on, without that batch (1 of 1)" in said
    line = next(line for line in said.splitlines() if line.startswith("error:"))
    assert "the loss is " in line
    assert " at images 8 to 15 (keys " in line
    assert "1 batches were left out already (--guard.max-skips 1)" in line
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "weights").exists()


def test_init_from_starts_where_the_weights_are(data, straight, tmp_path):
    more = ["--init-from", str(straight / "weights" / "ema.safetensors"), "--images", "8"]
    run_ranks(command(data, tmp_path / "run", *more), 1)
    begun, ended = read_losses(straight), read_losses(tmp_path / "run")
    assert ended[8] < 0.8 * begun[8]  # same images and noise at the first step, far better weights
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["init_weights"]


def test_export_from_a_checkpoint_equals_what_training_exported(data, straight, tmp_path, monkeypatch, capsys):
    for kind in ("ema", "raw"):
        out = tmp_path / f"{kind}.safetensors"
        words = ["export", str(straight), "--data", str(data), "--kind", kind, "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["trainer", *words])
        main()
        trained, meta = load_weights(straight / "weights" / f"{kind}.safetensors")
        found, again = load_weights(out)
        assert all(torch.equal(trained[name], found[name]) for name in trained)
        assert again | {"code_version": ""} == meta | {"code_version": ""}
    assert "parameters from" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["beeline", "sd3"])
def test_bf16_exports_hold_the_rounded_weights_in_half_the_bytes(data, straight, tmp_path, monkeypatch, layout):
    out, back = tmp_path / "half.safetensors", tmp_path / "back.safetensors"
    words = ["export", str(straight), "--data", str(data), "--dtype", "bf16", "--format", layout, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["trainer", *words])
    main()
    if layout == "sd3":
        convert(out, back, to="beeline")
    trained, _ = load_weights(straight / "weights" / "ema.safetensors")
    found, _ = load_weights(back if layout == "sd3" else out)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert all(torch.equal(trained[name].bfloat16(), found[name]) for name in trained)
    if layout == "beeline":  # SD3's files also hold the table of positions
        assert out.stat().st_size < 0.6 * (straight / "weights" / "ema.safetensors").stat().st_size
    assert next(load_model(out if layout == "beeline" else back)[0].parameters()).dtype == torch.float32


def test_export_with_sd3_names_comes_back_as_it_was(data, straight, tmp_path, monkeypatch):
    out, back = tmp_path / "sd3.safetensors", tmp_path / "back.safetensors"
    words = ["export", str(straight), "--data", str(data), "--kind", "ema", "--format", "sd3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["trainer", *words])
    main()
    assert "val_loss/sd3" in out.with_name("sd3.safetensors.md").read_text()
    convert(out, back, to="beeline")
    trained, _ = load_weights(straight / "weights" / "ema.safetensors")
    found, _ = load_weights(back)
    assert all(torch.equal(trained[name], found[name]) for name in trained)


def test_a_recipe_that_was_made_for_other_data_is_refused(data, straight):
    recipe = read_recipe(str(straight))
    check_data(recipe, open_dataset(str(data)))
    elsewhere = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, fingerprint="feedfacefeedface"))
    with pytest.raises(UserErrors, match="was made for feedfacefeedface"):
        check_data(elsewhere, open_dataset(str(data)))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--model.in-channels", "8"], "latent channels: data 4, recipe 8 (--model.in-channels 4)"),
        (["--formulation", "rf/lognrom(0.00,1.00)"], "lognorm"),
        (["--validation.protocol", "sd33"], "sd3"),
        (["--ema.profiles", "power:0.9"], "out of range"),
        (["--parallel.micro-batch", "3"], "micro_batch 3 does not divide the 8 images"),
        (["--resume", "/no/such/step_0000001"], "no checkpoint there"),
        (["--init-from", "/no/such/file"], "/no/such/file"),
    ],
)
def test_dry_run_finds_what_does_not_fit(data, tmp_path, monkeypatch, more, says):
    monkeypatch.setattr(sys, "argv", ["trainer", *command(data, tmp_path / "run", "--dry-run", *more)[2:]])
    with pytest.raises(ValueError, match=r"\w") as caught:
        main()
    assert says in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_dry_run_writes_nothing_and_shows_the_plan(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trainer", *command(data, tmp_path / "run", "--dry-run")[2:]])
    main()
    told = capsys.readouterr().out
    assert "parameters" in told
    assert "nothing was written" in told
    assert not (tmp_path / "run").exists()


def dry_run(monkeypatch, data: Path, out: Path, *more: str) -> None:
    monkeypatch.setattr(sys, "argv", ["trainer", *command(data, out, "--dry-run", *more)[2:]])
    main()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def test_dry_run_reads_the_checkpoint_that_would_be_continued(data, straight, tmp_path, monkeypatch, capsys):
    run = tmp_path / "world-d2"
    cut(straight, run, keep=(10, 20))
    dry_run(monkeypatch, data, run)
    assert "step_0000020 is whole: the run continues at 160 images" in capsys.readouterr().out
    flip(run / "checkpoints" / "step_0000020" / "rank_00000.safetensors")
    dry_run(monkeypatch, data, run)
    told = capsys.readouterr()
    assert "step_0000020 is damaged" in told.err
    assert "step_0000010 is whole: the run continues at 80 images" in told.out
    with pytest.raises(UserError, match="step_0000020: not a whole checkpoint"):
        dry_run(monkeypatch, data, tmp_path / "new", "--resume", str(run / "checkpoints" / "step_0000020"))
    (run / "checkpoints" / "step_0000010" / "rank_00001.safetensors").unlink()  # half copied
    with pytest.raises(UserError, match="all 2 checkpoints are damaged"):
        dry_run(monkeypatch, data, run)
    with pytest.raises(UserError, match=r"not a whole .*step_0000010/rank_00001.safetensors: no such file"):
        dry_run(monkeypatch, data, tmp_path / "new", "--resume", str(run / "checkpoints" / "step_0000010"))


def test_dry_run_refuses_a_checkpoint_of_another_architecture(data, straight, tmp_path, monkeypatch):
    other = ["--resume", str(straight / "checkpoints" / "step_0000010"), "--model.depth", "1"]
    with pytest.raises(UserError, match=r"another architecture \(model.depth: 2 -> 1\)"):
        dry_run(monkeypatch, data, tmp_path / "new", *other)
    # With checkpoints of its own a branch is continued, not begun again.
    assert prefer_own_checkpoint(str(straight), other[1]) == "latest"
    assert prefer_own_checkpoint(str(tmp_path / "new"), other[1]) == other[1]


def test_dry_run_finds_a_port_in_use(data, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(UserError, match=r"port \d+ is in use .*give the launcher --master_port N"):
            dry_run(monkeypatch, data, tmp_path / "new")


@pytest.mark.slow
@pytest.mark.parametrize(("dry", "option"), [(True, "-H"), (False, "--hostfile")])
def test_a_missing_hostfile_is_an_error_not_a_smaller_run(data, tmp_path, dry, option):
    words = [option, str(tmp_path / "hosts"), "--num_gpus", "1", "--module", "trainer"]
    more = ["--dry-run"] if dry else []
    done = subprocess.run(
        [str(Path(sys.executable).parent / "deepspeed"), *words, *command(data, tmp_path / "run", *more)[2:]],
        env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:")]
    assert errors == [f"error: --hostfile {tmp_path}/hosts: no such file; without it DeepSpeed trains on this machine "
                      "alone: correct the path, or leave --hostfile out"]  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_run_folder_keeps_its_recipe(data, straight, monkeypatch):
    for more, says in ((["--seed", "7"], "seed: 0 -> 7"), (["--resume", "none"], "--resume is none")):
        monkeypatch.setattr(sys, "argv", ["trainer", *command(data, straight, "--dry-run", *more)[2:]])
        with pytest.raises(UserError, match=says):
            main()


def test_losses_are_finite_everywhere(straight, resumed, elastic):
    for run in (straight, resumed[0], elastic):
        assert all(math.isfinite(loss) for loss in read_losses(run).values())
