"""From shards to batches: `open_dataset(uri).batches(...)` for training, `.read(indices)` for validation.

Every rank computes the same plan and reads its own lane of it; a background thread keeps batches ready.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from torch import Tensor

from data_pipeline.formats.schema import DatasetInfo, read_dataset_info
from data_pipeline.loading.batch import LatentBatch
from data_pipeline.loading.collate import Collator, DrawSettings, Posterior
from data_pipeline.loading.index import SplitIndex
from data_pipeline.loading.kept import KeptRows
from data_pipeline.loading.order import BLOCK_SHARDS, BatchLocations, DataExceptions, SampleOrder
from data_pipeline.loading.reader import SampleReader, ShardError
from data_pipeline.loading.taken_down import find_taken_down, list_takedowns
from infra.ahead import ReadAhead
from infra.errors import UserError, nearest
from infra.log import get_logger
from model.encoders.text import TextSpec
from model.encoders.vae import Latents
from model.seeding import QuickNormal

log = get_logger("loader")

ENCODER_DROPOUT = 0.464  # each encoder on its own, so about 10 % of samples are fully unconditional (SD3, App. B.3)
MAX_QUARANTINED = 0.05  # of the shards of a split; more than one, and more than this, end the run
ReadRejected = Callable[[LatentBatch, DrawSettings], Tensor]  # loading/pairs.py, for preference pairs


class BatchOrder(Protocol):
    """Which samples make each global batch: a pure function of seed and step."""

    global_batch: int

    def batch(self, step: int) -> BatchLocations: ...

    def substitute(
        self, bucket: str, position: int, place: tuple[int, int], *, banned: frozenset[int],
        taken_down: Container[tuple[int, int]],
    ) -> tuple[int, int]: ...  # fmt: skip


def open_dataset(uri: str, *, split: str = "train") -> Dataset:
    """A finished dataset's split; UserError when it is not there or mixes encodings."""
    info = read_dataset_info(uri)
    if split not in info.splits:
        raise UserError(f"{uri}: no split {split!r}, it has {', '.join(info.splits)}{nearest(split, info.splits)}")
    if info.couplings is not None:
        from data_pipeline.loading.couplings import CoupledDataset

        return CoupledDataset(uri, info, split)
    return Dataset(uri, info, split)


class Dataset:
    """One split of a dataset. Samples are numbered bucket by bucket."""

    datasets: tuple[str, ...] = ()
    """Of a mix: the names of its datasets."""

    def __init__(self, uri: str, info: DatasetInfo, split: str, *, index: SplitIndex | None = None) -> None:
        """`index`: of other shards than those of the split at `uri`: a mix's."""
        self.uri, self.info, self.split = uri, info, split
        self.index = index or SplitIndex(uri, info.splits[split].index)
        self.kept: KeptRows | None = None
        self._kept_fingerprint = ""
        self.takedowns = [] if index else list_takedowns(uri)
        self.taken_down = find_taken_down(self.takedowns, self.index)
        foreign = self.index.encodings - {info.encoding}
        if foreign:
            raise UserError(
                f"{uri}: shards of split {split!r} come from encoding {', '.join(sorted(foreign))}, the dataset is "
                f"{info.encoding}: rebuild the columns latents and text, then pack again"
            )
        self._reader = SampleReader(self.index)
        self._collator = Collator(info.text_spec, info.vae, info.captions, info.int8_seats)

    def list_parts(self) -> list[tuple[Dataset, int]]:
        """The datasets of a mix, here one, each with the number of its first shard."""
        return [(self, 0)]

    def keep(self, kept: KeptRows, fingerprint: str) -> Dataset:
        """The same split, of which only some rows are trained on; `fingerprint` names dataset and rows."""
        chosen = copy.copy(self)
        chosen.kept, chosen._kept_fingerprint = kept, fingerprint
        vars(chosen).pop("buckets", None)
        return chosen

    @property
    def fingerprint(self) -> str:
        """Names the content that is trained on: part of a recipe's hash."""
        return self._kept_fingerprint or self.info.fingerprint

    @property
    def text_spec(self) -> TextSpec:
        return self.info.text_spec

    @property
    def vae(self) -> Latents:
        return self.info.vae

    @property
    def resolution(self) -> int:
        return self.info.resolution

    @property
    def num_samples(self) -> int:
        return self.index.num_samples

    def cut_batches(self, samples: int, *, size: int) -> list[range]:
        """Sample numbers of batches for `read`: the first samples, evenly from the buckets, never two in one batch."""
        batches: list[range] = []
        wanted = min(samples, self.num_samples)
        for numbers in self.bucket_ranges.values():
            share = numbers[: math.ceil(wanted * len(numbers) / self.num_samples)]
            batches += [share[i : i + size] for i in range(0, len(share), size)]
        return batches

    @cached_property
    def buckets(self) -> dict[str, int]:
        """Samples per bucket, of the rows that are kept; a bucket's name is its pixels, height x width."""
        if self.kept is None:
            return {name: len(samples) for name, samples in self.bucket_ranges.items()}
        counts = {name: int(self.kept.counts[self.index.shards_of(name)].sum()) for name in self.bucket_ranges}
        return {name: count for name, count in counts.items() if count}

    @cached_property
    def bucket_ranges(self) -> dict[str, range]:
        """Sample numbers per bucket, for `read`."""
        return self.index.bucket_ranges()

    def __len__(self) -> int:
        return self.num_samples

    def latent_shape(self, bucket: str) -> tuple[int, int, int]:
        """(channels, height, width) of a bucket's latents."""
        if bucket not in self.buckets:
            raise UserError(f"{self.uri}: no bucket {bucket!r}, it has {', '.join(self.buckets)}")
        height, width = map(int, bucket.split("x"))
        return self.vae.channels, height // self.vae.factor, width // self.vae.factor

    def batches(
        self,
        *,
        seed: int,
        start: int = 0,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        caption_weights: Mapping[str, float] | None = None,
        encoder_dropout: float = ENCODER_DROPOUT,
        exceptions: DataExceptions = DataExceptions(),  # noqa: B008 - frozen
        micro_batch: int | None = None,
        prefetch: int = 2,
        block_shards: int = BLOCK_SHARDS,
        read_rejected: ReadRejected | None = None,
        dealt: bool = False,
    ) -> Batches:
        """Endless batches from sample position `start` on: this rank's lane of each global batch.

        `micro_batch` cuts each lane into pieces of that many samples; draws do not depend on it. `read_rejected`
        finds the other pictures of preference pairs. A lane is a run of neighbouring positions; with `dealt` it is
        every `world_size`-th one.
        """
        lane, rest = divmod(global_batch, world_size)
        if global_batch < 1 or rest:
            raise UserError(f"global_batch={global_batch} cannot be shared by {world_size} ranks: make it a multiple")
        if start < 0 or start % global_batch:
            raise UserError(f"start={start} is no multiple of global_batch={global_batch}: resume with the same batch")
        if micro_batch is not None and (micro_batch < 1 or lane % micro_batch):
            raise UserError(f"micro_batch={micro_batch} does not divide the {lane} samples of a rank's lane")
        weights = dict(caption_weights or self._default_weights())
        draws = DrawSettings(seed, weights, encoder_dropout, normal=QuickNormal)
        draws.check(self.info.captions)
        order = self.order(seed=seed, global_batch=global_batch, block_shards=block_shards)
        return Batches(
            self, order, draws, start=start,
            lane=slice(rank, None, world_size) if dealt else slice(rank * lane, (rank + 1) * lane),
            micro_batch=micro_batch or lane, exceptions=exceptions, prefetch=prefetch, read_rejected=read_rejected,
        )  # fmt: skip

    def order(self, *, seed: int, global_batch: int, block_shards: int = BLOCK_SHARDS) -> BatchOrder:
        """The plan of every global batch, for those who only want to look."""
        sizes = self.index.num_samples_per_shard if self.kept is None else self.kept.counts
        shards = {name: self.index.shards_of(name) for name in self.bucket_ranges}
        if self.kept is not None:
            shards = {name: numbers[sizes[numbers] > 0] for name, numbers in shards.items()}
        return SampleOrder(
            {name: (numbers, sizes[numbers]) for name, numbers in shards.items()},
            seed=seed, global_batch=global_batch, block_shards=block_shards, uri=self.uri, kept=self.kept,
        )  # fmt: skip

    def number_datasets(self, shards: Sequence[int]) -> Tensor | None:
        """Of a mix: the number of the dataset that each of these shards is of."""
        return None

    def read(
        self,
        indices: Sequence[int] | range,
        *,
        seed: int = 0,
        caption: str = "original",
        encoder_dropout: float = 0.0,
        posterior: Posterior = "sample",
    ) -> LatentBatch:
        """Samples by number, nothing dropped; draws are keyed by the number. All must lie in one bucket."""
        numbers = np.asarray(indices, np.int64)
        if len(numbers) == 0 or numbers.min() < 0 or numbers.max() >= self.num_samples:
            raise UserError(
                f"sample numbers {list(indices)[:4]}...: expected some between 0 and {self.num_samples - 1}"
            )
        names = {name for name, samples in self.bucket_ranges.items() if any(int(n) in samples for n in numbers)}
        if len(names) > 1:
            raise UserError(f"samples of buckets {', '.join(sorted(names))} in one batch: read them bucket by bucket")
        draws = DrawSettings(seed, {caption: 1.0}, encoder_dropout, posterior)
        draws.check(self.info.captions)
        shards, rows = self.index.locate(numbers)
        return self.at(list(zip(shards.tolist(), rows.tolist())), numbers.tolist(), draws)

    def at(self, places: Sequence[tuple[int, int]], positions: Sequence[int], draws: DrawSettings) -> LatentBatch:
        """Samples by (shard, row) of one bucket, drawn as if they stood at `positions`."""
        try:
            return self._load(np.asarray(positions, np.int64), places, self.index.buckets[places[0][0]], draws)
        except ShardError as error:
            raise UserError(f"{error.reason}; run `python -m data_pipeline verify {self.uri}`") from error

    def list_captions(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, str]]:
        """The captions that each of these samples has, by name."""
        shards, rows = self.index.locate(np.asarray(indices, np.int64))
        tables = [self._reader.table(shard) for shard in shards.tolist()]
        return [
            {name: texts[row] for name, texts in table.captions.items() if texts[row]}
            for table, row in zip(tables, rows.tolist())
        ]

    def choose_captions(
        self, places: Sequence[tuple[int, int]], positions: np.ndarray, draws: DrawSettings
    ) -> list[str]:
        """The captions that samples by (shard, row) would take at `positions`, by name."""
        tokens_BS = np.stack([self._reader.table(shard).tokens_RS[row] for shard, row in places])
        chosen_B = self._collator.choose_captions(positions, tokens_BS, draws)
        return [self.info.captions[number] for number in chosen_B]

    def _default_weights(self) -> dict[str, float]:
        return share_captions(self.info.captions, original=0.5)

    def _load(
        self, positions: np.ndarray, places: Sequence[tuple[int, int]], bucket: str, draws: DrawSettings
    ) -> LatentBatch:
        reader, shards = self._reader, sorted({shard for shard, _ in places})
        reader.spread(len(shards), lambda part: [reader.table(shards[n]) for n in part])  # at once, where they are far
        rows = [(reader.table(shard), row) for shard, row in places]
        return self._collator.collate(
            positions, rows, lambda b, elsewhere: reader.read(*places[b], elsewhere), reader.spread,
            latent_shape=self.latent_shape(bucket), draws=draws,
        )  # fmt: skip


def share_captions(names: Sequence[str], *, original: float) -> dict[str, float]:
    """How often each caption is taken: a share for the original, the rest dealt equally to the synthetic ones."""
    synthetic = [name for name in names if name != "original"]
    wanted = {name: original if name == "original" else (1 - original) / len(synthetic) for name in names}
    return {name: weight for name, weight in wanted.items() if weight > 0}


@dataclass(frozen=True)
class Exclusions:
    """What batches leave out at some time: shards by number, positions, and samples (shard, row) taken down."""

    banned: frozenset[int]
    positions: frozenset[int]
    taken_down: Container[tuple[int, int]]

    def find_stand_ins(
        self, order: BatchOrder, bucket: str, positions: Sequence[int], places: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, tuple[int, int]]]:
        """(number in `places`, the sample that takes its place) for each that is left out."""
        if not self.banned and not self.positions and not self.taken_down:
            return
        for at, (position, place) in enumerate(zip(positions, places)):
            if place[0] in self.banned or position in self.positions or place in self.taken_down:
                yield at, order.substitute(bucket, position, place, banned=self.banned, taken_down=self.taken_down)


class Batches(Iterator[LatentBatch]):
    """The iterator behind `Dataset.batches`; a checkpoint keeps `.exceptions`, what was quarantined so far."""

    def __init__(
        self,
        dataset: Dataset,
        order: BatchOrder,
        draws: DrawSettings,
        *,
        start: int,
        lane: slice,
        micro_batch: int,
        exceptions: DataExceptions,
        prefetch: int,
        read_rejected: ReadRejected | None = None,
    ) -> None:
        self._dataset, self._order, self._draws = dataset, order, draws
        self._lane, self._micro_batch, self._read_rejected = lane, micro_batch, read_rejected
        self._numbers = {name: number for number, name in enumerate(dataset.index.tars)}
        self.exceptions = exceptions
        self._banned = frozenset(self._numbers[name] for name in exceptions.shards if name in self._numbers)
        self._ready: deque[LatentBatch] = deque()
        # One thread: batches are made in order, so what is quarantined at a step never depends on timing.
        steps = itertools.count(start // order.global_batch)
        self._lanes = ReadAhead(self._load_lane, steps, ahead=max(1, prefetch), name="batches")

    def __next__(self) -> LatentBatch:
        if self._lanes.closed:
            raise StopIteration
        if not self._ready:
            self._ready.extend(_split_lane(next(self._lanes), self._micro_batch))
        return self._ready.popleft()

    def close(self) -> None:
        """Stop reading ahead and give no more."""
        self._lanes.close()

    def _load_lane(self, step: int) -> LatentBatch:
        plan = self._order.batch(step)
        positions = np.arange(step * self._order.global_batch, (step + 1) * self._order.global_batch)[self._lane]
        while True:
            places = self._find_places(plan, positions)
            try:
                batch = self._dataset._load(positions, places, plan.bucket, self._draws)
            except ShardError as error:
                self._quarantine(error, step * self._order.global_batch)
                continue
            if self._dataset.datasets:
                batch = batch._replace(dataset_B=self._dataset.number_datasets([shard for shard, _ in places]))
            if self._read_rejected is None:
                return batch
            return batch._replace(rejected_BCHW=self._read_rejected(batch, self._draws))

    def _find_places(self, plan: BatchLocations, positions: np.ndarray) -> list[tuple[int, int]]:
        places = list(zip(plan.shard_G[self._lane].tolist(), plan.row_G[self._lane].tolist()))
        left_out = Exclusions(self._banned, self.exceptions.positions, self._dataset.taken_down)
        for at, place in left_out.find_stand_ins(self._order, plan.bucket, positions.tolist(), places):
            places[at] = place
        return places

    def _quarantine(self, error: ShardError, position: int) -> None:
        name = self._dataset.index.tars[error.shard]
        log.error("shard %s quarantined, other samples of its bucket stand in: %s", name, error.reason)
        self._banned |= {error.shard}
        self.exceptions |= DataExceptions(frozenset({name}), since={name: position})
        total = len(self._numbers)
        if len(self._banned) > max(1, int(MAX_QUARANTINED * total)):
            raise UserError(
                f"{len(self._banned)} of {total} shards of {self._dataset.uri} cannot be read (last: {error.reason}); "
                f"run `python -m data_pipeline verify {self._dataset.uri}`"
            )


def _split_lane(batch: LatentBatch, size: int) -> Iterator[LatentBatch]:
    if size >= len(batch.keys):
        yield batch
        return
    for start in range(0, len(batch.keys), size):
        part = slice(start, start + size)
        yield LatentBatch(
            batch.latent_BCHW[part], batch.text[part], batch.positions[part],  # type: ignore[arg-type]
            batch.keys[part], batch.captions[part], None if batch.rejected_BCHW is None else batch.rejected_BCHW[part],
            None if batch.dataset_B is None else batch.dataset_B[part],  # type: ignore[arg-type]
            None if batch.noise_BCHW is None else batch.noise_BCHW[part],
        )  # fmt: skip
