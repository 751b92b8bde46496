"""A training under a real Slurm loses a rank three times, and goes on from the last checkpoint without a hand."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from slurm_cluster import ALLOWED, WHY_NOT, start_cluster
from trainer_launch import ROOT, TINY

from data_pipeline.packing.synthetic import write_synthetic
from infra.launch import TARGETS
from infra.launch.job import Job

pytestmark = [pytest.mark.slow, pytest.mark.dist, pytest.mark.skipif(not ALLOWED, reason=WHY_NOT)]


def find_rank(run: Path, rank: int) -> psutil.Process | None:
    """The process of that rank of the run."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[1:4] == ["-m", "trainer", "train"] and str(run) in words and process.environ()["RANK"] == str(rank):
            return process
    return None


def count_steps(run: Path) -> int:
    """Of the newest checkpoint."""
    latest = run / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("step_")) if latest.exists() else 0


@pytest.mark.timeout(900)
def test_a_rank_is_lost_three_times(tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    write_synthetic(str(data), num_samples=64, val_samples=16, latent_shape=(4, 8, 8), buckets=("32x32",))
    words = ["train", "world-d2", "--data", str(data), "--out", str(run), *TINY, "--images", "2400"]
    words += ["--validation.every", "None", "--logging.log-every", "8", "--logging.save-every", "160"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {"PYTHONPATH": str(ROOT), "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    wanted = Job(name="train", command=("python", "-m", "trainer", *words), nodes=2, env=environment)
    (tmp_path / "slurm").mkdir()
    with start_cluster(tmp_path / "slurm") as cluster:
        job = cluster.submit(TARGETS["slurm"].render(wanted))
        for victim in (1, 0, 1):
            before = count_steps(run)
            while count_steps(run) == before:
                state = cluster.describe(job)["JobState"]
                assert state in ("PENDING", "RUNNING", "CONFIGURING"), cluster.read_log("train", job)
                time.sleep(0.2)
            lost = find_rank(run, victim)
            assert lost is not None
            lost.send_signal(signal.SIGKILL)
            while psutil.pid_exists(lost.pid):
                time.sleep(0.1)
        found = cluster.wait_for(job, "COMPLETED", "FAILED")
        said = cluster.read_log("train", job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "0"), said
    assert said.count("starting again from the last checkpoint") == 3
    assert said.count("resumed") == 3
    lines = [json.loads(line) for line in (run / "logs" / "train.jsonl").read_text().splitlines()]
    assert [line["images_seen"] for line in lines if line["kind"] == "train"] == list(range(8, 2401, 8))
