"""Open-vocabulary detection by path: OWLv2 (or OWL-ViT) through transformers, in UniDet's seat of T2I-CompBench.

UniDet has no maintained port. Rows of scores name this substitute: they are no official T2I-CompBench scores.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.checkpoints import hash_weights
from eval.networks.detectors import Detections
from eval.networks.loading import explain_failure, load_pretrained
from infra.errors import UserError

FAMILIES = ("owlv2", "owlvit")


class OpenVocabularyDetector:
    """Boxes for the names that it is asked for; each query keeps its best name (the processor's own reading)."""

    def __init__(
        self, path: str | Path, classes: Sequence[str], *, device: str = "cpu", keep_above: float = 0.05
    ) -> None:
        import torch
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        if not classes:
            raise UserError("an open-vocabulary detector needs names to look for; got none")
        self._model = load_pretrained(
            AutoModelForZeroShotObjectDetection, path, what="OWLv2", device=device, families=FAMILIES
        )
        self.name, self.version = f"{self._model.config.model_type} in place of UniDet", hash_weights(path)
        self.classes = tuple(dict.fromkeys(classes))
        self._torch, self._device, self._keep_above = torch, device, keep_above
        with explain_failure("the processor of OWLv2", path):
            self._processor: Any = AutoProcessor.from_pretrained(str(path), local_files_only=True)

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        return [self._detect_one(image) for image in images]

    def _detect_one(self, image: np.ndarray) -> Detections:
        names = list(self.classes)
        with self._torch.inference_mode():
            inputs = self._processor(text=[names], images=[image], return_tensors="pt").to(self._device)
            found = self._processor.post_process_grounded_object_detection(
                self._model(**inputs), threshold=self._keep_above, target_sizes=[image.shape[:2]]
            )[0]
        height, width = image.shape[:2]
        boxes_N4 = found["boxes"].float().cpu().numpy().reshape(-1, 4).clip(0, [width, height, width, height])
        scores_N = found["scores"].float().cpu().numpy()
        # the processor pads pictures to a square: a box that lies in the padding alone is none
        real = np.flatnonzero((boxes_N4[:, 2] > boxes_N4[:, 0]) & (boxes_N4[:, 3] > boxes_N4[:, 1]))
        order = real[np.argsort(-scores_N[real], kind="stable")]
        labels = tuple(names[int(found["labels"][i])] for i in order)
        return Detections(boxes_N4[order], scores_N[order], labels)
