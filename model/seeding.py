"""Random numbers keyed by (seed, global sample position, purpose): the same for any batch, rank, order or resume.

Philox is a counter-based generator: sha256(seed, purpose) is its key, the position its counter, so position n needs
no draw of position n-1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import LongTensor, Tensor

Positions = Sequence[int] | LongTensor | Tensor


def _key(seed: int, purpose: str) -> np.ndarray:
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return np.frombuffer(digest[:16], dtype=np.uint64)


def _as_ints(positions: Positions) -> list[int]:
    return positions.tolist() if isinstance(positions, Tensor) else [int(p) for p in positions]


def _draw(
    seed: int,
    positions: Positions,
    purpose: str,
    shape: tuple[int, ...],
    dtype: type,
    fill: Callable[[np.random.Generator, np.ndarray], object],
) -> Tensor:
    key = _key(seed, purpose)
    rows = _as_ints(positions)
    out: np.ndarray = np.empty((len(rows), *shape), dtype=dtype)
    for row, position in enumerate(rows):
        # The generator advances counter word 0; the position sits in word 2, 2**128 blocks away from its neighbour.
        rng = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, position, 0]))
        fill(rng, out[row : row + 1])
    return torch.from_numpy(out)


def keyed_normal(seed: int, positions: Positions, purpose: str, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 of shape (len(positions), *shape) on the CPU."""

    def fill(rng: np.random.Generator, row: np.ndarray) -> None:
        rng.standard_normal(out=row, dtype=np.float32)

    return _draw(seed, positions, purpose, tuple(shape), np.float32, fill)


def keyed_uniform(seed: int, positions: Positions, purpose: str, shape: Sequence[int] = ()) -> Tensor:
    """Uniform float64 in [0, 1) of shape (len(positions), *shape) on the CPU."""
    return _draw(seed, positions, purpose, tuple(shape), np.float64, lambda rng, row: rng.random(out=row))
