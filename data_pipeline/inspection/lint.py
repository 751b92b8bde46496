"""What a foreign source holds and what a run would make of it, by the pipeline's own readers, before any work.

A sample is the first rows of units that are spread over the source. Nothing is written.
"""

import io
import posixpath
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from data_pipeline.curation.dedup import SignatureStage
from data_pipeline.curation.filters import MeasureStage
from data_pipeline.curation.scores import rate_caption
from data_pipeline.images import describe_picture
from data_pipeline.plans import PLANS, DatasetPlan
from data_pipeline.sources.captions import Caption
from data_pipeline.sources.ingest import Ingest
from data_pipeline.sources.seen import Seen
from data_pipeline.sources.source import FoundField, RawRow, Source, SourceUnit
from data_pipeline.stages.buckets import find_nearest_bucket, list_buckets
from data_pipeline.stages.stage import OK, ShardView
from infra import storage

UNITS, EXAMPLES, MOST_BROKEN = 20, 3, 1000
_SHARD_ROWS = 100  # at a time: pictures lie in memory while they are looked at


@dataclass(frozen=True)
class BrokenPart:
    """A row that was set aside, and why; the reason names file and offset where it is about bytes."""

    row: str
    status: str
    reason: str


@dataclass
class PlanOutcome:
    """What a plan's sizes and limits make of the rows that were read. Scores of images and near duplicates are left
    out."""

    kept: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)
    buckets: Counter[str] = field(default_factory=Counter)


@dataclass
class LintFindings:
    """All of it, as --json writes it. `sizes` and lengths are smallest, median, largest."""

    source: str
    whole: bool = False
    units: int = 0
    units_read: int = 0
    files: dict[str, int] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen)
    statuses: Counter[str] = field(default_factory=Counter)
    broken: list[BrokenPart] = field(default_factory=list)
    fields: list[FoundField] = field(default_factory=list)
    caption_column: str = ""
    caption_values: Counter[str] = field(default_factory=Counter)
    captions: list[str] = field(default_factory=list)
    caption_chars: list[int] = field(default_factory=list)
    caption_copies: int = 0
    pictures: Counter[str] = field(default_factory=Counter)
    traits: Counter[str] = field(default_factory=Counter)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    duplicates: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    outcomes: dict[str, PlanOutcome] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(self.statuses.values())


def lint_source(source: Source, named: str, uri: str, *, rows: int | None, aspect: float = 1.0) -> LintFindings:
    """Reads about `rows` rows of at most 20 units, everything where `rows` is None. `named` is KIND:URI."""
    found = LintFindings(named, files=count_files(uri), fields=list_fields(source))
    units = source.list_units()
    chosen = units if rows is None or len(units) <= UNITS else [units[n * len(units) // UNITS] for n in range(UNITS)]
    reading, finished = _Reading(found, aspect), 0
    for number, unit in enumerate(chosen):
        share = None if rows is None else max(1, -(-(rows - found.rows) // (len(chosen) - number)))
        finished += reading.read(source, unit, share)
    found.caption_column = ", ".join(dict.fromkeys(unit.where["caption"] for unit in units if "caption" in unit.where))
    found.units, found.units_read, found.whole = len(units), len(chosen), finished == len(units)
    reading.conclude()
    return found


def list_fields(source: Source) -> list[FoundField]:
    """Columns of tables; none for a source without one."""
    find = getattr(source, "list_fields", None)
    return list(find()) if find else []


def count_files(uri: str) -> dict[str, int]:
    """Files by suffix, the most frequent first; {} for a pattern of names."""
    names = [] if "{" in uri else storage.iter_files(uri, links=True)
    return dict(Counter(posixpath.splitext(name)[1].lower() or "no suffix" for name in names).most_common())


class _Reading:
    """Adds rows to the findings."""

    def __init__(self, found: LintFindings, aspect: float) -> None:
        self.found = found
        self._width, self._height, self._chars = array("l"), array("l"), array("l")
        self._captions, self._pixels = Counter[str](), Counter[str]()
        self._fields: dict[str, FoundField] = {}
        self._plans = [_PlanJudge(make(), aspect) for make in PLANS.values()]
        found.outcomes = {judge.name: judge.outcome for judge in self._plans}
        self._measure, self._sign = MeasureStage().open(), SignatureStage(perceptual=False).open()

    def read(self, source: Source, unit: SourceUnit, most: int | None) -> bool:
        """Up to `most` rows of a unit; was that all of it?"""
        rows = source.read_rows(unit)
        for table in Ingest(_SHARD_ROWS).make_tables(self._watch(islice(rows, most))):
            count = len(table)
            view = ShardView("", unit.id, {}, range(count), {"ingest": table})
            view.tables["measure"] = self._measure(view)
            pixels: dict[int, str] = {}
            if view.values("measure", "status"):
                pixels = dict(_pairs(self._sign(view), "exact"))
            for row, image in zip(view.tables["measure"].to_pylist(), table["image"].to_pylist()):
                self._add(row, image, pixels.get(row["row"], ""))
            self.found.splits[unit.split or "none"] += count
        finished = next(rows, None) is None
        self.found.seen.update(unit.seen)
        return finished

    def _watch(self, rows: Iterator[RawRow]) -> Iterator[RawRow]:
        """Rows as the source gives them: what it has for captions, and which fields lie beside."""
        for row in rows:
            self.found.caption_values[_name_type(row.caption)] += 1
            for name, value in row.info.items():
                had = self._fields.get(name) or FoundField(f"json: {name}", _name_type(value))
                example = had.example or ("" if value is None else str(value)[:80])
                self._fields[name] = replace(had, example=example, rows=had.rows + 1)
            yield row

    def _add(self, row: Mapping[str, Any], image: bytes | None, pixels: str) -> None:
        found, caption = self.found, row["caption"]
        found.statuses[row["status"]] += 1
        if row["status"] != OK and len(found.broken) < MOST_BROKEN:
            found.broken.append(BrokenPart(row["source"], row["status"], row["reason"]))
        if caption:
            self._chars.append(len(caption))
            self._captions[caption] += 1
            if len(found.captions) < EXAMPLES and caption not in found.captions:
                found.captions.append(caption)
        if pixels:
            self._pixels[pixels] += 1
            self._width.append(row["width"])
            self._height.append(row["height"])
        if image:
            kind, traits = describe_picture(io.BytesIO(image))
            found.pictures[kind] += 1
            found.traits.update(traits)
        for judge in self._plans:
            judge.add(row, pixels)

    def conclude(self) -> None:
        """Figures about all rows."""
        found = self.found
        found.fields += sorted(self._fields.values(), key=lambda one: -one.rows)
        found.widths, found.heights, found.caption_chars = map(_spread, (self._width, self._height, self._chars))
        found.duplicates = sum(self._pixels.values()) - len(self._pixels)
        found.caption_copies = sum(self._captions.values()) - len(self._captions)


class _PlanJudge:
    """The limits of a plan that need no network, equal pixels, and the bucket of each row that stays."""

    def __init__(self, plan: DatasetPlan, aspect: float) -> None:
        self.name, self.outcome = plan.name, PlanOutcome()
        # the other limits read scores of networks
        self._limits = replace(plan.strict, max_nsfw=None, min_aesthetic=None, min_caption_clip=None)
        self._buckets = list_buckets(plan.resolution, step=plan.bucket_step, max_aspect=max(aspect, plan.bucket_aspect))
        self._kept: set[str] = set()

    def add(self, row: Mapping[str, Any], pixels: str) -> None:
        status, _ = self._limits.judge({**row, "caption_quality": rate_caption(row["caption"])})
        if status == OK and pixels in self._kept:
            status = "duplicate"
        if status != OK:
            self.outcome.set_aside[status] += 1
            return
        self._kept.add(pixels)
        self.outcome.kept += 1
        self.outcome.buckets[find_nearest_bucket(row["width"], row["height"], self._buckets)] += 1


def _pairs(table: Any, name: str) -> Iterator[tuple[int, Any]]:
    yield from zip(table["row"].to_pylist(), table[name].to_pylist())


def _spread(values: Sequence[int]) -> list[int]:
    return [min(values), int(np.median(values)), max(values)] if len(values) else []


def _name_type(value: object) -> str:
    """A caption's type in plain words."""
    if value is None or (isinstance(value, str | bytes) and not value.strip()):
        return "nothing"
    if isinstance(value, Caption):
        return "unclear"
    kinds: dict[Any, str] = {str | bytes: "text", bool: "true/false", int | float: "number", list | tuple: "list"}
    kinds[Mapping] = "struct"
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), type(value).__name__)
