"""Captions as people write them down: encodings, names and types of fields, tables with odd paths; counted damage."""

import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.sources.captions import parse_fields, read_caption
from data_pipeline.sources.ingest import Ingest
from data_pipeline.sources.registry import SourceOptions, open_source
from data_pipeline.sources.seen import Seen
from infra import storage
from infra.errors import UserError


def read(text: str, options: SourceOptions = SourceOptions()) -> tuple[dict[str, tuple[str, str, str]], Seen]:  # noqa: B008
    """(status, caption, reason) by source, and what was seen. Images are bytes that nobody decodes here."""
    source, seen, found = open_source(text, options), Seen(), {}
    for unit in source.list_units():
        for table in Ingest(100).make_tables(source.read_rows(unit)):
            for row in table.to_pylist():
                assert row["source"] not in found
                found[row["source"]] = row["status"], row["caption"], row["reason"]
        seen.update(unit.seen)
    return found, seen


def fill(root: Path, files: dict[str, bytes | str]) -> str:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return f"folder:{root}"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le+bom", "utf-16-be+bom"])
@pytest.mark.parametrize("suffix", ["txt", "TXT", "caption", "json", "png.json", "png.Text"])
def test_a_byte_order_mark_says_how_a_caption_is_written(tmp_path, encoding, suffix):
    words = "a caf\u00e9\r\n"
    text = json.dumps({"Caption": words}) if suffix.endswith("json") else words
    plain, _, mark = encoding.partition("+")
    data = ("\ufeff" + text if mark else text).encode(plain)
    found, _ = read(fill(tmp_path, {"a.png": b"x", f"a.{suffix}": data}))
    assert found == {"a.png": ("ok", words, "")}


@pytest.mark.parametrize(
    ("held", "caption", "problem"),
    [
        ({"caption": "a", "text": "b"}, "a", ""),
        ({"prompt": "b", "seed": 4}, "b", ""),
        ({"seed": 4}, "", ""),
        ({"CAPTION": "up"}, "up", ""),
        ({"Captions": ["one"], "text": "other"}, "one", ""),
        ({"captions": ["many"], "Caption": "one"}, "one", ""),
        ({"caption": None, "Prompt": "p"}, "p", ""),
        ({"text": "a", "prompt": "b"}, "", "text and prompt may each be the caption"),
        ({"caption": True}, "", "of type bool"),
        ({"caption": {"en": "a"}}, "", "a struct of en"),
        ({"caption": [[{"raw": "a"}], "b"]}, "b", ""),
        (["a"], "a", ""),
        ("plain", "plain", ""),
        ([{"caption": "a"}], "", "a struct of caption"),
    ],
)
def test_json_beside_a_picture(held, caption, problem):
    said = read_caption(parse_fields(json.dumps(held).encode())[1], "k")
    assert said.text == caption
    assert problem in said.problem
    assert bool(said.problem) == bool(problem)
    assert "no JSON" in read_caption(parse_fields(b"{caption: x}")[1], "k").problem


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("s/a.png", ""), ("./s/a.png", ""), ("s\\a.png", ""), (".\\s\\a.png", ""), ("{root}/s/a.png", ""),
        ("../s/a.png", "t/"), ("a.png", "s/"), ("s//a.png", ""), ("t/../s/a.png", ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv", "Metadata.CSV", "metadata.parquet"])
def test_paths_of_tables_mean_the_file_that_they_name(tmp_path, monkeypatch, name, folder, table):
    (tmp_path / folder).mkdir(exist_ok=True)
    uri = fill(tmp_path, {"s/a.png": b"x", f"{folder}{table}": b""})
    name = name.format(root=tmp_path)
    path = tmp_path / folder / table
    if table.endswith("parquet"):
        pq.write_table(pa.table({"file_name": [name], "text": ["a dog"]}), path)
    elif table.endswith("jsonl"):
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"file_name": name, "text": "a dog"}).encode() + b"\r\n\r\n")
    else:
        path.write_bytes(f"file_name,text\r\n{name},a dog\r\n".encode("utf-16"))
    expected = {"s/a.png": ("ok", "a dog", "")}
    assert read(uri)[0] == expected
    monkeypatch.chdir(tmp_path.parent)
    assert read(f"folder:{tmp_path.name}")[0] == expected
    assert read(f"folder:./{tmp_path.name}/")[0] == expected


def test_of_several_tables_the_nearest_one_counts_and_pictures_elsewhere_are_read(tmp_path):
    (tmp_path / "far.png").write_bytes(b"far")
    lines = [{"file_name": "s/a.png", "text": "far"}, {"file_name": f"{tmp_path}/far.png", "text": "outside"}]
    root = tmp_path / "in"
    uri = fill(
        root,
        {
            "s/a.png": b"x", "metadata.jsonl": "\n".join(map(json.dumps, lines)),
            "s/metadata.jsonl": json.dumps({"file_name": "a.png", "text": "near"}),
        },
    )  # fmt: skip
    found, _ = read(uri)
    assert found == {"s/a.png": ("ok", "near", ""), f"{tmp_path}/far.png": ("ok", "outside", "")}


def test_values_of_several_types_are_judged_row_by_row_and_long_cells_are_read(tmp_path):
    lines = [{"file_name": f"{n}.png", "text": text} for n, text in enumerate((5, "words", None, ["x"]))]
    uri = fill(
        tmp_path / "a", {f"{n}.png": b"x" for n in range(4)} | {"metadata.jsonl": "\n".join(map(json.dumps, lines))}
    )
    assert [(row[0], row[1]) for row in read(uri)[0].values()] == [
        ("bad_caption", ""), ("ok", "words"), ("ok", ""), ("ok", "x"),
    ]  # fmt: skip
    long = "x " * 100_000
    uri = fill(tmp_path / "b", {"a.png": b"x", "metadata.csv": f"file_name,text\na.png,{long}\n"})
    assert read(uri)[0]["a.png"][1] == long
    uri = fill(tmp_path / "c", {"a.png": b"x", "metadata.csv": "file_name;text\na.png;x\n"})
    with pytest.raises(UserError, match="no column file_name; it has file_name;text"):
        read(uri)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("captions.json", "1 .json (captions.json)"),
        ("labels/a.txt", "1 .txt (a.txt)"),
        ("all.tsv", "1 .tsv (all.tsv)"),
        ("i/a.xml", "1 .xml (a.xml)"),
    ],
)
def test_captions_in_a_layout_that_is_not_read_are_named(tmp_path, name, told, caplog):
    read(fill(tmp_path, {"i/a.png": b"x", name: "{}"}))
    assert "1 of 1 images have no caption. Read are NAME.txt" in caplog.text
    assert f"found beside the images: {told}" in caplog.text


def test_a_link_to_itself_is_passed_over_and_an_image_of_that_kind_is_told(tmp_path):
    uri = fill(tmp_path, {"a.png": b"x", "a.txt": "words"})
    (tmp_path / "me").symlink_to("me")
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "round.png").symlink_to("round.png")
    found, _ = read(uri)
    assert {name: status for name, (status, *_) in found.items()} == {"a.png": "ok", "round.png": "unreadable"}
    assert storage.list_files(str(tmp_path)) == [f"{tmp_path}/{name}" for name in ("a.png", "a.txt")]


def test_a_table_that_breaks_off_holds_up_no_other_and_its_bytes_are_counted(tmp_path):
    whole, cut = tmp_path / "whole.parquet", tmp_path / "cut.parquet"
    pq.write_table(pa.table({"image": [b"x"], "CAPTION": ["a"]}), whole)
    cut.write_bytes(whole.read_bytes()[:-9])
    (tmp_path / "._whole.parquet").write_bytes(b"\0\5\x16\7")
    found, seen = read(f"parquet:{tmp_path}")
    assert sorted(status for status, *_ in found.values()) == ["ok", "unreadable"]
    assert seen["unreadable bytes"] == os.path.getsize(cut)
    assert [one.name for one in open_source(f"parquet:{tmp_path}").list_fields()] == ["image", "CAPTION"]  # type: ignore[attr-defined]


def test_addresses_in_an_image_column_are_rows_that_say_so(tmp_path):
    pq.write_table(
        pa.table({"image": ["https://a/b.png", "c.png", None], "caption": ["x", "y", "z"]}), tmp_path / "t.parquet"
    )
    (tmp_path / "c.png").write_bytes(b"x")
    found, _ = read(f"parquet:{tmp_path}")
    assert [status for status, *_ in found.values()] == ["no_image", "ok", "no_image"]
    assert "--fetch-urls fetches some" in found["0000-000000"][2]
    pq.write_table(pa.table({"image_url": ["ftp://a/b.png"], "caption": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="holds urls, not images"):
        read(f"parquet:{tmp_path}")
    found, _ = read(f"parquet:{tmp_path}", SourceOptions(fetch_urls=True))
    assert [status for status, *_ in found.values()] == ["fetch_refused"]


def test_a_json_file_without_a_caption_hides_no_table_and_its_fields_are_kept(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"picture")
        (tmp_path / f"{number}.json").write_text(json.dumps({"url": f"http://a/{number}", "id": number}))
    (tmp_path / "2.json").write_text('{"caption": "of the file beside"}')
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"of the table {number}"}) for number in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    source = open_source(f"folder:{tmp_path}")
    rows = [row for unit in source.list_units() for row in source.read_rows(unit)]
    said = {row.key: row.caption for row in rows}
    assert said == {"0.png": "of the table 0", "1.png": "of the table 1", "2.png": "of the file beside"}
    assert rows[0].info == {"url": "http://a/0", "id": 0}


@pytest.mark.parametrize("kind", ["folder", "wds"])
def test_another_field_of_a_json_file_is_the_caption_where_it_is_asked_for(tmp_path, kind):
    fields = json.dumps({"alt_text": "a red fox", "width": 8, "page": "Foxes"})
    place = fill(tmp_path / "own", {"a.png": b"1", "a.json": fields, "b.png": b"2", "b.json": '{"page": "x"}'})
    if kind == "wds":
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            tar.add(tmp_path / "own", ".")
        place = f"wds:{tmp_path}/0.tar"
    guessed, _ = read(place)
    assert all(status == "bad_caption" for status, *_ in guessed.values())
    assert sum("no field is named caption, but alt_text, page" in reason for *_, reason in guessed.values()) == 1
    asked, _ = read(place, SourceOptions(caption_column="alt_text"))
    assert [caption for status, caption, _ in asked.values() if status == "ok"] == ["a red fox"]
    assert any("no field alt_text, but page" in reason for *_, reason in asked.values())
    labels = {unit.id for words in ("", "alt_text") for unit in
              open_source(place, SourceOptions(caption_column=words)).list_units()}  # fmt: skip
    assert len(labels) == 2


@pytest.mark.parametrize(("text", "caption"), [(" \n", "a red fox"), ("a fox", "a fox")])
def test_where_a_text_file_is_blank_the_json_file_beside_it_counts(tmp_path, text, caption):
    place = fill(tmp_path, {"a.png": b"1", "a.txt": text, "a.json": '{"caption": "a red fox"}'})
    found, _ = read(place)
    assert found == {"a.png": ("ok", caption, "")}
