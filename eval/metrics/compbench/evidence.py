"""What the judges saw in one T2I-CompBench image, and the category's answer from it alone.

The metric gathers evidence with networks, `compbench judge` reads stored evidence; both answer here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from eval.judging.judges import Judges
from eval.judging.language import LOCALITIES_3D, Pair, PromptReader, find_locality
from eval.judging.metric import JudgedImage
from eval.judging.official import PositionRules
from eval.metrics.compbench import rules as compbench
from eval.metrics.compbench.networks import list_object_names, load_clip, load_depth, load_detector
from eval.metrics.compbench.rules import LabelledBox
from eval.networks.detectors import Detections
from infra.errors import UserError

ATTRIBUTES = ("color", "shape", "texture")
COMPLEX_KINDS = ("spatial", "action", "both")


@dataclass(frozen=True)
class Evidence:
    """What the judges found in a picture. Only the fields that the category (or the kind of a complex prompt) needs are
    set."""

    category: str
    seen: Sequence[LabelledBox] = ()
    """detections past the threshold, in the detector's order (falling score), boxes in UniDet's frame"""
    objects: Pair = (None, None)
    locality: str | None = None
    counted: tuple[Sequence[str], Sequence[int]] = ((), ())
    """numeracy: names and numbers that the prompt counts"""
    probabilities: Sequence[float] = field(default_factory=list)
    """P(yes) of each asked noun chunk"""
    depth_HW: np.ndarray | None = None
    cosine: float = 0.0
    kind: str = ""


def answer(evidence: Evidence, rules: PositionRules = "official") -> float:
    """The category's official score of one image."""
    e = evidence
    if e.category in ATTRIBUTES:
        return compbench.blip_vqa(e.probabilities)
    if e.category == "spatial":
        return compbench.spatial_2d(e.seen, *e.objects, e.locality, rules)
    if e.category == "3d_spatial":
        if e.depth_HW is None:
            raise UserError("3d_spatial needs a depth map for every image")
        return compbench.spatial_3d(e.seen, *e.objects, e.locality, e.depth_HW, rules)
    if e.category == "numeracy":
        return compbench.numeracy(e.seen, *e.counted)
    if e.category == "non_spatial":
        return e.cosine
    assert e.category == "complex", e.category
    return compbench.three_in_one(
        e.kind,
        attribute=compbench.blip_vqa(e.probabilities),
        spatial=compbench.spatial_2d(e.seen, *e.objects, e.locality, rules),
        action=e.cosine,
    )


def gather(judges: Judges, category: str, samples: Sequence[JudgedImage]) -> list[Evidence]:
    """Ask the judges about images of one category, and nothing that its formula does not use."""
    complex_prompt = category == "complex"
    texts = [sample.prompt.text for sample in samples]
    kinds = [str(sample.prompt.metadata["kind"]) if complex_prompt else "" for sample in samples]
    boxes = category in ("spatial", "3d_spatial", "numeracy") or any(kind != "action" for kind in kinds if kind)
    words = category == "non_spatial" or any(kind != "spatial" for kind in kinds if kind)
    seen = _detect(judges, samples) if boxes else [[] for _ in samples]
    asked = complex_prompt or category in ATTRIBUTES
    yes = ask_noun_chunks(judges, texts, [s.image for s in samples]) if asked else [[] for _ in samples]
    cosines = _measure_cosines(judges, samples, complex_prompt) if words else np.zeros(len(samples))
    names = list_object_names(judges) if category == "numeracy" else None
    depths = _measure_depths(judges, samples) if category == "3d_spatial" else [None] * len(samples)
    return [
        Evidence(
            category,
            seen=seen[i],
            objects=read_objects(judges.reader(), category, text) if boxes else (None, None),
            locality=read_locality(judges.reader(), category, text) if boxes else None,
            counted=read_counts(judges.reader(), names, text) if names else ((), ()),
            probabilities=yes[i],
            depth_HW=depths[i],
            cosine=float(cosines[i]),
            kind=kinds[i],
        )
        for i, text in enumerate(texts)
    ]


def read_objects(reader: PromptReader, category: str, text: str) -> Pair:
    """The two objects whose places are compared."""
    return reader.pair(text, complex_prompt=category == "complex")


def read_locality(reader: PromptReader, category: str, text: str) -> str | None:
    """The relation between them."""
    return find_locality(text, LOCALITIES_3D) if category == "3d_spatial" else reader.locality(text)


def read_counts(reader: PromptReader, names: tuple[list[str], list[str]], text: str) -> tuple[list[str], list[int]]:
    """Objects that the prompt counts, and how many of each."""
    return compbench.parse_counts(reader.tokens(text), *names)


def ask_noun_chunks(judges: Judges, texts: Sequence[str], images: Sequence[np.ndarray]) -> list[list[float]]:
    """P(yes) of each noun chunk of each picture's prompt."""
    chunks = [compbench.choose_chunks(judges.reader().noun_chunks(text)) for text in texts]
    shown = [image for image, asked in zip(images, chunks) for _ in asked]
    yes = judges.vqa().yes(shown, [f"{chunk}?" for asked in chunks for chunk in asked])
    ends = np.cumsum([len(asked) for asked in chunks])
    return [part.tolist() for part in np.split(yes, ends[:-1])]


def _measure_cosines(judges: Judges, samples: Sequence[JudgedImage], complex_prompt: bool) -> np.ndarray:
    texts = [sample.prompt.text for sample in samples]
    if complex_prompt:
        texts = [judges.reader().without_adjectives(text) for text in texts]
    return load_clip(judges).cosines([sample.image for sample in samples], texts)


def _measure_depths(judges: Judges, samples: Sequence[JudgedImage]) -> list[np.ndarray]:
    depth = load_depth(judges)
    assert depth is not None, "no depth judge, so no 3d_spatial prompts"
    return depth.of([sample.image for sample in samples])


def _detect(judges: Judges, samples: Sequence[JudgedImage]) -> list[list[LabelledBox]]:
    found = load_detector(judges).detect([sample.image for sample in samples])
    return [
        to_labelled_boxes(s.image, detections, judges.paths.compbench_threshold)
        for s, detections in zip(samples, found)
    ]


def to_labelled_boxes(image: np.ndarray, detections: Detections, threshold: float) -> list[LabelledBox]:
    """Detections past the threshold by falling score, boxes in UniDet's frame."""
    scale = compbench.detector_scale(*image.shape[:2])
    order = np.argsort(-detections.scores_N, kind="stable")
    return [
        LabelledBox(
            detections.labels[i], (detections.boxes_N4[i].astype(float) * scale).tolist(), float(detections.scores_N[i])
        )
        for i in order
        if detections.scores_N[i] > threshold
    ]
