"""Submit to a running Ray cluster: `ray job submit` with the working folder packed and the token checked first."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from infra.errors import UserError
from infra.launch.job import Job, write_command
from infra.launch.target import Target

EXCLUDES = [".git", ".venv", "work-demo", "runs", "build", "**/__pycache__", "**/.mypy_cache", "**/.ruff_cache"]


def render(job: Job) -> str:
    """The command line that `submit` runs; UserError for a job that a running cluster cannot take."""
    return shlex.join(["ray", *_list_arguments(job)]) + "\n"


def submit(job: Job) -> int:
    """Submit the job, follow its log, and return its exit code. UserError where a token is missing or no cluster
    answers."""
    arguments = _list_arguments(job)
    _check_token()
    _check_cluster(
        job.options.get("address") or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    )
    ray = "from ray.scripts.scripts import main; main()"  # the `ray` of this interpreter, whatever PATH says
    environment = {"RAY_AUTH_MODE": "token", **os.environ}  # without it Ray does not send the token
    return subprocess.run([sys.executable, "-c", ray, *arguments], env=environment, check=False).returncode


def _list_arguments(job: Job) -> list[str]:
    """The arguments of `ray`: the working folder is packed and sent, except for EXCLUDES."""
    if job.image or (job.nodes > 1 and job.on_every_node):
        raise UserError(
            "target ray uses the cluster as it is: image must be unset, and ranks over nodes need slurm or kubernetes"
        )
    if not Path(job.working_dir).is_dir():
        raise UserError(f"working_dir {job.working_dir}: no such folder")
    environment = {"env_vars": dict(job.env), "excludes": EXCLUDES}
    address = ["--address", job.options["address"]] if "address" in job.options else []
    gpus = ["--entrypoint-num-gpus", str(job.gpus_per_node)] if job.on_every_node and job.gpus_per_node else []
    where = ["--working-dir", job.working_dir, "--runtime-env-json", json.dumps(environment)]
    return ["job", "submit", *address, *where, *gpus, "--", *shlex.split(write_command(job))]


def _check_cluster(address: str | None) -> None:
    """UserError where no cluster answers: `ray job submit` itself would end with a traceback."""
    parts = urlsplit(address or "http://127.0.0.1:8265")
    if parts.scheme not in ("http", "https"):
        raise UserError(f"address {address}: jobs go to the dashboard: write --option address=http://HEAD:8265")
    try:
        socket.create_connection((parts.hostname or "", parts.port or 8265), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"no Ray answers at {parts.hostname}:{parts.port or 8265} ({error}): start one with "
            "'ray start --head', or say --option address=http://HEAD:8265"
        ) from error


def _check_token() -> None:
    """UserError where a token is missing: Ray itself would end with a long traceback about code 401."""
    environment = os.environ
    if environment.get("RAY_AUTH_MODE", "token") != "token":
        return
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not environment.get("RAY_AUTH_TOKEN") and not path.is_file():
        raise UserError(
            "Ray asks for a token and there is none: set RAY_AUTH_MODE=token and the cluster's RAY_AUTH_TOKEN "
            "(or RAY_AUTH_MODE=disabled where the cluster has none)"
        )


TARGET = Target(
    "`ray job submit` to a running Ray cluster", render, submit,
    options={"address": "http://HEAD:8265, of the cluster's dashboard"},
)  # fmt: skip
