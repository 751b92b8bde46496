"""How close a picture is to another one: PSNR and SSIM, each per picture and in float64.

Shapes: C channels, H and W pixels; pictures are uint8 RGB.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from infra.errors import UserError

SIGMA, RADIUS = 1.5, 5  # SSIM's Gaussian window, cut to 11 x 11 as in Wang et al. 2004
SMALLEST = 2 * RADIUS + 1
K1, K2 = 0.01, 0.03


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
