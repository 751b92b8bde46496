"""OpenCLIP models as judges, and GenEval's color classifier on top of them.

Shapes: N images or texts, E embedding width, T templates.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.weights import weights_hash
from eval.judging.geneval_prompts import COLORS
from eval.metrics.geneval.rules import Found
from eval.networks.detectors import Detections
from eval.networks.loading import loading
from infra.errors import UserError, nearest

BATCH = 64
MASKED_OUT = "#999999"
COLOR_TEMPLATES = ("a photo of a {c} {name}", "a photo of a {c}-colored {name}", "a photo of a {c} object")


class ClipModel:
    """An OpenCLIP checkpoint: a folder with open_clip_config.json, or `ARCHITECTURE=FILE` such as ViT-L-14=clip.bin.

    A bare file is taken for OpenAI's, which were trained with QuickGELU; a folder's config says what its weights need.
    """

    def __init__(self, where: str | Path, *, device: str = "cpu") -> None:
        import open_clip

        arch, _, file = str(where).partition("=")
        name, pretrained = (arch, file) if file else (f"local-dir:{where}", None)
        if not Path(file or str(where)).exists():
            raise UserError(f"no CLIP checkpoint at {file or where}: give an OpenCLIP folder or ARCHITECTURE=FILE")
        if file and arch not in (known := open_clip.list_models()):
            raise UserError(f"open_clip knows no {arch!r}{nearest(arch, known)}; give ARCHITECTURE=FILE, or a folder")
        if not file and not (Path(where) / "open_clip_config.json").is_file():
            raise UserError(f"no open_clip_config.json in {where}: give an OpenCLIP folder or ARCHITECTURE=FILE")
        quick = bool(file) and "quickgelu" not in arch
        with loading("CLIP", where):
            model, _, self._transform = open_clip.create_model_and_transforms(
                name, pretrained=pretrained, force_quick_gelu=quick
            )
            self._model: Any = model.to(device).eval()
            self._tokenize = open_clip.get_tokenizer(name)
        self._device = device
        self.name, self.version = arch if file else Path(where).name, weights_hash(file or where)
        self._texts: dict[str, Tensor] = {}

    @torch.inference_mode()
    def images(self, images: Sequence[np.ndarray | Image.Image]) -> Tensor:
        """Unnormalised image embeddings (N, E), float32 on the CPU."""
        chunks = []
        for start in range(0, len(images), BATCH):
            pixels = [
                item if isinstance(item, Image.Image) else Image.fromarray(item)
                for item in images[start : start + BATCH]
            ]
            batch = torch.stack([self._transform(item) for item in pixels]).to(self._device)
            chunks.append(self._model.encode_image(batch).float().cpu())
        return torch.cat(chunks)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unnormalised text embeddings (N, E), float32 on the CPU; remembered, as prompts come back for every image."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._texts]
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            embedded = self._model.encode_text(self._tokenize(part).to(self._device)).float().cpu()
            self._texts.update(zip(part, embedded))
        return torch.stack([self._texts[text] for text in texts])

    def cosines(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
        """Cosine of each image with its own text, unscaled (N,)."""
        a_NE, b_NE = unit(self.images(images)), unit(self.texts(texts))
        return (a_NE * b_NE).sum(-1).double().numpy()


def unit(x_NE: Tensor) -> Tensor:
    return x_NE / x_NE.norm(dim=-1, keepdim=True)


class ClipColors:
    """GenEval's color of a detection: gray outside the mask, crop to the box, nearest of ten color prompts."""

    def __init__(self, clip: ClipModel) -> None:
        self._clip = clip
        self._heads: dict[str, Tensor] = {}

    def of(self, image: np.ndarray, detections: Detections, name: str, found: Sequence[Found]) -> list[str]:
        if not found:  # a clause that counts to 0
            return []
        crops = [
            masked_crop(image, item.box_5, None if detections.masks_NHW is None else detections.masks_NHW[item.row])
            for item in found
        ]
        logits_NC = unit(self._clip.images(crops)) @ self._head(name).T
        return [COLORS[int(index)] for index in logits_NC.argmax(1)]

    def _head(self, name: str) -> Tensor:
        """Class embeddings (10, E): unit templates averaged, then made unit again, as clip_benchmark does."""
        if name not in self._heads:
            prompts = [template.format(c=color, name=name) for color in COLORS for template in COLOR_TEMPLATES]
            head_CTE = unit(self._clip.texts(prompts)).unflatten(0, (len(COLORS), len(COLOR_TEMPLATES)))
            self._heads[name] = unit(head_CTE.mean(1))
        return self._heads[name]


def masked_crop(image: np.ndarray, box_5: np.ndarray, mask_HW: np.ndarray | None) -> Image.Image:
    """The detection alone on #999999, cropped to its box (PIL rounds the corners; at least one pixel is kept)."""
    picture = Image.fromarray(image)
    if mask_HW is not None:
        if mask_HW.shape != image.shape[:2]:
            raise UserError(f"instance mask of {mask_HW.shape} for an image of {image.shape[:2]}: a detector fault")
        blank = Image.new("RGB", picture.size, color=MASKED_OUT)
        picture = Image.composite(picture, blank, Image.fromarray(mask_HW))
    x1, y1, x2, y2 = (round(float(value)) for value in box_5[:4])
    return picture.crop((x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)))
