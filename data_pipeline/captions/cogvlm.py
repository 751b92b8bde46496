"""CogVLM through its own remote code: transformers has no class for it, so the checkpoint's Python files run.

They run only if the plan says so, and only in the version that was read: their hash is pinned. The old code needs its
own transformers (below 4.42): give the captioner's workers an environment with --captioner.pip.
"""
# Shapes: B batch, L tokens (vision and prompt).

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.captions.spec import DESCRIBE, CaptionerSpec
from data_pipeline.checkpoints import resolve
from infra.device import resolve_precision
from infra.errors import UserError

_LANGUAGE = 0  # token type; vision tokens are 1


class CogVlmCaptioner:
    """Any checkpoint whose code keeps CogVLM's contract: `build_conversation_input_ids` and `generate(images=...)`."""

    name, version = "cogvlm", 1

    def __init__(self, spec: CaptionerSpec, device: str) -> None:
        import torch
        import transformers

        path = resolve(spec.checkpoint)
        _check_code(spec, path)
        self._spec, self._device = spec, device
        # bf16 is what the checkpoint was trained in. A CPU always takes fp32, so that one column's captions do not
        # depend on which CPU wrote them.
        half = device != "cpu" and resolve_precision("auto", device) == "bf16"
        self._dtype = torch.bfloat16 if half else torch.float32
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=True, local_files_only=True, torch_dtype=self._dtype, low_cpu_mem_usage=True
        )
        self._model.to(device).eval()
        where = resolve(spec.tokenizer) if spec.tokenizer else path
        # said either way: left out, transformers would stop and ask at the keyboard
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            where, trust_remote_code=where == path, local_files_only=True
        )
        if not hasattr(self._model, "build_conversation_input_ids"):
            raise UserError(f"{path}: its model has no build_conversation_input_ids: not a CogVLM checkpoint")

    def caption(self, images: Sequence[Image.Image]) -> list[str]:
        import torch

        query = self._spec.prompt or DESCRIBE
        template = {"template_version": self._spec.template} if self._spec.template else {}
        build = self._model.build_conversation_input_ids
        rows = [build(self._tokenizer, query=query, history=[], images=[image], **template) for image in images]
        inputs = pad_left(rows, self._tokenizer.pad_token_id or 0)
        given: dict[str, Any] = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        given["images"] = [[row["images"][0].to(self._device, self._dtype)] for row in rows]
        with torch.inference_mode():
            ids_BL = self._model.generate(
                **given, max_new_tokens=self._spec.max_new_tokens, num_beams=self._spec.num_beams, do_sample=False
            )
        new_BL = ids_BL[:, inputs["input_ids"].shape[1] :]
        texts = self._tokenizer.batch_decode(new_BL, skip_special_tokens=False)
        end = self._tokenizer.eos_token or "</s>"
        return [" ".join(text.split(end)[0].split()) for text in texts]


def pad_left(rows: Sequence[dict[str, Any]], pad: int) -> dict[str, Any]:
    """Unbatched conversations as (B, L) tensors, padded on the left: generation continues at the right end of a row."""
    import torch

    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": pad, "token_type_ids": _LANGUAGE, "attention_mask": 0}
    return {
        name: torch.stack(
            [torch.nn.functional.pad(row[name], (length - len(row[name]), 0), value=value) for row in rows]
        )
        for name, value in fill.items()
    }


def hash_code(path: Path) -> str:
    """Sixteen hex digits over the Python files of a checkpoint: the revision that a plan pins."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.py")):
        digest.update(file.relative_to(path).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _check_code(spec: CaptionerSpec, path: Path) -> None:
    if not (path / "config.json").is_file() or not list(path.glob("*.py")):
        raise UserError(f"{path}: no CogVLM checkpoint: expected config.json, weights and the model's own *.py files")
    found = hash_code(path)
    if not spec.trust_remote_code:
        raise UserError(
            f"captioner cogvlm runs the Python files in {path}: read them, then add --captioner.trust-remote-code "
            f"--captioner.revision {found}"
        )
    if spec.revision != found:
        pinned = f"revision {spec.revision}" if spec.revision else "no revision"
        raise UserError(
            f"{path}: its Python files have revision {found}, the plan pins {pinned}: read what changed, then say "
            f"--captioner.revision {found}"
        )
