"""T2I-CompBench's 2D, 3D and numeracy scores against a second implementation, quirks included."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from eval.metrics.compbench.rules import LabelledBox, merge_labels, numeracy, spatial_2d, spatial_3d

# Written for this test from facts D: exact fractions for boxes, no code shared.

DEPTH = np.random.default_rng(0).integers(0, 256, (30, 40)) / 256  # sums of 1/256 are exact
BESIDE = ("on side of", "next to", "near")
# (axis, sign of object 2's center minus object 1's) that each phrase asks for
SIDES = {"on the left of": (0, 1), "on the right of": (0, -1), "on the bottom of": (1, -1), "on the top of": (1, 1)}
PHRASES_2D = (*BESIDE, *SIDES, "on top of", None)
PHRASES_3D = ("in front of", "behind", "hidden", None)


def area(box, grow=0):
    return Fraction(box[2] - box[0] + grow) * Fraction(box[3] - box[1] + grow)


def shared(a, b, grow=0):
    sides = [max(Fraction(0), Fraction(min(a[i + 2], b[i + 2])) - max(a[i], b[i]) + grow) for i in (0, 1)]
    return sides[0] * sides[1]


def reference_iou(a, b):
    return shared(a, b) / (area(a) + area(b) - shared(a, b))


def reference_2d(phrase, a, b):
    offset = [Fraction(b[i] + b[i + 2] - a[i] - a[i + 2]) / 2 for i in (0, 1)]
    if phrase in BESIDE:
        least, most = sorted(map(abs, offset))
        return 1.0 if least < 150 else float(150 / most)
    if phrase not in SIDES:
        return 0.0
    axis, sign = SIDES[phrase]
    if sign * offset[axis] <= 0 or abs(offset[axis]) <= abs(offset[1 - axis]):
        return 0.0
    return float(min(Fraction(1), Fraction(1, 10) / max(reference_iou(a, b), Fraction(1, 10**9))))


def reference_3d(phrase, a, b):
    """The depth map is sliced [x, y]: rows of the map run over x."""
    if phrase is None:
        return 0.0
    means = []
    for x1, y1, x2, y2 in (a, b):
        values = [Fraction(DEPTH[x, y]) for x in range(x1, min(x2, 30)) for y in range(y1, min(y2, 40))]
        means.append(sum(values) / len(values) if values else None)
    if None in means:
        return 0.0
    nearer = means[0] > means[1] if phrase == "in front of" else means[0] < means[1]
    iou = reference_iou(a, b)
    if not nearer or iou == Fraction(1, 2):
        return 0.0
    return float(min(1, iou * 2))


def person(name):
    return "person" if name in ("girl", "boy", "man", "woman") else name


def confidences(found):
    return sum(seen.score for seen in found) / 4


def reference_spatial_2d(seen, name1, name2, phrase):
    firsts = [next((s for s in seen if s.label == person(name)), None) for name in (name1, name2)]
    if None in firsts:
        found = [s for s in firsts if s][:1]
        total = confidences(found)
    else:
        total = confidences(firsts) + reference_2d(phrase, firsts[0].box, firsts[1].box) / 2
    assume(abs(total - 0.5) > 1e-9)  # the order of additions decides there
    return total if total > 0.5 else 0.0


def reference_spatial_3d(seen, name1, name2, phrase):
    """Both names in the joined labels: matches are overwritten until both have one. Else one name's first match."""
    names, joined = [person(name1), person(name2)], " ".join(s.label for s in seen)
    if not all(name in joined for name in names):
        return confidences([s for name in names for s in seen if name in s.label][:1])
    matches = [[i for i, s in enumerate(seen) if name in s.label] for name in names]
    stop = max(found[0] for found in matches)  # where the later of the two is seen for the first time
    one, two = (seen[max(i for i in found if i <= stop)] for found in matches)
    return confidences([one, two]) + reference_3d(phrase, one.box, two.box) / 2


def reference_numeracy(seen, names, numbers):
    others = {**dict.fromkeys(("boy", "girl", "man", "woman"), "person"), "ship": "boat", "telivision": "tv"}
    others |= {"goldfish": "fish", "painting": "picture"}
    labels = reference_merged(seen)
    halves = 0
    for i, name in enumerate(others.get(name, name) for name in names):
        if labels.count(name) == 0:
            for j, label in enumerate(labels):
                labels[j] = name if name in label else label
        halves += labels.count(name) > 0
        halves += labels.count(name) > 0 and i < len(numbers) and labels.count(name) == numbers[i]
    return halves / (2 * len(names)) if names else 0.0


def reference_merged(seen):
    kept = []
    for label, box, _ in seen:
        for other, old in kept:
            inner = shared(box, old, grow=1)
            sizes = area(box, 1), area(old, 1), area(box, 1) + area(old, 1) - inner
            if label == other and inner / min(sizes) > Fraction(9, 10):
                break
        else:
            kept.append((label, box))
    return [label for label, _ in kept]


def boxes(width, height, *, near=False):
    """Whole pixels. `near`: big boxes about one place, which merge and cover each other."""
    if near:
        corner, far = st.integers(0, 3), st.integers(26, 29)
        return st.tuples(corner, corner, far, far)
    x, y = (st.lists(st.integers(0, side), min_size=2, max_size=2, unique=True).map(sorted) for side in (width, height))
    return st.tuples(x, y).map(lambda xy: (xy[0][0], xy[1][0], xy[0][1], xy[1][1]))


scores = st.sampled_from([0.31, 0.52, 0.77, 0.98, 1.0])


def detections(labels, box):
    return st.lists(st.builds(LabelledBox, st.sampled_from(labels), box, scores), max_size=8)


LABELS_2D = ("dog", "cat", "person")
LABELS_3D = ("dog", "hot dog", "cat", "person")
COUNTED = ("car", "girl", "ship", "goldfish", "dog")
LABELS_COUNTED = ("car", "sports car", "carrot", "person", "boat", "fish", "dog")
common = settings(max_examples=200, deadline=None)


@common
@given(
    detections(LABELS_2D, boxes(480, 480) | boxes(30, 40, near=True)),
    st.sampled_from(["dog", "girl"]), st.sampled_from(["cat", "dog"]), st.sampled_from(PHRASES_2D),
)  # fmt: skip
def test_2d_equals_a_second_implementation(seen, name1, name2, phrase):
    assert spatial_2d(seen, name1, name2, phrase) == pytest.approx(
        reference_spatial_2d(seen, name1, name2, phrase), abs=1e-6
    )


@common
@given(
    detections(LABELS_3D, boxes(40, 40) | boxes(30, 40, near=True)),
    st.sampled_from(["dog", "girl"]), st.sampled_from(["cat", "dog"]), st.sampled_from(PHRASES_3D),
)  # fmt: skip
def test_3d_equals_a_second_implementation(seen, name1, name2, phrase):
    assert spatial_3d(seen, name1, name2, phrase, DEPTH) == pytest.approx(
        reference_spatial_3d(seen, name1, name2, phrase), abs=1e-6
    )


@common
@given(
    detections(LABELS_COUNTED, boxes(30, 30) | boxes(30, 30, near=True)),
    st.lists(st.sampled_from(COUNTED), max_size=3), st.lists(st.integers(1, 3), max_size=3),
)  # fmt: skip
def test_numeracy_equals_a_second_implementation(seen, names, numbers):
    assert merge_labels(seen) == reference_merged(seen)
    found = numeracy(seen, names, numbers)
    assert found == pytest.approx(reference_numeracy(seen, names, numbers), abs=1e-6)
    assert 0 <= found <= 1 + 1e-9
    assert not math.isnan(found)
