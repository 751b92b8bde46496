"""Random numbers keyed by (seed, global sample position, purpose): the same for any batch, rank, order or resume.

Philox is a counter-based generator: sha256(seed, purpose) is its key, the position its counter, so position n needs
no draw of position n-1.
"""
# Shapes: R positions, N numbers of one position.

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import LongTensor, Tensor

Positions = Sequence[int] | LongTensor | Tensor


def _hash_key(seed: int, purpose: str) -> np.ndarray:
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return np.frombuffer(digest[:16], dtype=np.uint64)


def _as_ints(positions: Positions) -> list[int]:
    return positions.tolist() if isinstance(positions, Tensor) else [int(p) for p in positions]


class Keyed:
    """The numbers of one (seed, purpose), position by position. Not for several threads at once."""

    def __init__(self, seed: int, purpose: str) -> None:
        self.bits = np.random.Philox(key=_hash_key(seed, purpose))
        self._rng, self._state = np.random.Generator(self.bits), self.bits.state

    def at(self, position: int) -> np.random.Generator:
        """A generator that stands at the first number of a position; good until the next call."""
        # The generator advances counter word 0; the position sits in word 2, 2**128 blocks away from its neighbour.
        # Setting the state gives what a new generator would, in a fifth of the time.
        self._state["state"]["counter"][:] = (0, 0, position, 0)
        self.bits.state = self._state
        return self._rng


class Normal(Keyed):
    """Standard normal numbers: the rows of `keyed_normal`."""

    def fill(self, positions: Sequence[int], out: np.ndarray) -> None:
        """Row n of `out` (float32, contiguous) becomes the numbers of positions[n]."""
        for position, row in zip(positions, out, strict=True):
            self.at(position).standard_normal(out=row, dtype=np.float32)


class QuickNormal(Keyed):
    """As `Normal`, in a third of the time. The numbers are others, and their last bits may depend on the kind of CPU.

    Box and Muller (1958): sqrt(-2 ln u) times cos and sin of 2 pi v, with 32 random bits for each of u and v.
    """

    def fill(self, positions: Sequence[int], out: np.ndarray) -> None:
        """Row n of `out` (float32, contiguous) becomes the numbers of positions[n]."""
        rows, size = len(positions), out[0].size
        if size % 2:
            even_RN = np.empty((rows, size + 1), np.float32)
            self.fill(positions, even_RN)
            out.reshape(rows, size)[:] = even_RN[:, :-1]
            return
        numbers_R2N = out.reshape(rows, 2, -1)
        for position, row_2N in zip(positions, numbers_R2N, strict=True):
            self.at(position)
            raw = self.bits.random_raw(size // 2).view(np.uint32)
            np.copyto(row_2N, raw.reshape(2, -1), casting="unsafe")
        radius_RN, angle_RN = numbers_R2N[:, 0], numbers_R2N[:, 1]
        radius_RN += 1
        radius_RN *= 2**-32
        np.log(radius_RN, out=radius_RN)
        radius_RN *= -2
        np.sqrt(radius_RN, out=radius_RN)
        angle_RN *= 2 * np.pi * 2**-32
        sine_RN = np.sin(angle_RN)
        np.cos(angle_RN, out=angle_RN)
        angle_RN *= radius_RN
        radius_RN *= sine_RN


def keyed_normal(seed: int, positions: Positions, purpose: str, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 of shape (len(positions), *shape) on the CPU."""
    out = np.empty((len(positions), *shape), np.float32)
    Normal(seed, purpose).fill(_as_ints(positions), out)
    return torch.from_numpy(out)


def keyed_uniform(seed: int, positions: Positions, purpose: str, shape: Sequence[int] = ()) -> Tensor:
    """Uniform float64 in [0, 1) of shape (len(positions), *shape) on the CPU."""
    keyed, out = Keyed(seed, purpose), np.empty((len(positions), *shape))
    for row, position in enumerate(_as_ints(positions)):
        keyed.at(position).random(out=out[row : row + 1])
    return torch.from_numpy(out)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws inside come from `seed`; the global generators, GPUs' too, are afterwards as before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@torch.no_grad()
def draw_(weight: Tensor, init: Callable[[Tensor], object]) -> None:
    """Fill a weight by the CPU's generator wherever it lies: one seed gives one model, on a CPU, on a GPU, and under
    zero.Init, which makes parameters on the GPU at once."""
    if weight.device.type in ("cpu", "meta"):
        init(weight)
        return
    host = torch.empty_like(weight, device="cpu")
    init(host)
    weight.copy_(host)
