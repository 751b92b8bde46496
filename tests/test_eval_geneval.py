"""GenEval: the official prompts byte for byte; decisions against a second implementation and at their edges."""

import hashlib
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from eval.judging.geneval_prompts import (
    COLORS,
    OFFICIAL_SHA256,
    RELATIONS,
    TASKS,
    draw_official_metadata,
    format_metadata,
)
from eval.metrics.geneval.rules import (
    OFFICIAL_RULES,
    GenEvalRules,
    decide,
    describe_detections,
    keep,
    overlap,
    relative_position,
)
from eval.networks.detectors import Detections
from infra.errors import UserError

NAMES = ("dog", "cat", "kite")


def detections(*rows):
    """rows: (name, x1, y1, x2, y2, score)."""
    table = np.array([row[1:] for row in rows], dtype=np.float32).reshape(-1, 5)
    return Detections(table[:, :4], table[:, 4], tuple(row[0] for row in rows))


def judge(found, metadata, colors=None):
    return decide(keep(found, metadata["tag"]), metadata, colorist=lambda name, items: [colors[i.row] for i in items])


def test_official_prompts_are_byte_for_byte_the_official_file():
    text = format_metadata(draw_official_metadata()).encode()
    assert hashlib.sha256(text).hexdigest() == OFFICIAL_SHA256
    assert len(text) == 85_209


def test_official_prompts_have_the_counted_composition():
    records = draw_official_metadata()
    assert Counter(r["tag"] for r in records) == dict(zip(TASKS, (80, 99, 80, 94, 100, 100)))
    assert list(dict.fromkeys(r["tag"] for r in records)) == list(TASKS)
    counting = Counter(r["include"][0]["count"] for r in records if r["tag"] == "counting")
    assert counting == {2: 26, 3: 28, 4: 26}
    relations = Counter(r["include"][1]["position"][0] for r in records if r["tag"] == "position")
    assert relations == {"below": 28, "right of": 27, "above": 26, "left of": 19}


# A second implementation of facts C, written for this test: plain Python, float64, no code shared.


def reference_reason(rows, metadata, colors):
    """Empty when the image is right, else a line per clause that fails."""
    limit = 0.9 if metadata["tag"] == "counting" else 0.3
    by_name = {}
    for number, (name, *box) in enumerate(rows):
        if np.float32(box[4]) > np.float32(limit):
            by_name.setdefault(name, []).append((np.float32(box[4]), number, box))
    for found in by_name.values():
        found.sort(key=lambda item: (-item[0], -item[1]))
        del found[16:]
    reasons, groups = [], []
    for clause in metadata["include"]:
        top = by_name.get(clause["class"], [])[: clause["count"]]
        reason = reference_clause(clause, top, groups, [colors[number] for _, number, _ in top])
        groups.append(None if reason else top)
        reasons += reason
    for name, count in ((c["class"], c["count"]) for c in metadata.get("exclude", [])):
        if len(by_name.get(name, [])) >= count:
            reasons.append(f"expected {name}<{count}, found {len(by_name[name])}")
    return "\n".join(reasons)


def reference_clause(clause, top, groups, colors):
    """[] or the one reason: too few, else of another color, else without a target, else elsewhere."""
    name, count, color = clause["class"], clause["count"], clause.get("color")
    if len(top) < count:
        return [f"expected {name}>={count}, found {len(top)}"]
    if color is not None and colors.count(color) < count:
        times = Counter(colors)
        told = ", ".join(f"{times[c]} {c}" for c in COLORS if times[c])
        return [f"expected {color} {name}>={count}, found {times[color]} {color}; and {told}"]
    if "position" not in clause:
        return []
    relation, target = clause["position"]
    if groups[target] is None:
        return [f"no target for {name} to be {relation}"]
    for _, _, box in top:
        for _, _, other in groups[target]:
            true = reference_relations(box, other)
            if relation not in true:
                return [f"expected {name} {relation} target, found {' and '.join(true)} target"]
    return []


def reference_relations(a, b):
    offset = [(a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    moved = [math.copysign(max(abs(o) - 0.1 * s, 0.0), o) for o, s in zip(offset, sizes)]
    if max(map(abs, moved)) < 1e-3:
        return []
    dx, dy = (m / math.hypot(*offset) for m in moved)
    # float32 there, float64 here: stay off the edge, which has tests of its own
    assume(all(abs(abs(d) - 0.5) > 1e-4 for d in (dx, dy)))
    assume(all(m == 0 or abs(m) > 2e-3 for m in moved))
    return [r for r, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)) if holds]


coordinate = st.integers(0, 64).map(float)
score = st.sampled_from([0.1, 0.3, 0.31, 0.5, 0.5, 0.9, 0.91, 0.95, 0.99])
row = st.tuples(st.sampled_from(NAMES), coordinate, coordinate, coordinate, coordinate, score)
clause = st.fixed_dictionaries(
    {"class": st.sampled_from(NAMES), "count": st.integers(1, 3)}, optional={"color": st.sampled_from(COLORS[:3])}
)


@st.composite
def questions(draw):
    include = draw(st.lists(clause, min_size=1, max_size=3))
    for index in range(1, len(include)):
        if draw(st.booleans()):
            include[index] |= {"position": [draw(st.sampled_from(RELATIONS)), draw(st.integers(0, index - 1))]}
    exclude = draw(
        st.lists(st.fixed_dictionaries({"class": st.sampled_from(NAMES), "count": st.integers(1, 4)}), max_size=1)
    )
    tag = draw(st.sampled_from(["counting", "position"]))
    return {"tag": tag, "include": include, "exclude": exclude, "prompt": ""}


@settings(max_examples=300, deadline=None)
@given(st.lists(row, max_size=24), questions(), st.data())
def test_verdicts_and_reasons_equal_a_second_implementation(rows, metadata, data):
    colors = data.draw(st.lists(st.sampled_from(COLORS[:3]), min_size=len(rows), max_size=len(rows)))
    expected = reference_reason(rows, metadata, colors)
    assert judge(detections(*rows), metadata, colors) == (not expected, expected)


@settings(max_examples=200, deadline=None)
@given(st.lists(row, max_size=40))
def test_kept_boxes_are_the_top_sixteen_above_the_threshold(rows):
    for tag, limit in (("counting", 0.9), ("colors", 0.3)):
        kept = keep(detections(*rows), tag)
        for name in NAMES:
            scores = [r[5] for r in rows if r[0] == name and np.float32(r[5]) > np.float32(limit)]
            expected = sorted(scores, reverse=True)[:16]
            assert [float(f.box_5[4]) for f in kept.get(name, [])] == pytest.approx(expected)
            assert (name in kept) == bool(expected)


def test_a_score_at_the_threshold_is_not_above_it():
    assert keep(detections(("dog", 0, 0, 9, 9, 0.3)), "colors") == {}
    assert keep(detections(("dog", 0, 0, 9, 9, 0.9)), "counting") == {}
    assert len(keep(detections(("dog", 0, 0, 9, 9, 0.9)), "colors")["dog"]) == 1


def test_equal_scores_put_the_later_detection_first():
    kept = keep(detections(("dog", 0, 0, 1, 1, 0.5), ("dog", 0, 0, 2, 2, 0.5), ("dog", 0, 0, 3, 3, 0.6)), "colors")
    assert [f.row for f in kept["dog"]] == [2, 1, 0]


def test_suppression_is_off_by_default_and_counts_pixels_when_on():
    twins = detections(("dog", 0, 0, 9, 9, 0.9), ("dog", 0, 0, 9, 9, 0.8), ("dog", 20, 0, 29, 9, 0.7))
    assert len(keep(twins, "colors")["dog"]) == 3
    assert [f.row for f in keep(twins, "colors", GenEvalRules(max_overlap=0.99))["dog"]] == [0, 2]
    # 10x10 pixel boxes that share 5 columns: 50 / 150
    assert overlap(np.array([0, 0, 9, 9]), np.array([5, 0, 14, 9])) == pytest.approx(1 / 3)


BOX = np.array([20, 20, 30, 30, 1], dtype=np.float32)


def moved(dx, dy):
    return BOX + np.array([dx, dy, dx, dy, 0], dtype=np.float32)


def test_position_of_the_same_place_is_none():
    assert relative_position(BOX, BOX) == []


def test_position_within_the_margin_is_none_and_just_past_it_is_not():
    # two boxes of width 10: the margin is 0.1 * 20 = 2 pixels
    assert relative_position(moved(2, 0), BOX) == []
    assert relative_position(moved(-4.5, 0), BOX) == ["left of"]
    # 3 pixels: (3 - 2) / 3 < 0.5, so past the margin but in no direction
    assert relative_position(moved(3, 0), BOX) == []


def test_position_divides_by_the_norm_before_the_margin():
    # offset (8, 6): revised (6, 4), norm 10 -> (0.6, 0.4): right only. A revised norm (7.21) would add "below" (0.55).
    assert relative_position(moved(8, 6), BOX) == ["right of"]
    assert relative_position(moved(10, 10), BOX) == ["right of", "below"]
    assert relative_position(moved(-10, -10), BOX) == ["left of", "above"]


def test_position_exactly_one_half_is_no_direction():
    assert relative_position(moved(4, 0), BOX) == []  # (4 - 2) / 4 == 0.5


def position_question(relation="left of"):
    include = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": [relation, 0]}]
    return {"tag": "position", "include": include, "prompt": f"a photo of a dog {relation} a cat"}


def test_reasons_are_in_the_official_words():
    two = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}
    one = detections(("dog", 0, 0, 9, 9, 0.95))
    many = detections(*[("dog", i, 0, i + 9, 9, 0.95) for i in range(4)])
    assert judge(one, two) == (False, "expected dog>=2, found 1")
    assert judge(many, two) == (False, "expected dog<3, found 4")
    red = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    assert judge(one, red, ["blue"]) == (False, "expected red dog>=1, found 0 red; and 1 blue")
    assert judge(one, red, ["red"]) == (True, "")


def test_reasons_of_positions():
    beside = detections(("cat", 0, 0, 9, 9, 0.9), ("dog", 40, 0, 49, 9, 0.9))
    assert judge(beside, position_question()).reason == "expected dog left of target, found right of target"
    assert judge(beside, position_question("right of")).correct
    alone = detections(("dog", 40, 0, 49, 9, 0.9))
    assert judge(alone, position_question()).reason == "expected cat>=1, found 0\nno target for dog to be left of"


def test_position_is_not_looked_at_once_the_color_failed():
    question = position_question()
    question["include"][1]["color"] = "red"
    verdict = judge(detections(("cat", 0, 0, 9, 9, 0.9), ("dog", 40, 0, 49, 9, 0.9)), question, ["red", "blue"])
    assert verdict.reason == "expected red dog>=1, found 0 red; and 1 blue"


def test_only_the_top_count_boxes_are_judged():
    # the second-best dog is right of the cat, but only the best one is looked at
    found = detections(("cat", 30, 0, 39, 9, 0.9), ("dog", 0, 0, 9, 9, 0.9), ("dog", 60, 0, 69, 9, 0.8))
    assert judge(found, position_question()).correct
    assert not judge(found, position_question("right of")).correct


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_boxes_that_are_not_numbers_are_refused(bad):
    with pytest.raises(UserError, match="not a finite number"):
        detections(("dog", 0, bad, 9, 9, 0.9))


def test_details_are_json_of_kept_boxes():
    kept = keep(detections(("dog", 0, 0, 9.5, 9, 0.5), ("cat", 0, 0, 1, 1, 0.1)), "colors", OFFICIAL_RULES)
    assert json.loads(json.dumps(describe_detections(kept))) == {"dog": [[0, 0, 9.5, 9, 0.5]]}
