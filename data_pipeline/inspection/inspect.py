"""Looks at a dataset: a terminal table, and a grid of samples with their captions as PNG or HTML."""

import base64
import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.checkpoints import resolve
from data_pipeline.formats.schema import read_dataset_info
from data_pipeline.images import encode_png
from data_pipeline.loading.loader import Dataset, open_dataset
from infra import storage
from infra.errors import UserError
from model.encoders.vae import Latents, load_vae

if TYPE_CHECKING:
    from torch import Tensor

CELL = 160
_CAPTION_LINES = 3
_LINE = 14
_COLORS = ("black", "#1f4e9e", "#8a4b08", "#22693f", "#7a2e7a")


@dataclass(frozen=True)
class SamplePreview:
    """One sample: the captions that it has, by name, and the latent that `write_grid` decodes."""

    key: str
    captions: dict[str, str]
    latent_CHW: "Tensor"


def pick_samples(dataset: Dataset, count: int) -> list[SamplePreview]:
    """Some samples spread over the split."""
    shown = []
    rng = np.random.default_rng(0)
    for samples in dataset.bucket_ranges.values():
        share = max(1, round(count * len(samples) / dataset.num_samples))
        numbers = np.sort(rng.choice(len(samples), min(share, len(samples)), replace=False)) + samples.start
        batch = dataset.read(numbers.tolist(), posterior="mean")
        for key, captions, latent in zip(batch.keys, dataset.list_captions(numbers), batch.latent_BCHW):
            shown.append(SamplePreview(key, captions, latent))
    return shown[:count]


def write_grid(vae: Latents, shown: Sequence[SamplePreview], out: str) -> None:
    """Decoded by the dataset's own autoencoder. `out` ends in .png or .html."""
    if not shown:
        raise UserError(f"{out}: no samples to show; ask for at least one and look at what the split holds")
    if out.endswith(".html"):
        storage.write_bytes(out, render_html(shown, _decode(vae, shown)).encode())
    elif out.endswith(".png"):
        storage.write_bytes(out, encode_png(draw_grid(shown, _decode(vae, shown))))
    else:
        raise UserError(f"{out}: a grid is written as .png or .html; choose one of the two endings")


def _decode(meta: Latents, shown: Sequence[SamplePreview]) -> list[Image.Image]:
    import torch

    vae, images = load_vae(resolve(meta.checkpoint)), []
    with torch.inference_mode():
        for item in shown:
            pixels_CHW = meta.decode(vae, item.latent_CHW[None])[0]
            images.append(Image.fromarray(((pixels_CHW + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()))
    return images


def draw_grid(shown: Sequence[SamplePreview], images: Sequence[Image.Image], columns: int = 6) -> Image.Image:
    """Captions below each image: the original in black, synthetic ones in other colors, further ones with names."""
    columns, names = min(columns, len(shown)), _list_names(shown)
    height = CELL + (_CAPTION_LINES * len(names) + 1) * _LINE
    rows = -(-len(shown) // columns)
    grid = Image.new("RGB", (columns * (CELL + 8) + 8, rows * (height + 8) + 8), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(11)
    for number, (item, image) in enumerate(zip(shown, images, strict=True)):
        x, y = 8 + number % columns * (CELL + 8), 8 + number // columns * (height + 8)
        scale = CELL / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        grid.paste(image.resize(size, Image.Resampling.NEAREST), (x + (CELL - size[0]) // 2, y))
        at = y + CELL + 2
        for name, caption in item.captions.items():
            color = _COLORS[names.index(name) % len(_COLORS)]
            text = caption if name in ("original", "synthetic") else f"{name}: {caption}"
            for line in textwrap.wrap(text, 27)[:_CAPTION_LINES]:
                draw.text((x, at), line, fill=color, font=font)
                at += _LINE
    return grid


def _list_names(shown: Sequence[SamplePreview]) -> list[str]:
    return list(dict.fromkeys(name for item in shown for name in item.captions))


def render_html(shown: Sequence[SamplePreview], images: Sequence[Image.Image]) -> str:
    cells = "".join(
        f'<figure><img alt="" src="data:image/png;base64,{base64.b64encode(encode_png(image)).decode()}">'
        + "".join(
            f"<figcaption class={name} title={name}>{html.escape(text)}</figcaption>"
            for name, text in item.captions.items()
        )
        + f"<small>{html.escape(item.key)}</small></figure>"
        for item, image in zip(shown, images, strict=True)
    )
    style = (
        "body{font:13px system-ui;display:flex;flex-wrap:wrap;gap:12px}figure{width:170px;margin:0}"
        "img{width:160px;image-rendering:pixelated}small{color:#888}"
        + "".join(f".{n}{{color:{_COLORS[k % len(_COLORS)]}}}" for k, n in enumerate(_list_names(shown)))
    )
    return f"<!doctype html><meta charset=utf-8><title>samples</title><style>{style}</style>{cells}"


def describe_dataset(uri: str) -> list[tuple[str, str]]:
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
