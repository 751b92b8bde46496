"""CPU time that the host takes from a virtual machine (steal): up to half on a small one, varying by the minute."""

import os
from pathlib import Path

_STEAL = 7  # of the numbers of /proc/stat's first line, in clock ticks over all cores (proc(5))


def read_stolen_seconds() -> float:
    """Core-seconds since boot in which this machine was ready to run but its host did not let it; 0 if unknown."""
    try:
        ticks = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    return int(ticks[_STEAL]) / os.sysconf("SC_CLK_TCK") if len(ticks) > _STEAL else 0.0


def subtract_stolen(seconds: float, *, stolen: float, work: float, ranks: int) -> float:
    """Seconds by the clock as they would have been without the `stolen` ones (of all cores together): `ranks` processes
    that wait for each other lose what each of their cores loses (whether two lost the same moment is not known). Never
    less than the `work` of the busiest one."""
    cores = os.cpu_count() or 1
    return max(min(seconds, work), seconds - stolen * min(ranks, cores) / cores)
