"""How far apart two pictures look: LPIPS, or the cosine distance of a CLIP's features. Shapes: N pairs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from data_pipeline.checkpoints import hash_weights
from eval.networks.clip_model import ClipModel, normalize_rows
from model.perceptual import LpipsNet, load_lpips


class PictureDistance(Protocol):
    """A distance of pictures, with a name and a version for the protocol."""

    name: str
    version: str

    def distances(self, a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> np.ndarray:
        """(N,) for pairs of uint8 RGB pictures of one size."""
        ...


class ClipDistance:
    """1 - cosine of two pictures' CLIP embeddings: for the world, whose pictures are no photographs and too small for
    LPIPS' ImageNet features."""

    def __init__(self, clip: ClipModel) -> None:
        self._clip, self.name, self.version = clip, f"1 - cosine, {clip.name}", clip.version

    def distances(self, a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> np.ndarray:
        """(N,) for pairs of uint8 RGB pictures; 0 to 2."""
        x_NE, y_NE = (normalize_rows(self._clip.images(pictures).double()) for pictures in (a, b))
        return (1 - (x_NE * y_NE).sum(-1)).numpy()


class Lpips:
    """The learned perceptual distance: heads from the lpips package (v0.1), the backbone's ImageNet weights by path."""

    def __init__(self, backbone: str | Path, *, net: LpipsNet = "alex", device: str = "cpu") -> None:
        model: Any = load_lpips(backbone, net=net)
        self._model, self._device = model.to(device), device
        self.name, self.version = f"lpips/{net}", hash_weights(backbone)

    @torch.inference_mode()
    def distances(self, a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> np.ndarray:
        """(N,) for pairs of one size."""
        x, y = (torch.from_numpy(np.stack(p)).permute(0, 3, 1, 2).float().div(127.5).sub(1) for p in (a, b))
        return self._model(x.to(self._device), y.to(self._device)).double().view(-1).cpu().numpy()
