"""Object detectors behind one protocol: Mask2Former (and kin) through transformers, and the world's own tiny detector.

Shapes: N detections of one image, H and W its pixels. Boxes are x1, y1, x2, y2 in pixels of the image that was given.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipeline.checkpoints import hash_weights
from eval.networks.loading import explain_failure, load_pretrained
from infra.errors import UserError

FAMILIES = ("mask2former", "maskformer")  # their heads give a class and a mask per query
# COCO's spellings where GenEval writes another one (its object_names.txt).
COCO_TO_GENEVAL = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}


@dataclass(frozen=True)
class Detections:
    """What a detector saw in one image: float32 boxes and scores, a class name each, boolean masks or None."""

    boxes_N4: np.ndarray
    scores_N: np.ndarray
    labels: tuple[str, ...]
    masks_NHW: np.ndarray | None = None

    def __post_init__(self) -> None:
        num = len(self.labels)
        object.__setattr__(self, "boxes_N4", np.asarray(self.boxes_N4, dtype=np.float32).reshape(-1, 4))
        object.__setattr__(self, "scores_N", np.asarray(self.scores_N, dtype=np.float32).reshape(-1))
        masks = self.masks_NHW
        if len(self.boxes_N4) != num or len(self.scores_N) != num or (masks is not None and len(masks) != num):
            raise UserError(
                f"detections disagree: {len(self.boxes_N4)} boxes, {len(self.scores_N)} scores, {num} labels"
            )
        if not (np.isfinite(self.boxes_N4).all() and np.isfinite(self.scores_N).all()):
            raise UserError("a detection has a box or score that is not a finite number; rerun or fix the detector")


class Detector(Protocol):
    """Images (uint8 RGB, H x W x 3) in, detections out. `version` names the weights and enters the protocol hash."""

    name: str
    version: str
    classes: tuple[str, ...]

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """The objects found in each picture."""
        ...


class TransformersDetector:
    """Instance segmentation by path through transformers, by default Mask2Former Swin-S on COCO.

    The official GenEval uses the mmdet port of the same network; scores need not match to the last digit.
    """

    def __init__(self, path: str | Path, *, device: str = "cpu", keep_above: float = 0.05, top: int = 100) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

        self._model = load_pretrained(
            AutoModelForUniversalSegmentation, path, what="Mask2Former", device=device, families=FAMILIES,
            unused=("criterion.",),
        )  # fmt: skip
        with explain_failure("the image processor of Mask2Former", path):
            self._processor: Any = AutoImageProcessor.from_pretrained(str(path), local_files_only=True)
        self.name, self.version = self._model.config.model_type, hash_weights(path)
        self._torch, self._device, self._keep_above, self._top = torch, device, keep_above, top
        names = self._model.config.id2label
        self.classes = tuple(COCO_TO_GENEVAL.get(names[i], names[i]) for i in range(len(names)))

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        return [self._detect_one(image) for image in images]

    def _detect_one(self, image: np.ndarray) -> Detections:
        torch = self._torch
        with torch.inference_mode():
            inputs = self._processor(images=[image], return_tensors="pt").to(self._device)
            out = self._model(**inputs)
            # Mask2Former's instance head (mmdet's MaskFormerFusionHead): every (query, class) pair competes, then the
            # class probability is multiplied by the mean mask probability inside the mask.
            class_prob_QC = out.class_queries_logits[0].softmax(-1)[:, :-1]
            best, index = class_prob_QC.flatten().topk(min(self._top, class_prob_QC.numel()))
            query, label = index // class_prob_QC.shape[1], index % class_prob_QC.shape[1]
            masks_NHW = self._to_image(out.masks_queries_logits[0][query], inputs, image.shape[:2])
            inside_NHW = masks_NHW > 0
            area_N = inside_NHW.flatten(1).sum(1)
            quality_N = (masks_NHW.sigmoid() * inside_NHW).flatten(1).sum(1) / (area_N + 1e-6)
            score_N = best * quality_N
            keep = (score_N > self._keep_above) & (area_N > 0)
        masks = inside_NHW[keep].cpu().numpy()
        return Detections(
            boxes_N4=np.stack([find_mask_box(mask) for mask in masks]) if len(masks) else np.zeros((0, 4)),
            scores_N=score_N[keep].cpu().numpy(),
            labels=tuple(self.classes[int(i)] for i in label[keep]),
            masks_NHW=masks,
        )

    def _to_image(self, masks_NHW: Any, inputs: Any, size: Sequence[int]) -> Any:
        """Mask logits in the pixels of the image: the processor's padding is cut off before resizing."""
        resize = functools.partial(self._torch.nn.functional.interpolate, mode="bilinear", align_corners=False)
        masks_NHW = resize(masks_NHW[None], size=inputs["pixel_values"].shape[-2:])[0]
        if "pixel_mask" in inputs:
            real_HW = inputs["pixel_mask"][0].bool()
            masks_NHW = masks_NHW[:, : int(real_HW.any(1).sum()), : int(real_HW.any(0).sum())]
        return resize(masks_NHW[None], size=tuple(size))[0]


class SceneDetector:
    """The world's detector: a class of our own under data_pipeline/world, loaded by path."""

    def __init__(self, path: str | Path) -> None:
        from data_pipeline.world.detector import WorldDetector

        self.name, self.version = "world_detector", hash_weights(path)
        self._model = WorldDetector.from_pretrained(path)
        self.classes = self._model.config.classes

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        return [
            Detections(
                boxes_N4=np.array([item.box for item in found]),
                scores_N=np.array([item.score for item in found]),
                labels=tuple(item.name for item in found),
                masks_NHW=np.stack([item.mask for item in found]) if found else None,
            )
            for found in self._model.detect(np.stack(images))
        ]


def find_mask_box(mask_HW: np.ndarray) -> np.ndarray:
    """Tight x1, y1, x2, y2 of a mask; x2 and y2 are one past the last pixel."""
    columns, rows = np.flatnonzero(mask_HW.any(0)), np.flatnonzero(mask_HW.any(1))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float32)
