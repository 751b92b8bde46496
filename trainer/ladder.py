"""Train the rungs of a ladder that are missing, each by the same command that a person would type; it is printed."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra import storage
from infra.errors import UserError
from infra.log import get_logger
from trainer.recipe import Recipe
from trainer.recipes import RECIPES, get_family

log = get_logger("ladder")
DEFAULT_PORT = 29500  # of the deepspeed launcher; another training on this machine may hold it


def climb(
    family: str,
    depths: Sequence[int],
    *,
    data: str,
    out: str,
    images: int | None = None,
    num_ranks: int | None = None,
    options: Sequence[str] = (),
) -> list[str]:
    """Train each depth into OUT/<recipe>; finished ones are skipped. The run folders, in order of depth."""
    recipes = [get_family(family)(depth) for depth in sorted(set(depths))]
    unknown = [recipe.name for recipe in recipes if recipe.name not in RECIPES]
    if unknown:
        raise UserError(f"no recipe {', '.join(unknown)}; known: {', '.join(RECIPES)}")
    ranks = num_ranks or default_ranks()
    runs = []
    for number, recipe in enumerate(recipes, start=1):
        run = storage.join(out, recipe.name)
        runs.append(run)
        wanted = images or recipe.images
        done = images_trained(run)
        if done is not None and done >= wanted:
            log.info("rung %d/%d: %s is trained (%s images)", number, len(recipes), run, f"{done:,}")
            continue
        command = train_command(recipe, data=data, run=run, images=images, ranks=ranks, options=options)
        print(f"rung {number}/{len(recipes)}: {shlex.join(command)}", flush=True)
        _run(command, run)
    return runs


def default_ranks() -> int:
    """One rank per GPU; on the CPU one per core, two at most."""
    import torch

    return torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))


def train_command(
    recipe: Recipe, *, data: str, run: str, images: int | None, ranks: int, options: Sequence[str] = ()
) -> list[str]:
    """`deepspeed --num_gpus N --module trainer train ...`, or `python -m trainer train ...` for one rank."""
    arguments = ["train", recipe.name, "--data", data, "--out", run]
    if images is not None:
        arguments += ["--images", str(images)]
    for option in options:
        name, _, value = option.partition("=")
        arguments += [f"--{name.removeprefix('--')}", *value.split()]
    if ranks == 1:
        return ["python", "-m", "trainer", *arguments]
    port = [] if _port_is_free(DEFAULT_PORT) else ["--master_port", str(_free_port())]
    return ["deepspeed", "--num_gpus", str(ranks), *port, "--module", "trainer", *arguments]


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def images_trained(run: str) -> int | None:
    """Images behind the final weights of a finished run, else None."""
    uris = [storage.join(run, "weights", f"{kind}.safetensors") for kind in ("ema", "raw")]
    if not all(storage.exists(uri) for uri in uris):
        return None
    return min(int(_metadata(uri)["images_seen"]) for uri in uris)


def _metadata(uri: str) -> dict[str, Any]:
    """The metadata of a weights file, reading its header only (s3:// too)."""
    length = int.from_bytes(storage.read_bytes(uri, 0, 8), "little")
    header = json.loads(storage.read_bytes(uri, 8, length))
    return json.loads(header["__metadata__"]["beeline"])


def _run(command: list[str], run: str) -> None:
    """The command as a process group of its own: a signal to the ladder reaches every rank, which saves and leaves."""
    folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": os.pathsep.join([str(folder), os.environ.get("PATH", "")])}
    environment.setdefault("PYTHONPATH", str(Path(__file__).parent.parent))
    process = subprocess.Popen([str(folder / command[0]), *command[1:]], env=environment, start_new_session=True)

    def forward(number: int, frame: object) -> None:
        log.info("asking %s to save and stop", run)
        os.killpg(process.pid, signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code == 75:
        raise SystemExit(75)
    if code != 0:
        raise UserError(
            f"{run}: training ended with exit code {code}; its own message stands above: run the ladder again"
        )
