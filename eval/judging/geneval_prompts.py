"""GenEval's prompts: the official 553 metadata lines from our own generator, byte for byte, and a reader of such files.

The draw order is that of the official prompts/create_prompts.py; the file's SHA-256 is the proof (tests).
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from infra.errors import UserError

CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock",
    "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
OFFICIAL_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"

Metadata = dict[str, Any]


def add_article(name: str) -> str:
    """`an apple`, `a dog`: the official choice, by the first letter."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    """The official plural, which is not always English: `bus` gives `buses`, `knife` gives `knifes`."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


def draw_official_metadata(seed: int = 43, per_task: int = 100) -> list[Metadata]:
    """The 553 records of evaluation_metadata.jsonl: 100 draws of each task, then equal records are dropped."""
    rng = np.random.default_rng(seed)
    records = [_draw_single_object(int(index)) for index in rng.choice(len(CLASSES), size=len(CLASSES), replace=False)]
    for draw in (_draw_two_object, _draw_counting, _draw_colors, _draw_position, _draw_color_attr):
        records.extend(draw(rng) for _ in range(per_task))
    return list({json.dumps(record): record for record in records}.values())


def _draw_single_object(index: int) -> Metadata:
    name = CLASSES[index]
    return _make_record("single_object", [{"class": name, "count": 1}], f"a photo of {add_article(name)}")


def _draw_two_object(rng: np.random.Generator) -> Metadata:
    a, b = (CLASSES[i] for i in rng.choice(len(CLASSES), size=2, replace=False))
    include = [{"class": a, "count": 1}, {"class": b, "count": 1}]
    return _make_record("two_object", include, f"a photo of {add_article(a)} and {add_article(b)}")


def _draw_counting(rng: np.random.Generator) -> Metadata:
    name = CLASSES[rng.choice(len(CLASSES))]
    count = int(rng.integers(2, 4, endpoint=True))
    record = _make_record("counting", [{"class": name, "count": count}], f"a photo of {NUMBERS[count]} {plural(name)}")
    prompt = record.pop("prompt")
    return {**record, "exclude": [{"class": name, "count": count + 1}], "prompt": prompt}


def _draw_colors(rng: np.random.Generator) -> Metadata:
    name = CLASSES[rng.choice(len(CLASSES) - 1) + 1]  # class 0, person, never gets a color
    color = COLORS[rng.choice(len(COLORS))]
    include = [{"class": name, "count": 1, "color": color}]
    return _make_record("colors", include, f"a photo of {add_article(color)} {name}")


def _draw_position(rng: np.random.Generator) -> Metadata:
    a, b = (CLASSES[i] for i in rng.choice(len(CLASSES), size=2, replace=False))
    relation = RELATIONS[rng.choice(len(RELATIONS))]
    include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
    return _make_record("position", include, f"a photo of {add_article(a)} {relation} {add_article(b)}")


def _draw_color_attr(rng: np.random.Generator) -> Metadata:
    a, b = (CLASSES[i + 1] for i in rng.choice(len(CLASSES) - 1, size=2, replace=False))
    c1, c2 = (COLORS[i] for i in rng.choice(len(COLORS), size=2, replace=False))
    include = [{"class": a, "count": 1, "color": c1}, {"class": b, "count": 1, "color": c2}]
    return _make_record("color_attr", include, f"a photo of {add_article(c1)} {a} and {add_article(c2)} {b}")


def _make_record(tag: str, include: list[dict[str, Any]], prompt: str) -> Metadata:
    return {"tag": tag, "include": include, "prompt": prompt}


def format_metadata(records: Iterable[Metadata]) -> str:
    """The official file's text: one `json.dumps` per line, default separators."""
    return "".join(f"{json.dumps(record)}\n" for record in records)


def split_json_lines(text: str) -> list[str]:
    """Lines of a JSONL file. str.splitlines also breaks at U+2028 and its like, which may stand inside a string."""
    return text.split("\n")


def read_metadata(path: str | Path, classes: Iterable[str] | None = None) -> list[Metadata]:
    """Read a metadata JSONL file; every record is checked, and classes too when a list is given."""
    try:
        lines = split_json_lines(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read GenEval metadata {path}: {error}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            records.append(parse_metadata(line, f"{path}:{number}", classes))
    if not records:
        raise UserError(f"{path} holds no GenEval metadata: expected one JSON object per line")
    return records


def parse_metadata(line: str | Metadata, where: str, classes: Iterable[str] | None = None) -> Metadata:
    """One record, from its JSON text or the parsed object; UserError naming `where` when it cannot be judged."""
    try:
        record = json.loads(line) if isinstance(line, str) else line
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not a JSON object ({error})") from error
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("tag"), str)
        or not isinstance(record.get("prompt"), str)
    ):
        raise UserError(f"{where}: expected an object with tag, prompt and include")
    known = None if classes is None else set(classes)
    include, exclude = record.get("include", []), record.get("exclude", [])
    if not isinstance(include, list) or not isinstance(exclude, list):
        raise UserError(f"{where}: include and exclude are lists of clauses")
    for number, clause in enumerate([*include, *exclude]):
        _check_clause(clause, number if number < len(include) else 0, where, known)
    return record


def _check_clause(clause: Any, before: int, where: str, known: set[str] | None) -> None:
    """`before`: how many clauses a position may point at."""
    count = clause.get("count") if isinstance(clause, dict) else None
    if type(count) is not int or not isinstance(clause.get("class"), str):
        raise UserError(f"{where}: every include/exclude clause needs a class and a whole count, found {clause!r}")
    if known is not None and clause["class"] not in known:
        raise UserError(f"{where}: unknown class {clause['class']!r}; the detector knows {len(known)} others")
    if not isinstance(clause.get("color", ""), str):
        raise UserError(f"{where}: the color of {clause['class']!r} is no word: {clause['color']!r}")
    if "position" in clause:
        match clause["position"]:
            case [str(relation), int(target)] if relation in RELATIONS and 0 <= target < before:
                return
            case found:
                expected = f"[one of {', '.join(RELATIONS)}; the number of an earlier include clause]"
                raise UserError(f"{where}: position of {clause['class']!r} is {found!r}: expected {expected}")
