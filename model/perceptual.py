"""How alike two pictures look to a trained network: LPIPS, and distances of any vision model's features.

All are differentiable, frozen, and read from local files.
"""
# Shapes: B pictures, N places in a layer of features, F features at each place.

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.errors import UserError

LpipsNet = Literal["alex", "vgg", "squeeze"]
PERCEPTUAL = ("features", *(f"lpips-{net}" for net in get_args(LpipsNet)))
LPIPS_SIDE = 224  # 2-rectified flow++ resizes to it in its code


def load_lpips(backbone: str | Path, *, net: LpipsNet = "alex") -> nn.Module:
    """The lpips package's network: its own linear heads (v0.1), the backbone's ImageNet weights by path. Pictures in
    [-1, 1] in, (B, 1, 1, 1) out."""
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
        raise UserError(f"{backbone}: no {_name_in_torchvision(wrong)} of torchvision's {net}; wrong backbone weights")
    model.net.load_state_dict(state)
    return model.eval().requires_grad_(False)


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


class LpipsDistance(nn.Module):
    """LPIPS of pictures in [-1, 1] at 224 pixels, (B)."""

    def __init__(self, backbone: str | Path, *, net: LpipsNet) -> None:
        super().__init__()
        self.lpips = load_lpips(backbone, net=net)

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        a, b = (_resize(x, LPIPS_SIDE) for x in (a_BCHW, b_BCHW))
        return self.lpips(a, b).view(-1)


class VisionDistance(nn.Module):
    """Distance of features as LPIPS takes it, without learned heads, (B).

    The features of each place are scaled to length 1; squared differences are summed over features and averaged over
    places and layers. Pictures in [-1, 1] are resized to the model's side and normalised as it wants.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, layers: Callable[[Tensor], list[Tensor]], *, side: int, mean: Any, std: Any):
        super().__init__()
        self.model, self._layers, self.side = model.eval().requires_grad_(False), layers, side
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        both = [self._layers(((_resize(x, self.side) + 1) / 2 - self.mean) / self.std) for x in (a_BCHW, b_BCHW)]
        each = [
            (F.normalize(a_BNF, dim=-1) - F.normalize(b_BNF, dim=-1)).square().sum(-1).mean(1)
            for a_BNF, b_BNF in zip(*both, strict=True)
        ]
        return torch.stack(each).mean(0)


def _resize(x_BCHW: Tensor, side: int) -> Tensor:
    if x_BCHW.shape[-2:] == (side, side):
        return x_BCHW
    return F.interpolate(x_BCHW, size=(side, side), mode="bilinear", antialias=True, align_corners=False)


def load_perceptual(kind: str, path: str | Path) -> nn.Module:
    """A distance of two batches of pictures in [-1, 1], (B). `kind` features: a folder of open_clip or transformers;
    lpips-alex, lpips-vgg, lpips-squeeze: the file of the backbone's weights as torchvision has them."""
    if kind not in PERCEPTUAL:
        raise UserError(f"unknown perceptual distance {kind!r}; known: {', '.join(PERCEPTUAL)}")
    if kind != "features":
        net: Any = kind.removeprefix("lpips-")
        return LpipsDistance(path, net=net)
    if (Path(path) / "open_clip_config.json").is_file():
        return _load_open_clip(Path(path))
    if (Path(path) / "config.json").is_file():
        return _load_transformers(Path(path))
    raise UserError(f"no vision model at {path}: expected a folder of open_clip or transformers")


def _load_open_clip(folder: Path) -> VisionDistance:
    import open_clip

    try:
        visual: Any = open_clip.create_model_and_transforms(f"local-dir:{folder}")[0].visual
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot load the vision model at {folder}: {' '.join(str(error).split())[:300]}") from None

    def layers(x_BCHW: Tensor) -> list[Tensor]:
        found = visual.forward_intermediates(x_BCHW, intermediates_only=True, output_fmt="NLC")
        return list(found["image_intermediates"])

    side = visual.image_size[0] if isinstance(visual.image_size, tuple | list) else visual.image_size
    return VisionDistance(visual, layers, side=side, mean=visual.image_mean, std=visual.image_std)


def _load_transformers(folder: Path) -> VisionDistance:
    from transformers import AutoModel

    try:
        model: Any = AutoModel.from_pretrained(str(folder), local_files_only=True)
        preprocessing = json.loads((folder / "preprocessor_config.json").read_bytes())
        mean, std = preprocessing["image_mean"], preprocessing["image_std"]
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"cannot load the vision model at {folder}: {' '.join(str(error).split())[:300]}") from None
    vision = getattr(model, "vision_model", model)  # of CLIP and SigLIP; others are vision models themselves

    def layers(x_BCHW: Tensor) -> list[Tensor]:
        states = vision(pixel_values=x_BCHW, output_hidden_states=True).hidden_states[1:]
        return [x.flatten(2).mT if x.ndim == 4 else x for x in states]

    side = getattr(vision.config, "image_size", None) or LPIPS_SIDE
    return VisionDistance(vision, layers, side=side, mean=mean, std=std)
