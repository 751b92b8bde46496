"""Filters: one status per row, with the reason. A row is never dropped: it only stops being ok.

Statuses here: corrupt, too_small, too_large, aspect, bad_caption, or what ingest already said.
"""

import unicodedata
from dataclasses import dataclass

import pyarrow as pa

from data_pipeline.images import MAX_PIXELS, ImageError
from data_pipeline.stage import OK, ShardView, Worker, result

VERSION = 1
_KEPT_FORMAT_CHARACTERS = "\u200c\u200d"  # joiners that emoji and several scripts need


@dataclass(frozen=True)
class FilterStage:
    """Decode, size, aspect and caption. `max_pixels` is a guard against decompression bombs."""

    min_side: int = 32
    max_aspect: float = 3.0
    max_pixels: int = MAX_PIXELS
    max_caption_chars: int = 5000
    require_caption: bool = True
    name: str = "filter"
    inputs: tuple[str, ...] = ("ingest",)

    def identity(self) -> dict[str, object]:
        return {
            "version": VERSION,
            "min_side": self.min_side,
            "max_aspect": self.max_aspect,
            "max_pixels": self.max_pixels,
            "max_caption_chars": self.max_caption_chars,
            "require_caption": self.require_caption,
        }

    def open(self) -> Worker:
        return self.run

    def run(self, shard: ShardView) -> pa.Table:
        table = shard.column("ingest").drop_columns(["image"]).to_pylist()
        by_row = {row["row"]: row for row in table}
        done = [self._judge(shard, by_row[row]) for row in shard.rows]
        return result(
            shard.rows,
            [status for status, *_ in done],
            reason=pa.array([reason for _, reason, *_ in done], pa.string()),
            width=pa.array([size[0] for _, _, size, _ in done], pa.int32()),
            height=pa.array([size[1] for _, _, size, _ in done], pa.int32()),
            caption=pa.array([caption for *_, caption in done], pa.string()),
            key=pa.array([by_row[row]["key"] for row in shard.rows], pa.string()),
            source=pa.array([by_row[row]["source"] for row in shard.rows], pa.string()),
            info=pa.array([by_row[row]["info"] for row in shard.rows], pa.string()),
        )

    def _judge(self, shard: ShardView, row: dict) -> tuple[str, str, tuple[int, int], str]:
        caption = clean_caption(row["caption"])
        if row["status"] != OK:
            return row["status"], row["reason"], (0, 0), caption
        try:
            width, height = shard.image(row["row"]).size
        except ImageError as error:
            return error.status, error.reason, (0, 0), caption
        status, reason = self._size(width, height)
        if status == OK and (self.require_caption or caption):
            status, reason = self._caption(caption)
        return status, reason, (width, height), caption

    def _size(self, width: int, height: int) -> tuple[str, str]:
        if width * height > self.max_pixels:
            return "too_large", f"{width}x{height} pixels, at most {self.max_pixels:,}"
        if min(width, height) < self.min_side:
            return "too_small", f"{width}x{height} pixels, at least {self.min_side} on each side"
        if max(width / height, height / width) > self.max_aspect:
            return "aspect", f"{width}x{height} pixels, at most 1:{self.max_aspect:g}"
        return OK, ""

    def _caption(self, caption: str) -> tuple[str, str]:
        if not caption:
            return "bad_caption", "no caption"
        if len(caption) > self.max_caption_chars:
            return "bad_caption", f"{len(caption):,} characters, at most {self.max_caption_chars:,}"
        if not any(character.isalnum() for character in caption) and not _has_symbol(caption):
            return "bad_caption", "no letter, digit or symbol"
        return OK, ""


def clean_caption(text: str) -> str:
    """NFC, no control characters or byte-order tricks, single spaces. Scripts, emoji and accents stay."""
    kept = []
    for character in unicodedata.normalize("NFC", text):
        category = unicodedata.category(character)
        if category[0] == "Z" or character in "\t\n\r\v\f":
            kept.append(" ")
        elif character == "\ufffd" or (category[0] == "C" and character not in _KEPT_FORMAT_CHARACTERS):
            continue
        else:
            kept.append(character)
    return " ".join("".join(kept).split())


def _has_symbol(text: str) -> bool:
    return any(unicodedata.category(character) in ("So", "Sk") for character in text)
