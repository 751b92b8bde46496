"""The caption column: what a captioner says of each image. The original caption stays where it is."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
from PIL import Image

from data_pipeline.captions.answers import NoCaption
from data_pipeline.captions.registry import get_captioner, open_captioner
from data_pipeline.captions.spec import Captioner, CaptionerSpec
from data_pipeline.curation.filters import clean_caption
from data_pipeline.stages.stage import OK, ShardView, StageFunction, stage_table
from infra.errors import UserError
from infra.log import get_logger

VERSION = 2  # 1 knew fewer openings and refusals
MAX_CHARS = 2000
_OPENING = re.compile(
    r"(?:sure|certainly)?[,!.: ]*(?:here is a (?:factual )?description(?: of the image)?: )?"
    r"(?:(?:this|the) (?:image|picture|photo|photograph) "
    r"(?:showcases|shows|depicts|features|presents|displays|captures|is of|contains)(?: |[.:]?$)"
    r"|in (?:this|the) (?:image|picture|photo|photograph),? )?",
    re.IGNORECASE,
)
_REFUSALS = re.compile(
    r"(?:i'm |i am |we are )(?:afraid|unable|not able)|(?:i'm |i am |we are )?sorry\b"
    r"|i (?:cannot|can't|can not|won't)\b|as an? (?:ai|large language|language) "
    r"|(?:this|the) (?:image|picture|content) (?:cannot|can't) be described",
    re.IGNORECASE,
)

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
        version = get_captioner(self.spec.name).version
        return {"version": VERSION, "captioner": version, "weights": self.weights, **self.spec.identity()}

    def open(self) -> StageFunction:
        captioner = open_captioner(self.spec, self.device)

        def run(shard: ShardView) -> pa.Table:
            texts: list[str | NoCaption] = []
            for _, images in shard.image_batches(shard.rows, self.batch):
                texts += caption_images(captioner, images)
            judged = [judge_caption(text) for text in texts]
            return stage_table(
                shard.rows,
                [status for status, _ in judged],
                caption=pa.array([text for _, text in judged], pa.string()),
            )

        return run


def caption_images(captioner: Captioner, images: Sequence[Image.Image]) -> list[str | NoCaption]:
    """One caption per image, "" where the captioner fails: a bad image must not take its batch along."""
    try:
        captions = captioner.caption(images)
        if len(captions) != len(images):
            raise ValueError(f"{captioner.name} gave {len(captions)} captions for {len(images)} images")
        return list(captions)
    except UserError:  # no server: nothing that is wrong with an image
        raise
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        if len(images) == 1:
            log.warning("%s failed on an image: %s", captioner.name, error)
            return [""]
        return [text for image in images for text in caption_images(captioner, [image])]


def judge_caption(text: str | NoCaption) -> tuple[str, str]:
    """(status, caption): boilerplate openings trimmed; empty, refusing and runaway captions get a status."""
    if isinstance(text, NoCaption):
        return text.status, ""
    caption = clean_caption(text)
    if _REFUSALS.match(caption):
        return "refusal", ""
    caption = _OPENING.sub("", caption, count=1)
    if not any(character.isalnum() for character in caption):
        return "empty", ""
    words = caption.lower().split()
    if len(caption) > MAX_CHARS or (len(words) >= 12 and len(set(words)) * 4 < len(words)):
        return "runaway", ""
    return OK, caption
