"""The ranks of a run: their number, this one's place and device, and the few collectives the trainer needs.

Works under `deepspeed`, under `torchrun` and as one plain process. Without a GPU it runs on the CPU over gloo.
"""

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from infra.device import choose_device, choose_num_threads, resolve_device
from infra.errors import UnavailableError
from trainer.zero.partition import leave_out_shared_memory

PORT_IN_USE = "port {port} is in use (another training?), the ranks cannot meet: give the launcher --master_port N"
LOOKS = 3  # at gloo's threads, all asleep in each, before they count as idle


@dataclass(frozen=True)
class Group:
    """All ranks of the run. Every method here is a collective: all ranks must call it."""

    rank: int
    world_size: int
    device: torch.device

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Element-wise sum over the ranks, in float64."""
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(values)
        return values.tolist()

    def max(self, numbers: Sequence[float]) -> list[float]:
        """Element-wise maximum over the ranks."""
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values.tolist()

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one."""
        return self.sum([float(flag)])[0] > 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, text: str) -> list[str]:
        """Every rank's text, in rank order, on all ranks."""
        found = [text] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, text)
        return found

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def choose_accelerator() -> bool:
    """Is there a GPU? Call before DeepSpeed is imported, which otherwise guesses by what is installed."""
    gpu = choose_device("auto") == "cuda"
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    return gpu


def start(*, timeout_s: float = 1800.0) -> Group:
    """Join the other ranks. Call once, first of all. UnavailableError where they cannot meet: a rank may have died, a
    host may not be up yet, another process may still hold the port."""
    local_size = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    os.environ.setdefault("LOCAL_SIZE", str(local_size))  # DeepSpeed's CPU accelerator counts devices by it
    gpu = choose_accelerator()
    if not gpu:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(choose_num_threads(max(1, cores // local_size)))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(find_free_port())
    rank, world_size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device(resolve_device(f"cuda:{local}" if gpu else "cpu"))
    if gpu:
        torch.cuda.set_device(device)
    import deepspeed

    leave_out_shared_memory(deepspeed)
    try:
        deepspeed.init_distributed(
            "nccl" if gpu else "gloo", timeout=timedelta(seconds=timeout_s), verbose=False, auto_mpi_discovery=False
        )
    except (RuntimeError, dist.DistNetworkError) as error:
        if "EADDRINUSE" in str(error):
            raise UnavailableError(PORT_IN_USE.format(port=os.environ["MASTER_PORT"])) from error
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UnavailableError(f"ranks could not meet at {where}: {error}; is --master_addr right?") from error
    return Group(rank, world_size, device)


def open_rendezvous_store() -> Any:
    """A connection of one's own to the store where the ranks met: safe to use from another thread."""
    return dist.distributed_c10d._get_default_store().clone()


def is_lost_peer(error: BaseException | None) -> bool:
    """Does this error, or what led to it, say that another rank is gone?"""
    while error is not None:
        text = str(error)
        if isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "NCCL", "onnection closed")):
            return True
        error = error.__cause__ or error.__context__
    return False


def leave() -> None:
    """End the process group, so that the other ranks see an orderly end, and this one comes to one."""
    if dist.is_initialized():
        dist.destroy_process_group()
    settle()


def settle(*, limit_s: float = 10.0) -> None:
    """Wait until gloo's threads have let go of the last exchange's tensors; call it before the process ends.

    To free a tensor they need Python's lock, also some time after the exchange: a thread that asks for it while Python
    shuts down is cancelled, and the process aborts ("terminate called without an active exception", on a busy machine
    now and then). Ending the group does not end them, as DeepSpeed's functions hold it for good.
    """
    end, idle = time.monotonic() + limit_s, 0
    while idle < LOOKS and time.monotonic() < end:
        time.sleep(0.005)  # without the lock: who waits for it can run, and no longer counts as asleep
        idle = idle + 1 if all(state == "S" for state in _read_thread_states("pt_gloo_runloop")) else 0


def _read_thread_states(name: str) -> list[str]:
    """State (S: sleeping, R: running or waiting for a core) of this process's threads of a name; Linux only."""
    found = []
    for path in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            head, _, rest = path.read_text().rpartition(")")
            if head.endswith(f"({name}"):
                found.append(rest.split()[0])
    return found


def find_free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
