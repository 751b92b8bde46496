"""Stored evidence for T2I-CompBench, one JSON object per image: detections, depths and answers score by themselves.

A line: filename (or prompt and question_id), category, and what the category asks for: `detections` [[label, x1, y1,
x2, y2, score], ...] in the detector's order, `probabilities` [P(yes) per chunk], `cosine`, `depth` (8-bit picture).
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.drawing.pictures import read_picture
from eval.judging.geneval_prompts import split_json_lines
from eval.judging.language import LOCALITIES_2D, LOCALITIES_3D, Pair, PromptReader, find_locality
from eval.judging.prompts import COMPBENCH_CATEGORIES
from eval.metrics.compbench import rules as compbench
from eval.metrics.compbench.evidence import ATTRIBUTES, COMPLEX_KINDS, Evidence, read_counts, read_objects
from eval.metrics.compbench.files import parse_name
from eval.metrics.compbench.rules import LabelledBox
from eval.networks.depth import to_frame
from infra.errors import UserError, nearest


@dataclass(frozen=True)
class StoredEvidence:
    """One image's evidence with its prompt and its number in the category."""

    prompt: str
    number: int
    evidence: Evidence


@dataclass(frozen=True)
class PromptLookup:
    """Who answers what a line leaves open about its prompt; asked only then."""

    reader: Callable[[], PromptReader]
    names: Callable[[], tuple[list[str], list[str]]]
    kind: Callable[[str], str] | None = None


def format_stored(filename: str, prompt: str, *, number: int, evidence: Evidence, depth: str | None = None) -> str:
    """The JSON line that `read_stored` reads back; `depth` is the depth picture's path beside the file."""
    names, numbers = evidence.counted
    record = {
        "filename": filename,
        "prompt": prompt,
        "question_id": number,
        "category": evidence.category,
        "kind": evidence.kind or None,
        "detections": [[item.label, *item.box, item.score] for item in evidence.seen],
        "objects": list(evidence.objects),
        "locality": evidence.locality,
        "counted": [list(names), list(numbers)],
        "probabilities": list(evidence.probabilities),
        "cosine": evidence.cosine,
        "depth": depth,
    }
    return json.dumps(record)


def read_stored(path: str | Path, words: PromptLookup) -> Iterator[StoredEvidence]:
    """Every line's evidence; UserError names the line that is none."""
    try:
        lines = split_json_lines(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read stored evidence {path}: {error}") from error
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompt, number = _read_name(record)
            yield StoredEvidence(prompt, number, _read_evidence(record, prompt, Path(path).parent, words))
        except UserError as error:
            raise UserError(f"{path}:{row}: {error}") from error
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
            raise UserError(f"{path}:{row}: not stored evidence ({reason}); see compbench judge --help") from error


def _read_name(record: Mapping[str, Any]) -> tuple[str, int]:
    """Prompt and number, as stated or out of the official file name."""
    if "prompt" in record and "question_id" in record:
        return str(record["prompt"]), int(record["question_id"])
    name = parse_name(Path(record.get("filename", "")).name)
    if name is None:
        raise UserError("expected prompt and question_id, or a filename of the form `<prompt>_<6 digits>.png`")
    return name


def _read_evidence(record: Mapping[str, Any], prompt: str, folder: Path, words: PromptLookup) -> Evidence:
    category = record["category"]
    if category not in COMPBENCH_CATEGORIES:
        known = ", ".join(COMPBENCH_CATEGORIES)
        raise UserError(f"unknown category {category!r}; known: {known}{nearest(str(category), COMPBENCH_CATEGORIES)}")
    kind = _read_kind(record, prompt, words) if category == "complex" else ""
    placed = category in ("spatial", "3d_spatial") or kind in ("spatial", "both")
    asked = category in ATTRIBUTES or bool(kind)
    cosine = category == "non_spatial" or kind in ("action", "both")
    return Evidence(
        category,
        seen=_read_boxes(record) if placed or category == "numeracy" else (),
        objects=_read_objects(record, category, prompt, words) if placed else (None, None),
        locality=_read_locality(record, category, prompt, words) if placed else None,
        counted=_read_counts(record, prompt, words) if category == "numeracy" else ((), ()),
        probabilities=[_parse_probability(value) for value in record["probabilities"]] if asked else [],
        depth_HW=_read_depth(folder / record["depth"]) if category == "3d_spatial" else None,
        cosine=_parse_finite(record["cosine"]) if cosine else 0.0,
        kind=kind,
    )


def _read_kind(record: Mapping[str, Any], prompt: str, words: PromptLookup) -> str:
    kind = record.get("kind") or (words.kind(prompt) if words.kind else None)
    if kind not in COMPLEX_KINDS:
        raise UserError(f"a complex prompt needs its kind ({', '.join(COMPLEX_KINDS)}): state it, or give --dataset")
    return str(kind)


def _read_boxes(record: Mapping[str, Any]) -> list[LabelledBox]:
    """Boxes in UniDet's frame, or in the pixels of an image whose `size` [height, width] is stated."""
    scale, seen = 1.0, []
    if "size" in record:
        height, width = record["size"]
        if min(height, width) < 1:
            raise UserError(f"a size of {record['size']}; expected [height, width] in pixels")
        scale = compbench.detector_scale(height, width)
    for label, *numbers in record["detections"]:
        x1, y1, x2, y2, score = (_parse_finite(value) for value in numbers)
        if x2 < x1 or y2 < y1:
            raise UserError(f"the box {[x1, y1, x2, y2]} of {label!r} is turned around; expected x1, y1, x2, y2")
        seen.append(LabelledBox(str(label), [value * scale for value in (x1, y1, x2, y2)], score))
    return seen


def _read_objects(record: Mapping[str, Any], category: str, prompt: str, words: PromptLookup) -> Pair:
    if "objects" not in record:
        return read_objects(words.reader(), category, prompt)
    first, second = record["objects"]
    return first, second


def _read_locality(record: Mapping[str, Any], category: str, prompt: str, words: PromptLookup) -> str | None:
    if "locality" in record:
        known = (*LOCALITIES_2D, *LOCALITIES_3D)
        if record["locality"] not in (None, *known):
            raise UserError(f"unknown locality {record['locality']!r}; known: null, {', '.join(known)}")
        return record["locality"]
    return find_locality(prompt, LOCALITIES_3D if category == "3d_spatial" else LOCALITIES_2D)


def _read_counts(record: Mapping[str, Any], prompt: str, words: PromptLookup) -> tuple[Sequence[str], Sequence[int]]:
    if "counted" not in record:
        return read_counts(words.reader(), words.names(), prompt)
    names, numbers = record["counted"]
    return [str(name) for name in names], [int(number) for number in numbers]


def _read_depth(path: Path) -> np.ndarray:
    """A depth picture as the official code saves it (8 bits; deeper ones are scaled to them), brought to UniDet's frame
    as there."""
    from PIL import Image

    try:
        picture = read_picture(path)
    except UserError as error:
        raise UserError(f"cannot read depth: {error}") from error
    return to_frame(np.asarray(Image.fromarray(picture).convert("L")))


def _parse_finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise UserError(f"{value!r} is not a finite number")
    return number


def _parse_probability(value: Any) -> float:
    number = _parse_finite(value)
    if not 0 <= number <= 1:
        raise UserError(f"a probability of {value!r}; expected 0 to 1")
    return number
