"""Latents of images: moments as they are stored, sampling from them, normalising, decoding.

Shards keep the autoencoder's moments (mean, then standard deviation, in float16), not normalised. Shift and scale are
applied on load, so changing them needs no new data. SD3: latent = (raw - 0.0609) * 1.5305.
"""
# Shapes: B batch, C latent channels, H and W height and width of the latent (in `images_BCHW`: 3 channels, pixels),
# M = 2C channels of moments.

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infra.codec import from_json
from infra.errors import UserError, list_some


def load_vae(path: str | Path) -> Any:
    """diffusers' AutoencoderKL from a local folder (config.json and weights), in eval mode."""
    from diffusers import AutoencoderKL

    if not (Path(path) / "config.json").is_file():
        raise UserError(f"no autoencoder at {path}: expected a diffusers folder with config.json and weights")
    config = from_json(dict[str, Any], (Path(path) / "config.json").read_bytes(), where=f"{path}/config.json")
    if config.get("_class_name") != "AutoencoderKL":
        raise UserError(f"{path}: config.json of class {config.get('_class_name')!r}, expected 'AutoencoderKL'")
    try:
        vae, found = AutoencoderKL.from_pretrained(str(path), local_files_only=True, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot load the autoencoder at {path}: {' '.join(str(error).split())[:300]}") from None
    if found["missing_keys"]:
        raise UserError(f"cannot load the autoencoder at {path}: it lacks {list_some(sorted(found['missing_keys']))}")
    return vae.eval().requires_grad_(False)


@dataclass(frozen=True)
class Latents:
    """How one autoencoder's moments become network inputs: (raw - shift) * scale, at 1/factor of the pixels.

    The "vae" entry of weights metadata and of dataset.json.
    """

    checkpoint: str
    channels: int
    factor: int
    shift: float
    scale: float

    @staticmethod
    def of(config: Any, checkpoint: str) -> Latents:
        """From the autoencoder's own config."""
        return Latents(
            checkpoint=checkpoint,
            channels=config.latent_channels,
            factor=2 ** (len(config.block_out_channels) - 1),
            shift=config.shift_factor or 0.0,
            scale=config.scaling_factor,
        )

    def sample(self, moments_BMHW: Tensor, noise_BCHW: Tensor) -> Tensor:
        """A latent, not normalised, drawn from stored moments: mean + std * noise."""
        mean, std = moments_BMHW.float().chunk(2, dim=1)
        return mean + std * noise_BCHW

    def normalise(self, raw_BCHW: Tensor) -> Tensor:
        return (raw_BCHW - self.shift) * self.scale

    def sample_normalised_(self, noise_BCHW: Tensor, moments_BMHW: Tensor) -> Tensor:
        """`normalise(sample(moments, noise))` with the same bits, written over the noise; moments are float32."""
        mean, std = moments_BMHW.chunk(2, dim=1)
        return noise_BCHW.mul_(std).add_(mean).sub_(self.shift).mul_(self.scale)

    def denormalise(self, latent_BCHW: Tensor) -> Tensor:
        return latent_BCHW / self.scale + self.shift

    @torch.no_grad()
    def encode(self, vae: nn.Module, images_BCHW: Tensor) -> Tensor:
        """Moments (mean then standard deviation, fp16) of images in [-1, 1]."""
        posterior = vae.encode(images_BCHW).latent_dist  # type: ignore[operator]
        return torch.cat([posterior.mean, posterior.std], dim=1).half()

    @torch.no_grad()
    def decode(self, vae: nn.Module, latent_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1] from normalised latents."""
        return vae.decode(self.denormalise(latent_BCHW)).sample.clamp(-1, 1)  # type: ignore[operator]
