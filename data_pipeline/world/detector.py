"""The world's detector: class, box, instance mask and calibrated score of each drawing in a 64x64 scene.

Anchor-free, one grid of cells at stride 4. In training an object's centre spreads a weight of 1 over its four nearest
cells (bilinear), and the network learns those weights by cross entropy. A detection's score is the sum of the weights
around a peak: the probability that the object is there. A box is given by the distances from its cell to its four
edges. A mask is a weighted sum of prototypes that all objects of the image share (after YOLACT, arXiv 1904.02689).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.codec import from_json, to_json
from infra.errors import UserError

# Shapes: B images, C channels, H and W pixels, G grid cells per side, K classes, P prototypes, N objects.
STRIDE = 4
MAX_DETECTIONS = 48


@dataclass(frozen=True)
class Detection:
    """One object: class name, box x1 y1 x2 y2 in pixels of the image, mask (H, W) bool, score in 0..1."""

    name: str
    box: tuple[float, float, float, float]
    mask: np.ndarray
    score: float


@dataclass(frozen=True)
class DetectorConfig:
    """Everything that rebuilds the network; `temperature` divides the class logits (fitted after training)."""

    classes: tuple[str, ...]
    image_size: int = 64
    widths: tuple[int, int, int] = (24, 48, 96)
    num_prototypes: int = 12
    temperature: float = 1.0


class DetectorOutput(NamedTuple):
    """What the network computes for a batch: of each cell its class logits, edge distances and prototype weights; of
    each image its prototypes."""

    logit_BKGG: Tensor
    edges_B4GG: Tensor  # distances from the cell's centre to the left, top, right and bottom edge, in pixels
    coefficients_BPGG: Tensor
    prototypes_BPHW: Tensor


def _conv(num_in: int, num_out: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(num_in, num_out, size, stride, size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(num_out), nn.SiLU())


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _conv(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.silu(x_BCHW + self.second(self.first(x_BCHW)))


class WorldDetector(nn.Module):
    """For training call it on the float images that `normalise` gives; otherwise use `detect` on uint8 images."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        narrow, middle, wide = config.widths
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), _conv(12, narrow), _Residual(narrow))  # stride 2
        self.down4 = nn.Sequential(_conv(narrow, middle, 3, 2), _Residual(middle), _Residual(middle))
        self.down8 = nn.Sequential(_conv(middle, wide, 3, 2), _Residual(wide), _Residual(wide))
        self.context = nn.Conv2d(wide, middle, 1)
        self.merge4 = _Residual(middle)
        self.head = _conv(middle, 2 * middle)
        self.logit = nn.Conv2d(2 * middle, len(config.classes), 1)
        self.edges = nn.Conv2d(2 * middle, 4, 1)
        self.coefficients = nn.Conv2d(2 * middle, config.num_prototypes, 1)
        self.fine = nn.Conv2d(middle, narrow, 1)
        self.merge2 = _conv(narrow, narrow)
        self.prototypes = nn.Sequential(nn.Conv2d(narrow, 4 * config.num_prototypes, 3, 1, 1), nn.PixelShuffle(2))
        nn.init.constant_(self.logit.bias, -6.0)  # type: ignore[arg-type]  # the prior: most cells are empty
        nn.init.constant_(self.edges.bias, 2.3)  # type: ignore[arg-type]  # exp(2.3): 10 pixels
        self.to(memory_format=torch.channels_last)

    def forward(self, x_BCHW: Tensor) -> DetectorOutput:
        # `at2` and `at4` are features at strides 2 and 4. Those of each coarser stride are added to the finer ones.
        at2 = self.stem(x_BCHW.contiguous(memory_format=torch.channels_last))
        at4 = self.down4(at2)
        at4 = self.merge4(at4 + F.interpolate(self.context(self.down8(at4)), scale_factor=2.0, mode="nearest"))
        at2 = self.merge2(at2 + F.interpolate(self.fine(at4), scale_factor=2.0, mode="nearest"))
        h = self.head(at4)
        edges = self.edges(h).clamp(max=4.5).exp()  # at most 90 pixels, more than a scene is wide
        return DetectorOutput(self.logit(h), edges, self.coefficients(h), self.prototypes(at2))

    def compute_mask_logits(self, output: DetectorOutput, cells_N3: Tensor) -> Tensor:
        """Mask logits (N, H, W) of the objects whose cells are given as (image, row, column)."""
        image, row, column = cells_N3.unbind(1)
        coefficients_NP = output.coefficients_BPGG[image, :, row, column]
        return torch.einsum("np,nphw->nhw", coefficients_NP, output.prototypes_BPHW[image])

    @torch.inference_mode()
    def detect(self, images: np.ndarray, *, min_score: float = 0.05, batch: int = 64) -> list[list[Detection]]:
        """Detections of each uint8 image (N, H, W, 3), best score first; UserError for another shape or type.

        Images of another size than the network's are resized for it; boxes (pixels) and masks are of the size given.
        `min_score`: lower scores are left out. `batch`: images per forward pass.
        """
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise UserError(f"detect() found {images.dtype} {images.shape}; it takes uint8 images (N, H, W, 3)")
        self.eval()
        detections: list[list[Detection]] = []
        for start in range(0, len(images), batch):
            chunk = images[start : start + batch]
            output = self(normalise(chunk, self.config.image_size))
            peaks = _find_peaks(output.logit_BKGG / self.config.temperature, min_score)
            detections += [self._read(output, peaks, i, chunk.shape[1:3]) for i in range(len(chunk))]
        return detections

    def _read(
        self, output: DetectorOutput, peaks: tuple[Tensor, Tensor], i: int, size: Sequence[int]
    ) -> list[Detection]:
        """The detections of image `i` of a batch. `peaks`: what `_find_peaks` gave; `size`: height and width of the
        image."""
        score_KGG, keep_KGG = peaks[0][i], peaks[1][i]
        cells_N3 = keep_KGG.nonzero()
        scores = score_KGG[keep_KGG]
        order = scores.argsort(descending=True, stable=True)[:MAX_DETECTIONS]
        cells_N3, scores = cells_N3[order], scores[order]
        if not len(cells_N3):
            return []
        class_N, row, column = cells_N3.unbind(1)
        boxes_N4 = make_boxes(output.edges_B4GG[i, :, row, column].T, row, column)
        boxes_N4 = boxes_N4.clamp(0, self.config.image_size)
        image = torch.full_like(row, i)
        masks_NHW = self.compute_mask_logits(output, torch.stack([image, row, column], 1)) > 0
        masks_NHW &= make_windows(boxes_N4, self.config.image_size, margin=1.0)
        if tuple(size) != masks_NHW.shape[1:]:
            masks_NHW = F.interpolate(masks_NHW[:, None].float(), size=tuple(size), mode="nearest")[:, 0] > 0.5
        scale = torch.tensor([size[1], size[0], size[1], size[0]]) / self.config.image_size
        kept: list[Detection] = []
        boxes = (boxes_N4 * scale).tolist()
        for k, number in enumerate(class_N.tolist()):
            box = (boxes[k][0], boxes[k][1], boxes[k][2], boxes[k][3])
            # Non-maximum suppression within a class: a box of the same object with a better score is kept already.
            duplicate = any(d.name == self.config.classes[number] and compute_iou(d.box, box) > 0.6 for d in kept)
            if not duplicate:
                mask = masks_NHW[k].numpy()
                kept.append(Detection(self.config.classes[number], box, mask, float(scores[k])))
        return kept

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors (half precision)."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(to_json(self.config), indent=1) + "\n")
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> WorldDetector:
        """The detector of a folder with config.json and model.safetensors, in fp32 and eval mode. UserError where there
        is no such folder."""
        from safetensors.torch import load_file

        file = Path(folder) / "config.json"
        if not file.is_file():
            raise UserError(f"no detector at {folder}: expected a folder with config.json and model.safetensors")
        detector = cls(from_json(DetectorConfig, file.read_bytes(), where=str(file)))
        detector.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return detector.eval()


def normalise(images: np.ndarray, size: int) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, size, size) in -1..1, channels last in memory."""
    x_BCHW = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
    if x_BCHW.shape[2:] != (size, size):
        x_BCHW = F.interpolate(x_BCHW, size=(size, size), mode="bilinear", antialias=True)
    return x_BCHW


def compute_centre_weights(boxes_N4: Tensor, num_cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and weights, each (N, 4), of the four cells nearest to each box's centre. The weights are bilinear
    and sum to 1. Boxes are x1 y1 x2 y2 in pixels; `num_cells`: cells per side of the grid."""
    # In units of cells, with 0 at the centre of the first. Below the last centre, so that low + 1 is a cell.
    centre_N2 = ((boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2 / STRIDE - 0.5).clamp(0, num_cells - 1.001)
    low_N2 = centre_N2.floor()
    fraction_N2 = centre_N2 - low_N2
    dx = torch.tensor([0, 1, 0, 1])
    dy = torch.tensor([0, 0, 1, 1])
    weight_x = torch.where(dx == 1, fraction_N2[:, :1], 1 - fraction_N2[:, :1])
    weight_y = torch.where(dy == 1, fraction_N2[:, 1:], 1 - fraction_N2[:, 1:])
    return low_N2[:, 1:].long() + dy, low_N2[:, :1].long() + dx, weight_x * weight_y


def make_boxes(edges_N4: Tensor, row_N: Tensor, column_N: Tensor) -> Tensor:
    """Boxes (N, 4), x1 y1 x2 y2 in pixels, from the edge distances (pixels) at cells of the grid."""
    x, y = (column_N + 0.5) * STRIDE, (row_N + 0.5) * STRIDE
    left, top, right, bottom = edges_N4.unbind(1)
    return torch.stack([x - left, y - top, x + right, y + bottom], 1)


def make_windows(boxes_N4: Tensor, size: int, *, margin: float) -> Tensor:
    """Boolean (N, size, size): pixels whose centre lies inside the box grown by `margin` pixels on each side."""
    centre = torch.arange(size) + 0.5
    x1, y1, x2, y2 = (boxes_N4 + torch.tensor([-margin, -margin, margin, margin])).unbind(1)
    across = (centre >= x1[:, None]) & (centre <= x2[:, None])
    down = (centre >= y1[:, None]) & (centre <= y2[:, None])
    return down[:, :, None] & across[:, None, :]


def compute_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes x1 y1 x2 y2."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    return overlap / union if union > 0 else 0.0


def _find_peaks(logit_BKGG: Tensor, min_score: float) -> tuple[Tensor, Tensor]:
    """The score of each cell and class, and which cells are peaks with a score above `min_score`; both (B, K, G, G).

    A score is the sum of the weights in the 3x3 cells around: the four that an object's weight was spread over are
    among them. A peak is the largest of its 3x3 cells.
    """
    p_BKGG = logit_BKGG.sigmoid()
    score_BKGG = (F.avg_pool2d(p_BKGG, 3, 1, 1) * 9).clamp(max=1.0)
    is_peak = (p_BKGG == F.max_pool2d(p_BKGG, 3, 1, 1)) & (score_BKGG > min_score)
    return score_BKGG, is_peak
