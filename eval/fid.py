"""Frechet distance on CLIP image features (SD3 section 5.1, after Sauer et al. 2021), float64 throughout.

Features are the projected image embeddings, not normalised (clean-fid's CLIP convention). Shapes: N images, E width.
"""

import functools
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.judges import Judges, describe_judge
from eval.metric import Prompt, Sample, Score
from infra.errors import UserError

REFERENCES = 1000
CHUNK = 256


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
            raise ValueError("features hold a number that is not finite: the feature network or an image is broken")
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
            raise ValueError(f"a covariance needs 2 images or more, found {self.count}")
        return self._scatter_EE / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    S1 S2 is similar to the symmetric S1^(1/2) S2 S1^(1/2), so two symmetric eigenproblems give the trace of the root:
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
    cov_a, cov_b = a.covariance_EE, b.covariance_EE
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    inner = root @ cov_b @ root
    trace_root = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(min=0)).sum()
    offset = a.mean_E - b.mean_E
    return float(offset @ offset + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_root)


class FID:
    name, higher_is_better = "fid", False

    def __init__(self, judges: Judges) -> None:
        self._judges = judges
        self._moments: Moments | None = None

    def prompts(self, per_task: int) -> list[Prompt]:
        return self._judges.caption_prompts(per_task)

    def describe(self) -> dict[str, Any]:
        return {"version": 1, "features": describe_judge(self._judges.clip()), "references": REFERENCES}

    def update(self, samples: Sequence[Sample]) -> None:
        features_NE = self._judges.clip().images([sample.image for sample in samples]).numpy()
        if self._moments is None:
            self._moments = Moments(features_NE.shape[1])
        self._moments.update(features_NE)

    def compute(self) -> list[Score]:
        if self._moments is None:
            return []
        reference = reference_moments(self._judges)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RankDeficientWarning)
            value = frechet_distance(self._moments, reference)
        details = {"references": reference.count, "width": len(reference.mean_E), "rank_deficient": bool(caught)}
        return [Score("", value, self._moments.count, details=details)]


@functools.lru_cache(maxsize=4)
def reference_moments(judges: Judges) -> Moments:
    """Features of the real images, computed once for all checkpoints."""
    moments: Moments | None = None
    images = judges.reference_images(REFERENCES)
    while chunk := list(itertools.islice(images, CHUNK)):
        features_NE = judges.clip().images(chunk).numpy()
        moments = moments or Moments(features_NE.shape[1])
        moments.update(features_NE)
    if moments is None:
        raise UserError("FID found no reference images")
    return moments
