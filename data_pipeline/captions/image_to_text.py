"""Captions by any image-to-text model that transformers loads through its Auto classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.captions.spec import CaptionerSpec
from data_pipeline.checkpoints import resolve
from infra.errors import UserError


class TransformersCaptioner:
    """Any image-to-text model that transformers loads by Auto classes (BLIP, GIT, ViT + text decoder, Florence ...)."""

    name, version = "transformers", 1

    def __init__(self, spec: CaptionerSpec, device: str) -> None:
        self._spec, self._device = spec, device
        self._model, self._processor = _load_image_to_text(resolve(spec.checkpoint))
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
        # some models (BLIP) give the prompt back as the beginning of their answer
        return [text.strip().removeprefix(self._spec.prompt).strip() for text in texts]


def _load_image_to_text(path: Path) -> tuple[Any, Any]:
    """Model and processor from a folder; VisionEncoderDecoder folders have image processor and tokenizer apart."""
    import torch
    import transformers

    if not (path / "config.json").is_file():
        raise UserError(f"no captioner at {path}: expected a transformers folder with config.json and weights")
    transformers.utils.logging.disable_progress_bar()  # the run shows its own
    # transformers takes the stored dtype by default; fp16 on a CPU is slower and overflows
    given: dict[str, Any] = {"local_files_only": True, "dtype": torch.float32}
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    if config.model_type == "vision-encoder-decoder":
        pair: Any = transformers.VisionEncoderDecoderModel.from_pretrained(path, **given)
        images = transformers.AutoImageProcessor.from_pretrained(path, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        return pair.eval(), _SplitProcessor(images, tokenizer)
    model = transformers.AutoModelForImageTextToText.from_pretrained(path, **given)
    return model.eval(), transformers.AutoProcessor.from_pretrained(path, local_files_only=True)


class _SplitProcessor:
    """An image processor and a tokenizer with the interface of a transformers processor."""

    def __init__(self, images: Any, tokenizer: Any) -> None:
        self._images, self.batch_decode = images, tokenizer.batch_decode

    def __call__(self, *, images: list[Image.Image], return_tensors: str, **_: Any) -> Any:
        return self._images(images, return_tensors=return_tensors)
