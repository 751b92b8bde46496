"""Yes/no questions about images: BLIP-VQA through transformers, by path, as T2I-CompBench asks them.

Shapes: N pairs of image and question, L question tokens, D width.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.checkpoints import hash_weights
from eval.networks.loading import explain_failure, load_pretrained
from infra.errors import UserError

BATCH = 64
MAX_TOKENS = 35  # of the question, as in BLIP's own VQA code
MAX_WORDS, DROPPED = 50, re.compile(r"[.!\"()*#:;~]")  # likewise (its pre_question)


def clean_question(question: str) -> str:
    """The question as BLIP's own VQA code puts it: lower case, some marks dropped, at most 50 words."""
    return " ".join(DROPPED.sub("", question.lower()).rstrip(" ").split(" ")[:MAX_WORDS])


class VQA(Protocol):
    """A network that answers yes-or-no questions about pictures."""

    name: str
    version: str

    def yes(self, images: Sequence[np.ndarray], questions: Sequence[str]) -> np.ndarray:
        """P(yes) / (P(yes) + P(no)) of the first answer token, one per (image, question) pair, float64 (N,)."""
        ...


class BlipVQA:
    """A BlipForQuestionAnswering folder. `image_size` None takes the checkpoint's own (T2I-CompBench: 480)."""

    name = "blip_vqa"

    def __init__(self, path: str | Path, *, device: str = "cpu", image_size: int | None = None) -> None:
        from transformers import AutoTokenizer, BlipForQuestionAnswering

        self._model = load_pretrained(BlipForQuestionAnswering, path, what="BLIP-VQA", device=device)
        with explain_failure("the tokenizer of BLIP-VQA", path):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        self._device = device
        config = self._model.config
        self._size = image_size or config.vision_config.image_size
        self._interpolate = self._size != config.vision_config.image_size
        self.version = f"{hash_weights(path)}@{self._size}"
        self._mean_std = self._read_normalisation(Path(path))
        yes, no = (self._tokenizer(word, add_special_tokens=False).input_ids for word in ("yes", "no"))
        if len(yes) != 1 or len(no) != 1 or yes == no:
            raise UserError(f"{path}: its tokenizer has no single token for yes and no (found {yes}, {no})")
        self._yes, self._no = yes[0], no[0]
        # BLIP marks a question's first token with [ENC], the last of two ids added behind BERT's 30,522 words.
        vocabulary = config.text_config.vocab_size
        self._encode_id = vocabulary - 1 if vocabulary == 30524 else None

    @torch.inference_mode()
    def yes(self, images: Sequence[np.ndarray], questions: Sequence[str]) -> np.ndarray:
        chunks = []
        for start in range(0, len(questions), BATCH):
            part = slice(start, start + BATCH)
            chunks.append(self._yes_batch(images[part], questions[part]))
        return np.concatenate(chunks) if chunks else np.zeros(0)

    def _yes_batch(self, images: Sequence[np.ndarray], questions: Sequence[str]) -> np.ndarray:
        tokens = self._tokenizer(
            [clean_question(q) for q in questions],
            padding="longest",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(self._device)
        if self._encode_id is not None:
            tokens.input_ids[:, 0] = self._encode_id
        seen_NPD = self._model.vision_model(
            self._pixels(images), interpolate_pos_encoding=self._interpolate
        ).last_hidden_state
        asked_NLD = self._model.text_encoder(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen_NPD,
            return_dict=True,
        ).last_hidden_state
        start_N1 = torch.full((len(asked_NLD), 1), self._model.decoder_start_token_id, device=self._device)
        logits_NV = self._model.text_decoder(
            input_ids=start_N1,
            encoder_hidden_states=asked_NLD,
            encoder_attention_mask=tokens.attention_mask,
            return_dict=True,
        ).logits[:, 0]
        # The softmax over {yes, no} equals P(yes) / (P(yes) + P(no)) over the whole vocabulary.
        return logits_NV[:, [self._yes, self._no]].double().softmax(-1)[:, 0].cpu().numpy()

    def _pixels(self, images: Sequence[np.ndarray]) -> Tensor:
        mean, std = self._mean_std
        sized = [
            np.asarray(Image.fromarray(i).resize((self._size, self._size), Image.Resampling.BICUBIC)) for i in images
        ]
        x_NHWC = torch.from_numpy(np.stack(sized)).float().div_(255)
        return ((x_NHWC - mean) / std).permute(0, 3, 1, 2).contiguous().to(self._device)

    @staticmethod
    def _read_normalisation(path: Path) -> tuple[Tensor, Tensor]:
        import json

        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        file = path / "preprocessor_config.json"
        stated = json.loads(file.read_text()) if file.exists() else {}
        mean, std = stated.get("image_mean", OPENAI_CLIP_MEAN), stated.get("image_std", OPENAI_CLIP_STD)
        return torch.tensor(mean), torch.tensor(std)
