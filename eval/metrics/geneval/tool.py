"""GenEval by itself: its prompts, stored detections, folders of images from any model."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.drawing.pictures import read_pictures, refuse_unreadable
from eval.judging.geneval_prompts import (
    CLASSES,
    COLORS,
    Metadata,
    draw_official_metadata,
    format_metadata,
    read_metadata,
)
from eval.judging.judges import build_judges
from eval.judging.metric import Clusters
from eval.judging.official import OfficialPaths
from eval.metrics.geneval.colors import ClipColors
from eval.metrics.geneval.files import (
    IMAGES_PER_PROMPT,
    ImageFile,
    Summary,
    check_complete,
    find_outside,
    format_stored,
    judge_stored,
    make_result_row,
    read_folders,
    summarize,
    write_results,
)
from eval.metrics.geneval.rules import KeptDetection
from eval.networks.detectors import Detections
from infra.errors import UserError, nearest
from infra.log import Progress

BATCH = 16


def prompts() -> None:
    """Write the official 553 metadata lines to standard output, byte for byte."""
    sys.stdout.write(format_metadata(draw_official_metadata()))


def judge(
    detections: Path,
    *,
    out: str | None = None,
    metadata: Path | None = None,
    images_per_prompt: int = IMAGES_PER_PROMPT,
    allow_partial: bool = False,
) -> None:
    """Score stored detections, without a detector.

    Each line of the file is a JSON object: filename, metadata (GenEval's), detections {class: [[x1, y1, x2, y2,
    score], ...]} and, where a color is asked for, colors {class: [name, ...]} beside the boxes.

    Args:
        detections: the JSONL file (`score --stored` writes such); result files of the official code are read too, but
            those store no colors, so leave their prompts with colors out or add `colors`
        out: write one official result line per image here
        metadata: the prompt set that must be complete (default: the official 553)
        images_per_prompt: images that every prompt must have
        allow_partial: score an incomplete set and say how many images are missing
    """
    rows = list(judge_stored(detections))
    _refuse_repeated(rows, detections)
    expected = draw_official_metadata() if metadata is None else read_metadata(metadata)
    asked = [json.loads(row["metadata"]) for row in rows]
    names = [f"{detections}: {row['filename'] or 'an image without filename'}" for row in rows]
    _refuse_unknown_words(
        zip(names, asked), *_list_known_words(expected), knows=f"the prompts of {metadata or 'GenEval'}"
    )
    _check(asked, expected, images_per_prompt, allow_partial)
    _report(rows, out)


def score(
    images: Path,
    *,
    judges: str = "official",
    official: OfficialPaths = OfficialPaths(),  # noqa: B008 - frozen
    out: str | None = None,
    stored: str | None = None,
    metadata: Path | None = None,
    images_per_prompt: int = IMAGES_PER_PROMPT,
    allow_partial: bool = False,
    device: str = "auto",
) -> None:
    """Detect and score a folder of images in GenEval's layout.

    Args:
        images: folder with 00000/metadata.jsonl and 00000/samples/0000.png
        judges: official (needs --official.detector and --official.clip), or world
        official: local checkpoints
        out: write one official result line per image here
        stored: write what was seen in each image here, for `judge --detections`
        metadata: the prompt set that must be complete (default: the official 553)
        images_per_prompt: images that every prompt must have
        allow_partial: score an incomplete or partly unreadable set and say how many images are missing
        device: where the judges compute: auto (a GPU where there is one), cpu, cuda or cuda:N
    """
    files = read_folders(images)
    expected = draw_official_metadata() if metadata is None else read_metadata(metadata)
    _check([file.metadata for file in files], expected, images_per_prompt, allow_partial)
    chosen = build_judges(judges, replace(official, device=device))
    detector, colors = chosen.detector(), ClipColors(chosen.clip())
    asked = [(str(file.path.parent.parent / "metadata.jsonl"), file.metadata) for file in files]
    _refuse_unknown_words(asked, detector.classes, COLORS, knows="the detector")
    rows: list[dict[str, Any]] = []
    seen: list[dict[str, Any]] = []
    unreadable: list[str] = []
    with Progress(len(files), "images", desc="judge") as progress:
        for start in range(0, len(files), BATCH):
            part, pictures = read_pictures(files[start : start + BATCH], unreadable)
            for file, picture, found in zip(part, pictures, detector.detect(pictures) if pictures else []):
                row, evidence = _judge_image(file, picture, found, colors)
                rows.append(row)
                seen.append(evidence)
            progress.update(min(BATCH, len(files) - start))
    refuse_unreadable(unreadable, len(files), allow_partial)
    if stored is not None:
        write_results(stored, seen)
    print(f"{chosen.prefix}geneval, judged by {detector.name} {detector.version} and CLIP {chosen.clip().version}\n")
    _report(rows, out)


def _judge_image(
    file: ImageFile, picture: np.ndarray, found: Detections, colors: ClipColors
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The official result line of an image, and the line from which it can be judged again."""
    color_of_row: dict[int, str] = {}

    def colorist(name: str, items: Sequence[KeptDetection]) -> Sequence[str]:
        named = colors.name(picture, found, label=name, kept=items)
        color_of_row.update({item.row: color for item, color in zip(items, named)})
        return named

    row = make_result_row(str(file.path), found, metadata=file.metadata, colorist=colorist)
    return row, format_stored(str(file.path), found, metadata=file.metadata, color_of_row=color_of_row)


def _refuse_unknown_words(
    asked: Iterable[tuple[str, Metadata]], classes: Sequence[str], colors: Sequence[str], *, knows: str
) -> None:
    """A class that nobody detects, or a color that CLIP is not asked for, would silently count as absent."""
    for where, metadata in asked:
        for clause in [*metadata.get("include", []), *metadata.get("exclude", [])]:
            name, color = clause["class"], clause.get("color")
            if name not in classes:
                raise UserError(
                    f"{where} asks for {name!r}, which is unknown to {knows}{nearest(name, classes)}; "
                    f"known: {len(classes)} classes"
                )
            if color is not None and color not in colors:
                raise UserError(
                    f"{where} asks for the color {color!r}{nearest(color, colors)}; known: {', '.join(colors)}"
                )


def _list_known_words(expected: Sequence[Metadata]) -> tuple[list[str], list[str]]:
    """Classes and colors that stored detections may be asked for: GenEval's, and those of the user's own prompts."""
    clauses = [clause for m in expected for clause in (*m.get("include", []), *m.get("exclude", []))]
    classes = [*CLASSES, *(clause["class"] for clause in clauses)]
    colors = [*COLORS, *(clause["color"] for clause in clauses if "color" in clause)]
    return list(dict.fromkeys(classes)), list(dict.fromkeys(colors))


def _refuse_repeated(rows: Sequence[dict[str, Any]], source: Path) -> None:
    """A file that was written twice would count every image twice. Images without a name cannot be told apart."""
    times = Counter((row["filename"], row["metadata"]) for row in rows if row["filename"])
    twice = [name for (name, _), number in times.items() if number > 1]
    if twice:
        raise UserError(f"{source}: {len(twice)} images stand there more than once, e.g. {twice[0]!r}")


def _check(
    found: Sequence[Metadata], expected: Sequence[Metadata], images_per_prompt: int, allow_partial: bool
) -> None:
    if images_per_prompt < 1:
        raise UserError("--images-per-prompt must be 1 or more")
    missing = check_complete(found, expected, images_per_prompt, allow_partial=allow_partial)
    strange = find_outside(found, expected)
    if missing:
        print(f"partial set: {missing} of {len(expected) * images_per_prompt} images are missing", file=sys.stderr)
    if strange:
        print(
            f"outside the set: {len(strange)} of {len(found)} images are of other prompts, e.g. "
            f"{strange[0]['prompt']!r}, and are scored with the rest; --metadata FILE names another set",
            file=sys.stderr,
        )


def _report(rows: list[dict[str, Any]], out: str | None) -> Summary:
    summary = summarize(rows)
    if out is not None:
        write_results(out, rows)
    print(summary.text())
    print(_format_intervals(rows))
    return summary


def _format_intervals(rows: Sequence[dict[str, Any]]) -> str:
    """What the official summary lacks: 95 % bootstrap intervals, prompts drawn with their images."""
    values, numbers = Clusters(), {text: n for n, text in enumerate(dict.fromkeys(row["metadata"] for row in rows))}
    for row in rows:
        values.add(row["tag"], numbers[row["metadata"]], row["correct"])
    parts = {"overall": values.interval(), **{task: values.interval([task]) for task in values.strata}}
    intervals = "; ".join(
        f"{name} {'unknown' if part is None else f'{part[0]:.2%} to {part[1]:.2%}'}" for name, part in parts.items()
    )
    return f"95 % intervals over prompts: {intervals}"
