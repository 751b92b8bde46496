"""The Dockerfile, as far as it can be checked without building it: its linter, and what it takes from elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import deepspeed.ops

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "infra" / "Dockerfile").read_text()


def test_the_linter_has_nothing_to_say():
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([str(linter), "infra/Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_its_cuda_is_that_of_the_locked_torch():
    (locked,) = re.findall(r"^cuda-toolkit==(\d+\.\d+)\.", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    (ours,) = re.findall(r"^ARG CUDA=(\d+\.\d+)\.", TEXT, re.MULTILINE)
    assert ours == locked


def test_deepspeed_knows_each_operation_that_it_builds():
    folder = Path(deepspeed.ops.__file__).parent / "op_builder"
    known = {name for path in folder.rglob("*.py") for name in re.findall(r'"(DS_BUILD_\w+)"', path.read_text())}
    asked = set(re.findall(r"(DS_BUILD_\w+)=1", TEXT))
    assert asked
    assert asked <= known
