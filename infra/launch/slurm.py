"""A batch script for sbatch. DeepSpeed starts on every node; other commands get a Ray cluster of the job's nodes."""

import shlex

from infra.launch.job import (
    MASTER_ADDR,
    NODE_RANK,
    Job,
    hand_over,
    write_command,
    write_exports,
    write_hostfile,
    write_ray_cluster,
)
from infra.launch.target import Target


def render(job: Job) -> str:
    """The sbatch script. `options` become #SBATCH lines (partition, account, time, ...) and win over the defaults."""
    settings = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",
        "output": "%x-%j.log",
        "open-mode": "append",
        "requeue": "",
        "signal": "TERM@120",
    }
    if job.working_dir != ".":
        settings["chdir"] = job.working_dir
    if job.gpus_per_node:
        settings["gpus-per-node"] = str(job.gpus_per_node)
    settings.update(job.options)
    header = [f"#SBATCH --{key}" + (f"={value}" if value else "") for key, value in settings.items()]
    body = _write_one_node(job) if job.nodes == 1 else _write_every_node(job) if job.on_every_node else _write_ray(job)
    return "\n".join(["#!/usr/bin/env bash", *header, "set -euo pipefail", *write_exports(job), *body]) + "\n"


def submit(job: Job) -> int:
    """Give it to sbatch."""
    return hand_over("sbatch", [], render(job))


def _write_srun(job: Job, *arguments: str) -> str:
    container = f" --container-image={shlex.quote(job.image)}" if job.image else ""  # needs the pyxis plugin
    return " ".join(["srun", "--kill-on-bad-exit=1" + container, *arguments, "bash -c"])


def _write_one_node(job: Job) -> list[str]:
    return [f"{_write_srun(job)} {shlex.quote('exec ' + write_command(job))}"]


HEAD = f'export {MASTER_ADDR}=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'


def _write_every_node(job: Job) -> list[str]:
    node = [f"export {NODE_RANK}=$SLURM_NODEID", *write_hostfile(job), f"exec {write_command(job)}"]
    return [HEAD, f"{_write_srun(job)} {shlex.quote(chr(10).join(node))}"]


def _write_ray(job: Job) -> list[str]:
    """Ray's control ports answer to anyone who holds the token, so each job draws its own."""
    address = f'export {MASTER_ADDR}=$(getent ahostsv4 "${MASTER_ADDR}" | head -n 1 | cut -d " " -f 1)'
    token = "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n')"
    # Two jobs may share a machine: each takes a port of its own.
    port = "export BEELINE_RAY_PORT=$((20000 + 2 * (SLURM_JOB_ID % 5000)))"
    node = write_ray_cluster(job, rank="SLURM_NODEID", port="$BEELINE_RAY_PORT")
    # The head's end is the job's end: --wait ends workers that do not notice.
    return [HEAD, address, token, port, f"{_write_srun(job, '--wait=30')} {shlex.quote(chr(10).join(node))}"]


TARGET = Target("a batch script for sbatch", render, submit, options=None, client="sbatch")
