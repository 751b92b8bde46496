"""The one place that chooses where a program computes (`--device`), in what (`--precision`), with how many threads.

`auto` is resolved once, where a run or an evaluation starts. Whoever starts it keeps the answer and goes on with it on
any machine. Whether bf16 pays on a CPU is measured once per machine: CPU flags do not reveal it. Where a CPU lacks
units for bf16, a product takes about a hundred times longer than in fp32.
"""

import functools
import hashlib
import json
import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from infra import storage
from infra.codec import from_json, to_json
from infra.errors import UserError
from infra.log import get_logger, get_rank

Precision = Literal["auto", "fp32", "bf16"]
ResolvedPrecision = Literal["fp32", "bf16"]

log = get_logger("device")

BF16_CAPABILITY = (8, 0)  # CUDA compute capability (Ampere) from which on GPUs multiply bf16 in hardware
PAYS = 1.2  # bf16 must be so many times as fast: what stands between the products gains nothing and adds casts
EMULATED = 2.0  # a first product so many times slower than in fp32 needs no second, longer look
QUICK, LONG = 256, 512  # sides of the square matrices; 512 in emulated bf16 would take a third of a second
REPEATS = 9
MOST_THREADS = 4096  # more is a slip of the keyboard, and no system starts them
# Limits that a user sets on what torch and oneDNN may use of a CPU; other limits, another measurement.
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


@dataclass(frozen=True)
class CpuSpeed:
    """Speed of one core in matrix products, in GFLOP/s."""

    fp32: float
    bf16: float

    @property
    def bf16_pays(self) -> bool:
        return self.bf16 > PAYS * self.fp32


def parse_device_kind(device: str) -> Literal["auto", "cpu", "cuda"]:
    """The kind of a `--device`, which this machine need not have. UserError for anything else."""
    found = re.fullmatch(r"(auto|cpu|cuda)(:\d+)?", device)
    if found is None or (found[2] and found[1] != "cuda"):
        raise UserError(f"unknown --device {device!r}: expected auto, cpu, cuda or cuda:N")
    return cast(Literal["auto", "cpu", "cuda"], found[1])


def choose_device(device: str, *, workers: int = 0, gpus_each: float = 0) -> str:
    """`auto` is cuda where there is a GPU; where `workers` elsewhere do the work, cuda if each is given some of one.
    Other names stay. Nothing is tried here."""
    import torch

    if parse_device_kind(device) != "auto":
        return device
    gpu = gpus_each > 0 if workers else torch.cuda.is_available()
    return "cuda" if gpu else "cpu"


def resolve_device(device: str) -> str:
    """A device of this machine that computes, from `--device`; UserError where the one that was asked for does not.

    Afterwards fp32 means fp32 in this process: torch would let convolutions on GPUs round to TF32, and numbers of one
    protocol would differ between a GPU and a CPU.
    """
    import torch

    device = choose_device(device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an assertion where torch was built without CUDA
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"--device {device} cannot be used here ({reason}); cpu always can") from error
    return device


def resolve_precision(precision: Precision, device: str) -> ResolvedPrecision:
    """`auto` is bf16 where the device multiplies it faster than fp32.

    A GPU says so by its compute capability; a GPU that is not here (a worker's) is taken for one that does. A CPU is
    measured.
    """
    import torch

    device = choose_device(device)
    if precision != "auto":
        return precision
    if device == "cpu":
        return "bf16" if get_cpu_speed().bf16_pays else "fp32"
    if not torch.cuda.is_available():
        return "bf16"
    at = None if device == "cuda" else device
    return "bf16" if torch.cuda.get_device_capability(at) >= BF16_CAPABILITY else "fp32"


def warn_if_slow(precision: ResolvedPrecision, device: str) -> None:
    """Tell who asked for bf16, or keeps it from another machine, that this machine is slow in it."""
    if get_rank() == 0 and precision == "bf16" and resolve_precision("auto", device) == "fp32":
        speed = "this GPU has no bf16 in hardware"
        if choose_device(device) == "cpu":
            found = get_cpu_speed()
            speed = f"one core reaches {found.bf16:.2g} GFLOP/s in bf16 and {found.fp32:.2g} in fp32"
        log.warning("precision bf16 is slow on this machine (%s); precision fp32 is another run or protocol", speed)


def get_cpu_speed() -> CpuSpeed:
    """The speed of a core of this machine, from the file of `locate_cpu_speed`, or measured now (at most 0.3 s) and
    stored there."""
    file = locate_cpu_speed()
    try:
        return from_json(CpuSpeed, file.read_bytes(), where=str(file), extra="ignore")
    except UserError:
        file.unlink(missing_ok=True)  # damaged
    except OSError:
        pass
    speed = _measure_cpu()
    record = to_json(speed) | {"unit": "GFLOP/s of one core", **_describe_machine()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Of two processes that measure at once, the first decides for both.
        if not storage.write_bytes_if_absent(str(file), (json.dumps(record, indent=1) + "\n").encode()):
            return get_cpu_speed()
    except (OSError, UserError) as error:
        log.debug("%s cannot be kept: %s", file, error)
    return speed


def locate_cpu_speed() -> Path:
    """The file in which `get_cpu_speed` stores its result for this CPU, torch and number of threads. Remove it to
    measure again."""
    key = hashlib.sha256(json.dumps(_describe_machine(), sort_keys=True).encode()).hexdigest()[:16]
    return storage.cache_folder() / "cpu_speed" / f"{key}.json"


@functools.cache
def _measure_cpu() -> CpuSpeed:
    """Best of several products of one thread in turns, by that thread's own CPU time, so that other load on the
    machine meets both precisions alike and changes little."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        quick = _race(QUICK, repeats=2)
        return quick if quick.bf16 * EMULATED < quick.fp32 else _race(LONG, repeats=REPEATS)
    finally:
        torch.set_num_threads(threads)


def _race(side: int, *, repeats: int) -> CpuSpeed:
    import torch

    best: dict[torch.dtype, float] = {}
    for turn in range(repeats + 1):  # the first turn compiles and is not counted
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.ones(side, side, dtype=dtype)
            start = time.thread_time()
            torch.mm(a, a)
            seconds = max(time.thread_time() - start, 1e-9)
            best[dtype] = seconds if turn <= 1 else min(best[dtype], seconds)
    fp32, bf16 = (2 * side**3 / best[dtype] / 1e9 for dtype in (torch.float32, torch.bfloat16))
    return CpuSpeed(round(fp32, 3), round(bf16, 3))


@functools.cache
def name_device(device: str) -> str:
    """The model of a resolved device, for records of how fast something was."""
    if device == "cpu":
        return " ".join(_identify_cpu().values())
    import torch

    return str(torch.cuda.get_device_name(device))


def _identify_cpu() -> dict[str, str]:
    """The CPU's model, and a hash that also covers its flags: virtual machines call different CPUs by one name."""
    fields = {}
    try:
        block = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        pairs = (line.partition(":") for line in block.splitlines())
        fields = {name.strip(): value.strip() for name, _, value in pairs}
    except OSError:
        pass
    wanted = ("model name", "CPU implementer", "CPU part", "flags", "Features")
    found = {name: fields[name] for name in wanted if name in fields} or {"model name": platform.processor()}
    digest = hashlib.sha256(json.dumps([platform.machine(), found]).encode()).hexdigest()[:16]
    return {"cpu": found.get("model name") or platform.machine(), "cpu_hash": digest}


def _describe_machine() -> dict[str, object]:
    """All that a measurement of the CPU depends on."""
    import torch

    limits = {name: os.environ[name] for name in LIMITS if name in os.environ}
    return {**_identify_cpu(), "torch": torch.__version__, "threads": 1, "limits": limits}


def choose_num_threads(default: int) -> int:
    """Threads of this process: the first number of OMP_NUM_THREADS, which may be a list (one for each level of nested
    parallelism, OpenMP 5.2, section 21.1.2), else `default`."""
    given = os.environ.get("OMP_NUM_THREADS", "").strip()
    first = given.split(",")[0].strip()
    if first.isdecimal() and 0 < int(first) <= MOST_THREADS:
        return int(first)
    if given and get_rank() == 0:
        log.warning("OMP_NUM_THREADS=%r is no number of threads: %d are used", given, default)
    return default
