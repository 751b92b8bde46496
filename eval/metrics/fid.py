"""Frechet distance on CLIP image features (SD3 section 5.1, after Sauer et al. 2021) or Inception's, in float64.

CLIP features are the projected image embeddings, not normalised (clean-fid's CLIP convention).
Shapes: N images, E width, P prompts.
"""

import functools
import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.drawing.pictures import read_picture
from eval.judging.judges import Judges, describe_judge
from eval.judging.metric import JudgedImage, Kept, PictureMetric, Prompt, Score
from eval.judging.official import OfficialPaths
from eval.judging.prompt_files import caption_prompts, read_prompts, reference_files
from eval.judging.prompts import world_reference_images
from eval.networks.features import FeatureNetwork
from eval.networks.inception import InceptionFeatures
from infra.errors import UserError
from infra.log import get_logger

log = get_logger("eval")
REFERENCES = 1000
CHUNK = 256
RESAMPLES, WIDE = 200, 1024


class RankDeficientWarning(UserWarning):
    """Fewer samples than feature dimensions: the covariance is singular and the distance strongly biased."""


class Moments:
    """Running mean and covariance: chunks merge exactly (Chan et al.), so nothing but E x E numbers is kept."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean_E = np.zeros(width)
        self._scatter_EE = np.zeros((width, width))

    def update(self, features_NE: np.ndarray) -> None:
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
        """Unbiased (divided by N - 1), as numpy.cov."""
        if self.count < 2:
            raise UserError(f"a covariance needs 2 images or more, found {self.count}")
        return self._scatter_EE / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    S1 S2 is similar to the symmetric S2^(1/2) S1 S2^(1/2), so two symmetric eigenproblems give the trace of the root:
    no complex numbers, and singular covariances need no jitter.
    """
    for moments in (a, b):
        if moments.count <= len(moments.mean_E):
            warnings.warn(
                f"{moments.count} images for features of width {len(moments.mean_E)}: rank-deficient covariance; "
                "compare this distance only with ones from as many images",
                RankDeficientWarning,
                stacklevel=2,
            )
    return _distance(a.mean_E, a.covariance_EE, b.mean_E, b.covariance_EE, _root(b.covariance_EE))


def _root(covariance_EE: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance_EE)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def _distance(
    mean_E: np.ndarray, cov_EE: np.ndarray, mean_ref_E: np.ndarray, cov_ref_EE: np.ndarray, root_ref_EE: np.ndarray
) -> float:
    inner_EE = root_ref_EE @ cov_EE @ root_ref_EE
    trace_root = np.sqrt(np.linalg.eigvalsh((inner_EE + inner_EE.T) / 2).clip(min=0)).sum()
    offset_E = mean_E - mean_ref_E
    return float(offset_E @ offset_E + np.trace(cov_EE) + np.trace(cov_ref_EE) - 2 * trace_root)


def resampled_distances(
    features_NE: np.ndarray, cluster_N: np.ndarray, mean_ref_E: np.ndarray, cov_ref_EE: np.ndarray, *, seed: int = 0
) -> np.ndarray:
    """Distances of bootstrap samples of the prompts (with their images) to the fixed reference, 200 of them or 50.

    The same seed draws the same prompts, so that two checkpoints are compared pair by pair. Repeated prompts make
    every one of these distances larger than the distance itself: use their spread, not their level.
    """
    root_EE, x_NE, trace_ref = _root(cov_ref_EE), features_NE.astype(np.float64), np.trace(cov_ref_EE)
    found = []
    for weight_N in _draws(cluster_N, min(x_NE.shape), seed):
        mean_E, rows_NE = _scaled(x_NE, weight_N)
        y_NE = rows_NE @ root_EE  # the root's trace is the nuclear norm of y: the smaller Gram matrix gives it
        gram = y_NE @ y_NE.T if len(y_NE) < y_NE.shape[1] else y_NE.T @ y_NE
        trace_root = np.sqrt(np.linalg.eigvalsh(gram).clip(min=0)).sum()
        offset_E = mean_E - mean_ref_E
        found.append(offset_E @ offset_E + (rows_NE**2).sum() + trace_ref - 2 * trace_root)
    return np.array(found)


def resampled_pair_distances(a_NE: np.ndarray, b_NE: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Distances of two sets whose rows belong together (a picture and its reconstruction), drawn together."""
    found = []
    for weight_N in _draws(np.arange(len(a_NE)), min(a_NE.shape), seed):
        (mean_a, rows_a), (mean_b, rows_b) = (_scaled(x.astype(np.float64), weight_N) for x in (a_NE, b_NE))
        # Covariances A'A and B'B: Tr (A'A B'B)^(1/2) is the nuclear norm of A B'.
        trace_root = np.linalg.svdvals(_factor(rows_a) @ _factor(rows_b).T).sum()
        offset_E = mean_a - mean_b
        found.append(offset_E @ offset_E + (rows_a**2).sum() + (rows_b**2).sum() - 2 * trace_root)
    return np.array(found)


def _factor(rows_NE: np.ndarray) -> np.ndarray:
    """The same product A'A from at most E rows."""
    return rows_NE if len(rows_NE) <= rows_NE.shape[1] else np.asarray(np.linalg.qr(rows_NE, mode="r"))


def _draws(cluster_N: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row counts in each bootstrap sample of the clusters; fewer samples where one costs seconds."""
    _, place_N = np.unique(cluster_N, return_inverse=True)
    rng, num = np.random.default_rng(seed), int(place_N.max()) + 1
    for _ in range(RESAMPLES if size <= WIDE else RESAMPLES // 4):
        yield np.bincount(rng.integers(num, size=num), minlength=num)[place_N].astype(float)


def _scaled(x_NE: np.ndarray, weight_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weighted mean, and rows whose products sum to the unbiased covariance."""
    there = weight_N > 0
    x_NE, weight_N = x_NE[there], weight_N[there]
    total = weight_N.sum()
    mean_E = weight_N @ x_NE / total
    return mean_E, (x_NE - mean_E) * np.sqrt(weight_N / (total - 1))[:, None]


class FeatureDistance(PictureMetric):
    """A Frechet distance as a metric: `features` gives (N, E) of pictures; the reference pictures are the judges'."""

    higher_is_better = False
    draws_captions = True

    def __init__(
        self, name: str, judges: Judges, network: Callable[[], FeatureNetwork], *, needs: Sequence[str] = ()
    ) -> None:
        self.needs = ("captions", "references", *needs)
        self.name, self._judges, self._network = name, judges, network
        self._features: list[np.ndarray] = []
        self._prompts: list[int] = []

    def prompts(self, count: int | None) -> list[Prompt]:
        return caption_prompts(self._judges, count)

    def describe(self) -> dict[str, Any]:
        found = {"version": 1, "features": describe_judge(self._network()), "references": REFERENCES}
        version = reference_version(self._judges, REFERENCES)
        return found if version is None else found | {"reference_pictures": version}

    def update(self, images: Sequence[JudgedImage]) -> None:
        self._features.append(_features(self._network(), [item.image for item in images]))
        self._prompts += [item.prompt_index for item in images]

    def compute(self) -> list[Score]:
        """The distance, with a 95 % interval from the spread of resampled distances around it (see above)."""
        if not self._features:
            return []
        features_NE, reference = np.concatenate(self._features), reference_moments(self._judges, self._network())
        own = Moments(features_NE.shape[1])
        own.update(features_NE)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RankDeficientWarning)
            value = frechet_distance(own, reference)
        for warning in dict.fromkeys(str(item.message) for item in caught):
            log.warning("%s: %s", self.name, warning)
        low = high = None
        if len(set(self._prompts)) > 1:
            again = resampled_distances(features_NE, np.array(self._prompts), reference.mean_E, reference.covariance_EE)
            low, high = (max(0.0, value + float(x)) for x in np.percentile(again - again.mean(), [2.5, 97.5]))
        details = {
            "features": self._network().name,
            "references": reference.count,
            "width": len(reference.mean_E),
            "rank_deficient": bool(caught),
        }
        return [Score("", value, own.count, low, high, details=details)]

    def values_per_prompt(self) -> Kept:
        if not self._features:
            return {}
        reference = reference_moments(self._judges, self._network())
        return {
            "features": np.concatenate(self._features).astype(np.float32),
            "cluster": np.array(self._prompts),
            "reference_mean": reference.mean_E,
            "reference_covariance": reference.covariance_EE,
        }


def clip_fid(judges: Judges) -> FeatureDistance:
    return FeatureDistance("fid", judges, judges.clip, needs=["clip"])


def inception_fid(judges: Judges) -> FeatureDistance:
    return FeatureDistance("fid_inception", judges, lambda: load_inception(judges.paths))


@functools.cache
def load_inception(paths: OfficialPaths) -> InceptionFeatures:
    """The same for every judge: Inception knows neither world nor benchmark."""
    if paths.inception is None:
        raise UserError("fid_inception needs --official.inception FILE, the weights of its network")
    return InceptionFeatures(paths.inception, convention=paths.inception_convention, device=paths.device)


def _features(network: FeatureNetwork, images: Sequence[np.ndarray]) -> np.ndarray:
    return np.asarray(network.images(images), dtype=np.float32)


@functools.lru_cache(maxsize=4)
def reference_moments(judges: Judges, network: FeatureNetwork) -> Moments:
    """Features of the real images, computed once for all checkpoints."""
    moments: Moments | None = None
    images = reference_images(judges, REFERENCES)
    while chunk := list(itertools.islice(images, CHUNK)):
        features_NE = _features(network, chunk)
        moments = moments or Moments(features_NE.shape[1])
        moments.update(features_NE)
    if moments is None:
        raise UserError("FID found no reference images")
    return moments


def reference_images(judges: Judges, count: int) -> Iterator[np.ndarray]:
    """Real pictures that generated ones are compared with: other scenes of the world, or the user's folder."""
    if judges.of_world:
        return world_reference_images(count)
    return map(read_picture, _reference_files(judges.paths, count))


@functools.cache
def reference_version(judges: Judges, count: int) -> str | None:
    """Of the pictures' bytes in their order, whatever they are called; None where the code alone decides (a world)."""
    if judges.of_world:
        return None
    files = _reference_files(judges.paths, count)
    each = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
    return f"{len(files)} pictures {hashlib.sha256(each).hexdigest()[:16]}"


def _reference_files(paths: OfficialPaths, count: int) -> list[Path]:
    """Real pictures; those of the caption prompts where their file names them (COCO)."""
    prompts = read_prompts(paths.captions) if paths.captions else []
    return reference_files(paths.need("references"), prompts)[:count]
