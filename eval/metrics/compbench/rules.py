"""T2I-CompBench(++): the official formulas as pure functions of detections, probabilities and depth.

Each follows the evaluator of its category in Karine-Huang/T2I-CompBench (named above each group), quirks included
(eval/DECISIONS.md); `repaired` mends those of position. Boxes are x1, y1, x2, y2 in the detector's frame, where 2D
distances are compared with 150 pixels (`detector_scale`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eval.judging.language import LOCALITIES_2D, LOCALITIES_3D, NUMBER_WORDS, ONES
from eval.judging.official import PositionRules

IOU_2D, IOU_3D, NEAR_PIXELS = 0.1, 0.5, 150  # the official thresholds
DROPPED_CHUNKS = ("top", "the side", "the left", "the right")
MAX_CHUNKS = 8  # BLIP_vqa.py asks about at most as many noun chunks
PEOPLE = ("girl", "boy", "man", "woman")
RENAMED = {  # words of prompts -> UniDet's labels, the misspelling included
    **dict.fromkeys(PEOPLE, "person"),
    "ship": "boat",
    "telivision": "tv",
    "goldfish": "fish",
    "painting": "picture",
}

Box = Sequence[float]


class LabelledBox(NamedTuple):
    """One detection, in the detector's order (falling score): label, box, score."""

    label: str
    box: Box
    score: float


def detector_scale(height: int, width: int) -> float:
    """UniDet's input: short side 479, long side at most 480. Multiplies box coordinates."""
    return min(479 / min(height, width), 480 / max(height, width))


# BLIPvqa_eval/BLIP_vqa.py: color, shape, texture.


def blip_vqa(probabilities: Sequence[float]) -> float:
    """Attribute binding: product of P(yes) over the first 8 noun chunks, each and the result rounded to 4 decimals."""
    product = np.float32(1)
    for probability in probabilities[:MAX_CHUNKS]:
        product *= np.float32(f"{probability:.4f}")
    return float(f"{product:.4f}")


def choose_chunks(chunks: Sequence[str]) -> list[str]:
    """The noun chunks that become questions `<chunk>?`."""
    return [chunk for chunk in chunks if chunk not in DROPPED_CHUNKS][:MAX_CHUNKS]


# UniDet_eval/2D_spatial_eval.py and 3D_spatial_eval.py (before: determine_position_for_eval.py).


def _measure_offset_and_iou(box1: Box, box2: Box) -> tuple[float, float, float]:
    """Center of box 2 minus center of box 1, and IoU (plain areas). Two boxes without area have no overlap."""
    dx = (box2[0] + box2[2]) / 2 - (box1[0] + box1[2]) / 2
    dy = (box2[1] + box2[3]) / 2 - (box1[1] + box1[3]) / 2
    across = max(0, min(box1[2], box2[2]) - max(box1[0], box2[0]))
    down = max(0, min(box1[3], box2[3]) - max(box1[1], box2[1]))
    inner = across * down
    union = (box1[2] - box1[0]) * (box1[3] - box1[1]) + (box2[2] - box2[0]) * (box2[3] - box2[1]) - inner
    return dx, dy, inner / union if union else 0.0


def position_2d(locality: str | None, box1: Box, box2: Box, rules: PositionRules = "official") -> float:
    """Soft score of `object 1 <locality> object 2`. "on top of" is recognised but has no rule: 0, as officially."""
    dx, dy, iou = _measure_offset_and_iou(box1, box2)
    if locality == "on top of" and rules == "repaired":
        locality = "on the top of"
    if locality in ("next to", "on side of", "near"):
        near = abs(dx) < NEAR_PIXELS or abs(dy) < NEAR_PIXELS
        return 1.0 if near else NEAR_PIXELS / max(abs(dx), abs(dy))
    holds = {
        "on the right of": dx < 0 and abs(dx) > abs(dy),
        "on the left of": dx > 0 and abs(dx) > abs(dy),
        "on the bottom of": dy < 0 and abs(dy) > abs(dx),
        "on the top of": dy > 0 and abs(dy) > abs(dx),
    }
    if not holds.get(locality or "", False):
        return 0.0
    return 1.0 if iou < IOU_2D else IOU_2D / iou


def position_3d(
    locality: str | None, box1: Box, box2: Box, depth_HW: np.ndarray, rules: PositionRules = "official"
) -> float:
    """Soft score from overlap and mean depth. The official code slices the H x W depth map as [x, y]: kept.

    A 2D phrase is scored as in 2D. An empty slice has no mean, so no order holds and the score is 0.
    """
    if locality in LOCALITIES_2D:
        return position_2d(locality, box1, box2, rules)
    if locality not in LOCALITIES_3D:
        return 0.0
    iou = _measure_offset_and_iou(box1, box2)[2]
    sliced_HW = depth_HW if rules == "official" else depth_HW.T
    difference = _average_depth(sliced_HW, box1) - _average_depth(sliced_HW, box2)
    holds = difference > 0 if locality == "in front of" else difference < 0
    if not holds or (iou == IOU_3D and rules == "official"):  # one half falls through both official branches
        return 0.0
    return 1.0 if iou >= IOU_3D else iou / IOU_3D


def _average_depth(depth_XY: np.ndarray, box: Box) -> float:
    """NaN for an empty slice, as numpy's mean: comparisons with it are false."""
    part = depth_XY[int(box[0]) : int(box[2]), int(box[1]) : int(box[3])]
    return float(part.mean()) if part.size else math.nan


def _replace_person(name: str) -> str:
    return "person" if name in PEOPLE else name


def spatial_2d(
    seen: Sequence[LabelledBox],
    obj1: str | None,
    obj2: str | None,
    locality: str | None,
    rules: PositionRules = "official",
) -> float:
    """2D-spatial: first detection of each label; anything below 0.5 becomes 0."""
    first = _find_first(seen, obj1, exact=True)
    second = _find_first(seen, obj2, exact=True)
    position = position_2d(locality, first.box, second.box, rules) if first and second else 0.0
    score = _add_confidence(first, second, position)
    return score if score >= 0.5 else 0.0


def spatial_3d(
    seen: Sequence[LabelledBox],
    obj1: str | None,
    obj2: str | None,
    locality: str | None,
    depth_HW: np.ndarray,
    rules: PositionRules = "official",
) -> float:
    """3D-spatial: labels match by substring, no cut at 0.5. `depth_HW` is min-max normalised, larger is nearer."""
    if obj1 is None or obj2 is None:
        return 0.0  # no noun in the prompt: the official code stops there
    joined = " ".join(item.label for item in seen)
    if _replace_person(obj1) in joined and _replace_person(obj2) in joined:
        first, second = _find_last_until_both(seen, _replace_person(obj1), _replace_person(obj2))
    else:
        first = _find_first(seen, obj1, exact=False)
        second = None if first else _find_first(seen, obj2, exact=False)
    position = position_3d(locality, first.box, second.box, depth_HW, rules) if first and second else 0.0
    return _add_confidence(first, second, position)


def _find_first(seen: Sequence[LabelledBox], name: str | None, *, exact: bool) -> LabelledBox | None:
    if name is None:
        return None
    wanted = _replace_person(name)
    return next((item for item in seen if (item.label == wanted if exact else wanted in item.label)), None)


def _find_last_until_both(
    seen: Sequence[LabelledBox], name1: str, name2: str
) -> tuple[LabelledBox | None, LabelledBox | None]:
    """The official loop overwrites each object's match until both have one."""
    first = second = None
    for item in seen:
        first = item if name1 in item.label else first
        second = item if name2 in item.label else second
        if first and second:
            break
    return first, second


def _add_confidence(first: LabelledBox | None, second: LabelledBox | None, position: float) -> float:
    """A quarter of each object's confidence, and half of the position; without both objects no position."""
    if first and second:
        return 0.25 * first.score + 0.25 * second.score + position / 2
    only = first or second
    return 0.25 * only.score if only else 0.0


# UniDet_eval/numeracy_eval.py.


def same_object(box1: Box, box2: Box) -> bool:
    """Numeracy's merging rule: IoU above 0.9, or one box covers over 0.9 of the other (sides counted with +1 pixel)."""
    inner = max(0, min(box1[2], box2[2]) - max(box1[0], box2[0]) + 1) * max(
        0, min(box1[3], box2[3]) - max(box1[1], box2[1]) + 1
    )
    area1, area2 = ((box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (box1, box2))
    return inner / (area1 + area2 - inner) > 0.9 or inner / area1 > 0.9 or inner / area2 > 0.9


def merge_labels(seen: Sequence[LabelledBox]) -> list[str]:
    """Labels of the detections that are left when repeats of one object are merged, in order."""
    kept: list[LabelledBox] = []
    for item in seen:
        if not any(other.label == item.label and same_object(item.box, other.box) for other in kept):
            kept.append(item)
    return [item.label for item in kept]


def parse_counts(tokens: Sequence[str], singular: Sequence[str], plural: Sequence[str]) -> tuple[list[str], list[int]]:
    """Objects that the prompt counts, and their numbers, read as the official code reads them.

    A number word before a two-word name, else a one-word name. Where that code fails on a word ("a" before a plural)
    no number joins its list, so later ones move up and the lists differ in length. A name without plural keeps its own.
    """
    names: list[str] = []
    numbers: list[int] = []
    for i, word in enumerate(tokens):
        if word not in ONES and word not in NUMBER_WORDS:
            continue
        pair = f"{tokens[i + 1]} {tokens[i + 2]}" if i < len(tokens) - 2 else None
        if pair is not None and (pair in singular or pair in plural):
            name, counted = pair, pair in plural and word not in ONES
        elif i + 1 < len(tokens) and (tokens[i + 1] in singular or tokens[i + 1] in plural):
            name = tokens[i + 1]
            counted = not (name in singular and word in ONES)
        else:
            continue
        if not counted:
            names.append(name)
            numbers.append(1)
            continue
        names.append(singular[plural.index(name)] if name in plural else name)
        if word in NUMBER_WORDS:
            numbers.append(NUMBER_WORDS[word])
    return names, numbers


def numeracy(seen: Sequence[LabelledBox], names: Sequence[str], numbers: Sequence[int]) -> float:
    """Half of an object's share when it is there, the other half when its count is exact."""
    labels = merge_labels(seen)
    score = 0.0
    for i, raw in enumerate(names):
        name = RENAMED.get(raw, raw)
        if name not in labels:
            labels = [name if name in label else label for label in labels]
        if name in labels:
            exact = i < len(numbers) and labels.count(name) == numbers[i]
            score += (1.0 if exact else 0.5) / len(names)
    return score


# 3_in_1_eval/3_in_1.py.


def three_in_one(kind: str, *, attribute: float, spatial: float = 0.0, action: float = 0.0) -> float:
    """Complex prompts: `spatial` (2D + BLIP) / 2, `action` (CLIP + BLIP) / 2, anything else the mean of the three."""
    if kind == "spatial":
        return (spatial + attribute) * 0.5
    if kind == "action":
        return (action + attribute) * 0.5
    return (attribute + spatial + action) / 3
