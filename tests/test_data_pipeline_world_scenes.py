"""The world's scenes: pure functions of their key, true to their captions, held-out compositions kept out."""

import hashlib
import random
from collections import Counter

import numpy as np
import pytest

from data_pipeline.world import grammar
from data_pipeline.world.classes import BACKGROUNDS, CLASSES, COLORS, DRAWINGS, FILLS
from data_pipeline.world.scenes import Scene, detailed_caption, make_scene, make_scene_for


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(0, i, split="train") for i in range(600)]


def test_a_scene_is_a_function_of_its_key() -> None:
    first, again = make_scene(3, 17, split="val"), make_scene(3, 17, split="val")
    assert np.array_equal(first.image, again.image)
    assert first.caption == again.caption
    assert first.alt_captions == again.alt_captions
    others = [make_scene(3, 18, split="val"), make_scene(4, 17, split="val"), make_scene(3, 17, split="train")]
    assert not any(np.array_equal(first.image, other.image) for other in others)


def test_known_scenes_have_not_moved(scenes: list[Scene]) -> None:
    """Shipped checkpoints and datasets rest on these words and places: a change here means training them again."""
    digest = hashlib.sha256()
    for scene in scenes[:50]:
        boxes = [item.box for item in scene.objects]
        digest.update(repr((scene.caption, scene.alt_captions, boxes)).encode())
    assert scenes[0].image.shape == (64, 64, 3)
    assert digest.hexdigest()[:16] == "c7972c83e38c11c0"


def test_truth_matches_pixels(scenes: list[Scene]) -> None:
    for scene in scenes[:150]:
        painted = np.any(scene.image != np.array(_background(scene)), axis=-1)
        claimed = np.zeros((64, 64), int)
        for item in scene.objects:
            x1, y1, x2, y2 = (int(v) for v in item.box)
            inside = np.zeros((64, 64), bool)
            inside[y1:y2, x1:x2] = True
            assert item.mask.any()
            assert not item.mask[~inside].any()
            claimed += inside
            # the mask shows the object (every mask pixel is painted, but for a white fill close to the background)
            assert painted[item.mask].mean() > (0.3 if item.color == "white" else 0.8)
        assert claimed.max() == 1, "objects overlap"
        assert not painted[claimed == 0].any(), "paint outside every box"


def _background(scene: Scene) -> tuple[int, ...]:
    free = np.ones((64, 64), bool)
    for item in scene.objects:
        x1, y1, x2, y2 = (int(v) for v in item.box)
        free[y1:y2, x1:x2] = False
    (color,) = {tuple(int(v) for v in pixel) for pixel in scene.image[free]}
    assert color in BACKGROUNDS
    return color


def test_scene_shows_what_it_includes(scenes: list[Scene]) -> None:
    for scene in scenes:
        wanted = Counter((item["class"], item.get("color")) for item in scene.include for _ in range(item["count"]))
        assert Counter((item.name, item.color) for item in scene.objects) == wanted


def test_relations_hold_by_genevals_rule() -> None:
    for index in range(100):
        scene = make_scene(1, index, split="train", tag="position")
        relation = scene.include[1]["position"][0]
        reference, target = (np.array(item.box) for item in scene.objects)
        offset = (target[:2] + target[2:] - reference[:2] - reference[2:]) / 2
        sizes = target[2:] - target[:2] + reference[2:] - reference[:2]
        revised = np.maximum(np.abs(offset) - 0.1 * sizes, 0) * np.sign(offset)
        dx, dy = revised / np.linalg.norm(offset)
        holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
        assert [name for name, true in holds.items() if true] == [relation]


def test_colors_are_what_they_are_called() -> None:
    """Of all ten colors, an object's own fills cover most of its pixels."""
    for index in range(150):
        (item,) = (scene := make_scene(2, index, split="train", tag="colors")).objects
        pixels = scene.image[item.mask].astype(int)
        covered = {}
        for color in COLORS:
            fills = np.array([[int(fill[i : i + 2], 16) for i in (1, 3, 5)] for fill in FILLS[color]])
            covered[color] = int((np.abs(pixels[:, None] - fills).sum(-1).min(1) < 20).sum())
        assert max(covered, key=lambda color: covered[color]) == item.color, (item.name, item.color, covered)


def test_held_out_compositions_never_occur_in_training(scenes: list[Scene]) -> None:
    assert all(scene.seen for scene in scenes)
    held = {f"{color} {name}" for name in CLASSES for color in COLORS if grammar.is_held_out_color(name, color)}
    held |= {
        f"{grammar.NUMBERS[n]} {grammar.plural(name)}"
        for name in CLASSES
        for n in (2, 3, 4)
        if grammar.is_held_out_count(name, n)
    }
    pairs = [(a, b) for a in CLASSES for b in CLASSES if grammar.is_held_out_pair(a, b)]
    for scene in scenes:
        for caption in (scene.caption, *scene.alt_captions, detailed_caption(scene)):
            assert not any(f" {words} " in f" {caption.replace(',', ' ')} " for words in held), caption
        names = {item.name for item in scene.objects}
        assert not any(a in names and b in names for a, b in pairs)


def test_held_out_shares_are_near_the_promise() -> None:
    colors = [grammar.is_held_out_color(n, c) for n in CLASSES for c in COLORS if c != DRAWINGS[n].natural]
    counts = [grammar.is_held_out_count(n, k) for n in CLASSES for k in (2, 3, 4)]
    pairs = [grammar.is_held_out_pair(a, b) for i, a in enumerate(CLASSES) for b in CLASSES[i + 1 :]]
    for flags in (colors, counts, pairs):
        assert 0.10 <= np.mean(flags) <= 0.20
    assert all(any(grammar.is_held_out_color(n, c) for n in CLASSES) for c in COLORS)


def test_unseen_scenes_are_unseen() -> None:
    assert not any(make_scene(0, i, split="x", seen=False).seen for i in range(60))
    with pytest.raises(ValueError, match="always a seen composition"):
        make_scene(0, 0, split="x", seen=False, tag="single_object")


def test_prompts_are_distinct_and_official() -> None:
    for tag in grammar.TAGS:
        for seen in (True, False):
            rows = grammar.world_prompts(tag, 30, 0, seen)
            assert len({row["prompt"] for row in rows}) == len(rows)
            assert all(grammar.is_seen(row["include"]) is seen for row in rows)
            assert all(row["prompt"].startswith("a photo of ") for row in rows)
    assert len(grammar.world_prompts("single_object", 30, 0, True)) == len(CLASSES)
    assert grammar.world_prompts("single_object", 30, 0, False) == ()
    row = grammar.world_prompts("counting", 1, 0, True)[0]
    assert row["exclude"] == [{"class": row["include"][0]["class"], "count": row["include"][0]["count"] + 1}]


def test_official_wording() -> None:
    bus, apple = {"class": "bus", "count": 1}, {"class": "apple", "count": 1}
    assert grammar.official_prompt("two_object", [bus, apple]) == "a photo of a bus and an apple"
    assert grammar.official_prompt("counting", [{"class": "bus", "count": 3}]) == "a photo of three buses"
    below = [bus, apple | {"position": ["below", 0]}]
    assert grammar.official_prompt("position", below) == "a photo of an apple below a bus"
    colored = [bus | {"color": "orange"}, apple | {"color": "red"}]
    assert grammar.official_prompt("color_attr", colored) == "a photo of an orange bus and a red apple"


def test_converse_paraphrases_say_the_same() -> None:
    include = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]
    said = {grammar.paraphrase(random.Random(i), "position", include) for i in range(200)}
    assert any("cat to the left of a dog" in text for text in said)
    assert any("dog to the right of a cat" in text for text in said)
    assert not any("dog left of a cat" in text or "cat right of a dog" in text for text in said)


def test_a_prompt_can_be_drawn() -> None:
    for tag in grammar.TAGS:
        for row in grammar.world_prompts(tag, 5, 1, True):
            scene = make_scene_for(row, 0, 0, split="truth")
            assert scene.alt_captions[0] == row["prompt"]


def test_captions_fit_sixteen_tokens(scenes: list[Scene]) -> None:
    from tokenizers import Tokenizer

    from data_pipeline.checkpoints import resolve

    tokenizer = Tokenizer.from_file(str(resolve("world:minilm") / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    texts = [text for scene in scenes for text in (scene.caption, detailed_caption(scene))]
    lengths = [len(encoded.ids) for encoded in tokenizer.encode_batch(texts)]
    # "broccoli" and "donut" are several pieces in MiniLM's vocabulary; a few captions lose their last word.
    assert np.mean([length > 16 for length in lengths]) < 0.01
    assert max(lengths) <= 17
