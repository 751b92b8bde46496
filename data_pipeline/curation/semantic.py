"""Near duplicates by embedding: k-means clusters, then Algorithm 1 of the SD3 paper (App. E.2) inside each cluster.

A hit can be verified on thumbnails under small crops: an embedding may say that two pictures show the same thing, only
pixels say that they are the same picture. Memory stays bounded: clusters are worked through in groups that fit.
"""
# Shapes: N rows, D embedding width, C rows of one cluster, V crops of a thumbnail, P values of one crop.

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise

import numpy as np
import pyarrow as pa

from data_pipeline.curation.embed import THUMB
from infra.scratch import Spool, allocate

MAX_BYTES = 2**30  # of embeddings and thumbnails held at a time
MAX_SAMPLE_BYTES = 2**29  # of embeddings that the centroids are made from
MAX_CLUSTERS = 16_000  # the paper's, for billions of rows, where the plan names no number
THUMB_BYTES = THUMB * THUMB * 3
CLUSTER_ROWS = 1000  # rows per cluster where the plan names no number
_SAMPLES_PER_CLUSTER = 256  # that k-means trains on, as many as faiss takes by default
_QUERIES = 512  # rows of one range search
_SCALES = (1.0, 0.975, 0.95, 0.925)  # of the crops that a thumbnail is compared under
_COARSE = 3.5  # no crop of these moves the unaligned difference further than this many thresholds away

Load = Callable[[str], pa.Table]
Places = Iterable[tuple[str, np.ndarray, np.ndarray]]  # shard, rows, numbers


@dataclass(frozen=True)
class SemanticDedup:
    """Thresholds: cosine similarity, and (None: no check) the root mean square difference of aligned thumbnails."""

    similarity: float = 0.5
    verify: float | None = None
    clusters: int | None = None
    seed: int = 0

    def find_firsts(self, places: Places, count: int, load: Load, max_bytes: int = MAX_BYTES) -> np.ndarray:
        """For each of `count` rows the number of the row that it is a duplicate of; -1 if it is kept or takes no part.

        `places` (shard, rows, their numbers) may be walked several times; numbers ascend in order of precedence, within
        a shard too. `load(shard)` gives the embedding column's table.
        """
        first_N = allocate(count, np.int64, -1)
        found = self._assign(count, places, load)
        if found is None:
            return first_N
        cluster_N, size_K, width = found
        for group in _group_clusters(size_K, width * 2 + THUMB_BYTES, max_bytes):
            for number_C, vectors_CD, thumbs_CP in _read_members(group, size_K, width, cluster_N, places, load):
                first_N[number_C] = self._walk(number_C, vectors_CD, thumbs_CP)
        return first_N

    def _assign(self, count: int, places: Places, load: Load) -> tuple[np.ndarray, np.ndarray, int] | None:
        """(cluster of each number, rows of each cluster, width): centroids from a sample, then shard after shard.

        None where no row takes part.
        """
        import faiss

        faiss.omp_set_num_threads(1)
        total = sum(len(numbers) for _, _, numbers in places)
        if not total:
            return None
        clusters = self.clusters or min(MAX_CLUSTERS, max(1, total // CLUSTER_ROWS))
        step = max(1, total // (_SAMPLES_PER_CLUSTER * clusters))
        shard, rows, _ = next(iter(places))
        width = _take_vectors(load(shard), rows[:1]).shape[1]
        every = -(-(total // step * width * 4) // MAX_SAMPLE_BYTES)  # shard that gives its share
        sampled = Spool(np.float32, width)
        for shard, rows, _ in islice(places, None, None, max(1, every)):
            sampled.append(_take_vectors(load(shard), rows[::step]))
        sample = sampled.read_array()
        clusters = min(clusters, len(sample))
        kmeans = faiss.Kmeans(
            width, clusters, niter=20, seed=self.seed, spherical=True, min_points_per_centroid=1,
            max_points_per_centroid=_SAMPLES_PER_CLUSTER,
        )  # fmt: skip
        kmeans.train(sample)
        cluster_N, size_K = allocate(count, np.int32, -1), np.zeros(clusters, np.int64)
        for shard, rows, numbers in places:
            cluster_N[numbers] = found = kmeans.index.search(_take_vectors(load(shard), rows), 1)[1][:, 0]
            size_K += np.bincount(found, minlength=clusters)
        return cluster_N, size_K, width

    def _walk(self, numbers: np.ndarray, vectors_CD: np.ndarray, thumbs_CP: np.ndarray) -> np.ndarray:
        """Algorithm 1: walk the rows, pass over flagged ones, flag every later hit of the range search."""
        import faiss

        index = faiss.IndexFlatIP(vectors_CD.shape[1])
        index.add(vectors_CD)
        first_C = np.full(len(numbers), -1, np.int64)
        same = _PictureComparer(thumbs_CP, self.verify)
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


class _PictureComparer:
    """Are two pictures the same but for a crop? True for all where nothing is to be verified."""

    def __init__(self, thumbs_CP: np.ndarray, verify: float | None) -> None:
        self._verify, self._whole_CP = verify, thumbs_CP
        self._crops = lru_cache(maxsize=1024)(lambda at: crop_thumbnail(thumbs_CP[at].tobytes()))

    def __call__(self, a: int, b: int) -> bool:
        if self._verify is None:
            return True
        whole_P = self._whole_CP[a].astype(np.float32) - self._whole_CP[b]
        if float(np.sqrt(np.mean(whole_P**2))) > _COARSE * self._verify:
            return False
        return measure_difference(self._crops(a), self._crops(b)) <= self._verify


def _group_clusters(size_K: np.ndarray, row_bytes: int, max_bytes: int) -> Iterator[range]:
    """Clusters in groups whose rows fit into memory (one cluster at least)."""
    start = num_bytes = 0
    for cluster, size in enumerate(size_K.tolist()):
        if cluster > start and num_bytes + size * row_bytes > max_bytes:
            yield range(start, cluster)
            start, num_bytes = cluster, 0
        num_bytes += size * row_bytes
    yield range(start, len(size_K))


def _read_members(
    group: range, size_K: np.ndarray, width: int, cluster_N: np.ndarray, places: Places, load: Load
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(numbers in order, vectors in fp32, thumbnails) of each cluster of a group."""
    ends = np.cumsum(size_K[group.start : group.stop])
    filled, total = ends - size_K[group.start : group.stop], int(ends[-1])
    number_M = np.empty(total, np.int64)
    vectors_MD, thumbs_MP = np.empty((total, width), np.float16), np.empty((total, THUMB_BYTES), np.uint8)
    for shard, rows, numbers in places:
        cluster_S = np.array(cluster_N[numbers]) - group.start
        chosen = np.flatnonzero((cluster_S >= 0) & (cluster_S < len(group)))
        if not len(chosen):
            continue
        table, cluster_S = load(shard), cluster_S[chosen]
        order = np.argsort(cluster_S, kind="stable")
        chosen, many = chosen[order], np.bincount(cluster_S, minlength=len(group))
        at = np.repeat(filled - np.cumsum(many) + many, many) + np.arange(len(chosen))
        number_M[at] = numbers[chosen]
        vectors_MD[at] = _take_vectors(table, rows[chosen])
        thumbs_MP[at] = [np.frombuffer(cell, np.uint8) for cell in _take_cells(table, "thumb", rows[chosen])]
        filled += many
    for start, end in pairwise([0, *ends.tolist()]):
        rows_M = start + np.argsort(number_M[start:end])
        if len(rows_M):
            yield number_M[rows_M], vectors_MD[rows_M].astype(np.float32), thumbs_MP[rows_M]


def _take_cells(table: pa.Table, column: str, rows: np.ndarray) -> list[bytes]:
    at = {row: n for n, row in enumerate(table["row"].to_pylist())}
    return table[column].take(pa.array([at[row] for row in rows.tolist()], pa.int64())).to_pylist()


def _take_vectors(table: pa.Table, rows: np.ndarray) -> np.ndarray:
    cells = _take_cells(table, "embedding", rows)
    return np.stack([np.frombuffer(cell, np.float16) for cell in cells]).astype(np.float32)


def crop_thumbnail(thumb: bytes) -> np.ndarray:
    """A thumbnail and its crops by up to 7.5 %, each back at full size: (V, P) uint8; the whole comes first."""
    from PIL import Image

    image = Image.frombytes("RGB", (THUMB, THUMB), thumb)
    crops = []
    for scale in _SCALES:
        slack = THUMB * (1 - scale)
        for x in (slack * part / 4 for part in range(5 if slack else 1)):
            for y in (slack * part / 4 for part in range(5 if slack else 1)):
                box = (x, y, x + THUMB * scale, y + THUMB * scale)
                crops.append(np.asarray(image.resize((THUMB, THUMB), Image.Resampling.BICUBIC, box=box)).ravel())
    return np.stack(crops)


def measure_difference(a_VP: np.ndarray, b_VP: np.ndarray) -> float:
    """Least root mean square difference (0 to 255) between one thumbnail and the crops of the other, either way."""
    a_VP, b_VP = a_VP.astype(np.float32), b_VP.astype(np.float32)
    pairs = (((a_VP - b_VP[0]) ** 2).mean(1).min(), ((b_VP - a_VP[0]) ** 2).mean(1).min())
    return float(np.sqrt(min(pairs)))
