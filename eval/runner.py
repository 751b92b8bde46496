"""Evaluation as tasks over whatever GPUs or cores there are: one unit of work per checkpoint, on Ray when asked to.

Units name stored things and results go to the store, so that a killed run is repeated by the same command and only
what is missing is done.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data_pipeline.flow.runner import Task, Workers, run_tasks
from infra.log import get_logger

log = get_logger("eval")


@dataclass(frozen=True)
class Work:
    """One unit: an id that messages name, and what the task's function needs (JSON)."""

    id: str
    what: Mapping[str, Any]


def run_work(task: Task, work: Sequence[Work], *, workers: int, gpus: float = 0) -> dict[str, str]:
    """Do every unit; id -> reason of those that failed. Others go on."""
    units = [{"id": unit.id, **unit.what} for unit in work]
    if workers == 0:
        pool = Workers(count=0, cpus=torch.get_num_threads())
    else:
        pool = Workers(count=workers, cpus=1, gpus=gpus)
    failed: dict[str, str] = {}
    for report in run_tasks(task, units, pool):
        if report["error"]:
            failed[str(report["id"])] = str(report["error"])
            log.error("%s not evaluated: %s", report["id"], report["error"])
    return failed
