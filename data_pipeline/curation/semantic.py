"""Near duplicates by embedding: k-means clusters, then Algorithm 1 of the SD3 paper (App. E.2) inside each cluster.

A hit can be verified on thumbnails under small crops: an embedding may say that two pictures show the same thing, only
pixels say that they are the same picture. Memory stays bounded: clusters are worked through in groups that fit.
"""
# Shapes: N rows, D embedding width, C rows of one cluster, V crops of a thumbnail, P values of one crop.

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pyarrow as pa

from data_pipeline.curation.embed import THUMB

MAX_BYTES = 2 * 2**30  # of embeddings and thumbnails held at a time
CLUSTER_ROWS = 1000  # rows per cluster where the plan names no number (the paper's 16,000 clusters are for billions)
_SAMPLES_PER_CLUSTER = 256
_QUERIES = 512
_SCALES = (1.0, 0.975, 0.95, 0.925)
_COARSE = 3.5  # no crop of these moves the unaligned difference further than this many thresholds away

Load = Callable[[str], pa.Table]


@dataclass(frozen=True)
class Semantic:
    """Thresholds: cosine similarity, and (None: no check) the root mean square difference of aligned thumbnails."""

    similarity: float = 0.5
    verify: float | None = None
    clusters: int | None = None
    seed: int = 0

    def first(
        self, places: Sequence[tuple[str, int]], load: Load, max_bytes: int = MAX_BYTES, skip: np.ndarray | None = None
    ) -> np.ndarray:
        """For each place (shard, row), in order of precedence, the number of the one that stands for it; -1 if itself.

        `load(shard)` gives the embedding column's table; rows where `skip` is true take no part.
        """
        taking = np.ones(len(places), bool) if skip is None else ~skip
        by_shard: dict[str, list[int]] = {}
        for number in np.flatnonzero(taking).tolist():
            by_shard.setdefault(places[number][0], []).append(number)
        first_N = np.full(len(places), -1, np.int64)
        if not by_shard:
            return first_N
        rows = {shard: np.array([places[n][1] for n in numbers]) for shard, numbers in by_shard.items()}
        cluster_N, width = self._assign(len(places), by_shard, rows, load)
        for group in _groups(cluster_N[taking], width * 2 + THUMB * THUMB * 3, max_bytes):
            for numbers, vectors_CD, thumbs in _members(group, cluster_N, by_shard, rows, load):
                first_N[numbers] = self._walk(numbers, vectors_CD, thumbs)
        return first_N

    def _assign(
        self, count: int, by_shard: dict[str, list[int]], rows: dict[str, np.ndarray], load: Load
    ) -> tuple[np.ndarray, int]:
        """(cluster of each row, width): centroids from a sample, then one shard after the other."""
        import faiss

        faiss.omp_set_num_threads(1)
        total = sum(map(len, by_shard.values()))
        clusters = self.clusters or max(1, total // CLUSTER_ROWS)
        step = max(1, total // (_SAMPLES_PER_CLUSTER * clusters))
        sample = np.concatenate([_vectors(load(shard), rows[shard][::step]) for shard in by_shard])
        clusters = min(clusters, len(sample))
        kmeans = faiss.Kmeans(
            sample.shape[1], clusters, niter=20, seed=self.seed, spherical=True, min_points_per_centroid=1,
            max_points_per_centroid=_SAMPLES_PER_CLUSTER,
        )  # fmt: skip
        kmeans.train(sample)
        cluster_N = np.full(count, -1, np.int32)
        for shard, numbers in by_shard.items():
            cluster_N[numbers] = kmeans.index.search(_vectors(load(shard), rows[shard]), 1)[1][:, 0]
        return cluster_N, sample.shape[1]

    def _walk(self, numbers: np.ndarray, vectors_CD: np.ndarray, thumbs: list[bytes]) -> np.ndarray:
        """Algorithm 1: walk the rows, pass over flagged ones, flag every later hit of the range search."""
        import faiss

        index = faiss.IndexFlatIP(vectors_CD.shape[1])
        index.add(vectors_CD)
        first_C = np.full(len(numbers), -1, np.int64)
        same = _Same(thumbs, self.verify)
        for start in range(0, len(numbers), _QUERIES):
            limits, _, hits = index.range_search(vectors_CD[start : start + _QUERIES], self.similarity)
            for offset, (low, high) in enumerate(pairwise(limits)):
                query = start + offset
                if first_C[query] >= 0:
                    continue
                for hit in np.sort(hits[int(low) : int(high)]).tolist():
                    if hit > query and first_C[hit] < 0 and same(query, hit):
                        first_C[hit] = numbers[query]
        return first_C


class _Same:
    """Are two pictures the same but for a crop? True for all where nothing is to be verified."""

    def __init__(self, thumbs: Sequence[bytes], verify: float | None) -> None:
        self._verify = verify
        self._whole_CP = np.stack([np.frombuffer(thumb, np.uint8) for thumb in thumbs])
        self._crops = lru_cache(maxsize=2048)(lambda at: thumb_crops(thumbs[at]))

    def __call__(self, a: int, b: int) -> bool:
        if self._verify is None:
            return True
        whole_P = self._whole_CP[a].astype(np.float32) - self._whole_CP[b]
        if float(np.sqrt(np.mean(whole_P**2))) > _COARSE * self._verify:
            return False
        return aligned_difference(self._crops(a), self._crops(b)) <= self._verify


def _groups(cluster_N: np.ndarray, row_bytes: int, max_bytes: int) -> Iterator[np.ndarray]:
    """Clusters in groups whose rows fit into memory (one cluster at least)."""
    sizes = np.bincount(cluster_N)
    group: list[int] = []
    held = 0
    for cluster, size in enumerate(sizes.tolist()):
        if group and held + size * row_bytes > max_bytes:
            yield np.array(group)
            group, held = [], 0
        group.append(cluster)
        held += size * row_bytes
    yield np.array(group)


def _members(
    group: np.ndarray, cluster_N: np.ndarray, by_shard: dict[str, list[int]], rows: dict[str, np.ndarray], load: Load
) -> Iterator[tuple[np.ndarray, np.ndarray, list[bytes]]]:
    """(numbers in order, vectors, thumbnails) of each cluster of a group."""
    numbers: list[int] = []
    vectors, thumbs = [], []
    for shard, mine in by_shard.items():
        chosen = np.isin(cluster_N[mine], group)
        if not chosen.any():
            continue
        table = load(shard)
        vectors.append(_vectors(table, rows[shard][chosen]))
        thumbs += _cells(table, "thumb", rows[shard][chosen])
        numbers += np.array(mine)[chosen].tolist()
    joined, all_numbers = np.concatenate(vectors), np.array(numbers)
    for cluster in group.tolist():
        at = np.flatnonzero(cluster_N[all_numbers] == cluster)
        at = at[np.argsort(all_numbers[at])]
        if len(at):
            yield all_numbers[at], joined[at], [thumbs[n] for n in at.tolist()]


def _cells(table: pa.Table, column: str, rows: np.ndarray) -> list[bytes]:
    at = {row: n for n, row in enumerate(table["row"].to_pylist())}
    return table[column].take(pa.array([at[row] for row in rows.tolist()], pa.int64())).to_pylist()


def _vectors(table: pa.Table, rows: np.ndarray) -> np.ndarray:
    return np.stack([np.frombuffer(cell, np.float16) for cell in _cells(table, "embedding", rows)]).astype(np.float32)


def thumb_crops(thumb: bytes) -> np.ndarray:
    """A thumbnail and its crops by up to 7.5 %, each back at full size: (V, P) float32; the whole comes first."""
    from PIL import Image

    image = Image.frombytes("RGB", (THUMB, THUMB), thumb)
    crops = []
    for scale in _SCALES:
        slack = THUMB * (1 - scale)
        for x in (slack * part / 4 for part in range(5 if slack else 1)):
            for y in (slack * part / 4 for part in range(5 if slack else 1)):
                box = (x, y, x + THUMB * scale, y + THUMB * scale)
                crops.append(np.asarray(image.resize((THUMB, THUMB), Image.Resampling.BICUBIC, box=box)).ravel())
    return np.stack(crops).astype(np.float32)


def aligned_difference(a_VP: np.ndarray, b_VP: np.ndarray) -> float:
    """Least root mean square difference (0 to 255) between one thumbnail and the crops of the other, either way."""
    pairs = (((a_VP - b_VP[0]) ** 2).mean(1).min(), ((b_VP - a_VP[0]) ** 2).mean(1).min())
    return float(np.sqrt(min(pairs)))
