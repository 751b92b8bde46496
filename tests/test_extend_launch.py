"""A launch target from outside: two functions and a line in TARGETS, then the public command knows it."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = '''
from infra.__main__ import main
from infra.errors import run_cli
from infra.launch import TARGETS
from infra.launch.job import hand_over, write_command, write_exports
from infra.launch.target import Target


def render(job):
    """A script for OpenPBS."""
    lines = [f"#PBS -N {job.name}", f"#PBS -q {job.options.get('queue', 'batch')}", f"#PBS -l select={job.nodes}"]
    return "\\n".join(["#!/usr/bin/env bash", *lines, *write_exports(job), f"exec {write_command(job)}"]) + "\\n"


def submit(job):
    return hand_over("qsub", [], render(job))


TARGETS["pbs"] = Target("a script for qsub", render, submit, options={"queue": "where it waits"}, client="qsub")
run_cli(main)
'''


def launch(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), "launch", *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=240)


def test_a_target_from_outside_renders_and_submits_through_the_public_command(tmp_path):
    words = ("pbs", "--nodes", "2", "--option", "queue=long", "--env", "A=1 2", "--", "python", "-m", "eval", "run")
    done = launch(tmp_path, "--dry-run", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1:] == [
        "#PBS -N beeline", "#PBS -q long", "#PBS -l select=2", "export A='1 2'", "exec python -m eval run",
    ]  # fmt: skip
    scheduler = tmp_path / "bin" / "qsub"
    scheduler.parent.mkdir()
    scheduler.write_text("#!/bin/sh\ngrep -c PBS\nexit 3\n")
    scheduler.chmod(0o755)
    done = launch(tmp_path, *words, PATH=f"{scheduler.parent}:{os.environ['PATH']}")
    assert (done.returncode, done.stdout) == (3, "3\n"), done.stderr


def test_the_command_tells_what_it_takes_and_refuses_the_rest(tmp_path):
    told = " ".join(launch(tmp_path, "--help").stdout.split())
    assert "pbs: a script for qsub. --option: queue (where it waits)." in told
    done = launch(tmp_path, "pbs", "--option", "queu=long", "--dry-run", "--", "true")
    assert done.returncode == 2
    assert "target pbs does not know option 'queu' (did you mean 'queue'?): it knows queue" in done.stderr
    done = launch(tmp_path, "pb", "--dry-run", "--", "true")
    assert "unknown target 'pb' (did you mean 'pbs'?)" in done.stderr
