"""CLIP score: mean raw cosine between an image and its caption (the scale of SD3's Table 2, not Hessel's 2.5 x)."""

from collections.abc import Sequence
from typing import Any

from eval.judging.judges import Judges, describe_judge
from eval.judging.metric import Clusters, JudgedImage, Score
from eval.metrics.captioned import CaptionMetric
from infra.values import PromptValues


class ClipScore(CaptionMetric):
    """Row `clip_score`, and one row per category where prompts have categories (PartiPrompts)."""

    name = "clip_score"
    needs = ("clip", "captions")

    def __init__(self, judges: Judges) -> None:
        super().__init__(judges)
        self._values = Clusters()

    def describe(self) -> dict[str, Any]:
        return {"version": 1, "clip": describe_judge(self._judges.clip()), "scale": 1.0}

    def update(self, images: Sequence[JudgedImage]) -> None:
        cosines = self._judges.clip().cosines([i.image for i in images], [i.prompt.text for i in images])
        for item, cosine in zip(images, cosines):
            self._values.add("captions", item.prompt_index, cosine)
            if item.prompt.task != "captions":  # PartiPrompts' categories
                self._values.add(item.prompt.task, item.prompt_index, cosine)

    def compute(self) -> list[Score]:
        """Over all prompts, and per category where prompts have one."""
        if not self._values:
            return []
        categories = sorted(name for name in self._values.strata if name != "captions")
        return [self._values.score("", ["captions"]), *(self._values.score(name, [name]) for name in categories)]

    def values_per_prompt(self) -> PromptValues:
        return self._values.values_per_prompt()
