"""T2I-CompBench's files: `<prompt>_<6 digits>.png` samples, and answer lists {question_id, answer}.

The prompt is read back from the file name, so a prompt that cannot be one is refused rather than changed.
"""

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from infra.errors import UserError

_SAMPLE = re.compile(r"(?P<prompt>[^_]*)_(?P<index>\d+)\.png")
# Where the official evaluators leave their answers, under one folder per category.
BLIP, BOXES_2D, CLIP, MERGED = (
    f"{name}/vqa_result.json"
    for name in ("annotation_blip", "labels/annotation_obj_detection_2d", "annotation_clip", "annotation_3_in_1")
)
ANSWER_FILES = {
    **dict.fromkeys(("color", "shape", "texture"), BLIP),
    "spatial": BOXES_2D,
    "3d_spatial": "labels/annotation_obj_detection_3d/vqa_result.json",
    "numeracy": "annotation_num/vqa_result.json",
    "non_spatial": CLIP,
    "complex": MERGED,
}
LONGEST = 240  # bytes of a file name's prompt; file systems stop at 255


class SampleFile(NamedTuple):
    """A picture of the layout, and what its name says."""

    path: Path
    prompt: str
    number: int


def name_sample(prompt: str, index: int) -> str:
    """The official name; UserError for prompts that a file name cannot carry back."""
    if "/" in prompt or "_" in prompt or not prompt.isprintable() or len(prompt.encode()) > LONGEST:
        raise UserError(
            f"T2I-CompBench's layout keeps the prompt in the file name, which {prompt[:60]!r} cannot be "
            "(slash, underscore, line break or too long); write GenEval's layout instead"
        )
    return f"{prompt}_{index:06d}.png"


def parse_name(name: str) -> tuple[str, int] | None:
    """Prompt and index of an official file name."""
    match = _SAMPLE.fullmatch(name)
    return (match["prompt"], int(match["index"])) if match else None


def read_samples(folder: str | Path) -> list[SampleFile]:
    """Samples in the order of their index; other files are ignored, pictures among them with a word."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"no sample folder {folder}: expected files such as `{folder}/a red dog_000000.png`")
    names = [(path, parse_name(path.name)) for path in sorted(root.iterdir()) if path.is_file()]
    found = [SampleFile(path, *name) for path, name in names if name]
    strange = [path.name for path, name in names if name is None and path.suffix == ".png"]
    if not found:
        raise UserError(f"{folder} holds no samples of the form `<prompt>_<6 digits>.png`")
    if strange:
        print(f"{folder}: {len(strange)} pictures are no samples by their names, e.g. {strange[0]!r}", file=sys.stderr)
    return sorted(found, key=lambda file: file.number)


def write_answers(
    path: str | Path, answers: Sequence[float], *, as_text: bool = False, ids: Sequence[int] | None = None
) -> float:
    """The official list of {question_id, answer}; BLIP's answers are strings of 4 decimals. Returns their mean."""
    from infra import storage

    given = [f"{answer:.4f}" if as_text else float(answer) for answer in answers]
    numbers = range(len(given)) if ids is None else ids
    records = [{"question_id": index, "answer": answer} for index, answer in zip(numbers, given, strict=True)]
    storage.write_bytes(str(path), json.dumps(records).encode())
    return average_answers(given)


def read_answers(path: str | Path) -> list[float]:
    """Answers by question_id, from any of the official result files."""
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
        by_id = {int(record["question_id"]): float(record["answer"]) for record in records}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read answers {path}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a T2I-CompBench answer list ({type(error).__name__}: {error})") from error
    if len(by_id) < len(records):
        raise UserError(f"{path}: {len(records) - len(by_id)} answers carry a question_id that stands there already")
    if not all(map(math.isfinite, by_id.values())):
        raise UserError(f"{path}: an answer is not a finite number")
    return [by_id[number] for number in sorted(by_id)]


def average_answers(answers: Sequence[float | str]) -> float:
    """A category's score: the mean answer."""
    if not answers:
        raise UserError("no answers, so there is no score")
    return sum(float(answer) for answer in answers) / len(answers)
