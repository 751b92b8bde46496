"""The paper's fixed 2-D sin-cos positions (SD3 section 5.3.2) on a grid that is extended and centre-cropped.

A grid position p is encoded as (p - (max - s)/2) * base/s, where s is the token side of the target resolution and
base that of the resolution the model was pretrained at (16 tokens at 256 pixels): at s = base the crop holds 0..s-1.
The table is separable, so only one row of D/2 numbers per column and per row of the grid is kept.
"""
# Shapes: B batch, N image tokens, D width, P positions per axis.

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from infra.errors import UserError

MAX_PERIOD = 10_000.0


def make_positions(count: int, target: int, base: int) -> np.ndarray:
    """Positions of a grid axis of `count` tokens for a target of `target` tokens, in units of the pretraining grid."""
    return (np.arange(count, dtype=np.float64) - (count - target) / 2) * base / target


def encode_sincos(positions_P: np.ndarray, width: int) -> np.ndarray:
    """width/2 sines, then width/2 cosines, of frequencies MAX_PERIOD**(-k/(width/2)), in float64."""
    # Sines first, cosines second: the time features (layers.py) have the opposite order, both as in the reference.
    half = width // 2
    angle = np.outer(positions_P, MAX_PERIOD ** (-np.arange(half, dtype=np.float64) / half))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


class PositionTable(nn.Module):
    """axes_2PD: [0] for columns (first half of the channels, as in the reference), [1] for rows."""

    axes_2PD: Tensor

    def __init__(self, width: int, count: int, *, target: int, base: int, stored: bool = False):
        super().__init__()
        if width % 4:
            raise UserError(f"position table of width {width}: the width must be divisible by 4")
        if not 1 <= target <= count:
            raise UserError(f"pos_tokens={target} must lie in 1..pos_max={count}")
        self.width, self.count, self.target, self.base = width, count, target, base
        # stored=True: the table comes with the weights (released SD3 files) instead of from the formula.
        self.register_buffer("axes_2PD", torch.empty(2, count, width // 2), persistent=stored)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill from the formula; through numpy, because DeepSpeed's zero.Init casts what torch constructors make."""
        if self.axes_2PD.is_meta:
            return
        axis = encode_sincos(make_positions(self.count, self.target, self.base), self.width // 2)
        table = torch.from_numpy(np.stack([axis, axis]).astype(np.float32))
        self.axes_2PD = table.to(self.axes_2PD.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PositionTable:
        # .bfloat16() and .half() of the whole model would round the positions: keep them in float32.
        before = self.axes_2PD
        super()._apply(fn, recurse)
        if self.axes_2PD.dtype != torch.float32:
            self.axes_2PD = before.to(self.axes_2PD.device)
        return self

    def forward(self, rows: int, columns: int) -> Tensor:
        """Positions (1, rows*columns, D) of the centre crop, row by row."""
        if max(rows, columns) > self.count:
            raise UserError(
                f"a grid of {rows}x{columns} tokens is larger than the position table of {self.count}x{self.count}; "
                "raise pos_max"
            )
        top, left = (self.count - rows) // 2, (self.count - columns) // 2
        half = self.width // 2
        column = self.axes_2PD[0, left : left + columns].expand(rows, columns, half)
        row = self.axes_2PD[1, top : top + rows, None].expand(rows, columns, half)
        return torch.cat([column, row], dim=-1).view(1, rows * columns, self.width)

    def make_full_table(self) -> Tensor:
        """The (1, P*P, D) table as SD3 files and diffusers store it."""
        return self(self.count, self.count)
