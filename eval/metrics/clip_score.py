"""CLIP score: mean raw cosine between an image and its caption (the scale of SD3's Table 2, not Hessel's 2.5 x)."""

from collections.abc import Sequence
from typing import Any

from eval.judging.judges import Judges, describe_judge
from eval.judging.metric import Clusters, Kept, Prompt, Sample, Score


class ClipScore:
    name, higher_is_better = "clip_score", True

    def __init__(self, judges: Judges) -> None:
        self._judges = judges
        self._values = Clusters()

    def prompts(self, per_task: int) -> list[Prompt]:
        return self._judges.caption_prompts(per_task)

    def describe(self) -> dict[str, Any]:
        return {"version": 1, "clip": describe_judge(self._judges.clip()), "scale": 1.0}

    def update(self, samples: Sequence[Sample]) -> None:
        cosines = self._judges.clip().cosines([s.image for s in samples], [s.prompt.text for s in samples])
        for sample, cosine in zip(samples, cosines):
            self._values.add("captions", sample.prompt_index, cosine)
            if sample.prompt.task != "captions":  # PartiPrompts' categories
                self._values.add(sample.prompt.task, sample.prompt_index, cosine)

    def compute(self) -> list[Score]:
        """Over all prompts, and per category where prompts have one."""
        if not self._values:
            return []
        categories = sorted(name for name in self._values.strata if name != "captions")
        return [self._values.score("", ["captions"]), *(self._values.score(name, [name]) for name in categories)]

    def kept(self) -> Kept:
        return self._values.kept()
