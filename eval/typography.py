"""Typography: prompts that ask for written words, read back by OCR: exact match and character error rate.

SD3 measured this only by asking people (Figure 7).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.metric import Clusters, Kept, Prompt, Sample, Score
from eval.networks.ocr import SMALLEST_SIDE
from infra.errors import UserError

if TYPE_CHECKING:
    from eval.judges import Judges

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
