"""OpenCLIP models as judges.

Shapes: N images or texts, E embedding width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.checkpoints import hash_weights
from eval.networks.loading import explain_failure
from infra.errors import UserError, nearest

BATCH = 64


class ClipModel:
    """An OpenCLIP checkpoint: a folder with open_clip_config.json, or `ARCHITECTURE=FILE` such as ViT-L-14=clip.bin.

    A bare file is taken for OpenAI's, which were trained with QuickGELU; a folder's config says what its weights need.
    """

    def __init__(self, where: str | Path, *, device: str = "cpu") -> None:
        import open_clip

        arch, _, file = str(where).partition("=")
        name, pretrained = (arch, file) if file else (f"local-dir:{where}", None)
        if not Path(file or str(where)).exists():
            raise UserError(f"no CLIP checkpoint at {file or where}: give an OpenCLIP folder or ARCHITECTURE=FILE")
        if file and arch not in (known := open_clip.list_models()):
            raise UserError(f"open_clip knows no {arch!r}{nearest(arch, known)}; give ARCHITECTURE=FILE, or a folder")
        if not file and not (Path(where) / "open_clip_config.json").is_file():
            raise UserError(f"no open_clip_config.json in {where}: give an OpenCLIP folder or ARCHITECTURE=FILE")
        quick = bool(file) and "quickgelu" not in arch
        with explain_failure("CLIP", where):
            model, _, self._transform = open_clip.create_model_and_transforms(
                name, pretrained=pretrained, force_quick_gelu=quick
            )
            self._model: Any = model.to(device).eval()
            self._tokenize = open_clip.get_tokenizer(name)
        self._device = device
        self.name, self.version = arch if file else Path(where).name, hash_weights(file or where)
        self._texts: dict[str, Tensor] = {}

    @torch.inference_mode()
    def images(self, images: Sequence[np.ndarray | Image.Image]) -> Tensor:
        """Unnormalised image embeddings (N, E), float32 on the CPU."""
        chunks = []
        for start in range(0, len(images), BATCH):
            pixels = [
                item if isinstance(item, Image.Image) else Image.fromarray(item)
                for item in images[start : start + BATCH]
            ]
            batch = torch.stack([self._transform(item) for item in pixels]).to(self._device)
            chunks.append(self._model.encode_image(batch).float().cpu())
        return torch.cat(chunks)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unnormalised text embeddings (N, E), float32 on the CPU; remembered, as prompts come back for every image."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._texts]
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            embedded = self._model.encode_text(self._tokenize(part).to(self._device)).float().cpu()
            self._texts.update(zip(part, embedded))
        return torch.stack([self._texts[text] for text in texts])

    def cosines(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
        """Cosine of each image with its own text, unscaled (N,)."""
        a_NE, b_NE = normalize_rows(self.images(images)), normalize_rows(self.texts(texts))
        return (a_NE * b_NE).sum(-1).double().numpy()


def normalize_rows(x_NE: Tensor) -> Tensor:
    """Rows of length 1."""
    return x_NE / x_NE.norm(dim=-1, keepdim=True)
