"""T2I-CompBench: known answers of every official formula, its quirks, and how prompts are read."""

import numpy as np
import pytest

from eval.judging.language import GrammarReader, SpacyReader, find_locality
from eval.metrics.compbench.rules import (
    LabelledBox,
    blip_vqa,
    choose_chunks,
    detector_scale,
    merge_labels,
    numeracy,
    parse_counts,
    position_2d,
    position_3d,
    same_object,
    spatial_2d,
    spatial_3d,
    three_in_one,
)
from infra.errors import UserError

LEFT, RIGHT, HIGH, LOW = [0, 40, 20, 60], [80, 45, 100, 65], [40, 0, 60, 20], [45, 80, 65, 100]


@pytest.mark.parametrize(
    ("locality", "box1", "box2", "score"),
    [
        ("on the left of", LEFT, RIGHT, 1),
        ("on the left of", RIGHT, LEFT, 0),
        ("on the right of", RIGHT, LEFT, 1),
        ("on the top of", HIGH, LOW, 1),
        ("on the bottom of", LOW, HIGH, 1),
        ("on the bottom of", HIGH, LOW, 0),
        ("on the left of", HIGH, [60, 20, 80, 40], 0),  # |dx| == |dy|: strictly larger is asked for
        ("on top of", HIGH, LOW, 0),  # recognised, but without a rule
        (None, LEFT, RIGHT, 0),
        ("next to", LEFT, [169, 500, 189, 520], 0.326087),  # dx 169, dy 460: 150 / 460
        ("near", LEFT, [149, 500, 169, 520], 1),  # dx 149 is near enough, whatever dy
        ("on side of", LEFT, [150, 190, 170, 210], 1),  # dx 150, dy 150 exactly: not < 150, and 150 / 150
    ],
)
def test_position_2d(locality, box1, box2, score):
    assert position_2d(locality, box1, box2) == pytest.approx(score, abs=1e-6)


def test_position_2d_overlap_is_paid_for():
    # widths 20, shifted by 10: intersection 200 of union 600, IoU 1/3 -> 0.1 / (1/3)
    assert position_2d("on the left of", [0, 0, 20, 20], [10, 0, 30, 20]) == pytest.approx(0.3, abs=1e-6)
    # IoU exactly 0.1 counts as >= 0.1 and gives 1 either way: 20x1 boxes sharing 40/11 columns
    share = 40 / 11
    assert position_2d("on the left of", [0, 0, 20, 1], [20 - share, 0, 40 - share, 1]) == pytest.approx(1, abs=1e-6)


def test_position_2d_of_boxes_without_area():
    assert position_2d("on the left of", [5, 5, 5, 5], [9, 5, 9, 5]) == 1


def depth(height=100, width=140):
    """Depth that grows along the rows: as the official code slices [x, y], x runs over the rows."""
    return np.tile(np.linspace(0, 1, height)[:, None], (1, width))


def test_position_3d():
    near, far = [20, 0, 60, 40], [0, 0, 40, 40]  # by x; IoU 20/60
    assert position_3d("in front of", near, far, depth()) == pytest.approx(2 / 3, abs=1e-6)
    assert position_3d("behind", near, far, depth()) == 0
    assert position_3d("hidden", far, near, depth()) == pytest.approx(2 / 3, abs=1e-6)
    close = [4, 0, 44, 40]  # IoU 36/44 > 0.5
    assert position_3d("in front of", close, far, depth()) == 1
    apart = [90, 0, 99, 40]
    assert position_3d("in front of", apart, far, depth()) == 0
    third = [0, 0, 20, 40]  # IoU with `far` is exactly 0.5: both official branches miss it
    assert position_3d("behind", third, far, depth()) == 0
    assert position_3d("near", near, far, depth()) == position_2d("near", near, far)


def test_position_3d_past_the_edge_of_the_swapped_axis_is_zero():
    beyond, other = [110, 0, 139, 40], [100, 0, 139, 40]  # rows 110.. of a map with 100 rows: an empty slice
    assert position_3d("in front of", beyond, other, depth()) == 0


def test_spatial_2d_cuts_below_one_half():
    dog, cat = LabelledBox("dog", LEFT, 0.8), LabelledBox("cat", RIGHT, 0.6)
    assert spatial_2d([dog, cat], "dog", "cat", "on the left of") == pytest.approx(0.85, abs=1e-6)
    assert spatial_2d([dog, cat], "dog", "cat", "on the right of") == 0  # 0.35 < 0.5
    sure = [LabelledBox("dog", LEFT, 1.0), LabelledBox("cat", RIGHT, 1.0)]
    assert spatial_2d(sure, "dog", "cat", "on the right of") == 0.5
    assert spatial_2d([dog], "dog", "cat", "on the left of") == 0  # 0.2
    assert spatial_2d([], "dog", "cat", "on the left of") == 0
    assert spatial_2d([dog, cat], None, None, "on the left of") == 0


def test_spatial_2d_takes_the_first_detection_and_people_are_persons():
    seen = [LabelledBox("dog", RIGHT, 0.9), LabelledBox("dog", LEFT, 0.8), LabelledBox("person", [30, 40, 50, 60], 0.7)]
    assert spatial_2d(seen, "dog", "girl", "on the right of") == pytest.approx(0.225 + 0.175 + 0.5, abs=1e-6)


def test_spatial_3d_matches_substrings_and_keeps_low_scores():
    seen = [LabelledBox("hot dog", [20, 0, 60, 40], 0.8), LabelledBox("cat", [0, 0, 40, 40], 0.4)]
    assert spatial_3d(seen, "dog", "cat", "in front of", depth()) == pytest.approx(0.3 + 1 / 3, abs=1e-6)
    assert spatial_3d(seen[:1], "dog", "cat", "in front of", depth()) == pytest.approx(0.2, abs=1e-6)
    assert spatial_3d(seen[1:], "dog", "cat", "in front of", depth()) == pytest.approx(0.1, abs=1e-6)
    # the official loop lets later matches overwrite until both are found
    twice = [LabelledBox("dog", LEFT, 0.1), LabelledBox("dog", LEFT, 0.2), LabelledBox("cat", RIGHT, 0.4)]
    assert spatial_3d(twice, "dog", "cat", "behind", depth()) == pytest.approx(0.15, abs=1e-6)


def test_numeracy_merges_boxes_of_one_object():
    assert same_object([0, 0, 9, 9], [0, 0, 9, 9])
    assert same_object([0, 0, 99, 99], [10, 10, 19, 19])  # one covers the other
    assert not same_object([0, 0, 9, 9], [1, 0, 10, 9])  # 90 of 100: not above 0.9
    seen = [
        LabelledBox("dog", [0, 0, 9, 9], 0.9),
        LabelledBox("cat", [0, 0, 9, 9], 0.8),
        LabelledBox("dog", [1, 1, 8, 8], 0.7),
    ]
    assert merge_labels(seen) == ["dog", "cat"]


def spread(*labels):
    return [LabelledBox(label, [20 * i, 0, 20 * i + 9, 9], 0.9) for i, label in enumerate(labels)]


def test_numeracy_scores():
    assert numeracy(spread("dog", "dog", "cat"), ["dog", "cat"], [2, 1]) == pytest.approx(1, abs=1e-6)
    assert numeracy(spread("dog", "cat"), ["dog", "cat"], [2, 1]) == pytest.approx(0.75, abs=1e-6)
    assert numeracy(spread("cat"), ["dog", "cat"], [2, 1]) == pytest.approx(0.5, abs=1e-6)
    assert numeracy([], ["dog"], [1]) == 0
    assert numeracy(spread("person", "boat"), ["girl", "ship"], [1, 1]) == 1
    assert numeracy(spread("sports car", "car"), ["car"], [1]) == 1  # its own name is there: no take-over
    assert numeracy(spread("sports car", "toy car"), ["car"], [2]) == 1  # taken over by substring
    assert numeracy(spread("dog"), ["dog", "dog"], [1]) == pytest.approx(0.75, abs=1e-6)  # a number is missing


SINGULAR, PLURAL = ["dog", "teddy bear", "bear", "sheep"], ["dogs", "teddy bears", "bears", "sheep"]


@pytest.mark.parametrize(
    ("prompt", "names", "numbers"),
    [
        ("two dogs and a bear", ["dog", "bear"], [2, 1]),
        ("three teddy bears", ["teddy bear"], [3]),
        ("a teddy bear and eight sheep", ["teddy bear", "sheep"], [1, 8]),
        ("two teddy bear", ["teddy bear"], [1]),
        ("a teddy bears", ["teddy bears"], [1]),
        ("one dogs", ["dog"], [1]),
        ("a dogs and four bears", ["dog", "bear"], [4]),  # "a" is no number to word2number: the lists part
        ("a", [], []),
        ("nine dogs", [], []),
    ],
)
def test_counts_are_read_as_the_official_code_reads_them(prompt, names, numbers):
    assert parse_counts(prompt.split(), SINGULAR, PLURAL) == (names, numbers)


def test_blip_vqa_rounds_each_answer_and_the_product():
    assert blip_vqa([0.5, 0.25]) == 0.125
    assert blip_vqa([]) == 1.0
    assert blip_vqa([0.99996]) == 1.0
    assert blip_vqa([0.33334, 0.5]) == pytest.approx(0.1666, abs=1e-6)  # 0.3333 * 0.5 = 0.16665 in float32
    assert blip_vqa([1.0] * 8 + [0.0]) == 1.0  # at most 8 chunks


def test_chunks_that_are_not_asked():
    assert choose_chunks(["a dog", "the left", "a cat", "top", "the side"]) == ["a dog", "a cat"]


def test_three_in_one():
    parts = {"attribute": 0.9, "spatial": 0.6, "action": 0.3}
    assert three_in_one("spatial", **parts) == pytest.approx(0.75, abs=1e-6)
    assert three_in_one("action", **parts) == pytest.approx(0.6, abs=1e-6)
    assert three_in_one("both", **parts) == pytest.approx(0.6, abs=1e-6)


def test_the_first_phrase_of_the_vocabulary_decides():
    assert find_locality("a dog next to a cat on the left of a bear") == "next to"
    assert find_locality("a dog on top of a cat") == "on top of"
    assert find_locality("a dog and a cat") is None


def test_detector_frame():
    assert detector_scale(512, 512) == pytest.approx(479 / 512)
    assert detector_scale(300, 600) == pytest.approx(480 / 600)


def test_answers_are_written_as_officially_and_read_back(tmp_path):
    from eval.metrics.compbench.files import read_answers, write_answers

    assert write_answers(tmp_path / "vqa_result.json", [0.12345, 1.0], as_text=True) == pytest.approx(0.56175)
    assert (tmp_path / "vqa_result.json").read_text() == (
        '[{"question_id": 0, "answer": "0.1235"}, {"question_id": 1, "answer": "1.0000"}]'
    )
    assert read_answers(tmp_path / "vqa_result.json") == [0.1235, 1.0]
    (tmp_path / "bad.json").write_text("[{}]")
    with pytest.raises(UserError, match="not a T2I-CompBench answer list"):
        read_answers(tmp_path / "bad.json")
    for text, told in [
        ('[{"question_id": 3, "answer": 1}, {"question_id": "3", "answer": 0}]', "1 answers carry a question_id"),
        ('[{"question_id": 0, "answer": NaN}]', "not a finite number"),
    ]:
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match=told):
            read_answers(tmp_path / "bad.json")
    with pytest.raises(UserError, match="cannot read answers"):
        read_answers(tmp_path / "missing.json")


def test_grammar_reader():
    reader = GrammarReader(["dog", "dogs", "teddy bear", "teddy bears", "kite", "kites"], ["red", "blue"])
    prompt = "a photo of a red teddy bear left of a blue kite"
    assert reader.noun_chunks(prompt) == ["a red teddy bear", "a blue kite"]
    assert reader.pair(prompt) == ("teddy bear", "kite")
    assert reader.locality(prompt) == "on the left of"
    assert reader.without_adjectives(prompt) == "a photo of a teddy bear left of a kite"
    assert reader.noun_chunks("a photo of three dogs") == ["three dogs"]
    assert reader.tokens("a photo of three dogs") == ["a", "photo", "of", "three", "dogs"]


def spacy_doc(words, pos, heads, deps):
    """A parsed document without a trained model: tags and dependencies are given."""
    spacy = pytest.importorskip("spacy")
    from spacy.tokens import Doc

    return Doc(spacy.blank("en").vocab, words=words.split(), pos=pos.split(), heads=heads, deps=deps.split())


def test_spacy_reader_reads_tags_and_chunks():
    doc = spacy_doc("a red dog next to a Big Ben", "DET ADJ NOUN ADV ADP DET PROPN PROPN", [2, 2, 2, 2, 3, 7, 7, 4],
                    "det amod ROOT advmod prep det compound pobj")  # fmt: skip
    reader = SpacyReader(lambda prompt: doc)
    assert reader.noun_chunks("") == ["a red dog", "a Big Ben"]
    assert reader.without_adjectives("") == "a dog next to a Big Ben"
    assert reader.pair("") == ("dog", "dog")  # first and last NOUN
    # no noun behind the preposition, and the run of proper nouns ends the prompt: only one object, so none
    assert reader.pair("", complex_prompt=True) == (None, None)
    longer = spacy_doc("a dog near Ben sleeping", "DET NOUN ADP PROPN VERB", [1, 1, 1, 2, 1], "det ROOT prep pobj acl")
    assert SpacyReader(lambda prompt: longer).pair("", complex_prompt=True) == ("dog", "Ben")


def test_a_missing_spacy_model_is_one_line():
    with pytest.raises(UserError, match="no spaCy model 'no_such_model'"):
        SpacyReader("no_such_model")
