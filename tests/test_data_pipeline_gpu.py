"""The pipeline's networks on one real GPU give the CPU's latents, states, captions and scores; so do whole runs, also
with two of Ray's workers on half a GPU each.

Networks run in fp32, but torch gives convolutions TF32 (10 bits): `exact` switches it off, whole runs keep it, as users
will. What is stored in fp16 may also differ by its last bit.
"""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import test_data_pipeline_captioners
import torch
from model_files import write_sd3_encoders
from safetensors.numpy import save_file
from test_data_pipeline_stages import encoded, measured

from data_pipeline.captions.registry import open_captioner
from data_pipeline.captions.stage import CaptionStage
from data_pipeline.curation.embed import EmbedStage
from data_pipeline.curation.scores import ScoreStage
from data_pipeline.flow.pipeline import Pipeline, PipelineResult
from data_pipeline.formats.schema import name_rejected_split
from data_pipeline.inspection.verify import verify_dataset
from data_pipeline.loading.loader import open_dataset
from data_pipeline.packing.pairs import PreferencePair, write_pairs
from data_pipeline.plans import WORLD_TEXT, read_vae_meta, world
from data_pipeline.sources.registry import open_source
from data_pipeline.stages.buckets import BucketStage, list_buckets
from data_pipeline.stages.encode import LatentStage, TextStage
from data_pipeline.stages.stage import ShardView, Stage
from data_pipeline.world.write import write_world
from infra.runner import WorkerPool
from model.encoders.networks import load_text_encoders
from model.encoders.text import EncoderSpec, TextSpec

pytestmark = pytest.mark.gpu
DEVICE = "cuda"  # "cpu" tries these tests themselves
GPU = float(DEVICE == "cuda")
HALF = 2**-10  # one fp16 rounding apart
PLAN = replace(world(), ingest_rows=12, pack_rows=16)
SD3 = TextSpec(
    (EncoderSpec("clip_l", "clip_l", "clip_hf", 8, 16, 16), EncoderSpec("clip_g", "clip_g", "clip_hf", 8, 24, 14),
     EncoderSpec("t5", "t5", "t5_hf", 8, 48, 0)), "padded", 48,
)  # fmt: skip
images, cogvlm = test_data_pipeline_captioners.scenes, test_data_pipeline_captioners.cogvlm


@pytest.fixture
def exact(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def shard() -> ShardView:
    found = measured([(encoded(image), f"a photo of {n} red dogs") for n, image in enumerate(images(10))])
    found.tables["bucket"] = BucketStage(list_buckets(64, step=8)).open()(found)
    found.tables["caption"] = pa.table({"row": range(10), "caption": [f"a dog {n % 3}" for n in range(9)] + [""]})
    return found


def both(stage: Stage, shard: ShardView) -> tuple[pa.Table, pa.Table]:
    ours, theirs = (replace(stage, device=device).open()(shard) for device in ("cpu", DEVICE))  # type: ignore[type-var]
    assert ours.select(["row", "status"]).equals(theirs.select(["row", "status"]))
    return ours, theirs


def numbers(column: pa.ChunkedArray, dtype: type) -> np.ndarray:
    return np.frombuffer(b"".join(value or b"" for value in column.to_pylist()), dtype).astype(np.float64)


@pytest.mark.parametrize(("tf32", "rtol", "atol"), [(False, HALF, 1e-4), (True, 1e-2, 1e-2)])
def test_latents(shard, monkeypatch, tf32, rtol, atol):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    moments = [numbers(t["moments"], np.float16) for t in both(LatentStage("world:vae", "w", batch=4), shard)]
    np.testing.assert_allclose(*moments, rtol=rtol, atol=atol)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("seat", ["clip_l", "t5"])
def test_stored_text(shard, seat, int8):
    ours, theirs = both(TextStage(WORLD_TEXT, seat, "w", int8), shard)
    for name in ("original", "synthetic"):
        assert ours[f"{name}_tokens"].equals(theirs[f"{name}_tokens"])
        pooled = [numbers(table[f"{name}_pooled"], np.float32) for table in (ours, theirs)]
        np.testing.assert_allclose(*pooled, rtol=1e-4, atol=1e-4)
        hidden = [numbers(table[f"{name}_hidden"], np.int8 if int8 else np.float16) for table in (ours, theirs)]
        assert len(hidden[0]) > 1000
        np.testing.assert_allclose(*hidden, rtol=0 if int8 else HALF, atol=1 if int8 else 1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_text_encoders_of_sd3s_classes(tmp_path, dtype, tolerance):
    folders = write_sd3_encoders(tmp_path)
    texts = ["a b", "b", "", "a a a b b b a b a"]
    ours = load_text_encoders(SD3, folders.__getitem__).encode(texts)
    theirs = load_text_encoders(SD3, folders.__getitem__, device=DEVICE, dtype=dtype).encode(texts)
    for seat, mine in ours.items():
        assert torch.equal(mine.length_B, theirs[seat].length_B)
        for name in ("hidden_BLW", "pooled_BP"):
            expected, found = getattr(mine, name), getattr(theirs[seat], name)
            assert (found.device.type, found.dtype) == ("cpu", torch.float32)
            if expected.numel():  # T5 has no pooled vector
                assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_captions_of_the_world(shard, exact):
    ours, theirs = both(CaptionStage(PLAN.captioner, "w", batch=4), shard)
    assert ours["caption"].equals(theirs["caption"])


def test_cogvlm_in_bf16_and_the_same_weights_in_fp32(cogvlm, exact):
    """In fp32 word for word. In bf16, as GPUs get it, near ties may fall otherwise: seven of ten first words agree."""
    given, captioner = images(10), open_captioner(cogvlm, DEVICE)
    expected = open_captioner(cogvlm, "cpu").caption(given)
    assert {p.dtype for p in captioner._model.parameters()} == {torch.bfloat16 if DEVICE == "cuda" else torch.float32}
    assert captioner._model.device.type == DEVICE
    assert sum(a.split()[0] == b.split()[0] for a, b in zip(expected, captioner.caption(given))) >= 7
    captioner._model, captioner._dtype = open_captioner(cogvlm, "cpu")._model.to(DEVICE), torch.float32
    assert captioner.caption(given) == expected


def test_embeddings_and_scores(shard, exact, tmp_path):
    sscd = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 9))
    torch.jit.script(sscd).save(str(tmp_path / "sscd.pt"))
    for checkpoint in ("world:clip", str(tmp_path / "sscd.pt")):
        vectors = [numbers(t["embedding"], np.float16) for t in both(EmbedStage(checkpoint, "w", batch=4), shard)]
        np.testing.assert_allclose(*vectors, rtol=HALF, atol=1e-4)
    head = np.random.default_rng(0).normal(size=(1, 128)).astype(np.float32)
    save_file({"weight": head, "bias": np.ones(1, np.float32)}, tmp_path / "head.safetensors")
    ours, theirs = both(ScoreStage("aesthetic", f"{tmp_path}/head.safetensors+world:clip", batch=4), shard)
    np.testing.assert_allclose(theirs["score"].to_numpy(), ours["score"].to_numpy(), atol=5e-3)  # of fp16 vectors


def test_preference_pairs(tmp_path, exact):
    seen = [np.asarray(image) for image in images(7)]
    pairs = [PreferencePair(f"k{n}", f"a dog {n}", seen[n], seen[n + 1]) for n in range(6)]
    given = {"text_spec": WORLD_TEXT, "vae": read_vae_meta("world:vae"), "resolution": 64, "made_by": {}}
    write_pairs(str(tmp_path / "ours"), {"train": pairs}, **given)
    write_pairs(str(tmp_path / "theirs"), {"train": pairs}, device=DEVICE, **given)
    for split in ("train", name_rejected_split("train")):
        compare(tmp_path / "ours", tmp_path / "theirs", split, 6, rtol=2 * HALF, atol=2e-3)


def compare(ours: Path, theirs: Path, split: str, count: int, **tolerance: float) -> None:
    a, b = (open_dataset(str(root), split=split).read(range(count), posterior="mean") for root in (ours, theirs))
    assert (a.keys, a.captions) == (b.keys, b.captions)
    torch.testing.assert_close(b.latent_BCHW, a.latent_BCHW, **tolerance)
    torch.testing.assert_close(b.text.context_BLD, a.text.context_BLD, rtol=HALF, atol=1e-3)
    torch.testing.assert_close(b.text.pooled_BP, a.text.pooled_BP, rtol=1e-3, atol=1e-3)
    assert torch.equal(a.text.mask_BL, b.text.mask_BL)


@pytest.fixture(scope="module")
def by_cpu(tmp_path_factory) -> tuple[Path, Path, PipelineResult]:
    folder = tmp_path_factory.mktemp("runs")
    write_world(str(folder / "raw"), images=30, val_images=6, seed=3, images_per_shard=12)
    return folder / "raw", folder / "cpu", run(folder / "raw", folder / "cpu", gpus=0)


def run(raw: Path, root: Path, *, gpus: float) -> PipelineResult:
    return Pipeline(PLAN, str(root), open_source(f"wds:{raw}"), workers=WorkerPool(0, gpus=gpus)).run()


def check(by_cpu: tuple[Path, Path, PipelineResult], root: Path) -> None:
    """Columns, counts and rows are the CPU's; the dataset's fingerprint is of its bytes, which are other ones."""
    (_, expected, outcome), info = by_cpu, open_dataset(str(root)).info
    assert (info.columns, info.counts, info.encoding) == (outcome.info.columns, {"ok": 36}, outcome.info.encoding)
    assert not verify_dataset(str(root)).problems
    compare(expected, root, "val", 6, rtol=1e-2, atol=2e-2)
    compare(expected, root, "train", 30, rtol=1e-2, atol=2e-2)
    said = [open_dataset(str(r)).read(range(30), caption="synthetic").captions for r in (expected, root)]
    assert sum(a == b for a, b in zip(*said)) >= 27


@pytest.fixture(scope="module")
def by_gpu(by_cpu) -> Path:
    run(by_cpu[0], root := by_cpu[0].with_name("gpu"), gpus=GPU)
    return root


def test_a_whole_run_without_ray_and_its_repetition_bit_by_bit(by_cpu, by_gpu, tmp_path):
    check(by_cpu, by_gpu)
    assert run(by_cpu[0], tmp_path / "again", gpus=GPU).info.fingerprint == open_dataset(str(by_gpu)).fingerprint


@pytest.mark.dist
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
def test_two_of_rays_workers_share_the_gpu(by_cpu, by_gpu, tmp_path, ray_folder):
    given = f"--out {tmp_path}/ray --source wds:{by_cpu[0]} --gpus-per-worker {GPU / 2} --ingest-rows 12".split()
    command = [sys.executable, "-m", "data_pipeline", "run", "world", *given, "--workers", "2", "--pack-rows", "16"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    check(by_cpu, tmp_path / "ray")
    assert open_dataset(str(tmp_path / "ray")).fingerprint == open_dataset(str(by_gpu)).fingerprint, "other bits"
