"""The order of samples: a pure function of (seed, position), whatever the ranks, workers or restarts.

Each bucket has an endless sequence of samples, which is computed and never stored. A virtual position is a place in it.
The sequence is pass after pass over the bucket. In each pass the shards are permuted, and samples are shuffled inside
blocks of several shards, so that reads stay local.

An epoch is a shuffled list of the buckets' next batches. Where a bucket's size is no multiple of the batch, the samples
that are left over begin its batches of the next epoch: no sample is left out.
"""
# Shapes: G global batch.

import hashlib
from collections import OrderedDict
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from data_pipeline.loading.kept import KeptRows
from infra.errors import UserError

BLOCK_SHARDS = 8  # shards whose samples are shuffled together
_ATTEMPTS = 10_000  # draws for a substitute before all of a bucket counts as damaged


def make_keyed_rng(seed: int, *purpose: object) -> np.random.Generator:
    """A generator that depends on nothing but the seed and the words of its purpose."""
    digest = hashlib.sha256(f"{seed}/order/{'/'.join(map(str, purpose))}".encode()).digest()
    # Philox is counter-based (Salmon et al. 2011): any key gives an independent stream, none has to be skipped ahead
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))


class BatchLocations(NamedTuple):
    """One global batch: where each of its samples is. All lie in one bucket."""

    bucket: str
    shard_G: np.ndarray
    row_G: np.ndarray


@dataclass(frozen=True)
class DataExceptions:
    """What a run leaves out: shards that could not be read (their tar names), and positions that were skipped. Part of
    a checkpoint."""

    shards: frozenset[str] = frozenset()
    positions: frozenset[int] = frozenset()
    since: Mapping[str, int] = field(default_factory=dict)
    """The position from which on each shard is left out."""

    def __or__(self, other: "DataExceptions") -> "DataExceptions":
        """What either leaves out; a shard that both leave out, from the earlier position on."""
        both = [*self.since.items(), *other.since.items()]
        since = {name: min(position for shard, position in both if shard == name) for name, _ in both}
        return DataExceptions(self.shards | other.shards, self.positions | other.positions, since)

    def go_back_to(self, position: int) -> "DataExceptions":
        """What is left out by a run that continues at an earlier position."""
        return replace(self, since={name: min(first, position) for name, first in self.since.items()})


class BucketOrder:
    """The endless sequence of one bucket's samples: virtual position <-> (shard, row)."""

    def __init__(
        self,
        bucket: str,
        shards: np.ndarray,
        sizes: np.ndarray,
        *,
        seed: int,
        block_shards: int,
        uri: str = "URI",
        kept: KeptRows | None = None,
    ) -> None:
        """`shards`: the bucket's shard numbers; `sizes`: the samples of each. With `kept` they are counts of kept rows.
        `uri`: the dataset's, for messages."""
        self.bucket, self.shards, self.sizes = bucket, np.asarray(shards), np.asarray(sizes, np.int64)
        self.num_samples, self._kept = int(self.sizes.sum()), kept
        self._seed, self._block_shards, self._uri = seed, block_shards, uri
        self._passes: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def locate(self, virtual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard numbers and rows, both int64 (N), of N virtual positions.

        `starts` counts the samples before each shard of a pass, in the pass's order. A block shuffles the samples of
        its shards: the position inside the block gives a sample of the same block.
        """
        shard = np.empty(len(virtual), np.int64)
        row = np.empty(len(virtual), np.int64)
        passes = virtual // self.num_samples
        for number in np.unique(passes):
            chosen = np.flatnonzero(passes == number)
            within = virtual[chosen] - number * self.num_samples
            permuted, starts = self._permute_pass(int(number))
            block_starts = starts[:: self._block_shards]
            blocks = np.searchsorted(block_starts, within, side="right") - 1
            for block in np.unique(blocks):
                rows = np.flatnonzero(blocks == block)
                first = block * self._block_shards
                last = min(first + self._block_shards, len(permuted))
                shuffled = self._shuffle_block(int(number), int(block), int(starts[last] - starts[first]))
                sample = starts[first] + shuffled[within[rows] - starts[first]]
                place = np.searchsorted(starts, sample, side="right") - 1  # of the sample's shard in this pass
                shard[chosen[rows]] = self.shards[permuted[place]]
                row[chosen[rows]] = sample - starts[place]
        return shard, row if self._kept is None else self._kept.to_rows(shard, row)

    def substitute(
        self, position: int, banned: frozenset[int], taken_down: Container[tuple[int, int]] = ()
    ) -> tuple[int, int]:
        """(shard, row) of the sample that replaces the one at `position`, which cannot be used.

        It is drawn from the same bucket, keyed by the position. It lies in no `banned` shard (by number) and is not
        among the samples (shard, row) that were taken down. UserError where no such sample is found.
        """
        draws = make_keyed_rng(self._seed, "substitute", self.bucket, position)
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        for _ in range(_ATTEMPTS):
            sample = int(draws.integers(self.num_samples))
            number = int(np.searchsorted(starts, sample, side="right")) - 1  # of the sample's shard in the bucket
            shard, row = int(self.shards[number]), sample - int(starts[number])
            if self._kept is not None:
                row = int(self._kept.rows_of(shard)[row])
            if shard not in banned and (shard, row) not in taken_down:
                return shard, row
        lost = "no shard of it can be read" if banned else "all of its images were taken down"
        raise UserError(
            f"{self._uri}, bucket {self.bucket}: {lost}: run `python -m data_pipeline verify "
            f"{self._uri}`, which names what is damaged"
        )

    def invert(self, shard: int, row: int, number: int) -> int:
        """The virtual position of a sample in pass `number`: `locate` backwards. ValueError where it is not kept."""
        if self._kept is not None:
            row = self._kept.rows_of(shard).tolist().index(row)
        permuted, starts = self._permute_pass(number)
        place = int(np.flatnonzero(self.shards[permuted] == shard)[0])
        block = place // self._block_shards
        first, last = block * self._block_shards, min((block + 1) * self._block_shards, len(permuted))
        shuffled = self._shuffle_block(number, block, int(starts[last] - starts[first]))
        within = int(np.flatnonzero(shuffled == starts[place] + row - starts[first])[0])
        return number * self.num_samples + int(starts[first]) + within

    def _permute_pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the shards in a pass, and the samples before each shard in that order, with the total last."""
        if number not in self._passes:
            permuted = make_keyed_rng(self._seed, "shards", self.bucket, number).permutation(len(self.shards))
            starts = np.concatenate([[0], np.cumsum(self.sizes[permuted])]).astype(np.int64)
            self._passes[number] = permuted, starts
            if len(self._passes) > 2:  # a batch may begin in one pass and end in the next
                self._passes.popitem(last=False)
        return self._passes[number]

    def _shuffle_block(self, number: int, block: int, size: int) -> np.ndarray:
        """A permutation of the `size` samples of a block of pass `number`."""
        key = number, block
        if key not in self._blocks:
            self._blocks[key] = make_keyed_rng(self._seed, "samples", self.bucket, number, block).permutation(size)
            if len(self._blocks) > 4:
                self._blocks.popitem(last=False)
        return self._blocks[key]


class BucketDeal:
    """The order in which the buckets' batches come: an epoch is a shuffled list of them.

    `sizes`: the samples of each bucket in an epoch. Those of a mix of datasets are exact shares, so fractions.
    """

    def __init__(self, sizes: Mapping[str, int] | Mapping[str, Fraction], *, seed: int, global_batch: int) -> None:
        self._seed, self.global_batch = seed, global_batch
        self.names: list[str] = list(sizes)
        self._sizes: list[int | Fraction] = list(sizes.values())
        self._dealt: tuple[int, np.ndarray, np.ndarray] | None = None

    def count_batches_before(self, epoch: int) -> int:
        """Global batches in all epochs before this one."""
        return sum(self._bucket_batches_before(size, epoch) for size in self._sizes)

    def _bucket_batches_before(self, size: int | Fraction, epoch: int) -> int:
        # Rounded down over all epochs at once: samples left over by one epoch are in a batch of the next.
        return epoch * size // self.global_batch

    def find_epoch(self, step: int) -> int:
        """The epoch that holds a step (the last one that starts at or before it)."""
        low, high = 0, 1
        while self.count_batches_before(high) <= step:
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.count_batches_before(middle) <= step else (low, middle)
        return low

    def find(self, step: int) -> tuple[str, int]:
        """(bucket of global batch `step`, number of this batch among all batches of that bucket)."""
        epoch = self.find_epoch(step)
        labels, ranks = self._deal(epoch)
        entry = step - self.count_batches_before(epoch)
        name = int(labels[entry])
        return self.names[name], self._bucket_batches_before(self._sizes[name], epoch) + int(ranks[entry])

    def count_before(self, step: int) -> dict[str, int]:
        """Batches of each bucket among the first `step` global batches."""
        epoch = self.find_epoch(step)
        labels, _ = self._deal(epoch)
        dealt = np.bincount(labels[: step - self.count_batches_before(epoch)], minlength=len(self.names)).tolist()
        before = [self._bucket_batches_before(size, epoch) for size in self._sizes]
        return {name: before[number] + dealt[number] for number, name in enumerate(self.names)}

    def _deal(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(bucket of each entry of the epoch, how many batches of that bucket came before it in the epoch)."""
        if self._dealt is None or self._dealt[0] != epoch:
            counts = [
                self._bucket_batches_before(size, epoch + 1) - self._bucket_batches_before(size, epoch)
                for size in self._sizes
            ]
            labels = np.repeat(np.arange(len(counts)), counts)
            if len(counts) > 1:
                labels = make_keyed_rng(self._seed, "epoch", epoch).permutation(labels)
            ranks = np.empty(len(labels), np.int64)
            for number in range(len(counts)):
                entries = np.flatnonzero(labels == number)
                ranks[entries] = np.arange(len(entries))
            self._dealt = epoch, labels, ranks
        return self._dealt[1], self._dealt[2]


class SampleOrder(BucketDeal):
    """The samples of each global batch, by its number `step` (from 0)."""

    def __init__(
        self,
        shards: Mapping[str, tuple[np.ndarray, np.ndarray]],
        *,
        seed: int,
        global_batch: int,
        block_shards: int = BLOCK_SHARDS,
        uri: str = "URI",
        kept: KeptRows | None = None,
    ) -> None:
        """`shards[bucket]` is (shard numbers, samples in each); `uri` is the dataset's, for messages. With `kept` the
        samples are numbered among the kept rows of a shard."""
        self.buckets = [
            BucketOrder(name, *shards[name], seed=seed, block_shards=block_shards, uri=uri, kept=kept)
            for name in sorted(shards)
            if shards[name][1].sum()
        ]
        if not self.buckets:
            raise UserError(f"{uri}: the split holds no samples: nothing to iterate over; name another split or data")
        super().__init__({b.bucket: b.num_samples for b in self.buckets}, seed=seed, global_batch=global_batch)

    def batch(self, step: int) -> BatchLocations:
        """The samples of global batch `step`. It takes prefix sums and two permutations; no earlier batch is made."""
        name, number = self.find(step)
        virtual = np.arange(number * self.global_batch, (number + 1) * self.global_batch)
        return BatchLocations(name, *self.bucket(name).locate(virtual))

    def bucket(self, name: str) -> BucketOrder:
        return next(bucket for bucket in self.buckets if bucket.bucket == name)

    def substitute(
        self,
        bucket: str,
        position: int,
        place: tuple[int, int],
        *,
        banned: frozenset[int],
        taken_down: Container[tuple[int, int]],
    ) -> tuple[int, int]:
        """(shard, row) of the sample that replaces the one at `place` (shard, row), at a position of a batch of
        `bucket`. See `BucketOrder.substitute`."""
        return self.bucket(bucket).substitute(position, banned, taken_down)
