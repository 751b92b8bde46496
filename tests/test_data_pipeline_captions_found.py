"""Where captions are found and what counts as one: sidecars, tables, columns, values of every type."""

import io
import json
import logging
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_data_pipeline_tar import png

from data_pipeline.sources.captions import choose_caption_column, read_caption
from data_pipeline.sources.ingest import Ingest
from data_pipeline.sources.registry import open_source
from data_pipeline.sources.source import SourceOptions
from data_pipeline.stages.columns import Column, read_part
from infra.errors import UserError


def ingest(tmp_path, text: str, **options) -> list[dict]:
    source = open_source(text, SourceOptions(**options))
    column = Column(str(tmp_path / "root"), "ingest", "f" * 16)
    found = []
    for unit in source.list_units():
        manifest, _ = Ingest(1000).run(source, unit, column)
        found += [row for part in manifest.parts for row in read_part(column.root, part).to_pylist()]
    return found


def captions(rows: list[dict]) -> list[tuple[str, str]]:
    return [(row["status"], row["caption"]) for row in rows]


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)
no_texts = (
    st.integers() | st.floats() | st.booleans() | st.dictionaries(texts, texts, min_size=1) | st.just([]) | st.just(())
)


@given(texts, texts)
def test_a_text_is_its_own_caption_in_any_wrapping(text, key):
    for value in (text, text.encode(), text.encode("utf-8-sig"), [text], (text, None), [None, text], [[text]]):
        said = read_caption(value, key)
        assert (said.text.lstrip("\ufeff"), said.problem) == (text.lstrip("\ufeff"), "")


@given(st.lists(texts, min_size=2, max_size=6), texts)
def test_of_several_texts_the_key_draws_one_and_all_are_kept(many, key):
    said = read_caption(many, key)
    assert said.text in many
    assert said.all == tuple(many)
    assert said == read_caption(list(many), key)


def test_keys_draw_different_ones():
    many = [f"caption {n}" for n in range(4)]
    drawn = [read_caption(many, str(key)).text for key in range(400)]
    assert all(60 < drawn.count(text) < 140 for text in many)


@given(no_texts)
def test_what_is_no_text_is_never_trained_on(value):
    said = read_caption(value, "k")
    assert said.text == ""
    assert said.problem


@pytest.mark.parametrize(
    "value", [b"\xfe\xfe", b"\xff\xfea", "\ud800", "a\0b", b"\0\0\0", math.nan, {"en": "x"}, 7, True, [3], [{}]]
)
def test_values_that_are_no_captions_say_why(value):
    assert read_caption(value, "k").problem


def test_none_and_empty_are_no_caption_and_no_mistake():
    for value in (None, "", b"", "  "):
        assert read_caption(value, "k").text.strip() == read_caption(value, "k").problem == ""


STRING, LIST, STRUCT = pa.string(), pa.list_(pa.string()), pa.struct({"en": pa.string()})


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ({"caption": STRING, "text": STRING}, "caption"),
        ({"captions": LIST, "title": STRING}, "captions"),
        ({"text": pa.large_string(), "url": STRING}, "text"),
        ({"TEXT": STRING, "id": pa.int64()}, "TEXT"),
        ({"caption": pa.dictionary(pa.int32(), STRING)}, "caption"),
        ({"caption": pa.null(), "url": STRING}, "caption"),
        ({"Text": pa.large_string(), "n": pa.int8()}, "Text"),
        ({"captions": pa.list_(pa.list_(STRING))}, "captions"),
    ],
)
def test_the_caption_column_is_known_by_name_and_type(types, expected):
    assert choose_caption_column(types, "", "t") == expected


@pytest.mark.parametrize(
    ("types", "words"),
    [
        ({"title": STRING, "alt": STRING}, "candidates: title .string., alt"),
        ({"text": STRING, "prompt": STRING}, "text and prompt may each be"),
        ({"caption": STRUCT, "title": STRING}, "caption is of type struct.*candidates: title"),
        ({"caption": pa.float64(), "url": STRING}, "caption is of type double"),
        ({"caption": STRING, "captions": LIST}, "caption and captions may each be"),
        ({"caption": STRING, "Caption": STRING}, "caption and Caption may each be the caption"),
        ({"id": pa.int64()}, "none of text"),
    ],
)
def test_a_guess_is_refused_with_the_candidates(types, words):
    with pytest.raises(UserError, match=words):
        choose_caption_column(types, "", "t")
    for name, kind in types.items():
        if kind in (STRING, LIST):
            assert choose_caption_column(types, name, "t") == name


@pytest.mark.parametrize(
    "name", ["a.txt", "a.TXT", "a.caption", "a.text", "a.png.txt", "a.json", "a.png.json", "a.png.caption"]
)
def test_a_sidecar_of_any_name_is_read(tmp_path, name):
    (tmp_path / "F").mkdir()
    (tmp_path / "F" / "a.png").write_bytes(png())
    said = json.dumps({"caption": "a red square", "seed": 1}) if name.endswith("json") else "a red square"
    (tmp_path / "F" / name).write_text(said)
    assert captions(ingest(tmp_path, f"folder:{tmp_path}/F")) == [("ok", "a red square")]


def write_metadata(path, rows: list[dict]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif path.suffix == ".csv":
        path.write_text("file_name,text\n" + "\n".join(f'{row["file_name"]},"{row["text"]}"' for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_tables_of_the_imagefolder_layout_are_read_in_their_folder_and_above(tmp_path, suffix):
    for folder in ("F/train/x", "F/val"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("train/0.png", "train/x/1.png", "val/2.png", "val/3.png"):
        (tmp_path / "F" / name).write_bytes(png())
    rows = [{"file_name": "0.png", "text": "zero"}, {"file_name": "x/1.png", "text": "one, with a comma"}]
    write_metadata(tmp_path / "F" / "train" / f"metadata.{suffix}", rows)
    rows = [{"file_name": "val/2.png", "text": "two"}, {"file_name": "val/3.png", "text": "three"}]
    write_metadata(tmp_path / "F" / f"metadata.{suffix}", rows)
    found = ingest(tmp_path, f"folder:{tmp_path}/F")
    assert sorted(captions(found)) == sorted([("ok", t) for t in ("zero", "one, with a comma", "two", "three")])


def test_several_lines_mixed_types_and_a_broken_line_of_a_table(tmp_path, caplog):
    (tmp_path / "F").mkdir()
    for n in range(3):
        (tmp_path / "F" / f"{n}.png").write_bytes(png())
    lines = [{"file_name": "0.png", "text": "a"}, {"file_name": "0.png", "text": "b"},
             {"file_name": "1.png", "text": ["c", "d"]}]  # fmt: skip
    (tmp_path / "F" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"file_name": "2.p')
    with caplog.at_level(logging.WARNING):
        found = ingest(tmp_path, f"folder:{tmp_path}/F")
    assert [json.loads(row["info"]).get("captions") for row in found] == [["a", "b"], ["c", "d"], None]
    assert "1 lines are no JSON objects" in caplog.text
    assert "1 of 3 images have no caption" in caplog.text


def test_links_are_followed_once_and_a_dangling_one_is_a_row(tmp_path):
    (tmp_path / "F" / "a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for folder in ("F/a", "elsewhere"):
        (tmp_path / folder / "0.png").write_bytes(png())
        (tmp_path / folder / "0.txt").write_text("x")
    (tmp_path / "F" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "F" / "a" / "loop").symlink_to(tmp_path / "F")
    (tmp_path / "F" / "a" / "gone.jpg").symlink_to("/nowhere.jpg")
    found = {row["source"]: row["status"] for row in ingest(tmp_path, f"folder:{tmp_path}/F")}
    assert found == {"a/0.png": "ok", "b/0.png": "ok", "a/gone.jpg": "unreadable"}


@pytest.mark.parametrize(
    ("column", "count"),
    [
        (pa.array([[png()], [png(), png("blue")], []], pa.list_(pa.binary())), 4),
        (pa.array([[{"bytes": png(), "path": None}]] * 3), 3),
        (pa.array([list(png())] * 3, pa.list_(pa.uint8())), 3),
        (pa.array([{"bytes": png(), "path": "x"}] * 3), 3),
    ],
)
def test_image_cells_of_lists_and_structs_give_every_picture(tmp_path, column, count):
    table = pa.table({"image": column, "caption": ["a", "b", "c"], "key": pa.array([None, "k", ""], pa.string())})
    pq.write_table(table, tmp_path / "t.parquet")
    found = ingest(tmp_path, f"parquet:{tmp_path}/t.parquet")
    assert len(found) == count
    assert {row["status"] for row in found} <= {"ok", "no_image"}
    assert all(Image.open(io.BytesIO(row["image"])).size == (40, 40) for row in found if row["status"] == "ok")
    assert len({row["key"] for row in found}) == count


def test_an_image_column_of_another_type_is_refused_with_its_type(tmp_path):
    pq.write_table(pa.table({"image": [1.5, 2.5], "caption": ["a", "b"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="column image is of type double"):
        ingest(tmp_path, f"parquet:{tmp_path}/t.parquet")


@pytest.mark.parametrize("feature", [[{"_type": "Image"}], {"_type": "List", "feature": {"_type": "Image"}}])
def test_a_list_of_images_that_save_to_disk_wrote_gives_every_picture(tmp_path, feature):
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [[{"bytes": png(), "path": None}], [{"bytes": png(), "path": None}, {"bytes": png("blue"), "path": None}]]
    table = pa.table({"images": pa.array(cells, pa.list_(struct)), "caption": ["a", "b"]})
    with pa.OSFile(str(tmp_path / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    features = {"images": feature, "caption": {"_type": "Value", "dtype": "string"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"features": features}))
    found = ingest(tmp_path, f"hf:{tmp_path}")
    assert [(row["caption"], row["status"]) for row in found] == [("a", "ok"), ("b", "ok"), ("b", "ok")]


def test_pixels_are_no_list_of_pictures(tmp_path):
    pixels = pa.array([[[[0, 0, 0]] * 8] * 8] * 2, pa.list_(pa.list_(pa.list_(pa.uint8()))))
    pq.write_table(pa.table({"image": pixels, "caption": ["a", "b"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"column image is of type list<.*expected bytes"):
        ingest(tmp_path, f"parquet:{tmp_path}/t.parquet")


def test_a_file_with_a_column_of_nulls_holds_up_no_other(tmp_path):
    pq.write_table(pa.table({"image": [png()], "caption": ["a"], "url": ["u"]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"image": [png()], "caption": pa.nulls(1), "url": ["u"]}), tmp_path / "2.parquet")
    pq.write_table(pa.table({"image": pa.nulls(1), "caption": ["b"], "url": ["u"]}), tmp_path / "3.parquet")
    found = ingest(tmp_path, f"parquet:{tmp_path}")
    assert sorted((row["caption"], row["status"]) for row in found) == [("", "ok"), ("a", "ok"), ("b", "no_image")]


@pytest.mark.parametrize("keys", [pa.array([None] * 4, pa.string()), pa.array([math.nan] * 4), pa.nulls(4)])
def test_rows_without_a_key_get_one_of_their_own(tmp_path, keys):
    pq.write_table(pa.table({"key": keys, "image": [png()] * 4, "caption": ["x"] * 4}), tmp_path / "t.parquet")
    assert [row["status"] for row in ingest(tmp_path, f"parquet:{tmp_path}/t.parquet")] == ["ok"] * 4
