"""Duplicates: signatures per shard (exact pixels and a perceptual hash), then one pass over all of them.

The first of a group stays, in the order of splits and shards; validation comes first, so that its images never train.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from data_pipeline.images import ImageError
from data_pipeline.stage import OK, ShardView, Worker, result

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
    """`distance` None compares exact pixels only; otherwise perceptual hashes at most that many bits apart."""

    distance: int | None = None
    name: str = "dedup"
    inputs: tuple[str, ...] = ("signature", "filter")

    def identity(self) -> dict[str, object]:
        return {"version": VERSION, "distance": self.distance}

    def run(self, signatures: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
        """Each shard's status per row; `signatures` hold rows that passed the filter, in order of precedence."""
        names = list(signatures)
        shard_N = np.repeat(np.arange(len(names)), [len(signatures[name]) for name in names])
        row_N = _joined(signatures, "row", np.int64)
        exact = [value for table in signatures.values() for value in table["exact"].to_pylist()]
        first_N = first_of_equal(exact)
        if self.distance is not None:
            near_N = first_of_near(_joined(signatures, "perceptual", np.uint64), self.distance)
            first_N = np.where(first_N >= 0, first_N, near_N)
        tables, start = {}, 0
        for name in names:
            size = len(signatures[name])
            kept = [int(n) for n in first_N[start : start + size]]
            tables[name] = result(
                row_N[start : start + size].tolist(),
                [OK if n < 0 else "duplicate" for n in kept],
                reason=pa.array(["" if n < 0 else f"of {names[shard_N[n]]} row {row_N[n]}" for n in kept], pa.string()),
            )
            start += size
        return tables


def _joined(tables: Mapping[str, pa.Table], name: str, dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(table[name].to_numpy().astype(dtype) for table in tables.values())])


def first_of_equal(values: Sequence[str]) -> np.ndarray:
    """For each value the index of its first occurrence, -1 for the first itself."""
    first: dict[str, int] = {}
    return np.array([first[v] if first.setdefault(v, n) != n else -1 for n, v in enumerate(values)], np.int64)


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
