"""How close a picture is to another one: PSNR, SSIM, LPIPS, each per picture and in float64 where it can be.

Shapes: N pairs, C channels, H and W pixels; pictures are uint8 RGB.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.checkpoints import hash_weights
from infra.errors import UserError

SIGMA, RADIUS = 1.5, 5  # SSIM's Gaussian window, cut to 11 x 11 as in Wang et al. 2004
SMALLEST = 2 * RADIUS + 1
K1, K2 = 0.01, 0.03
Backbone = Literal["alex", "vgg", "squeeze"]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures in dB: 10 log10(255^2 / MSE); infinity for equal ones."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity, Gaussian window, mean over channels and over the places where the window fits."""
    if min(a.shape[:2]) < SMALLEST:
        raise UserError(f"SSIM needs pictures of {SMALLEST} pixels a side or more, found {a.shape[:2]}")
    x, y = (torch.from_numpy(np.array(p)).permute(2, 0, 1).double()[:, None] for p in (a, b))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    cov = _blur(x * y) - mean_x * mean_y
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    value = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(value.mean())


def _blur(x_C1HW: Tensor) -> Tensor:
    taps = torch.exp(-0.5 * (torch.arange(-RADIUS, RADIUS + 1, dtype=x_C1HW.dtype) / SIGMA) ** 2)
    taps = taps / taps.sum()
    return F.conv2d(F.conv2d(x_C1HW, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))


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
