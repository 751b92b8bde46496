"""Tars of every kind: each byte is a member, a told gap or padding; samples are grouped whatever their names."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.sources.registry import open_source
from data_pipeline.sources.samples import Sample, SystemFile, group_members
from data_pipeline.sources.tar import BLOCK, MAX_PADDING, Gap, Member, read_tar

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def png(color: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 40), color).save(out, "PNG")
    return out.getvalue()


def make_tar(members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def make_samples(start: int, count: int) -> list[tuple[str, bytes]]:
    return [
        (f"{n:05d}.{suffix}", data)
        for n in range(start, start + count)
        for suffix, data in (("png", png()), ("txt", b"x"))
    ]


def read(data: bytes, max_bytes: int = 2**20) -> tuple[list[Member], list[Gap]]:
    items = list(read_tar(io.BytesIO(data), max_bytes=max_bytes))
    return [item for item in items if isinstance(item, Member)], [item for item in items if isinstance(item, Gap)]


def check_every_byte(data: bytes, members: list[Member], gaps: list[Gap]) -> None:
    """What is neither a member (header, data, filling) nor a gap is zero."""
    rest = bytearray(data)
    for member in members:
        end = -(-(member.info.offset_data + member.info.size) // BLOCK) * BLOCK
        rest[member.offset : end] = bytes(min(end, len(data)) - member.offset)
    for gap in gaps:
        rest[gap.offset : gap.offset + gap.length] = bytes(gap.length)
    assert not any(rest)


def rows(tmp_path: Path, data: bytes, name: str = "a.tar") -> list:
    (tmp_path / name).write_bytes(data)
    source = open_source(f"wds:{tmp_path}")
    return [row for unit in source.list_units() for row in source.read_rows(unit)]


# A member of its own content, so that two never look alike. Junk holds no header: its bytes are letters.
names = st.text("abcdefgh0123456789", min_size=1, max_size=160)
contents = st.binary(min_size=0, max_size=3000)
archives = st.lists(st.tuples(names, contents), min_size=1, max_size=4)
junk = st.text("xyz", min_size=1, max_size=2000).map(str.encode)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(archives, st.sampled_from(FORMATS), junk | st.just(b"")), min_size=1, max_size=4),
    st.sampled_from([bytes, gzip.compress, bz2.compress, lzma.compress]),
)
def test_joined_archives_with_junk_between_give_every_member(parts, compress):
    data, expected, junk_bytes = b"", [], 0
    for members, format, between in parts:
        data += make_tar(members, format) + between
        expected += members
        junk_bytes += len(between)
    found, gaps = read(compress(data))
    assert [(member.info.name, member.data) for member in found] == expected
    assert sum(gap.length for gap in gaps) == junk_bytes
    check_every_byte(data, found, gaps)


@settings(max_examples=100, deadline=None)
@given(archives, st.sampled_from(FORMATS), st.data())
def test_a_tar_cut_anywhere_gives_whole_members_and_tells_the_rest(members, format, draw):
    whole = make_tar(members, format)
    end = max(offset for offset in range(len(whole)) if whole[offset]) // BLOCK * BLOCK + BLOCK
    data = whole[: draw.draw(st.integers(1, end))]
    found, gaps = read(data)
    full, _ = read(whole)
    ends = [member.info.offset_data + member.info.size for member in full]
    assert [m.data for m in found] == [m.data for m, stop in zip(full, ends, strict=True) if stop <= len(data)]
    assert gaps
    assert gaps[-1].cut
    check_every_byte(data, found, gaps)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(names, contents.filter(len)), min_size=6, max_size=8), st.data())
def test_a_hole_of_zeros_costs_only_what_lies_in_it(members, draw):
    members = [(f"{n}-{name}", data.rstrip(b"\0") + b"." * 5000 + b"!") for n, (name, data) in enumerate(members)]
    whole = make_tar(members)
    full, _ = read(whole)
    first = draw.draw(st.integers(0, full[-1].info.offset_data + 4000))
    length = draw.draw(st.integers(MAX_PADDING + 2 * BLOCK, len(whole)))
    data = whole[:first] + bytes(len(whole[first : first + length])) + whole[first + length :]
    found, gaps = read(data)
    good = [m for m in found if not m.damage]
    touched = [m for m in full if m.offset < first + length and m.info.offset_data + m.info.size > first]
    untouched = [m.info.name for m in full if m not in touched]
    assert set(untouched) <= {m.info.name for m in good}
    # beside these, at most one member is taken for good: one whose header stands and whose last byte lies behind
    assert len(good) <= len(untouched) + 1
    assert len(gaps) + sum(bool(m.damage) for m in found) >= 1 or len(good) == len(full)


def test_padding_of_any_usual_record_size_is_no_gap():
    for pad in (0, BLOCK, 9 * BLOCK, 18 * BLOCK):
        members, gaps = read(make_tar(make_samples(0, 1)).rstrip(b"\0") + bytes(BLOCK) + bytes(2 * BLOCK + pad))
        assert len(members) >= 1
        assert not gaps or pad == 0
    assert read(bytes(tarfile.RECORDSIZE)) == ([], [])


def test_other_archives_are_named():
    members, (gap,) = read(make_tar(make_samples(0, 1)) + b"PK\x03\x04" + b"q" * 100)
    assert len(members) == 2
    assert "zip" in gap.reason
    assert "104 bytes from byte 10,240 on" in gap.reason


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_compression_is_seen_by_content_not_by_name(tmp_path, name, compress):
    found = rows(tmp_path, compress(make_tar(make_samples(0, 4))), name)
    assert [row.status for row in found] == ["ok"] * 4


def test_joined_gzip_members_and_equal_keys_in_joined_archives_keep_every_row(tmp_path):
    first, second = (
        make_tar(make_samples(0, 3)),
        make_tar([(n, d if n.endswith("png") else b"y") for n, d in make_samples(0, 3)]),
    )
    found = rows(tmp_path, gzip.compress(first) + gzip.compress(second), "a.tar.gz")
    assert [(row.key, row.caption) for row in found] == [
        ("00000", b"x"), ("00001", b"x"), ("00002", b"x"), ("00000#1", b"y"), ("00001#1", b"y"), ("00002#1", b"y"),
    ]  # fmt: skip


def test_the_second_half_as_zeros_is_told_and_the_row_at_its_edge_is_not_trusted(tmp_path):
    whole = make_tar([(f"{n}.{suffix}", data) for n in range(8)
                      for suffix, data in (("jpg", bytes(range(1, 256)) * 40), ("txt", b"x"))])  # fmt: skip
    found = rows(tmp_path, whole[: len(whole) // 2] + bytes(len(whole) // 2))
    statuses = [row.status for row in found]
    assert statuses[:3] == ["ok"] * 3
    assert statuses[-1] == "truncated_tar"
    assert "byte" in found[-1].reason
    assert all(not row.image or row.image == bytes(range(1, 256)) * 40 for row in found if row.status == "ok")


def test_droppings_of_desktop_systems_are_passed_over(tmp_path):
    members = []
    for name, data in make_samples(0, 3):
        members += [
            (f"._{name}", b"\0\5\x16\7"),
            (name, data),
            (f"__MACOSX/._{name}", b"z"),
            (f"d/@eaDir/{name}", b"z"),
        ]
    members += [(".DS_Store", b"z"), ("x/Thumbs.db", b"z"), ("desktop.ini", b"z")]
    assert [(row.key, row.status) for row in rows(tmp_path, make_tar(members))] == [
        (f"{n:05d}", "ok") for n in range(3)
    ]


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["track.00.jpg", "track.00.txt", "track.01.jpg", "track.01.txt"], ["track.00", "track.01"]),
        (["img_0.v2.jpg", "img_0.v2.txt", "img_1.v2.jpg", "img_1.v2.txt"], ["img_0.v2", "img_1.v2"]),
        (["22.05.png", "22.05.txt", "22.06.png", "22.06.json"], ["22.05", "22.06"]),
        (["a.jpg", "a.jpg.txt", "b.jpg", "b.jpg.json"], ["a", "b"]),
        (["0.depth.png", "0.jpg", "0.seg.png", "0.txt"], ["0"]),
        (["0.JPG", "0.TXT"], ["0"]),
        (["a.jpg", "a.txt", "a.v2.jpg", "a.v2.txt"], ["a", "a.v2"]),
        (["d/0.jpg", "d/0.txt", "e/0.jpg", "e/0.txt"], ["d/0", "e/0"]),
        ([f"t.{n:03d}.jpg" for n in range(200)], [f"t.{n:03d}" for n in range(200)]),
    ],
)
def test_names_with_dots_become_the_samples_that_people_mean(names, keys):
    members, _ = read(make_tar([(name, name.encode()) for name in names]))
    samples = [item for item in group_members(members) if isinstance(item, Sample)]
    assert [sample.key for sample in samples] == keys
    assert sum(len(sample.parts) for sample in samples) == len(names)
    for sample in samples:
        image = next(data for suffix, data in sample.parts.items() if suffix in ("jpg", "png"))
        assert image.decode().lower().startswith(sample.key.lower())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "a.0", "a.1", "d/a"]),
                          st.sampled_from(["jpg", "txt", "json", "seg.png", "cls", "npy"])), max_size=14))  # fmt: skip
def test_no_member_is_lost_or_used_twice(drawn):
    names = [f"{stem}.{suffix}" for stem, suffix in drawn]
    members, _ = read(make_tar([(name, f"{n}".encode()) for n, name in enumerate(names)]) if names else b"")
    items = list(group_members(members))
    assert not any(isinstance(item, SystemFile) for item in items)
    used = [data for item in items for data in item.parts.values()]
    assert sorted(used) == sorted(f"{n}".encode() for n in range(len(names)))


def test_a_caption_in_json_and_members_that_are_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.sources.webdataset.MAX_IMAGE_BYTES", 5000)
    members = [
        ("a.png", png()),
        ("a.json", json.dumps({"caption": "c"}).encode()),
        ("b.png", bytes(6000)),
        ("b.txt", b"x"),
    ]
    found = rows(tmp_path, make_tar(members))
    assert sorted((row.key, row.status, row.caption) for row in found) == [
        ("a", "ok", "c"), ("b", "no_image", b"x"), ("b.png", "too_large", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "good", "told", "lost"),
    [
        (lambda a, b: gzip.compress(a) + b, 6, [], 0),
        (lambda a, b: gzip.compress(a) + bytes(700) + bz2.compress(b), 6, [], 0),
        (lambda a, b: lzma.compress(a) + bz2.compress(b) + bytes(512), 6, [], 0),
        (lambda a, b: bz2.compress(a) + b"junk" * 100, 3, ["400 bytes from byte 10,240 on"], 400),
        (lambda a, b: gzip.compress(gzip.compress(a)), 0, ["compressed data: unpack it first"], None),
        (lambda a, b: b"", 0, ["an empty file"], 0),
    ],
)  # fmt: skip
def test_joined_parts_are_unpacked_whatever_packed_them_and_the_rest_is_counted(tmp_path, data, good, told, lost):
    first, second = make_tar(make_samples(0, 3)), make_tar(make_samples(3, 3))
    found = rows(tmp_path, data(first, second))
    assert [row.status for row in found].count("ok") == good
    others = [row for row in found if row.status != "ok"]
    assert len(others) == len(told)
    assert all(words in row.reason for words, row in zip(told, others))
    _, gaps = read(data(first, second))
    assert sum(gap.length for gap in gaps) == lost if lost is not None else sum(gap.length for gap in gaps) > 50


def test_what_lies_behind_damage_in_a_compressed_file_is_counted(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (6, 5000), np.uint8)  # does not compress
    first, second = (
        gzip.compress(
            make_tar([(f"{n}.{end}", data) for n in part for end, data in (("png", noise[n].tobytes()), ("txt", b"x"))])
        )
        for part in (range(3), range(3, 6))
    )
    damaged = first[:8000] + b"\xff" * 300 + first[8300:] + second
    found = rows(tmp_path, damaged)
    assert found[0].image == noise[0].tobytes()
    _, (gap,) = read(damaged)
    assert "packed bytes are not read" in gap.reason
    assert len(first) + len(second) - 8000 - 1024 - 300 <= gap.length <= len(damaged)
    assert [row.status for row in found[1:]].count("truncated_tar") >= 1


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_hard_link_has_the_data_of_its_target_and_other_links_are_told(tmp_path, pack):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, target
            archive.addfile(info, io.BytesIO(data))

        add("my photos", kind=b"V")  # tar -V
        add("0.png", b"picture")
        add("0.txt", b"a dog")
        add("1.png", b"another")
        add("1.txt", kind=tarfile.LNKTYPE, target="0.txt")
        add("2.png", kind=tarfile.LNKTYPE, target="elsewhere.png")
        add("3.png", kind=tarfile.SYMTYPE, target="0.png")
    found = rows(tmp_path, pack(out.getvalue()))
    assert [(row.key, row.image, row.caption) for row in found if row.status == "ok"] == [
        ("0", b"picture", b"a dog"), ("1", b"another", b"a dog"),
    ]  # fmt: skip
    assert [(row.status, row.reason.split(" in /")[0]) for row in found if row.status != "ok"] == [
        ("bad_name", "a hard link to no member before it"),
        ("bad_name", "a symbolic link: `tar -h` writes what it points to"),
    ]


@pytest.mark.parametrize(("zeros", "told"), [(100, 1), (512, 1), (9000, 1), (1024, 0), (10240, 0)])
def test_a_file_of_zeros_alone_is_an_empty_archive_or_told(zeros, told):
    gaps = list(read_tar(io.BytesIO(bytes(zeros)), max_bytes=10**6))
    assert [gap.length for gap in gaps] == [zeros] * told
    assert all(gap.cut for gap in gaps)


def test_zeros_of_a_member_that_no_row_reads_cost_no_row_and_a_damaged_table_no_tar(tmp_path):
    members = [("0001.png", b"picture"), ("0001.txt", b"a caption"), ("0001.mask.raw", b"x" + bytes(5000))]
    (tmp_path / "00000.tar").write_bytes(make_tar(members))
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 and then nothing")
    source = open_source(f"wds:{tmp_path}")
    (unit,) = source.list_units()
    rows = list(source.read_rows(unit))
    assert [(row.key, row.status) for row in rows] == [("0001", "ok"), ("00000.parquet", "unreadable")]
    assert "not a readable parquet file" in rows[1].reason


def test_parts_of_a_sample_that_lie_apart_name_the_cause(tmp_path):
    apart = [(f"{n}.{suffix}", data) for suffix, data in (("png", png()), ("txt", b"a cat")) for n in range(2)]
    (tmp_path / "a.tar").write_bytes(make_tar(apart))
    source = open_source(f"wds:{tmp_path}")
    rows = [row for unit in source.list_units() for row in source.read_rows(unit)]
    assert [row.status for row in rows if not row.image] == ["no_image"] * 2
    assert all("tar them with --sort=name" in row.reason for row in rows if not row.image)
    (tmp_path / "a.tar").write_bytes(make_tar(sorted(apart)))
    rows = [row for unit in source.list_units() for row in source.read_rows(unit)]
    assert [(row.image is not None, row.caption) for row in rows] == [(True, b"a cat")] * 2
