"""Runs tasks over units of work, in this process or on Ray: the one module besides infra/launch/ that knows Ray.

Three ways in. `run_tasks` is the data pipeline's: one Ray Data block per unit, a pool of actors, results as they come.
`run_units` is the evaluation's: the same, with the failures as the answer. `RemoteCalls` are single calls that each
reserve GPUs or cores, for trainings. What moves between processes are small descriptions; each worker reads and writes
storage itself.
"""

import json
import logging
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from infra.errors import UserError
from infra.log import get_logger

log = get_logger("runner")

_FIRST_CONTACT_S = 10.0  # with a cluster of RAY_ADDRESS
_SOCKET_PATH = 107  # bytes: sizeof(sockaddr_un.sun_path) less one
_SMALL_POOL = 8  # workers that are all waited for at the start; a larger pool starts with one and grows
_WAVE = 10_000  # units: ten million rows between two starts of the workers
_WAVE_BYTES = 256 * 2**20  # of their descriptions
_LARGEST_POOL = 2000  # actors of one pass on a cluster that grows: 60 nodes of 32 CPUs

WorkUnit = Mapping[str, Any]
UnitResult = dict[str, Any]


class Task(Protocol):
    """A picklable description of work; `open()` builds models once per worker and gives the function of one unit."""

    def open(self) -> Callable[[WorkUnit], UnitResult]: ...


@dataclass(frozen=True)
class WorkerPool:
    """The number of workers and the resources of each. `count` None: as many as fit this machine or a growing cluster.

    A cluster of RAY_ADDRESS may start small, even without a CPU: the pool grows with it up to one worker per unit.
    """

    count: int | None = None
    cpus: float = 1
    gpus: float = 0


def run_tasks(
    task: Task, units: Iterable[WorkUnit], workers: WorkerPool, *, runtime_env: Mapping[str, Any] | None = None
) -> Iterator[UnitResult]:
    """One result per unit, in the order of completion. A result with `error` says what failed; others go on.

    Ray Data keeps the blocks of all units of a pass, so they go to it in waves, each with a new pool.
    `runtime_env` is Ray's: the workers of this task get an environment of their own.
    """
    if workers.count == 0:
        if runtime_env:
            raise UserError("workers with an environment of their own (--captioner.pip) need Ray: --workers 1 or more")
        run = _OpenTask(task, workers.cpus)
        for unit in units:
            yield run(unit)
        return
    for wave in _split_into_waves(units):
        yield from _run_on_ray(task, wave, workers, runtime_env)


def run_units(task: Task, units: Iterable[WorkUnit], *, workers: int, gpus: float = 0) -> dict[str, str]:
    """Run every unit; the reasons of those that failed, by id. `workers` 0: in this process, with all its threads."""
    import torch

    pool = WorkerPool(workers, cpus=1, gpus=gpus) if workers else WorkerPool(0, cpus=torch.get_num_threads())
    failed: dict[str, str] = {}
    for result in run_tasks(task, units, pool):
        if result["error"]:
            failed[str(result["id"])] = str(result["error"])
            log.error("%s failed: %s", result["id"], result["error"])
    return failed


def _split_into_waves(units: Iterable[WorkUnit]) -> Iterator[list[str]]:
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


class _OpenTask:
    """A task opened in this process; failures become results."""

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

    def __call__(self, unit: WorkUnit) -> UnitResult:
        started = time.monotonic()
        result: UnitResult = {"id": unit["id"], "rows": 0, "counts": {}}
        result |= {"error": self._broken, "fatal": bool(self._broken)}
        if not self._broken:
            try:
                result |= self._run(unit)
            except UserError as error:
                result["error"] = str(error)
            except Exception as error:
                # one unit's failure must not end the others': it is listed, and tried again by the next run
                result["error"] = f"{type(error).__name__}: {error}"
                log.error("unit %s failed\n%s", unit["id"], traceback.format_exc())
        return result | {"seconds": time.monotonic() - started}


class _Actor:
    """The actor that Ray Data calls with blocks of unit descriptions."""

    def __init__(self, task: Task, cpus: float) -> None:
        self._task = _OpenTask(task, cpus)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"result": [json.dumps(self._task(json.loads(unit))) for unit in batch["unit"]]}


def _run_on_ray(
    task: Task, units: Sequence[str], workers: WorkerPool, runtime_env: Mapping[str, Any] | None
) -> Iterator[UnitResult]:
    there = connect(workers)
    import ray
    from ray.data import ActorPoolStrategy

    quiet = logging.getLogger("ray.data")
    quiet.setLevel(logging.ERROR)

    if workers.gpus > there.get("GPU", 0) and not os.environ.get("RAY_ADDRESS"):  # a cluster may still grow
        raise UserError(
            f"a worker asks for {workers.gpus:g} GPU(s), Ray here has {there.get('GPU', 0):g} and would wait for ever"
        )
    smallest, largest = _size_pool(workers, len(units), there.get("CPU", 0), there.get("GPU", 0))
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
        for result in batch["result"]:
            yield json.loads(result)


def _size_pool(workers: WorkerPool, units: int, cpus: float, gpus: float = 0) -> tuple[int, int]:
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


def connect(workers: WorkerPool) -> dict[str, float]:
    """The cluster of this process, of RAY_ADDRESS (set in a submitted job), or a private one on this machine.

    Returns what the cluster has now, by Ray's names: "CPU", "GPU" ...
    """
    import ray

    if not ray.is_initialized():  # one start serves all passes; Ray ends it with the process
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if os.environ.get("RAY_ADDRESS"):
            _join_cluster(os.environ["RAY_ADDRESS"], quiet)
        else:
            _refuse_long_folder()
            log.info("starting Ray on this machine")
            os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: any other load would starve the workers
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters comes back in results
            cpus = max(os.cpu_count() or 1, int((workers.count or 0) * workers.cpus))
            ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=256 * 2**20, **quiet)
    return ray.cluster_resources()


def _join_cluster(address: str, quiet: Mapping[str, Any]) -> None:
    """Ray itself would go on trying for minutes where a cluster is gone."""
    import ray

    advice = "unset RAY_ADDRESS to use this machine, or start that cluster again"
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_FIRST_CONTACT_S).close()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise UserError(f"RAY_ADDRESS={address}: nothing answers there ({reason}): {advice}") from error
    try:
        ray.init(**quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"RAY_ADDRESS={address}: no Ray cluster there ({reason}): {advice}") from error


def _refuse_long_folder() -> None:
    """Ray puts sockets below its folder, and the system allows 107 bytes for the path of one."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    longest = len(os.fsencode(f"{folder}/ray/session_2026-01-01_00-00-00_000000_{2**22}/sockets/plasma_store.1"))
    if longest > _SOCKET_PATH:
        name = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
        raise UserError(
            f"{name}={folder}: {longest - _SOCKET_PATH} characters too long for Ray's sockets: set RAY_TMPDIR to a "
            "shorter folder, such as /tmp"
        )


class CallLost(RuntimeError):
    """A remote call gave no value. `cancelled`: it was asked to end, else its worker was lost."""

    def __init__(self, reason: str, *, cancelled: bool) -> None:
        super().__init__(reason)
        self.cancelled = cancelled


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """A call on a worker that `cancel` can interrupt. The trap: a shell starts a background job (`command &`, nohup)
    with SIGINT ignored, Ray's workers inherit that, and Ray's own interrupt then does nothing."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return function(*arguments)


class RemoteCalls:
    """Calls of one function on Ray, each with `slots` GPUs of its own (cores where the cluster has no GPU).

    Nothing is called twice: a worker that is lost loses its call.
    """

    def __init__(self, function: Callable[..., Any], *, workers: int, slots: int) -> None:
        self.on_gpus = bool(connect(WorkerPool(count=workers, cpus=slots)).get("GPU"))
        import ray

        needs: dict[str, Any] = {"num_gpus" if self.on_gpus else "num_cpus": slots, "max_retries": 0}
        self._remote, self._function = ray.remote(**needs)(_call), function
        self._running: dict[Any, Any] = {}

    def __len__(self) -> int:
        """Number of calls that run or wait for a worker."""
        return len(self._running)

    def start(self, key: Any, *arguments: Any) -> None:
        self._running[self._remote.remote(self._function, *arguments)] = key

    def wait(self, seconds: float) -> Iterator[tuple[Any, Any]]:
        """(key, value) of a call that has ended, none if that takes longer. A lost call's value is its `CallLost`."""
        import ray

        done, _ = ray.wait(list(self._running), timeout=seconds)
        for reference in done:
            key = self._running.pop(reference)
            try:
                yield key, ray.get(reference)
            except ray.exceptions.TaskCancelledError:
                yield key, CallLost("it was cancelled", cancelled=True)
            except ray.exceptions.RayError as error:
                yield key, CallLost(f"its Ray worker was lost: {type(error).__name__}", cancelled=False)

    def cancel(self) -> None:
        """Raise KeyboardInterrupt in each running call; calls that have not begun never do."""
        import ray

        for reference in self._running:
            ray.cancel(reference, force=False)
