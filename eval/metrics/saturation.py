"""Saturation and contrast of pictures: guidance that is too strong, or baked in twice, raises both."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.judging.judges import Judges
from eval.judging.metric import Clusters, JudgedImage, Score
from eval.metrics.captioned import CaptionMetric
from infra.values import PromptValues

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


class Saturation(CaptionMetric):
    """Rows `saturation` and `saturation/contrast`, 0 to 1. Neither is good or bad by itself: they are compared with
    those of a teacher, or of real pictures (`calibration/saturation`)."""

    name = "saturation"
    higher_is_better = False  # no claim: rows must have a direction
    needs = ("captions",)

    def __init__(self, judges: Judges) -> None:
        super().__init__(judges)
        self._values = Clusters()

    def describe(self) -> dict[str, Any]:
        return {"version": 1, "saturation": "HSV, mean over pixels", "contrast": "deviation of BT.601 luma, 0 to 1"}

    def update(self, images: Sequence[JudgedImage]) -> None:
        for item in images:
            self._values.add("saturation", item.prompt_index, measure_saturation(item.image))
            self._values.add("contrast", item.prompt_index, measure_contrast(item.image))

    def compute(self) -> list[Score]:
        if not self._values:
            return []
        return [self._values.score("", ["saturation"]), self._values.score("contrast", ["contrast"])]

    def values_per_prompt(self) -> PromptValues:
        return self._values.values_per_prompt() if self._values else {}


def measure_saturation(image: np.ndarray) -> float:
    """Mean of HSV's S = (max - min) / max over the pixels of a uint8 RGB picture; 0 for black ones."""
    pixels_HW3 = image.astype(np.float64)
    high_HW, low_HW = pixels_HW3.max(-1), pixels_HW3.min(-1)
    return float(np.mean((high_HW - low_HW) / np.maximum(high_HW, 1)))


def measure_contrast(image: np.ndarray) -> float:
    """Standard deviation of the luma of a uint8 RGB picture, in parts of 255."""
    return float((image.astype(np.float64) @ LUMA).std() / 255)
