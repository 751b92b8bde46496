"""Preference pairs in the same shards: split `train` holds the preferred pictures, `train_rejected` the others, joined
by equal keys and captions. The preferred ones alone are an ordinary data set.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from data_pipeline.checkpoints import hash_weights, resolve
from data_pipeline.formats.index import ShardEntry
from data_pipeline.formats.layout import TextFeatures
from data_pipeline.formats.schema import DATASET_FILE, DatasetInfo, fingerprint, name_rejected_split
from data_pipeline.images import ImageError, cover_crop, decode, stack_pixels
from data_pipeline.packing.publish import publish
from data_pipeline.packing.shards import TrainingSample, write_shard
from data_pipeline.stages.encode import LatentStage, TextStage
from data_pipeline.stages.stage import OK
from infra import storage
from infra.errors import UserError
from infra.log import Progress
from model.encoders.networks import load_text_encoders
from model.encoders.text import TextSpec
from model.encoders.vae import Latents, load_vae

CAPTION = "original"
BATCH = 64


@dataclass(frozen=True)
class PreferencePair:
    """Two pictures (uint8 RGB, H x W x 3) of one caption, the better one first."""

    key: str
    caption: str
    preferred: np.ndarray
    rejected: np.ndarray
    info: Mapping[str, object] = field(default_factory=dict)
    """Provenance, kept with both samples: who preferred it, and by how much."""


def write_pairs(
    uri: str,
    splits: Mapping[str, Sequence[PreferencePair]],
    *,
    text_spec: TextSpec,
    vae: Latents,
    resolution: int,
    made_by: Mapping[str, Any],
    shard_rows: int = 500,
    device: str = "cpu",
) -> DatasetInfo:
    """Encode and write a finished data set of pairs; pictures are cut to squares of `resolution` pixels.

    `made_by` says where the preferences come from and enters the fingerprint.
    """
    if storage.exists(storage.join(uri, DATASET_FILE)):
        raise UserError(f"{uri} holds a data set already: choose another --out, or remove it")
    keys = [pair.key for pairs in splits.values() for pair in pairs]
    if not splits.get("train") or len(set(keys)) < len(keys):
        raise UserError(f"{uri}: {len(keys)} pairs, {len(set(keys))} different keys: expected some, all different")
    settings = _describe_stages(text_spec, vae)
    columns = {name: fingerprint(found) for name, found in settings.items()} | {"pairs": fingerprint(dict(made_by))}
    info = DatasetInfo(text_spec, vae, resolution, (CAPTION,), columns, {}, settings=settings)
    encoder, bucket = _PairEncoder(text_spec, vae, resolution, device), f"{resolution}x{resolution}"
    entries: list[ShardEntry] = []
    with Progress(2 * len(keys), "images", desc="encode pairs") as progress:
        for split, pairs in splits.items():
            for first in range(0, len(pairs), shard_rows):
                chosen = pairs[first : first + shard_rows]
                text = encoder.text([pair.caption for pair in chosen])
                for name, images in (
                    (split, [pair.preferred for pair in chosen]),
                    (name_rejected_split(split), [pair.rejected for pair in chosen]),
                ):
                    samples = _make_samples(chosen, encoder.latents(images), text)
                    entries.append(
                        write_shard(
                            uri, samples, split=name, resolution=resolution, bucket=bucket,
                            layout=info.layout(bucket), encoding=info.encoding,
                        )
                    )  # fmt: skip
                    progress.update(len(chosen))
    return publish(uri, info, entries, {OK: 2 * len(keys)})


def _make_samples(
    pairs: Sequence[PreferencePair],
    latents: Iterable[np.ndarray],
    text: Mapping[str, dict[tuple[str, str], TextFeatures]],
) -> Iterator[TrainingSample]:
    for pair, moments_CHW in zip(pairs, latents, strict=True):
        yield TrainingSample(pair.key, moments_CHW, text[pair.caption], {CAPTION: pair.caption}, pair.info)


def _describe_stages(text_spec: TextSpec, vae: Latents) -> dict[str, Any]:
    """What made the latents and texts, as the pipeline's stages tell it."""
    stages: list[LatentStage | TextStage] = [LatentStage(vae.checkpoint, hash_weights(resolve(vae.checkpoint)))]
    stages += [TextStage(text_spec, e.seat, hash_weights(resolve(e.checkpoint))) for e in text_spec.encoders]
    return {stage.name: stage.identity() for stage in stages}


class _PairEncoder:
    """The networks of one data set."""

    def __init__(self, text_spec: TextSpec, vae: Latents, resolution: int, device: str) -> None:
        self._vae, self._latents, self._side = load_vae(resolve(vae.checkpoint)).to(device), vae, resolution
        self._texts, self._spec, self._device = load_text_encoders(text_spec, resolve, device=device), text_spec, device

    def latents(self, images: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        from PIL import Image

        for first in range(0, len(images), BATCH):
            cut = [cover_crop(Image.fromarray(i), self._side, self._side) for i in images[first : first + BATCH]]
            x_BCHW = stack_pixels([np.asarray(image) for image in cut]).to(self._device)
            yield from self._latents.encode(self._vae, x_BCHW).cpu().numpy()

    @torch.inference_mode()
    def text(self, captions: Sequence[str]) -> dict[str, dict[tuple[str, str], TextFeatures]]:
        """caption -> features by (caption name, seat)."""
        known, found = list(dict.fromkeys(captions)), {}
        for first in range(0, len(known), BATCH):
            chosen = known[first : first + BATCH]
            encoded = self._texts.encode(chosen)
            for number, caption in enumerate(chosen):
                stored = {seat: states.cut_to_layout(number, self._spec.layout) for seat, states in encoded.items()}
                found[caption] = {
                    (CAPTION, seat): TextFeatures(hidden_LW.numpy(), pooled_P.numpy())
                    for seat, (hidden_LW, pooled_P) in stored.items()
                }
        return found


def read_pairs(uri: str) -> list[PreferencePair]:
    """People's own pairs: JSON lines {"caption", "preferred", "rejected"}, the last two paths relative to the file."""
    folder = uri.rsplit("/", 1)[0] if "/" in uri else "."
    pairs: list[PreferencePair] = []
    for number, line in enumerate(storage.read_bytes(uri).decode("utf-8-sig").splitlines()):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
            caption = str(pair["caption"])
            better, worse = (_read_picture(storage.join(folder, str(pair[name]))) for name in ("preferred", "rejected"))
        except UserError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{uri}, line {number + 1}: {error!r}; expected {{"caption": ..., "preferred": PATH, "rejected": PATH}}'
            ) from error
        except ImageError as error:
            raise UserError(f"{uri}, line {number + 1}: a picture is no good ({error.reason})") from error
        pairs.append(PreferencePair(f"pair-{number:07d}", caption, better, worse))
    return pairs


def _read_picture(uri: str) -> np.ndarray:
    with storage.open_read(uri) as file:
        return np.asarray(decode(file))
