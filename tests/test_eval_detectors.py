"""Detectors by path: Mask2Former's real class with random weights, and GenEval over folders of the world's scenes."""

import json

import numpy as np
import pytest
from geneval_folders import write_folder

from eval.calibrate import make_control
from eval.judging.geneval_prompts import draw_official_metadata
from eval.judging.judges import build_judges
from eval.judging.prompts import list_world_geneval_prompts
from eval.metrics.geneval.tool import judge, score
from eval.networks.detectors import TransformersDetector, find_mask_box
from infra.errors import UserError


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    """A folder as `facebook/mask2former-swin-small-coco-instance` has it, tiny and untrained."""
    import torch
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    folder = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=6,
        id2label={0: "person", 1: "mouse", 2: "dog"}, label2id={"person": 0, "mouse": 1, "dog": 2},
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}, size_divisor=32).save_pretrained(folder)
    return folder


def test_mask2former_gives_boxes_masks_and_scores_in_the_pixels_of_the_image(mask2former):
    detector = TransformersDetector(mask2former, keep_above=0.0)
    assert detector.classes == ("person", "computer mouse", "dog"), "GenEval's spellings"
    images = [np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((50, 70), (64, 64))]
    for image, found in zip(images, detector.detect(images)):
        assert len(found.labels) > 0
        assert found.masks_NHW.shape == (len(found.labels), *image.shape[:2])
        assert ((found.scores_N > 0) & (found.scores_N <= 1)).all()
        for box, mask in zip(found.boxes_N4, found.masks_NHW):
            assert (box == find_mask_box(mask)).all()
    assert [len(d.labels) for d in TransformersDetector(mask2former, keep_above=1.0).detect(images)] == [0, 0]


def test_mask_boxes_end_past_the_last_pixel():
    mask = np.zeros((8, 9), dtype=bool)
    mask[2:5, 3] = True
    assert find_mask_box(mask).tolist() == [3, 2, 4, 5]


def test_folders_of_scenes_are_scored_and_their_results_judged_again(tmp_path, capsys):
    prompts = [p for p in list_world_geneval_prompts(1) if p.seen and p.task != "counting"]
    judges = build_judges("world")
    for index, prompt in enumerate(prompts):
        write_folder(
            tmp_path / "set",
            index,
            dict(prompt.metadata),
            [make_control("ground_truth", prompts, index=index, judges=judges)],
        )
    metadata, out, stored = tmp_path / "m.jsonl", tmp_path / "results.jsonl", tmp_path / "stored.jsonl"
    metadata.write_text("".join(json.dumps(dict(p.metadata)) + "\n" for p in prompts))
    score(tmp_path / "set", judges="world", metadata=metadata, images_per_prompt=1, out=str(out), stored=str(stored))
    printed = capsys.readouterr().out
    assert "Overall score (avg. over tasks): 1.00000\n" in printed
    assert printed.startswith("world_geneval, judged by world_detector ")
    assert printed.rstrip().splitlines()[-1].startswith("95 % intervals over prompts: overall ")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["tag"] for row in rows} == {p.task for p in prompts}
    with pytest.raises(UserError, match="prompts are not of this set"):
        score(tmp_path / "set", judges="world", images_per_prompt=1)

    again = tmp_path / "again.jsonl"  # colors and all
    judge(stored, metadata=metadata, images_per_prompt=1, out=str(again))
    assert again.read_text() == out.read_text()
    capsys.readouterr()
    with pytest.raises(UserError, match=r"stores no colors for it; official .* score --stored FILE"):
        judge(out, metadata=metadata, images_per_prompt=1)

    plain = tmp_path / "plain.jsonl"  # no colors stored, so only the prompts that ask for none
    plain.write_text("".join(json.dumps(r) + "\n" for r in rows if r["tag"] in ("single_object", "position")))
    with pytest.raises(UserError, match="images are missing"):
        judge(plain, metadata=metadata, images_per_prompt=1)
    judge(plain, metadata=metadata, images_per_prompt=1, allow_partial=True)
    printed = capsys.readouterr()
    assert "partial set: 3 of 5 images are missing" in printed.err
    assert "position         = 100.00% (1 / 1)" in printed.out


def test_broken_images_and_unknown_classes_are_told(tmp_path, capsys):
    prompts = [p for p in list_world_geneval_prompts(1) if p.seen and p.task == "single_object"]
    image = make_control("ground_truth", prompts, index=0, judges=build_judges("world"))
    folder = write_folder(tmp_path / "set", 0, dict(prompts[0].metadata), [image, image])
    (folder / "samples" / "0001.png").write_bytes(b"torn")
    metadata = tmp_path / "m.jsonl"
    metadata.write_text(json.dumps(dict(prompts[0].metadata)) + "\n")
    given = {"judges": "world", "metadata": metadata, "images_per_prompt": 2}
    with pytest.raises(UserError, match=r"1 of 2 images unreadable, e\.g\. .*0001\.png"):
        score(tmp_path / "set", **given)
    score(tmp_path / "set", **given, allow_partial=True)
    printed = capsys.readouterr()
    assert "1 of 2 images could not be read" in printed.err
    assert "Total images: 1" in printed.out
    (folder / "samples" / "0000.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of 2 images can be read"):
        score(tmp_path / "set", **given, allow_partial=True)
    stranger = {"tag": "single_object", "include": [{"class": "unicorn", "count": 1}], "prompt": "a unicorn"}
    write_folder(tmp_path / "other", 0, stranger, [image])
    with pytest.raises(UserError, match=r"00000/metadata\.jsonl asks for 'unicorn'"):
        score(tmp_path / "other", judges="world", allow_partial=True)
    pale = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "bleu"}], "prompt": "a bleu dog"}
    write_folder(tmp_path / "pale", 0, pale, [image])
    with pytest.raises(UserError, match=r"asks for the color 'bleu' \(did you mean 'blue'\?\)"):
        score(tmp_path / "pale", judges="world", allow_partial=True)


def test_a_scorer_without_weights_is_one_line(tmp_path):
    from eval.networks.clip_model import ClipModel
    from eval.networks.vqa import BlipVQA

    for build in (TransformersDetector, ClipModel, BlipVQA):
        with pytest.raises(UserError, match=r"no .* at"):
            build(tmp_path / "missing")


def test_a_scorer_that_is_torn_or_another_network_is_one_line(mask2former, tmp_path):
    """Above all no network whose weights the folder lacks: transformers would fill in random ones."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    from data_pipeline.checkpoints import resolve
    from eval.networks.clip_model import ClipModel
    from eval.networks.depth import DptDepth
    from eval.networks.vqa import BlipVQA

    captioner, torn, bare = tmp_path / "captioner", tmp_path / "torn", tmp_path / "bare.bin"
    BlipForConditionalGeneration(BlipConfig.from_pretrained(resolve("world:vqa"))).save_pretrained(captioner)
    torn.mkdir()
    for name in ("config.json", "open_clip_config.json", "model.safetensors"):
        (torn / name).write_text("{}")
    bare.write_text("no weights")
    for build, where, told in [
        (BlipVQA, captioner, r"holds no BLIP-VQA: it lacks text_encoder"),
        (TransformersDetector, captioner, "holds a blip model; expected mask2former"),
        (DptDepth, mask2former, "cannot load DPT|holds no DPT"),
        (BlipVQA, torn, "cannot load BLIP-VQA|holds no BLIP-VQA"),
        (TransformersDetector, torn, "cannot load Mask2Former"),
        (ClipModel, torn, "cannot load CLIP"),
        (ClipModel, mask2former, r"no open_clip_config\.json"),
        (ClipModel, f"ViT-B-32={bare}", "cannot load CLIP"),
        (ClipModel, f"ViT-B-23={bare}", r"open_clip knows no 'ViT-B-23' \(did you mean 'ViT-B-32'\?\)"),
    ]:
        with pytest.raises(UserError, match=told) as caught:
            build(where)
        assert len(str(caught.value)) < 600
    with pytest.raises(UserError, match=r"cannot load CLIP .*cudaa"):
        ClipModel(resolve("world:judge_clip"), device="cudaa")


def test_official_judges_score_a_folder_with_mask2former_by_path(mask2former, tmp_path, capsys):
    """The whole official path on a checkpoint in the hub's layout: detector, CLIP colors, verdicts, summary."""
    from data_pipeline.checkpoints import resolve
    from eval.judging.official import OfficialPaths

    record = {
        "tag": "colors",
        "include": [{"class": "dog", "count": 1, "color": "red"}],
        "prompt": "a photo of a red dog",
    }
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    write_folder(tmp_path / "set", 0, record, [image] * 4)
    (tmp_path / "m.jsonl").write_text(json.dumps(record) + "\n")
    official = OfficialPaths(detector=str(mask2former), clip=str(resolve("world:judge_clip")))
    score(tmp_path / "set", official=official, metadata=tmp_path / "m.jsonl", out=str(tmp_path / "r.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert set(rows[0]) == {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"}
    printed = capsys.readouterr().out
    assert "Overall score" in printed
    assert printed.startswith(f"geneval, judged by mask2former {TransformersDetector(mask2former).version} and CLIP ")


def test_an_incomplete_set_is_refused_before_any_network_is_loaded(tmp_path):
    write_folder(tmp_path / "set", 0, draw_official_metadata()[0], [np.zeros((8, 8, 3), dtype=np.uint8)])
    with pytest.raises(UserError, match="2211 of 2212 images are missing"):
        score(tmp_path / "set")
