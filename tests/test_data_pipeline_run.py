"""The whole flow on real scenes with damaged rows among them: counts add up, nothing is redone, damage is found."""

import io
import json
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from data_pipeline.curation.filters import Thresholds
from data_pipeline.flow.pipeline import Pipeline, PipelineResult
from data_pipeline.flow.summary import format_summary
from data_pipeline.formats.index import read_split
from data_pipeline.formats.schema import read_dataset_info
from data_pipeline.inspection.verify import verify_dataset
from data_pipeline.loading.loader import open_dataset
from data_pipeline.packing.publish import write_rejected
from data_pipeline.plans import DatasetPlan, read_vae_meta, world
from data_pipeline.sources.registry import open_source, open_sources
from data_pipeline.world.write import write_world
from infra import storage
from infra.errors import UserError
from infra.runner import WorkerPool

PLAN = replace(world(), ingest_rows=20, pack_rows=16)
BAD = {
    "tiny": ("too_small", b"a caption"),
    "cut": ("corrupt", b"a caption"),
    "silent": ("bad_caption", b"   "),
    "again": ("duplicate", b"a second one"),
}


def add_bad_rows(tar: Path) -> None:
    """One row of each kind at the end of a tar of scenes."""
    with tarfile.open(tar) as archive:
        members = [(m.name, archive.extractfile(m).read()) for m in archive]
    good = next(data for name, data in members if name.endswith(".png"))
    out = io.BytesIO()
    Image.new("RGB", (1, 1)).save(out, "PNG")
    # another file with the same pixels: Pillow writes other bytes than the world does
    again = io.BytesIO()
    Image.open(io.BytesIO(good)).save(again, "BMP")
    fresh = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(fresh, "PNG")
    images = {"tiny": out.getvalue(), "cut": good[:300], "silent": fresh.getvalue(), "again": again.getvalue()}
    with tarfile.open(tar, "w") as archive:
        for name, data in [
            *members,
            *((f"{k}.{s}", d) for k, v in images.items() for s, d in (("png", v), ("txt", BAD[k][1]))),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def run(root: Path | str, raw: Path | str, plan: DatasetPlan = PLAN, **given: object) -> PipelineResult:
    return Pipeline(plan, str(root), open_source(f"wds:{raw}"), workers=WorkerPool(0), **given).run()


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_world(str(folder), images=44, val_images=8, seed=3, images_per_shard=30)
    add_bad_rows(folder / "train" / "00001.tar")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, raw) -> tuple[Path, PipelineResult]:
    root = tmp_path_factory.mktemp("made") / "data"
    return root, run(root, raw)


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "copy"))


def origins(root: Path) -> Counter:
    """(shard, row) of every sample, from the tars themselves."""
    found: Counter = Counter()
    for split in ("train", "val"):
        dataset = open_dataset(str(root), split=split)
        for tar in dataset.index.tars:
            with tarfile.open(root / tar) as archive:
                for member in archive:
                    if member.name.endswith(".json"):
                        place = json.loads(archive.extractfile(member).read())["from"]
                        found[place["shard"], place["row"]] += 1
    return found


def test_every_row_ends_in_one_sample_or_one_dead_letter(made):
    root, outcome = made
    rejected = pq.read_table(outcome.rejected).to_pylist()
    assert {row["source"]: row["status"] for row in rejected} == {name: status for name, (status, _) in BAD.items()}
    assert all(row["reason"] for row in rejected)
    samples = origins(root)
    assert set(samples.values()) == {1}
    assert len(samples) == 52
    assert not set(samples) & {(row["shard"], row["row"]) for row in rejected}
    assert outcome.rejected == f"{root}/{outcome.info.rejected}"
    assert outcome.info.counts == {"ok": 52, "too_small": 1, "corrupt": 1, "bad_caption": 1, "duplicate": 1}
    assert outcome.counts["ingest"] == {"ok": 56}


def test_the_dataset_trains_and_validates(made):
    root, _ = made
    train, val = open_dataset(str(root)), open_dataset(str(root), split="val")
    assert (train.num_samples, val.num_samples) == (44, 8)
    assert train.vae == read_vae_meta("world:vae")
    batch = next(train.batches(seed=0, global_batch=8, encoder_dropout=0.0))
    assert batch.latent_BCHW.shape == (8, 8, 16, 16)
    assert batch.text.context_BLD.shape == (8, 32, 384)
    assert 0.5 < batch.latent_BCHW.std() < 2
    assert batch.text.mask_BL.sum(1).min() >= 6
    captions = val.read(range(8), caption="synthetic").captions
    assert all(captions)
    assert captions != val.read(range(8)).captions


def test_stored_features_are_those_of_the_encoders_alone(made):
    from data_pipeline.checkpoints import resolve
    from model.encoders.networks import load_text_encoders
    from model.encoders.vae import load_vae

    root, _ = made
    dataset = open_dataset(str(root), split="val")
    batch = dataset.read(range(4), posterior="mean")
    expected = load_text_encoders(dataset.text_spec, resolve).condition(batch.captions)
    torch.testing.assert_close(batch.text.context_BLD.float(), expected.context_BLD, atol=2e-2, rtol=2e-3)
    torch.testing.assert_close(batch.text.pooled_BP, expected.pooled_BP, atol=1e-3, rtol=1e-3)
    assert torch.equal(batch.text.mask_BL, expected.mask_BL)
    images = dataset.vae.decode(load_vae(resolve("world:vae")), batch.latent_BCHW)
    scenes = {}
    from data_pipeline.world.scenes import make_scene

    for index in range(8):
        scene = make_scene(3, index, split="val")
        scenes[scene.caption] = torch.from_numpy(scene.image.copy()).permute(2, 0, 1) / 127.5 - 1
    for image, caption in zip(images, batch.captions):
        error = (image - scenes[caption]).square().mean() / 4
        assert -10 * torch.log10(error) > 24


def test_the_same_command_again_computes_nothing(made, raw, copy):
    before = {
        path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file() and "rejected" not in path.parts
    }
    again = run(copy, raw)
    assert again.computed == {}
    assert again.info.fingerprint == made[1].info.fingerprint
    after = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    assert {p for p in before if after[p] != before[p] and p.parent.name not in ("index", "pack")} == set()
    assert "nothing was missing" in format_summary(str(copy), again)


def test_another_commit_of_the_code_alone_rebuilds_nothing(made, raw, copy, monkeypatch):
    for module in ("stages.columns", "flow.pipeline"):
        monkeypatch.setattr(f"data_pipeline.{module}.code_version", lambda: "another-commit")
    again = run(copy, raw)
    assert again.computed == {}
    assert again.info.fingerprint == made[1].info.fingerprint
    assert again.info.code_version == "another-commit"


def test_looser_thresholds_compute_only_the_missing_rows(made, raw, copy):
    again = run(copy, raw, replace(PLAN, strict=Thresholds(min_side=1)))
    assert again.computed["caption + latents + text_clip_l + text_t5"] == 1
    assert again.info.counts["ok"] == 53
    assert verify_dataset(str(copy)).problems == []


def test_appended_images_leave_what_is_there(made, raw, copy, tmp_path):
    grown = Path(shutil.copytree(raw, tmp_path / "grown"))
    for name in ("train/00001.tar", "val/00000.tar", "train/00000.tar"):
        shutil.copystat(raw / name, grown / name)
    write_world(str(tmp_path / "more"), images=6, seed=99)
    shutil.copy(tmp_path / "more" / "train" / "00000.tar", grown / "train" / "00007.tar")
    again = run(copy, grown)
    assert again.computed["ingest + measure + filter"] == 6
    assert again.computed["caption + latents + text_clip_l + text_t5"] == 6
    assert again.computed["pack"] <= 6 + 16
    assert again.info.counts["ok"] == 58
    assert again.info.fingerprint != made[1].info.fingerprint
    assert again.info.encoding == made[1].info.encoding


def test_a_second_source_stands_beside_the_first_and_repacks_no_full_shard(made, raw, copy, tmp_path):
    """Its rows sort before and between those that are there."""
    write_world(str(tmp_path / "more"), images=20, val_images=2, seed=99, images_per_shard=10)
    again = Pipeline(
        PLAN, str(copy), open_sources([f"wds:{tmp_path}/more", f"wds:{raw}", f"wds:{raw}"]),
        workers=WorkerPool(0),
    ).run()  # fmt: skip
    assert again.computed["caption + latents + text_clip_l + text_t5"] == 22
    assert again.info.counts["ok"] == 74
    before, after = (read_split(str(root), info.splits["train"].index) for root, info in (
        (copy, made[1].info), (copy, again.info)))  # fmt: skip
    full = {entry.tar for entry in before if entry.num_samples == PLAN.pack_rows}
    assert full
    assert full <= {entry.tar for entry in after}
    assert {entry.generation for entry in after if entry.tar in full} == {0}
    assert {entry.generation for entry in after} == {0, 1}
    assert verify_dataset(str(copy)).problems == []
    # the sources in another order, and without Ray's help: nothing to do
    turned = open_sources([f"wds:{raw}", f"wds:{tmp_path}/more"])
    last = Pipeline(PLAN, str(copy), turned, workers=WorkerPool(0)).run()
    assert (last.computed, last.info.fingerprint) == ({}, again.info.fingerprint)


def test_a_damaged_description_is_packed_anew(made, raw, copy):
    (copy / "dataset.json").write_text("{")
    assert run(copy, raw).info.fingerprint == made[1].info.fingerprint
    for index in (copy / "index").glob("*.parquet"):
        index.write_bytes(b"garbage")
    assert run(copy, raw).info.fingerprint == made[1].info.fingerprint
    assert verify_dataset(str(copy)).problems == []


def test_another_captioner_setting_rebuilds_captions_and_text_only(made, raw, copy):
    plan = replace(PLAN, captioner=replace(PLAN.captioner, max_new_tokens=4))
    with pytest.raises(UserError, match=r"caption \(max_new_tokens: 24 -> 4\).*--rebuild caption, which"):
        run(copy, raw, plan)
    again = run(copy, raw, plan, rebuild=["caption"])
    changed = {k for k, v in again.info.columns.items() if made[1].info.columns[k] != v}
    assert changed == {"caption", "text_clip_l", "text_t5"}
    assert again.info.encoding != made[1].info.encoding
    latents = list((copy / "columns" / "latents").rglob("*.json"))
    assert len(latents) == len(list((made[0] / "columns" / "latents").rglob("*.json")))
    assert verify_dataset(str(copy)).problems == []


def test_shards_of_two_encodings_are_refused(made, raw, copy):
    info = (copy / "dataset.json").read_text()
    (copy / "dataset.json").write_text(info.replace('"resolution": 64', '"resolution": 72'))
    with pytest.raises(UserError, match="rebuild the columns latents and text"):
        open_dataset(str(copy))


def test_verify_finds_flipped_missing_and_foreign_bytes(made, copy):
    assert verify_dataset(str(made[0])).problems == []
    assert verify_dataset(str(made[0])).samples == {"train": 44, "val": 8}
    shard = next((copy / "train").rglob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    rows = next((copy / "val").rglob("*.parquet"))
    rows.unlink()
    column = next((copy / "columns" / "latents").rglob("*.parquet"))
    column.write_bytes(column.read_bytes()[:-10])
    problems = "\n".join(verify_dataset(str(copy)).problems)
    for path in (shard, rows, column):
        assert str(path) in problems


def test_verify_finds_rows_that_ended_nowhere_or_twice(made, copy):
    info = read_dataset_info(str(copy))
    path = copy / info.rejected
    table = pq.read_table(path)

    def found(dead: pa.Table, **changes: object) -> str:
        name = write_rejected(str(copy), [dead])
        (copy / "dataset.json").write_bytes(replace(info, rejected=name, **changes).to_bytes())
        return " ".join(verify_dataset(str(copy)).problems)

    assert found(table) == ""
    (shard, row), *_ = origins(copy)
    extra = pa.table({"status": ["bad"], "reason": ["-"], "source": ["-"], "shard": [shard], "row": [row]})
    both = found(pa.concat_tables([table, extra.cast(table.schema)]), counts=info.counts | {"bad": 1})
    assert "1 dead letters are samples, too" in both
    lost = table.filter(pc.not_equal(table["status"], "corrupt"))
    assert "other dead letters than dataset.json counts" in found(lost)
    counts = {status: count for status, count in info.counts.items() if status != "corrupt"}
    assert "rows ended as sample or dead letter" in found(lost, counts=counts)
    path.unlink()
    (copy / "dataset.json").write_bytes(info.to_bytes())
    assert info.rejected in " ".join(verify_dataset(str(copy)).problems)
    raw = json.loads(info.to_bytes())
    del raw["rejected"]  # data of before the table was named
    (copy / "dataset.json").write_text(json.dumps(raw))
    assert read_dataset_info(str(copy)) == replace(info, rejected="")
    assert verify_dataset(str(copy)).problems == []


def test_a_damaged_column_is_named_and_can_be_made_again(made, raw, copy):
    manifest = next((copy / "columns" / "latents").rglob("*.json"))
    part = manifest.read_text().split('"object": "')[1].split('"')[0]
    (copy / part).write_bytes(b"garbage")
    shutil.rmtree(copy / "pack")
    with pytest.raises(UserError, match="delete it and run the command again"):
        run(copy, raw)
    (copy / part).unlink()
    again = run(copy, raw)
    assert again.info.fingerprint == made[1].info.fingerprint
    assert again.computed["caption + latents + text_clip_l + text_t5"] > 0
    assert verify_dataset(str(copy)).problems == []


@pytest.mark.parametrize("suffix", [".tar", ".parquet"])
def test_a_lost_training_shard_is_packed_again(made, raw, copy, suffix):
    next((copy / "train").rglob(f"*{suffix}")).unlink()
    assert verify_dataset(str(copy)).problems
    again = run(copy, raw)
    assert set(again.computed) == {"pack"}
    assert "nothing was missing" not in format_summary(str(copy), again)
    assert again.info.fingerprint == made[1].info.fingerprint
    assert verify_dataset(str(copy)).problems == []


def test_what_verify_names_is_deleted_and_the_same_command_repairs_it(made, raw, copy):
    tar = next((copy / "train").rglob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-2000])
    column = next((copy / "columns" / "text_t5").rglob("*.parquet"))
    column.write_bytes(b"garbage")
    problems = verify_dataset(str(copy)).problems
    assert len(problems) == 2
    for problem in problems:
        Path(problem.partition(": ")[0]).unlink()
    again = run(copy, raw)
    assert set(again.computed) == {"caption + latents + text_clip_l + text_t5", "pack"}
    assert again.info.fingerprint == made[1].info.fingerprint
    assert verify_dataset(str(copy)).problems == []
    assert run(copy, raw).computed == {}


def test_a_lost_shard_that_another_version_packs_otherwise_has_a_new_proof(made, raw, copy, monkeypatch):
    next((copy / "train").rglob("*.tar")).unlink()
    monkeypatch.setattr("data_pipeline.packing.shards._RECORD", 512)
    assert set(run(copy, raw).computed) == {"pack"}
    assert run(copy, raw).computed == {}
    assert verify_dataset(str(copy)).problems == []


def test_a_shard_that_cannot_be_encoded_stops_the_run_or_is_left_out_when_told_so(raw, copy):
    ingest = min((copy / "columns" / "ingest").rglob("*train-00000*.json")).read_text()
    shard, data = (ingest.split(f'"{name}": "')[1].split('"')[0] for name in ("shard", "object"))
    (copy / data).write_bytes(b"garbage")
    for manifest in (copy / "columns" / "latents").rglob(f"{shard}.*.json"):
        manifest.unlink()
    with pytest.raises(UserError, match=r"1 of 1 units failed, first .*--keep-going"):
        run(copy, raw)
    outcome = run(copy, raw, keep_going=True)
    assert outcome.failed.keys() == {shard}
    assert outcome.info.counts["failed"] == 20
    assert outcome.info.counts["ok"] == 32
    assert open_dataset(str(copy)).num_samples == 24


def test_a_source_without_a_usable_row_says_why(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no image")
    (tmp_path / "in" / "a.txt").write_text("a caption")
    with pytest.raises(UserError, match=r"no usable row among 1: 1 corrupt, e.g. .*a\.png \(.+\); all are listed in"):
        Pipeline(PLAN, str(tmp_path / "out"), open_source(f"folder:{tmp_path}/in"), workers=WorkerPool(0)).run()
    (listed,) = (tmp_path / "out" / "rejected").glob("*.parquet")
    assert [row["status"] for row in pq.read_table(listed).to_pylist()] == ["corrupt"]


def test_a_full_disk_is_one_line_and_nothing_made_is_lost(made, raw, tmp_path):
    import resource

    root = tmp_path / "full"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the system refuses larger files, as a full disk
    try:
        with pytest.raises(UserError, match="disk full"):
            run(root, raw)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = {path.name for path in (root / "columns" / "ingest").rglob("*.json")}
    assert kept
    assert run(root, raw).info.fingerprint == made[1].info.fingerprint


def test_the_flow_on_s3_gives_the_same_data(made, raw, s3):
    for path in raw.rglob("*.tar"):
        storage.write_bytes(f"{s3}/raw/{path.relative_to(raw)}", path.read_bytes())
    outcome = run(f"{s3}/data", f"{s3}/raw")
    assert outcome.info.splits["train"].buckets == made[1].info.splits["train"].buckets
    local, remote = open_dataset(str(made[0])), open_dataset(f"{s3}/data")
    local_keys = {key for shard in range(len(local.index.tars)) for key in local._reader.table(shard).keys}
    stream = remote.batches(seed=0, global_batch=11)
    assert {key for _ in range(4) for key in next(stream).keys} == local_keys
    stream.close()
    assert verify_dataset(f"{s3}/data").problems == []
    assert run(f"{s3}/data", f"{s3}/raw").computed == {}
