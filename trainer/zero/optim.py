"""The AdamW kernels, and the checks that DeepSpeed can compile its own. In the trainer only this file imports apex."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from infra.errors import UserError
from trainer.recipe import Optimizer
from trainer.zero.group import choose_accelerator
from trainer.zero.partition import restart_beta_powers

OPS = {"deepspeed_cpu": "CPUAdamBuilder", "deepspeed_fused": "FusedAdamBuilder"}


def build_adamw(parameters: Iterable[nn.Parameter], o: Optimizer) -> torch.optim.Optimizer:
    """AdamW with these numbers; asking for a kernel that is not installed is an error, never a downgrade."""
    numbers: dict[str, Any] = {"lr": o.lr, "betas": o.betas, "eps": o.eps, "weight_decay": o.weight_decay}
    if o.kernel == "apex":
        return _import_apex()(parameters, **numbers, adam_w_mode=True)
    if o.kernel in OPS:
        import deepspeed

        cpu = o.kernel == "deepspeed_cpu"
        kernel = deepspeed.ops.adam.DeepSpeedCPUAdam if cpu else deepspeed.ops.adam.FusedAdam
        adam = kernel(parameters, **numbers)
        if cpu:
            adam.register_step_pre_hook(restart_beta_powers)
        return adam
    return torch.optim.AdamW(parameters, **numbers, fused=True)


def check_kernel(kernel: str) -> None:
    """UserError for a kernel that is not installed or that DeepSpeed cannot compile here. It is compiled now (a minute,
    once per machine), so that a failure shows before any rank starts."""
    if kernel == "apex":
        _import_apex()
    if kernel in OPS:
        _compile(OPS[kernel], f"optimizer.kernel {kernel}", "--optimizer.kernel torch")


def check_aio() -> None:
    """UserError where DeepSpeed cannot compile its NVMe reader and writer, which need libaio."""
    instead = "--parallel.offload-parameters cpu, or install libaio-dev"
    _compile("AsyncIOBuilder", "parallel.offload_parameters nvme", instead)


def _import_apex() -> Any:
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise UserError(
            "the recipe asks for optimizer.kernel apex, but apex is not installed: "
            "build NVIDIA/apex or use --optimizer.kernel torch"
        ) from error
    return FusedAdam


def _compile(name: str, kernel: str, instead: str) -> None:
    choose_accelerator()
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(name)
    try:
        if not builder.is_compatible(verbose=False):
            raise RuntimeError("what it is compiled with is not installed")
        builder.load(verbose=False)
    except Exception as error:  # of compilers, linkers, loaders, DeepSpeed's own checks
        reasons = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"the recipe asks for {kernel}, which DeepSpeed cannot compile here ({reasons[0]}): use {instead}"
        ) from error
