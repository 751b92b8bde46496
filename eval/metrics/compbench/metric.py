"""T2I-CompBench as a metric: the judges look at the pictures, and each category is scored by its official formula."""

from collections.abc import Sequence
from typing import Any

from eval.judging.judges import Judges, describe_judge
from eval.judging.metric import Clusters, JudgedImage, PictureMetric, Prompt, Score, split_scores, split_values
from eval.judging.prompts import (
    COMPBENCH_CATEGORIES,
    WORLD_PER_TASK,
    list_compbench_prompts,
    list_world_compbench_prompts,
)
from eval.metrics.compbench.evidence import answer, gather
from eval.metrics.compbench.networks import load_clip, load_depth, load_detector
from infra.values import PromptValues

DETECTED = ("spatial", "3d_spatial", "numeracy", "complex")


class CompBench(PictureMetric):
    """Rows `compbench/<category>` and `compbench/overall`; the world's end in /seen and /unseen."""

    name = "compbench"
    needs = ("compbench", "compbench_detector", "vqa")
    official_images = 10

    def __init__(self, judges: Judges) -> None:
        self._judges = judges
        self._by_split: dict[bool | None, Clusters] = {}

    def prompts(self, count: int | None) -> list[Prompt]:
        """The prompts of all categories that these judges can score: 3d_spatial needs a depth network."""
        if self._judges.of_world:
            return list_world_compbench_prompts(count or WORLD_PER_TASK)
        found = list_compbench_prompts(self._judges.paths.need("compbench"), count)
        return [p for p in found if p.task != "3d_spatial" or self._judges.paths.depth is not None]

    def describe(self) -> dict[str, Any]:
        """Threshold, networks, prompt reader; the rules of position where they are not the official ones."""
        judges = self._judges
        used = [load_detector(judges), load_clip(judges), judges.vqa(), load_depth(judges)]
        rules = judges.paths.compbench_rules
        return {
            "version": 1,
            "threshold": judges.paths.compbench_threshold,
            "judges": [describe_judge(judge) for judge in used if judge is not None],
            "reader": judges.reader().version,
            **({} if rules == "official" else {"rules": rules}),
        }

    def update(self, images: Sequence[JudgedImage]) -> None:
        for category in dict.fromkeys(item.prompt.task for item in images):
            of_category = [item for item in images if item.prompt.task == category]
            for item, evidence in zip(of_category, gather(self._judges, category, of_category)):
                values = self._by_split.setdefault(item.prompt.seen, Clusters())
                values.add(category, item.prompt_index, answer(evidence, self._judges.paths.compbench_rules))

    def compute(self) -> list[Score]:
        """The score of each category by the official formula. `overall` is ours, the benchmark has none: the mean of
        all categories but non_spatial, whose CLIP cosines never come near 1. Scores from boxes name their detector."""
        judged_by = {"detector": load_detector(self._judges).name, "rules": self._judges.paths.compbench_rules}
        return split_scores(
            self._by_split,
            COMPBENCH_CATEGORIES,
            not_overall=("non_spatial",),
            details=dict.fromkeys((*DETECTED, "overall"), judged_by),
        )

    def values_per_prompt(self) -> PromptValues:
        return split_values(self._by_split)
