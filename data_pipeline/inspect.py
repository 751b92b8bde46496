"""Looks at a dataset: a terminal table, and a grid of samples with their captions as PNG or HTML."""

import base64
import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.checkpoints import resolve
from data_pipeline.images import to_png
from data_pipeline.loader import Dataset, open_dataset
from data_pipeline.schema import read_dataset_info
from infra import storage
from infra.errors import UserError
from model.vae import load_vae

if TYPE_CHECKING:
    import torch

CELL = 160
_TEXT_LINES = 5
_LINE = 14


@dataclass(frozen=True)
class Shown:
    """One sample as people see it: the stored latent decoded (None where only words are shown), and every caption."""

    key: str
    image: Image.Image | None
    captions: dict[str, str]


def show_samples(dataset: Dataset, count: int, *, images: bool = True, seed: int = 0) -> list[Shown]:
    """Some samples spread over the split; `images` are decoded by the dataset's own autoencoder."""
    vae = load_vae(resolve(dataset.vae.checkpoint)) if images else None
    shown = []
    rng = np.random.default_rng(seed)
    for samples in dataset.bucket_ranges.values():
        share = max(1, round(count * len(samples) / dataset.num_samples))
        numbers = np.sort(rng.choice(len(samples), min(share, len(samples)), replace=False)) + samples.start
        batch = dataset.read(numbers.tolist(), posterior="mean")
        synthetic = dataset.read(numbers.tolist(), caption="synthetic").captions
        pictures = [None] * len(batch.keys) if vae is None else _decoded(dataset, vae, batch.latent_BCHW)
        for key, image, original, other in zip(batch.keys, pictures, batch.captions, synthetic):
            shown.append(Shown(key, image, {"original": original, "synthetic": other}))
    return shown[:count]


def _decoded(dataset: Dataset, vae: Any, latent_BCHW: "torch.Tensor") -> Sequence[Image.Image]:
    import torch

    with torch.inference_mode():
        pixels = dataset.vae.latents.decode(vae, latent_BCHW)
    pixels_BHWC = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in pixels_BHWC]


def write_grid(shown: Sequence[Shown], out: str) -> None:
    """`out` ends in .png or .html."""
    if not shown:
        raise UserError(f"{out}: no samples to show; ask for at least one and look at what the split holds")
    if out.endswith(".html"):
        storage.write_bytes(out, grid_html(shown).encode())
    elif out.endswith(".png"):
        storage.write_bytes(out, to_png(grid_image(shown)))
    else:
        raise UserError(f"{out}: a grid is written as .png or .html; choose one of the two endings")


def grid_image(shown: Sequence[Shown], columns: int = 6) -> Image.Image:
    """Captions below each image: the original in black, the synthetic one in blue."""
    columns = min(columns, len(shown))
    height = CELL + 2 * _TEXT_LINES * _LINE // 2 + 2 * _LINE
    rows = -(-len(shown) // columns)
    grid = Image.new("RGB", (columns * (CELL + 8) + 8, rows * (height + 8) + 8), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(11)
    for number, item in enumerate(shown):
        assert item.image is not None
        x, y = 8 + number % columns * (CELL + 8), 8 + number // columns * (height + 8)
        scale = CELL / max(item.image.size)
        size = (round(item.image.width * scale), round(item.image.height * scale))
        grid.paste(item.image.resize(size, Image.Resampling.NEAREST), (x + (CELL - size[0]) // 2, y))
        at = y + CELL + 2
        for caption, color in zip(item.captions.values(), ("black", "#1f4e9e")):
            for line in textwrap.wrap(caption, 27)[: _TEXT_LINES // 2 + 1]:
                draw.text((x, at), line, fill=color, font=font)
                at += _LINE
    return grid


def grid_html(shown: Sequence[Shown]) -> str:
    cells = "".join(
        f'<figure><img alt="" src="data:image/png;base64,{_base64_png(item.image)}">'
        + "".join(f"<figcaption class={name}>{html.escape(text)}</figcaption>" for name, text in item.captions.items())
        + f"<small>{html.escape(item.key)}</small></figure>"
        for item in shown
    )
    style = (
        "body{font:13px system-ui;display:flex;flex-wrap:wrap;gap:12px}figure{width:170px;margin:0}"
        "img{width:160px;image-rendering:pixelated}.synthetic{color:#1f4e9e}small{color:#888}"
    )
    return f"<!doctype html><meta charset=utf-8><title>samples</title><style>{style}</style>{cells}"


def _base64_png(image: Image.Image | None) -> str:
    assert image is not None
    return base64.b64encode(to_png(image)).decode()


def describe(uri: str) -> list[tuple[str, str]]:
    """What dataset.json says, as lines of a table."""
    info = read_dataset_info(uri)
    lines = [("dataset", uri), ("fingerprint", info.fingerprint), ("resolution", str(info.resolution))]
    shift = f"shift {info.vae.shift:g}, scale {info.vae.scale:g}"
    lines.append(("autoencoder", f"{info.vae.checkpoint}: {info.vae.channels} channels, 1/{info.vae.factor}, {shift}"))
    for encoder in info.text_spec.encoders:
        lines.append(("text", f"{encoder.seat} = {encoder.checkpoint}, {encoder.tokens} tokens x {encoder.width}"))
    for name, split in info.splits.items():
        shapes = ", ".join(f"{bucket}: {count:,}" for bucket, count in sorted(split.buckets.items()))
        lines.append((name, f"{split.num_samples:,} samples in {split.num_shards} shards ({shapes})"))
        dataset = open_dataset(uri, split=name)
        sizes = np.concatenate([dataset._reader.table(n).size_R for n in range(min(8, split.num_shards))])
        lines.append(("", f"{sizes.mean() / 1000:,.1f} kB per sample"))
    lines += [("rows", f"{status}: {count:,}") for status, count in sorted(info.counts.items(), key=lambda i: -i[1])]
    return lines
