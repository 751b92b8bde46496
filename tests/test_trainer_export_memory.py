"""Weights leave tensor by tensor in every format: memory stays far below the size of the file, on a disk and to S3."""

import os
import subprocess
import sys

import pytest
from trainer_launch import ROOT


@pytest.mark.parametrize("where", ["disk", "s3://bucket"])
def test_memory_of_an_export_is_bounded(tmp_path, where):
    script = str(ROOT / "tests" / "trainer_export_memory.py")
    place = str(tmp_path) if where == "disk" else where
    done = subprocess.run(
        [sys.executable, script, str(tmp_path), place],
        env=os.environ | {"PYTHONPATH": str(ROOT), "BEELINE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    size, added = map(int, done.stdout.split())
    assert size > 150e6
    assert added < 50e6  # the largest tensor is 6 MB
    folder = tmp_path if where == "disk" else tmp_path / "sent"
    assert min((folder / name).stat().st_size for name in ("ours.safetensors", "sd3.safetensors")) > size
    parts = [path.stat().st_size for path in tmp_path.rglob("diffusion_pytorch_model-*-of-*.safetensors")]
    assert len(parts) > 1
    assert max(parts) < 60.1e6
    assert sum(parts) > size
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
