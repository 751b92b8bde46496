"""What a dataset of couplings says about itself: noise and the latent that a teacher's solver makes of it.

A coupling is a number, its index. From the index follow its noise (never stored), its prompt, its caption, its split
and its shard. So couplings can be made anywhere in any order, and each exactly once.
"""
# Shapes: I couplings, B batch, C latent channels, H and W latent height and width.

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from infra.codec import to_json
from infra.errors import UserError
from model.diffusion.sampler import Solver
from model.seeding import Keyed, keyed_normal

# The purposes are part of every coupling: other words would be other noise and other prompts.
NOISE, PROMPTS = "coupling noise", "coupling prompts"
_KEY = re.compile(r"coupling-(\d{10,})")
_ELSEWHERE = ("prompts", "count")  # fields that change no coupling


@dataclass(frozen=True)
class Couplings:
    """Everything that decides the couplings of a dataset, and where their text lies."""

    teacher: str
    """sha256 of the teacher's weights file."""
    formulation: str
    solver: Solver
    steps: int
    grid: Literal["default", "released"]
    shift: float
    guidance: float
    unconditional: Literal["zeros", "empty_prompt"]
    precision: Literal["fp32", "bf16"]
    """Of the network; the state and the times of the solver are fp32 always."""
    seed: int
    captions: Mapping[str, float]
    """How often each caption of a prompt is taken."""
    bucket: str
    """Pixels of every picture, "512x512"; "": each prompt's own bucket."""
    val_every: int
    """One prompt of so many is held out, with all its couplings."""
    prompts_split: str
    prompts_index: str
    """Table of shards of the prompts, relative to their dataset: a content-addressed name, which stays when that
    dataset grows."""
    prompts: str
    """Root of the dataset that holds the text; a name without a slash lies inside the couplings' own root."""
    count: int
    tolerance: float = 1e-4
    """Of solver rk."""
    round: int = 1
    """A student of these couplings is a rectified flow of this round: 1 after a teacher that never was reflowed."""
    baked_guidance: float = 1.0
    """Guidance that the teacher learnt from couplings of its own; 1: none."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the fingerprint of the couplings stands for."""
        return {name: value for name, value in to_json(self).items() if name not in _ELSEWHERE}

    def draw_noise(self, indices: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
        """The noise (B, C, H, W) of these couplings, fp32 on the CPU: the same numbers on any machine."""
        return keyed_normal(self.seed, indices, NOISE, shape)

    def differences(self, other: "Couplings") -> list[str]:
        """`["guidance: 1.5 -> 4.0"]`, fields of the identity alone."""
        old, new = self.identity, other.identity
        return [f"{name}: {old[name]} -> {new[name]}" for name in old if old[name] != new[name]]

    def at(self, prompts: str) -> "Couplings":
        """The same couplings with their text at another address."""
        return replace(self, prompts=prompts)


def format_key(index: int) -> str:
    return f"coupling-{index:010d}"


def parse_key(key: str) -> int:
    """The index of the coupling that a sample holds; UserError for the key of something else."""
    found = _KEY.fullmatch(key)
    if found is None:
        raise UserError(f"sample {key!r} is no coupling: make the couplings again")
    return int(found[1])


class PromptOrder:
    """Which prompt each coupling takes: all prompts once in a drawn order, then the same again."""

    def __init__(self, couplings: Couplings, num_prompts: int) -> None:
        if num_prompts < 1:
            raise UserError("the list of prompts is empty: a coupling needs a prompt")
        self._every = couplings.val_every
        self._order = Keyed(couplings.seed, PROMPTS).at(0).permutation(num_prompts)

    def prompts_of(self, index_I: np.ndarray) -> np.ndarray:
        """Numbers of the prompts."""
        return self._order[index_I % len(self._order)]

    def is_val(self, index_I: np.ndarray) -> np.ndarray:
        """Held out? By the prompt's place, so that a prompt is on one side with all its couplings, also when more
        couplings are made later."""
        return (index_I % len(self._order)) % self._every == self._every - 1


class CouplingShard(NamedTuple):
    """Couplings that are made together and become one training shard."""

    id: str
    split: str
    bucket: str
    index_I: np.ndarray


def cut_shards(order: PromptOrder, count: int, bucket_I: np.ndarray, *, shard_rows: int) -> Iterator[CouplingShard]:
    """All shards of `count` couplings, of at most `shard_rows` each. `bucket_I`: the bucket of every coupling.

    More couplings leave full shards as they are: only the last shard of a split and bucket is made again.
    """
    index_I = np.arange(count)
    val_I = order.is_val(index_I)
    for split, chosen_I in (("train", ~val_I), ("val", val_I)):
        for bucket in np.unique(bucket_I):
            indices = index_I[chosen_I & (bucket_I == bucket)]
            for first in range(0, len(indices), shard_rows):
                part = indices[first : first + shard_rows]
                yield CouplingShard(f"{split}-{bucket}-{part[0]:010d}-{len(part)}", split, str(bucket), part)
