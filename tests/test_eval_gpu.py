"""`--device cuda` on one real GPU draws the CPU's pictures and gives its losses and scores; every judge sees the same.

fp32 is compared with TF32 off (`exact`), which torch otherwise gives convolutions; bf16 with the CPU's fp32.
"""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_eval_autoencoder
import test_eval_compbench_tool
import test_eval_detectors
import test_eval_inception
import torch
from geneval_folders import write_folder
from test_eval_compbench_tool import picture
from test_eval_precision import distance, inputs, network
from test_eval_run import JOBS, QUICK, export, options

from data_pipeline.checkpoints import resolve
from data_pipeline.packing.synthetic import TINY_TEXT, write_synthetic
from eval.drawing.generate import Painter, Sampling
from eval.judging.judges import build_judges
from eval.judging.official import OfficialPaths
from eval.metrics.geneval.tool import score
from eval.metrics.val_loss import ValLoss
from eval.networks.clip_model import ClipModel
from eval.networks.depth import DptDepth
from eval.networks.detectors import TransformersDetector
from eval.networks.inception import InceptionFeatures
from eval.networks.open_vocabulary import OpenVocabularyDetector
from eval.networks.perceptual import Lpips
from eval.networks.vqa import BlipVQA
from eval.run import run
from eval.studies.autoencoder import AutoencoderOptions, measure
from infra.device import resolve_device, resolve_precision
from infra.errors import UserError
from infra.results import ResultStore
from model.backbone import BACKBONES
from model.backbones.mmdit import MMDiTConfig
from model.bfloat16 import convert_to_bfloat16
from model.files.weights import read_meta, save_weights

pytestmark = pytest.mark.gpu
DEVICE = "cuda"  # "cpu" tries these tests themselves
DEVICES = ("cpu", DEVICE)
dpt, owlv2 = test_eval_compbench_tool.dpt, test_eval_compbench_tool.owlv2
mask2former, weights = test_eval_detectors.mask2former, test_eval_inception.weights
alexnet = test_eval_autoencoder.alexnet
IMAGES = [picture(0), picture(1, 64, 64), picture(2, 50, 70)]


@pytest.fixture
def exact(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def painters(tmp_path_factory) -> list[Painter]:
    path = export(tmp_path_factory.mktemp("weights") / "ema.safetensors")
    return [Painter(path, device=device) for device in DEVICES]


def painted(painter: Painter, **changes) -> np.ndarray:
    sampling = replace(QUICK, precision="fp32", device=painter.device, **changes)
    return np.stack([image for _, image in painter.paint(JOBS, sampling)]).astype(int)


@pytest.mark.parametrize(
    "changes",
    [{}, {"solver": "heun"}, {"solver": "rk"}, {"unconditional": "empty_prompt"}, {"without_t5": True}, {"batch": 1}],
)
def test_pictures_are_the_cpus_to_a_level(painters, exact, changes):
    ours, theirs = (painted(painter, **changes) for painter in painters)
    assert np.abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() < 0.05
    assert next(painters[1].model.parameters()).device.type == DEVICE


def test_pictures_in_bf16_and_with_tf32_are_those_of_fp32_but_for_rounding(painters):
    plain = painted(painters[0])
    assert np.abs(painted(painters[1]) - plain).mean() < 0.5
    rounded = painted(painters[1], precision="bf16") if DEVICE == "cuda" else plain
    assert np.abs(rounded - plain).mean() < 2


@pytest.mark.parametrize("name", BACKBONES)
@torch.inference_mode()
def test_networks_in_both_precisions(name, exact):
    """bf16 on the GPU is no farther from fp32 than plain bf16 on the CPU is."""
    (x, t, text), model = inputs(), network(name)
    expected = model(x, t, text)
    plain = network(name).bfloat16()(x.bfloat16(), t, text.to(dtype=torch.bfloat16))
    x, t, text = x.to(DEVICE), t.to(DEVICE), text.to(DEVICE)
    half = convert_to_bfloat16(model, DEVICE)(x, t, text)
    assert (half.dtype, half.device.type) == (torch.float32, DEVICE)
    assert distance(half.cpu(), expected) < 1.3 * distance(plain, expected)
    torch.testing.assert_close(model.to(DEVICE)(x, t, text).cpu(), expected, rtol=1e-4, atol=1e-4)


def test_devices_are_checked():
    assert resolve_device("auto") == resolve_device(DEVICE) == DEVICE
    able = torch.cuda.get_device_capability() >= (8, 0)
    assert (
        Sampling(device="cuda").resolve().precision
        == resolve_precision("auto", "cuda:0")
        == ("bf16" if able else "fp32")
    )
    with pytest.raises(UserError, match="--device cuda:99 cannot be used here"):
        resolve_device("cuda:99")


def test_validation_loss(tmp_path, exact):
    info = write_synthetic(str(tmp_path / "data"), num_samples=32, val_samples=40)
    config = MMDiTConfig(depth=1, in_channels=8, context_width=48, pooled_width=32, pos_max=16)
    torch.manual_seed(0)
    state = {k: v + 0.05 * torch.randn_like(v) for k, v in config.build().state_dict().items()}
    told = {"config": config.to_json(), "text_spec": TINY_TEXT.to_json(), "data_fingerprint": info.fingerprint}
    path = export(tmp_path / "ema.safetensors")
    save_weights(path, state, read_meta(path) | told)
    metric, data = ValLoss(build_judges("world")), str(tmp_path / "data")
    (ours, *one), (theirs, *other) = (metric.measure(Painter(path, device=d), data) for d in DEVICES)
    assert one[0] == other[0], "another protocol"
    assert {s.path: s.value for s in theirs} == pytest.approx({s.path: s.value for s in ours}, rel=1e-4)


def rows_of(runs: Path) -> dict[tuple, float]:
    found = ResultStore(str(runs / "d1" / "results")).rows()
    return {(row.metric, row.images_seen, row.sample_count, row.protocol_hash): row.value for row in found}


@pytest.mark.dist
def test_a_whole_run_scores_as_on_the_cpu_also_with_half_a_gpu_per_worker(tmp_path, exact, monkeypatch, ray_folder):
    monkeypatch.setattr("eval.metrics.fid.REFERENCES", 100)
    ways = {"cpu": ("cpu", {}), "gpu": (DEVICE, {})}
    if importlib.util.find_spec("ray"):
        ways["ray"] = (DEVICE, {"workers": 2, "gpus_per_worker": 0.5 if DEVICE == "cuda" else 0})
    for name, (device, more) in ways.items():
        for step in (10, 20):
            path = tmp_path / name / "d1" / "weights" / f"step_{step:07d}" / "ema.safetensors"
            export(path, images_seen=4 * step, seed=step)
        sampling = replace(QUICK, precision="fp32", device=device)
        metrics = ("clip_score", *(["fid"] if name != "ray" else []), "geneval", "compbench")
        run(options(tmp_path / name, metrics=metrics, calibration=False, captions=8, sampling=sampling, **more))
    expected = rows_of(tmp_path / "cpu")
    assert rows_of(tmp_path / "gpu") == pytest.approx(expected, rel=5e-3, abs=5e-3)
    if "ray" in ways:
        importlib.import_module("ray").shutdown()
        fewer = {key: value for key, value in expected.items() if key[0] != "world_fid"}
        assert rows_of(tmp_path / "ray") == pytest.approx(fewer, rel=5e-3, abs=5e-3)


def test_detectors(mask2former, owlv2, exact):
    def build(device):
        yield TransformersDetector(mask2former, device=device, keep_above=0.0)
        yield OpenVocabularyDetector(owlv2, ["dog", "hot dog"], device=device, keep_above=0.0)

    for ours, theirs in zip(*map(build, DEVICES)):
        for a, b in zip(ours.detect(IMAGES), theirs.detect(IMAGES)):
            assert len(a.labels) > 0
            np.testing.assert_allclose(b.scores_N, a.scores_N, atol=1e-4)
            if a.masks_NHW is None:
                np.testing.assert_allclose(b.boxes_N4, a.boxes_N4, atol=1e-2)
            else:
                assert (a.masks_NHW == b.masks_NHW).mean() > 0.999
                assert a.labels == b.labels


def test_what_else_judges(dpt, weights, alexnet, exact):
    questions = ["a red dog?", "Is there a cat (and a kite)?", "a dog?"]
    for convention in ("clean-fid", "torch-fidelity"):
        ours, theirs = (InceptionFeatures(weights, convention=convention, device=d).images(IMAGES) for d in DEVICES)
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4 * float(ours.abs().max()))
    for ours, theirs in zip(*(DptDepth(dpt, side=64, device=d).of(IMAGES) for d in DEVICES)):
        assert np.abs(ours - theirs).max() <= 1.01 / 255, "one level of the 8-bit picture"
    ours, theirs = (BlipVQA(resolve("world:vqa"), device=d).yes(IMAGES, questions) for d in DEVICES)
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    ours, theirs = (ClipModel(resolve("world:judge_clip"), device=d).cosines(IMAGES, questions) for d in DEVICES)
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    a, b = IMAGES[1:2], [IMAGES[1] // 2]
    ours, theirs = (Lpips(alexnet, device=d).distances(a, b) for d in DEVICES)
    np.testing.assert_allclose(theirs, ours, rtol=1e-3)


def test_the_report_of_an_autoencoder(alexnet, exact):
    ours, theirs = (
        measure("world:vae", given, network=ClipModel(resolve("world:judge_clip"), device=given.device),
                perceptual=Lpips(alexnet, device=given.device)).values
        for given in (AutoencoderOptions(count=12, batch=4, device=device) for device in DEVICES)
    )  # fmt: skip
    assert {k: v[0] for k, v in theirs.items()} == pytest.approx({k: v[0] for k, v in ours.items()}, rel=2e-3)


def test_geneval_of_a_folder_by_official_judges(tmp_path, mask2former, exact, capsys):
    record = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a red dog"}
    found, out = [], tmp_path / "out.jsonl"
    write_folder(tmp_path / "set", 0, record, IMAGES)
    (tmp_path / "m.jsonl").write_text(json.dumps(record) + "\n")
    for device in DEVICES:
        given = OfficialPaths(detector=str(mask2former), clip=str(resolve("world:judge_clip")), device=device)
        score(tmp_path / "set", official=given, metadata=tmp_path / "m.jsonl", out=str(out), images_per_prompt=3)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        found.append(([(row["correct"], row["reason"]) for row in rows], capsys.readouterr().out))
    assert found[0] == found[1]
