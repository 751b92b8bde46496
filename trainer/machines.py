"""What the planner knows of machines: speeds, memory, links, prices. From data sheets; prices are our assumption."""

from dataclasses import dataclass

from infra.device import Precision, ResolvedPrecision, choose_device, get_cpu_speed, resolve_precision
from infra.errors import UserError, nearest


@dataclass(frozen=True)
class Machine:
    """One device and what joins it to others. Links count bytes per second and device, in one direction."""

    name: str
    flops: float
    """Peak dense FLOP/s in `precision`."""
    memory: float
    per_node: int
    link_inside: float
    link_between: float
    bandwidth: float
    """Of its memory: what the optimizer and the EMA run at."""
    dollars_per_hour: float
    """Of one device, rented; --dollars-per-gpu-hour overrides."""
    efficiency: float = 0.4
    """Share of the peak that a step of this kind reaches; --efficiency or --calibrate overrides."""
    overlap: bool = True
    """Communication hides behind computing."""
    encode_seconds: float = 0.0
    """VAE and the three SD3 text encoders for one image with one caption (SD3 paper, table 7: 23.1 ms)."""
    precision: ResolvedPrecision = "bf16"
    """What `--precision auto` is there."""

    @property
    def waiting(self) -> float:
        """Seconds that a rank waits for others in exchanges, for a second of its own work in them."""
        return 0.0 if self.overlap else CPU_WAITING


# How long a rank also waits in an exchange over gloo, for the other's part, per second of its own work for it. Two
# ranks that nobody took their cores from, depths 2, 4 and 15: 0.17 to 0.2, and 5 ms a layer, which a calibration tells
# apart; beside other work 0.5.
CPU_WAITING = 0.2
# Products in bf16 so many times as fast as in fp32 need units for whole matrices: AMX measured 7 times, units for
# vectors (avx512_bf16) do twice as many operations a cycle as fp32 has.
AMX = 3.0
GIB = 2.0**30
MACHINES: dict[str, Machine] = {
    m.name: m
    for m in (
        Machine("a100-40", 312e12, 40 * GIB, 8, 300e9, 25e9, 1.56e12, 1.3, encode_seconds=0.0231),
        Machine("a100-80", 312e12, 80 * GIB, 8, 300e9, 25e9, 2.0e12, 1.6, encode_seconds=0.0231),
        Machine("h100-80", 989e12, 80 * GIB, 8, 450e9, 50e9, 3.35e12, 2.5, encode_seconds=0.0231 * 312 / 989),
        Machine("h200-141", 989e12, 141 * GIB, 8, 450e9, 50e9, 4.8e12, 3.0, encode_seconds=0.0231 * 312 / 989),
        Machine("b200-180", 2250e12, 180 * GIB, 8, 900e9, 50e9, 8e12, 4.5, encode_seconds=0.0231 * 312 / 2250),
        # One core of an AMD Zen 3 server: half of the 127 GFLOP/s that two of them reach in fp32 matmuls.
        Machine(
            "cpu",
            63.5e9,
            12 * GIB,
            1024,
            0.6e9,
            0.6e9,
            20e9,
            0.03,
            0.45,
            overlap=False,
            encode_seconds=0.02,
            precision="fp32",
        ),
        # One core with AMX: 2048 bf16 FLOP a cycle at 2 GHz. Measured on a Xeon, per second of work of one core: gloo
        # between two processes of one machine moves 0.3 to 0.5 GB of tensors of 16 to 132 MB (0.6 of smaller ones),
        # AdamW's fused kernel 27 GB, a lerp 18 GB.
        Machine("cpu-amx", 4.1e12, 12 * GIB, 1024, 0.4e9, 0.4e9, 20e9, 0.03, 0.04, overlap=False, encode_seconds=0.02),
    )
}


def get_machine(name: str) -> Machine:
    """A machine by name; UserError with the nearest known one."""
    if name not in MACHINES:
        raise UserError(f"unknown machine {name!r}{nearest(name, MACHINES)}; known: {', '.join(MACHINES)}")
    return MACHINES[name]


def detect_machine(precision: Precision) -> Machine:
    """The nearest entry for the device that this process would train on in that precision."""
    import torch

    if choose_device("auto") == "cpu":
        speed, bf16 = get_cpu_speed(), resolve_precision(precision, "cpu") == "bf16"
        return MACHINES["cpu-amx" if bf16 and speed.bf16 > AMX * speed.fp32 else "cpu"]
    name, memory = torch.cuda.get_device_name().lower(), torch.cuda.get_device_properties(0).total_memory
    fitting = [m for m in MACHINES.values() if m.name.split("-")[0] in name]
    return min(fitting, key=lambda m: abs(m.memory - memory)) if fitting else MACHINES["a100-80"]


def estimate_transfer(machine: Machine, nbytes: float, ranks: int) -> tuple[float, float]:
    """(inside a node, between nodes) to all-gather or reduce-scatter a tensor of `nbytes` over all ranks.

    Each device takes in the whole over its link inside the node; each node takes in what other nodes hold over all of
    its adapters. The two go on at once: the slower one counts.
    """
    inside = min(ranks, machine.per_node)
    nodes = -(-ranks // machine.per_node)
    local = nbytes * (ranks - 1) / ranks / machine.link_inside
    remote = nbytes * (nodes - 1) / nodes / (inside * machine.link_between)
    return local, remote
