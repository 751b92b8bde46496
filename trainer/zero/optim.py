"""The optimizer kernels. The only file of the trainer that knows apex exists."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from infra.errors import UserError
from trainer.recipe import Recipe


def build_adamw(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with the recipe's numbers; asking for a kernel that is not installed is an error, never a downgrade."""
    o = recipe.optimizer
    if o.kernel == "apex":
        try:
            from apex.optimizers import FusedAdam
        except ImportError as error:
            raise UserError(
                f"recipe {recipe.name} asks for optimizer.kernel apex, but apex is not installed: "
                "build NVIDIA/apex or use --optimizer.kernel torch"
            ) from error
        return FusedAdam(parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, adam_w_mode=True)
    if o.kernel in ("deepspeed_cpu", "deepspeed_fused"):
        import deepspeed

        cpu = o.kernel == "deepspeed_cpu"
        kernel = deepspeed.ops.adam.DeepSpeedCPUAdam if cpu else deepspeed.ops.adam.FusedAdam
        adam = kernel(parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
        if cpu:
            adam.register_step_pre_hook(_forget_steps)
        return adam
    return torch.optim.AdamW(parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True)


def _forget_steps(adam: Any, args: Any, kwargs: Any) -> None:
    """DeepSpeed's CPU kernel multiplies beta^n up step by step, where a resumed run begins with pow(beta, n): the last
    bit differs. A step 0 of one number, thrown away, makes it take pow at every step (cpu_adam.h, IncrementStep)."""
    nothing = [torch.zeros(1) for _ in range(4)]
    beta_1, beta_2 = adam.param_groups[0]["betas"]
    adam.ds_opt_adam.adam_update(adam.opt_id, 0, 0.0, beta_1, beta_2, 1.0, 0.0, False, *nothing)
