"""`infra/runs/true_size.sh` at depths that fit into minutes: true shapes, a kill, a bit-equal resume, a graded plan."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trainer_launch import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.dist]
SMALL = {"DEPTHS": "2 6", "STEPS": "4", "SMALL_STEPS": "4", "PYTHON": sys.executable}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[Path, list[dict]]:
    out = tmp_path_factory.mktemp("true_size")
    done = subprocess.run(
        ["bash", str(ROOT / "infra" / "runs" / "true_size.sh"), str(out / "runs"), str(out / "report")],
        env=os.environ | SMALL, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "report", json.loads((out / "report" / "report.json").read_text())


def test_killed_and_resumed_bit_by_bit(report):
    text = (report[0] / "report.md").read_text()
    assert "SIGKILL after step 2: exit codes 76 137" in text
    assert text.count("- kept: killed, resumed and straight through") == 3
    assert "BROKEN" not in text


@pytest.mark.parametrize("number", [0, 1])
def test_the_plan_is_right_about_bytes(report, number):
    rows = report[1][number]["rows"]
    told = ("weights", "masters", "moments", "gradients", "ema", "activations")
    assert rows.keys() >= {f"bytes_per_rank/{name}" for name in told}
    assert rows["parameters"][0] == rows["parameters"][1]
    for name, (planned, measured) in rows.items():
        if name.startswith("bytes_per_rank/"):
            assert planned == pytest.approx(measured, rel=0.05), name
    for name in ("checkpoint_bytes", "storage_bytes"):
        assert rows[name][0] == pytest.approx(rows[name][1], rel=0.02), name
