"""Typography: prompts that ask for written words, read back by OCR: exact match and character error rate.

SD3 measured this only by asking people (Figure 7).
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from eval.judging.judges import Judges, describe_judge
from eval.judging.metric import Clusters, JudgedImage, PictureMetric, Prompt, Score
from eval.judging.written_words import (
    find_quoted_words,
    list_typography_prompts,
    normalize_text,
    read_prompts_with_words,
)
from eval.networks.ocr import SMALLEST_SIDE, RapidReader
from infra.values import PromptValues

load_ocr = functools.cache(RapidReader)


def character_errors(wanted: str, found: str) -> float:
    """Levenshtein distance per wanted character; at most 1 here, however much else is written in the picture."""
    row = list(range(len(found) + 1))
    for i, a in enumerate(wanted, start=1):
        above, row[0] = row[0], i
        for j, b in enumerate(found, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return min(1.0, row[-1] / len(wanted)) if wanted else float(bool(found))


class Typography(PictureMetric):
    """Rows `typography/exact_match` (higher is better) and `typography/character_error_rate` (lower is better)."""

    name = "typography"

    def __init__(self, judges: Judges) -> None:
        self._judges = judges
        self._values = Clusters()

    def prompts(self, count: int | None) -> list[Prompt]:
        file = None if self._judges.of_world else self._judges.paths.typography
        return list_typography_prompts(count) if file is None else read_prompts_with_words(file, count)

    def describe(self) -> dict[str, Any]:
        return {"version": 1, "ocr": describe_judge(load_ocr()), "smallest_side": SMALLEST_SIDE}

    def update(self, images: Sequence[JudgedImage]) -> None:
        read = load_ocr().read([item.image for item in images])
        for item, text in zip(images, read):
            wanted, found = normalize_text(find_quoted_words(item.prompt.text)), normalize_text(text)
            self._values.add("exact_match", item.prompt_index, wanted == found)
            self._values.add("character_error_rate", item.prompt_index, character_errors(wanted, found))

    def compute(self) -> list[Score]:
        scores = [self._values.score(name, [name]) for name in self._values.strata]
        return [replace(score, higher_is_better=score.path == "exact_match") for score in scores]

    def values_per_prompt(self) -> PromptValues:
        return self._values.values_per_prompt()
