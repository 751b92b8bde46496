"""Several finished datasets as one, in shares that weights give: an order that is a pure function of (seed, step).

A weight is a share of the samples. In a bucket a dataset's share is its weight times the part of it that lies in that
bucket; a bucket's share of the batches is the sum of these. Which dataset a position of a bucket belongs to is counted,
never drawn: in every block of positions each dataset gets the floor of its share, evenly spaced, and its own order says
which sample that is. A dataset that would show an image more than `max_repeats` times leaves the mix with that batch;
the others go on in the proportion of their weights.
"""
# Shapes: G global batch, P positions, K positions of a block.

from collections import Counter, OrderedDict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import cast

import numpy as np
import torch

from data_pipeline.formats.schema import DatasetInfo, fingerprint
from data_pipeline.loading.index import SplitIndex
from data_pipeline.loading.loader import Dataset
from data_pipeline.loading.order import BLOCK_SHARDS, BatchLocations, BucketDeal, SampleOrder
from infra.errors import UserError, UserErrors

_EPOCH = 128  # global batches of which the buckets' shares are dealt at a time, in shuffled order
_LEAST_BLOCK = 64


class ShareBlocks:
    """Which dataset each position of a bucket's sequence belongs to. Exact: shares are fractions, counts integers.

    At the end of a block of K positions the count of each dataset is within 1 of its share, so no error adds up.
    """

    def __init__(self, shares: Sequence[Fraction]) -> None:
        """Shares are positive and sum to 1."""
        self._sums = [Fraction(0)]
        for share in shares:
            self._sums.append(self._sums[-1] + share)
        # counts of a block are differences of floors: with two or more of its samples expected, none is negative
        self.length = max(_LEAST_BLOCK, *(1 << int(2 / share).bit_length() for share in shares))
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def count_at(self, block: int) -> np.ndarray:
        """How many positions before a block belong to each dataset."""
        floors = [int(part * block * self.length) for part in self._sums]
        return np.diff(np.array(floors, np.int64))

    def locate(self, position_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(dataset of each position, how many positions before it belong to the same dataset)."""
        owner_P, rank_P = np.empty(len(position_P), np.int64), np.empty(len(position_P), np.int64)
        blocks = position_P // self.length
        for block in np.unique(blocks):
            in_block_P = blocks == block
            owner_K, rank_K = self._lay_out(int(block))
            within = position_P[in_block_P] - block * self.length
            owner_P[in_block_P], rank_P[in_block_P] = owner_K[within], rank_K[within]
        return owner_P, rank_P

    def count_before(self, position: int) -> np.ndarray:
        """How many positions before this one belong to each dataset."""
        block, rest = divmod(position, self.length)
        owner_K, _ = self._lay_out(block)
        return self.count_at(block) + np.bincount(owner_K[:rest], minlength=len(self._sums) - 1)

    def _lay_out(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        if block not in self._blocks:
            before = self.count_at(block)
            counts = self.count_at(block + 1) - before
            owner_K = np.repeat(np.arange(len(counts)), counts)
            number_K = np.arange(self.length) - np.repeat(np.cumsum(counts) - counts, counts)
            # the n-th of c stands at (2n + 1) / 2c of the block; ties go to the dataset named first
            place_K = (2 * number_K + 1) * (2**40 // np.maximum(counts, 1))[owner_K]
            turn = np.lexsort((owner_K, place_K))
            self._blocks[block] = owner_K[turn], (before[owner_K] + number_K)[turn]
            if len(self._blocks) > 4:
                self._blocks.popitem(last=False)
        return self._blocks[block]


@dataclass(frozen=True)
class _Phase:
    """From `start` on, the batches of the datasets that are still in the mix."""

    start: int
    """Global batches before it."""
    deal: BucketDeal
    parts: dict[str, tuple[int, ...]]
    """By bucket, the datasets that have samples there."""
    blocks: dict[str, ShareBlocks]
    taken: dict[tuple[int, str], int]
    """Samples that (dataset, bucket) gave before this phase."""


class MixedOrder:
    """Which samples make global batch number `step`, of several datasets."""

    def __init__(
        self, orders: Mapping[str, SampleOrder], weights: Mapping[str, Fraction], first_shards: Sequence[int],
        *, seed: int, global_batch: int, max_repeats: int | None = None,
    ) -> None:  # fmt: skip
        """`orders` and `weights` by dataset; dataset d's shards are numbered from `first_shards[d]` on."""
        self.global_batch, self._seed, self._max_repeats = global_batch, seed, max_repeats
        self._names, self.orders = list(orders), list(orders.values())
        self._weights = [weights[name] for name in self._names]
        self._first = np.array(first_shards, np.int64)
        self._sizes = [{b.bucket: b.num_samples for b in order.buckets} for order in self.orders]
        self._phases = [self._begin(0, list(range(len(self.orders))), {})]
        self._ends: list[int | None] = []

    def batch(self, step: int) -> BatchLocations:
        """Of one bucket, of all datasets of the mix that have samples there."""
        phase = self._find_phase(step)
        bucket, number = phase.deal.find(step - phase.start)
        position_G = np.arange(number * self.global_batch, (number + 1) * self.global_batch)
        owner_G, rank_G = phase.blocks[bucket].locate(position_G)
        shard_G, row_G = np.empty(len(position_G), np.int64), np.empty(len(position_G), np.int64)
        for local, part in enumerate(phase.parts[bucket]):
            in_part_G = owner_G == local
            virtual = rank_G[in_part_G] + phase.taken.get((part, bucket), 0)
            shard, row_G[in_part_G] = self.orders[part].bucket(bucket).locate(virtual)
            shard_G[in_part_G] = shard + self._first[part]
        return BatchLocations(bucket, shard_G, row_G)

    def substitute(
        self, bucket: str, position: int, place: tuple[int, int], *, banned: frozenset[int],
        taken_down: Container[tuple[int, int]],
    ) -> tuple[int, int]:  # fmt: skip
        """From the same dataset as the sample at `place`, so that shares stay."""
        part = int(np.searchsorted(self._first, place[0], side="right")) - 1
        first = int(self._first[part])
        own = frozenset(shard - first for shard in banned)
        refused = _Shifted(taken_down, first)
        shard, row = self.orders[part].bucket(bucket).substitute(position, own, refused)
        return shard + first, row

    def count_samples(self, step: int) -> dict[tuple[int, str], int]:
        """Samples that (dataset number, bucket) gave to the batches before `step`."""
        phase = self._find_phase(max(0, step - 1))
        return self._count(phase, step - phase.start)

    def _count(self, phase: _Phase, steps: int) -> dict[tuple[int, str], int]:
        found = dict(phase.taken)
        for bucket, batches in phase.deal.count_before(steps).items():
            counts = phase.blocks[bucket].count_before(batches * self.global_batch)
            for part, count in zip(phase.parts[bucket], counts.tolist()):
                found[part, bucket] = found.get((part, bucket), 0) + count
        return found

    def _begin(self, start: int, active: Sequence[int], taken: dict[tuple[int, str], int]) -> _Phase:
        total = {part: sum(self._sizes[part].values()) for part in active}
        weight = sum(self._weights[part] for part in active)
        shares: dict[str, dict[int, Fraction]] = {}
        for part in active:
            for bucket, size in self._sizes[part].items():
                shares.setdefault(bucket, {})[part] = self._weights[part] / weight * Fraction(size, total[part])
        sums = {bucket: sum(found.values(), Fraction(0)) for bucket, found in sorted(shares.items())}
        sizes = {bucket: share * _EPOCH * self.global_batch for bucket, share in sums.items()}
        blocks = {b: ShareBlocks([share / sums[b] for share in shares[b].values()]) for b in sums}
        deal = BucketDeal(sizes, seed=self._seed, global_batch=self.global_batch)
        return _Phase(start, deal, {b: tuple(shares[b]) for b in sums}, blocks, taken)

    def _find_phase(self, step: int) -> _Phase:
        while True:
            for number, phase in enumerate(self._phases):
                if number == len(self._ends):
                    self._ends.append(self._find_end(phase))
                end = self._ends[number]
                if end is None or step < phase.start + end:
                    return phase
            self._phases.append(self._follow(self._phases[-1], cast(int, self._ends[-1])))

    def _find_end(self, phase: _Phase) -> int | None:
        """Batches of a phase before one that would show an image too often; None where there is no limit."""
        if self._max_repeats is None:
            return None
        low, high = 0, 1
        while not self._find_exhausted(phase, high):
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._find_exhausted(phase, middle) else (middle, high)
        return low

    def _find_exhausted(self, phase: _Phase, steps: int) -> list[int]:
        """Datasets that so many batches of a phase would ask for more than they may give."""
        assert self._max_repeats is not None
        found = self._count(phase, steps).items()
        return sorted({p for (p, bucket), count in found if count > self._max_repeats * self._sizes[p][bucket]})

    def _follow(self, phase: _Phase, steps: int) -> _Phase:
        active = sorted({part for parts in phase.parts.values() for part in parts})
        left = [part for part in active if part not in self._find_exhausted(phase, steps + 1)]
        if not left:
            images = (phase.start + steps) * self.global_batch
            raise UserError(
                f"--max-repeats {self._max_repeats}: after {images:,} images every dataset of the mix "
                f"({', '.join(self._names)}) is used up: train on fewer images, raise it, or add data"
            )
        return self._begin(phase.start + steps, left, self._count(phase, steps))


class _Shifted:
    """Rows that were taken down, asked for by one dataset's own shard numbers."""

    def __init__(self, rows: Container[tuple[int, int]], first: int) -> None:
        self._rows, self._first = rows, first

    def __contains__(self, place: object) -> bool:
        shard, row = cast(tuple[int, int], place)
        return (shard + self._first, row) in self._rows


class JoinedIndex(SplitIndex):
    """The shards of several datasets, numbered one dataset after the other; names begin with the dataset's."""

    def __init__(self, parts: Mapping[str, SplitIndex]) -> None:
        self.uri, self._parts = " + ".join(f"{name}={index.uri}" for name, index in parts.items()), list(parts.values())
        self.tars = [f"{name}/{tar}" for name, index in parts.items() for tar in index.tars]
        self.rows = [f"{name}/{table}" for name, index in parts.items() for table in index.rows]
        self.buckets = [bucket for index in self._parts for bucket in index.buckets]
        self.encodings = set()  # each dataset has looked at its own
        self.num_samples_per_shard = np.concatenate([index.num_samples_per_shard for index in self._parts])
        self.starts = np.concatenate([[0], np.cumsum(self.num_samples_per_shard)]).astype(np.int64)
        self.first_shards = np.cumsum([0, *(len(index.tars) for index in self._parts[:-1])])

    @property
    def remote(self) -> bool:
        return any(index.remote for index in self._parts)

    def tar_uri(self, shard: int) -> str:
        part, own = self._find_part(shard)
        return part.tar_uri(own)

    def rows_uri(self, shard: int) -> str:
        part, own = self._find_part(shard)
        return part.rows_uri(own)

    def _find_part(self, shard: int) -> tuple[SplitIndex, int]:
        number = int(np.searchsorted(self.first_shards, shard, side="right")) - 1
        return self._parts[number], shard - int(self.first_shards[number])


class MixedDataset(Dataset):
    """Datasets under names. Everything that is not about samples is that of the dataset named first."""

    def __init__(
        self, parts: Mapping[str, Dataset], weights: Mapping[str, Fraction], *, max_repeats: int | None = None
    ) -> None:
        first = next(iter(parts.values()))
        check_alike({name: part.info for name, part in parts.items()})
        parts = dict(sorted(parts.items()))  # the order in which a command names them changes no sample
        joined = JoinedIndex({name: part.index for name, part in parts.items()})
        super().__init__(joined.uri, first.info, first.split, index=joined)
        self.datasets, self.parts, self.max_repeats = tuple(parts), dict(parts), max_repeats
        self._first_shards: list[int] = joined.first_shards.tolist()
        total = sum(weights.values())
        self.weights = {name: weights[name] / total for name in parts}
        pairs = self.list_parts()
        self.taken_down = frozenset((s + start, row) for part, start in pairs for s, row in part.taken_down)
        self.takedowns = [found for part, _ in pairs for found in part.takedowns]

    def list_parts(self) -> list[tuple[Dataset, int]]:
        return list(zip(self.parts.values(), self._first_shards))

    @property
    def fingerprint(self) -> str:
        """Names the datasets, their rows, and how they are mixed."""
        found = {name: [part.fingerprint, str(self.weights[name])] for name, part in self.parts.items()}
        return fingerprint(["mix", found, self.max_repeats])

    def order(self, *, seed: int, global_batch: int, block_shards: int = BLOCK_SHARDS) -> MixedOrder:
        """Of all datasets. Each keeps its own order: passes with shards and samples shuffled."""
        orders = {
            name: cast(SampleOrder, part.order(seed=seed, global_batch=1, block_shards=block_shards))
            for name, part in self.parts.items()
        }
        return MixedOrder(
            orders, self.weights, self._first_shards, seed=seed, global_batch=global_batch,
            max_repeats=self.max_repeats,
        )  # fmt: skip

    @cached_property
    def buckets(self) -> dict[str, int]:
        """Samples per bucket, of all datasets."""
        found: Counter[str] = Counter()
        for part in self.parts.values():
            found.update(part.buckets)
        return dict(sorted(found.items()))

    def number_datasets(self, shards: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(np.searchsorted(self._first_shards, np.asarray(shards), side="right") - 1)


def check_alike(infos: Mapping[str, DatasetInfo]) -> None:
    """UserErrors unless all datasets can be read by one model: each reason on a line."""
    names = list(infos)
    wrong = []
    for name in names[1:]:
        for field, one, other in _compare(infos[names[0]], infos[name]):
            wrong.append(f"datasets {names[0]} and {name} cannot be mixed: {field} {one} and {other}: encode one anew")
    if wrong:
        raise UserErrors(wrong)


def _compare(one: DatasetInfo, two: DatasetInfo) -> list[tuple[str, object, object]]:
    pairs: list[tuple[str, object, object]] = [
        ("resolution", one.resolution, two.resolution),
        ("captions", ", ".join(one.captions), ", ".join(two.captions)),
        ("seats in int8", ", ".join(one.int8_seats) or "none", ", ".join(two.int8_seats) or "none"),
    ]
    for field in ("channels", "factor", "shift", "scale", "checkpoint"):
        pairs.append((f"vae.{field}", getattr(one.vae, field), getattr(two.vae, field)))
    texts = [_describe_text(info) for info in (one, two)]
    pairs += [(f"text_spec.{key}", texts[0].get(key), texts[1].get(key)) for key in {**texts[0], **texts[1]}]
    stages = [
        {k: v for k, v in info.settings.items() if k == "latents" or k.startswith("text_")} for info in (one, two)
    ]
    for stage in {**stages[0], **stages[1]}:
        first, second = (settings.get(stage) or {} for settings in stages)
        pairs += [(f"{stage}.{key}", first.get(key), second.get(key)) for key in {**first, **second}]
    # where weights have hashes, the names of their files say nothing
    hashed = all(info.settings.get("latents") for info in (one, two))
    return [pair for pair in pairs if pair[1] != pair[2] and not (hashed and pair[0].endswith("checkpoint"))]


def _describe_text(info: DatasetInfo) -> dict[str, object]:
    spec = info.text_spec
    found: dict[str, object] = {k: v for k, v in vars(spec).items() if k != "encoders"}
    for encoder in spec.encoders:
        found |= {f"{encoder.seat}.{key}": value for key, value in vars(encoder).items()}
    return found
