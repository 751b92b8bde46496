"""GenEval as a metric over generated images: detector, color CLIP and decision logic, per task and overall."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from eval.judging.geneval_prompts import TASKS, Metadata
from eval.judging.judges import Judges, describe_judge
from eval.judging.metric import Clusters, Kept, Prompt, Sample, Score, split_kept, split_scores
from eval.metrics.geneval.colors import ClipColors
from eval.metrics.geneval.rules import OFFICIAL_RULES, Rules, Verdict, decide, keep
from eval.networks.detectors import Detections


class GenEval:
    name, higher_is_better = "geneval", True

    def __init__(self, judges: Judges, rules: Rules = OFFICIAL_RULES) -> None:
        self._judges, self._rules = judges, rules
        self._colors = ClipColors(judges.clip())
        self._by_split: dict[bool | None, Clusters] = {}

    def prompts(self, per_task: int) -> list[Prompt]:
        return self._judges.geneval_prompts(per_task)

    def describe(self) -> dict[str, Any]:
        return {
            "version": 1,
            "rules": asdict(self._rules),
            "detector": describe_judge(self._judges.detector()),
            "clip": describe_judge(self._judges.clip()),
        }

    def update(self, samples: Sequence[Sample]) -> None:
        found = self._judges.detector().detect([sample.image for sample in samples])
        for sample, detections in zip(samples, found):
            verdict = self.judge(sample.image, detections, dict(sample.prompt.metadata))
            values = self._by_split.setdefault(sample.prompt.seen, Clusters())
            values.add(sample.prompt.task, sample.prompt_index, verdict.correct)

    def judge(self, image: np.ndarray, detections: Detections, metadata: Metadata) -> Verdict:
        kept = keep(detections, metadata["tag"], self._rules)
        return decide(kept, metadata, lambda name, found: self._colors.of(image, detections, name, found), self._rules)

    def compute(self) -> list[Score]:
        return split_scores(self._by_split, TASKS)

    def kept(self) -> Kept:
        return split_kept(self._by_split)
