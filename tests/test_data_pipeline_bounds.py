"""What stays bounded, whatever comes in: bytes of training shards, memory of a worker that reads a large tar."""

import io
import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.flow.pipeline import Pipeline
from data_pipeline.formats.index import read_split
from data_pipeline.formats.layout import SampleLayout
from data_pipeline.inspection.verify import verify_dataset
from data_pipeline.loading.loader import open_dataset
from data_pipeline.packing.pack import read_proofs
from data_pipeline.packing.shards import bound_sample_bytes
from data_pipeline.plans import SD3_TEXT, world
from data_pipeline.sources.registry import open_source
from data_pipeline.world.scenes import make_scene
from infra.runner import WorkerPool

MIB = 2**20
TALE = "a \U0001f525 kite "  # four bytes of UTF-8, twelve of JSON


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Scenes whose captions have from one word to 4,000 characters, in no order of size."""
    folder = tmp_path_factory.mktemp("raw")
    for number in range(30):
        image = Image.fromarray(make_scene(7, number, split="bounds").image)
        image.save(folder / f"{number:02d}.png")
        caption = (TALE * 500)[:4000] if number % 7 in (2, 3) else f"kite {number}"
        (folder / f"{number:02d}.txt").write_text(caption, encoding="utf-8")
    return folder


def test_no_shard_exceeds_its_bytes_and_index_manifest_and_files_agree(folder, tmp_path):
    plan = replace(world(), pack_rows=25, pack_mb=1, val_fraction=0.0)
    info = Pipeline(plan, str(tmp_path), open_source(f"folder:{folder}"), workers=WorkerPool(0)).run().info
    entries = read_split(str(tmp_path), info.splits["train"].index)
    largest = bound_sample_bytes(info.layout("64x64"), caption_chars=plan.max_caption_chars + 2000)
    assert {entry.num_samples for entry in entries[:-1]} | {max(e.num_samples for e in entries)} <= {MIB // largest, 2}
    assert sum(entry.num_samples for entry in entries) == 30
    for entry in entries:
        assert (tmp_path / entry.tar).stat().st_size == entry.num_bytes <= MIB
    proofs = read_proofs(str(tmp_path), info.encoding)
    assert sorted(entry.tar for entry in proofs.values()) == sorted(entry.tar for entry in entries)
    assert {e.tar: e.num_bytes for e in proofs.values()} == {e.tar: e.num_bytes for e in entries}
    sizes = [size for entry in entries for size in sample_sizes(tmp_path / entry.tar)]
    assert max(sizes) > 1.5 * min(sizes)
    assert max(sizes) <= largest
    assert verify_dataset(str(tmp_path)).problems == []
    # rows alone decide where bytes leave room; full shards of another size are packed anew
    again = replace(plan, pack_mb=64)
    made = Pipeline(again, str(tmp_path), open_source(f"folder:{folder}"), workers=WorkerPool(0)).run()
    assert made.computed.keys() == {"pack"}
    assert sorted(e.num_samples for e in read_split(str(tmp_path), made.info.splits["train"].index)) == [5, 25]
    assert open_dataset(str(tmp_path)).num_samples == 30


def sample_sizes(tar: Path) -> list[int]:
    """Bytes that each sample takes in its tar."""
    found: dict[str, int] = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            key = member.name.split(".")[0]
            found[key] = found.get(key, 0) + 512 + -(-member.size // 512) * 512
    return list(found.values())


def test_sd3s_samples_of_two_full_captions_make_shards_of_500():
    layout = SampleLayout(SD3_TEXT, ("original", "synthetic"), (32, 32, 32))
    assert 1024 * MIB // bound_sample_bytes(layout, caption_chars=7000) in range(480, 540)


INGEST = """
import json, resource, sys
from data_pipeline.stages.columns import Column
from data_pipeline.sources.ingest import Ingest
from data_pipeline.plans import build_columns, world
from data_pipeline.sources.registry import open_source
from data_pipeline.flow.tasks import IngestTask

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

columns, found = build_columns(world(), sys.argv[1]), {}
for name in ("small", "large"):
    source = open_source(f"wds:{sys.argv[1]}/{name}.tar")
    task = IngestTask(
        sys.argv[1], source, Ingest(4), Column(sys.argv[1], "ingest", "f" * 16), columns.light,
        keep_bytes=16 * 2**20,
    )
    (unit,) = source.list_units()
    report = task.open()({"id": unit.id, "split": unit.split, "where": unit.where, "known": {}})
    found[name] = {"rows": report["rows"], "shards": len(report["manifests"][0]["parts"]), "mib": peak(),
                   "ok": report["counts"]["filter"]["ok"]}
print(json.dumps(found))
"""


def write_large_tar(path: Path, rows: int) -> None:
    """Pictures of 4 MiB each: what follows a PNG's end is read by nobody."""
    with tarfile.open(path, "w") as archive:
        for number in range(rows):
            picture = io.BytesIO()
            Image.fromarray(make_scene(7, number, split="bounds").image).save(picture, "PNG")
            padded = picture.getvalue().ljust(4 * MIB, b"\0")
            for name, data in ((f"{number:04d}.png", padded), (f"{number:04d}.txt", b"a caption")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


@pytest.mark.slow
def test_a_tar_of_eight_times_the_bytes_takes_no_more_memory(tmp_path):
    for name, rows in (("small", 12), ("large", 96)):
        write_large_tar(tmp_path / f"{name}.tar", rows)
    done = subprocess.run([sys.executable, "-c", INGEST, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["large"]["rows"], found["large"]["ok"], found["large"]["shards"]) == (96, 96, 24)
    assert found["small"]["shards"] == 3
    # shards of 16 MiB and as much kept: the tar has 384
    assert found["large"]["mib"] - found["small"]["mib"] < 48, found
