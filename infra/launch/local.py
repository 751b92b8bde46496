"""Run on this machine, now."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from infra.errors import UserError
from infra.launch.job import Job, write_command, write_exports
from infra.launch.target import Target


def render(job: Job) -> str:
    """The job as a shell script."""
    _check(job)
    lines = ["#!/usr/bin/env bash", "set -euo pipefail", f"cd {shlex.quote(job.working_dir)}", *write_exports(job)]
    return "\n".join([*lines, f"exec {shlex.join(_list_words(job))}"]) + "\n"


def submit(job: Job) -> int:
    """Run to the end; the job's exit code as shells count it. SIGTERM is passed on, and the end waited for."""
    _check(job)
    if not Path(job.working_dir).is_dir():
        raise UserError(f"working_dir {job.working_dir}: no such folder")
    try:
        process = subprocess.Popen(_list_words(job), cwd=job.working_dir, env={**os.environ, **job.env})
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"cannot run {job.command[0]!r} ({error.strerror}): is it installed and on PATH?") from error
    before = signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    try:
        code = _wait(process)
    finally:
        signal.signal(signal.SIGTERM, before)
    return code if code >= 0 else 128 - code


def _wait(process: subprocess.Popen[bytes]) -> int:
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal sent it to the job as well: let it finish its last checkpoint
            continue


def _list_words(job: Job) -> list[str]:
    """What the user wrote; several ranks below our own supervisor."""
    if job.is_ranks and job.num_ranks > 1:
        return [sys.executable, *shlex.split(write_command(job))[1:]]
    return list(job.command)


def _check(job: Job) -> None:
    if job.nodes > 1 or job.image:
        raise UserError("target local is this machine alone: nodes must be 1 and image unset; use another target")


TARGET = Target("this machine, now", render, submit)
