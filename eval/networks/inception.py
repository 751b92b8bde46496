"""Inception-v3 features for FID, by path, under the conventions of clean-fid or of torch-fidelity.

The network is TensorFlow's of 2015 as ported by pytorch-fid (pt_inception-2015-12-05-6726825d.pth, 1,008 classes):
torchvision's Inception-v3 with other pooling in nine blocks. Features are the 2,048 of the last average pool.
"""
# Shapes: N images, C channels, H and W pixels, E = 2,048 features.

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data_pipeline.checkpoints import hash_weights
from eval.networks.loading import explain_failure
from infra.errors import UserError

SIDE, BATCH, CLASSES = 299, 32, 1008
Convention = Literal["clean-fid", "torch-fidelity"]


class InceptionFeatures:
    """Pictures (uint8 RGB, any size) to features (N, 2048)."""

    def __init__(self, path: str | Path, *, convention: Convention = "clean-fid", device: str = "cpu") -> None:
        self.name = f"inception/{convention}"
        self.version = hash_weights(path)
        self._convention, self._device = convention, device
        self._net = build_inception()
        self._net.load_state_dict(_read(Path(path), self._net.state_dict()))
        with explain_failure("Inception", path):
            self._net.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def images(self, images: Sequence[np.ndarray]) -> Tensor:
        chunks = []
        for start in range(0, len(images), BATCH):
            x_NCHW = torch.stack([self._resize(image) for image in images[start : start + BATCH]]).to(self._device)
            chunks.append(self._net((x_NCHW - 128) / 128).cpu())
        return torch.cat(chunks)

    def _resize(self, image: np.ndarray) -> Tensor:
        return resize_clean(image) if self._convention == "clean-fid" else resize_tensorflow(image)


def resize_clean(image: np.ndarray) -> Tensor:
    """clean-fid: PIL's bicubic with antialiasing, each channel in float32, no rounding; (C, 299, 299) in 0..255."""
    channels = [Image.fromarray(np.ascontiguousarray(image[..., c]).astype(np.float32)) for c in range(3)]
    sized = [np.asarray(channel.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(sized)).clamp(0, 255)


def resize_tensorflow(image: np.ndarray, side: int = SIDE) -> Tensor:
    """torch-fidelity: bilinear as in TensorFlow 1: corners not aligned, no half pixel, no antialiasing."""
    x_CHW = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float()
    for axis in (1, 2):
        place = torch.arange(side, dtype=torch.float32) * (x_CHW.shape[axis] / side)
        low = place.long()
        high = (low + 1).clamp(max=x_CHW.shape[axis] - 1)
        weight = (place - low).view(-1, 1) if axis == 1 else place - low
        x_CHW = torch.lerp(x_CHW.index_select(axis, low), x_CHW.index_select(axis, high), weight)
    return x_CHW


def build_inception() -> Any:
    """torchvision's Inception-v3 with the pooling of the TensorFlow graph, ending in the 2,048 pooled features."""
    from torchvision.models.inception import Inception3, InceptionA, InceptionC, InceptionE

    class PoolA(InceptionA):
        """Average pool without the padding's zeros."""

        def _forward(self, x: Tensor) -> list[Tensor]:
            wide = self.branch5x5_2(self.branch5x5_1(x))
            double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
            return [self.branch1x1(x), wide, double, self.branch_pool(_average(x))]

    class PoolC(InceptionC):
        """Average pool without the padding's zeros."""

        def _forward(self, x: Tensor) -> list[Tensor]:
            seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
            double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
            double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
            return [self.branch1x1(x), seven, double, self.branch_pool(_average(x))]

    class PoolE(InceptionE):
        """The first averages without the padding's zeros, the last one takes the maximum (a slip of the 2015 graph)."""

        last = False

        def _forward(self, x: Tensor) -> list[Tensor]:
            three, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
            pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.last else _average(x)
            return [
                self.branch1x1(x),
                torch.cat([self.branch3x3_2a(three), self.branch3x3_2b(three)], 1),
                torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], 1),
                self.branch_pool(pooled),
            ]

    net: Any = Inception3(num_classes=CLASSES, aux_logits=False, transform_input=False, init_weights=False)
    for name, width in (("Mixed_5b", (192, 32)), ("Mixed_5c", (256, 64)), ("Mixed_5d", (288, 64))):
        setattr(net, name, PoolA(width[0], pool_features=width[1]))
    for name, channels in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        setattr(net, name, PoolC(768, channels_7x7=channels))
    net.Mixed_7b, net.Mixed_7c = PoolE(1280), PoolE(2048)
    net.Mixed_7c.last = True
    net.dropout, net.fc = torch.nn.Identity(), torch.nn.Identity()
    return net


def _average(x_NCHW: Tensor) -> Tensor:
    return F.avg_pool2d(x_NCHW, 3, stride=1, padding=1, count_include_pad=False)


def _read(path: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors; the classifier is left out, the batch counters of old files are not asked for."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds
        raise UserError(f"{path}: not Inception weights ({type(error).__name__}: {error})") from error
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} tensors of Inception-v3, e.g. {missing[0]}: expected pytorch-fid's "
            "pt_inception-2015-12-05-6726825d.pth (torch-fidelity's file of the same hash), or it as safetensors"
        )
    wrong = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    if wrong:
        raise UserError(f"{path}: {wrong[0]} is {tuple(state[wrong[0]].shape)}, not {tuple(wanted[wrong[0]].shape)}")
    return {k: state.get(k, tensor) for k, tensor in wanted.items()}
