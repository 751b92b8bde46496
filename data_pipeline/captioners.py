"""Captioners: images to captions, behind one interface. To add one, write a class and put a line into CAPTIONERS."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from infra.errors import UserError, nearest


class Captioner(Protocol):
    """`name` and `version` are part of the column's fingerprint; raise the version when captions change."""

    name: str
    version: int

    def caption(self, images: Sequence[Image.Image]) -> list[str]: ...


@dataclass(frozen=True)
class CaptionerSpec:
    """Which captioner, with which weights and generation settings. All of it identifies the captions."""

    name: str
    checkpoint: str
    prompt: str = ""
    max_new_tokens: int = 24
    num_beams: int = 1


class TransformersCaptioner:
    """Any image-to-text model that transformers loads by Auto classes (BLIP, GIT, ViT + text decoder, Florence ...)."""

    name, version = "transformers", 1

    def __init__(self, spec: CaptionerSpec, path: Path, device: str) -> None:
        self._spec, self._device = spec, device
        self._model, self._processor = _load_image_to_text(path)
        self._model.to(device)

    def caption(self, images: Sequence[Image.Image]) -> list[str]:
        import torch

        given: dict[str, Any] = {"images": list(images), "return_tensors": "pt"}
        if self._spec.prompt:
            given["text"] = [self._spec.prompt] * len(images)
        inputs = {key: value.to(self._device) for key, value in self._processor(**given).items()}
        with torch.inference_mode():
            ids = self._model.generate(
                **inputs,
                max_new_tokens=self._spec.max_new_tokens,
                num_beams=self._spec.num_beams,
                do_sample=False,
            )
        texts = self._processor.batch_decode(ids, skip_special_tokens=True)
        return [text.strip().removeprefix(self._spec.prompt).strip() for text in texts]


def _load_image_to_text(path: Path) -> tuple[Any, Any]:
    """Model and processor from a folder; VisionEncoderDecoder folders have image processor and tokenizer apart."""
    import torch
    import transformers

    if not (path / "config.json").is_file():
        raise UserError(f"no captioner at {path}: expected a transformers folder with config.json and weights")
    # transformers takes the stored dtype by default; fp16 on a CPU is slower and overflows
    given: dict[str, Any] = {"local_files_only": True, "dtype": torch.float32}
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    if config.model_type == "vision-encoder-decoder":
        pair: Any = transformers.VisionEncoderDecoderModel.from_pretrained(path, **given)
        images = transformers.AutoImageProcessor.from_pretrained(path, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        return pair.eval(), _Pair(images, tokenizer)
    model = transformers.AutoModelForImageTextToText.from_pretrained(path, **given)
    return model.eval(), transformers.AutoProcessor.from_pretrained(path, local_files_only=True)


class _Pair:
    """An image processor and a tokenizer with a processor's face."""

    def __init__(self, images: Any, tokenizer: Any) -> None:
        self._images, self.batch_decode = images, tokenizer.batch_decode

    def __call__(self, *, images: list[Image.Image], return_tensors: str, **_: Any) -> Any:
        return self._images(images, return_tensors=return_tensors)


CAPTIONERS: dict[str, Callable[[CaptionerSpec, Path, str], Captioner]] = {
    "transformers": TransformersCaptioner,
}


def check_captioner(name: str) -> None:
    """UserError when there is no such captioner."""
    if name not in CAPTIONERS:
        raise UserError(f"unknown captioner {name!r}{nearest(name, CAPTIONERS)}: one of {', '.join(CAPTIONERS)}")
