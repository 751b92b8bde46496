"""What `--dry-run` finds by the plain command: everything that does not fit, several mistakes in one run."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from trainer_launch import ROOT, TINY, finish, halted, start_ranks

from data_pipeline.packing.synthetic import write_synthetic
from infra.errors import UserErrors, choose_code
from trainer.__main__ import main
from trainer.commands import TrainArgs, parse_options
from trainer.recipes import get_recipe

pytestmark = pytest.mark.dist
SWAPPED = ["--parallel.offload-optimizer", "--parallel.offload-parameters", "nvme", "--parallel.nvme-path"]
LAUNCHER = ["-c", "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[3:]]))"]
HERE = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_synthetic(str(path), num_samples=64, val_samples=16, latent_shape=(4, 8, 8), buckets=("32x32", "24x40"))
    return path


def command(data: Path | str, out: Path | str, *more: str) -> list[str]:
    arguments = ["-m", "trainer", "train", "world-d2", "--data", str(data), "--out", str(out), "--dry-run"]
    return [*arguments, "--images", "64", *TINY, *more]


def refused(monkeypatch, data: Path, out: Path, *more: str) -> list[str]:
    """The lines that a dry run ends with."""
    monkeypatch.setattr(sys, "argv", ["trainer", *command(data, out, *more)[2:]])
    with pytest.raises(UserErrors) as caught:
        main()
    return list(caught.value.lines)


def interrupted(data: Path, run: Path, *more: str) -> Path:
    """A run folder with one checkpoint of the recipe that these words give."""
    words = command(data, run, *more)[4:]
    return halted(parse_options(TrainArgs, words, "train", recipe=get_recipe("world-d2")).recipe, str(data), run)


def test_a_data_set_of_several_buckets_fits(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trainer", *command(data, tmp_path / "run")[2:]])
    main()
    assert "nothing was written" in capsys.readouterr().out


def test_storage_that_does_not_answer_is_no_mistake(free_port, tmp_path, monkeypatch):
    """A scheduler tries again what ends with 69, and nothing that ends with 2."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    for out, more, code in (
        (str(tmp_path / "run"), (), 69), ("s3://bucket/run", (), 69), ("s3://bucket/run", ("--optimizer.lr", "-1"), 2)
    ):  # fmt: skip
        words = [*command("s3://bucket/data", out, *more)[2:]]
        monkeypatch.setattr(sys, "argv", ["trainer", *words])
        with pytest.raises(UserErrors) as caught:
            main()
        assert choose_code(caught.value) == code, caught.value.lines
        assert [line for line in caught.value.lines if "does not answer" not in line] == [
            "recipe world-d2: optimizer.lr is -1.0, expected a positive number" for _ in more[1:]
        ]


def test_another_node_without_storage_says_so(free_port, tmp_path, monkeypatch, capsys):
    """Rank 0 may reach what this node cannot, and then reports nothing."""
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(sys, "argv", ["trainer", *command("s3://bucket/data", tmp_path / "run")[2:]])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr().err
    assert caught.value.code == 69, said
    assert f"error: {socket.gethostname()}: s3://bucket/data" in said


def test_ranks_that_cannot_meet_may_try_again():
    """Rank 0 finds its port in use, rank 1 finds nobody: either may pass."""
    code = "from infra.errors import run_cli; from trainer.zero.group import start; run_cli(lambda: start(timeout_s=2))"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        codes, said = finish(start_ranks(["-c", code], 2, of_rank={0: {"MASTER_PORT": str(taken.getsockname()[1])}}))
    assert codes == [69, 69], said
    assert "is in use" in said
    assert "ranks could not meet at 127.0.0.1:" in said


def test_latents_of_another_height_and_width(data, tmp_path, monkeypatch):
    shape = ["--data.latent-shape", "4", "16", "16"]
    [line] = refused(monkeypatch, data, tmp_path / "run", *shape)
    assert "latent shape: data 4 8 8, recipe 4 16 16 (--data.latent-shape 4 8 8)" in line
    # The same pixels by an autoencoder of another factor, and buckets beyond any plan.
    write_synthetic(str(tmp_path / "f2"), num_samples=16, val_samples=8, latent_shape=(4, 16, 16), buckets=("32x32",))
    [line] = refused(monkeypatch, tmp_path / "f2", tmp_path / "run")
    assert "latent shape: data 4 16 16, recipe 4 8 8" in line
    buckets = ("32x32", "64x64", "20x52")
    write_synthetic(str(tmp_path / "odd"), num_samples=64, val_samples=8, latent_shape=(4, 8, 8), buckets=buckets)
    large, odd = sorted(refused(monkeypatch, tmp_path / "odd", tmp_path / "run"), key=lambda line: "20x52" in line)
    assert "bucket 64x64 (16 images) has latents of 16x16, more than 2 times the 64" in large
    assert "bucket 20x52 (16 images) has latents of 5x13, which patch 2" in odd
    assert not (tmp_path / "run").exists()


def test_numbers_that_no_run_can_be_made_of(data, tmp_path, monkeypatch):
    more = ["--optimizer.betas", "2", "3", "--optimizer.eps", "-1", "--optimizer.clip-norm", "-1"]
    more += ["--optimizer.lr", "nan", "--validation.seed", "-1"]
    found = refused(monkeypatch, data, tmp_path / "run", *more)
    for says in ("betas are 2.0 3.0", "eps is -1.0", "clip_norm is -1.0", "lr is nan", "validation.seed is -1"):
        assert sum(says in line for line in found) == 1, (says, found)
    assert len(found) == 5


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("file", "file is a file, not a folder: choose another --out"),
        ("file/below/run", "file is a file, not a folder"),
        ("/proc/no/run", "/proc takes no file"),
    ],
)
def test_a_run_folder_that_cannot_be_made(data, tmp_path, monkeypatch, out, says):
    (tmp_path / "file").write_text("")
    found = refused(monkeypatch, data, tmp_path / out)
    assert says in found[0]
    assert len(found) == 1, found


def test_an_empty_val_split(tmp_path, monkeypatch):
    write_synthetic(str(tmp_path / "data"), num_samples=16, val_samples=0, latent_shape=(4, 8, 8), buckets=("32x32",))
    [line] = refused(monkeypatch, tmp_path / "data", tmp_path / "run")
    assert "split 'val' is empty; use --validation.every None" in line


@pytest.mark.parametrize(
    ("path", "says"), [("/no/such/folder", "No such file or directory"), ("/proc", "takes no file")]
)
def test_a_folder_for_swapping_that_takes_no_file(data, tmp_path, monkeypatch, path, says):
    [line] = refused(monkeypatch, data, tmp_path / "run", *SWAPPED, path)
    assert f"parallel.nvme_path {path} takes no file" in line
    assert says in line
    assert "--parallel.nvme-path" in line


def test_switches_that_this_machine_or_number_of_ranks_cannot_do(data, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CC", "no-such-compiler")
    more = ["--parallel.hpz", "2", "--parallel.compile", "--optimizer.kernel", "apex"]
    found = refused(monkeypatch, data, tmp_path / "run", *more)
    for says in ("parallel.hpz 2 does not divide the 1 ranks", "parallel.compile needs a compiler, but there is no "
                 "no-such-compiler here", "apex is not installed"):  # fmt: skip
        assert sum(says in line for line in found) == 1, found
    assert len(found) == 3


def test_a_checkpoint_that_came_here_in_half(data, tmp_path, monkeypatch, capsys):
    folder = interrupted(data, tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["trainer", *command(data, tmp_path / "run")[2:]])
    main()
    assert "step_0000001 is whole: the run continues at 8 images" in capsys.readouterr().out
    (folder / "manifest.json").unlink()
    [line] = refused(monkeypatch, data, tmp_path / "run")
    assert "names step_0000001 as its latest checkpoint, but that has no manifest.json: it is half copied" in line
    [line] = refused(monkeypatch, data, tmp_path / "new", "--resume", str(folder))
    assert "no checkpoint there (half copied: its manifest.json is missing)" in line


def test_several_mistakes_are_found_in_one_run(data, tmp_path, monkeypatch):
    """Two ranks of a launcher: rank 0 tells each in a line, the other leaves quietly; nothing is written."""
    other, run = tmp_path / "other", tmp_path / "run"
    branch = interrupted(data, other, "--model.depth", "1")
    damaged = interrupted(data, run)
    file = damaged / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    before = sorted(str(path) for path in run.rglob("*"))
    more = ["--global-batch", "9", "--data.latent-shape", "4", "16", "16", "--model.pooled-width", "64"]
    more += ["--optimizer.kernel", "apex", "--ema.profiles", "power:0.9", "--optimizer.lr", "-1"]
    more += [*SWAPPED, "/no/path"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = {"MASTER_PORT": str(taken.getsockname()[1])}
        launched = [*LAUNCHER, "--hostfile", "/no/hosts", *command(data, run, *more)]
        codes, said = finish(start_ranks(launched, 2, of_rank={0: port, 1: port}))
    assert codes == [2, 2], said
    assert "Traceback" not in said
    found = [line for line in said.splitlines() if line.startswith("error: ")]
    wanted = (
        "--hostfile /no/hosts: no such file",
        "optimizer.lr is -1.0, expected a positive number",
        "global_batch 9 does not divide by 2 ranks",
        "latent shape: data 4 8 8, recipe 4 16 16",
        "pooled text width: data 32, recipe 64 (--model.pooled-width 32)",
        "'power:0.9' is out of range",
        "apex is not installed",
        "parallel.nvme_path /no/path takes no file",
        "was started with another recipe",
        "all 1 checkpoints are damaged",
        f"port {port['MASTER_PORT']} is in use",
    )
    for says in wanted:
        assert sum(says in line for line in found) == 1, (says, said)
    assert sorted(str(path) for path in run.rglob("*")) == before
    assert len(found) == len(wanted) - 1  # shapes share a line
    # A branch from another architecture, damaged too.
    (branch / "rank_00000.safetensors").unlink()
    foreign, broken = refused(monkeypatch, data, tmp_path / "new", "--resume", str(branch))
    assert "of another architecture (model.depth: 1 -> 2)" in foreign
    assert "not a whole checkpoint" in broken


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "asks", "instead"),
    [
        (["--optimizer.kernel", "deepspeed_cpu"], "optimizer.kernel deepspeed_cpu", "--optimizer.kernel torch"),
        (["--optimizer.kernel", "deepspeed_fused"], "optimizer.kernel deepspeed_fused", "--optimizer.kernel torch"),
        ([*SWAPPED, "."], "parallel.offload_parameters nvme", "--parallel.offload-parameters cpu, or install libaio"),
    ],
)
def test_what_deepspeed_cannot_compile(data, tmp_path, more, asks, instead):
    broken = {"CC": "false", "CXX": "false", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), **HERE}
    done = subprocess.run(
        [sys.executable, *command(data, tmp_path / "run", *more)],
        env=os.environ | broken, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"asks for {asks}, which DeepSpeed cannot compile here (" in line
    assert f"use {instead}" in line
