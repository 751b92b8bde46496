"""Forward passes in fp32 of a network whose weights are kept in bf16: for differences of its outputs.

A difference of two passes amplifies the rounding of each. The weights stay as they are, so it is the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class InFloat32(TorchFunctionMode):
    """Inside the block an operation reads parameters in fp32. Give the network fp32 inputs.

    Only parameters are converted, where an operation takes them: what ZeRO-3 gathers and frees between operations are
    other tensors.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        given: Mapping[str, Any] = kwargs or {}
        if func in _READ_PARAMETERS:
            args = tuple(_widen(value) for value in args)
            given = {name: _widen(value) for name, value in given.items()}
        return func(*args, **given)


_READ_PARAMETERS = {
    nn.functional.linear, torch.conv2d, nn.functional.conv2d, torch.layer_norm, torch.rms_norm, torch.group_norm,
    nn.functional.layer_norm, nn.functional.rms_norm, nn.functional.group_norm, torch.matmul, torch.addmm,
    torch.Tensor.matmul, torch.Tensor.__matmul__,
}  # fmt: skip


def _widen(value: Any) -> Any:
    is_narrow = isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16
    return value.float() if is_narrow else value
