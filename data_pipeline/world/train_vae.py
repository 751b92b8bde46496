"""Trains the world's autoencoder: `python -m data_pipeline.world.train vae --minutes 25 --seed 11`.

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

from data_pipeline.world.cards import Figure, trained_line, write_card
from data_pipeline.world.fit import fit, logger
from data_pipeline.world.scenes import SIZE, make_scene

KL_WEIGHT = 1e-4
SHRINK_WEIGHT = 0.5
SHRINK_BY = (2, 4)
MOST_NOISE = 0.3
"""On the latents of a decoder-only training, in their standard deviations: uniform from none to this, per scene."""
CROP = SIZE // 2
CROP_SHARE = 0.6
"""Share of the time spent on crops (four in the place of one scene); whole scenes follow, as group norm sees them."""
CHANNELS = 8
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


def pixels(images: list[np.ndarray]) -> Tensor:
    """uint8 HxWx3 images to the autoencoder's range -1..1, channels last in memory."""
    x_BCHW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x_BCHW.to(memory_format=torch.channels_last)


def crop(seed: int, index: int) -> np.ndarray:
    """A half-size window around one object: most of a scene is plain background, which teaches little."""
    scene = make_scene(seed, index, split="vae")
    x1, y1, x2, y2 = scene.objects[index % len(scene.objects)].box
    shift_x, shift_y = index * 7919 % 25 - 12, index * 104729 % 25 - 12
    left = min(max(int(x1 + x2) // 2 - CROP // 2 + shift_x, 0), SIZE - CROP)
    top = min(max(int(y1 + y2) // 2 - CROP // 2 + shift_y, 0), SIZE - CROP)
    return scene.image[top : top + CROP, left : left + CROP]


def held_out(seed: int, start: int, count: int, *, seen: bool | None = None) -> Tensor:
    return pixels([make_scene(seed, i, split="vae_val", seen=seen).image for i in range(start, start + count)])


@torch.no_grad()
def measure(vae: Any, *, seed: int = 0, num_scenes: int = 1000) -> dict[str, float]:
    """Mean PSNR over held-out scenes (seen and unseen compositions), decoded from the mode and clamped to 8 bits."""
    psnrs, errors, differences = [], [], []
    for start in range(0, num_scenes, 50):
        x_BCHW = held_out(seed, start, 50)
        y_BCHW = vae.decode(vae.encode(x_BCHW).latent_dist.mode()).sample.clamp(-1, 1)
        y_BCHW = ((y_BCHW + 1) * 127.5).round() / 127.5 - 1
        mse_B = (x_BCHW - y_BCHW).div(2).square().mean((1, 2, 3)).double()
        psnrs += (-10 * mse_B.log10()).tolist()
        errors += mse_B.tolist()
        differences.append(float((x_BCHW - y_BCHW).abs().div(2).mean()))
    return {
        "psnr": float(np.mean(psnrs)),
        "psnr_of_mean_error": -10 * math.log10(float(np.mean(errors))),
        "psnr_5th_percentile": float(np.percentile(psnrs, 5)),
        "mean_absolute_error": float(np.mean(differences)),
    }


@torch.no_grad()
def latent_statistics(vae: Any, *, seed: int, num_scenes: int = 2000) -> tuple[float, float]:
    """Shift and scale that give sampled latents of seen training scenes mean 0 and standard deviation 1."""
    rng = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, num_scenes, 50):
        x_BCHW = pixels([make_scene(seed, i, split="vae_stats").image for i in range(start, start + 50)])
        parts.append(vae.encode(x_BCHW).latent_dist.sample(rng))
    latents = torch.cat(parts).double()
    return float(latents.mean()), float(1 / latents.std())


def train_vae(
    out: Path,
    *,
    minutes: float,
    seed: int,
    channels: int = CHANNELS,
    decoder_only: bool = False,
    start_from: Path | None = None,
    lr: float = 1e-2,
    batch: int = 2,
) -> dict[str, float]:
    """Train, measure, write the diffusers folder with its model card; the held-out figures."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    history = trained_line(start_from)
    vae: Any
    if start_from:
        vae = AutoencoderKL.from_pretrained(start_from).float()
    else:
        vae = AutoencoderKL(**CONFIG, latent_channels=channels)  # type: ignore[arg-type]
        # Start with almost no posterior noise: a fresh encoder's unit noise drowns its latents for many steps.
        torch.nn.init.constant_(vae.encoder.conv_out.bias[channels:], -5.0)
    vae = vae.to(memory_format=torch.channels_last)
    if decoder_only:
        vae.encoder.requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)
    begin = time.monotonic()

    def loss_of_step(step: int) -> Tensor:
        if time.monotonic() - begin < 60 * minutes * CROP_SHARE:
            images = [crop(seed, i) for i in range(step * 4 * batch, (step + 1) * 4 * batch)]
        else:
            images = [make_scene(seed, i, split="vae").image for i in range(step * batch, (step + 1) * batch)]
        x_BCHW = pixels(images)
        posterior = vae.encode(x_BCHW).latent_dist
        if decoder_only:
            most = MOST_NOISE / vae.config.scaling_factor
            mode_BCHW = posterior.mode()
            sigma_B111 = most * torch.rand(len(images), 1, 1, 1, generator=rng)
            noisy_BCHW = mode_BCHW + sigma_B111 * torch.randn(mode_BCHW.shape, generator=rng)
            return F.mse_loss(vae.decode(noisy_BCHW).sample, x_BCHW)
        z_BCHW = posterior.sample()
        loss = F.mse_loss(vae.decode(z_BCHW).sample, x_BCHW)
        for by in SHRINK_BY:
            shrunk_BCHW = vae.decode(F.avg_pool2d(z_BCHW, by)).sample
            loss = loss + SHRINK_WEIGHT / len(SHRINK_BY) * F.mse_loss(shrunk_BCHW, F.avg_pool2d(x_BCHW, by))
        return loss + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()

    average, steps = fit(vae, loss_of_step, minutes=minutes, muon_lr=lr)
    save(average, out, seed=seed)
    figures = measure(AutoencoderKL.from_pretrained(out))
    logger.info("%s", json.dumps(figures))
    option = " --decoder-only" if decoder_only else ""
    command = f"`python -m data_pipeline.world.train vae --minutes {minutes:g} --seed {seed}{option}`"
    trained = f"{history}{command}: {steps} steps of {batch} fresh scenes (or {4 * batch} crops)"
    _card(out, figures, trained=trained)
    return figures


def save(vae: Any, out: Path, *, seed: int) -> None:
    """The diffusers folder in fp16, its latent statistics measured on what will be loaded again."""
    from diffusers import AutoencoderKL

    vae.half().save_pretrained(out)
    shift, scale = latent_statistics(AutoencoderKL.from_pretrained(out), seed=seed)
    vae.register_to_config(shift_factor=round(shift, 6), scaling_factor=round(scale, 6))
    vae.save_pretrained(out)


def _card(out: Path, figures: dict[str, float], *, trained: str) -> None:
    write_card(
        out,
        title="World autoencoder",
        what="A diffusers `AutoencoderKL` (factor 4, 8 latent channels, 64x64 pixels to 8x16x16), fp16 weights.",
        load="`diffusers.AutoencoderKL.from_pretrained(PATH)`",
        trained=f"{trained}, split `vae`, seen compositions, {torch.get_num_threads()} thread, fp32",
        figures=[
            Figure("PSNR, mean over scenes", figures["psnr"], "dB"),
            Figure("PSNR of the mean squared error", figures["psnr_of_mean_error"], "dB"),
            Figure("PSNR, 5th percentile of scenes", figures["psnr_5th_percentile"], "dB"),
            Figure("mean absolute error (0..1)", figures["mean_absolute_error"], ""),
        ],
        scored="1,000 scenes of split `vae_val`, seed 0, seen and unseen compositions, decoded from the mode, 8 bits",
    )
