"""FID: Frechet distance between features of generated and real images, by CLIP (SD3 section
5.1, after Sauer et al. 2021) or by Inception.

CLIP features are the projected image embeddings, not normalised (clean-fid's CLIP convention).
Shapes: N images, E width.
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
from eval.judging.metric import JudgedImage, Score
from eval.judging.official import OfficialPaths
from eval.judging.prompt_files import find_reference_files, read_prompts
from eval.judging.prompts import render_world_references
from eval.metrics.captioned import CaptionMetric
from eval.metrics.frechet import Moments, RankDeficientWarning, frechet_distance, resample_distances
from eval.networks.features import FeatureNetwork
from eval.networks.inception import InceptionFeatures
from infra.errors import UserError
from infra.log import get_logger
from infra.values import PromptValues

log = get_logger("eval")
REFERENCES = 1000  # real pictures of the world; of a folder, at most as many
CHUNK = 256


class FeatureDistance(CaptionMetric):
    """A Frechet distance as a metric, lower is better. `network` computes features (N, E); `judges` give the real
    pictures.

    The interval comes from bootstrap samples of prompts: their deviations from the bootstrap mean are added to the
    value.
    """

    higher_is_better = False

    def __init__(
        self, name: str, judges: Judges, network: Callable[[], FeatureNetwork], *, needs: Sequence[str] = ()
    ) -> None:
        self.needs = ("captions", "references", *needs)
        super().__init__(judges)
        self.name, self._network = name, network
        self._features: list[np.ndarray] = []
        self._prompts: list[int] = []

    def describe(self) -> dict[str, Any]:
        found = {"version": 1, "features": describe_judge(self._network()), "references": REFERENCES}
        version = hash_reference_images(self._judges, REFERENCES)
        return found if version is None else found | {"reference_pictures": version}

    def update(self, images: Sequence[JudgedImage]) -> None:
        self._features.append(_compute_features(self._network(), [item.image for item in images]))
        self._prompts += [item.prompt_index for item in images]

    def compute(self) -> list[Score]:
        """The distance with its 95 % interval; [] if no picture was judged."""
        if not self._features:
            return []
        features_NE, reference = (
            np.concatenate(self._features),
            compute_reference_moments(self._judges, self._network()),
        )
        own = Moments(features_NE.shape[1])
        own.update(features_NE)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RankDeficientWarning)
            value = frechet_distance(own, reference)
        for warning in dict.fromkeys(str(item.message) for item in caught):
            log.warning("%s: %s", self.name, warning)
        low = high = None
        if len(set(self._prompts)) > 1:
            again = resample_distances(
                features_NE, np.array(self._prompts), mean_ref_E=reference.mean_E, cov_ref_EE=reference.covariance_EE
            )
            low, high = (max(0.0, value + float(x)) for x in np.percentile(again - again.mean(), [2.5, 97.5]))
        details = {
            "features": self._network().name,
            "references": reference.count,
            "width": len(reference.mean_E),
            "rank_deficient": bool(caught),
        }
        return [Score("", value, own.count, low, high, details=details)]

    def values_per_prompt(self) -> PromptValues:
        if not self._features:
            return {}
        reference = compute_reference_moments(self._judges, self._network())
        return {
            "features": np.concatenate(self._features).astype(np.float32),
            "cluster": np.array(self._prompts),
            "reference_mean": reference.mean_E,
            "reference_covariance": reference.covariance_EE,
        }


def build_clip_fid(judges: Judges) -> FeatureDistance:
    """`fid`: on the features of the judges' CLIP."""
    return FeatureDistance("fid", judges, judges.clip, needs=["clip"])


def build_inception_fid(judges: Judges) -> FeatureDistance:
    """`fid_inception`: on Inception's features, the field's FID."""
    return FeatureDistance("fid_inception", judges, lambda: load_inception(judges.paths))


@functools.cache
def load_inception(paths: OfficialPaths) -> InceptionFeatures:
    """The Inception network, which is the same for the world's and the official judges."""
    if paths.inception is None:
        raise UserError("fid_inception needs --official.inception FILE, the weights of its network")
    return InceptionFeatures(paths.inception, convention=paths.inception_convention, device=paths.resolve_device())


def _compute_features(network: FeatureNetwork, images: Sequence[np.ndarray]) -> np.ndarray:
    return np.asarray(network.images(images), dtype=np.float32)


@functools.lru_cache(maxsize=4)
def compute_reference_moments(judges: Judges, network: FeatureNetwork) -> Moments:
    """Mean and covariance of the features of the real images, computed once for all checkpoints."""
    moments: Moments | None = None
    images = read_reference_images(judges, REFERENCES)
    while chunk := list(itertools.islice(images, CHUNK)):
        features_NE = _compute_features(network, chunk)
        moments = moments or Moments(features_NE.shape[1])
        moments.update(features_NE)
    if moments is None:
        raise UserError("FID found no reference images")
    return moments


def read_reference_images(judges: Judges, count: int) -> Iterator[np.ndarray]:
    """Real pictures that generated ones are compared with: other scenes of the world, or the user's folder."""
    if judges.of_world:
        return render_world_references(count)
    return map(read_picture, _find_reference_files(judges.paths, count))


@functools.cache
def hash_reference_images(judges: Judges, count: int) -> str | None:
    """A hash of the real pictures' bytes in their order, for the protocol; None for the world, whose code draws
    them."""
    if judges.of_world:
        return None
    files = _find_reference_files(judges.paths, count)
    each = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
    return f"{len(files)} pictures {hashlib.sha256(each).hexdigest()[:16]}"


def _find_reference_files(paths: OfficialPaths, count: int) -> list[Path]:
    """Files of real pictures. If the captions file names pictures (COCO), the pictures of the caption prompts."""
    prompts = read_prompts(paths.captions) if paths.captions else []
    return find_reference_files(paths.need("references"), prompts)[:count]
