"""The AdamW kernels, and the checks that DeepSpeed can compile its own. In the trainer only this file imports apex."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from infra.errors import UserError
from trainer.recipe import Recipe
from trainer.zero.group import choose_accelerator
from trainer.zero.partition import restart_beta_powers

OPS = {"deepspeed_cpu": "CPUAdamBuilder", "deepspeed_fused": "FusedAdamBuilder"}


def build_adamw(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with the recipe's numbers; asking for a kernel that is not installed is an error, never a downgrade."""
    o = recipe.optimizer
    if o.kernel == "apex":
        return _import_apex(recipe)(
            parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, adam_w_mode=True
        )
    if o.kernel in OPS:
        import deepspeed

        cpu = o.kernel == "deepspeed_cpu"
        kernel = deepspeed.ops.adam.DeepSpeedCPUAdam if cpu else deepspeed.ops.adam.FusedAdam
        adam = kernel(parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
        if cpu:
            adam.register_step_pre_hook(restart_beta_powers)
        return adam
    return torch.optim.AdamW(parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True)


def check_kernel(recipe: Recipe) -> None:
    """UserError for a kernel that is not installed or that DeepSpeed cannot compile here. It is compiled now (a minute,
    once per machine), so that a failure shows before any rank starts."""
    kernel = recipe.optimizer.kernel
    if kernel == "apex":
        _import_apex(recipe)
    if kernel in OPS:
        _compile(OPS[kernel], f"recipe {recipe.name} asks for optimizer.kernel {kernel}", "--optimizer.kernel torch")


def check_aio(recipe: Recipe) -> None:
    """UserError where DeepSpeed cannot compile its NVMe reader and writer, which need libaio."""
    asks = f"recipe {recipe.name} asks for parallel.offload_parameters nvme"
    _compile("AsyncIOBuilder", asks, "--parallel.offload-parameters cpu, or install libaio-dev")


def _import_apex(recipe: Recipe) -> Any:
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise UserError(
            f"recipe {recipe.name} asks for optimizer.kernel apex, but apex is not installed: "
            "build NVIDIA/apex or use --optimizer.kernel torch"
        ) from error
    return FusedAdam


def _compile(name: str, asks: str, instead: str) -> None:
    choose_accelerator()
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(name)
    try:
        if not builder.is_compatible(verbose=False):
            raise RuntimeError("what it is compiled with is not installed")
        builder.load(verbose=False)
    except Exception as error:  # of compilers, linkers, loaders, DeepSpeed's own checks
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{asks}, which DeepSpeed cannot compile here ({said[0]}): use {instead}") from error
