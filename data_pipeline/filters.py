"""Measuring each row, and filters on what was measured: one status per row, with the reason.

A row is never dropped: it only stops being ok. Measuring knows no thresholds, so other thresholds cost no decoding and
leave every later column as it is.
"""

import unicodedata
from dataclasses import asdict, dataclass

import pyarrow as pa

from data_pipeline.images import MAX_PIXELS, ImageError
from data_pipeline.stage import OK, ShardView, Worker, result

VERSION = 1
_KEPT_FORMAT_CHARACTERS = "\u200c\u200d"  # joiners that emoji and several scripts need


@dataclass(frozen=True)
class MeasureStage:
    """Decodes: size or why there is none (corrupt, too_large), the cleaned caption, and where the row came from."""

    name: str = "measure"
    inputs: tuple[str, ...] = ("ingest",)

    def identity(self) -> dict[str, object]:
        return {"version": VERSION, "max_pixels": MAX_PIXELS}

    def open(self) -> Worker:
        return self.run

    def run(self, shard: ShardView) -> pa.Table:
        table = shard.column("ingest").drop_columns(["image"]).to_pylist()
        by_row = {row["row"]: row for row in table}
        done = [self._measure(shard, by_row[row]) for row in shard.rows]
        return result(
            shard.rows,
            [status for status, *_ in done],
            reason=pa.array([reason for _, reason, _ in done], pa.string()),
            width=pa.array([size[0] for *_, size in done], pa.int32()),
            height=pa.array([size[1] for *_, size in done], pa.int32()),
            caption=pa.array([clean_caption(by_row[row]["caption"]) for row in shard.rows], pa.string()),
            key=pa.array([by_row[row]["key"] for row in shard.rows], pa.string()),
            source=pa.array([by_row[row]["source"] for row in shard.rows], pa.string()),
            info=pa.array([by_row[row]["info"] for row in shard.rows], pa.string()),
        )

    def _measure(self, shard: ShardView, row: dict) -> tuple[str, str, tuple[int, int]]:
        if row["status"] != OK:
            return row["status"], row["reason"], (0, 0)
        try:
            return OK, "", shard.image(row["row"]).size
        except ImageError as error:
            return error.status, error.reason, (0, 0)


@dataclass(frozen=True)
class FilterStage:
    """Thresholds. Statuses: too_small, aspect, bad_caption, or what was said before."""

    min_side: int = 32
    max_aspect: float = 3.0
    max_caption_chars: int = 5000
    name: str = "filter"
    inputs: tuple[str, ...] = ("measure",)

    def identity(self) -> dict[str, object]:
        return {"version": VERSION, **asdict(self)}

    def open(self) -> Worker:
        return self.run

    def run(self, shard: ShardView) -> pa.Table:
        by_row = {row["row"]: row for row in shard.column("measure").to_pylist()}
        judged = [self._judge(by_row[row]) for row in shard.rows]
        reasons = pa.array([reason for _, reason in judged], pa.string())
        return result(shard.rows, [status for status, _ in judged], reason=reasons)

    def _judge(self, row: dict) -> tuple[str, str]:
        width, height, caption = row["width"], row["height"], row["caption"]
        if row["status"] != OK:
            return row["status"], row["reason"]
        if min(width, height) < self.min_side:
            return "too_small", f"{width}x{height} pixels, at least {self.min_side} on each side"
        if max(width / height, height / width) > self.max_aspect:
            return "aspect", f"{width}x{height} pixels, at most 1:{self.max_aspect:g}"
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
