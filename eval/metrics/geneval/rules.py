"""GenEval's decision logic: given the same detections and colors, the verdicts and reasons of the official code.

Rules and words follow evaluation/evaluate_images.py of djghosh13/geneval (MIT); boxes stay float32 as there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from eval.judging.geneval_prompts import COLORS, RELATIONS, Metadata
from eval.networks.detectors import Detections


@dataclass(frozen=True)
class GenEvalRules:
    """Thresholds of the official command line, with its defaults."""

    threshold: float = 0.3
    counting_threshold: float = 0.9  # when the tag is counting
    max_objects: int = 16  # highest-scoring per class
    max_overlap: float = 1.0  # non-maximum suppression above this IoU; 1.0 switches it off
    position_margin: float = 0.1


OFFICIAL_RULES = GenEvalRules()


class KeptDetection(NamedTuple):
    """One kept detection: x1, y1, x2, y2, score (float32), and its row in the detector's answer."""

    box_5: np.ndarray
    row: int


class ImageVerdict(NamedTuple):
    """Is everything there that the prompt asks for? `reason` says what is not, in the official words."""

    correct: bool
    reason: str


# Colors of boxes of one class, in the order given: by CLIP over the image, or stored ones.
Colorist = Callable[[str, Sequence[KeptDetection]], Sequence[str]]


def keep(detections: Detections, tag: str, rules: GenEvalRules = OFFICIAL_RULES) -> dict[str, list[KeptDetection]]:
    """Detections past the threshold, per class by falling score, at most `max_objects` each.

    Equal scores: the later detection comes first (a reversed stable sort, what numpy's argsort does up to 16 entries).
    """
    threshold = rules.counting_threshold if tag == "counting" else rules.threshold
    boxes_N5 = np.concatenate([detections.boxes_N4, detections.scores_N[:, None]], axis=1)
    labels = np.array(detections.labels, dtype=object)
    kept: dict[str, list[KeptDetection]] = {}
    for name in dict.fromkeys(detections.labels):
        rows = np.flatnonzero(labels == name)
        order = rows[np.argsort(boxes_N5[rows, 4], kind="stable")[::-1]]
        order = order[boxes_N5[order, 4] > threshold][: rules.max_objects]
        found = _suppress([KeptDetection(boxes_N5[i], int(i)) for i in order], rules.max_overlap)
        if found:
            kept[name] = found
    return kept


def _suppress(found: list[KeptDetection], max_overlap: float) -> list[KeptDetection]:
    if max_overlap == 1:
        return found
    chosen: list[KeptDetection] = []
    while found:
        best, *rest = found
        chosen.append(best)
        found = [other for other in rest if overlap(best.box_5, other.box_5) < max_overlap]
    return chosen


def overlap(box_a: np.ndarray, box_b: np.ndarray) -> float:
    """Intersection over union in whole-pixel convention (+1 on every side length), as the official compute_iou."""
    inner = (*np.maximum(box_a[:2], box_b[:2]), *np.minimum(box_a[2:4], box_b[2:4]))
    intersection, area_a, area_b = (
        max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0) for x1, y1, x2, y2 in (inner, box_a[:4], box_b[:4])
    )
    union = area_a + area_b - intersection
    return intersection / union if union else 0


def relative_position(box_a: np.ndarray, box_b: np.ndarray, margin: float = 0.1) -> list[str]:
    """Where A lies relative to B, in the order of RELATIONS; empty when the centers are too close.

    The margin shrinks the offset, but the direction is divided by the norm of the offset *before* shrinking.
    """
    boxes_2PX = np.array([box_a[:4], box_b[:4]]).reshape(2, 2, 2)
    center_a, center_b = boxes_2PX.mean(axis=-2)
    size_a, size_b = np.abs(np.diff(boxes_2PX, axis=-2))[..., 0, :]
    offset = center_a - center_b
    revised = np.maximum(np.abs(offset) - margin * (size_a + size_b), 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return []
    dx, dy = revised / np.linalg.norm(offset)
    return [name for name, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)) if holds]


def decide(
    kept: Mapping[str, Sequence[KeptDetection]],
    metadata: Metadata,
    *,
    colorist: Colorist,
    rules: GenEvalRules = OFFICIAL_RULES,
) -> ImageVerdict:
    """Judge one image: every include clause must hold, no exclude clause may. `kept` is sorted by falling score."""
    reasons: list[str] = []
    groups: list[Sequence[KeptDetection] | None] = []
    for clause in metadata.get("include", []):
        found = kept.get(clause["class"], [])[: clause["count"]]
        reason = _include_reason(clause, found, groups, colorist, rules)
        groups.append(found if reason is None else None)
        if reason is not None:
            reasons.append(reason)
    for clause in metadata.get("exclude", []):
        num = len(kept.get(clause["class"], []))
        if num >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {num}")
    return ImageVerdict(correct=not reasons, reason="\n".join(reasons))


def _include_reason(
    clause: Metadata,
    found: Sequence[KeptDetection],
    groups: Sequence[Sequence[KeptDetection] | None],
    colorist: Colorist,
    rules: GenEvalRules,
) -> str | None:
    """Why the clause fails, in the official words, or None. Position is not looked at once the color failed."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if "color" in clause:
        seen = list(colorist(name, found))
        wanted = clause["color"]
        if seen.count(wanted) < count:
            others = ", ".join(f"{seen.count(color)} {color}" for color in COLORS if color in seen)
            return f"expected {wanted} {name}>={count}, found {seen.count(wanted)} {wanted}; and {others}"
    if "position" in clause:
        relation, target = clause["position"]
        targets = groups[target]
        if targets is None:
            return f"no target for {name} to be {relation}"
        for item in found:
            for other in targets:
                true_relations = relative_position(item.box_5, other.box_5, rules.position_margin)
                if relation not in true_relations:
                    return f"expected {name} {relation} target, found {' and '.join(true_relations)} target"
    return None


def describe_detections(kept: Mapping[str, Sequence[KeptDetection]]) -> dict[str, list[list[float]]]:
    """The `details` column: class -> [x1, y1, x2, y2, score] of every kept detection."""
    return {name: [item.box_5.tolist() for item in found] for name, found in kept.items()}
