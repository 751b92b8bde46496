"""T2I-CompBench as a metric over generated images: each category by the formula and the judges that it asks for."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eval import compbench
from eval.compbench import Seen
from eval.detectors import Detections
from eval.judges import Judges, describe_judge
from eval.metric import Clusters, Prompt, Sample, Score, split_scores
from eval.prompts import COMPBENCH_CATEGORIES

DETECTION_THRESHOLD = 0.5  # UniDet's, for every spatial and counting category


class CompBench:
    name, higher_is_better = "compbench", True

    def __init__(self, judges: Judges) -> None:
        self._judges = judges
        self._by_split: dict[bool | None, Clusters] = {}
        self._categories: dict[str, Callable[[Sequence[Sample]], np.ndarray]] = {
            "color": self._attributes,
            "shape": self._attributes,
            "texture": self._attributes,
            "spatial": self._spatial,
            "numeracy": self._numeracy,
            "non_spatial": self._action,
            "complex": self._complex,
        }

    def prompts(self, per_task: int) -> list[Prompt]:
        return [p for p in self._judges.compbench_prompts(per_task) if p.task in self._categories]

    def describe(self) -> dict[str, Any]:
        judges = self._judges
        return {
            "version": 1,
            "threshold": DETECTION_THRESHOLD,
            "judges": [describe_judge(j) for j in (judges.detector(), judges.clip(), judges.vqa())],
            "reader": judges.reader().version,
        }

    def update(self, samples: Sequence[Sample]) -> None:
        for category, judge in self._categories.items():
            mine = [sample for sample in samples if sample.prompt.task == category]
            if mine:
                for sample, answer in zip(mine, judge(mine)):
                    values = self._by_split.setdefault(sample.prompt.seen, Clusters())
                    values.add(category, sample.prompt_index, answer)

    def compute(self) -> list[Score]:
        """Per category as officially. `overall` is ours, the benchmark has none: the plain mean of the categories but
        non_spatial, whose CLIP cosines never come near 1."""
        return split_scores(self._by_split, COMPBENCH_CATEGORIES, not_overall=("non_spatial",))

    def _attributes(self, samples: Sequence[Sample]) -> np.ndarray:
        reader = self._judges.reader()
        chunks = [compbench.asked_chunks(reader.noun_chunks(sample.prompt.text)) for sample in samples]
        images = [sample.image for sample, asked in zip(samples, chunks) for _ in asked]
        yes = self._judges.vqa().yes(images, [f"{chunk}?" for asked in chunks for chunk in asked])
        ends = np.cumsum([len(asked) for asked in chunks])
        return np.array([compbench.blip_vqa(part.tolist()) for part in np.split(yes, ends[:-1])])

    def _spatial(self, samples: Sequence[Sample], complex_prompt: bool = False) -> np.ndarray:
        reader = self._judges.reader()
        answers = []
        for sample, seen in zip(samples, self._detect(samples)):
            obj1, obj2 = reader.pair(sample.prompt.text, complex_prompt=complex_prompt)
            answers.append(compbench.spatial_2d(seen, obj1, obj2, reader.locality(sample.prompt.text)))
        return np.array(answers)

    def _numeracy(self, samples: Sequence[Sample]) -> np.ndarray:
        reader, (singular, plural) = self._judges.reader(), self._judges.names()
        answers = []
        for sample, seen in zip(samples, self._detect(samples)):
            names, numbers = compbench.named_counts(reader.tokens(sample.prompt.text), singular, plural)
            answers.append(compbench.numeracy(seen, names, numbers))
        return np.array(answers)

    def _action(self, samples: Sequence[Sample], complex_prompt: bool = False) -> np.ndarray:
        texts = [sample.prompt.text for sample in samples]
        if complex_prompt:
            texts = [self._judges.reader().without_adjectives(text) for text in texts]
        return self._judges.clip().cosines([sample.image for sample in samples], texts)

    def _complex(self, samples: Sequence[Sample]) -> np.ndarray:
        """3-in-1; a part that no prompt's kind uses is not computed."""
        kinds = [str(sample.prompt.metadata["kind"]) for sample in samples]
        zero = np.zeros(len(samples))
        attribute = self._attributes(samples)
        spatial = self._spatial(samples, complex_prompt=True) if set(kinds) != {"action"} else zero
        action = self._action(samples, complex_prompt=True) if set(kinds) != {"spatial"} else zero
        return np.array(
            [
                compbench.three_in_one(kind, attribute=a, spatial=s, action=c)
                for kind, a, s, c in zip(kinds, attribute, spatial, action)
            ]
        )

    def _detect(self, samples: Sequence[Sample]) -> list[list[Seen]]:
        found = self._judges.detector().detect([sample.image for sample in samples])
        return [seen_in(sample.image, detections) for sample, detections in zip(samples, found)]


def seen_in(image: np.ndarray, detections: Detections) -> list[Seen]:
    """Detections past the threshold by falling score, boxes in UniDet's frame."""
    scale = compbench.detector_scale(*image.shape[:2])
    order = np.argsort(-detections.scores_N, kind="stable")
    return [
        Seen(
            detections.labels[i], (detections.boxes_N4[i].astype(float) * scale).tolist(), float(detections.scores_N[i])
        )
        for i in order
        if detections.scores_N[i] > DETECTION_THRESHOLD
    ]
