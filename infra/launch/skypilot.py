"""A SkyPilot task file: any cloud, spot machines included; `sky jobs launch FILE` recovers them."""

import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from infra.errors import UserError
from infra.launch.job import (
    MASTER_ADDR,
    NODE_RANK,
    Job,
    hand_over,
    write_command,
    write_hostfile,
    write_ray_cluster,
    write_supervised,
)
from infra.launch.target import Target


def render(job: Job) -> str:
    """YAML for `sky launch` or, with recovery of spot machines, `sky jobs launch`."""
    resources: dict[str, Any] = {}
    if job.gpus_per_node:
        if "accelerator" not in job.options:
            raise UserError("target skypilot needs to know which GPU: --option accelerator=H100")
        resources["accelerators"] = f"{job.options['accelerator']}:{job.gpus_per_node}"
    if job.image:
        resources["image_id"] = f"docker:{job.image}"
    if "infra" in job.options:
        resources["infra"] = job.options["infra"]
    if "disk_size" in job.options:
        resources["disk_size"] = _read(job, "disk_size", "a whole number of GB", int)
    if "use_spot" in job.options:
        resources["use_spot"] = _read(job, "use_spot", "true or false", {"true": True, "false": False}.__getitem__)
    task: dict[str, Any] = {"name": job.name, "num_nodes": job.nodes, "workdir": job.working_dir}
    task["resources"] = resources
    if job.nodes > 1 and not job.on_every_node:
        task["secrets"] = {"RAY_AUTH_TOKEN": None}  # handed over with --secret, never written down
    if job.env:
        task["envs"] = dict(job.env)
    task["setup"] = "make setup\n"
    task["run"] = "\n".join(_run(job)) + "\n"
    return yaml.dump(task, Dumper=_Readable, sort_keys=False, width=120)


def submit(job: Job) -> int:
    """Give it to `sky launch`, which reads a file and asks before it spends money."""
    text = render(job)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{job.name}.yaml"
        path.write_text(text)
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        token = ["--secret", "RAY_AUTH_TOKEN"] if "secrets:" in text else []
        return hand_over("sky", ["launch", "--cluster", job.name, *token, str(path)], "")


def _read(job: Job, name: str, wanted: str, read: Callable[[str], Any]) -> Any:
    try:
        return read(job.options[name])
    except (ValueError, KeyError) as error:
        raise UserError(f"--option {name}={job.options[name]}: expected {wanted}") from error


class _Readable(yaml.SafeDumper):
    """Scripts as literal blocks."""


_Readable.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _run(job: Job) -> list[str]:
    lines = ['export PATH="$PWD/.venv/bin:$PATH"']
    if job.nodes == 1:
        return [*lines, f"exec {write_supervised(job)}" if job.on_every_node else write_command(job)]
    lines += [f'export {MASTER_ADDR}=$(echo "$SKYPILOT_NODE_IPS" | head -n 1) {NODE_RANK}=$SKYPILOT_NODE_RANK']
    if job.on_every_node:
        return [*lines, *write_hostfile(job), f"exec {write_supervised(job)}"]
    # SkyPilot runs a Ray of its own on 6380; ours takes another port.
    return [*lines, "export RAY_AUTH_MODE=token", *write_ray_cluster(job, rank=NODE_RANK, port="6479")]


TARGET = Target(
    "a task for sky: any cloud, spot machines included", render, submit, client="sky",
    options={
        "accelerator": "which GPU, as H100", "infra": "which cloud, as aws", "use_spot": "true or false",
        "disk_size": "GB",
    },
)  # fmt: skip
