"""What a run asks of the machine it starts on: a hostfile, a port, compilers, kernels, folders, a GPU.

Each is true of one machine alone: on another node of the same run it may be otherwise.
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
from infra.errors import UserError
from trainer.launchers import is_launcher
from trainer.recipe import Parallel
from trainer.zero.group import PORT_IN_USE
from trainer.zero.optim import check_aio


def check_hostfile() -> None:
    """What the launchers let pass: DeepSpeed goes on with this machine alone where it does not find its hostfile."""
    for parent in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            words = parent.cmdline()
            given = [b for a, b in itertools.pairwise(words) if a == "--hostfile"]
            given += [word.partition("=")[2] for word in words if word.startswith("--hostfile=")]
            if is_launcher(parent):  # others mean something else by -H
                given += [b for a, b in itertools.pairwise(words) if a == "-H"]
                given += [word[2:] for word in words if word.startswith("-H") and len(word) > 2]
            for path in given:
                if not os.path.isfile(os.path.join(parent.cwd(), path)):
                    raise UserError(
                        f"--hostfile {path}: no such file; without it DeepSpeed trains on this machine alone: "
                        "correct the path, or leave --hostfile out"
                    )


def check_port() -> None:
    """Will rank 0 be able to open the port where the ranks meet? torchrun holds it itself."""
    port = int(os.environ.get("MASTER_PORT", "0"))
    if not port or os.environ.get("RANK", "0") != "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(PORT_IN_USE.format(port=port)) from error


def check_out(out: str) -> None:
    """A run folder on a disk must be a folder that takes files, or one that can be made."""
    if storage.is_remote(out):
        return
    path = storage.local_path(out).absolute()
    there = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise UserError(f"--out {out}: {there} is a file, not a folder: choose another --out")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"--out {out}: {there} takes no file ({error.strerror}): choose another --out") from error


def check_swapping(p: Parallel) -> None:
    """The folder that parameters are swapped to must take a file, and DeepSpeed must be able to write it."""
    path = p.nvme_path
    if p.offload_parameters != "nvme" or not path:
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


def check_compiler(p: Parallel) -> None:
    """torch.compile writes C++ (on a GPU the C of its launchers) and calls a compiler."""
    if not p.compile:
        return
    gpu = torch.cuda.is_available()
    wanted = os.environ.get("CC" if gpu else "CXX", "gcc" if gpu else "g++")
    if shutil.which(wanted) is None:
        raise UserError(
            f"parallel.compile needs a compiler, but there is no {wanted} here: "
            "install one, or use --no-parallel.compile"
        )


def check_gpu(p: Parallel) -> None:
    """ZeRO++'s kernels that quantize are written in CUDA alone."""
    asked = [name for name in ("quantized_weights", "quantized_gradients") if getattr(p, name)]
    if asked and not torch.cuda.is_available():
        raise UserError(f"parallel.{' and '.join(asked)} need a GPU, and there is none: omit it")
