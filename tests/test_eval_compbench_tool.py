"""T2I-CompBench by itself: stored evidence, official layouts, 3D-spatial through DPT, UniDet's substitute."""

import json

import numpy as np
import pytest

from eval.drawing.pictures import write_picture
from eval.judging.judges import build_judges
from eval.judging.official import OfficialPaths
from eval.metrics.compbench.evidence import Evidence, answer
from eval.metrics.compbench.files import name_sample, read_answers, read_samples
from eval.metrics.compbench.rules import LabelledBox, position_2d, position_3d
from eval.metrics.compbench.stored import PromptLookup, format_stored, read_stored
from eval.metrics.compbench.tool import judge, merge, score
from eval.networks.depth import DptDepth, to_frame
from eval.networks.open_vocabulary import OpenVocabularyDetector
from infra.errors import UserError


@pytest.fixture(scope="module")
def dpt(tmp_path_factory):
    """A DPT folder in the hub's layout, tiny and untrained, made for 32 pixels."""
    import torch
    from transformers import DPTConfig, DPTForDepthEstimation

    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4, fusion_hidden_size=8, is_hybrid=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dpt")
    DPTForDepthEstimation(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def owlv2(tmp_path_factory):
    """An OWLv2 folder in the hub's layout, tiny and untrained, with a byte-level tokenizer of no merges."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        CLIPTokenizer,
        Owlv2Config,
        Owlv2ForObjectDetection,
        Owlv2ImageProcessor,
        Owlv2Processor,
        Owlv2TextConfig,
        Owlv2VisionConfig,
    )

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("owlv2")
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    text = Owlv2TextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=0,
    )  # fmt: skip
    vision = Owlv2VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16
    )
    config = Owlv2Config(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)
    pictures = Owlv2ImageProcessor(size={"height": 64, "width": 64})
    Owlv2Processor(image_processor=pictures, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def picture(seed, height=48, width=64):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_depth_is_in_unidets_frame_and_between_0_and_1(dpt):
    depth = DptDepth(dpt, side=64)
    for found, (height, width) in zip(depth.of([picture(0), picture(1, 64, 64)]), ((359, 480), (479, 479))):
        assert abs(found.shape[0] - height) <= 1
        assert found.shape[1] == width
        assert found.min() >= 0
        assert found.max() <= 1
        assert np.ptp(found) > 0.5, "min-max normalised"
    assert DptDepth(dpt, side=64).version == depth.version
    assert depth.version != DptDepth(dpt, side=96).version, "the input size is part of the protocol"
    with pytest.raises(UserError, match="no DPT at"):
        DptDepth(dpt / "missing")


def test_a_flat_depth_is_zero_and_frames_keep_their_size():
    assert to_frame(np.full((479, 479), 51, dtype=np.uint8)) == pytest.approx(0.2)
    assert to_frame(np.zeros((512, 512), dtype=np.uint8)).shape == (479, 479)


def test_the_substitute_finds_boxes_of_the_names_it_is_asked_for(owlv2):
    detector = OpenVocabularyDetector(owlv2, ["dog", "hot dog", "dog"], keep_above=0.0)
    assert detector.name == "owlv2 in place of UniDet"
    assert detector.classes == ("dog", "hot dog")
    for image, found in zip((picture(0), picture(1, 64, 64)), detector.detect([picture(0), picture(1, 64, 64)])):
        assert set(found.labels) <= {"dog", "hot dog"}
        assert len(found.labels) > 0
        assert (np.diff(found.scores_N) <= 0).all(), "by falling score"
        assert (found.boxes_N4[:, 2:] > found.boxes_N4[:, :2]).all()
        assert (found.boxes_N4[:, [0, 2]] <= image.shape[1]).all()
        assert (found.boxes_N4[:, [1, 3]] <= image.shape[0]).all()
    assert OpenVocabularyDetector(owlv2, ["dog"], keep_above=1.0).detect([picture(0)])[0].labels == ()


def test_what_cannot_stand_in_for_unidet_is_refused(owlv2, dpt):
    with pytest.raises(UserError, match="holds a dpt model; expected owlv2"):
        OpenVocabularyDetector(dpt, ["dog"])
    with pytest.raises(UserError, match="needs names"):
        OpenVocabularyDetector(owlv2, [])
    with pytest.raises(UserError, match="no OWLv2 at"):
        OpenVocabularyDetector(owlv2 / "missing", ["dog"])


def test_3d_spatial_end_to_end_and_again_from_its_stored_evidence(tmp_path, dpt, owlv2, capsys):
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    (dataset / "3d_spatial_val.txt").write_text("a dog in front of a cat\na dog behind a cat\n")
    (dataset / "new_objects.txt").write_text("dog - dogs\ncat - cats\n")
    samples = tmp_path / "samples"
    for index, prompt in enumerate(["a dog in front of a cat", "a dog behind a cat"]):
        write_picture(samples / name_sample(prompt, index), picture(index))
    official = OfficialPaths(
        compbench=str(dataset), compbench_detector=str(owlv2), depth=str(dpt), compbench_threshold=0.0, spacy=english()
    )
    score(samples, "3d_spatial", out=tmp_path / "out", official=official, images_per_prompt=1)
    printed = capsys.readouterr().out
    assert "3d_spatial" in printed
    assert "owlv2 in place of UniDet" in printed
    first = read_answers(tmp_path / "out/3d_spatial/labels/annotation_obj_detection_3d/vqa_result.json")
    assert len(first) == 2
    assert max(first) > 0
    stored = tmp_path / "out" / "3d_spatial" / "stored.jsonl"
    judge(stored, out=tmp_path / "again", dataset=dataset, images_per_prompt=1)
    again = read_answers(tmp_path / "again/3d_spatial/labels/annotation_obj_detection_3d/vqa_result.json")
    assert again == pytest.approx(first, abs=1e-6)
    with pytest.raises(UserError, match="incomplete set: 18 of 20"):
        judge(stored, dataset=dataset)
    judge(stored, dataset=dataset, allow_partial=True)
    assert "partial set: 18 of 20" in capsys.readouterr().err


def english():
    """A spaCy folder of known words instead of en_core_web_sm, which no package index carries."""
    import tempfile

    import spacy

    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("attribute_ruler")
    ruler.add(patterns=[[{"LOWER": {"IN": ["dog", "cat"]}}]], attrs={"POS": "NOUN"})
    folder = tempfile.mkdtemp()
    nlp.to_disk(folder)
    return folder


def test_the_metric_has_3d_spatial_where_there_is_a_depth_network(tmp_path, dpt):
    from eval.metrics.compbench.metric import CompBench

    (tmp_path / "3d_spatial_val.txt").write_text("a dog behind a cat\n")
    (tmp_path / "color_val.txt").write_text("a red dog\n")
    without = build_judges("official", OfficialPaths(compbench=str(tmp_path)))
    assert [p.task for p in CompBench(without).prompts(5)] == ["color"]
    having = build_judges("official", OfficialPaths(compbench=str(tmp_path), depth=str(dpt)))
    assert [p.task for p in CompBench(having).prompts(5)] == ["color", "3d_spatial"]


def words():
    return PromptLookup(lambda: pytest.fail("the line states all"), lambda: pytest.fail("the line states all"))


BOXES = [["dog", 0, 40, 20, 60, 0.8], ["cat", 80, 45, 100, 65, 0.6]]
LINES = [
    ({"category": "color", "probabilities": [0.5, 0.25]}, 0.125),
    ({"category": "shape", "probabilities": []}, 1.0),
    ({"category": "non_spatial", "cosine": 0.31}, 0.31),
    ({"category": "spatial", "objects": ["dog", "cat"], "detections": BOXES}, 0.85),
    ({"category": "spatial", "objects": ["dog", "cat"], "detections": BOXES, "locality": "next to"}, 0.85),
    ({"category": "numeracy", "counted": [["dog", "cat"], [1, 2]], "detections": BOXES}, 0.75),
    ({"category": "complex", "kind": "spatial", "probabilities": [0.5], "objects": ["dog", "cat"],
      "detections": BOXES}, (0.85 + 0.5) / 2),
    ({"category": "complex", "kind": "action", "probabilities": [0.5], "cosine": 0.3}, 0.4),
    ({"category": "complex", "kind": "both", "probabilities": [0.5], "cosine": 0.3, "objects": [None, None],
      "detections": []}, 0.8 / 3),
]  # fmt: skip


def lines(path, *records):
    path.write_text(
        "".join(json.dumps({"filename": "a dog on the left of a cat_000003.png"} | r) + "\n" for r in records)
    )
    return path


@pytest.mark.parametrize(("record", "value"), LINES)
def test_stored_evidence_scores_by_itself(tmp_path, record, value):
    [stored] = read_stored(lines(tmp_path / "s.jsonl", record), words())
    assert (stored.prompt, stored.number) == ("a dog on the left of a cat", 3)
    assert answer(stored.evidence) == pytest.approx(value, abs=1e-6)
    again = tmp_path / "again.jsonl"
    again.write_text(format_stored("x.png", stored.prompt, number=stored.number, evidence=stored.evidence) + "\n")
    assert [item.evidence for item in read_stored(again, words())] == [stored.evidence]


def test_one_prompt_tells_no_interval(tmp_path, capsys):
    judge(lines(tmp_path / "s.jsonl", LINES[0][0]))
    assert capsys.readouterr().out == "color        0.1250  [interval unknown]  1 images\n"


def test_boxes_in_pixels_are_brought_to_unidets_frame(tmp_path):
    record = {"category": "spatial", "objects": ["dog", "cat"], "detections": BOXES, "size": [958, 958]}
    [stored] = read_stored(lines(tmp_path / "s.jsonl", record), words())
    assert stored.evidence.seen[1] == LabelledBox("cat", [40, 22.5, 50, 32.5], 0.6)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"category": "colour", "probabilities": []}, "did you mean 'color'"),
        ({"category": "color"}, "not stored evidence .it lacks 'probabilities'"),
        ({"category": "color", "probabilities": [1.5]}, "a probability of 1.5"),
        ({"category": "color", "probabilities": ["nan"]}, "not a finite number"),
        ({"category": "spatial", "detections": [["dog", 0, 0, 1, 0.5]], "objects": ["a", "b"]}, "not stored evidence"),
        ({"category": "spatial", "detections": [["dog", 0, 0, "inf", 1, 0.5]], "objects": ["a", "b"]}, "not a finite"),
        ({"category": "complex", "probabilities": []}, "needs its kind"),
        ({"category": "3d_spatial", "detections": [], "objects": ["a", "b"], "depth": "no.png"}, "cannot read depth"),
        ({"category": "spatial", "detections": [], "objects": ["a", "b"], "locality": "left of"}, "unknown locality"),
        (
            {"category": "spatial", "detections": [["a", 5, 0, 4, 1, 1]], "objects": ["a", "b"]},
            "is turned around",
        ),
        ({"category": "spatial", "detections": [], "objects": ["a", "b"], "size": [0, 9]}, r"a size of \[0, 9\]"),
        ({"category": "color", "probabilities": [], "filename": "a_b.png"}, "expected prompt and question_id"),
    ],
)
def test_a_bad_line_is_named(tmp_path, record, told):
    with pytest.raises(UserError, match=rf"s\.jsonl:1: .*{told}"):
        list(read_stored(lines(tmp_path / "s.jsonl", record), words()))
    with pytest.raises(UserError, match="cannot read stored evidence"):
        list(read_stored(tmp_path / "missing.jsonl", words()))


def test_rules_can_be_mended():
    high, low, depth = [40, 0, 60, 20], [45, 80, 65, 100], np.tile(np.linspace(0, 1, 200)[None, :], (100, 1))
    assert position_2d("on top of", high, low) == 0
    assert position_2d("on top of", high, low, "repaired") == 1
    near, far = [20, 0, 60, 40], [0, 0, 40, 40]  # depth grows along the columns: [x, y] slices see no difference
    assert position_3d("in front of", near, far, depth) == 0
    assert position_3d("in front of", near, far, depth, "repaired") == pytest.approx(2 / 3)
    half = [0, 0, 20, 40]
    assert position_3d("behind", half, far, depth, "repaired") == 1
    with pytest.raises(UserError, match="needs a depth map"):
        answer(Evidence("3d_spatial", objects=("a", "b")))


def test_merging_official_answer_files(tmp_path, capsys):
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    (dataset / "complex_val.txt").write_text("The dog is left of the cat.\r\nThe dog runs.\r\nBoth of it.\r\n")
    (dataset / "complex_val_spatial.txt").write_text("The dog is left of the cat.\n")
    (dataset / "complex_val_action.txt").write_text("the dog runs.\n")
    for name, value in (
        ("annotation_blip", "0.9000"),
        ("labels/annotation_obj_detection_2d", 0.6),
        ("annotation_clip", 0.3),
    ):
        file = tmp_path / "out" / name / "vqa_result.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps([{"question_id": i, "answer": value} for i in range(6)]))
    merge(tmp_path / "out", dataset, images_per_prompt=2)
    merged = read_answers(tmp_path / "out" / "annotation_3_in_1" / "vqa_result.json")
    assert merged == pytest.approx([0.75, 0.75, 0.6, 0.6, 0.6, 0.6], abs=1e-6)
    assert capsys.readouterr().out.startswith("complex      0.6500  [")
    with pytest.raises(UserError, match=r"6, 6, 6 answers .*expected 30 each"):
        merge(tmp_path / "out", dataset)


def test_samples_that_are_broken_missing_or_repeated(tmp_path, capsys):
    samples = tmp_path / "samples"
    for index in range(3):
        write_picture(samples / name_sample("a photo of a red apple", index), picture(index, 64, 64))
    (samples / name_sample("a photo of a red apple", 3)).write_bytes(b"torn")
    (samples / "notes.txt").write_text("a stranger")
    with pytest.raises(UserError, match="1 of 4 images unreadable"):
        score(samples, "color", out=tmp_path / "out", judges="world")
    assert not (tmp_path / "out").exists()
    score(samples, "color", out=tmp_path / "out", judges="world", allow_partial=True)
    printed = capsys.readouterr()
    assert "1 of 4 images could not be read" in printed.err
    assert printed.out.startswith("world_color")
    assert len(read_answers(tmp_path / "out/color/annotation_blip/vqa_result.json")) == 3
    record = {"category": "color", "probabilities": [1.0], "filename": "a cat_000000.png"}
    (tmp_path / "color_val.txt").write_text("a cat\n")
    for dataset in (None, tmp_path):
        with pytest.raises(UserError, match=r"two images carry one number, e\.g\. 000000"):
            judge(lines(tmp_path / "twice.jsonl", record, record), dataset=dataset)
    with pytest.raises(UserError, match="--images-per-prompt must be 1 or more"):
        judge(lines(tmp_path / "s.jsonl", record), dataset=tmp_path, images_per_prompt=0)
    with pytest.raises(UserError, match=r"1 prompts are not of its file, e\.g\. 'a dog'"):
        judge(lines(tmp_path / "s.jsonl", record | {"filename": "a dog_000000.png"}), dataset=tmp_path)
    capsys.readouterr()
    judge(lines(tmp_path / "s.jsonl", record | {"filename": "a dog_000000.png"}), dataset=tmp_path, allow_partial=True)
    assert "outside the set: 1 prompts are not of its file, e.g. 'a dog'" in capsys.readouterr().err
    judge(lines(tmp_path / "s.jsonl", record))
    assert "completeness is not checked, which takes the prompts: --dataset DIR" in capsys.readouterr().err
    write_picture(samples / "snake_case_prompt_000009.png", picture(0, 8, 8))
    assert len(read_samples(samples)) == 4
    assert "1 pictures are no samples by their names, e.g. 'snake_case_prompt_000009.png'" in capsys.readouterr().err
