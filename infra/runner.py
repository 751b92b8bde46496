"""Runs tasks over units of work, in this process or on Ray: the one module besides infra/launch/ that knows Ray.

There are three entry points. The data pipeline uses `run_tasks`: one Ray Data block per unit, a pool of actors, results
as they come. Evaluation uses `run_units`: the same, but it returns the failures. Ladders of trainings use
`RemoteCalls`: single calls that each reserve GPUs or cores. Only small descriptions move between processes; each worker
reads and writes storage itself.
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

_FIRST_CONTACT_S = 10.0  # how long the cluster of RAY_ADDRESS may take to accept a connection
# What a client of HTTP/2 begins with (RFC 9113, sections 3.4 and 6.5), over which Ray speaks; its answer is SETTINGS.
_HELLO, _SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]), b"\x04"
_SOCKET_PATH = 107  # bytes: sizeof(sockaddr_un.sun_path) minus one for the final zero
_SMALL_POOL = 8  # workers that are all waited for at the start; a larger pool starts with one and grows
_WAVE = 10_000  # units in a wave; of 1,000 rows each: ten million rows between two starts of the workers
_WAVE_BYTES = 256 * 2**20  # of the units' descriptions in a wave
_LARGEST_POOL = 2000  # actors of one pass on a cluster that grows: 60 nodes of 32 CPUs

WorkUnit = Mapping[str, Any]  # JSON with the key `id`; the other keys are the task's
# JSON: `id`; `error`, "" if there is none; `fatal`, true if the worker could not start; `seconds`; `rows` and `counts`
# (0 and {} after a failure); the other keys are the task's.
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
    """Yield one result per unit, in the order of completion. A unit that fails gives a result with `error`; the others
    go on. `workers.count` 0: in this process, without Ray.

    Ray Data keeps the blocks of all units that it is given. So it gets them in waves, each with a new pool.
    `runtime_env`: Ray's, for workers with an environment of their own; UserError without Ray.
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
    """Run every unit; returns the reasons of those that failed, by id. `workers` 0: in this process, with all its
    threads. `gpus`: of each worker; a fraction lets several share one."""
    import torch

    pool = WorkerPool(workers, cpus=1, gpus=gpus) if workers else WorkerPool(0, cpus=torch.get_num_threads())
    failed: dict[str, str] = {}
    for result in run_tasks(task, units, pool):
        if result["error"]:
            failed[str(result["id"])] = str(result["error"])
            log.error("%s failed: %s", result["id"], result["error"])
    return failed


def _split_into_waves(units: Iterable[WorkUnit]) -> Iterator[list[str]]:
    """Lists of units as JSON, which takes a tenth of the memory of their objects."""
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
    """A task opened in this process. An error becomes a result: of one unit, or of every unit where `open` failed.
    `cpus`: torch's threads."""

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
                # One unit's failure must not end the others: it is reported, and the next run tries the unit again.
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
    """Yield the results of one wave."""
    cluster = connect(workers)
    import ray
    from ray.data import ActorPoolStrategy

    quiet = logging.getLogger("ray.data")
    quiet.setLevel(logging.ERROR)

    if workers.gpus > cluster.get("GPU", 0) and not os.environ.get("RAY_ADDRESS"):  # a cluster may still grow
        raise UserError(
            f"a worker asks for {workers.gpus:g} GPU(s), Ray here has {cluster.get('GPU', 0):g} and would wait for ever"
        )
    smallest, largest = _size_pool(workers, len(units), cluster.get("CPU", 0), cluster.get("GPU", 0))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # No target: Ray splits blocks above 1.5 times the target, and here one block must stay one unit.
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
    """The numbers of workers of the smallest and the largest pool. `cpus`, `gpus`: what the cluster has now.

    A pool that grows pays off on a cluster. On one machine it would only start late.
    """
    room = cpus / max(workers.cpus, 0.01)
    if workers.gpus:
        room = min(room, gpus / workers.gpus)  # of fractions, so that several share a GPU
    fitting = max(1, int(room))
    size = min(workers.count or fitting, units)
    smallest = size if workers.count or size <= _SMALL_POOL else 1
    # Nodes that an autoscaler starts later have work only if the pool may be larger than what the cluster has now.
    grows = not workers.count and bool(os.environ.get("RAY_ADDRESS"))
    return smallest, min(units, max(size, _LARGEST_POOL)) if grows else size


def connect(workers: WorkerPool) -> dict[str, float]:
    """Connect this process to a Ray cluster, once: to that of RAY_ADDRESS (set in a submitted job), or to a new one on
    this machine.

    Returns the resources that the cluster has now, by Ray's names: "CPU", "GPU" ... UserError where RAY_ADDRESS names
    no cluster, or where the folder for Ray's sockets has too long a name.
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
    """UserError where no cluster answers. A connection is tried first, as Ray itself would try for minutes."""
    import ray

    advice = "unset RAY_ADDRESS to use this machine, or start that cluster again"
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if host and port.isdigit():
        try:
            _greet((host.strip("[]"), int(port)))
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise UserError(f"RAY_ADDRESS={address}: nothing answers there ({reason}): {advice}") from error
    try:
        ray.init(**quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"RAY_ADDRESS={address}: no Ray cluster there ({reason}): {advice}") from error


def _greet(address: tuple[str, int]) -> None:
    """OSError unless what listens there speaks as Ray does: a port may belong to another program by now."""
    with socket.create_connection(address, timeout=_FIRST_CONTACT_S) as contact:
        if os.environ.get("RAY_USE_TLS") == "1":
            return
        contact.sendall(_HELLO)
        answer = contact.recv(9)
        if answer[3:4] != _SETTINGS:
            raise ConnectionError(0, "what listens there is no Ray")


def _refuse_long_folder() -> None:
    """UserError where paths of Ray's sockets, which lie below its folder, would be longer than Linux allows."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    longest = len(os.fsencode(f"{folder}/ray/session_2026-01-01_00-00-00_000000_{2**22}/sockets/plasma_store.1"))
    if longest > _SOCKET_PATH:
        name = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
        raise UserError(
            f"{name}={folder}: {longest - _SOCKET_PATH} characters too long for Ray's sockets: set RAY_TMPDIR to a "
            "shorter folder, such as /tmp"
        )


class CallLost(RuntimeError):
    """A remote call gave no value. `cancelled`: it was asked to end; otherwise its worker was lost."""

    def __init__(self, reason: str, *, cancelled: bool) -> None:
        super().__init__(reason)
        self.cancelled = cancelled


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` on a worker, so that `RemoteCalls.cancel` can interrupt it.

    The trap: a shell starts a background job (`command &`, nohup) with SIGINT ignored. Ray's workers inherit that, and
    Ray's own interrupt then does nothing.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return function(*arguments)


class RemoteCalls:
    """Calls of one function on Ray. Each call has `slots` GPUs of its own, or cores where the cluster has no GPU.

    No call is repeated: a worker that is lost loses its call. `workers`: calls for which a new cluster on this machine
    has room at once.
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
        """Begin a call, or let it wait for a free worker. `wait` names it by `key`."""
        self._running[self._remote.remote(self._function, *arguments)] = key

    def wait(self, seconds: float) -> Iterator[tuple[Any, Any]]:
        """Wait up to `seconds` for a call to end, and yield its (key, value); nothing if none ended. The value of a
        lost call is a `CallLost`."""
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
        """Raise KeyboardInterrupt in each running call. Calls that have not begun never begin."""
        import ray

        for reference in self._running:
            ray.cancel(reference, force=False)
