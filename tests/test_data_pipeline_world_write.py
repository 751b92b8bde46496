"""The world on disk: img2dataset's layout, byte for byte reproducible, with truth that matches the pixels."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.sources.registry import open_source
from data_pipeline.world.scenes import make_scene
from data_pipeline.world.write import write_world
from infra import storage
from infra.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(str(folder), images=25, val_images=5, seed=4, images_per_shard=10)
    return folder


def test_files_are_img2datasets(root: Path) -> None:
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    wanted = [f"train/0000{i}{end}" for i in range(3) for end in (".parquet", ".tar", "_stats.json")]
    wanted += [f"val/00000{end}" for end in (".parquet", ".tar", "_stats.json")]
    wanted += [f"truth/train/0000{i}.parquet" for i in range(3)] + ["truth/val/00000.parquet"]
    assert names == sorted(wanted)
    with tarfile.open(root / "train/00001.tar") as tar:
        assert tar.getnames()[:4] == ["000010000.json", "000010000.png", "000010000.txt", "000010001.json"]
    stats = json.loads((root / "train/00002_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (5, 5, {"success": 5})


def test_webdataset_reads_it(root: Path) -> None:
    import webdataset

    urls = [str(root / "train" / f"0000{i}.tar") for i in range(3)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil"))
    assert len(samples) == 25
    rows = [row for i in range(3) for row in pq.read_table(root / "train" / f"0000{i}.parquet").to_pylist()]
    for index, (sample, row) in enumerate(zip(samples, rows, strict=True)):
        scene = make_scene(4, index, split="train")
        assert sample["__key__"] == row["key"] == sample["json"]["key"]
        assert sample["txt"] == row["caption"] == scene.caption
        assert np.array_equal(np.asarray(sample["png"]), scene.image)
        assert row == sample["json"]


def test_same_seed_gives_the_same_bytes(root: Path, tmp_path: Path) -> None:
    write_world(str(tmp_path), images=25, val_images=5, seed=4, images_per_shard=10)
    for path in (path for path in root.rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / path.relative_to(root)).read_bytes(), path.name
    drawn = [open_source(f"wds:{folder}").list_units() for folder in (root, tmp_path)]
    assert [unit.id for unit in drawn[0]] == [unit.id for unit in drawn[1]]  # by which the pipeline orders rows
    write_world(str(tmp_path / "other"), images=10, seed=5, images_per_shard=10)
    assert (tmp_path / "other/train/00000.tar").read_bytes() != (root / "train/00000.tar").read_bytes()
    assert (tmp_path / "other/train/00000.tar").stat().st_mtime_ns != (root / "train/00000.tar").stat().st_mtime_ns


def test_truth_matches_the_written_pixels(root: Path) -> None:
    with tarfile.open(root / "val/00000.tar") as tar:
        pngs = {member.name: tar.extractfile(member).read() for member in tar if member.name.endswith(".png")}
    for row in pq.read_table(root / "truth/val/00000.parquet").to_pylist():
        image = np.asarray(Image.open(io.BytesIO(pngs[f"{row['key']}.png"])).convert("RGB")).astype(int)
        covered = np.zeros((64, 64), bool)
        for item in row["objects"]:
            mask = np.asarray(Image.open(io.BytesIO(item["mask_png"])))
            x1, y1, x2, y2 = (int(v) for v in item["box"])
            assert mask[y1:y2, x1:x2].sum() == mask.sum() > 0
            covered[y1:y2, x1:x2] = True
        background = image[~covered]
        assert (background == background[0]).all()
        assert (image[covered] != background[0]).any()
        assert row["seen"] is True
        assert sum(entry["count"] for entry in json.loads(row["include"])) == len(row["objects"])


def test_on_s3_it_is_the_same(root: Path, s3: str) -> None:
    write_world(s3, images=10, seed=4, images_per_shard=10)
    assert storage.read_bytes(storage.join(s3, "train/00000.tar")) == (root / "train/00000.tar").read_bytes()


def test_no_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one image, got 0"):
        write_world(str(tmp_path), images=0)
