"""Inception FID: the conventions' resizing, the network's odd pooling, weights by path; COCO and PartiPrompts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from eval.drawing.pictures import write_picture
from eval.judging.judges import build_judges
from eval.judging.metric import JudgedImage, Prompt
from eval.judging.official import OfficialPaths
from eval.judging.prompt_files import find_reference_files, read_coco, read_prompts
from eval.metrics.fid import FeatureDistance, build_inception_fid
from eval.networks.inception import InceptionFeatures, build_inception, resize_clean, resize_tensorflow
from infra.errors import UserError


def picture(seed, height=64, width=80):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A random network in the file's layout: 1,008 classes, a classifier that features do not need."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state = {k: v.clone() for k, v in build_inception().state_dict().items() if not k.endswith("num_batches_tracked")}
    state |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(state, path)
    torch.save(state, path.with_suffix(".pth"))
    return path


def test_clean_resizing_is_pils_bicubic_without_rounding():
    image = 100 + picture(0, 600, 450) // 5  # nothing for PIL's own path to clip between its passes
    sized = resize_clean(image)
    assert sized.shape == (3, 299, 299)
    by_pil = np.asarray(Image.fromarray(image).resize((299, 299), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(sized.numpy() - by_pil).max() <= 1.01, "which also rounds there"
    assert (sized.numpy() % 1 > 0).any()


def test_tensorflow_resizing_has_no_half_pixel():
    ramp = np.repeat(np.arange(4, dtype=np.uint8)[None, :, None] * 10, 4, axis=0).repeat(3, axis=2)
    sized = resize_tensorflow(ramp, side=8)
    assert sized[0, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]
    assert torch.equal(resize_tensorflow(picture(1, 299, 299)), torch.from_numpy(picture(1, 299, 299)).permute(2, 0, 1))


def test_pooling_differs_from_torchvisions_only_where_the_graph_of_2015_does():
    from torchvision.models.inception import Inception3, InceptionA, InceptionE

    plain = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    ours = build_inception()
    assert {k for k in plain.state_dict() if not k.startswith("fc.")} == set(ours.state_dict())
    x = torch.rand(1, 192, 7, 7)
    block: InceptionA = ours.Mixed_5b.eval()
    pooled = torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    assert torch.equal(block._forward(x)[-1], block.branch_pool(pooled))
    assert torch.equal(block._forward(x)[1], InceptionA._forward(block, x)[1])
    last: InceptionE = ours.Mixed_7c.eval()
    x = torch.rand(1, 2048, 4, 4)
    assert torch.equal(last._forward(x)[-1], last.branch_pool(torch.nn.functional.max_pool2d(x, 3, 1, 1)))
    for own, theirs in zip(last._forward(x)[:3], InceptionE._forward(last, x)[:3]):
        assert torch.equal(own, theirs)


def test_features_by_path_and_by_convention(weights):
    clean = InceptionFeatures(weights)
    found = clean.images([picture(0)])
    assert found.shape == (1, 2048)
    assert torch.isfinite(found).all()
    other = InceptionFeatures(weights.with_suffix(".pth"), convention="torch-fidelity")
    assert (other.name, clean.name) == ("inception/torch-fidelity", "inception/clean-fid")
    assert not torch.allclose(other.images([picture(0)]), found)


def test_weights_that_are_none_are_refused(weights, tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="no weights there"):
        InceptionFeatures(tmp_path / "missing.pth")
    (tmp_path / "torn.pth").write_bytes(b"torn")
    with pytest.raises(UserError, match="not Inception weights"):
        InceptionFeatures(tmp_path / "torn.pth")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"lacks \d+ tensors of Inception-v3"):
        InceptionFeatures(tmp_path / "other.safetensors")
    for judges in (build_judges("world"), build_judges("official")):
        with pytest.raises(UserError, match=r"needs --official\.inception FILE"):
            build_inception_fid(judges).describe()
    world = build_judges("world", OfficialPaths(inception=str(weights)))
    assert build_inception_fid(world).describe()["features"][0] == "inception/clean-fid"


class Pixels:
    """A feature space of three numbers: mean colors."""

    name, version = "pixels", "1"

    def images(self, images):
        return np.stack([image.mean((0, 1)) for image in images])


def test_fid_carries_an_interval_its_origin_and_a_rank_warning(tmp_path, capsys):
    for index in range(40):
        write_picture(tmp_path / "real" / f"{index}.png", picture(index, 8, 8))
    judges = build_judges("official", OfficialPaths(references=str(tmp_path / "real")))
    network = Pixels()
    metric = FeatureDistance("fid", judges, lambda: network)
    prompts = [Prompt(f"p{i}", "captions") for i in range(20)]
    metric.update([JudgedImage(p, i, picture(100 + i, 8, 8) // 2) for i, p in enumerate(prompts)])
    [score] = metric.compute()
    assert score.low < score.value < score.high
    assert score.details == {"features": "pixels", "references": 40, "width": 3, "rank_deficient": False}
    assert score.sample_count == 20
    assert set(metric.values_per_prompt()) == {"features", "cluster", "reference_mean", "reference_covariance"}
    few = FeatureDistance("fid", judges, metric._network)
    few.update([JudgedImage(prompts[i], i, picture(100 + i, 8, 8)) for i in range(2)])
    assert few.compute()[0].details["rank_deficient"] is True
    assert "fid: 2 images for features of width 3: rank-deficient covariance" in capsys.readouterr().err


def test_other_real_pictures_are_another_protocol(tmp_path):
    """A folder under another name is the same; one more picture, or another one, is not."""

    def described(folder):
        judges = build_judges("official", OfficialPaths(references=str(tmp_path / folder)))
        return FeatureDistance("fid", judges, Pixels).describe()

    for folder, seeds in (("a", (0, 1)), ("same", (0, 1)), ("more", (0, 1, 2)), ("other", (0, 3))):
        for index, seed in enumerate(seeds):
            write_picture(tmp_path / folder / f"{folder}{index}.png", picture(seed, 8, 8))
    assert described("a") == described("same")
    assert described("a")["reference_pictures"].startswith("2 pictures ")
    assert len({described(folder)["reference_pictures"] for folder in ("a", "more", "other")}) == 3
    assert "reference_pictures" not in FeatureDistance("fid", build_judges("world"), Pixels).describe()


COCO = {
    "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 9, "file_name": "a.jpg"}],
    "annotations": [
        {"image_id": 7, "id": 31, "caption": "A dog\nruns. "},
        {"image_id": 7, "id": 30, "caption": " Two dogs run. "},
        {"image_id": 9, "id": 40, "caption": "A cat."},
    ],
}


def test_coco_gives_one_caption_per_image_and_its_pictures(tmp_path):
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps(COCO))
    prompts = read_coco(path)
    assert {(p.text, p.source) for p in prompts} == {("Two dogs run.", "7"), ("A cat.", "9")}
    assert read_prompts(path, 1) == prompts[:1]
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).touch()
    assert [f.name for f in find_reference_files(tmp_path, prompts)] == [p.metadata["file_name"] for p in prompts]
    assert [f.name for f in find_reference_files(tmp_path)] == ["a.jpg", "b.jpg", "c.jpg"]
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    (elsewhere / "z.jpg").touch()
    with pytest.raises(UserError, match=r"other holds none of the 2 pictures that the captions name"):
        find_reference_files(elsewhere, prompts)
    for bad, told in (
        ("{}", "not COCO caption annotations"),
        ('{"annotations": []}', "holds no captions"),
        ("[", "not COCO"),
    ):
        path.write_text(bad)
        with pytest.raises(UserError, match=told):
            read_coco(path)


def test_parti_prompts_carry_category_and_challenge(tmp_path):
    path = tmp_path / "PartiPrompts.tsv"
    head = "Prompt\tCategory\tChallenge\tNote\n"
    path.write_text(f'{head}a "red" dog\tAnimals\tBasic\t\nbond\tAbstract\tBasic\tx\n')
    prompts = read_prompts(path)
    assert [(p.text, p.task, p.metadata["challenge"]) for p in prompts] == [
        ('a "red" dog', "Animals", "Basic"),
        ("bond", "Abstract", "Basic"),
    ]
    path.write_text("Prompt\tKind\nx\ty\n")
    with pytest.raises(UserError, match="expected PartiPrompts' columns"):
        read_prompts(path)
    path.write_text(f"{head}\tAnimals\tBasic\t\n")
    with pytest.raises(UserError, match=r"PartiPrompts\.tsv:2: a line without prompt"):
        read_prompts(path)


def test_clip_score_of_categories():
    from eval.metrics.clip_score import ClipScore

    judges = build_judges("world")
    metric = ClipScore(judges)
    prompts = [Prompt("a dog", "Animals"), Prompt("a kite", "Outdoor"), Prompt("a cat", "Animals")]
    metric.update([JudgedImage(p, i, picture(i, 64, 64)) for i, p in enumerate(prompts)])
    scores = {s.path: s for s in metric.compute()}
    assert list(scores) == ["", "Animals", "Outdoor"]
    assert scores[""].value == pytest.approx((2 * scores["Animals"].value + scores["Outdoor"].value) / 3)
