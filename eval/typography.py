"""Typography: prompts that ask for written words, read back by OCR: exact match and character error rate.

SD3 measured this only by asking people (Figure 7). The OCR is rapidocr-onnxruntime, whose package carries its models.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from eval.metric import Clusters, Kept, Prompt, Sample, Score
from infra.errors import UserError

if TYPE_CHECKING:
    from eval.judges import Judges

SMALLEST_SIDE = 256  # smaller pictures are enlarged before they are read: OCR models expect letters of some 20 pixels
_QUOTED = re.compile("\"([^\"]+)\"|\u201c([^\u201d]+)\u201d|(?<!\\w)'([^']+)'(?!\\w)")
TEMPLATES = (
    'a photo of a sign that says "{}"',
    'a white T-shirt with the words "{}" printed on it',
    'a poster with "{}" written in big letters',
    'a chalkboard on which "{}" is written',
    'a neon light that reads "{}"',
)
WORDS = (
    "HELLO", "OPEN", "CAFE", "STOP", "MUSIC", "GARDEN", "WELCOME HOME", "KEEP CALM", "FRESH BREAD", "NO ENTRY",
    "HAPPY BIRTHDAY", "SLOW DOWN", "BOOK SHOP", "TWO FOR ONE", "MIND THE GAP", "SEE YOU SOON",
)  # fmt: skip


class Ocr(Protocol):
    """Reads the writing in pictures, in reading order."""

    name: str
    version: str

    def read(self, images: Sequence[np.ndarray]) -> list[str]: ...


class RapidReader:
    """rapidocr-onnxruntime (PP-OCR detection, direction and recognition)."""

    name = "rapidocr"

    def __init__(self) -> None:
        try:
            from importlib.metadata import version

            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise UserError(f"typography needs its OCR ({error}): pip install rapidocr-onnxruntime") from error
        self._ocr = RapidOCR()
        self.version = version("rapidocr-onnxruntime")

    def read(self, images: Sequence[np.ndarray]) -> list[str]:
        return [self._one(image) for image in images]

    def _one(self, image: np.ndarray) -> str:
        from PIL import Image

        factor = SMALLEST_SIDE / min(image.shape[:2])
        if factor > 1:
            height, width = image.shape[:2]
            size = (round(width * factor), round(height * factor))
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        found, _ = self._ocr(np.ascontiguousarray(image[..., ::-1]))  # as OpenCV has them: blue, green, red
        return " ".join(text for _, text, _ in _in_order(found or []))


def _in_order(found: Sequence[Any]) -> list[Any]:
    """Lines from top to bottom, each from left to right; boxes less than half a height apart share a line.

    A box is four corners, first the upper left one.
    """
    lines: list[list[Any]] = []
    for item in sorted(found, key=lambda item: _middle(item[0])):
        height = item[0][3][1] - item[0][0][1]
        if lines and abs(_middle(item[0]) - _middle(lines[-1][0][0])) < height / 2:
            lines[-1].append(item)
        else:
            lines.append([item])
    return [item for line in lines for item in sorted(line, key=lambda item: item[0][0][0])]


def _middle(box: Any) -> float:
    return (box[0][1] + box[3][1]) / 2


def asked_words(prompt: str) -> str:
    """What a prompt wants to be written: its quoted parts, joined by spaces."""
    return " ".join(next(part for part in groups if part) for groups in _QUOTED.findall(prompt))


def plain(text: str) -> str:
    """Letters and digits in lower case, words parted by single spaces: what is compared."""
    return " ".join(re.sub(r"[^\w\s]|_", "", text.lower()).split())


def character_errors(wanted: str, found: str) -> float:
    """Levenshtein distance per wanted character; at most 1 here, however much else is written in the picture."""
    row = list(range(len(found) + 1))
    for i, a in enumerate(wanted, start=1):
        above, row[0] = row[0], i
        for j, b in enumerate(found, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return min(1.0, row[-1] / len(wanted)) if wanted else float(bool(found))


class Typography:
    """Rows `typography/exact_match` (higher is better) and `typography/character_error_rate` (lower is better)."""

    name, higher_is_better = "typography", True

    def __init__(self, judges: "Judges") -> None:
        self._judges = judges
        self._values = Clusters()

    def prompts(self, per_task: int) -> list[Prompt]:
        return self._judges.typography_prompts(per_task)

    def describe(self) -> dict[str, Any]:
        ocr = self._judges.ocr()
        return {"version": 1, "ocr": [ocr.name, ocr.version], "smallest_side": SMALLEST_SIDE}

    def update(self, samples: Sequence[Sample]) -> None:
        read = self._judges.ocr().read([sample.image for sample in samples])
        for sample, text in zip(samples, read):
            wanted, found = plain(asked_words(sample.prompt.text)), plain(text)
            self._values.add("exact_match", sample.prompt_index, wanted == found)
            self._values.add("character_error_rate", sample.prompt_index, character_errors(wanted, found))

    def compute(self) -> list[Score]:
        scores = [self._values.score(name, [name]) for name in self._values.strata]
        return [replace(score, higher_is_better=score.path == "exact_match") for score in scores]

    def kept(self) -> Kept:
        return self._values.kept()


def typography_prompts(count: int) -> list[Prompt]:
    """Our own prompts: each words once with each template, in a fixed order that mixes both."""
    pairs = [(template, words) for n in range(len(TEMPLATES)) for words, template in zip(WORDS, _turned(n))]
    return [Prompt(template.format(words), "typography") for template, words in pairs[:count]]


def _turned(start: int) -> list[str]:
    return [TEMPLATES[(start + i) % len(TEMPLATES)] for i in range(len(WORDS))]


def prompts_with_words(path: str | Path, count: int) -> list[Prompt]:
    """Prompts of a file, each of which must quote the words that it asks for."""
    from eval.prompt_files import read_prompts

    found = read_prompts(path, count)
    silent = next((prompt.text for prompt in found if not plain(asked_words(prompt.text))), None)
    if silent is not None:
        raise UserError(f"{path}: {silent!r} quotes no words to be written; expected prompts like {TEMPLATES[0]!r}")
    return [Prompt(prompt.text, "typography", source=prompt.source) for prompt in found]
