"""The Frechet distance of two Gaussians (Dowson and Landau 1982; FID: arXiv 1706.08500), in float64, and its bootstrap.

Shapes: N images, E width of the features.
"""

import warnings
from collections.abc import Iterator

import numpy as np

from infra.errors import UserError

# Bootstrap samples. Above the width WIDE one sample costs seconds, so there are a quarter as many.
RESAMPLES, WIDE = 200, 1024


class RankDeficientWarning(UserWarning):
    """Fewer samples than feature dimensions: the covariance is singular and the distance strongly biased."""


class Moments:
    """Running mean (E) and covariance (E, E) of features that arrive in chunks. Chunks are merged by the formula of
    Chan, Golub and LeVeque (1979), so no feature is kept."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean_E = np.zeros(width)
        self._scatter_EE = np.zeros((width, width))

    def update(self, features_NE: np.ndarray) -> None:
        """Add N rows of features; UserError for a number that is not finite."""
        x_NE = np.asarray(features_NE, dtype=np.float64)
        if not np.isfinite(x_NE).all():
            raise UserError("features hold a number that is not finite: the feature network or an image is broken")
        if not len(x_NE):
            return
        mean_E = x_NE.mean(0)
        shift_E = mean_E - self.mean_E
        total = self.count + len(x_NE)
        centered_NE = x_NE - mean_E
        self._scatter_EE += centered_NE.T @ centered_NE + np.outer(shift_E, shift_E) * (self.count * len(x_NE) / total)
        self.mean_E += shift_E * (len(x_NE) / total)
        self.count = total

    @property
    def covariance_EE(self) -> np.ndarray:
        """The unbiased covariance (divided by N - 1), as numpy.cov; UserError for fewer than 2 images."""
        if self.count < 2:
            raise UserError(f"a covariance needs 2 images or more, found {self.count}")
        return self._scatter_EE / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), the squared Frechet distance of two Gaussians.

    S1 S2 has the eigenvalues of the symmetric S2^(1/2) S1 S2^(1/2). So two symmetric eigenproblems give the trace of
    the root, without complex numbers, and a singular covariance needs no added diagonal. Warns with
    RankDeficientWarning where there are no more images than features.
    """
    for moments in (a, b):
        if moments.count <= len(moments.mean_E):
            warnings.warn(
                f"{moments.count} images for features of width {len(moments.mean_E)}: rank-deficient covariance; "
                "compare this distance only with ones from as many images",
                RankDeficientWarning,
                stacklevel=2,
            )
    root_EE = _compute_root(b.covariance_EE)
    inner_EE = root_EE @ a.covariance_EE @ root_EE
    trace_root = np.sqrt(np.linalg.eigvalsh((inner_EE + inner_EE.T) / 2).clip(min=0)).sum()
    offset_E = a.mean_E - b.mean_E
    return float(offset_E @ offset_E + np.trace(a.covariance_EE) + np.trace(b.covariance_EE) - 2 * trace_root)


def _compute_root(covariance_EE: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semi-definite matrix; rounding below zero is cut off."""
    values, vectors = np.linalg.eigh(covariance_EE)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def resample_distances(
    features_NE: np.ndarray, cluster_N: np.ndarray, *, mean_ref_E: np.ndarray, cov_ref_EE: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Distances (200), or (50) for wide features, of bootstrap samples to the fixed reference.

    A bootstrap sample draws prompts with replacement, each with all its images; `cluster_N` is the prompt of each
    image. The same seed draws the same prompts, so that two checkpoints are compared pair by pair. The trap: repeated
    prompts make every one of these distances larger than the distance itself. Use their spread, not their level.
    """
    root_EE, x_NE, trace_ref = _compute_root(cov_ref_EE), features_NE.astype(np.float64), np.trace(cov_ref_EE)
    distances = []
    for weight_N in _draw_counts(cluster_N, min(x_NE.shape), seed):
        mean_E, rows_NE = _weight_rows(x_NE, weight_N)
        # Tr (R A'A R)^(1/2) is the sum of the singular values of y = A R; the smaller Gram matrix of y gives them.
        y_NE = rows_NE @ root_EE
        gram = y_NE @ y_NE.T if len(y_NE) < y_NE.shape[1] else y_NE.T @ y_NE
        trace_root = np.sqrt(np.linalg.eigvalsh(gram).clip(min=0)).sum()
        offset_E = mean_E - mean_ref_E
        distances.append(offset_E @ offset_E + (rows_NE**2).sum() + trace_ref - 2 * trace_root)
    return np.array(distances)


def resample_pair_distances(a_NE: np.ndarray, b_NE: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Distances (200), or (50) for wide features, of bootstrap samples of two sets whose rows belong together, such as
    a picture and its reconstruction: both rows of a pair are drawn together."""
    distances = []
    for weight_N in _draw_counts(np.arange(len(a_NE)), min(a_NE.shape), seed):
        (mean_a, rows_a), (mean_b, rows_b) = (_weight_rows(x.astype(np.float64), weight_N) for x in (a_NE, b_NE))
        # Covariances A'A and B'B: Tr (A'A B'B)^(1/2) is the nuclear norm (sum of singular values) of A B'.
        trace_root = np.linalg.svdvals(_reduce_rows(rows_a) @ _reduce_rows(rows_b).T).sum()
        offset_E = mean_a - mean_b
        distances.append(offset_E @ offset_E + (rows_a**2).sum() + (rows_b**2).sum() - 2 * trace_root)
    return np.array(distances)


def _reduce_rows(rows_NE: np.ndarray) -> np.ndarray:
    """At most E rows with the same product A'A as the rows given (the R of a QR decomposition)."""
    return rows_NE if len(rows_NE) <= rows_NE.shape[1] else np.asarray(np.linalg.qr(rows_NE, mode="r"))


def _draw_counts(cluster_N: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """For each bootstrap sample of the clusters, how often each row counts in it (N). `size`: the smaller side of the
    features, which decides the number of samples."""
    _, place_N = np.unique(cluster_N, return_inverse=True)
    rng, num = np.random.default_rng(seed), int(place_N.max()) + 1
    for _ in range(RESAMPLES if size <= WIDE else RESAMPLES // 4):
        yield np.bincount(rng.integers(num, size=num), minlength=num)[place_N].astype(float)


def _weight_rows(x_NE: np.ndarray, weight_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weighted mean (E), and rows A such that A'A is the unbiased covariance. Rows of weight 0 are left out."""
    drawn = weight_N > 0
    x_NE, weight_N = x_NE[drawn], weight_N[drawn]
    total = weight_N.sum()
    mean_E = weight_N @ x_NE / total
    return mean_E, (x_NE - mean_E) * np.sqrt(weight_N / (total - 1))[:, None]
