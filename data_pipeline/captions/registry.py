"""CAPTIONERS: every way to caption images. To add one, write a class beside this file and a line below."""

from data_pipeline.captions.cogvlm import CogVlmCaptioner
from data_pipeline.captions.image_to_text import TransformersCaptioner
from data_pipeline.captions.server import ServerCaptioner
from data_pipeline.captions.spec import Captioner, CaptionerSpec
from data_pipeline.checkpoints import hash_weights, resolve
from infra.errors import UserError, nearest

CAPTIONERS: dict[str, type[Captioner]] = {
    "transformers": TransformersCaptioner,
    "cogvlm": CogVlmCaptioner,
    "server": ServerCaptioner,
}


def get_captioner(name: str) -> type[Captioner]:
    """The class of that name; an unknown one is refused with the nearest known."""
    if name not in CAPTIONERS:
        raise UserError(f"unknown captioner {name!r}{nearest(name, CAPTIONERS)}: one of {', '.join(CAPTIONERS)}")
    return CAPTIONERS[name]


def open_captioner(spec: CaptionerSpec, device: str) -> Captioner:
    """The captioner with its weights loaded, or ready to ask its server."""
    return get_captioner(spec.name)(spec, device)


def identify_weights(spec: CaptionerSpec) -> str:
    """What stands for the weights in the column's fingerprint; UserError for a checkpoint that is not there.

    A hash of the checkpoint's files, unless the captioner has an `identify_weights` of its own (a server's weights lie
    elsewhere). A captioner without weights is named with an empty checkpoint.
    """
    own = getattr(get_captioner(spec.name), "identify_weights", None)
    if spec.url:
        spec.check_address()  # refused before any work, and before plan.yaml holds a secret
    if own is not None:
        return own(spec)
    return hash_weights(resolve(spec.checkpoint)) if spec.checkpoint else "none"
