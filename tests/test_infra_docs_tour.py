"""Every command of the tour (infra/docs/tour.md), read from the page and run at a smaller size."""

import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from markdown_pages import ROOT

PAGE = ROOT / "infra" / "docs" / "tour.md"
NOT_RUN = {"make setup", "source .venv/bin/activate"}  # the test's own environment is set up already
# The page's sizes, and the test's. Each must occur on the page.
SMALLER = {
    "--images 2000": "--images 64 --val-images 16 --workers 2",
    # three validation losses a run, the least that `eval predict` fits a law to
    "--images 3000": "--images 192 --validation.every 64 --validation.samples 8 --logging.save-every 192 "
    "--logging.samples 0 --precision fp32",
    "--prompts-per-task 4": "--prompts-per-task 1 --images-per-prompt 1 --steps 4 --no-calibration",
    "--captions 64": "--captions 8",
    "--no-evaluate": "--no-evaluate --port 0",
}


def commands(text: str) -> list[str]:
    """The lines of code blocks; a backslash joins a line with the next."""
    code = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    return [line.strip() for block in code for line in re.sub(r"\\\n\s*", "", block).split("\n") if line.strip()]


def smaller(command: str) -> str:
    if " plan " in command:
        return command
    for size, small in SMALLER.items():
        command = command.replace(size, small)
    return command


def serve(command: str, folder: Path, environment: dict[str, str]) -> None:
    """The service runs until it is stopped: it must answer, then end on SIGINT."""
    process = subprocess.Popen(
        shlex.split(command), cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        told = ""
        for line in process.stdout or ():
            told += line
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                with urllib.request.urlopen(found[0], timeout=60) as answer:
                    assert answer.status == 200
                break
        else:
            raise AssertionError(told)
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_command_of_the_tour(tmp_path):
    page = PAGE.read_text()
    wanted = commands(page)
    assert {command for command in wanted if not re.match(r"(python -m|deepspeed) ", command)} == NOT_RUN
    assert all(any(size in command for command in wanted) for size in SMALLER)
    binaries = Path(sys.executable).parent
    plain = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment = plain | {
        "PYTHONPATH": str(ROOT), "PATH": f"{binaries}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    for command in wanted:
        if command in NOT_RUN:
            continue
        if " serve " in command:
            serve(smaller(command), tmp_path, environment)
            continue
        begun = time.monotonic()
        done = subprocess.run(
            shlex.split(smaller(command)), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        print(f"{time.monotonic() - begun:6.1f} s  {command}")
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr, f"{command}\n{done.stderr[-3000:]}"
    for made in ("data.png", "grid.png", "report/report.html", "runs/world-d4/weights/ema.safetensors"):
        assert (tmp_path / "tour" / made).stat().st_size > 0
