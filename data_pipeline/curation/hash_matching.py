"""Finds duplicates among hashes: for each hash the first equal or similar one.

All hashes lie on scratch disk; memory holds a block of them at a time, so their number is not limited by memory.
"""
# Shapes: N hashes or keys, K 64-bit words of a key, P parts (by leading bits), B rows of one block, M rows of one part,
# O rows of a block without a match so far. In _KeptHashes and _find_near_kept K is the number of kept hashes.

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from infra.scratch import BLOCK, Spool, allocate, iterate_blocks

HASH_BITS = 64
_NEAR_BLOCK = 2**16  # hashes of one block of find_first_near
_PAIRS = 2**19  # pairs of hashes that are compared in one numpy call


def find_first_equal(key_NK: np.ndarray, block_rows: int = BLOCK) -> np.ndarray:
    """For each key (uint64 words) the row number of its first occurrence; -1 for the first occurrence itself.

    First the keys of each block are compared with each other. The keys that are new in their block are then sorted by
    their leading bits into parts that fit into memory, and the keys of each part are compared.
    """
    count, width = key_NK.shape
    first_N = allocate(count, np.int64, -1)
    shift = np.uint64(64 - max(1, (count // block_rows).bit_length()))
    size_P = sum(
        (_sort_into_parts(key_NK[block], shift)[1] for block in iterate_blocks(count, block_rows)),
        np.zeros(1, np.int64),
    )
    end_P = np.cumsum(size_P)
    start_P, filled_P = end_P - size_P, end_P - size_P
    dealt_NK = allocate((count, width + 1), np.uint64)  # keys and their numbers, part after part
    for block in iterate_blocks(count, block_rows):
        number_B = np.arange(block.start, block.stop)
        first_N[block] = first_B = _find_first_in_memory(key_NK[block], number_B)
        number_B = number_B[first_B < 0]
        order, many_P = _sort_into_parts(key_NK[number_B], shift)
        number_B = number_B[order]
        # the place of each: behind what its part has already, in order
        place_B = np.repeat(filled_P - np.cumsum(many_P) + many_P, many_P) + np.arange(len(order))
        dealt_NK[place_B, :width], dealt_NK[place_B, width] = key_NK[number_B], number_B
        filled_P += many_P
    for start, end in zip(start_P.tolist(), filled_P.tolist()):
        number_M = dealt_NK[start:end, width].astype(np.int64)
        first_N[number_M] = _find_first_in_memory(dealt_NK[start:end, :width], number_M)
    for block in iterate_blocks(count, block_rows):  # the first of a block may have turned out to be a later one of all
        first_B = np.array(first_N[block])
        above_B = first_N[np.maximum(first_B, 0)]
        first_N[block] = np.where((first_B >= block.start) & (above_B >= 0), above_B, first_B)
    return first_N


def _sort_into_parts(key_NK: np.ndarray, shift: np.uint64) -> tuple[np.ndarray, np.ndarray]:
    """(indices that sort the keys by part and keep their order within a part; number of keys in each part)."""
    part_N = (key_NK[:, 0] >> shift).astype(np.int64)
    return np.argsort(part_N, kind="stable"), np.bincount(part_N, minlength=2 ** (64 - int(shift)))


def _find_first_in_memory(key_NK: np.ndarray, number_N: np.ndarray) -> np.ndarray:
    """For each key the number of the first equal key, -1 for the first itself. `number_N` ascends."""
    key_NK = np.array(key_NK)
    order = np.lexsort(key_NK.T)  # stable
    sorted_NK = key_NK[order]
    new_N = np.ones(len(order), bool)
    new_N[1:] = (sorted_NK[1:] != sorted_NK[:-1]).any(1)
    leader_N = order[np.maximum.accumulate(np.where(new_N, np.arange(len(order)), 0))]
    first_N = np.empty(len(order), np.int64)
    first_N[order] = np.where(new_N, -1, number_N[leader_N])
    return first_N


def find_first_near(hash_N: np.ndarray, distance: int, block_rows: int = _NEAR_BLOCK) -> np.ndarray:
    """For each 64-bit hash the row number of the earliest kept hash within `distance` bits; -1 where it is kept itself.

    Greedy, in row order: a hash is kept if no kept hash is near. Each block is first compared with the kept hashes of
    earlier iterate_blocks; the rest of the block is then compared one hash after the other.
    """
    first_N = allocate(len(hash_N), np.int64, -1)
    # Pigeonhole principle: cut into d + 1 pieces, two hashes that differ in at most d bits agree in at least one piece.
    edges = np.linspace(0, HASH_BITS, distance + 2).astype(int).tolist()
    kept = _KeptHashes(edges)
    for block in iterate_blocks(len(hash_N), block_rows):
        hash_B, first_B = np.array(hash_N[block]), np.full(block.stop - block.start, -1, np.int64)
        for bands in kept.read_blocks():
            open_B = np.flatnonzero(first_B < 0)
            first_B[open_B] = _find_near_kept(hash_B[open_B], bands, edges, distance)
        open_B = np.flatnonzero(first_B < 0)
        first_O = _find_near_greedily(hash_B[open_B], edges, distance)
        first_B[open_B] = np.where(first_O < 0, -1, block.start + open_B[first_O])
        first_N[block] = first_B
        new_B = open_B[first_O < 0]
        kept.add(hash_B[new_B], block.start + new_B)
    return first_N


class _KeptHashes:
    """The kept hashes and their row numbers, on scratch disk. A band is one piece of all hashes (bits low to high);
    each band has its own copy, block after block, and within a block sorted by the piece."""

    def __init__(self, edges: Sequence[int]) -> None:
        self._bands = [(low, high, Spool(np.uint64), Spool(np.int64)) for low, high in pairwise(edges)]
        self._ends = [0]

    def add(self, hash_K: np.ndarray, number_K: np.ndarray) -> None:
        """Append the kept hashes of one more block."""
        for low, high, hashes, numbers in self._bands:
            order = np.argsort(_take_piece(hash_K, low, high), kind="stable")
            hashes.append(hash_K[order])
            numbers.append(number_K[order])
        self._ends.append(self._ends[-1] + len(hash_K))

    def read_blocks(self) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
        """(hashes, numbers) in each band, block by block."""
        bands = [(hashes.read_array(), numbers.read_array()) for *_, hashes, numbers in self._bands]
        for start, end in pairwise(self._ends):
            yield [(np.array(hashes[start:end]), np.array(numbers[start:end])) for hashes, numbers in bands]


def _find_near_kept(
    hash_N: np.ndarray, bands: Sequence[tuple[np.ndarray, np.ndarray]], edges: Sequence[int], distance: int
) -> np.ndarray:
    """For each hash the least row number of a kept hash within `distance` bits; -1 if there is none.

    Near hashes agree in one of d + 1 pieces (see find_first_near), so only hashes that share a piece are compared.
    """
    none = np.iinfo(np.int64).max
    near_N = np.full(len(hash_N), none)
    for (low, high), (kept_K, number_K) in zip(pairwise(edges), bands):
        piece_K, piece_N = _take_piece(kept_K, low, high), _take_piece(hash_N, low, high)
        left_N = np.searchsorted(piece_K, piece_N, "left")
        many_N = np.searchsorted(piece_K, piece_N, "right") - left_N
        behind_N = np.cumsum(many_N)
        start = 0
        while start < len(hash_N):
            done = behind_N[start - 1] if start else 0
            end = max(start + 1, int(np.searchsorted(behind_N, done + _PAIRS, "right")))
            a = np.repeat(np.arange(start, end), many_N[start:end])
            b = left_N[a] + done + np.arange(len(a)) - (behind_N - many_N)[a]
            hit = np.bitwise_count(hash_N[a] ^ kept_K[b]) <= distance
            np.minimum.at(near_N, a[hit], number_K[b[hit]])
            start = end
    return np.where(near_N == none, -1, near_N)


def _find_near_greedily(hash_N: np.ndarray, edges: Sequence[int], distance: int) -> np.ndarray:
    """As find_first_near for hashes that are all in memory; the results are indices into `hash_N`."""
    tables: list[dict[int, list[int]]] = [{} for _ in pairwise(edges)]
    first_N = np.full(len(hash_N), -1, np.int64)
    values = hash_N.tolist()
    pieces_N = zip(*(_take_piece(hash_N, *band).tolist() for band in pairwise(edges)))
    for number, (value, pieces) in enumerate(zip(values, pieces_N)):
        candidates = {n for table, piece in zip(tables, pieces) for n in table.get(piece, ())}
        matches = [n for n in candidates if (values[n] ^ value).bit_count() <= distance]
        if matches:
            first_N[number] = min(matches)
            continue
        for table, piece in zip(tables, pieces):
            table.setdefault(piece, []).append(number)
    return first_N


def _take_piece(hash_N: np.ndarray, low: int, high: int) -> np.ndarray:
    return (hash_N >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
