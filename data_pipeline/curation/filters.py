"""Measuring each row, and filters on what was measured: one status per row, with the reason.

A row is never dropped: it only stops being ok. Measuring knows no thresholds, so other thresholds cost no decoding and
leave every later column as it is.
"""

import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from data_pipeline.images import MAX_PIXELS, ImageError
from data_pipeline.stages.stage import OK, ShardView, StageFunction, stage_table

VERSION = 1
_KEPT_FORMAT_CHARACTERS = "\u200c\u200d"  # joiners that emoji and several scripts need


@dataclass(frozen=True)
class MeasureStage:
    """Decodes: size or why there is none (corrupt, too_large), the cleaned caption, and where the row came from."""

    name: str = "measure"
    inputs: tuple[str, ...] = ("ingest",)

    def identity(self) -> dict[str, object]:
        return {"version": VERSION, "max_pixels": MAX_PIXELS}

    def open(self) -> StageFunction:
        return self.run

    def run(self, shard: ShardView) -> pa.Table:
        table = shard.column("ingest").drop_columns(["image"]).to_pylist()
        by_row = {row["row"]: row for row in table}
        done = [self._measure(shard, by_row[row]) for row in shard.rows]
        return stage_table(
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
class Thresholds:
    """What a row must fulfil. Statuses: too_small, aspect, bad_caption, nsfw, ugly, or the one it had before.

    None switches a threshold off; the score thresholds need the column of their scorer.
    """

    min_side: int = 32
    max_aspect: float = 3.0
    max_caption_chars: int = 5000
    max_nsfw: float | None = None
    min_aesthetic: float | None = None
    min_caption_quality: float | None = None
    min_caption_clip: float | None = None

    @property
    def scorers(self) -> tuple[str, ...]:
        """Names of the score columns that are looked at."""
        wanted = {
            "nsfw": self.max_nsfw,
            "aesthetic": self.min_aesthetic,
            "caption_quality": self.min_caption_quality,
            "caption_clip": self.min_caption_clip,
        }
        return tuple(name for name, value in wanted.items() if value is not None)

    def identity(self) -> dict[str, object]:
        scores = ("max_nsfw", "min_aesthetic", "min_caption_quality", "min_caption_clip")
        return {k: v for k, v in asdict(self).items() if k not in scores or v is not None}

    def judge(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """(status, reason) of a row of the measure column with the scores it has."""
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
        return self._judge_scores(row)

    def _judge_scores(self, row: Mapping[str, Any]) -> tuple[str, str]:
        for name, status, limit, sign in (
            ("nsfw", "nsfw", self.max_nsfw, 1),
            ("aesthetic", "ugly", self.min_aesthetic, -1),
            ("caption_quality", "bad_caption", self.min_caption_quality, -1),
            ("caption_clip", "bad_caption", self.min_caption_clip, -1),
        ):
            if limit is None:
                continue
            score = row[name]
            # a score that is no number passes no threshold
            if not sign * score <= sign * limit:
                return status, f"{name} {score:.3g}, {'at most' if sign > 0 else 'at least'} {limit:g}"
        return OK, ""


def join_scores(measured: pa.Table, scores: Mapping[str, pa.Table]) -> Iterator[dict[str, Any]]:
    """Rows of the measure column, each with the scores of its row (NaN where a scorer has none)."""
    by_name = {name: dict(zip(t["row"].to_pylist(), t["score"].to_pylist())) for name, t in scores.items()}
    wanted = ["row", "status", "reason", "width", "height", "caption"]
    for row in measured.select(wanted).to_pylist():
        yield row | {name: found.get(row["row"], float("nan")) for name, found in by_name.items()}


@dataclass(frozen=True)
class FilterStage:
    """The gate that rows pass before anything expensive is computed for them."""

    thresholds: Thresholds = Thresholds()
    name: str = "filter"

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("measure", *self.thresholds.scorers)

    def identity(self) -> dict[str, object]:
        return {"version": VERSION, **self.thresholds.identity(), "name": self.name, "inputs": list(self.inputs)}

    def open(self) -> StageFunction:
        return self.run

    def run(self, shard: ShardView) -> pa.Table:
        scores = {name: shard.column(name) for name in self.thresholds.scorers}
        by_row = {row["row"]: row for row in join_scores(shard.column("measure"), scores)}
        judged = [self.thresholds.judge(by_row[row]) for row in shard.rows]
        reasons = pa.array([reason for _, reason in judged], pa.string())
        return stage_table(shard.rows, [status for status, _ in judged], reason=reasons)


def clean_caption(text: str) -> str:
    """NFC, no control characters or byte-order tricks, single spaces. Scripts, emoji and accents stay."""
    # NFC: an accented letter is one code point, so that equal captions are equal texts to tokenizers and to hashes
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
