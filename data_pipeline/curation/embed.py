"""The embedding column: a normalised vector and a thumbnail of each image, for finding near duplicates.

The model is a path: an open_clip folder (the world's CLIP) or a TorchScript file (SSCD in production).
"""
# Shapes: B batch, D embedding width, H and W height and width.

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from data_pipeline.checkpoints import resolve
from data_pipeline.stages.stage import OK, ShardView, StageFunction, stage_table
from infra.errors import UserError

VERSION = 1
THUMB = 32
SSCD_SIDE = 288  # "small edge 288" for batches of squares, as the model's card recommends
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Embedder = Callable[[Sequence[Image.Image]], np.ndarray]


@dataclass(frozen=True)
class EmbedStage:
    """Embeddings in fp16 and 32 x 32 RGB thumbnails of the rows that could be decoded."""

    checkpoint: str
    weights: str
    batch: int = 64
    device: str = "cpu"
    name: str = "embed"
    inputs: tuple[str, ...] = ("ingest", "measure")

    def identity(self) -> dict[str, object]:
        return {"version": VERSION, "weights": self.weights, "thumb": THUMB}

    def open(self) -> StageFunction:
        embed = load_embedder(resolve(self.checkpoint), self.device)

        def run(shard: ShardView) -> pa.Table:
            rows = shard.decodable()
            vectors: list[bytes] = []
            thumbs: list[bytes] = []
            for _, images in shard.image_batches(rows, self.batch):
                vectors += [vector.tobytes() for vector in embed(images)]
                thumbs += [make_thumbnail(image) for image in images]
            return stage_table(
                rows,
                [OK] * len(rows),
                embedding=pa.array(vectors, pa.binary()),
                thumb=pa.array(thumbs, pa.binary()),
            )

        return run


def make_thumbnail(image: Image.Image) -> bytes:
    return image.resize((THUMB, THUMB), Image.Resampling.BICUBIC, reducing_gap=3.0).tobytes()


def load_embedder(path: Path, device: str) -> Embedder:
    """Images to unit vectors (B, D) in fp16."""
    import torch

    if path.is_dir() and (path / "open_clip_config.json").is_file():
        forward = _load_open_clip(path, device)
    elif path.is_file() and path.suffix in (".pt", ".ts", ".torchscript"):
        forward = _load_torchscript(path, device)
    else:
        raise UserError(f"{path}: no embedding model: expected an open_clip folder or a TorchScript file (.pt, .ts)")

    def embed(images: Sequence[Image.Image]) -> np.ndarray:
        with torch.inference_mode():
            vector_BD = forward(images).float()
        return torch.nn.functional.normalize(vector_BD, dim=1).half().cpu().numpy()

    return embed


def load_agreement(path: Path, device: str) -> Callable[[Sequence[Image.Image], Sequence[str]], np.ndarray]:
    """Images and their captions to cosines (B,), by an open_clip folder: CLIP score without its factor."""
    import torch
    from open_clip import create_model_from_pretrained, get_tokenizer

    if not (path / "open_clip_config.json").is_file():
        raise UserError(f"{path}: no CLIP: expected an open_clip folder with open_clip_config.json and weights")
    model, prepare = create_model_from_pretrained(f"local-dir:{path}", device=device)
    tokenize = get_tokenizer(f"local-dir:{path}")
    model.eval()

    def compare(images: Sequence[Image.Image], captions: Sequence[str]) -> np.ndarray:
        with torch.inference_mode():
            image_BD = model.encode_image(torch.stack([prepare(image) for image in images]).to(device))
            text_BD = model.encode_text(tokenize(list(captions)).to(device))
        return torch.nn.functional.cosine_similarity(image_BD.float(), text_BD.float(), dim=1).cpu().numpy()

    return compare


def _load_open_clip(path: Path, device: str) -> Callable:
    import torch
    from open_clip import create_model_from_pretrained

    model, prepare = create_model_from_pretrained(f"local-dir:{path}", device=device)
    model.eval()
    return lambda images: model.encode_image(torch.stack([prepare(image) for image in images]).to(device))


def _load_torchscript(path: Path, device: str) -> Callable:
    import torch

    try:
        model = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise UserError(f"{path}: not a TorchScript file; SSCD's are named sscd_*.torchscript.pt") from error
    mean, std = (np.array(values, np.float32) for values in (_IMAGENET_MEAN, _IMAGENET_STD))

    def forward(images: Sequence[Image.Image]) -> "torch.Tensor":
        # squares without keeping the aspect, so that any images make a batch; ImageNet's mean and deviation
        squares = [image.resize((SSCD_SIDE, SSCD_SIDE), Image.Resampling.BICUBIC) for image in images]
        pixels_BHWC = (np.stack([np.asarray(image, np.float32) for image in squares]) / 255 - mean) / std
        return model(torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).to(device))

    return forward
