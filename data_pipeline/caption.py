"""The caption column: what a captioner says of each image. The original caption stays where it is."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
from PIL import Image

from data_pipeline.captioners import CAPTIONERS, Captioner, CaptionerSpec
from data_pipeline.checkpoints import resolve
from data_pipeline.filters import clean_caption
from data_pipeline.stage import OK, ShardView, Worker, result
from infra.log import get_logger

VERSION = 1
MAX_CHARS = 2000
_BOILERPLATE = ("this image showcases ", "the image showcases ", "this image shows ", "the image shows ")
_REFUSALS = ("i'm sorry", "i am sorry", "i cannot", "i can't", "as an ai")

log = get_logger("caption")


@dataclass(frozen=True)
class CaptionStage:
    """`weights` is the hash of the checkpoint's files: a moved checkpoint is the same, a changed one is not."""

    spec: CaptionerSpec
    weights: str
    batch: int = 64
    device: str = "cpu"
    name: str = "caption"
    inputs: tuple[str, ...] = ("ingest",)

    def identity(self) -> dict[str, object]:
        settings = {key: value for key, value in asdict(self.spec).items() if key != "checkpoint"}
        version = getattr(CAPTIONERS[self.spec.name], "version", 0)
        return {"version": VERSION, "captioner": version, "weights": self.weights, **settings}

    def open(self) -> Worker:
        captioner = CAPTIONERS[self.spec.name](self.spec, resolve(self.spec.checkpoint), self.device)

        def run(shard: ShardView) -> pa.Table:
            texts: list[str] = []
            for first in range(0, len(shard.rows), self.batch):
                images = [shard.image(row) for row in shard.rows[first : first + self.batch]]
                texts += caption_images(captioner, images)
            judged = [judge(text) for text in texts]
            return result(
                shard.rows,
                [status for status, _ in judged],
                caption=pa.array([text for _, text in judged], pa.string()),
            )

        return run


def caption_images(captioner: Captioner, images: Sequence[Image.Image]) -> list[str]:
    """One caption per image, "" where the captioner fails: a bad image must not take its batch along."""
    try:
        captions = captioner.caption(images)
        if len(captions) != len(images):
            raise ValueError(f"{captioner.name} gave {len(captions)} captions for {len(images)} images")
        return captions
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        if len(images) == 1:
            log.warning("%s failed on an image: %s", captioner.name, error)
            return [""]
        return [text for image in images for text in caption_images(captioner, [image])]


def judge(text: str) -> tuple[str, str]:
    """(status, caption): boilerplate openings trimmed; empty, refusing and runaway captions get a status."""
    caption = clean_caption(text)
    lowered = caption.lower()
    for opening in _BOILERPLATE:
        if lowered.startswith(opening):
            caption = caption[len(opening) :]
            break
    if not caption:
        return "empty", ""
    if lowered.startswith(_REFUSALS):
        return "refusal", ""
    words = lowered.split()
    if len(caption) > MAX_CHARS or (len(words) >= 12 and len(set(words)) * 4 < len(words)):
        return "runaway", ""
    return OK, caption
