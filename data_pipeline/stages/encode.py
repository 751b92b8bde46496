"""What training will read: autoencoder moments of each image, text features of each caption. One column per network.

Stored raw in fp16 (pooled vectors in fp32, text states on demand in int8 with a scale per token); scaling and dropping
happen when it is loaded.
"""
# Shapes: B batch, C latent channels, H and W height and width, L text tokens, P pooled width.

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipeline.checkpoints import resolve
from data_pipeline.formats.layout import quantise_tokens
from data_pipeline.images import CROP_RULE, cover_crop, stack_pixels
from data_pipeline.stages.stage import OK, ShardView, StageFunction, stage_table
from model.encoders.text import EncodedText, EncoderSpec, TextSpec

VERSION = 1


@dataclass(frozen=True)
class LatentStage:
    """Moments (mean then standard deviation) of the image, cropped to its bucket."""

    checkpoint: str
    weights: str
    batch: int = 64
    device: str = "cpu"
    name: str = "latents"
    inputs: tuple[str, ...] = ("ingest", "bucket")

    def identity(self) -> dict[str, object]:
        return {"version": VERSION, "weights": self.weights, "crop": CROP_RULE, "dtype": "float32"}

    def open(self) -> StageFunction:
        import torch

        from model.encoders.vae import Latents, load_vae

        vae = load_vae(resolve(self.checkpoint)).to(self.device, memory_format=torch.channels_last)
        latents = Latents.of(vae.config, self.checkpoint)

        def run(shard: ShardView) -> pa.Table:
            buckets: dict[int, str] = shard.values("bucket", "bucket")  # type: ignore[assignment]
            moments: dict[int, np.ndarray] = {}
            for bucket in sorted({buckets[row] for row in shard.rows}):
                height, width = map(int, bucket.split("x"))
                rows = [row for row in shard.rows if buckets[row] == bucket]
                for first in range(0, len(rows), self.batch):
                    chosen = rows[first : first + self.batch]
                    crops = [np.asarray(cover_crop(shard.image(row), width, height)) for row in chosen]
                    image_BCHW = stack_pixels(crops).to(self.device, memory_format=torch.channels_last)
                    moments |= dict(zip(chosen, latents.encode(vae, image_BCHW).cpu().contiguous().numpy()))
            return _make_moments_table(shard, moments, buckets)

        return run


def _make_moments_table(shard: ShardView, moments: Mapping[int, np.ndarray], buckets: Mapping[int, str]) -> pa.Table:
    finite = [bool(np.isfinite(moments[row]).all()) for row in shard.rows]
    return stage_table(
        shard.rows,
        [OK if good else "nonfinite" for good in finite],
        bucket=pa.array([buckets[row] for row in shard.rows], pa.string()),
        moments=pa.array([moments[row].tobytes() for row in shard.rows], pa.large_binary()),
    )


@dataclass(frozen=True)
class TextStage:
    """One encoder's states of the original and the synthetic caption, or of another synthetic one (`caption`); equal
    captions are encoded once."""

    text_spec: TextSpec
    seat: str
    weights: str
    int8: bool = False
    batch: int = 256
    device: str = "cpu"
    caption: str = ""

    @property
    def name(self) -> str:
        return text_column(self.seat, self.caption)

    @property
    def inputs(self) -> tuple[str, ...]:
        return (caption_column(self.caption),) if self.caption else ("measure", "caption")

    @property
    def encoder(self) -> EncoderSpec:
        return next(encoder for encoder in self.text_spec.encoders if encoder.seat == self.seat)

    def identity(self) -> dict[str, object]:
        encoder = {key: value for key, value in vars(self.encoder).items() if key != "checkpoint"}
        if self.encoder.kind == "clip_hf" and self.text_spec.convention == "sd3-ref":
            encoder["tokenizer"] = 2  # 1 took "!" for padding where a tokenizer pads with it
        return {
            "version": VERSION,
            "weights": self.weights,
            "encoder": encoder,
            "layout": self.text_spec.layout,
            "convention": self.text_spec.convention,
            "dtype": "int8 per token" if self.int8 else "float16",
        }

    def open(self) -> StageFunction:
        alone = TextSpec(
            (self.encoder,), self.text_spec.layout, self.text_spec.context_width, self.text_spec.convention
        )
        encoders = _load_encoders(alone, self.device)

        def run(shard: ShardView) -> pa.Table:
            read = {self.caption: self.inputs[0]} if self.caption else {"original": "measure", "synthetic": "caption"}
            captions = {name: shard.values(column, "caption") for name, column in read.items()}
            # many captions are equal (a class name, "a photo of a dog"): each is encoded once
            wanted = {str(texts.get(row) or "") for texts in captions.values() for row in shard.rows} - {""}
            states = self._encode(encoders, sorted(wanted, key=lambda text: (len(text), text)))
            return _make_text_table(shard, captions, states, self.int8)

        return run

    def _encode(self, encoders: Any, texts: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(hidden_LW fp16, pooled_P fp32) by caption; sorted by length, so that batches hold little padding."""
        states: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for first in range(0, len(texts), self.batch):
            chosen = texts[first : first + self.batch]
            encoded: EncodedText = encoders.encode(chosen)[self.seat]
            for number, text in enumerate(chosen):
                hidden_LW, pooled_P = encoded.cut_to_layout(number, self.text_spec.layout)
                states[text] = hidden_LW.half().cpu().numpy(), pooled_P.float().cpu().numpy()
        return states


def caption_column(caption: str) -> str:
    """The column that holds a synthetic caption: the first is `synthetic`."""
    return "caption" if caption == "synthetic" else f"caption_{caption}"


def text_column(seat: str, caption: str = "") -> str:
    """The column of an encoder's states: of the original and the first synthetic caption together, of others each."""
    return f"text_{seat}" + (f"_{caption}" if caption not in ("", "original", "synthetic") else "")


@lru_cache(maxsize=8)
def _load_encoders(spec: TextSpec, device: str) -> Any:
    """Once per worker: the columns of several captions share an encoder."""
    from model.encoders.networks import load_text_encoders

    return load_text_encoders(spec, resolve, device=device)


def _make_text_table(
    shard: ShardView,
    captions: Mapping[str, Mapping[int, object]],
    states: Mapping[str, tuple[np.ndarray, np.ndarray]],
    int8: bool,
) -> pa.Table:
    columns: dict[str, pa.Array] = {}
    finite = [True] * len(shard.rows)
    for caption, texts in captions.items():
        found = [states.get(str(texts.get(row) or "")) for row in shard.rows]
        finite = [good and (f is None or bool(np.isfinite(f[0]).all())) for good, f in zip(finite, found)]
        columns[f"{caption}_tokens"] = pa.array([0 if f is None else len(f[0]) for f in found], pa.int16())
        hidden = [None if f is None else f[0] for f in found]
        if int8:
            small = [None if h is None else quantise_tokens(h) for h in hidden]
            hidden = [None if q is None else q[0] for q in small]
            scales = [None if q is None else q[1].tobytes() for q in small]
            columns[f"{caption}_scale"] = pa.array(scales, pa.large_binary())
        columns[f"{caption}_hidden"] = pa.array([None if h is None else h.tobytes() for h in hidden], pa.large_binary())
        columns[f"{caption}_pooled"] = pa.array(
            [None if f is None else f[1].tobytes() for f in found], pa.large_binary()
        )
    return stage_table(shard.rows, [OK if good else "nonfinite" for good in finite], **columns)
