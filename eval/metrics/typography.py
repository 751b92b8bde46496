"""Typography: prompts that ask for written words, read back by OCR: exact match and character error rate.

SD3 measured this only by asking people (Figure 7).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from eval.judging.judges import Judges
from eval.judging.metric import Clusters, Kept, Prompt, Sample, Score
from eval.judging.written_words import asked_words, plain
from eval.networks.ocr import SMALLEST_SIDE


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

    def __init__(self, judges: Judges) -> None:
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
