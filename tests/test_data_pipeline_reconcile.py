"""Rows in = rows out + rows set aside + bytes told unreadable: over inputs of all kinds, against independent counts."""

import csv
import gzip
import io
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.flow.pipeline import Pipeline
from data_pipeline.plans import world
from data_pipeline.sources.ingest import Ingest
from data_pipeline.sources.registry import SOURCES, open_source, open_sources
from data_pipeline.sources.seen import Seen, format_seen, sum_kind
from data_pipeline.sources.source import RawRow
from data_pipeline.stages.row_status import count_by_status
from infra.runner import WorkerPool

BLOCK = 512
IMAGES = ("jpg", "png", "webp")


def png(number: int = 0, size: tuple[int, int] = (40, 40)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (number * 7 % 256, number % 256, number // 256)).save(out, "PNG")
    return out.getvalue()


class Tar:
    """Builds a tar and remembers where each member lies: an independent account of its bytes."""

    def __init__(self) -> None:
        self.data = b""
        self.members: list[tuple[str, bytes, int, int]] = []
        """(name, data or the kind of what is no file, first byte, byte behind)."""

    def add(self, name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> "Tar":
        info = tarfile.TarInfo(name)
        info.size, info.type, info.linkname = len(data) if kind == tarfile.REGTYPE else 0, kind, "elsewhere"
        start = len(self.data)
        body = data if kind == tarfile.REGTYPE else b""
        self.data += info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % BLOCK)
        self.members.append((name, body if kind == tarfile.REGTYPE else kind, start, start + BLOCK + len(body)))
        return self

    def end(self, junk: bytes = b"") -> "Tar":
        self.data += bytes(2 * BLOCK) + junk
        return self


def read(path: Path) -> tuple[list[RawRow], Seen]:
    return read_source(f"wds:{path}")


def read_source(text: str) -> tuple[list[RawRow], Seen]:
    source, seen, rows = open_source(text), Seen(), []
    for unit in source.list_units():
        rows += source.read_rows(unit)
        seen.update(unit.seen)
    return rows, seen


def is_system_file(name: str) -> bool:
    return name.rsplit("/", 1)[-1].startswith("._")


names = st.builds(
    lambda folder, stem, suffix: f"{folder}{stem}.{suffix}", st.sampled_from(["", "d/", "e.f/"]),
    st.sampled_from(["0", "1", "1.5", "._0", "v.2.3"]),
    st.sampled_from(["jpg", "png", "JPG", "txt", "json", "seg.png", "cls", "jpg.txt", "webp"]),
)  # fmt: skip
kinds = st.sampled_from([tarfile.REGTYPE] * 12 + [tarfile.DIRTYPE, tarfile.SYMTYPE])
members = st.lists(st.tuples(names, st.integers(0, 1200), kinds), min_size=1, max_size=9)
junk = st.text("xyz", max_size=900).map(str.encode)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(members, junk), min_size=1, max_size=3), st.none() | st.integers(1, 3000), st.booleans())
@example([([("0.jpg", 0, tarfile.REGTYPE)], b""), ([("0.jpg", 0, tarfile.REGTYPE)] * 2, b"")], 1543, False)
def test_every_member_and_byte_of_a_random_tar_is_a_row_or_a_number(tmp_path_factory, parts, cut, packed):
    tar, number, junk_bytes = Tar(), 0, 0
    for found, between in parts:
        for name, size, kind in found:
            number += 1  # no two members hold equal bytes
            tar.add(name, f"{number:06d}".encode() + b"." * size, kind)
        tar.end(between)
        junk_bytes += len(between)
    last = tar.members[-1][3]
    data = tar.data[: max(1, last - cut)] if cut else tar.data
    path = tmp_path_factory.mktemp("t") / "a.tar"
    path.write_bytes(gzip.compress(data) if packed else data)

    rows, seen = read(path)

    whole = [(name, body) for name, body, _, stop in tar.members if stop <= len(data)]
    assert sum_kind(seen, "member") == len(whole)
    files = [(name, body) for name, body in whole if len(body) > 1]
    assert seen["passed folder"] == sum(body == tarfile.DIRTYPE for _, body in whole)
    assert seen["passed member of a desktop system"] == sum(
        is_system_file(name) for name, body in whole if body != tarfile.DIRTYPE
    )
    pictures = [body for name, body in files if name.lower().endswith(IMAGES) and not is_system_file(name)]
    shown = [row.image for row in rows if row.image]
    assert len(set(shown)) == len(shown)
    assert set(shown) <= set(pictures)
    doubtful = sum(row.status == "truncated_tar" and "breaks off" in row.reason for row in rows)
    beside = sum(n for name, n in seen.items() if name.startswith("unread") and name.lower().endswith(IMAGES))
    assert len(pictures) - doubtful <= len(shown) + beside <= len(pictures)

    statuses = Counter(row.status for row in rows)
    told = sum(n for name, n in statuses.items() if name in ("truncated_tar", "unreadable_bytes")) - doubtful
    assert told == seen["unreadable ranges"]
    if cut is None:
        assert seen["unreadable bytes"] == junk_bytes
        assert not doubtful or parts[-1][1]  # behind foreign bytes at the end a caption may be lost
    else:
        inside = sum(min(stop, len(data)) - start for _, _, start, stop in tar.members if start < len(data))
        kept = sum(stop - start for _, _, start, stop in tar.members if stop <= len(data))
        behind = max((stop for *_, stop in tar.members if stop <= len(data)), default=0)
        padding = -behind % BLOCK
        mark = max(len(data) - behind - padding, 0) if inside == kept else 0
        cut_mark = mark if mark < 2 * BLOCK else 0  # the file ends inside the mark that ends an archive
        # of a member that is cut the bytes that are there, and whatever junk lies elsewhere
        assert inside - kept <= seen["unreadable bytes"] <= inside - kept + junk_bytes + padding + cut_mark


texts = st.text(max_size=8) | st.binary(max_size=6) | st.sampled_from(["a cat", " ", "", b"\xff", "\ud800", "a\0"])
values = st.recursive(
    texts | st.none() | st.floats() | st.integers() | st.booleans() | st.dictionaries(st.text(max_size=3), st.text()),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner),
    max_leaves=5,
)


def is_usable(value: object) -> bool:
    """The rule in other words: a text that UTF-8 can write, without zero bytes, and not blank; or a list with one."""
    if isinstance(value, list | tuple):
        return any(map(is_usable, value))
    try:
        marked = isinstance(value, bytes) and value[:2] in (b"\xff\xfe", b"\xfe\xff")  # of UTF-16, as Windows writes
        text = (
            value.decode("utf-16" if marked else "utf-8")
            if isinstance(value, bytes)
            else value.encode().decode()
            if isinstance(value, str)
            else ""
        )
    except UnicodeError:
        return False
    return "\0" not in text and bool(text.removeprefix("\ufeff" if isinstance(value, bytes) else "").strip())


@settings(max_examples=100, deadline=None)
@given(st.lists(values, min_size=1, max_size=8))
def test_random_caption_values_are_captions_or_counted_reasons(drawn):
    rows = iter([RawRow(f"k{n}", b"x", value) for n, value in enumerate(drawn)])
    found = [row for table in Ingest(3).make_tables(rows) for row in table.to_pylist()]
    assert len(found) == len(drawn)
    for value, row in zip(drawn, found):
        assert (row["status"], bool(row["reason"])) in (("ok", False), ("bad_caption", True))
        assert bool(row["caption"].strip()) == is_usable(value)
        absent = value is None or (isinstance(value, str | bytes) and not value.strip())
        assert row["status"] == "ok" if is_usable(value) else absent or row["status"] == "bad_caption" or "\ufeff"


def samples(first: int, count: int, suffix: str = "png") -> Iterator[tuple[str, bytes]]:
    for n in range(first, first + count):
        yield f"{n:05d}.{suffix}", png(n)
        yield f"{n:05d}.txt", f"picture {n}".encode()


def fill(tar: Tar, *found: tuple[str, bytes]) -> Tar:
    for name, data in found:
        tar.add(name, data)
    return tar


def write_tars(root: Path) -> dict[str, int]:
    """Joined, cut, padded, compressed under a plain name, with foreign members. Expected rows by status."""
    root.mkdir()
    joined = fill(Tar(), *samples(0, 3)).end(b"between two archives")
    fill(joined, *samples(3, 3)).add("._00000.png", b"z").add("d", b"", tarfile.DIRTYPE).end()
    (root / "joined.tar").write_bytes(joined.data)
    cut = fill(Tar(), *samples(10, 3))
    (root / "cut.tar").write_bytes(cut.data[: cut.members[-2][2] + BLOCK + 9])
    (root / "padded.tar").write_bytes(fill(Tar(), *samples(20, 2)).end().data + bytes(40 * BLOCK))
    (root / "packed.tar").write_bytes(gzip.compress(fill(Tar(), *samples(30, 2)).end().data))
    odd = fill(Tar(), *samples(40, 1), ("41.txt", b"alone"), ("42.png", b"no picture"), ("42.txt", b"x"))
    odd.add("43.png", b"", tarfile.SYMTYPE).add("44.png", png(44)).add("44.jpg", png(45)).add("44.json", b'{"a": 1}')
    (root / "odd.tar").write_bytes(odd.end().data)
    (root / "none.tar").write_bytes(b"no tar" * 200)
    # two pictures of 44, one of them read; its caption is missing
    return {"ok": 6 + 2 + 2 + 2 + 1, "unreadable_bytes": 1, "truncated_tar": 3, "no_image": 1, "corrupt": 1,
            "bad_name": 1, "bad_caption": 1}  # fmt: skip


def write_folder(root: Path) -> dict[str, int]:
    (root / "sub").mkdir(parents=True)
    for n, suffix in enumerate(("txt", "TXT", "caption", "text")):
        (root / f"{n}.png").write_bytes(png(100 + n))
        (root / f"{n}.{suffix}").write_text(f"picture {n}")
    (root / "4.png").write_bytes(png(104))
    (root / "4.json").write_text(json.dumps({"caption": ["one", "two"]}))
    (root / "5.png").write_bytes(png(105))
    (root / "5.json").write_text(json.dumps({"text": "a", "prompt": "b"}))
    (root / "6.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(range(1, 200)))
    (root / "7.png").write_bytes(png(107)[:-30])
    (root / "7.txt").write_text("cut short")
    (root / "8.png").write_bytes(png(108))  # nobody says what it shows
    (root / "9.png").write_bytes(png(109, (8, 200)))
    (root / "9.txt").write_text("narrow")
    (root / "gone.png").symlink_to("/nowhere.png")
    (root / "sub" / "a.png").write_bytes(png(110))
    lines = [{"file_name": "a.png", "text": "in a table"}, {"file_name": "b.png", "text": "not there"}]
    (root / "sub" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "notes.xml").write_text("<x/>")
    return {"ok": 6, "bad_caption": 2, "no_decoder": 1, "corrupt": 1, "unreadable": 2, "too_small": 1}


def write_tables(root: Path) -> dict[str, int]:
    root.mkdir()
    images = [[png(200)], [png(201), png(202)], [], None]
    pq.write_table(pa.table({"image": images, "caption": ["a", "b", "c", "d"]}), root / "lists.parquet")
    captions = [["x", "y"], [], None, ["z"]]
    table = pa.table({"image": [png(210 + n) for n in range(4)], "caption": captions, "key": pa.nulls(4)})
    pq.write_table(table, root / "captions.parquet")
    return {"ok": 3 + 2, "no_image": 2, "bad_caption": 2}


def write_coco(root: Path) -> dict[str, int]:
    for folder in ("annotations", "val2014"):
        (root / folder).mkdir(parents=True)
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(4)]
    said = [{"id": n, "image_id": n, "caption": f"picture {n}"} for n in range(3)]
    document = {"images": images, "annotations": said}
    (root / "annotations" / "captions_val2014.json").write_text(json.dumps(document))
    for n in (0, 1, 3):  # 2 is missing, 3 has no caption
        (root / "val2014" / f"{n}.jpg").write_bytes(png(300 + n))
    return {"ok": 2, "unreadable": 1, "bad_caption": 1}


def write_imagenet(root: Path) -> dict[str, int]:
    (root / "train" / "n01").mkdir(parents=True)
    (root / "train" / "n02").mkdir()
    (root / "val").mkdir()
    (root / "LOC_synset_mapping.txt").write_text("n01 tench, Tinca tinca\n")
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nv0,n01 1 2 3 4\n")
    for n, name in enumerate(("train/n01/a.JPEG", "train/n01/b.JPEG", "train/n02/no_name.JPEG", "val/v0.JPEG")):
        (root / name).write_bytes(png(400 + n))
    (root / "val" / "unlisted.JPEG").write_bytes(png(410))
    (root / "train" / "n01" / "empty.JPEG").write_bytes(b"")
    (root / "train" / "n01" / "gone.JPEG").symlink_to("/nowhere.JPEG")
    (root / "train" / "n01" / "._a.JPEG").write_bytes(b"\0\5\x16\7")
    return {"ok": 3, "bad_caption": 2, "corrupt": 1, "unreadable": 1}


def write_arrow(root: Path) -> dict[str, int]:
    """As save_to_disk of `datasets` writes it: a whole file, and one that breaks off in its second batch."""
    root.mkdir()
    kinds = {"image": {"_type": "Image"}, "caption": {"_type": "Value", "dtype": "string"}}
    (root / "dataset_info.json").write_text(json.dumps({"features": kinds}))
    images = [{"bytes": png(500), "path": None}, {"bytes": None, "path": None}, {"bytes": None, "path": "lost.png"}]
    whole = pa.table({"image": [*images, {"bytes": png(501), "path": "x"}], "caption": ["a", "b", "c", None]})
    cut = pa.table({"image": [{"bytes": png(510 + n), "path": None} for n in range(4)], "caption": ["d"] * 4})
    for name, table in (("data-00000-of-00002.arrow", whole), ("data-00001-of-00002.arrow", cut)):
        with pa.OSFile(str(root / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    data = (root / name).read_bytes()
    (root / name).write_bytes(data[: len(data) - 200])
    return {"ok": 1 + 2, "no_image": 1, "unreadable": 1, "bad_caption": 1, "truncated_arrow": 1}


def write_urls(root: Path) -> dict[str, int]:
    """No address here is asked: the scheme or the line is wrong."""
    root.mkdir()
    (root / "cc12m.tsv").write_text("ftp://a/b.jpg\ta caption\nno tab\n\nfile:///etc/passwd\tanother\n")
    return {"fetch_refused": 2, "no_image": 1}


WRITERS = {
    "wds": write_tars, "folder": write_folder, "parquet": write_tables, "coco": write_coco, "imagenet": write_imagenet,
    "hf": write_arrow, "cc12m": write_urls,
}  # fmt: skip


def test_rows_in_are_rows_out_rows_set_aside_and_bytes_told_over_all_inputs(tmp_path, caplog):
    assert WRITERS.keys() == SOURCES.keys()
    expected: Counter[str] = Counter()
    for kind, write in WRITERS.items():
        expected.update(write(tmp_path / kind))
    source = open_sources([f"{kind}:{tmp_path / kind}" for kind in WRITERS])
    pipeline = Pipeline(world(), str(tmp_path / "root"), source, workers=WorkerPool(0))
    with caplog.at_level(logging.INFO):
        statuses = pipeline.run_gate()

    found = count_by_status(statuses)
    assert found == expected
    assert sum(found.values()) == sum(pipeline.state.counts["ingest"].values())

    # members by tarfile, which stops at the first end mark: each archive by itself
    with tarfile.open(tmp_path / "wds" / "padded.tar") as archive:
        padded = len(archive.getnames())
    tars = 2 * 6 + 2 + 2 * 2 + padded + 2 * 2 + len(("40.png", "40.txt", "41", "42", "42", "43", "44", "44", "44"))
    folder = [path for path in (tmp_path / "folder").rglob("*") if not path.is_dir()]
    table_files = 1  # metadata.jsonl, which is no member
    in_tables = sum(pq.read_metadata(path).num_rows for path in (tmp_path / "parquet").iterdir())
    in_arrow, of_urls = 4 + 2, 4
    assert pipeline.seen["record"] == in_tables + in_arrow + of_urls
    in_folder = len(folder) - table_files - len(["notes.xml"]) + len(["b.png, which only the table names"])
    assert sum_kind(pipeline.seen, "member") == tars + in_folder + len(["of COCO"] * 4 + ["of ImageNet"] * 7)
    assert pipeline.seen["unread .png"] + pipeline.seen["unread .jpg"] == 1
    assert pipeline.seen["passed folder"] == pipeline.seen["passed member of a desktop system"] == 1

    # one figure, in the log at the end of ingest
    assert "unreadable_bytes" in caplog.text
    assert f"{sum(expected.values())} rows read" in caplog.text
    assert f"{pipeline.seen['unreadable bytes']:,} bytes in 5 ranges are unreadable" in caplog.text
    between, junk, cut = len(b"between two archives"), 1200, BLOCK + 9
    arrow = count_behind_first_batch(tmp_path / "hf" / "data-00001-of-00002.arrow")
    assert pipeline.seen["unreadable bytes"] == between + junk + cut + 40 * BLOCK + 2 * BLOCK + arrow

    # a run that finds everything done says the same
    again = Pipeline(world(), str(tmp_path / "root"), source, workers=WorkerPool(0))
    again.run_gate()
    assert again.seen == pipeline.seen


def count_behind_first_batch(path: Path) -> int:
    """Bytes of an Arrow stream behind its first batch: a marker and length, metadata, body, as the format says."""
    data, at = path.read_bytes(), 0
    for _ in ("schema", "batch"):
        message = pa.ipc.read_message(data[at:])
        at += 8 + int.from_bytes(data[at + 4 : at + 8], "little") + (len(message.body) if message.body else 0)
    return len(data) - at


def test_a_damaged_page_of_a_table_costs_its_rows_and_each_is_told(tmp_path):
    path = tmp_path / "t.parquet"
    table = pa.table({"image": [png(n) for n in range(30)], "caption": ["x"] * 30})
    pq.write_table(table, path, row_group_size=10, compression="zstd", write_page_checksum=True)
    column = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start + 40 : start + column.total_compressed_size] = bytes(column.total_compressed_size - 40)
    path.write_bytes(bytes(data))
    rows, seen = read_source(f"parquet:{path}")
    assert Counter(row.status for row in rows) == {"ok": 20, "unreadable": 10}
    assert all("row group 1 is readable up to row 0" in row.reason for row in rows if row.status != "ok")
    assert len({row.key for row in rows}) == 30
    assert seen == {"record": 30}


def test_two_texts_and_two_pictures_of_one_sample_are_seen(tmp_path):
    tar = fill(Tar(), ("a.jpg.txt", b"one"), ("a.txt", b"two"), ("a.jpg", png()), ("a.png", png(1)), ("a.cls", b"7"))
    (tmp_path / "a.tar").write_bytes(tar.end().data)
    rows, seen = read(tmp_path / "a.tar")
    assert len(rows) == 1
    assert sum_kind(seen, "member") == 5
    assert sum_kind(seen, "unread") == 3


@pytest.mark.parametrize(
    ("seen", "statuses", "words"),
    [
        ({}, {"ok": 3}, ["3 rows read: 3 ok"]),
        (
            {"record": 2}, {"ok": 1, "no_image": 1},
            ["2 rows read: 1 ok, 1 set aside (1 no_image)", "2 records of tables"],
        ),
        (
            {"member .jpg": 2, "member .cls": 1, "unread .cls": 1, "unreadable bytes": 9, "unreadable ranges": 1},
            {"ok": 2, "truncated_tar": 1},
            ["3 rows read: 2 ok, 1 set aside (1 truncated_tar); 9 bytes in 1 ranges are unreadable",
             "3 files or members seen: 2 .jpg, 1 .cls", "not read 1 .cls"],
        ),
    ],
)  # fmt: skip
def test_the_figure_reads_so(seen, statuses, words):
    assert format_seen(seen, statuses) == words


def test_lines_of_a_table_of_urls_are_records_and_blank_ones_are_told(tmp_path):
    with (tmp_path / "cc12m.tsv").open("w") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([["no-tab"], [], ["neither"]])
    rows, seen = read_source(f"cc12m:{tmp_path}/cc12m.tsv")
    assert [row.status for row in rows] == ["no_image"] * 2
    assert seen == {"record": 3, "passed blank line": 1}
