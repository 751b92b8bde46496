"""Trainings shared among Ray workers: each is a task that reserves its ranks' GPUs (or cores) and starts the command.

Ranks watch the worker that started them as they watch a launcher: where it is killed, with its node or its sweep, they
save and leave. Nothing is tried twice here; the same sweep continues.
"""

import os
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Sequence

from infra.log import get_logger
from infra.outcome import PREEMPTED
from infra.runner import CallLost, RemoteCalls, WorkerPool, connect
from trainer.launchers import ask_to_stop, call_on_stop, start_training, wait_for_end

log = get_logger("ladder")
LAST_LINES = 20  # of what a training said
LOST = 137  # stands for the exit code where a worker was killed


def train_on_ray(
    commands: Sequence[list[str]], *, workers: int, ranks: int, begin: Callable[[int], None],
    ended: Callable[[int, int, str], bool],
) -> None:  # fmt: skip
    """Run the commands, `workers` at a time. `ended(index, exit code, last lines)` says whether others may begin.

    SIGTERM or Ctrl-C: those that run are asked to save and awaited, and this process leaves with their exit code.
    """
    calls = RemoteCalls(train_here, workers=workers, slots=ranks)
    # A core was reserved for each rank; Ray would give each as many threads as there are ranks.
    threads = os.environ.get("OMP_NUM_THREADS", None if calls.on_gpus else "1")
    waiting, terminated = deque(range(len(commands))), False
    with call_on_stop(lambda: log.info("asking the trainings to save and stop")) as stopped:
        while calls or (waiting and not stopped):
            while waiting and not stopped and len(calls) < workers:
                index = waiting.popleft()
                begin(index)
                calls.start(index, commands[index], threads)
            for index, outcome in calls.wait(1.0):
                if not ended(index, *_read_exit(outcome)):
                    waiting.clear()
            if stopped and not terminated:
                terminated = True
                calls.cancel()
    if stopped:
        raise SystemExit(PREEMPTED)


def find_worker_device(workers: int, *, ranks: int) -> str:
    """What the trainings will run on: GPUs where the cluster has any."""
    return "cuda" if connect(WorkerPool(count=workers, cpus=ranks)).get("GPU") else "cpu"


def train_here(command: list[str], threads: str | None) -> tuple[int, str]:
    """On a Ray worker: run the command; its exit code and the last lines of its output. When the task is cancelled it
    asks the ranks to save and waits until they have."""
    with tempfile.TemporaryFile("w+", errors="replace") as words:
        process = start_training(take_my_gpus(command), environment={"OMP_NUM_THREADS": threads}, output=words)
        code = _await_end(process)
        words.seek(0)
        return code, "".join(deque(words, maxlen=LAST_LINES))


def _await_end(process: subprocess.Popen[bytes]) -> int:
    terminated = False
    while True:
        try:
            return wait_for_end(process)
        except KeyboardInterrupt:  # this is how ray.cancel comes; a second one must not cut the saving off
            if not terminated:
                ask_to_stop(process.pid)
            terminated = True


def take_my_gpus(command: list[str]) -> list[str]:
    """`deepspeed --num_gpus N` forgets CUDA_VISIBLE_DEVICES and takes the first N: name those that Ray gave."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not visible or command[:2] != ["deepspeed", "--num_gpus"]:
        return command
    return ["deepspeed", "--include", f"localhost:{visible}", *command[3:]]


def _read_exit(outcome: tuple[int, str] | CallLost) -> tuple[int, str]:
    """Exit code and last words of a call that ended."""
    if not isinstance(outcome, CallLost):
        return outcome
    return (PREEMPTED, "") if outcome.cancelled else (LOST, f"{outcome}\n")
