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
from trainer_launch import ROOT, TINY, until

from infra.errors import UserError, choose_code
from trainer.ladders.ladder import check_finished, is_done
from trainer.launchers import has_ended, is_launcher

BIN = Path(sys.executable).parent
LONG = ["--images", "80000", "--validation.every", "None", "--logging.log-every", "8", "--logging.save-every", "80000"]


def start(command: list[str]) -> subprocess.Popen[str]:
    """The command at the head of a session; what it says goes to a pipe that its ranks hold, too."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, start_new_session=True, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def saved(run: Path) -> int:
    """The step of the newest checkpoint."""
    return int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))


@pytest.mark.parametrize(("code", "becomes"), [(2, 2), (1, 69), (69, 69), (76, 69), (-9, 69), (0, 69)])
def test_a_ladder_may_be_tried_again_unless_a_mistake_ended_its_training(tmp_path, code, becomes):
    with pytest.raises(UserError, match=f"exit code {code}; its own message stands above") as caught:
        check_finished(str(tmp_path), code)
    assert choose_code(caught.value) == becomes


def left_of(folder: Path) -> list[psutil.Process]:
    """Processes that live and were told of this folder."""
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if any(str(folder) in word for word in process.info["cmdline"] or ())]


def test_a_process_knows_what_started_it_and_that_it_is_gone():
    code = "import time; from trainer.launchers import *\n"
    code += "found = find_launchers(); print(len(found), flush=True)\n"
    code += "while not has_ended(found): time.sleep(0.1)\nprint('gone', flush=True)"
    words = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[2]]); time.sleep(60)"
    launcher = start(["-c", words, "torchrun", code])
    assert launcher.stdout.readline() == "1\n"
    assert is_launcher(psutil.Process(launcher.pid))
    launcher.kill()  # not reaped: nobody waits for it
    assert launcher.stdout.readline() == "gone\n"
    assert not has_ended([])
    launcher.communicate()


def test_a_process_knows_that_its_launcher_launcher_has_ended_it_looked():
    code = "import os, time; from trainer.launchers import *\n"
    code += "first = find_launchers(); print(launcher_has_ended(first))\n"
    code += "print(os.getppid(), flush=True)\nwhile os.getppid() == int(os.environ['ABOVE']): time.sleep(0.1)\n"
    code += "print(find_launchers(), launcher_has_ended([])); os.environ.pop('TORCHELASTIC_RUN_ID')\n"
    code += "print(launcher_has_ended([]))"
    words = "import os, subprocess, sys, time; more = {'ABOVE': str(os.getpid()), 'TORCHELASTIC_RUN_ID': 'none'}\n"
    words += "subprocess.Popen([sys.executable, '-c', sys.argv[2]], env=os.environ | more); time.sleep(60)"
    launcher = start(["-c", words, "torchrun", code])
    assert launcher.stdout.readline() == "False\n"
    assert int(launcher.stdout.readline()) == launcher.pid
    launcher.kill()
    assert launcher.communicate()[0].splitlines() == ["[] True", "False"]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("killed", ["head", "second"])
def test_ranks_whose_launcher_died_while_they_were_starting_do_not_begin(data, tmp_path, free_port, killed):
    words = ["train", "world-d2", "--data", str(data), "--out", str(tmp_path / "run"), *TINY, *LONG]
    port = ["--master_port", str(free_port())]
    process = start([str(BIN / "deepspeed"), "--num_gpus", "2", *port, "--module", "trainer", *words])
    try:
        while not (ranks := [found for found in left_of(tmp_path) if not is_launcher(found)]):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        (ranks[0].parent() if killed == "second" else process).kill()
        said = process.communicate(timeout=300)[0]  # to the end of the pipe: nobody holds it any more
        assert said.count("the launcher ended while its ranks were starting") == 1, said
        if killed == "head":
            assert "exits with return code = 75" in said  # says the second process
        assert not left_of(tmp_path)
        assert not (tmp_path / "run").exists()
    finally:
        for found in left_of(tmp_path):
            with contextlib.suppress(psutil.Error):
                found.kill()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("launcher", "told", "code"),
    [("deepspeed", "head", -15), ("torchrun", "head", 1), ("ladder", "head", 75), ("deepspeed", "second", 1)],
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
    try:
        while not (run / "plan.json").exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.2)
        (psutil.Process(process.pid).children()[0] if told == "second" else process).terminate()
        said = process.communicate(timeout=300)[0]  # to the end of the pipe: nobody holds it any more
        assert process.returncode == code, said
        assert not left_of(tmp_path)
        assert "stopped by signal" in said
        first = saved(run)
        process = start(command)
        assert f"{run}/checkpoints/step_{first:07d}" in until(process, "resumed").splitlines()[-1]
        process.terminate()
        process.communicate(timeout=300)
        assert saved(run) > first
    finally:
        for process in left_of(tmp_path):
            with contextlib.suppress(psutil.Error):
                process.kill()


@pytest.mark.slow
@pytest.mark.dist
def test_a_sweep_on_ray_workers_goes_on_after_sigterm_and_sigkill(data, tmp_path):
    """SIGTERM to the driver saves what runs. SIGKILL: the workers go with it, and their ranks save and leave."""
    command = shared_sweep(data, tmp_path)
    runs = [tmp_path / f"world-d1-{name}" for name in ("rf", "v-cos", "eps-linear")]
    process = start(command)
    try:
        for number, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -9)):
            before = [saved(run) if (run / "checkpoints" / "latest").exists() else 0 for run in runs[:2]]
            while not all((run / "checkpoints" / "latest").exists() and saved(run) > b for run, b in zip(runs, before)):
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.2)
            process.send_signal(number)
            said = process.communicate(timeout=300)[0]
            assert process.returncode == code, said
            end = time.monotonic() + 120
            while left_of(tmp_path):
                assert time.monotonic() < end, left_of(tmp_path)
                time.sleep(0.2)
            kept = {run: (manifest(run), manifest(run).stat().st_mtime_ns) for run in runs[:2]}
            process = start(command)
        said = process.communicate(timeout=900)[0]
        assert process.returncode == 0, said
        assert all(is_done(str(run)) for run in runs)
        for path, written in kept.values():
            assert path.stat().st_mtime_ns == written, "trained twice"
        finished = {run: (run / "weights" / "ema.safetensors").stat().st_mtime_ns for run in runs}
        process = start(command)
        said = process.communicate(timeout=300)[0]
        assert [line.count("is trained (") for line in said.splitlines()].count(1) == 3, said
        assert {run: (run / "weights" / "ema.safetensors").stat().st_mtime_ns for run in runs} == finished
    finally:
        for process in left_of(tmp_path):
            with contextlib.suppress(psutil.Error):
                process.kill()


def manifest(run: Path) -> Path:
    return run / "checkpoints" / f"step_{saved(run):07d}" / "manifest.json"


def shared_sweep(data: Path, out: Path) -> list[str]:
    """Three formulations for two workers of one rank each."""
    names = ["rf", "v/cos", "eps/linear"]
    common = ["--data", str(data), "--out", str(out), "--images", "2400", "--num-ranks", "1", "--workers", "2"]
    cadence = ["--validation.every", "None", "--logging.log-every", "80", "--logging.save-every", "400"]
    sweep = ["-m", "trainer", "sweep", "formulations", "world-d1", "--formulations", *names]
    return [*sweep, *common, *TINY, *cadence, "--logging.keep", "100"]


def ladder(data: Path, out: Path) -> list[str]:
    """A ladder of one rung, with the same options."""
    common = ["--data", str(data), "--out", str(out), "--images", "80000", "--num-ranks", "2"]
    return ["-m", "trainer", "ladder", "world", "--depths", "2", *common, *TINY, *LONG[2:]]
