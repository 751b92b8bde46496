"""The container of a Kubernetes manifest, for real but for the image: its command is PID 1 of a PID namespace.

The kernel treats that process as Kubernetes' own: it ignores signals without a handler, adopts all orphans, and its end
is the end of all others. SIGTERM to it alone is what an eviction does.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from kubelet import expand
from trainer_launch import ROOT, TINY

from data_pipeline.packing.synthetic import write_synthetic
from infra.launch import TARGETS
from infra.launch.job import Job

ALLOWED = os.geteuid() == 0 and shutil.which("unshare") is not None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.dist,
    pytest.mark.skipif(not ALLOWED, reason="needs root and unshare (util-linux) to make a PID namespace"),
]
WAIT_S = 30.0  # what Kubernetes waits by default before it kills


def run_container(command: tuple[str, ...], ranks: int) -> subprocess.Popen[str]:
    """What a pod of the rendered manifest runs, as PID 1 of a namespace of its own."""
    wanted = Job(name="pod", command=command, ranks_per_node=ranks, image="beeline:test")
    document = yaml.safe_load(TARGETS["kubernetes"].render(wanted))
    (container,) = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    command = [expand(word, {}) for word in container["command"]]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    told = {"PYTHONPATH": str(ROOT), "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", *command], env=os.environ | told, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", ["ranks", "torchrun", "deepspeed"])
def test_an_eviction_leaves_a_checkpoint_and_exit_code_75(tmp_path, launcher):
    write_synthetic(str(tmp_path / "data"), num_samples=64, val_samples=16, latent_shape=(4, 8, 8), buckets=("32x32",))
    run = tmp_path / "run"
    train = ["train", "world-d2", "--data", str(tmp_path / "data"), "--out", str(run), *TINY, "--images", "800000"]
    train += ["--validation.every", "None", "--logging.log-every", "8", "--logging.save-every", "800000"]
    start = {
        "ranks": ("python", "-m", "trainer"),
        "torchrun": ("torchrun", "-m", "trainer"),
        "deepspeed": ("deepspeed", "--num_gpus", "2", "--module", "trainer"),
    }[launcher]
    process = run_container((*start, *train), ranks=2)
    try:
        while not (run / "plan.json").exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.2)
        (first,) = psutil.Process(process.pid).children()
        assert "supervise" in first.cmdline()
        first.terminate()
        said = process.communicate(timeout=WAIT_S)[0]  # to the end of the pipe: no rank holds it any more
        assert process.returncode == 75, said
        assert "stopped by signal" in said
        assert (run / "checkpoints" / "latest").read_text().startswith("step_")
    finally:
        for child in psutil.Process(process.pid).children() if process.poll() is None else []:
            child.send_signal(signal.SIGKILL)  # PID 1 of the namespace: all below it go, too
