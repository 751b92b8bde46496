"""Relative depth of images for T2I-CompBench++: the network DPT, from a transformers folder, used as in the benchmark.

Shapes: H and W are pixels of UniDet's input, an image resized to a short side of 479 and a long side of at most 480.
The boxes of the detector UniDet are in these pixels too, so that depth can be read inside a box.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from data_pipeline.checkpoints import hash_weights
from eval.networks.loading import load_pretrained

# Weights that MiDaS' files lack and no forward pass reads: the first fusion layer has no residual input.
UNUSED = ("neck.fusion_stage.layers.0.residual_layer1.",)
INPUT_SIDE = 480  # pixels; the official code resizes to a square of this side, whatever the checkpoint was trained at


class Depth(Protocol):
    """A network that estimates how near each pixel is. `name` and `version` (a hash of its weights) identify it."""

    name: str
    version: str

    def of(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """For each uint8 image (h, w, 3) of any size its depth map (H, W), float32 from 0 to 1; larger is nearer."""
        ...


class DptDepth:
    """Depth by a folder of transformers' DPTForDepthEstimation. The benchmark uses DPT-hybrid MiDaS, which is
    Intel/dpt-hybrid-midas on the hub. UserError for a folder that lacks weights."""

    name = "dpt"

    def __init__(self, path: str | Path, *, device: str = "cpu", side: int = INPUT_SIDE) -> None:
        from transformers import DPTForDepthEstimation

        model: Any = load_pretrained(DPTForDepthEstimation, path, what="DPT", device=device, unused=UNUSED)
        if model.config.is_hybrid:  # it refuses other sizes than its own, although its positions can be resized
            model.dpt.embeddings.image_size = (side, side)
        self._model, self._device, self._side = model, device, side
        self.version = f"{hash_weights(path)}@{side}"

    @torch.inference_mode()
    def of(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self._estimate_one(image) for image in images]

    def _estimate_one(self, image: np.ndarray) -> np.ndarray:
        """As the official code: resize to a square, scale pixels to -1..1, scale the depths to 0..255, round down."""
        picture = Image.fromarray(image).resize((self._side, self._side), Image.Resampling.BILINEAR)
        x_1CHW = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float().div(255).sub(0.5).div(0.5)
        near_HW = self._model(pixel_values=x_1CHW.to(self._device)).predicted_depth[0].float().cpu()
        spread = near_HW.max() - near_HW.min()
        near_HW = (near_HW - near_HW.min()) / spread if spread > 0 else torch.zeros_like(near_HW)
        sized = torch.nn.functional.interpolate(
            near_HW[None, None], size=image.shape[:2], mode="bilinear", align_corners=True
        )
        return to_frame((255 * sized[0, 0]).to(torch.uint8).numpy())


def to_frame(depth_HW: np.ndarray) -> np.ndarray:
    """An 8-bit depth picture (h, w), as the official code stores it, as float32 (H, W) from 0 to 1."""
    from torchvision.transforms.functional import resize

    picture = Image.fromarray(np.asarray(depth_HW, dtype=np.uint8))
    return np.asarray(resize(picture, 479, max_size=480), dtype=np.float32) / 255  # type: ignore[arg-type]
