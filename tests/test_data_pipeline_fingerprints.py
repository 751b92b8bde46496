"""Other encoders, dtypes, layouts, limits, prompts and crops are refused at pack and at train time, by column."""

import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from trainer_launch import halted

from data_pipeline.checkpoints import resolve
from data_pipeline.flow.pipeline import Pipeline, PipelineResult
from data_pipeline.flow.plan_mismatch import find_mismatches
from data_pipeline.formats.schema import Manifest
from data_pipeline.inspection.verify import verify_dataset
from data_pipeline.loading.loader import open_dataset
from data_pipeline.plans import DatasetPlan, world
from data_pipeline.sources.registry import open_source
from data_pipeline.world.write import write_world
from infra.errors import UserError, UserErrors
from infra.runner import WorkerPool
from trainer.__main__ import main
from trainer.recipes import get_recipe

PLAN = replace(world(), ingest_rows=16, pack_rows=8)
IMAGES, VAL = 12, 4
TRAIN = ["--images", "64", "--global-batch", "8", "--validation.samples", "4", "--logging.samples", "0", "--dry-run"]


@dataclass(frozen=True)
class Change:
    """One changed setting: the column that is named, how it is told, and which columns are computed again."""

    column: str
    told: str
    plan: dict[str, object] = field(default_factory=dict)
    computed: tuple[str, ...] = ()


CHANGES = {
    "encoder": Change("text_clip_l", "weights: "),
    "dtype": Change("text_t5", "dtype: float16 -> int8 per token", {"text_storage": "t5-int8"}),
    "layout": Change("text_clip_l text_t5", "layout: trimmed -> padded", {"text_layout": "padded"}),
    "token limit": Change("text_t5", "encoder.tokens: 16 -> 8", {"text_tokens": 8}),
    "template": Change("caption", "prompt:  -> a photo of", computed=("caption", "text_clip_l", "text_t5")),
    "crop rule": Change("latents", "crop: cover-center/1 -> cover-center/2"),
}


def run(root: Path, raw: Path, plan: DatasetPlan, *rebuild: str) -> PipelineResult:
    return Pipeline(
        plan.settle(), str(root), open_source(f"wds:{raw}"), workers=WorkerPool(0), rebuild=rebuild
    ).run()  # fmt: skip


def rows_proven(root: Path) -> dict[str, int]:
    """Rows of each column, under all fingerprints."""
    found: dict[str, int] = {}
    for path in sorted((root / "columns").glob("*/*/*.json")):
        manifest = Manifest.from_bytes(path.read_bytes(), str(path))
        found[manifest.stage] = found.get(manifest.stage, 0) + sum(part.num_rows for part in manifest.parts)
    return found


def other_clip(folder: Path) -> str:
    """The world's CLIP with one weight moved."""
    shutil.copytree(resolve("world:clip"), folder)
    (weights,) = folder.glob("*.safetensors")
    state = load_file(weights)
    state["positional_embedding"] = state["positional_embedding"] + 0.1
    save_file(state, weights)
    return str(folder)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_world(str(folder), images=IMAGES, val_images=VAL, seed=3)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, raw) -> tuple[Path, PipelineResult]:
    root = tmp_path_factory.mktemp("made") / "data"
    return root, run(root, raw, PLAN)


def train(monkeypatch, data: Path, out: Path) -> list[str]:
    """What the trainer refuses before its first step."""
    words = ["train", "world-d2", "--data", str(data), "--out", str(out), *TRAIN]
    monkeypatch.setattr(sys, "argv", ["trainer", *words])
    try:
        main()
    except UserErrors as error:
        return list(error.lines)
    except UserError as error:
        return [str(error)]
    return []


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_refused_until_its_column_is_made_anew(made, raw, tmp_path, monkeypatch, name):
    change, root = CHANGES[name], Path(shutil.copytree(made[0], tmp_path / "data"))
    given = dict(change.plan)
    if name == "encoder":
        given["clip_l"] = other_clip(tmp_path / "clip")
    if name == "template":
        given["captioner"] = replace(PLAN.captioner, prompt="a photo of")
    first = made[1].info.fingerprint
    recipe = get_recipe("world-d2")
    halted(recipe, str(root), tmp_path / "run")
    before, stood = rows_proven(root), (root / "dataset.json").read_bytes()
    with monkeypatch.context() as changed:
        if name == "crop rule":
            changed.setattr("data_pipeline.stages.encode.CROP_RULE", "cover-center/2")
        plan = replace(PLAN, **given)
        with pytest.raises(UserError) as caught:
            run(root, raw, plan)
        said, columns = str(caught.value), change.column.split()
        assert "\n" not in said
        assert change.told in said
        assert all(f"column {column} (" in said for column in columns)
        assert f"--rebuild {change.column}, which" in said
        assert said.count("column ") == len(columns)
        assert (rows_proven(root), (root / "dataset.json").read_bytes()) == (before, stood)  # nothing was paid for

        again = run(root, raw, plan, *columns)
        recomputed = {stage: count - before[stage] for stage, count in rows_proven(root).items()}
        expected = change.computed or tuple(columns)
        assert recomputed == {stage: IMAGES + VAL if stage in expected else 0 for stage in before}
        assert again.info.encoding != made[1].info.encoding
        assert verify_dataset(str(root)).problems == []
        assert len(open_dataset(str(root)).read(range(IMAGES)).keys) == IMAGES
        assert run(root, raw, plan).computed == {}  # and without leave from now on

    refused = [line for line in train(monkeypatch, root, tmp_path / "run") if "does not fit the run" in line]
    assert len(refused) == 1
    assert all(f"column {column} (" in refused[0] for column in columns)
    assert f"--rebuild {change.column}`" in refused[0]
    back = run(root, raw, PLAN, *columns)
    assert {title for title in back.computed if title != "pack"} == set()
    assert back.info.fingerprint == first
    assert not [line for line in train(monkeypatch, root, tmp_path / "run") if "fit" in line]


def test_another_resolution_at_the_same_root_leaves_the_first_as_it_is(made, raw, tmp_path, monkeypatch):
    root = Path(shutil.copytree(made[0], tmp_path / "data"))
    larger = replace(PLAN, resolution=128)
    with pytest.raises(UserError, match=r"column bucket \(table: 64x64 -> 128x128\).*--rebuild bucket, which"):
        run(root, raw, larger)
    assert open_dataset(str(root)).fingerprint == made[1].info.fingerprint
    files = {path for path in root.rglob("*") if path.is_file()}
    outcome = run(root, raw, larger, "bucket")
    assert open_dataset(str(root)).latent_shape("128x128") == (8, 32, 32)
    assert files <= {path for path in root.rglob("*") if path.is_file()}
    assert outcome.computed["caption + latents + text_clip_l + text_t5"] == IMAGES + VAL
    captions = made[1].info.columns["caption"], outcome.info.columns["caption"]
    assert captions[0] == captions[1]
    back = run(root, raw, PLAN, "bucket")
    assert (back.computed, back.info.fingerprint) == ({}, made[1].info.fingerprint)
    assert verify_dataset(str(root)).problems == []


def test_a_mistyped_column_is_refused_with_the_nearest_known(made, raw):
    with pytest.raises(UserError, match=r"--rebuild latent: no such column \(did you mean 'latents'\?\)"):
        run(made[0], raw, PLAN, "latent")


def test_data_that_name_no_settings_are_told_apart_by_column(made):
    stands = replace(made[1].info, settings={})
    wanted = replace(stands, columns={**stands.columns, "text_t5": "0" * 16})
    assert find_mismatches(stands, stands) == {}
    assert find_mismatches(stands, wanted) == {"text_t5": "made by other settings"}
