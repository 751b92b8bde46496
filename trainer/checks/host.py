"""Checks of the machine that a run starts on: its hostfile, a port, compilers, kernels, folders, a GPU.

Each check raises a UserError where the machine lacks something. The answers hold for one machine: on another node of
the same run they may differ.
"""

import contextlib
import itertools
import os
import shutil
import socket
import tempfile

import psutil
import torch

from infra import storage
from infra.errors import UnavailableError, UserError
from trainer.launchers import is_launcher
from trainer.recipe import Parallel
from trainer.zero.group import PORT_IN_USE
from trainer.zero.optim import check_aio


def check_hostfile() -> None:
    """UserError where a hostfile that was given to a launcher does not exist: DeepSpeed would train on this machine
    alone. The command lines are those of the processes above this one."""
    for parent in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            words = parent.cmdline()
            hostfiles = [b for a, b in itertools.pairwise(words) if a == "--hostfile"]
            hostfiles += [word.partition("=")[2] for word in words if word.startswith("--hostfile=")]
            if is_launcher(parent):  # other programs mean something else by -H
                hostfiles += [b for a, b in itertools.pairwise(words) if a == "-H"]
                hostfiles += [word[2:] for word in words if word.startswith("-H") and len(word) > 2]
            for path in hostfiles:
                if not os.path.isfile(os.path.join(parent.cwd(), path)):
                    raise UserError(
                        f"--hostfile {path}: no such file; without it DeepSpeed trains on this machine alone: "
                        "correct the path, or leave --hostfile out"
                    )


def check_port() -> None:
    """UnavailableError where rank 0 cannot open the port at which the ranks meet. Not checked under torchrun, which
    holds the port open itself."""
    port = int(os.environ.get("MASTER_PORT", "0"))
    if not port or os.environ.get("RANK", "0") != "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UnavailableError(PORT_IN_USE.format(port=port)) from error


def check_out(out: str) -> None:
    """UserError unless files can be written into the run folder `out` on a disk, or into the existing folder above it.
    S3 is not checked here."""
    if storage.is_remote(out):
        return
    path = storage.local_path(out).absolute()
    existing = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not existing.is_dir():
        raise UserError(f"--out {out}: {existing} is a file, not a folder: choose another --out")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"--out {out}: {existing} takes no file ({error.strerror}): choose another --out") from error


def check_swapping(parallel: Parallel) -> None:
    """UserError unless the folder that parameters are swapped to takes files, and DeepSpeed's library for reading and
    writing there (aio) can be used."""
    path = parallel.nvme_path
    if parallel.offload_parameters != "nvme" or not path:
        return
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"parallel.nvme_path {path} takes no file ({error.strerror}): "
            "give --parallel.nvme-path a folder that exists and is writable on every machine"
        ) from error
    check_aio()


def check_compiler(parallel: Parallel) -> None:
    """UserError where torch.compile would find no compiler. On a CPU it compiles kernels in C++; on a GPU it compiles
    the C code that starts Triton's kernels."""
    if not parallel.compile:
        return
    gpu = torch.cuda.is_available()
    wanted = os.environ.get("CC" if gpu else "CXX", "gcc" if gpu else "g++")
    if shutil.which(wanted) is None:
        raise UserError(
            f"parallel.compile needs a compiler, but there is no {wanted} here: "
            "install one, or use --no-parallel.compile"
        )


def check_gpu(parallel: Parallel) -> None:
    """UserError where ZeRO++'s quantization is asked for without a GPU: its kernels exist in CUDA alone."""
    quantized = [name for name in ("quantized_weights", "quantized_gradients") if getattr(parallel, name)]
    if quantized and not torch.cuda.is_available():
        raise UserError(f"parallel.{' and '.join(quantized)} need a GPU, and there is none: omit it")
