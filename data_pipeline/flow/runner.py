"""Runs tasks over units of work on Ray Data: one block per unit, a pool of actors, reports as they come.

What moves between processes are small descriptions; each worker reads and writes storage itself. The only module that
knows ray. With workers=0 everything happens in this process.
"""

import json
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from infra.errors import UserError
from infra.log import get_logger

log = get_logger("runner")

_SMALL_POOL = 8  # workers that are all waited for at the start; a larger pool starts with one and grows
_WAVE = 10_000  # units: ten million rows between two starts of the workers
_WAVE_BYTES = 256 * 2**20  # of their descriptions
_LARGEST_POOL = 2000  # actors of one pass on a cluster that grows: 60 nodes of 32 CPUs

Unit = Mapping[str, Any]
Report = dict[str, Any]


class Task(Protocol):
    """A picklable description of work; `open()` builds models once per worker and gives the function of one unit."""

    def open(self) -> Callable[[Unit], Report]: ...


@dataclass(frozen=True)
class Workers:
    """How many workers, and what each may use. `count` None: as many as this machine or a growing cluster has room for.

    A cluster of RAY_ADDRESS may start small, even without a CPU: the pool grows with it up to one worker per unit.
    """

    count: int | None = None
    cpus: float = 1
    gpus: float = 0


def run_tasks(
    task: Task, units: Iterable[Unit], workers: Workers, *, runtime_env: Mapping[str, Any] | None = None
) -> Iterator[Report]:
    """One report per unit, in the order of completion. A report with `error` says what failed; others go on.

    Ray Data keeps the blocks of all units of a pass, so they go to it in waves, each with a new pool.
    `runtime_env` is Ray's: the workers of this task get an environment of their own.
    """
    if workers.count == 0:
        if runtime_env:
            raise UserError("workers with an environment of their own (--captioner.pip) need Ray: --workers 1 or more")
        work = _Work(task, workers.cpus)
        for unit in units:
            yield work(unit)
        return
    for wave in _waves(units):
        yield from _run_on_ray(task, wave, workers, runtime_env)


def _waves(units: Iterable[Unit]) -> Iterator[list[str]]:
    """Units as JSON: as such they take a tenth of what their objects would."""
    wave: list[str] = []
    size = 0
    for unit in units:
        text = json.dumps(unit)
        if wave and (len(wave) == _WAVE or size + len(text) > _WAVE_BYTES):
            yield wave
            wave, size = [], 0
        wave.append(text)
        size += len(text)
    if wave:
        yield wave


class _Work:
    """A task opened in this process; failures become reports."""

    def __init__(self, task: Task, cpus: float) -> None:
        import torch

        torch.set_num_threads(max(1, int(cpus)))
        self._broken = ""
        try:
            self._run = task.open()
        except UserError as error:
            self._broken = str(error)
        except Exception as error:
            self._broken = f"{type(error).__name__}: {error}"
            log.error("a worker could not start\n%s", traceback.format_exc())

    def __call__(self, unit: Unit) -> Report:
        started = time.monotonic()
        report: Report = {"id": unit["id"], "rows": 0, "counts": {}, "error": self._broken, "fatal": bool(self._broken)}
        if not self._broken:
            try:
                report |= self._run(unit)
            except UserError as error:
                report["error"] = str(error)
            except Exception as error:
                # one unit's failure must not end the others': it is reported, listed, and tried again by the next run
                report["error"] = f"{type(error).__name__}: {error}"
                log.error("unit %s failed\n%s", unit["id"], traceback.format_exc())
        return report | {"seconds": time.monotonic() - started}


class _Actor:
    """What Ray Data calls with blocks of unit descriptions."""

    def __init__(self, task: Task, cpus: float) -> None:
        self._work = _Work(task, cpus)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"report": [json.dumps(self._work(json.loads(unit))) for unit in batch["unit"]]}


def _run_on_ray(
    task: Task, units: Sequence[str], workers: Workers, runtime_env: Mapping[str, Any] | None
) -> Iterator[Report]:
    connect(workers)
    import ray
    from ray.data import ActorPoolStrategy

    quiet = logging.getLogger("ray.data")
    quiet.setLevel(logging.ERROR)

    there = ray.cluster_resources()
    if workers.gpus > there.get("GPU", 0) and not os.environ.get("RAY_ADDRESS"):  # a cluster may still grow
        raise UserError(
            f"a worker asks for {workers.gpus:g} GPU(s), Ray here has {there.get('GPU', 0):g} and would wait for ever"
        )
    smallest, largest = _pool(workers, len(units), there.get("CPU", 0), there.get("GPU", 0))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # a block above 1.5 times the target would be split, and one block is one unit here
    context.target_max_block_size = None
    items = [{"unit": unit} for unit in units]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Actor,
        fn_constructor_kwargs={"task": task, "cpus": workers.cpus},
        batch_size=1,
        compute=ActorPoolStrategy(min_size=smallest, max_size=largest),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus or None,
        **({"runtime_env": dict(runtime_env)} if runtime_env else {}),
    )
    quiet.setLevel(logging.ERROR)  # Ray sets it anew with the first dataset of a process
    for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
        for report in batch["report"]:
            yield json.loads(report)


def _pool(workers: Workers, units: int, cpus: float, gpus: float = 0) -> tuple[int, int]:
    """Smallest and largest pool. One that grows pays off on a cluster; on one machine it only starts late."""
    room = cpus / max(workers.cpus, 0.01)
    if workers.gpus:
        room = min(room, gpus / workers.gpus)  # of fractions, so that several share a GPU
    here = max(1, int(room))
    size = min(workers.count or here, units)
    smallest = size if workers.count or size <= _SMALL_POOL else 1
    # nodes that an autoscaler starts later have work only if the pool may be larger than what is there now
    grows = not workers.count and bool(os.environ.get("RAY_ADDRESS"))
    return smallest, min(units, max(size, _LARGEST_POOL)) if grows else size


def connect(workers: Workers) -> None:
    """The cluster of this process, of RAY_ADDRESS (set in a submitted job), or a private one on this machine."""
    import ray

    if not ray.is_initialized():  # one start serves all passes; Ray ends it with the process
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            log.info("starting Ray on this machine")
            os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: any other load would starve the workers
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters comes back in reports
            cpus = max(os.cpu_count() or 1, int((workers.count or 0) * workers.cpus))
            ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=256 * 2**20, **quiet)
