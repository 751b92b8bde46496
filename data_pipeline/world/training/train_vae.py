"""Trains the world's autoencoder: `python -m data_pipeline.world.training.train vae --minutes 25 --seed 11`.

A diffusers `AutoencoderKL` with factor 4 and 8 latent channels. The loss is led by the squared error, because PSNR is
the promised figure. Latents that were shrunk must decode to the scene that was shrunk (EQ-VAE, Kouzelis et al. 2025,
arXiv 2502.09509): without it their spectrum is nearly white, and the flow that is trained on them draws crackle
where a shape should be. A small KL bounds their size. Last, with `--decoder-only`, the decoder learns to overlook
the errors that a generator leaves in its latents; the encoder, and with it every stored latent, stays as it is.
Shapes: B images, C channels, H and W pixels (or latent cells).
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.checkpoints import WORLD
from data_pipeline.images import stack_pixels
from data_pipeline.world.scenes import SIZE, make_scene
from data_pipeline.world.training.cards import Figure, read_training_line, write_card
from data_pipeline.world.training.fit import fit, logger
from infra.errors import UserError

BATCH = 2  # scenes a step
KL_WEIGHT = 1e-4
SHRINK_WEIGHT = 0.5
SHRINK_BY = (2, 4)
MOST_NOISE, NOISE = 0.3, 0.2
"""On latents, in their standard deviations: at most in a decoder-only training (uniform from none); when measured."""
CROP = SIZE // 2
CROP_SHARE = 0.6
"""Share of the time spent on crops (four in the place of one scene); whole scenes follow, as group norm sees them."""
CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [16, 32, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": SIZE,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def crop_object(seed: int, index: int) -> np.ndarray:
    """A half-size window around one object: most of a scene is plain background, which teaches little."""
    scene = make_scene(seed, index, split="vae")
    x1, y1, x2, y2 = scene.objects[index % len(scene.objects)].box
    shift_x, shift_y = index * 7919 % 25 - 12, index * 104729 % 25 - 12
    left = min(max(int(x1 + x2) // 2 - CROP // 2 + shift_x, 0), SIZE - CROP)
    top = min(max(int(y1 + y2) // 2 - CROP // 2 + shift_y, 0), SIZE - CROP)
    return scene.image[top : top + CROP, left : left + CROP]


def make_held_out(seed: int, start: int, count: int, *, seen: bool | None = None) -> Tensor:
    return stack_pixels([make_scene(seed, i, split="vae_val", seen=seen).image for i in range(start, start + count)])


@torch.no_grad()
def measure(vae: Any, *, seed: int = 0, num_scenes: int = 1000) -> dict[str, float]:
    """Held-out scenes (seen and unseen compositions) decoded to 8 bits: from the mode, and from noisy latents."""
    mses, differences, noisy = [], [], []
    rng = torch.Generator().manual_seed(seed)
    for start in range(0, num_scenes, 50):
        x_BCHW = make_held_out(seed, start, 50)
        z_BCHW = vae.encode(x_BCHW).latent_dist.mode()
        noise_BCHW = NOISE / vae.config.scaling_factor * torch.randn(z_BCHW.shape, generator=rng)
        y_BCHW = decode(vae, z_BCHW)
        mses.append(measure_mse(x_BCHW, y_BCHW))
        noisy.append(measure_mse(x_BCHW, decode(vae, z_BCHW + noise_BCHW)))
        differences.append(float((x_BCHW - y_BCHW).abs().div(2).mean()))
    mse_N = torch.cat(mses)
    psnr_N = -10 * mse_N.log10()
    return {
        "psnr": float(psnr_N.mean()),
        "psnr_of_mean_error": -10 * math.log10(float(mse_N.mean())),
        "psnr_5th_percentile": float(psnr_N.quantile(0.05)),
        "psnr_noisy": float((-10 * torch.cat(noisy).log10()).mean()),
        "mean_absolute_error": float(np.mean(differences)),
    }


def decode(vae: Any, z_BCHW: Tensor) -> Tensor:
    """Pictures in -1..1 as 8 bits show them."""
    y_BCHW: Tensor = vae.decode(z_BCHW).sample.clamp(-1, 1)
    return ((y_BCHW + 1) * 127.5).round() / 127.5 - 1


def measure_mse(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """Mean squared error of each picture, shape (B) in float64; pixels from -1 to 1 are scaled to 0 to 1 before."""
    return (x_BCHW - y_BCHW).div(2).square().mean((1, 2, 3)).double()


@torch.no_grad()
def measure_latents(vae: Any, *, seed: int, num_scenes: int = 2000) -> tuple[float, float]:
    """Shift and scale that give sampled latents of seen training scenes mean 0 and standard deviation 1."""
    rng = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, num_scenes, 50):
        x_BCHW = stack_pixels([make_scene(seed, i, split="vae_stats").image for i in range(start, start + 50)])
        parts.append(vae.encode(x_BCHW).latent_dist.sample(rng))
    latents = torch.cat(parts).double()
    return float(latents.mean()), float(1 / latents.std())


def train_vae(
    out: Path = WORLD / "vae",
    *,
    minutes: float = 25.0,
    seed: int = 11,
    channels: int = 8,
    decoder_only: bool = False,
    start_from: Path | None = None,
    lr: float = 1e-2,
) -> dict[str, float]:
    """Train, measure, write the diffusers folder with its model card; the held-out figures."""
    from diffusers import AutoencoderKL

    if decoder_only and start_from is None:
        raise UserError("--decoder-only keeps a trained encoder: give its folder as --start-from")
    torch.manual_seed(seed)
    vae: Any
    if start_from:
        given = AutoencoderKL.from_pretrained(start_from)
        channels, scale = given.config.latent_channels, given.config.scaling_factor
        # a fresh module: diffusers would write the path of the old one into the new config
        vae = AutoencoderKL(**CONFIG, latent_channels=channels)  # type: ignore[arg-type]
        vae.load_state_dict(given.float().state_dict())
    else:
        vae = AutoencoderKL(**CONFIG, latent_channels=channels)  # type: ignore[arg-type]
        # Start with almost no posterior noise: a fresh encoder's unit noise drowns its latents for many steps.
        torch.nn.init.constant_(vae.encoder.conv_out.bias[channels:], -5.0)
    vae = vae.to(memory_format=torch.channels_last)
    if decoder_only:
        vae.encoder.requires_grad_(False)
    begin = time.monotonic()

    def loss_of_step(step: int) -> Tensor:
        if time.monotonic() - begin < 60 * minutes * CROP_SHARE:
            images = [crop_object(seed, i) for i in range(step * 4 * BATCH, (step + 1) * 4 * BATCH)]
        else:
            images = [make_scene(seed, i, split="vae").image for i in range(step * BATCH, (step + 1) * BATCH)]
        x_BCHW = stack_pixels(images)
        return decoding_loss(vae, x_BCHW, scale=scale) if decoder_only else autoencoding_loss(vae, x_BCHW)

    average, steps = fit(vae, loss_of_step, minutes=minutes, muon_lr=lr)
    save(average, out, seed=seed)
    figures = measure(AutoencoderKL.from_pretrained(out))
    logger.info("%s", json.dumps(figures))
    options = f"--minutes {minutes:g} --seed {seed} --lr {lr:g}"
    options += " --decoder-only --start-from FOLDER" if decoder_only else f" --channels {channels}"
    command = f"`python -m data_pipeline.world.training.train vae {options}`"
    trained = f"{read_training_line(start_from)}{command}: {steps} steps of {BATCH} fresh scenes (or {4 * BATCH} crops)"
    _write_card(out, figures, channels=channels, trained=trained)
    return figures


def autoencoding_loss(vae: Any, x_BCHW: Tensor) -> Tensor:
    """Squared error of the scenes, and of shrunk scenes from shrunk latents, with the KL of the posterior."""
    posterior = vae.encode(x_BCHW).latent_dist
    z_BCHW = posterior.sample()
    loss = F.mse_loss(vae.decode(z_BCHW).sample, x_BCHW)
    for by in SHRINK_BY:
        shrunk_BCHW = vae.decode(F.avg_pool2d(z_BCHW, by)).sample
        loss = loss + SHRINK_WEIGHT / len(SHRINK_BY) * F.mse_loss(shrunk_BCHW, F.avg_pool2d(x_BCHW, by))
    return loss + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()


def decoding_loss(vae: Any, x_BCHW: Tensor, *, scale: float) -> Tensor:
    """Squared error of scenes decoded from noisy latents; `scale` brings latents to standard deviation 1."""
    with torch.no_grad():
        z_BCHW = vae.encode(x_BCHW).latent_dist.mode()
    sigma_B111 = MOST_NOISE / scale * torch.rand(len(x_BCHW), 1, 1, 1)
    return F.mse_loss(vae.decode(z_BCHW + sigma_B111 * torch.randn_like(z_BCHW)).sample, x_BCHW)


def save(vae: Any, out: Path, *, seed: int) -> None:
    """The diffusers folder in fp16, its latent statistics measured on what will be loaded again."""
    from diffusers import AutoencoderKL

    vae.half().save_pretrained(out)
    shift, scale = measure_latents(AutoencoderKL.from_pretrained(out), seed=seed)
    vae.register_to_config(shift_factor=round(shift, 6), scaling_factor=round(scale, 6))
    vae.save_pretrained(out)


def _write_card(out: Path, figures: dict[str, float], *, channels: int, trained: str) -> None:
    write_card(
        out,
        title="World autoencoder",
        what=f"A diffusers `AutoencoderKL` (factor 4, 64x64 pixels to {channels}x16x16), fp16 weights.",
        load="`diffusers.AutoencoderKL.from_pretrained(PATH)`",
        trained=f"{trained}, split `vae`, seen compositions, {torch.get_num_threads()} thread, fp32",
        figures=[
            Figure("PSNR, mean over scenes", figures["psnr"], "dB"),
            Figure("PSNR of the mean squared error", figures["psnr_of_mean_error"], "dB"),
            Figure("PSNR, 5th percentile of scenes", figures["psnr_5th_percentile"], "dB"),
            Figure(f"PSNR from latents with noise of {NOISE} deviations", figures["psnr_noisy"], "dB"),
            Figure("mean absolute error (0..1)", figures["mean_absolute_error"], ""),
        ],
        scored="1,000 scenes of split `vae_val`, seed 0, seen and unseen compositions, decoded from the mode, 8 bits",
    )
