"""How far apart two pictures look: LPIPS, or the cosine distance of a CLIP's features. Shapes: N pairs."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from data_pipeline.checkpoints import hash_weights
from eval.networks.clip_model import ClipModel, normalize_rows
from infra.errors import UserError

Backbone = Literal["alex", "vgg", "squeeze"]


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

    def __init__(self, backbone: str | Path, *, net: Backbone = "alex", device: str = "cpu") -> None:
        try:
            import lpips
        except ImportError as error:
            raise UserError("LPIPS needs its package: pip install lpips") from error
        given = _read_backbone(Path(backbone))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of torchvision, at how lpips calls it
            model: Any = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        features = model.net.state_dict()
        state = {name: given.get(_name_in_torchvision(name)) for name in features}
        wrong = next((n for n, tensor in state.items() if tensor is None or tensor.shape != features[n].shape), None)
        if wrong is not None:
            raise UserError(
                f"{backbone}: no {_name_in_torchvision(wrong)} of torchvision's {net}; wrong backbone weights"
            )
        model.net.load_state_dict(state)
        self._model, self._device = model.to(device).eval().requires_grad_(False), device
        self.name, self.version = f"lpips/{net}", hash_weights(backbone)

    @torch.inference_mode()
    def distances(self, a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> np.ndarray:
        """(N,) for pairs of one size."""
        x, y = (torch.from_numpy(np.stack(p)).permute(0, 3, 1, 2).float().div(127.5).sub(1) for p in (a, b))
        return self._model(x.to(self._device), y.to(self._device)).double().view(-1).cpu().numpy()


def _name_in_torchvision(name: str) -> str:
    """lpips cuts the features into slices and keeps their numbers: slice2.3.weight is features.3.weight."""
    return "features." + name.split(".", 1)[1]


def _read_backbone(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds
        raise UserError(f"{path}: not backbone weights of LPIPS ({type(error).__name__}: {error})") from error
