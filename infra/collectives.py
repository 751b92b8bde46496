"""How fast the ranks of a job exchange data. Each process is one rank, with RANK and the like in its environment."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from infra.device import choose_device

MIB = 2**20
SIZES = {"nccl": 256 * MIB, "gloo": 16 * MIB}  # about a block of a large model; what a CPU moves in a moment
REPEATS = 5
MEET_S = 120  # until all ranks are there


@dataclass(frozen=True)
class CollectiveTiming:
    """Median time of one collective; `nbytes` are those of the whole tensor, which each rank has in the end."""

    backend: str
    ranks: int
    nbytes: int
    seconds: float
    bus_bandwidth: float
    """Bytes per second through a rank's link, for any number of ranks: busbw of nccl-tests (doc/PERFORMANCE.md)."""


def measure_collectives() -> dict[str, CollectiveTiming]:
    """By name. Collective: all ranks call it, and no process group exists before or after."""
    import torch
    import torch.distributed as dist

    gpu = choose_device("auto") == "cuda"
    backend, device = ("nccl", torch.device("cuda", int(os.environ["LOCAL_RANK"]))) if gpu else ("gloo", "cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=MEET_S))
    ranks, nbytes = dist.get_world_size(), SIZES[backend]
    share = torch.ones(nbytes // 4 // ranks, device=device)
    whole = torch.zeros(share.numel() * ranks, device=device)
    links = {"all-reduce": 2 * (ranks - 1) / ranks, "all-gather": (ranks - 1) / ranks}
    calls: dict[str, Callable[[], object]] = {
        "all-reduce": lambda: dist.all_reduce(whole, op=dist.ReduceOp.MAX),
        "all-gather": lambda: dist.all_gather_into_tensor(whole, share),
    }

    def measure(call: Callable[[], object]) -> float:
        call()  # connects the ranks
        times = []
        for _ in range(REPEATS):
            dist.barrier()
            before = time.perf_counter()
            call()
            if gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - before)
        return statistics.median(times)

    try:
        seconds = {name: measure(call) for name, call in calls.items()}
    finally:
        dist.destroy_process_group()
    size = whole.numel() * 4
    return {
        name: CollectiveTiming(backend, ranks, size, took, size / took * links[name]) for name, took in seconds.items()
    }
