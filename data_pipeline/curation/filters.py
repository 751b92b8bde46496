"""Measuring each row, and filters on what was measured: one status per row, with the reason.

A row is never dropped: it only stops being ok. Measuring knows no thresholds, so other thresholds cost no decoding and
leave every later column as it is.
"""

import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipeline.images import MAX_PIXELS, ImageError
from data_pipeline.stages.row_status import ok_rows, status_table
from data_pipeline.stages.stage import OK, ShardView, StageFunction, stage_table
from infra.errors import UserError

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


# A limit on a score -> (the column of the scorer, the status of rows beyond the limit).
SCORE_LIMITS: Mapping[str, tuple[str, str]] = {
    "max_nsfw": ("nsfw", "nsfw"),
    "min_aesthetic": ("aesthetic", "ugly"),
    "min_caption_quality": ("caption_quality", "bad_caption"),
    "min_caption_clip": ("caption_clip", "bad_caption"),
}


@dataclass(frozen=True)
class Thresholds:
    """Limits on what was measured of a row; None is no limit. Field comments are the command line's help."""

    min_side: int | None = 32
    """Images with a shorter side are set aside as too_small."""
    max_aspect: float | None = 3.0
    """More elongated images are set aside as aspect."""
    max_caption_chars: int | None = 5000
    """Longer captions are set aside as bad_caption."""
    max_nsfw: float | None = None
    """Images that --nsfw scores higher (0 to 1) are set aside as nsfw."""
    min_aesthetic: float | None = None
    """Images that --aesthetic scores lower (1 to 10 with LAION's heads) are set aside as ugly."""
    min_caption_quality: float | None = None
    """Original captions that score lower (0 to 1) are set aside as bad_caption."""
    min_caption_clip: float | None = None
    """Original captions whose --caption-clip cosine is lower (-1 to 1) are set aside as bad_caption."""

    @property
    def scorers(self) -> tuple[str, ...]:
        """Names of the score columns that a limit reads."""
        return tuple(scorer for name, (scorer, _) in SCORE_LIMITS.items() if getattr(self, name) is not None)

    def identity(self) -> dict[str, Any]:
        return {name: limit for name, limit in vars(self).items() if limit is not None}

    def loosen(self, gate: "Thresholds") -> "Thresholds":
        """These limits with those that `gate` has; UserError where it would stop rows that these let through."""
        looser = gate.identity()
        for name, value in looser.items():
            limit = getattr(self, name)
            if limit is None or (value < limit if name.startswith("max") else value > limit):
                strict = "no such limit" if limit is None else f"the strict limit {limit:g}"
                option = name.replace("_", "-")
                raise UserError(f"--gate.{option} {value:g} is tighter than {strict}: loosen it, or set --{option} too")
        return replace(self, **looser)

    def judge(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """(status, reason) of a row of the measure column with the scores it has."""
        width, height, caption = row["width"], row["height"], row["caption"]
        if row["status"] != OK:
            return row["status"], row["reason"]
        if self.min_side is not None and min(width, height) < self.min_side:
            return "too_small", f"{width}x{height} pixels, at least {self.min_side} on each side"
        if self.max_aspect is not None and max(width / height, height / width) > self.max_aspect:
            return "aspect", f"{width}x{height} pixels, at most 1:{self.max_aspect:g}"
        if not caption:
            return "bad_caption", "no caption"
        if self.max_caption_chars is not None and len(caption) > self.max_caption_chars:
            return "bad_caption", f"{len(caption):,} characters, at most {self.max_caption_chars:,}"
        if not any(character.isalnum() for character in caption) and not _has_symbol(caption):
            return "bad_caption", "no letter, digit or symbol"
        return self._judge_scores(row)

    def _judge_scores(self, row: Mapping[str, Any]) -> tuple[str, str]:
        for name, (scorer, status) in SCORE_LIMITS.items():
            limit, is_most = getattr(self, name), name.startswith("max")
            if limit is None:
                continue
            score = row[scorer]
            # written so that a score that is no number (NaN) passes no threshold
            if not (score <= limit if is_most else score >= limit):
                return status, f"{scorer} {score:.3g}, {'at most' if is_most else 'at least'} {limit:g}"
        return OK, ""


NO_LIMITS = Thresholds(min_side=None, max_aspect=None, max_caption_chars=None)


def join_scores(measured: pa.Table, scores: Mapping[str, pa.Table]) -> Iterator[dict[str, Any]]:
    """Rows of the measure column, each with the scores of its row (NaN where a scorer has none)."""
    by_name = {name: dict(zip(t["row"].to_pylist(), t["score"].to_pylist())) for name, t in scores.items()}
    wanted = ["row", "status", "reason", "width", "height", "caption"]
    for row in measured.select(wanted).to_pylist():
        yield row | {name: found.get(row["row"], float("nan")) for name, found in by_name.items()}


def select_ok(table: pa.Table, judged: pa.Table) -> pa.Table:
    """Rows of a shard's table that passed the filter."""
    return table.filter(pa.array(np.isin(table["row"].to_numpy(), ok_rows(judged))))


def judge_strictly(strict: Thresholds, measured: pa.Table, scores: Mapping[str, pa.Table]) -> pa.Table:
    """What the strict thresholds say of a shard's rows."""
    judged = [(row["row"], *strict.judge(row)) for row in join_scores(measured, scores)]
    return status_table(*zip(*judged))


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
