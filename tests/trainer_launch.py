"""Start real ranks for the trainer's tests, without the launcher's own imports."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from data_pipeline.loading.loader import open_dataset
from trainer.recipe import Recipe
from trainer.runfolder import DATA
from trainer.zero import checkpoint
from trainer.zero.group import Group
from trainer.zero.partition import Segment

ROOT = Path(__file__).parent.parent
# A recipe's flags for the synthetic data of these tests: four channels of 8x8, 8 + 8 text tokens.
TINY = [
    *("--model.in-channels", "4", "--model.context-width", "48", "--model.pooled-width", "32"),
    *("--data.resolution", "32", "--data.text-tokens", "16", "--data.latent-shape", "4", "8", "8"),
    *("--global-batch", "8", "--optimizer.lr", "3e-3", "--validation.samples", "16", "--validation.batch", "8"),
    *("--logging.samples", "0", "--precision", "fp32"),  # exactness is promised in fp32
]


def halted(recipe: Recipe, data: str, run: Path) -> Path:
    """A run folder with one checkpoint, made by the trainer's own writer: two numbers stand for the weights."""
    recipe = Recipe.from_json(recipe.to_json())
    told, dataset = recipe.to_json(), open_dataset(data)
    told["data"]["fingerprint"] = dataset.fingerprint
    share = checkpoint.RankShare([(Segment("a", (2,), 0, 2, 0),)], {"master": [torch.ones(2)]}, {})
    state = {"recipe": told, "images_seen": 8}
    assert checkpoint.save(f"{run}/checkpoints", share, Group(0, 1, torch.device("cpu")), step=1, state=state, keep=1)
    (run / "recipe.json").write_text(json.dumps(told))
    (run / DATA).write_bytes(dataset.info.to_bytes())
    return run / "checkpoints" / "step_0000001"


def start_ranks(
    command: list[str], ranks: int, *, of_rank: dict[int, dict[str, str]] | None = None
) -> list[subprocess.Popen[str]]:
    """`python COMMAND...` once per rank, on this machine; `of_rank`: what only some ranks find in their environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = []
    for rank in range(ranks):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "DS_ACCELERATOR": "cpu", **(of_rank or {}).get(rank, {}),
        }  # fmt: skip
        found.append(
            subprocess.Popen(
                [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    return found


def finish(processes: list[subprocess.Popen[str]], *, timeout: float = 900.0) -> tuple[list[int], str]:
    """(exit codes, everything they said); whatever still runs is killed first."""
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:  # with all its children where it is the head of a session
                leads = os.getpgid(process.pid) == process.pid
                (os.killpg if leads else os.kill)(process.pid, signal.SIGKILL)
    return [process.returncode for process in processes], "\n".join(said)


def run_ranks(command: list[str], ranks: int, *, of_rank: dict[int, dict[str, str]] | None = None) -> str:
    """What was said; fails unless every rank ends well."""
    codes, said = finish(start_ranks(command, ranks, of_rank=of_rank))
    assert codes == [0] * ranks, said
    return said


def read_log(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """What the run logged at its steps; `kind` val: at its validations."""
    lines = [json.loads(line) for line in (run / "logs" / "train.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def read_figure(run: Path, figure: str = "loss", kind: str = "train") -> list[float]:
    return [line[figure] for line in read_log(run, kind) if figure in line]


def until(process: subprocess.Popen[str], words: str) -> str:
    """What a process said, to the line with these words."""
    said = ""
    for line in process.stdout:
        said += line
        if words in line:
            return said
    raise AssertionError(said)
