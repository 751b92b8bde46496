"""Duplicates: signatures per shard (exact pixels, a perceptual hash, an embedding), then one pass over all of them.

The first of a group stays, in the order of splits and shards; validation comes first, so that its images never train.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from data_pipeline.curation.semantic import Load, Semantic
from data_pipeline.flow.stage import OK, ShardView, Worker, result
from data_pipeline.sources.images import ImageError

VERSION = 1
HASH_BITS = 64


@dataclass(frozen=True)
class SignatureStage:
    """SHA-256 of the decoded pixels and a 64-bit DCT hash (imagehash.phash) of each row that could be decoded."""

    perceptual: bool = True
    name: str = "signature"
    inputs: tuple[str, ...] = ("ingest", "measure")

    def identity(self) -> dict[str, object]:
        return {"version": VERSION, "perceptual": self.perceptual}

    def open(self) -> Worker:
        return self.run

    def run(self, shard: ShardView) -> pa.Table:
        statuses = shard.values("measure", "status")
        rows = [row for row in shard.rows if statuses[row] == OK]
        exact, perceptual = [], []
        for row in rows:
            try:
                image = shard.image(row)
            except ImageError as error:  # it was decoded to be measured: only a broken object can bring us here
                raise AssertionError(f"shard {shard.shard} row {row} was decoded before, but: {error}") from error
            exact.append(hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:32])
            perceptual.append(_phash(image) if self.perceptual else 0)
        return result(
            rows, [OK] * len(rows), exact=pa.array(exact, pa.string()), perceptual=pa.array(perceptual, pa.uint64())
        )


def _phash(image: Image.Image) -> int:
    import imagehash

    return int(str(imagehash.phash(image)), 16)


@dataclass(frozen=True)
class Dedup:
    """`distance` None leaves perceptual hashes aside, `semantic` None embeddings; equal pixels always count."""

    distance: int | None = None
    semantic: Semantic | None = None

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
        signatures: Mapping[str, pa.Table],
        *,
        load: Load | None = None,
        preferred: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, pa.Table]:
        """Each shard's status per row; `signatures` hold rows that passed the gate, in order of precedence.

        Rows that are `preferred` (they will pass the strict thresholds too) come before all others.
        """
        names = list(signatures)
        shard_N = np.repeat(np.arange(len(names), dtype=np.int32), [len(signatures[name]) for name in names])
        row_N = _joined(signatures, "row", np.int32)
        order_N = np.arange(len(row_N))
        if preferred is not None:
            given = [np.isin(signatures[name]["row"].to_numpy(), preferred[name]) for name in names]
            order_N = np.argsort(~np.concatenate([np.zeros(0, bool), *given]), kind="stable")
        first_N = _in_order(order_N, first_of_equal(_codes([signatures[name] for name in names])[order_N]))
        kind_N = np.where(first_N >= 0, "equal", "").astype("U10")
        if self.distance is not None:
            hash_N = _joined(signatures, "perceptual", np.uint64)
            near_N = _in_order(order_N, first_of_near(hash_N[order_N], self.distance))
            kind_N = np.where((first_N < 0) & (near_N >= 0), "perceptual", kind_N)
            first_N = np.where(first_N >= 0, first_N, near_N)
        if self.semantic is not None and load is not None:
            places = [(names[shard], row) for shard, row in zip(shard_N[order_N].tolist(), row_N[order_N].tolist())]
            near = self.semantic.first(places, load, skip=first_N[order_N] >= 0)
            near_N = _in_order(order_N, near)
            kind_N = np.where((first_N < 0) & (near_N >= 0), "semantic", kind_N)
            first_N = np.where(first_N >= 0, first_N, near_N)
        tables, start = {}, 0
        for name in names:
            numbers = range(start, start + len(signatures[name]))
            kept = [(int(first_N[n]), str(kind_N[n])) for n in numbers]
            reasons = ["" if n < 0 else f"{kind}: of {names[shard_N[n]]} row {row_N[n]}" for n, kind in kept]
            tables[name] = result(
                row_N[start : numbers.stop].tolist(),
                [OK if n < 0 else "duplicate" for n, _ in kept],
                reason=pa.array(reasons, pa.string()),
            )
            start = numbers.stop
        return tables


def _in_order(order_N: np.ndarray, first_N: np.ndarray) -> np.ndarray:
    """Answers for rows taken in `order_N`, as answers for the rows themselves."""
    back_N = np.empty_like(first_N)
    back_N[order_N] = np.where(first_N >= 0, order_N[first_N], -1)
    return back_N


def _joined(tables: Mapping[str, pa.Table], name: str, dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(table[name].to_numpy().astype(dtype) for table in tables.values())])


def _codes(tables: Sequence[pa.Table]) -> np.ndarray:
    """A number for each hash of pixels, the same for equal ones."""
    chunks = [chunk for table in tables for chunk in table["exact"].chunks]
    return pa.chunked_array(chunks, pa.string()).combine_chunks().dictionary_encode().indices.to_numpy()


def first_of_equal(code_N: np.ndarray) -> np.ndarray:
    """For each value (small numbers) the index of its first occurrence, -1 for the first itself."""
    number_N = np.arange(len(code_N))
    first = np.zeros(code_N.max(initial=-1) + 1, np.int64)
    first[code_N[::-1]] = number_N[::-1]  # of several writes to a place the last one stays
    return np.where(first[code_N] == number_N, -1, first[code_N])


def first_of_near(hash_N: np.ndarray, distance: int) -> np.ndarray:
    """For each hash the earliest kept one within `distance` bits, -1 where it is itself kept.

    Bands: hashes at most d bits apart agree in one of d + 1 pieces, so only rows that share a piece are compared.
    """
    edges = np.linspace(0, HASH_BITS, distance + 2).astype(int)
    tables: list[dict[int, list[int]]] = [{} for _ in range(distance + 1)]
    first_N = np.full(len(hash_N), -1, np.int64)
    for number, value in enumerate(hash_N.tolist()):
        pieces = list(_pieces(value, edges))
        near = {n for table, piece in zip(tables, pieces) for n in table.get(piece, ())}
        matches = [n for n in near if (int(hash_N[n]) ^ value).bit_count() <= distance]
        if matches:
            first_N[number] = min(matches)
            continue
        for table, piece in zip(tables, pieces):
            table.setdefault(piece, []).append(number)
    return first_N


def _pieces(value: int, edges: np.ndarray) -> Iterator[int]:
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist()):
        yield (value >> low) & ((1 << (high - low)) - 1)
