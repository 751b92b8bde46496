"""T2I-CompBench as a metric over generated images: evidence by the judges, each category by its official formula."""

from collections.abc import Sequence
from typing import Any

from eval.judging.judges import Judges, describe_judge
from eval.judging.metric import Clusters, Kept, Prompt, Sample, Score, split_kept, split_scores
from eval.judging.prompts import COMPBENCH_CATEGORIES
from eval.metrics.compbench.evidence import answer, gather

DETECTED = ("spatial", "3d_spatial", "numeracy", "complex")


class CompBench:
    name, higher_is_better = "compbench", True

    def __init__(self, judges: Judges) -> None:
        self._judges = judges
        self._by_split: dict[bool | None, Clusters] = {}

    def prompts(self, per_task: int) -> list[Prompt]:
        """Of every category that these judges can answer: without a depth network no 3D-spatial."""
        known = [c for c in COMPBENCH_CATEGORIES if c != "3d_spatial" or self._judges.depth is not None]
        return [p for p in self._judges.compbench_prompts(per_task) if p.task in known]

    def describe(self) -> dict[str, Any]:
        judges = self._judges
        used = [judges.compbench_detector(), judges.compbench_clip(), judges.vqa()]
        if judges.depth is not None:
            used.append(judges.depth())
        rules = {} if judges.compbench_rules == "official" else {"rules": judges.compbench_rules}
        return {
            "version": 1,
            "threshold": judges.compbench_threshold,
            "judges": [describe_judge(judge) for judge in used],
            "reader": judges.reader().version,
            **rules,
        }

    def update(self, samples: Sequence[Sample]) -> None:
        for category in dict.fromkeys(sample.prompt.task for sample in samples):
            mine = [sample for sample in samples if sample.prompt.task == category]
            for sample, evidence in zip(mine, gather(self._judges, category, mine)):
                values = self._by_split.setdefault(sample.prompt.seen, Clusters())
                values.add(category, sample.prompt_index, answer(evidence, self._judges.compbench_rules))

    def compute(self) -> list[Score]:
        """Per category as officially. `overall` is ours, the benchmark has none: the plain mean of the categories but
        non_spatial, whose CLIP cosines never come near 1. The row of a category with boxes names its detector."""
        told = {"detector": self._judges.compbench_detector().name, "rules": self._judges.compbench_rules}
        return split_scores(
            self._by_split,
            COMPBENCH_CATEGORIES,
            not_overall=("non_spatial",),
            details=dict.fromkeys((*DETECTED, "overall"), told),
        )

    def kept(self) -> Kept:
        return split_kept(self._by_split)
