"""GenEval's color classifier: CLIP compares each masked and cropped detection with prompts of ten colors.

Shapes: N detections, E embedding width, C colors, T templates.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from eval.judging.geneval_prompts import COLORS
from eval.metrics.geneval.rules import KeptDetection
from eval.networks.clip_model import ClipModel, normalize_rows
from eval.networks.detectors import Detections
from infra.errors import UserError

MASKED_OUT = "#999999"
COLOR_TEMPLATES = ("a photo of a {c} {name}", "a photo of a {c}-colored {name}", "a photo of a {c} object")


class ClipColors:
    """GenEval's color of a detection: gray outside the mask, crop to the box, nearest of ten color prompts."""

    def __init__(self, clip: ClipModel) -> None:
        self._clip = clip
        self._heads: dict[str, Tensor] = {}

    def name(
        self, image: np.ndarray, detections: Detections, *, label: str, kept: Sequence[KeptDetection]
    ) -> list[str]:
        """The color of each kept detection of this class in the picture."""
        if not kept:  # a clause that counts to 0
            return []
        crops = [
            crop_masked(image, item.box_5, None if detections.masks_NHW is None else detections.masks_NHW[item.row])
            for item in kept
        ]
        logits_NC = normalize_rows(self._clip.images(crops)) @ self._make_head(label).T
        return [COLORS[int(index)] for index in logits_NC.argmax(1)]

    def _make_head(self, name: str) -> Tensor:
        """Class embeddings (10, E): unit templates averaged, then made unit again, as clip_benchmark does."""
        if name not in self._heads:
            prompts = [template.format(c=color, name=name) for color in COLORS for template in COLOR_TEMPLATES]
            head_CTE = normalize_rows(self._clip.texts(prompts)).unflatten(0, (len(COLORS), len(COLOR_TEMPLATES)))
            self._heads[name] = normalize_rows(head_CTE.mean(1))
        return self._heads[name]


def crop_masked(image: np.ndarray, box_5: np.ndarray, mask_HW: np.ndarray | None) -> Image.Image:
    """The detection alone on #999999, cropped to its box (PIL rounds the corners; at least one pixel is kept)."""
    picture = Image.fromarray(image)
    if mask_HW is not None:
        if mask_HW.shape != image.shape[:2]:
            raise UserError(f"instance mask of {mask_HW.shape} for an image of {image.shape[:2]}: a detector fault")
        blank = Image.new("RGB", picture.size, color=MASKED_OUT)
        picture = Image.composite(picture, blank, Image.fromarray(mask_HW))
    x1, y1, x2, y2 = (round(float(value)) for value in box_5[:4])
    return picture.crop((x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)))
