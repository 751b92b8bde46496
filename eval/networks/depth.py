"""Relative depth of images for T2I-CompBench++: DPT through transformers, by path, prepared as the benchmark does.

Shapes: H and W are the pixels of UniDet's frame (short side 479, long side at most 480), where its boxes live too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from data_pipeline.checkpoints import hash_weights
from eval.networks.loading import load_pretrained

UNUSED = ("neck.fusion_stage.layers.0.residual_layer1.",)  # MiDaS' files lack it: the first fusion has no residual
INPUT_SIDE = 480  # official: squeezed to 480 x 480, mean and std 0.5, whatever the checkpoint was trained at


class Depth(Protocol):
    """A network that tells how near each pixel is."""

    name: str
    version: str

    def of(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """For each image its depth map (H, W) from 0 to 1; larger is nearer; pixels of UniDet's frame (see above)."""
        ...


class DptDepth:
    """A DPTForDepthEstimation folder (the benchmark uses DPT-hybrid MiDaS: Intel/dpt-hybrid-midas on the hub)."""

    name = "dpt"

    def __init__(self, path: str | Path, *, device: str = "cpu", side: int = INPUT_SIDE) -> None:
        from transformers import DPTForDepthEstimation

        model: Any = load_pretrained(DPTForDepthEstimation, path, what="DPT", device=device, unused=UNUSED)
        if model.config.is_hybrid:  # it refuses other sizes than its own, though it resizes its positions
            model.dpt.embeddings.image_size = (side, side)
        self._model, self._device, self._side = model, device, side
        self.version = f"{hash_weights(path)}@{side}"

    @torch.inference_mode()
    def of(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self._estimate_one(image) for image in images]

    def _estimate_one(self, image: np.ndarray) -> np.ndarray:
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
    """An 8-bit depth picture (what the official code stores) as floats 0..1 in UniDet's frame."""
    from torchvision.transforms.functional import resize

    picture = Image.fromarray(np.asarray(depth_HW, dtype=np.uint8))
    return np.asarray(resize(picture, 479, max_size=480), dtype=np.float32) / 255  # type: ignore[arg-type]
