"""`python -m eval autoencoder`: what autoencoders lose, as SD3's Table 3: rFID, LPIPS, SSIM, PSNR, with intervals.

Pictures are decoded from the mode of the posterior and rounded to 8 bits. Shapes: B pictures in a batch.
"""

import itertools
import json
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipeline.checkpoints import hash_weights, resolve
from eval.drawing.generate import to_pictures
from eval.judging.metric import Clusters
from eval.metrics.frechet import Moments, RankDeficientWarning, frechet_distance, resample_pair_distances
from eval.networks.features import FeatureNetwork
from eval.networks.inception import Convention, InceptionFeatures
from eval.networks.perceptual import Lpips
from eval.studies.fidelity import SMALLEST, psnr, ssim
from infra import storage
from infra.device import resolve_device
from infra.errors import UserError
from infra.log import Progress
from infra.markdown import wrap_prose
from model.encoders.vae import Latents, load_vae
from model.perceptual import LpipsNet

# SD3 (arXiv 2403.03206), Table 3: autoencoders of factor 8 on other pictures than ours, shown for orientation.
PAPER = {4: (2.41, 0.85, 0.75, 25.12), 8: (1.56, 0.68, 0.79, 26.40), 16: (1.06, 0.45, 0.86, 28.62)}
BEST_PSNR = 100.0  # stands for infinity where a picture comes back without any error


@dataclass(frozen=True)
class AutoencoderOptions:
    """Which autoencoders, which pictures, and the networks of rFID and LPIPS."""

    vae: tuple[str, ...] = ("world:vae",)
    """diffusers folders of AutoencoderKL, or checkpoint names; one row each"""
    images: str = "world"
    """folder of pictures, or world (scenes that no world network was trained on)"""
    count: int = 1000
    size: int | None = None
    """bring pictures to this many pixels a side (short side, then the middle is cut out); SD3's table: 256"""
    inception: str | None = None
    """Inception-v3 weights of pytorch-fid, for rFID; without them the world's judge CLIP gives the features"""
    convention: Convention = "clean-fid"
    lpips: str | None = None
    """ImageNet weights of LPIPS' backbone (torchvision's file, e.g. alexnet-owt-7be5be79.pth); left out without"""
    lpips_net: LpipsNet = "alex"
    batch: int = 16
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N"""
    out: str | None = None
    """folder for autoencoder.json and autoencoder.md"""


@dataclass
class AutoencoderScores:
    """One autoencoder's figures: name -> (value, low, high)."""

    vae: str
    version: str
    channels: int
    factor: int
    values: dict[str, tuple[float, float, float]] = field(default_factory=dict)


def measure_autoencoders(options: AutoencoderOptions) -> None:
    """Reconstruct pictures with each autoencoder and print rFID, LPIPS, SSIM and PSNR with 95 % intervals."""
    if not options.vae or options.count < 2 or options.batch < 1:
        raise UserError("give at least one --vae, --count 2 or more and --batch 1 or more")
    if options.size is not None and options.size < SMALLEST:
        raise UserError(f"--size must be {SMALLEST} or more: SSIM's window is as large")
    options = replace(options, device=resolve_device(options.device))
    network = _choose_features(options)
    perceptual = Lpips(options.lpips, net=options.lpips_net, device=options.device) if options.lpips else None
    found = [measure(name, options, network=network, perceptual=perceptual) for name in options.vae]
    protocol = {
        "images": options.images,
        "count": options.count,
        "size": options.size,
        "features": [network.name, network.version],
        "lpips": [perceptual.name, perceptual.version] if perceptual else "not measured: --lpips gives no weights",
        "decoded_from": "mode of the posterior, 8 bits",
    }
    text = wrap_prose(format_markdown(found, protocol))
    print(text, end="")
    if options.out is not None:
        record = {"protocol": protocol, "autoencoders": [vars(figures) for figures in found]}
        storage.write_bytes(storage.join(options.out, "autoencoder.md"), f"# Autoencoders\n\n{text}".encode())
        storage.write_bytes(storage.join(options.out, "autoencoder.json"), json.dumps(record, indent=1).encode())
    if perceptual is None:
        print("LPIPS was left out: give its backbone's weights with --lpips FILE", file=sys.stderr)


def _choose_features(options: AutoencoderOptions) -> FeatureNetwork:
    if options.inception is not None:
        return InceptionFeatures(options.inception, convention=options.convention, device=options.device)
    from eval.judging.judges import build_judges

    return build_judges("world").clip()


def measure(
    name: str, options: AutoencoderOptions, *, network: FeatureNetwork, perceptual: Lpips | None
) -> AutoencoderScores:
    path = resolve(name)
    vae = load_vae(path).to(options.device)
    latents = Latents.of(vae.config, name)
    values, features = Clusters(), ([], [])  # type: tuple[Clusters, tuple[list[np.ndarray], list[np.ndarray]]]
    number = 0
    with Progress(options.count, "images", desc=name) as progress:
        pictures = _read_pictures(options, latents.factor)
        while part := list(itertools.islice(pictures, options.batch)):
            for real, again in _reconstruct_by_size(part, vae, options.device):
                apart = perceptual.distances(real, again) if perceptual else [math.nan] * len(real)
                for a, b, distance in zip(real, again, apart):
                    values.add("psnr", number, min(psnr(a, b), BEST_PSNR))
                    values.add("ssim", number, ssim(a, b))
                    if perceptual:
                        values.add("lpips", number, float(distance))
                    number += 1
                for kept, some in zip(features, (real, again)):
                    kept.append(np.asarray(network.images(some), dtype=np.float32))
            progress.update(len(part))
    figures = AutoencoderScores(name, hash_weights(path), latents.channels, latents.factor)
    figures.values["rfid"] = _measure_rfid(np.concatenate(features[1]), np.concatenate(features[0]))
    for key in values.strata:
        figures.values[key] = (values.mean([key]), *(values.interval([key]) or (math.nan, math.nan)))
    return figures


def _read_pictures(options: AutoencoderOptions, factor: int) -> Iterator[np.ndarray]:
    """`count` pictures whose sides are multiples of the autoencoder's factor."""
    if options.images == "world":
        from eval.judging.prompts import render_world_references

        found: Iterator[np.ndarray] = render_world_references(options.count)
    else:
        from eval.drawing.pictures import read_picture
        from eval.judging.prompt_files import find_reference_files

        files = find_reference_files(options.images)
        if len(files) < options.count:
            raise UserError(f"{options.images} holds {len(files)} pictures, --count asks for {options.count}")
        found = (read_picture(file) for file in files[: options.count])
    return (_crop(image, options.size, factor) for image in found)


def _crop(image: np.ndarray, size: int | None, factor: int) -> np.ndarray:
    """Short side to `size` (bicubic), then the middle, whole latent pixels only."""
    picture = Image.fromarray(image)
    if size is not None:
        scale = size / min(picture.size)
        sides = (max(size, round(picture.width * scale)), max(size, round(picture.height * scale)))
        picture = picture.resize(sides, Image.Resampling.BICUBIC)
    width, height = (side // factor * factor for side in ((size, size) if size else picture.size))
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return np.asarray(picture.crop((left, top, left + width, top + height)))


@torch.inference_mode()
def _reconstruct_by_size(
    pictures: Sequence[np.ndarray], vae: Any, device: str
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Pictures and their reconstructions, in groups of one size."""
    for shape in dict.fromkeys(picture.shape for picture in pictures):
        real = [picture for picture in pictures if picture.shape == shape]
        x_BCHW = torch.from_numpy(np.stack(real)).permute(0, 3, 1, 2).float().div(127.5).sub(1).to(device)
        yield real, to_pictures(vae.decode(vae.encode(x_BCHW).latent_dist.mode()).sample)


def _measure_rfid(again_NE: np.ndarray, real_NE: np.ndarray) -> tuple[float, float, float]:
    """Reconstructions against the very pictures, which are drawn together: their difference is small and steady."""
    real, again = Moments(real_NE.shape[1]), Moments(real_NE.shape[1])
    real.update(real_NE)
    again.update(again_NE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankDeficientWarning)  # the count stands in the report
        value = frechet_distance(again, real)
    resampled = resample_pair_distances(again_NE, real_NE)
    low, high = np.percentile(resampled - resampled.mean(), [2.5, 97.5])
    return value, max(0.0, value + float(low)), value + float(high)


COLUMNS = {"rfid": ("rFID", 2), "lpips": ("LPIPS", 3), "ssim": ("SSIM", 3), "psnr": ("PSNR", 2)}


def format_markdown(found: Sequence[AutoencoderScores], protocol: dict[str, Any]) -> str:
    """The table, SD3's own figures below it, and how ours were measured."""
    heads = [f"{title} {'^' if key in ('ssim', 'psnr') else 'v'}" for key, (title, _) in COLUMNS.items()]
    rows = [
        f"| {f.vae} | {f.channels} | {f.factor} | " + " | ".join(_format_cell(f, key) for key in COLUMNS) + " |"
        for f in found
    ]
    paper = [
        f"| SD3, Table 3 (other pictures) | {channels} | 8 | " + " | ".join(f"{x:.2f}" for x in row) + " |"
        for channels, row in PAPER.items()
    ]
    head = [f"| autoencoder | channels | factor | {' | '.join(heads)} |", "|---|---|---|---|---|---|---|"]
    lpips = _name_lpips(protocol["lpips"])
    origin = f"{protocol['count']} pictures ({protocol['images']}), rFID on {protocol['features'][0]}, LPIPS: {lpips}"
    note = f"{origin}; {protocol['decoded_from']}; 95 % intervals over pictures."
    return "\n".join([*head, *rows, *paper, "", note, ""])


def _name_lpips(lpips: Any) -> str:
    return lpips if isinstance(lpips, str) else str(lpips[0])


def _format_cell(figures: AutoencoderScores, key: str) -> str:
    if key not in figures.values:
        return "not measured"
    value, low, high = figures.values[key]
    digits = COLUMNS[key][1]
    interval = "interval unknown" if math.isnan(low) else f"{low:.{digits}f}, {high:.{digits}f}"
    return f"{value:.{digits}f} [{interval}]"
