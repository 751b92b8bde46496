"""What a captioner is, and the settings that choose and identify one; `registry.py` lists them."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from PIL import Image

from data_pipeline.captions.answers import NoCaption
from data_pipeline.captions.presets import get_preset
from infra.codec import from_json, to_json
from infra.errors import UserError
from infra.s3 import hide_password

# The nearest public text to what SD3's captions were made with: LAION-POP's instruction, in our words. The fixed
# opening makes the model start with the picture itself; stage.py cuts it off.
DESCRIBE = (
    "Describe this image in at most two paragraphs. Say which objects there are and how many of each, what they do and "
    "how they relate, the background, any readable text, the light and the style (photograph, cartoon, 3D render). "
    "Be factual and brief, do not speculate or interpret. Begin with the words: This image showcases"
)


_TAKEN = re.compile(r"original|synthetic|quality|clip(_.*)?")  # caption_clip and caption_quality are scores


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
    preset: str = ""
    """server: prompt, limit and sampling for a model of today, where no option says otherwise: qwen3-vl,
    qwen3-vl-thinking, internvl3.5, gemma-3, molmo, cogvlm2."""
    request: str = ""
    """server: JSON object merged into the request's body, e.g. {"temperature": 0.2}."""
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
        if body := self.make_request():
            settings["request"] = body  # what a preset says, not its name: a corrected preset gives other captions
        return settings

    def settle(self) -> "CaptionerSpec":
        """With the preset's prompt and limit where the options leave them as they are by default."""
        if self.name != "server" and (self.preset or self.request):
            raise UserError(f"--captioner.preset and --captioner.request are for server, the captioner is {self.name}")
        self.make_request()
        if not self.preset:
            return self
        found, default = get_preset(self.preset), CaptionerSpec("", "")
        limit = found.max_new_tokens if self.max_new_tokens == default.max_new_tokens else self.max_new_tokens
        return replace(self, prompt=self.prompt or found.prompt, max_new_tokens=limit)

    def make_request(self) -> dict[str, Any]:
        """What preset and `request` add to a request's body; {} where neither is given."""
        try:
            own = json.loads(self.request or "{}")
        except ValueError as error:
            raise UserError(f"--captioner.request {self.request!r} is not JSON ({error})") from None
        reserved = {"model", "messages", "max_tokens"} & set(own) if isinstance(own, dict) else {"a list or text"}
        if reserved:
            raise UserError(f"--captioner.request: expected an object without {', '.join(sorted(reserved))}")
        return {**(get_preset(self.preset).request if self.preset else {}), **own}

    def check_address(self) -> str:
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


def read_more_captions(text: str, first: CaptionerSpec) -> dict[str, CaptionerSpec]:
    """Captioners by the names of their captions, from YAML or JSON: {NAME: {FIELD: VALUE}}, the rest as in `first`."""
    import yaml

    try:
        found = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"--more-captions: not YAML ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(found, dict) or not all(isinstance(own, dict) for own in found.values()):
        raise UserError(f"--more-captions {text!r}: expected settings by name, e.g. '{{short: {{prompt: Briefly.}}}}'")
    made = {}
    for name, own in found.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", str(name)) or _TAKEN.fullmatch(str(name)):
            raise UserError(
                f"--more-captions: {name!r} is no name for a further caption: expected small letters, digits and _, "
                "neither original, synthetic nor a score's (clip, quality)"
            )
        made[str(name)] = from_json(CaptionerSpec, to_json(first) | own, where=f"--more-captions: {name}").settle()
    return made
