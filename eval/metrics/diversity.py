"""Diversity: the mean distance of pictures of one prompt. A student that lost modes of its teacher draws them alike."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from eval.judging.judges import Judges, describe_judge
from eval.judging.metric import Clusters, JudgedImage, PictureMetric, Prompt, Score
from eval.judging.prompts import WORLD_PER_TASK, list_geneval_prompts, list_world_geneval_prompts
from eval.networks.perceptual import ClipDistance, Lpips, PictureDistance
from infra.values import PromptValues

LARGEST = 256  # pixels a side: larger pictures are brought to it before they are compared


class Diversity(PictureMetric):
    """Row `diversity`: the mean over GenEval's prompts of the distance of each two pictures of a prompt, as in DMD2's
    appendix B (arXiv 2405.14867, LPIPS of four pictures). LPIPS by judges `official`, features of CLIP in the world.

    A prompt of one picture gives no value.
    """

    name = "diversity"
    needs = ("lpips",)

    def __init__(self, judges: Judges) -> None:
        self._judges = judges
        self._pictures: dict[int, list[np.ndarray]] = {}
        self._values = Clusters()

    @functools.cached_property
    def _distance(self) -> PictureDistance:
        paths = self._judges.paths
        if self._judges.of_world:
            return ClipDistance(self._judges.clip())
        return Lpips(paths.need("lpips"), device=paths.resolve_device())

    def prompts(self, count: int | None) -> list[Prompt]:
        if self._judges.of_world:
            return list_world_geneval_prompts(count or WORLD_PER_TASK)
        return list_geneval_prompts(count)

    def describe(self) -> dict[str, Any]:
        return {"version": 1, "distance": describe_judge(self._distance), "largest_side": LARGEST}

    def update(self, images: Sequence[JudgedImage]) -> None:
        """Each picture beside those of its prompt that came before."""
        pairs: list[tuple[int, np.ndarray, np.ndarray]] = []
        for item in images:
            picture, earlier = _shrink(item.image), self._pictures.setdefault(item.prompt_index, [])
            pairs += [(item.prompt_index, other, picture) for other in earlier]
            earlier.append(picture)
        if pairs:
            indices, first, second = zip(*pairs)
            for index, distance in zip(indices, self._distance.distances(first, second)):
                self._values.add("prompts", index, distance)

    def compute(self) -> list[Score]:
        return [self._values.score("", ["prompts"])] if self._values else []

    def values_per_prompt(self) -> PromptValues:
        return self._values.values_per_prompt() if self._values else {}


def _shrink(image: np.ndarray) -> np.ndarray:
    if max(image.shape[:2]) <= LARGEST:
        return image
    picture = Image.fromarray(image)
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.BICUBIC)
    return np.asarray(picture)
