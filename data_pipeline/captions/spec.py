"""What a captioner is, and the settings that choose and identify one; `registry.py` lists them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from data_pipeline.captions.answers import NoCaption
from infra.errors import UserError
from infra.s3 import hide_password

# The nearest public text to what SD3's captions were made with: LAION-POP's instruction, in our words. The fixed
# opening makes the model start with the picture itself; stage.py cuts it off.
DESCRIBE = (
    "Describe this image in at most two paragraphs. Say which objects there are and how many of each, what they do and "
    "how they relate, the background, any readable text, the light and the style (photograph, cartoon, 3D render). "
    "Be factual and brief, do not speculate or interpret. Begin with the words: This image showcases"
)


class Captioner(Protocol):
    """Images to captions, made as `Class(spec, device)`, once per worker.

    `version` is part of the column's fingerprint: raise it when the same weights and settings give other captions.
    """

    name: str
    version: int

    def __init__(self, spec: "CaptionerSpec", device: str) -> None: ...

    def caption(self, images: Sequence[Image.Image]) -> Sequence[str | NoCaption]:
        """One text per image, in order. One that cannot be made is "" or says its status; UserError stops the run."""
        ...


@dataclass(frozen=True)
class CaptionerSpec:
    """Which captioner, with which weights and generation settings."""

    name: str
    """A line of CAPTIONERS: transformers (any image-to-text folder), cogvlm (its own code) or server (OpenAI's API)."""
    checkpoint: str
    """Folder with weights; for `server` the model's name there."""
    prompt: str = ""
    """Instruction to the model; cogvlm and server have one of their own if left out."""
    max_new_tokens: int = 24
    num_beams: int = 1
    tokenizer: str = ""
    """cogvlm: folder of the tokenizer (Vicuna's for cogvlm-chat), if it is not the checkpoint's."""
    template: str = ""
    """cogvlm: conversation template (chat, vqa, base); the checkpoint's own if left out."""
    trust_remote_code: bool = False
    """cogvlm: run the Python files in the checkpoint's folder."""
    revision: str = ""
    """cogvlm: hash of those files, as the refusal names it; server: the revision that it serves."""
    pip: tuple[str, ...] = ()
    """Pinned requirements (name==version) of an environment of its own for the captioner's Ray workers."""
    url: str = ""
    """server: address up to /v1, e.g. http://127.0.0.1:8000/v1; the key comes from BEELINE_CAPTION_KEY."""
    concurrency: int = 16
    """server: requests in flight per worker."""
    attempts: int = 6
    """server: tries per image, with growing waits."""
    timeout_s: float = 120
    """server: seconds per try."""

    def identity(self) -> dict[str, Any]:
        """Everything that captions depend on; where and how patiently they are asked for does not belong to it."""
        settings: dict[str, Any] = {
            "name": self.name,
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
        }
        for field in ("template", "revision", "pip"):
            if value := getattr(self, field):
                settings[field] = value
        return settings

    def address(self) -> str:
        """`url`, checked; it is printed and stored in plan.yaml, so that it must not hold a secret."""
        shown = hide_password(self.url).partition("?")[0]
        if "@" in self.url or "?" in self.url:
            raise UserError(
                f"--captioner.url {shown}: it must not hold a user, a password or a query, as it is printed and stored "
                "in plan.yaml: give the server's key in the environment variable BEELINE_CAPTION_KEY"
            )
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"--captioner.url {shown!r}: expected the server's address, e.g. http://127.0.0.1:8000/v1")
        return self.url.rstrip("/")

    def runtime_env(self) -> dict[str, Any] | None:
        """Ray's description of the environment that the captioner's workers need; None for this one."""
        loose = [wanted for wanted in self.pip if "==" not in wanted]
        if loose:
            raise UserError(f"--captioner.pip {loose[0]}: name an exact version (name==version)")
        return {"pip": {"packages": list(self.pip), "pip_check": False}} if self.pip else None
