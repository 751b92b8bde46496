"""The judges of the world: known answers of their parts, floors of their scores, truth against shuffled prompts."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_pipeline.checkpoints import WORLD
from data_pipeline.world import grammar
from data_pipeline.world.classes import CLASSES, DRAWINGS
from data_pipeline.world.detector import (
    STRIDE,
    Detection,
    DetectorConfig,
    WorldDetector,
    compute_centre_weights,
    compute_iou,
    make_boxes,
)
from data_pipeline.world.scenes import SceneObject, make_scene
from data_pipeline.world.training.judge_check import check, find_relations, passes
from data_pipeline.world.training.judge_metrics import compute_average_precision
from data_pipeline.world.training.judge_training import augment, draw_nothing, make_held_out_scenes, warp
from data_pipeline.world.training.judge_wording import (
    ask_absent,
    ask_questions,
    describe_claims,
    list_vocabulary,
    make_nearly_true,
    save_tokenizer,
)
from data_pipeline.world.training.train_detector import collate, evaluate, presence_loss
from data_pipeline.world.training.train_judge_clip import cut_masked
from data_pipeline.world.training.train_vqa import mark_patches
from infra.errors import UserError

SEED = 4242  # no card and no training uses it


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scenes():
    return make_held_out_scenes(SEED, 200)


@pytest.fixture(scope="module")
def detector():
    return WorldDetector.from_pretrained(WORLD / "detector")


def test_centre_weights_are_a_bilinear_partition_of_one():
    boxes_N4 = torch.tensor([[10.0, 10, 30, 30], [0, 0, 3, 3], [60, 60, 64, 64], [5, 8, 20, 40]])
    row_N4, column_N4, weight_N4 = compute_centre_weights(boxes_N4, 16)
    torch.testing.assert_close(weight_N4.sum(1), torch.ones(4))
    assert int(row_N4.min()) >= 0
    assert int(torch.maximum(row_N4, column_N4).max()) <= 15
    x = ((column_N4 + 0.5) * STRIDE * weight_N4).sum(1)[[0, 3]]
    torch.testing.assert_close(x, torch.tensor([20.0, 12.5]))  # their weighted mean is the centre again


def test_presence_loss_is_least_at_the_weights_themselves():
    targets = collate(make_held_out_scenes(SEED, 4), None)
    row_N4, column_N4, weight_N4 = compute_centre_weights(targets.boxes_N4, 16)
    p = torch.full((4, len(CLASSES), 16, 16), 1e-6)
    p[targets.image_N[:, None], targets.label_N[:, None], row_N4, column_N4] = weight_N4.clamp(1e-6, 1 - 1e-6)
    best = presence_loss(p.logit(), targets)
    for factor in (0.8, 1.25):
        assert presence_loss(p.logit() * factor, targets) > best


def test_boxes_come_back_from_edge_distances():
    boxes = make_boxes(torch.tensor([[3.0, 4, 5, 6]]), torch.tensor([2]), torch.tensor([1]))
    assert boxes.tolist() == [[3.0, 6.0, 11.0, 16.0]]
    assert compute_iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert compute_iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_detector_is_the_same_after_saving(tmp_path):
    torch.manual_seed(0)
    made = WorldDetector(DetectorConfig(CLASSES, widths=(8, 8, 8), num_prototypes=4, temperature=0.9)).eval()
    for values in made.state_dict().values():  # what half precision cannot hold would differ
        if values.is_floating_point():
            values.copy_(values.half())
    made.save_pretrained(tmp_path)
    read = WorldDetector.from_pretrained(tmp_path)
    assert read.config == made.config
    x_BCHW = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(read(x_BCHW), made(x_BCHW))


def test_detector_refuses_what_it_cannot_read(detector, tmp_path):
    with pytest.raises(UserError, match="uint8"):
        detector.detect(np.zeros((1, 64, 64, 3), np.float32))
    with pytest.raises(UserError, match=r"config\.json"):
        WorldDetector.from_pretrained(tmp_path)


def test_detections_follow_the_image_size(detector, scenes):
    image = scenes[0].image
    small = detector.detect(image[None])[0]
    large = detector.detect(image.repeat(2, 0).repeat(2, 1)[None])[0]
    assert [d.name for d in small if d.score > 0.5] == [d.name for d in large if d.score > 0.5]
    assert large[0].mask.shape == (128, 128)
    np.testing.assert_allclose(np.array(large[0].box) / 2, small[0].box, atol=2.0)


def test_detector_finds_held_out_objects(detector, scenes):
    figures = evaluate(detector, scenes)
    assert figures["box AP50"] > 0.97
    assert figures["mask AP50"] > 0.97
    assert figures["box AP50:95"] > 0.85
    assert figures["mask AP50:95"] > 0.85
    assert figures["false detections above 0.3 per blank image"] < 0.1


def test_average_precision_known_answers():
    mask = np.zeros((64, 64), bool)
    mask[10:20, 10:20] = True
    real = SceneObject("cat", None, (10.0, 10.0, 20.0, 20.0), mask)
    right = Detection("cat", real.box, mask, 0.9)
    wrong = Detection("cat", (40.0, 40.0, 50.0, 50.0), np.roll(mask, 30, (0, 1)), 0.95)
    assert compute_average_precision([[right]], [[real]])["box AP50:95"] == 1
    # a wrong one ranked first: precision 1/2 at every recall
    assert compute_average_precision([[wrong, right]], [[real]])["mask AP50"] == pytest.approx(0.5)
    assert compute_average_precision([[]], [[real]])["box AP50"] == 0
    shifted = replace(right, box=(10.0, 10.0, 20.0, 17.0))  # IoU 0.7 passes five of ten thresholds
    assert compute_average_precision([[shifted]], [[real]])["box AP50:95"] == pytest.approx(0.5)
    # the same object found twice counts once
    assert compute_average_precision([[right, replace(right, score=0.8)]], [[real, real]])["box AP50"] == 1


def test_warping_keeps_the_truth_true():
    rng = np.random.default_rng(0)
    for scene in make_held_out_scenes(SEED, 40):
        bent = warp(scene, rng)
        for obj, old in zip(bent.objects, scene.objects, strict=True):
            rows, columns = np.nonzero(obj.mask)
            x1, y1, x2, y2 = obj.box
            assert columns.min() >= x1 - 2
            assert columns.max() <= x2 + 2
            assert rows.min() >= y1 - 2
            assert rows.max() <= y2 + 2
            assert obj.mask.sum() > 0.55 * old.mask.sum()
        assert bent.image.shape == scene.image.shape
    assert augment(scene.image, rng).dtype == draw_nothing(rng).dtype == np.uint8


def test_nearly_true_captions_are_false():
    words = random.Random(0)
    for scene in make_held_out_scenes(SEED, 300):
        wrong = make_nearly_true(words, scene.tag, scene.include)
        assert describe_claims(wrong) != describe_claims(scene.include)
        grammar.paraphrase(words, scene.tag, wrong)
    cat_left = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]
    dog_right = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]
    assert describe_claims(cat_left) == describe_claims(dog_right)


def _true_of(text, scene):
    """Reads a question word by word: an independent answer."""
    words = text.rstrip("?").split()
    if words[-1] in ("photo", "picture", "image", "drawing"):
        return True
    number = grammar.NUMBERS.index(words[0]) if words[0] in grammar.NUMBERS else None
    said = " ".join(words[1:])
    name = next(n for n in CLASSES if said.endswith((n, grammar.plural(n))))
    rest = said.replace(grammar.plural(name), "").replace(name, "").strip()
    shown = [o for o in scene.objects if o.name == name and (not rest or o.color == rest)]
    return len(shown) == number if number else bool(shown)


def test_questions_have_the_answers_that_the_scene_gives():
    words = random.Random(1)
    asked = [(q, s) for s in make_held_out_scenes(SEED, 300) for q in ask_questions(words, s, 6)]
    for question, scene in asked:
        assert _true_of(question.text, scene) is question.answer, (question, scene.caption)
        natural = [f"{DRAWINGS[o.name].natural} {o.name}?" for o in scene.objects if o.color is None]
        assert not any(question.text.endswith(end) for end in natural)  # has no true answer
    assert abs(np.mean([q.answer for q, _ in asked]) - 0.5) < 0.05
    assert not any(q.answer for q in ask_absent(words, 50))


def test_vocabulary_knows_the_world_and_spells_the_rest(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    unknown = tokenizer.unk_token_id
    for scene in make_held_out_scenes(SEED, 100):
        for text in (scene.caption, *scene.alt_captions):
            assert len(tokenizer(text).input_ids) <= 18
    assert unknown not in tokenizer("an iridescent Zebra, 7 o'clock").input_ids
    assert len(list_vocabulary()) == len(set(list_vocabulary())) == len(tokenizer)


def test_patches_tell_class_color_and_centre():
    mask = np.zeros((64, 64), bool)
    mask[8:24, 8:16] = True
    label_P, color_P, centre_P = mark_patches((SceneObject("cat", "red", (8.0, 8.0, 16.0, 24.0), mask),))
    assert np.flatnonzero(label_P == CLASSES.index("cat")).tolist() == [9, 17]
    assert np.flatnonzero(color_P >= 0).tolist() == [9, 17]
    assert np.flatnonzero(centre_P).tolist() == [17]


def test_masked_crop_is_gray_outside_and_square():
    mask = np.zeros((64, 64), bool)
    mask[20:30, 10:40] = True
    image = np.full((64, 64, 3), 255, np.uint8)
    crop = cut_masked(image, SceneObject("cat", None, (8.0, 18.0, 42.0, 32.0), mask))
    assert crop.shape == (64, 64, 3)
    assert crop[0, 32].tolist() == [0x99] * 3
    assert crop[32, 32].tolist() == [255] * 3


def test_relations_follow_the_official_margin():
    assert find_relations((0, 0, 10, 10), (30, 0, 40, 10)) == {"left of"}
    assert find_relations((30, 30, 40, 40), (0, 0, 10, 10)) == {"right of", "below"}
    assert find_relations((0, 0, 10, 10), (1, 1, 11, 11)) == set()


def test_verdict_needs_every_clause():
    scene = make_scene(SEED, 0, split="judge_val", seen=None, tag="counting")
    name, count = scene.include[0]["class"], scene.include[0]["count"]
    one = Detection(name, (0.0, 0.0, 9.0, 9.0), np.zeros((64, 64), bool), 0.95)
    assert passes(scene, [one] * count, lambda d: "red")
    assert not passes(scene, [one] * (count + 1), lambda d: "red")  # the exclude clause
    assert not passes(scene, [replace(one, score=0.89)] * count, lambda d: "red")  # counting asks for more than 0.9


def test_clip_and_vqa_load_through_their_libraries():
    import open_clip
    from PIL import Image
    from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

    image = Image.fromarray(make_scene(SEED, 1, split="judge_val", seen=None, tag="single_object").image)
    folder = WORLD / "judge_clip"
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a photo of a cat"])
    assert tuple(tokens.shape) == (1, 20)
    assert transform(image).shape == (3, 64, 64)
    assert model.encode_text(tokens).dtype == model.encode_image(transform(image)[None]).dtype == torch.float32

    processor = AutoProcessor.from_pretrained(WORLD / "vqa")
    vqa = AutoModelForVisualQuestionAnswering.from_pretrained(WORLD / "vqa")
    out = vqa.generate(**processor(images=image, text="a photo?", return_tensors="pt"), max_new_tokens=4)
    assert processor.decode(out[0], skip_special_tokens=True).replace("[DEC]", "").strip() == "yes"


def test_judges_tell_truth_from_shuffled_prompts():
    figures = check(WORLD, per_task=34, seed=SEED)
    tasks = [f"truth/geneval/{tag}" for tag in grammar.TAGS]
    assert min(figures[task] for task in tasks) >= 0.9, figures
    assert figures["truth/geneval/overall"] >= 0.96, figures
    assert figures["shuffled/geneval/overall"] <= 0.1, figures
    assert figures["truth/compbench/color"] >= 0.95, figures
    assert figures["shuffled/compbench/color"] <= 0.12, figures


def test_checkpoints_are_small_and_carry_their_cards():
    names = ("detector", "judge_clip", "vqa")
    assert sum(file.stat().st_size for name in names for file in (WORLD / name).iterdir()) <= 9_000_000
    for name in names:
        card = (WORLD / name / "README.md").read_text()
        assert "CC BY-SA 4.0" in card
        assert "judge_train" in card
