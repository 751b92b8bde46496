"""GenEval as a metric over generated images: detector, color CLIP and decision logic, per task and overall."""

import functools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from eval.judging.geneval_prompts import TASKS, Metadata
from eval.judging.judges import Judges, describe_judge
from eval.judging.metric import Clusters, JudgedImage, PictureMetric, Prompt, Score, split_scores, split_values
from eval.judging.prompts import WORLD_PER_TASK, list_geneval_prompts, list_world_geneval_prompts
from eval.metrics.geneval.colors import ClipColors
from eval.metrics.geneval.files import IMAGES_PER_PROMPT
from eval.metrics.geneval.rules import OFFICIAL_RULES, GenEvalRules, ImageVerdict, KeptDetection, decide, keep
from eval.networks.detectors import Detections
from infra.values import PromptValues


class GenEval(PictureMetric):
    """Rows `geneval/<task>` and `geneval/overall`; the world's end in /seen and /unseen."""

    name = "geneval"
    needs = ("detector", "clip")
    official_images = IMAGES_PER_PROMPT

    def __init__(self, judges: Judges, rules: GenEvalRules = OFFICIAL_RULES) -> None:
        self._judges, self._rules = judges, rules
        self._by_split: dict[bool | None, Clusters] = {}

    @functools.cached_property
    def _colors(self) -> ClipColors:
        return ClipColors(self._judges.clip())

    def prompts(self, count: int | None) -> list[Prompt]:
        if self._judges.of_world:
            return list_world_geneval_prompts(count or WORLD_PER_TASK)
        return list_geneval_prompts(count)

    def describe(self) -> dict[str, Any]:
        return {
            "version": 1,
            "rules": asdict(self._rules),
            "detector": describe_judge(self._judges.detector()),
            "clip": describe_judge(self._judges.clip()),
        }

    def update(self, images: Sequence[JudgedImage]) -> None:
        found = self._judges.detector().detect([item.image for item in images])
        for item, detections in zip(images, found):
            verdict = self.judge(item.image, detections, dict(item.prompt.metadata))
            values = self._by_split.setdefault(item.prompt.seen, Clusters())
            values.add(item.prompt.task, item.prompt_index, verdict.correct)

    def judge(self, image: np.ndarray, detections: Detections, metadata: Metadata) -> ImageVerdict:
        """The verdict on one picture, from the detector's findings and the prompt's metadata."""
        kept = keep(detections, metadata["tag"], self._rules)

        def name_colors(label: str, found: Sequence[KeptDetection]) -> Sequence[str]:
            return self._colors.name(image, detections, label=label, kept=found)

        return decide(kept, metadata, colorist=name_colors, rules=self._rules)

    def compute(self) -> list[Score]:
        return split_scores(self._by_split, TASKS)

    def values_per_prompt(self) -> PromptValues:
        return split_values(self._by_split)
