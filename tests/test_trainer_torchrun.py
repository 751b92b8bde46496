"""The other launcher: `torchrun` starts the same training."""

import os
import subprocess
import sys

import pytest
from trainer_launch import ROOT, TINY

from data_pipeline.packing.synthetic import write_synthetic
from model.files.weights import read_meta


@pytest.mark.slow
@pytest.mark.dist
def test_torchrun_starts_two_ranks(tmp_path, free_port):
    write_synthetic(str(tmp_path / "data"), num_samples=64, val_samples=16, latent_shape=(4, 8, 8), buckets=("32x32",))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    words = ["-m", "trainer", "train", "world-d2", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, *launcher, *words, *TINY, "--images", "16", "--validation.every", "None"],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_meta(tmp_path / "run" / "weights" / "ema.safetensors")["images_seen"] == 16
    assert (tmp_path / "run" / "checkpoints" / "step_0000002" / "rank_00001.json").exists()
