"""Which rank holds the others up? All ranks take the same time for a step, as each waits for the slowest one.

So each rank times a product alone, between two steps, and counts the seconds for which it waits for data. Both are
compared over the ranks.
"""

import socket
import statistics
import time

import torch

from infra.log import get_logger
from trainer.zero.group import Group

log = get_logger("ranks")
SLOW = 0.75  # of the median speed
HUNGRY = 0.2  # share of the time for which a rank waits for data, if it is also twice the median
TIMES_IN_A_ROW = 2  # a rank is named when it was slow so often: once may be chance
TRIES = 5


def measure_speed(device: torch.device) -> float:
    """FLOP/s of a product of square matrices, the fastest of a few: 4096 wide in bf16 on a GPU, 256 in fp32 on a
    CPU."""
    width, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    matrix = torch.ones(width, width, device=device, dtype=dtype)
    seconds = []
    for _ in range(TRIES):
        _settle(device)
        start = time.perf_counter()
        matrix @ matrix
        _settle(device)
        seconds.append(time.perf_counter() - start)
    return 2 * width**3 / min(seconds)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stragglers:
    """Compares the ranks each time the log has a line, and names the one that is slow again and again."""

    def __init__(self, group: Group) -> None:
        """Collective."""
        self._group = group
        self._hosts = group.gather(socket.gethostname())
        self._slow = dict.fromkeys(range(group.world_size), 0)  # how often in a row
        self._hungry = dict.fromkeys(range(group.world_size), 0)

    def compare(self, *, speed: float, data_wait: float) -> dict[str, float]:
        """Figures for the log: the slowest rank, its speed as a share of the median, and the same for the share of time
        for which a rank waits for data. Collective."""
        rank, count = self._group.rank, self._group.world_size
        mine = [0.0] * (2 * count)
        mine[rank], mine[count + rank] = speed, data_wait
        everybody = self._group.sum(mine)
        speeds, waits = everybody[:count], everybody[count:]
        # Of two ranks the median is the mean of both, which the slower one has pulled down.
        usual, wait = statistics.median_high(speeds), statistics.median_low(waits)
        slowest, hungriest = speeds.index(min(speeds)), waits.index(max(waits))
        for number in range(count):
            slow, hungry = speeds[number] < SLOW * usual, waits[number] > max(HUNGRY, 2 * wait)
            self._slow[number] = self._slow[number] + 1 if slow else 0
            self._hungry[number] = self._hungry[number] + 1 if hungry else 0
        if rank == 0:
            if slow_ones := self._name(self._slow):
                share = min(speeds) / usual
                log.warning("slower than the rest, so all wait: %s; at %.2f of the median speed", slow_ones, share)
            if hungry_ones := self._name(self._hungry):
                shares = 100 * max(waits), 100 * wait
                log.warning("waiting for data: %s; %.0f %% of the time, the median rank %.0f %%", hungry_ones, *shares)
        return {
            "ranks/slowest": slowest,
            "ranks/slowest_speed": speeds[slowest] / usual,
            "ranks/longest_data_wait": hungriest,
            "ranks/median_data_wait": wait,
        }

    def _name(self, counts: dict[int, int]) -> str:
        """The ranks whose turn it is, the first eight."""
        ranks = [rank for rank, count in counts.items() if count == TIMES_IN_A_ROW]
        return ", ".join(f"rank {rank} ({self._hosts[rank]})" for rank in ranks[:8])
