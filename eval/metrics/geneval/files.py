"""GenEval's files: image folders in the official layout, stored detections, result JSONL, summary.

Layout: ROOT/00000/metadata.jsonl and ROOT/00000/samples/0000.png; a folder counts when its name is all digits.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval.judging.geneval_prompts import Metadata, parse_metadata, split_json_lines
from eval.metrics.geneval.rules import OFFICIAL_RULES, GenEvalRules, KeptDetection, decide, describe_detections, keep
from eval.networks.detectors import Detections
from infra.errors import UserError

IMAGES_PER_PROMPT = 4
_SAMPLE = re.compile(r"\d+\.png")


class ImageFile(NamedTuple):
    """A picture of the layout and the metadata line of its prompt."""

    path: Path
    metadata: Metadata


def read_folders(root: str | Path) -> list[ImageFile]:
    """Every image of a layout, by folder and name. Other files and folders are ignored, as officially."""
    base = Path(root)
    if not base.is_dir():
        raise UserError(
            f"no image folder {root}: expected {root}/00000/metadata.jsonl and {root}/00000/samples/0000.png"
        )
    images: list[ImageFile] = []
    for folder in sorted(f for f in base.iterdir() if f.is_dir() and f.name.isdecimal()):
        source = folder / "metadata.jsonl"
        try:
            metadata = parse_metadata(source.read_text(encoding="utf-8"), str(source))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {source}: {error}") from error
        samples = folder / "samples"
        files = sorted(samples.iterdir()) if samples.is_dir() else []
        images.extend(ImageFile(f, metadata) for f in files if f.is_file() and _SAMPLE.fullmatch(f.name))
    if not images:
        raise UserError(f"{root} holds no images in GenEval's layout (00000/samples/0000.png)")
    return images


def check_complete(
    found: Sequence[Metadata], expected: Sequence[Metadata], per_prompt: int, *, allow_partial: bool
) -> int:
    """Number of missing images; UserError when there are any (or prompts nobody asked for) unless allowed."""
    counts: dict[str, int] = {}
    for metadata in found:
        counts[_encode_metadata(metadata)] = counts.get(_encode_metadata(metadata), 0) + 1
    wanted = {_encode_metadata(metadata): metadata for metadata in expected}
    missing = sum(max(per_prompt - counts.get(key, 0), 0) for key in wanted)
    strange = [key for key in counts if key not in wanted]
    if strange and not allow_partial:
        prompt = json.loads(strange[0])["prompt"]
        raise UserError(
            f"{len(strange)} prompts are not of this set, e.g. {prompt!r}: give its metadata file with --metadata, "
            "or pass --allow-partial"
        )
    if missing and not allow_partial:
        short = sum(counts.get(key, 0) < per_prompt for key in wanted)
        raise UserError(
            f"incomplete set: {missing} of {len(wanted) * per_prompt} images are missing "
            f"({short} of {len(wanted)} prompts have fewer than {per_prompt}); "
            "generate them, or pass --allow-partial for a score of what is there"
        )
    return missing


def find_outside(found: Sequence[Metadata], expected: Sequence[Metadata]) -> list[Metadata]:
    """Metadata of the images whose prompts are not of the set, one per image."""
    wanted = {_encode_metadata(metadata) for metadata in expected}
    return [metadata for metadata in found if _encode_metadata(metadata) not in wanted]


def _encode_metadata(metadata: Metadata) -> str:
    return json.dumps(metadata, sort_keys=True)


def make_result_row(
    filename: str,
    detections: Detections,
    *,
    metadata: Metadata,
    colorist: Callable[[str, Sequence[KeptDetection]], Sequence[str]],
    rules: GenEvalRules = OFFICIAL_RULES,
) -> dict[str, Any]:
    """One line of the official result JSONL."""
    kept = keep(detections, metadata["tag"], rules)
    verdict = decide(kept, metadata, colorist=colorist, rules=rules)
    return {
        "filename": filename,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": verdict.correct,
        "reason": verdict.reason,
        "metadata": json.dumps(metadata),
        "details": json.dumps(describe_detections(kept)),
    }


def judge_stored(path: str | Path, rules: GenEvalRules = OFFICIAL_RULES) -> Iterator[dict[str, Any]]:
    """Result rows of a file of stored detections, no detector needed. One JSON object per line: filename, metadata,
    detections {class: [[x1, y1, x2, y2, score], ...]} and colors {class: [name, ...]}.

    `colors` runs beside the boxes and is needed where the metadata asks for a color. Official result files are read
    too (metadata as a JSON string, boxes under `details`).
    """
    try:
        lines = split_json_lines(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read detections {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _judge_line(line, f"{path}:{number}", rules)


def _judge_line(line: str, where: str, rules: GenEvalRules) -> dict[str, Any]:
    try:
        record = json.loads(line)
        raw = record["detections"] if "detections" in record else record["details"]
        boxes = json.loads(raw) if isinstance(raw, str) else raw
        rows = [(name, box) for name, found in boxes.items() for box in found]
        table_N5 = np.array([box for _, box in rows], dtype=np.float32).reshape(len(rows), 5)
        colors = [color for name in boxes for color in _read_colors(record, name, len(boxes[name]), where)]
        metadata = parse_metadata(record["metadata"], where)
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{where}: not a stored detection: expected an object with metadata and detections "
            f"{{class: [[x1, y1, x2, y2, score], ...]}} ({type(error).__name__}: {error})"
        ) from error
    if not np.isfinite(table_N5).all():
        raise UserError(f"{where}: a box or score is not a finite number")
    detections = Detections(table_N5[:, :4], table_N5[:, 4], tuple(name for name, _ in rows))

    def colorist(name: str, found: Sequence[KeptDetection]) -> list[str]:
        seen = [colors[item.row] for item in found]
        if None in seen:
            raise UserError(
                f"{where}: the prompt asks for the color of {name!r}, but the line stores no colors for it; official "
                "result files never do: `python -m eval geneval score --stored FILE` writes lines that do"
            )
        return [str(color) for color in seen]

    return make_result_row(
        str(record.get("filename", "")), detections, metadata=metadata, colorist=colorist, rules=rules
    )


def _read_colors(record: dict[str, Any], name: str, count: int, where: str) -> list[str | None]:
    stored = record.get("colors", {}).get(name)
    if stored is None:
        return [None] * count
    if len(stored) != count:
        raise UserError(f"{where}: {len(stored)} colors for {count} boxes of {name!r}; expected one each")
    return stored


def format_stored(
    filename: str, detections: Detections, *, metadata: Metadata, color_of_row: Mapping[int, str]
) -> dict[str, Any]:
    """What `judge_stored` reads: all that was detected in an image, and the colors that were asked for."""
    boxes: dict[str, list[list[float]]] = {}
    colors: dict[str, list[str | None]] = {}
    for row, (name, box_4, score) in enumerate(zip(detections.labels, detections.boxes_N4, detections.scores_N)):
        boxes.setdefault(name, []).append([*map(float, box_4), float(score)])
        colors.setdefault(name, []).append(color_of_row.get(row))
    asked = {name: found for name, found in colors.items() if any(found)}
    return {"filename": filename, "metadata": metadata, "detections": boxes, "colors": asked}


def write_results(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object per line."""
    from infra import storage

    storage.write_bytes(str(path), "".join(f"{json.dumps(row)}\n" for row in rows).encode())


@dataclass(frozen=True)
class Summary:
    """What the official summary_scores.py prints, as numbers."""

    num_images: int
    num_prompts: int
    correct_images: float
    correct_prompts: float
    tasks: dict[str, tuple[float, int, int]]
    """task -> (score, correct images, images)"""
    overall: float

    def text(self) -> str:
        """The words of the official summary_scores.py."""
        tasks = "\n".join(
            f"{tag:<16} = {score:.2%} ({right} / {total})" for tag, (score, right, total) in self.tasks.items()
        )
        return (
            f"Summary\n=======\nTotal images: {self.num_images}\nTotal prompts: {self.num_prompts}\n"
            f"% correct images: {self.correct_images:.2%}\n% correct prompts: {self.correct_prompts:.2%}\n\n"
            f"Task breakdown\n==============\n{tasks}\n\nOverall score (avg. over tasks): {self.overall:.5f}"
        )


def summarize(rows: Sequence[dict[str, Any]]) -> Summary:
    """Mean `correct` per task, their unweighted mean, and the share of images and of prompts with a correct image."""
    if not rows:
        raise UserError("no images were judged, so there is nothing to summarize")
    by_task: dict[str, list[bool]] = {}
    by_prompt: dict[str, bool] = {}
    for row in rows:
        by_task.setdefault(row["tag"], []).append(row["correct"])
        by_prompt[row["metadata"]] = by_prompt.get(row["metadata"], False) or row["correct"]
    tasks = {tag: (sum(v) / len(v), sum(v), len(v)) for tag, v in by_task.items()}
    return Summary(
        num_images=len(rows),
        num_prompts=len(by_prompt),
        correct_images=sum(bool(row["correct"]) for row in rows) / len(rows),
        correct_prompts=sum(by_prompt.values()) / len(by_prompt),
        tasks=tasks,
        overall=math.fsum(score for score, _, _ in tasks.values()) / len(tasks),
    )
