"""A small made-up dataset in the true format, for tests and dry runs: its latents depend on the caption."""
# Shapes: C latent channels, H and W latent height and width, L text tokens, W also the width of an encoder.

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from data_pipeline.formats.index import ShardEntry, write_split
from data_pipeline.formats.layout import SampleLayout
from data_pipeline.formats.schema import (
    DATASET_FILE,
    DatasetInfo,
    SplitInfo,
    hash_encoding,
    name_rejected_split,
)
from data_pipeline.packing.shards import TrainingSample, write_shard
from infra import storage
from model.encoders.text import EncoderSpec, TextSpec
from model.encoders.vae import Latents

CAPTIONS = ("original", "synthetic")
KINDS = ("apple", "boat", "cat", "dog", "kite", "lamp", "moon", "nest")

TINY_TEXT = TextSpec(
    encoders=(
        EncoderSpec("clip_l", "synthetic:clip", "open_clip", tokens=8, width=32, pooled=32),
        EncoderSpec("t5", "synthetic:t5", "bert_hf", tokens=8, width=48, pooled=0),
    ),
    layout="trimmed",
    context_width=48,
)


def write_synthetic(
    uri: str,
    *,
    num_samples: int = 512,
    val_samples: int = 64,
    latent_shape: tuple[int, int, int] = (8, 16, 16),
    text_spec: TextSpec = TINY_TEXT,
    seed: int = 0,
    buckets: Sequence[str] = ("64x64",),
    shard_rows: int = 128,
    synthetic_share: float = 1.0,
    int8_seats: tuple[str, ...] = (),
    pairs: bool = False,
    autoencoder: str = "synthetic:vae",
) -> DatasetInfo:
    """Write train and val. `latent_shape` belongs to the first bucket; later buckets get smaller and smaller shares.

    Latents of a kind of thing scatter around that kind's own pattern, and the text features state the kind, so a model
    can learn something. `synthetic_share` is the share of samples that have a synthetic caption. With `pairs` there are
    splits train_rejected and val_rejected, which show another kind than their captions say. `autoencoder` is named as
    the one that the latents come from; for pictures to be drawn it must exist and fit them.
    """
    channels, latent_height, _ = latent_shape
    factor = int(buckets[0].split("x")[0]) // latent_height
    resolution = int(np.sqrt(np.prod([int(n) for n in buckets[0].split("x")])))
    vae = Latents(autoencoder, channels, factor, shift=0.1, scale=0.9)
    columns = dict.fromkeys(("latents", *(f"text_{e.seat}" for e in text_spec.encoders)), f"synthetic-{seed}")
    encoding = hash_encoding(text_spec, vae, resolution, CAPTIONS, columns, int8_seats)
    splits = {}
    wanted = [(source, total, rejected) for rejected in ((False, True) if pairs else (False,))
              for source, total in (("train", num_samples), ("val", val_samples))]  # fmt: skip
    for source, total, rejected in wanted:
        split = name_rejected_split(source) if rejected else source
        entries: list[ShardEntry] = []
        for bucket, count in _share_out(total, buckets).items():
            height, width = (int(n) // factor for n in bucket.split("x"))
            layout = SampleLayout(text_spec, CAPTIONS, (2 * channels, height, width), int8_seats)
            for first in range(0, count, shard_rows):
                samples = _make_samples(
                    range(first, min(first + shard_rows, count)), layout, prefix=f"{source}-{bucket}", seed=seed,
                    share=synthetic_share, rejected=rejected,
                )  # fmt: skip
                entries.append(
                    write_shard(
                        uri,
                        samples,
                        split=split,
                        resolution=resolution,
                        bucket=bucket,
                        layout=layout,
                        encoding=encoding,
                    )
                )
        name = write_split(uri, split, entries)
        splits[split] = SplitInfo(name, total, len(entries), _share_out(total, buckets))
    counts = {"ok": sum(total for _, total, _ in wanted)}
    info = DatasetInfo(text_spec, vae, resolution, CAPTIONS, columns, splits, counts, int8_seats=int8_seats)
    storage.write_bytes(storage.join(uri, DATASET_FILE), info.to_bytes())
    return info


def make_index_entries(rows: int, *, buckets: Sequence[str], shard_rows: int = 1000) -> list[ShardEntry]:
    """Index entries of a data set of any size, without its shards: for tests and benches of the index itself."""
    entries = []
    for bucket, count in _share_out(rows, buckets).items():
        for first in range(0, count, shard_rows):
            sha = hashlib.sha256(f"{bucket}/{first}".encode()).hexdigest()
            name = f"train/1024/{bucket}/{sha[:32]}"
            size = min(shard_rows, count - first)
            entries.append(ShardEntry(f"{name}.tar", f"{name}.parquet", bucket, size, size << 20, sha, sha, "made-up"))
    return entries


def _share_out(total: int, buckets: Sequence[str]) -> dict[str, int]:
    """Halves: the first bucket takes half, the next half of the rest; the last takes what is left."""
    shares, left = {}, total
    for number, bucket in enumerate(buckets):
        shares[bucket] = left if number == len(buckets) - 1 else left // 2
        left -= shares[bucket]
    return {bucket: count for bucket, count in shares.items() if count}


def _make_samples(
    numbers: Sequence[int], layout: SampleLayout, *, prefix: str, seed: int, share: float, rejected: bool
) -> Iterator[TrainingSample]:
    channels, height, width = layout.moments_shape[0] // 2, *layout.moments_shape[1:]
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij")) / max(height, width)
    for number in numbers:
        rng = np.random.default_rng([seed, number, *prefix.encode()])
        kind = int(rng.integers(len(KINDS)))
        shown = (kind + 1) % len(KINDS) if rejected else kind
        waves = np.random.default_rng([seed, shown]).normal(size=(channels, 2)) * 3
        mean_CHW = np.sin(2 * np.pi * np.tensordot(waves, grid, axes=1)) + 0.2 * rng.normal(size=(channels, 1, 1))
        moments = np.concatenate([mean_CHW, np.full_like(mean_CHW, 0.05)])
        captions = {"original": f"a photo of a {KINDS[kind]}"}
        if rng.random() < share:
            captions["synthetic"] = f"one {KINDS[kind]} in the center, on a plain background"
        text: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        for caption in captions:
            for encoder in layout.encoders:
                text[caption, encoder.seat] = _make_features(encoder, kind, rng, seed, layout.text_spec.layout)
        yield TrainingSample(f"{prefix}-{number:06d}", moments, text, captions, _describe_sample(number, kind))


def _describe_sample(number: int, kind: int) -> Mapping[str, object]:
    return {"number": number, "kind": KINDS[kind]}


def _make_features(
    encoder: EncoderSpec, kind: int, rng: np.random.Generator, seed: int, layout: str
) -> tuple[np.ndarray, np.ndarray]:
    length = encoder.tokens if layout == "padded" else int(rng.integers(min(3, encoder.tokens), encoder.tokens + 1))
    state_W = np.random.default_rng([seed, kind, *encoder.seat.encode()]).normal(size=encoder.width)
    hidden_LW = state_W + 0.1 * rng.normal(size=(length, encoder.width))
    return hidden_LW, np.resize(state_W, encoder.pooled)
