"""Sources and ingest: every container gives its rows, and what is broken in it becomes a counted row."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.sources.ingest import Ingest
from data_pipeline.sources.registry import open_source, open_sources
from data_pipeline.sources.source import SourceOptions
from data_pipeline.stages.column_state import ColumnState
from data_pipeline.stages.columns import Column, read_part
from infra import storage
from infra.errors import UnavailableError, UserError


def png(size=(40, 40), color="red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def ingest(tmp_path: Path, source_text: str, *, shard_rows: int = 1000, **columns: str) -> list[dict]:
    """All rows of a source, through real objects and manifests."""
    source = open_source(source_text, SourceOptions(**columns))
    column = Column(str(tmp_path / "root"), "ingest", "f" * 16)
    rows = []
    for unit in source.list_units():
        manifest, _ = Ingest(shard_rows).run(source, unit, column)
        for part in manifest.parts:
            rows += [row | {"shard": part.shard} for row in read_part(column.root, part).to_pylist()]
    return rows


def statuses(rows: list[dict]) -> dict[str, str]:
    return {row["source"]: row["status"] for row in rows}


def test_img2dataset_tars_give_captions_keys_and_failed_downloads(tmp_path):
    members = []
    for n in range(5):
        members += [(f"{n:09d}.png", png()), (f"{n:09d}.txt", f"caption {n}".encode())]
        members.append((f"{n:09d}.json", json.dumps({"key": f"{n:09d}", "url": f"http://x/{n}"}).encode()))
    table = [{"key": f"{n:09d}", "url": f"http://x/{n}", "caption": f"caption {n}", "status": "success",
              "error_message": None} for n in range(7)]  # fmt: skip
    table[5] |= {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"}
    table[6] |= {"status": "failed_to_resize", "error_message": "image decoding error"}
    (tmp_path / "raw" / "train").mkdir(parents=True)
    write_tar(tmp_path / "raw" / "train" / "00000.tar", members)
    (bare,) = open_source(f"wds:{tmp_path}/raw").list_units()
    pq.write_table(pa.Table.from_pylist(table[::-1]), tmp_path / "raw" / "train" / "00000.parquet")
    (tmp_path / "raw" / "train" / "00000_stats.json").write_text("{}")
    assert bare.id == open_source(f"wds:{tmp_path}/raw").list_units()[0].id
    rows = ingest(tmp_path, f"wds:{tmp_path}/raw", shard_rows=4)
    assert [row["caption"] for row in rows[:5]] == [f"caption {n}" for n in range(5)]
    assert json.loads(rows[1]["info"]) == {"url": "http://x/1"}
    assert [row["shard"][-3:] for row in rows] == ["000"] * 4 + ["001"] * 3
    failed = [(row["key"], row["status"], row["reason"], row["caption"]) for row in rows[5:]]
    assert failed == [
        ("000000006", "no_image", "image decoding error", "caption 6"),
        ("000000005", "no_image", "HTTP Error 404: Not Found", "caption 5"),
    ]
    assert json.loads(rows[6]["info"]) == {"url": "http://x/5"}
    (pattern,) = open_source(f"wds:{tmp_path}/raw/train/{{00000,00000}}.tar").list_units()
    assert pattern.where["table"].endswith("00000.parquet")
    assert open_source(f"wds:{tmp_path}/raw").list_units()[0].split == "train"


def test_brace_patterns_name_tars_and_a_missing_one_is_named(tmp_path):
    for n in range(3):
        write_tar(tmp_path / f"{n:05d}.tar", [(f"{n}.png", png()), (f"{n}.txt", b"x")])
    assert len(ingest(tmp_path, f"wds:{tmp_path}/{{00000..00002}}.tar")) == 3
    assert len(open_source(f"wds:{tmp_path}/{{00000,00001,00001}}.tar").list_units()) == 2
    assert len(open_source(f"wds:{tmp_path}/{{00000,00000}}.tar").list_units()) == 1
    with pytest.raises(UserError, match=r"00003.tar: no such file \(1 of 4"):
        open_source(f"wds:{tmp_path}/{{00000..00003}}.tar").list_units()


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.999])
def test_a_truncated_tar_keeps_its_whole_rows_and_counts_the_break(tmp_path, keep):
    members = [(f"{n}.{kind}", data) for n in range(6) for kind, data in (("png", png()), ("txt", b"x"))]
    path = write_tar(tmp_path / "a.tar", members)
    whole = 512 * sum(1 + -(-len(data) // 512) for _, data in members)
    path.write_bytes(path.read_bytes()[: int(whole * keep)])
    rows = ingest(tmp_path, f"wds:{tmp_path}")
    assert statuses(rows)["a.tar"] == "truncated_tar"
    assert "a.tar" in rows[-1]["reason"]
    good = [row for row in rows if row["status"] == "ok"]
    assert len(good) >= 2
    assert {row["status"] for row in rows[len(good) :]} == {"truncated_tar"}
    assert len(rows) - len(good) <= 2  # the break, and an image whose caption lay behind it
    assert all(row["caption"] == "x" and row["image"] == png() for row in good)


def test_a_tar_that_is_none_is_counted(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"this is not a tar" * 100)
    assert statuses(ingest(tmp_path, f"wds:{tmp_path}")) == {"a.tar": "truncated_tar"}


def test_entries_that_leave_the_folder_and_links_are_not_followed(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("../evil.png", "/etc/evil.png", "good.png", "good.txt"):
            info = tarfile.TarInfo(name)
            data = png() if name.endswith("png") else b"a caption"
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    found = statuses(ingest(tmp_path, f"wds:{tmp_path}"))
    assert found == {"../evil.png": "bad_name", "/etc/evil.png": "bad_name", "good": "ok", "link.png": "bad_name"}


def test_duplicate_keys_and_bad_bytes_in_captions_get_a_status(tmp_path):
    members = [("a.png", png()), ("a.txt", b"x"), ("b.png", png()), ("b.txt", b"\xff\xfe\xff"), ("a.png", png())]
    rows = ingest(tmp_path, f"wds:{write_tar(tmp_path / 'a.tar', members).parent}")
    assert [row["status"] for row in rows] == ["ok", "bad_caption", "duplicate_key"]
    twice = [("a.png", png()), ("a.txt", b"x"), ("a.png", png(color="blue")), ("a.txt", b"y")]
    write_tar(tmp_path / "a.tar", twice)  # side by side: neither takes the other's place
    rows = ingest(tmp_path, f"wds:{tmp_path}")
    assert [(row["status"], row["caption"]) for row in rows] == [("ok", "x"), ("duplicate_key", "y")]


def test_a_folder_gives_images_with_the_texts_beside_them(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub dir").mkdir(parents=True)
    (folder / "one.png").write_bytes(png())
    (folder / "one.txt").write_text("caf\u00e9 \U0001f600", encoding="utf-8")
    (folder / "sub dir" / "two.JPG").write_bytes(png())
    (folder / "readme.md").write_text("no image")
    rows = ingest(tmp_path, f"folder:{folder}")
    assert [(row["source"], row["caption"]) for row in rows] == [
        ("one.png", "caf\u00e9 \U0001f600"),
        ("sub dir/two.JPG", ""),
    ]
    assert all(set(row["key"]) <= set("abcdefghijklmnopqrstuvwxyzJPG_-0123456789") for row in rows)
    before = [unit.id for unit in open_source(f"folder:{folder}").list_units()]
    (folder / "one.txt").write_text("another caption")
    assert [unit.id for unit in open_source(f"folder:{folder}").list_units()] != before


@pytest.mark.parametrize("kind", ["bytes", "struct", "path"])
def test_parquet_with_bytes_structs_or_paths(tmp_path, kind):
    folder = tmp_path / "in"
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "0.png").write_bytes(png())
    values = {
        "bytes": [png(), None],
        "struct": [{"bytes": png(), "path": "x.png"}, {"bytes": None, "path": None}],
        "path": ["pictures/0.png", "pictures/gone.png"],
    }[kind]
    pq.write_table(pa.table({"image": values, "caption": ["a", "b"]}), folder / "train-0.parquet")
    rows = ingest(tmp_path, f"parquet:{folder}")
    assert rows[0]["image"] == png()
    assert rows[1]["status"] == ("unreadable" if kind == "path" else "no_image")
    assert open_source(f"parquet:{folder}").list_units()[0].split == "train"


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"), ("training", "train"), ("val", "val"), ("valid", "val"), ("validation", "val"),
        ("dev", "val"), ("test", "val"), ("testing", "val"), ("more", ""),
    ],
)  # fmt: skip
def test_what_a_set_holds_out_is_not_trained_on(tmp_path, name, split):
    """By its folder in every kind of source, and by the file names of the hub's parquet."""
    table = pa.table({"image": [png()], "caption": ["x"]})
    for relative in (f"parquet/{name}/0.parquet", f"hub/{name}-00000-of-00001.parquet"):
        (tmp_path / relative).parent.mkdir(parents=True)
        pq.write_table(table, tmp_path / relative)
    for kind in ("wds", "folder"):
        (tmp_path / kind / name).mkdir(parents=True)
    write_tar(tmp_path / "wds" / name / "0.tar", [("0.png", png()), ("0.txt", b"x")])
    (tmp_path / "folder" / name / "0.png").write_bytes(png())
    for source in ("parquet:parquet", "parquet:hub", "wds:wds", "folder:folder"):
        kind, folder = source.split(":")
        assert [unit.split for unit in open_source(f"{kind}:{tmp_path}/{folder}").list_units()] == [split], source


def test_a_row_group_is_read_some_rows_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.sources.parquet.IMAGES_AT_ONCE", 3)
    table = pa.table({"image": [png((8 + n, 8)) for n in range(8)], "caption": [f"c{n}" for n in range(8)]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(f"parquet:{tmp_path}")
    [unit] = source.list_units()
    rows = list(source.read_rows(unit))
    assert [row.caption for row in rows] == [f"c{n}" for n in range(8)]
    assert [row.image for row in rows] == table["image"].to_pylist()
    assert [row.key for row in rows] == [f"0000-{n:06d}" for n in range(8)]


def test_parquet_columns_are_found_or_asked_for(tmp_path):
    pq.write_table(pa.table({"pic": [png()], "words": ["a"]}), tmp_path / "a.parquet")
    rows = ingest(tmp_path, f"parquet:{tmp_path}", image_column="pic", caption_column="words")
    assert rows[0]["caption"] == "a"
    with pytest.raises(UserError, match=r"no image column.*pic, words: name it with --image-column"):
        open_source(f"parquet:{tmp_path}").list_units()
    pq.write_table(pa.table({"url": ["http://x"], "caption": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="img2dataset"):
        open_source(f"parquet:{tmp_path}").list_units()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").write_bytes(b"PAR1 nonsense")
    pq.write_table(pa.table({"image": [png()], "caption": ["a"]}), tmp_path / "in" / "b.parquet")
    # a damaged file holds up no other
    rows = ingest(tmp_path, f"parquet:{tmp_path}/in")
    assert [row["status"] for row in rows] == ["unreadable", "ok"]
    assert "not a readable parquet file" in rows[0]["reason"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("folder", "expected one of folder:URI"),
        ("foldr:/x", "did you mean 'folder'"),
        ("wds:", "names no place"),
        ("folder:/nowhere/at/all", "no such file or folder"),
        ("wds:/nowhere/at/all", "no such file or folder"),
    ],
)
def test_sources_that_cannot_be_are_one_line(text, message):
    with pytest.raises(UserError, match=message):
        open_source(text).list_units()


def test_an_empty_folder_is_said_to_be_empty(tmp_path):
    for kind in ("folder", "wds", "parquet"):
        with pytest.raises(UserError, match="holds no"):
            open_source(f"{kind}:{tmp_path}").list_units()


def test_tars_and_folders_on_s3(s3, tmp_path):
    path = write_tar(tmp_path / "a.tar", [("k.png", png()), ("k.txt", b"from s3")])
    storage.write_bytes(f"{s3}/raw/val/a.tar", path.read_bytes())
    storage.write_bytes(f"{s3}/pictures/x.png", png())
    storage.write_bytes(f"{s3}/pictures/x.txt", b"one picture")
    assert [r["caption"] for r in ingest(tmp_path, f"wds:{s3}/raw")] == ["from s3"]
    assert [r["caption"] for r in ingest(tmp_path, f"wds:{s3}/raw/val/{{a,a}}.tar")] == ["from s3"]
    assert [r["caption"] for r in ingest(tmp_path, f"folder:{s3}/pictures")] == ["one picture"]
    with pytest.raises(UserError, match="no such"):
        open_source(f"wds:{s3}/nothing").list_units()


def test_credentials_that_expire_stop_the_unit_and_blame_no_row(s3, free_calls):
    storage.write_bytes(f"{s3}/pictures/x.png", png())
    source = open_source(f"folder:{s3}/pictures")
    (unit,) = source.list_units()
    free_calls(0)
    with pytest.raises(UnavailableError, match="renew them and run it again") as caught:
        list(source.read_rows(unit))
    free_calls(10**6)
    assert "testing-secret" not in str(caught.value)
    assert [row.status for row in source.read_rows(unit)] == ["ok"]


def test_several_sources_are_one_and_equal_names_stay_apart(s3, tmp_path):
    """On S3 too, where a size alone would not tell two tars or two pictures apart: both tars are 10,240 bytes."""
    for number, place in enumerate((f"{tmp_path}/a", f"{tmp_path}/b", f"{s3}/a", f"{s3}/b")):
        path = write_tar(tmp_path / "one.tar", [("k.png", png()), ("k.txt", f"tar {number}".encode())])
        storage.write_bytes(f"{place}/tars/0.tar", path.read_bytes())
        storage.write_bytes(f"{place}/pictures/x.png", png(color=("red", "blue", "green", "white")[number]))
        storage.write_bytes(f"{place}/pictures/x.txt", f"picture {number}".encode())
    texts = [f"{kind}:{place}/{name}" for place in (f"{tmp_path}/a", f"{tmp_path}/b", f"{s3}/a", f"{s3}/b")
             for kind, name in (("wds", "tars"), ("folder", "pictures"))]  # fmt: skip
    source = open_sources([*texts, texts[0]])
    again = pickle.loads(pickle.dumps(source))
    assert [row.caption for unit in source.list_units() for row in again.read_rows(unit)] == [
        f"{kind} {n}".encode() for n in range(4) for kind in ("tar", "picture")
    ]
    ids = {unit.id for unit in source.list_units()}
    assert {unit.id for unit in open_sources(texts[::-1]).list_units()} == ids
    assert {unit.id for text in texts for unit in open_source(text).list_units()} == ids


def test_a_file_that_two_sources_list_is_read_once(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", [("k.png", png()), ("k.txt", b"once")])
    source = open_sources([f"wds:{tmp_path}", f"wds:{tmp_path}/{{a,a}}.tar"])
    assert [row.caption for unit in source.list_units() for row in source.read_rows(unit)] == [b"once"]
    assert "1 of 1 files of source 2 are there already" in caplog.text


def test_cc12ms_urls_are_fetched_and_those_of_a_table_beside_it_only_when_asked_for(tmp_path):
    (tmp_path / "cc12m.tsv").write_text("http://127.0.0.1:1/x.jpg\ta caption\n")
    pq.write_table(pa.table({"url": ["http://127.0.0.1:1/y.jpg"], "caption": ["b"]}), tmp_path / "t.parquet")
    texts = [f"cc12m:{tmp_path}/cc12m.tsv", f"parquet:{tmp_path}/t.parquet"]
    assert len(open_sources(texts, SourceOptions(fetch_urls=True)).list_units()) == 2
    with pytest.raises(UserError, match="--fetch-urls"):
        open_sources(texts).list_units()


def test_a_manifest_is_written_once_and_its_objects_by_content(tmp_path):
    column = Column(str(tmp_path), "ingest", "a" * 16)
    table = pa.table({"row": pa.array([0], pa.int32()), "status": ["ok"]})
    other = pa.table({"row": pa.array([0], pa.int32()), "status": ["late"]})
    first = column.write("unit", [("s", table)])
    late = column.write("unit", [("s", other)])  # a zombie that wakes up late changes nothing
    assert late == first
    assert list(ColumnState(str(tmp_path)).manifests(column)) == [first]
    path = tmp_path / first.parts[0].object
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="not the bytes that its manifest names"):
        read_part(str(tmp_path), first.parts[0])


def test_a_manifest_whose_object_is_gone_makes_room_and_others_stay(tmp_path):
    column = Column(str(tmp_path), "latents", "a" * 16)
    tables = [pa.table({"row": pa.array(rows, pa.int32()), "status": ["ok"] * len(rows)}) for rows in ([0, 1], [2])]
    first, second = (column.write("s", [("s", table)], number=number) for number, table in enumerate(tables))
    (tmp_path / first.parts[0].object).unlink()
    state = ColumnState(str(tmp_path))
    assert list(state.manifests(column, heal=False)) == [first, second]
    assert list(state.manifests(column)) == list(state.manifests(column, heal=False)) == [second]
    again = column.write("s", [("s", tables[0])], number=1)  # the number that a worker who knows one manifest gives
    assert list(state.manifests(column)) == [second, again]
