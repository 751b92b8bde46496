"""DeepSpeed's own Python on the hot path, lighter: the same work by fewer calls.

Under ZeRO-3 a small model's steps wait for the host: at depth 15 on an H200 it needs 180 ms for what the GPU does in
110. What goes here changes no number and touches nothing but names that DeepSpeed 0.19 looks up at each call.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Parameters = Callable[..., Iterable[nn.Parameter]]
LISTED = "_parameters_listed"


def lighten() -> None:
    """Once a process, before the first engine."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import parameter_offload, partition_parameters, partitioned_param_coordinator
    from deepspeed.utils import nvtx

    if partition_parameters.print_rank_0 is _nothing:
        return
    nvtx.enable_nvtx = False  # a profiler's marks around every call
    partition_parameters.print_rank_0 = _nothing  # asks for the rank before it finds that there is nothing to say
    listed = _listing_once(partitioned_param_coordinator.iter_params)
    for module in (parameter_offload, partitioned_param_coordinator):
        module.iter_params = listed
    if torch.cuda.is_available():
        accelerator: Any = get_accelerator()
        here, asked = torch.cuda.current_device(), accelerator.current_stream
        # Without an index torch finds out each time which device there is.
        accelerator.current_stream = lambda index=None: asked(here if index is None else index)


def look_once(optimizer: Any) -> None:
    """Stages 1 and 2 look for infinities in each gradient, waiting for the GPU each time, and then at the norm, which
    tells the same: an infinite or missing one skips the step as well."""
    if hasattr(optimizer, "check_grad_overflow") and optimizer.compute_grad_norm:
        optimizer.check_overflow = _nothing


def _nothing(*words: Any, **how: Any) -> None:
    pass


def _listing_once(iter_params: Parameters) -> Parameters:
    """Of a block, whose parameters are asked for several times a pass, they are listed once."""
    from deepspeed.utils import z3_leaf_module

    def listed(module: nn.Module, recurse: bool = False) -> Iterable[nn.Parameter]:
        if not (recurse and z3_leaf_module(module)):
            return iter_params(module, recurse)
        found = module.__dict__.get(LISTED)
        if found is None:
            found = module.__dict__[LISTED] = list(iter_params(module, recurse))
        return found  # type: ignore[no-any-return]

    return listed
