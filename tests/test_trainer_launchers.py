"""SIGTERM to what started the ranks: they save, nobody is left behind, the same command continues."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from trainer_launch import ROOT, TINY

from data_pipeline.synthetic import write_synthetic
from trainer.launchers import gone, is_launcher, launchers_above, trainers_of

BIN = Path(sys.executable).parent
LONG = ["--images", "80000", "--validation.every", "None", "--logging.log-every", "8", "--logging.save-every", "80000"]


def start(command: list[str]) -> subprocess.Popen[str]:
    """The command at the head of a session; what it says goes to a pipe that its ranks hold, too."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, start_new_session=True, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def reach(process: subprocess.Popen[str], run: Path, images: int) -> None:
    """Wait until the run has logged a step that ends at so many images, or more."""
    log = run / "logs" / "train.jsonl"
    before = log.stat().st_size if log.exists() else 0
    deadline = time.monotonic() + 120
    while not log.exists() or log.stat().st_size == before or steps(run) < images // 8:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)


def steps(run: Path) -> int:
    return len((run / "logs" / "train.jsonl").read_text().splitlines())


def saved(run: Path) -> int:
    """The step of the newest checkpoint."""
    return int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))


def end(session: int) -> None:
    for process in trainers_of(session):
        with contextlib.suppress(psutil.Error):
            process.kill()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_synthetic(str(path), num_samples=64, val_samples=16, latent_shape=(4, 8, 8), buckets=("32x32",))
    return path


def test_a_process_knows_what_started_it_and_that_it_is_gone():
    code = "import time; from trainer.launchers import *; found = launchers_above(); print(len(found), flush=True)\n"
    code += "while not gone(found): time.sleep(0.1)\nprint('gone', flush=True)"
    words = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[2]]); time.sleep(60)"
    launcher = start(["-c", words, "torchrun", code])
    assert launcher.stdout.readline() == "1\n"
    assert is_launcher(psutil.Process(launcher.pid))
    launcher.kill()  # not reaped: nobody waits for it
    assert launcher.stdout.readline() == "gone\n"
    assert not gone([])
    launcher.communicate()
    assert not launchers_above() or gone(launchers_above()) is False


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("launcher", "told", "code"),
    [("deepspeed", "head", -15), ("deepspeed", "second", 1), ("torchrun", "head", 1), ("ladder", "head", 75)],
)
def test_sigterm_to_a_launcher_saves_and_leaves_no_rank(data, tmp_path, free_port, launcher, told, code):
    run, port = tmp_path / "world-d2", str(free_port())
    train = ["trainer", "train", "world-d2", "--data", str(data), "--out", str(run), *TINY, *LONG]
    command = {
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", port, "--module", *train],
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", port, "-m", *train],
        "ladder": ladder(data, tmp_path),
    }[launcher]
    process = start(command)
    session = process.pid
    try:
        reach(process, run, 24)
        inner = psutil.Process(process.pid).children()
        if launcher == "ladder":
            session = inner[0].pid
        (inner[0] if told == "second" else psutil.Process(process.pid)).terminate()
        said = process.communicate(timeout=60)[0]  # to the end of the pipe: nobody holds it any more
        assert process.returncode == code, said
        assert not trainers_of(session)
        assert "stopped by signal" in said
        assert saved(run) >= 3
        first = saved(run)
        process = start(command)
        session = process.pid
        reach(process, run, 8 * first + 8)
        os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
        assert f"resumed {run}/checkpoints/step_{first:07d}" in said
        assert saved(run) > first
    finally:
        end(session)


def ladder(data: Path, out: Path) -> list[str]:
    """A ladder of one rung, with the same options as NAME=VALUE."""
    options, words = [], [*TINY, *LONG[2:]]
    for word in words:
        if word.startswith("--"):
            options.append(word.removeprefix("--") + "=")
        else:
            options[-1] += (" " if not options[-1].endswith("=") else "") + word
    common = ["--data", str(data), "--out", str(out), "--images", "80000", "--num-ranks", "2"]
    return ["-m", "trainer", "ladder", "world", "--depths", "2", *common, "--options", *options]
