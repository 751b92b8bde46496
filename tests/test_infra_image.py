"""The Dockerfile, as far as it can be checked without building it: its linter, and what it takes from elsewhere."""

import ast
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

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
    """Among its operations for CUDA: no GPU is there while an image is built, and DeepSpeed would take the CPU's. The
    build checks by name that it did not."""
    ask = "from deepspeed.ops.op_builder.all_ops import ALL_OPS as ops; print([(n, ops[n].BUILD_VAR) for n in ops])"
    told = os.environ | dict(re.findall(r"(DS_ACCELERATOR)=(\w+)", TEXT))
    said = subprocess.run([sys.executable, "-c", ask], env=told, capture_output=True, text=True, check=True).stdout
    known = dict(ast.literal_eval(said.splitlines()[-1]))
    asked = set(re.findall(r"(DS_BUILD_\w+)=1", TEXT))
    (checked,) = re.findall(r"for name in (\(.*?\))", TEXT)
    assert told["DS_ACCELERATOR"] == "cuda"
    assert {known[name] for name in ast.literal_eval(checked)} == asked


def test_what_the_build_checks_is_what_deepspeed_writes():
    """The line itself, run on the DeepSpeed that is installed here, which was built without a GPU's operations."""
    (line,) = re.findall(r'&& python -c "(.*?)"', TEXT.replace("\\\n", ""))
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True)
    from deepspeed.git_version_info import accelerator_name, installed_ops

    assert "AssertionError: " + repr((accelerator_name, installed_ops)) in done.stderr


def test_what_git_ignores_is_no_part_of_the_image():
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    left_out = (ROOT / "infra" / "Dockerfile.dockerignore").read_text().splitlines()
    covered = {name for name in ignored if any(fnmatch(name, pattern.removeprefix("**/")) for pattern in left_out)}
    assert ignored - covered == {"infra/docs/api"}  # below infra/docs
