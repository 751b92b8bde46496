"""Duplicates: signatures per shard (exact pixels, a perceptual hash, an embedding), then one pass over all of them.

The first of a group stays, in the order of splits and shards; validation comes first, so that its images never train.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from data_pipeline.curation.hash_matching import find_first_equal, find_first_near
from data_pipeline.curation.semantic import Load, SemanticDedup
from data_pipeline.images import ImageError
from data_pipeline.stages.stage import OK, ShardView, StageFunction, stage_table
from infra.scratch import Spool, allocate, concatenate, gather, iterate_blocks

VERSION = 1
KINDS = ("equal", "perceptual", "semantic")


@dataclass(frozen=True)
class SignatureStage:
    """SHA-256 of the decoded pixels and a 64-bit DCT hash (imagehash.phash) of each row that could be decoded."""

    perceptual: bool = True
    name: str = "signature"
    inputs: tuple[str, ...] = ("ingest", "measure")

    def identity(self) -> dict[str, object]:
        return {"version": VERSION, "perceptual": self.perceptual}

    def open(self) -> StageFunction:
        return self.run

    def run(self, shard: ShardView) -> pa.Table:
        rows = shard.decodable()
        exact, perceptual = [], []
        for row in rows:
            try:
                image = shard.image(row)
            except ImageError as error:  # it was decoded to be measured: only a broken object can bring us here
                raise AssertionError(f"shard {shard.shard} row {row} was decoded before, but: {error}") from error
            # the size too: pictures of 2 x 8 and 4 x 4 equal pixels have equal bytes
            exact.append(hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:32])
            perceptual.append(_hash_perceptually(image) if self.perceptual else 0)
        return stage_table(
            rows, [OK] * len(rows), exact=pa.array(exact, pa.string()), perceptual=pa.array(perceptual, pa.uint64())
        )


def _hash_perceptually(image: Image.Image) -> int:
    import imagehash

    return int(str(imagehash.phash(image)), 16)


@dataclass(frozen=True)
class Dedup:
    """`distance` None leaves perceptual hashes aside, `semantic` None embeddings; equal pixels always count."""

    distance: int | None = None
    semantic: SemanticDedup | None = None

    @property
    def name(self) -> str:
        return "dedup"

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("signature", "filter", *(("embed",) if self.semantic else ()))

    def identity(self) -> dict[str, object]:
        found: dict[str, object] = {"version": VERSION, "distance": self.distance}
        return found | ({"semantic": asdict(self.semantic)} if self.semantic else {})

    def run(
        self,
        signatures: Iterable[tuple[str, pa.Table]],
        *,
        load: Load | None = None,
        preferred: Callable[[str], np.ndarray] | None = None,
    ) -> "Duplicates":
        """`signatures` are shards with the rows that passed the gate, in order of precedence; they are read once.

        Rows that are `preferred` (they will pass the strict thresholds too) come before all others.
        """
        groups = Duplicates(signatures, preferred)
        groups.merge("equal", find_first_equal(gather(groups.exact_NK, groups.number_R)))
        if self.distance is not None:
            groups.merge("perceptual", find_first_near(gather(groups.hash_N, groups.number_R), self.distance))
        if self.semantic is not None and load is not None:
            groups.merge("semantic", self.semantic.find_firsts(groups, len(groups), load))
        return groups


class Duplicates:
    """For each row the row that it is a duplicate of, on scratch disk. A row's number is its place in the order of
    reading; its rank is its place in the order of precedence (of equal rows the one with the lowest rank is kept)."""

    def __init__(
        self, signatures: Iterable[tuple[str, pa.Table]], preferred: Callable[[str], np.ndarray] | None
    ) -> None:
        names, name_ends, ends = Spool(np.uint8), Spool(np.int64), Spool(np.int64)
        row, exact, perceptual = Spool(np.int32), Spool(np.uint64, 2), Spool(np.uint64)
        preferred_numbers, other_numbers = Spool(np.int64), Spool(np.int64)
        count = letters = 0
        for name, table in signatures:
            rows = table["row"].to_numpy()
            row.append(rows)
            exact.append(_hash_digests(table["exact"].to_pylist()))
            perceptual.append(table["perceptual"].to_numpy())
            first = np.ones(len(rows), bool) if preferred is None else np.isin(rows, preferred(name))
            preferred_numbers.append(count + np.flatnonzero(first))
            other_numbers.append(count + np.flatnonzero(~first))
            count, letters = count + len(rows), letters + len(name.encode())
            names.append(np.frombuffer(name.encode(), np.uint8))
            name_ends.append(letters)
            ends.append(count)
        self.row_N, self.exact_NK, self.hash_N = row.read_array(), exact.read_array(), perceptual.read_array()
        self._names, self._name_ends, self._ends = names.read_array(), name_ends.read_array(), ends.read_array()
        self._preferred = len(preferred_numbers.read_array())
        self.number_R = concatenate([preferred_numbers.read_array(), other_numbers.read_array()])
        self._rank_N = allocate(count, np.int64)
        for block in iterate_blocks(count):
            self._rank_N[self.number_R[block]] = np.arange(block.start, block.stop)
        self.first_R, self._kind_R = allocate(count, np.int64, -1), allocate(count, np.uint8)

    def __len__(self) -> int:
        return len(self.row_N)

    @property
    def num_shards(self) -> int:
        """Shards that came, those without rows too."""
        return len(self._ends)

    def merge(self, kind: str, first_R: np.ndarray) -> None:
        """Add the duplicates that a pass found, for rows that are kept so far. `first_R`: for each rank the rank of the
        row that it duplicates, or -1."""
        for block in iterate_blocks(len(self)):
            new_B = (self.first_R[block] < 0) & (first_R[block] >= 0)
            self.first_R[block] = np.where(new_B, first_R[block], self.first_R[block])
            self._kind_R[block] = np.where(new_B, KINDS.index(kind), self._kind_R[block])

    def __iter__(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(shard, rows, their ranks) of rows that no pass has set aside; shards with the first ranks come first."""
        for preferred in (True, False):
            for shard in range(self.num_shards):
                rank_S = np.sort(self._rank_N[self._get_range(shard)])
                rank_S = rank_S[self.first_R[rank_S] < 0]
                if len(rank_S) and (rank_S[0] < self._preferred) == preferred:
                    yield self._get_name(shard), self.row_N[self.number_R[rank_S]], rank_S

    def compute_digest(self) -> str:
        """Sixteen hex digits that name the answer."""
        found = hashlib.sha256()
        for block in iterate_blocks(len(self)):
            found.update(self.first_R[block].tobytes() + self._kind_R[block].tobytes())
        return found.hexdigest()[:16]

    def iterate_tables(self) -> Iterator[tuple[str, pa.Table]]:
        """Each shard with the status of its rows, in the order in which they came."""
        for shard in range(self.num_shards):
            rank_S = self._rank_N[self._get_range(shard)]
            first_S, kind_S = self.first_R[rank_S], self._kind_R[rank_S]
            origin_S = self.number_R[np.maximum(first_S, 0)]
            shard_S, row_S = np.searchsorted(self._ends, origin_S, side="right"), self.row_N[origin_S]
            origins = zip(first_S.tolist(), kind_S.tolist(), shard_S.tolist(), row_S.tolist())
            reasons = [
                "" if first < 0 else f"{KINDS[kind]}: of {self._get_name(shard_number)} row {row}"
                for first, kind, shard_number, row in origins
            ]
            yield (
                self._get_name(shard),
                stage_table(
                    self.row_N[self._get_range(shard)].tolist(),
                    np.where(first_S < 0, OK, "duplicate").tolist(),
                    reason=pa.array(reasons, pa.string()),
                ),
            )

    def _get_range(self, shard: int) -> slice:
        return slice(int(self._ends[shard - 1]) if shard else 0, int(self._ends[shard]))

    def _get_name(self, shard: int) -> str:
        letters = slice(int(self._name_ends[shard - 1]) if shard else 0, int(self._name_ends[shard]))
        return self._names[letters].tobytes().decode()


def _hash_digests(digests: Sequence[str]) -> np.ndarray:
    """(N, 2) words, equal for equal digests only."""
    digest_bytes = b"".join(hashlib.blake2b(digest.encode(), digest_size=16).digest() for digest in digests)
    return np.frombuffer(digest_bytes, np.uint64).reshape(-1, 2)
