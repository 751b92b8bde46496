"""Stages one by one: filters on damaged and odd images, captions, buckets, duplicates, crops, the pack's plan."""

import io
import struct
import zlib
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.captions.stage import caption_images
from data_pipeline.curation.dedup import Dedup, SignatureStage
from data_pipeline.curation.filters import FilterStage, MeasureStage, Thresholds, clean_caption
from data_pipeline.formats.schema import ColumnPart, expand_ranges, to_ranges
from data_pipeline.images import ImageError, cover_crop, decode
from data_pipeline.packing.generations import keep_published
from data_pipeline.packing.pack import PlannedShard, make_plan_table, plan_shards, read_planned_shards
from data_pipeline.packing.publish import assign_splits, draw_split_number
from data_pipeline.packing.selections import RowSelection, RowSelections
from data_pipeline.stages.buckets import BucketStage, find_nearest_bucket, list_buckets
from data_pipeline.stages.row_status import count_by_status, ok_rows, override_statuses, select_rejected, status_table
from data_pipeline.stages.scratch_db import ScratchDatabase
from data_pipeline.stages.stage import ShardView
from infra.codec import from_json, to_json
from infra.errors import UserError


def encoded(image: Image.Image, kind: str = "PNG", **given) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **given)
    return out.getvalue()


def gradient(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 255, (6, 6, 3), np.uint8)
    return Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)


def bomb(width: int, height: int) -> bytes:
    """A valid PNG header that promises many pixels in few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = zlib.compress(bytes(10_000))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def shard_of(rows: list[tuple[bytes | None, str]]) -> ShardView:
    count = len(rows)
    table = pa.table(
        {
            "row": pa.array(range(count), pa.int32()),
            "status": ["ok"] * count,
            "reason": [""] * count,
            "key": [f"k{n}" for n in range(count)],
            "source": [f"s{n}" for n in range(count)],
            "image": pa.array([image for image, _ in rows], pa.large_binary()),
            "caption": [caption for _, caption in rows],
            "info": ["{}"] * count,
        }
    )
    return ShardView("", "shard", {}, range(count), {"ingest": table})


def measured(rows: list[tuple[bytes | None, str]]) -> ShardView:
    shard = shard_of(rows)
    shard.tables["measure"] = MeasureStage().open()(shard)
    return shard


def filtered(rows: list[tuple[bytes | None, str]], **settings_) -> list[dict]:
    return FilterStage(Thresholds(**settings_)).open()(measured(rows)).to_pylist()


GOOD = encoded(gradient())


@pytest.mark.parametrize(
    ("image", "status"),
    [
        (GOOD, "ok"),
        (GOOD[:200], "corrupt"),
        (b"", "corrupt"),
        (b"<html>not found</html>", "corrupt"),
        (GOOD[:60] + bytes(200) + GOOD[260:], "corrupt"),
        (encoded(Image.new("RGB", (1, 1))), "too_small"),
        (bomb(30_000, 30_000), "too_large"),
        (bomb(2**31 - 1, 2**31 - 1), "too_large"),
        (encoded(gradient(300, 64)), "aspect"),
        (encoded(gradient(), "JPEG")[:-400], "corrupt"),
        (encoded(gradient(), "WEBP"), "ok"),
        (encoded(gradient(), "GIF", save_all=True, append_images=[gradient(seed=1)]), "ok"),
        (encoded(gradient().convert("CMYK"), "JPEG"), "ok"),
        (encoded(gradient().convert("P")), "ok"),
        (encoded(gradient().convert("LA")), "ok"),
        (encoded(gradient(), "BMP"), "ok"),
    ],
)
def test_images_get_the_status_they_deserve(image, status):
    (row,) = filtered([(image, "a caption")])
    assert row["status"] == status, row["reason"]
    assert (row["reason"] == "") == (status == "ok")


def test_a_30000_pixel_image_is_refused_by_its_header_alone():
    # the real thing: 900 million pixels of one color are under a megabyte as PNG
    with pytest.raises(ImageError, match="900000000 pixels") as caught:
        decode(io.BytesIO(bomb(30_000, 30_000)))
    assert caught.value.status == "too_large"


@pytest.mark.parametrize(
    ("caption", "status"),
    [
        ("a cat", "ok"),
        ("\u0642\u0637\u0629 \u0635\u063a\u064a\u0631\u0629", "ok"),
        ("\U0001f600\U0001f431", "ok"),
        ("\u4e00\u53ea\u732b", "ok"),
        ("", "bad_caption"),
        ("  \u200b\u0000 \ufffd", "bad_caption"),
        ("...!?", "bad_caption"),
        ("x" * 100_000, "bad_caption"),
    ],
)
def test_captions_in_any_script_pass_and_empty_ones_do_not(caption, status):
    assert filtered([(GOOD, caption)])[0]["status"] == status


def test_captions_are_cleaned_not_mangled():
    assert clean_caption("  a\tcafe\u0301 \n\u202e cat\u0007 ") == "a caf\u00e9 cat"
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    assert clean_caption(family) == family


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=40))
def test_cleaning_is_idempotent_and_single_spaced(text):
    once = clean_caption(text)
    assert clean_caption(once) == once
    assert "  " not in once
    assert once == once.strip()


def test_modes_become_rgb_as_people_see_them():
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode(io.BytesIO(encoded(half))).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    assert decode(io.BytesIO(encoded(deep))).getpixel((0, 0)) == (156, 156, 156)  # 40,000 / 257, rounded
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: width and height change places
    assert decode(io.BytesIO(encoded(gradient(40, 20), "JPEG", exif=exif))).size == (20, 40)


def test_cover_crop_keeps_the_center_and_the_scale():
    image = gradient(64, 64)
    assert cover_crop(image, 64, 64) is image
    wide = Image.new("RGB", (300, 100), "blue")
    wide.paste(Image.new("RGB", (100, 100), "red"), (100, 0))
    middle = cover_crop(wide, 32, 32).crop((6, 0, 26, 32))  # a resampling filter looks a little over the edge
    assert set(middle.get_flattened_data()) == {(255, 0, 0)}
    assert cover_crop(gradient(200, 100), 88, 48).size == (88, 48)


def test_bucket_tables_are_symmetric_multiples_within_bounds():
    assert list_buckets(64, step=8) == ("64x64",)
    table = list_buckets(1024, step=64, max_aspect=4)
    shapes = [tuple(map(int, name.split("x"))) for name in table]
    assert {(w, h) for h, w in shapes} == set(shapes)
    assert all(h % 64 == 0 and w % 64 == 0 and max(h / w, w / h) <= 4 for h, w in shapes)
    assert all(abs(h * w / 1024**2 - 1) < 0.13 for h, w in shapes)
    assert find_nearest_bucket(1000, 1000, table) == "1024x1024"
    wide, tall = find_nearest_bucket(3000, 1000, table), find_nearest_bucket(1000, 3000, table)
    assert tuple(map(int, wide.split("x"))) == tuple(map(int, tall.split("x")))[::-1]
    with pytest.raises(UserError, match="no multiple of 16"):
        list_buckets(100, step=16)


def test_the_bucket_stage_goes_by_the_measured_sizes():
    shard = measured([(encoded(gradient(120, 60)), "a b"), (encoded(gradient(60, 60)), "c"), (b"", "d")])
    table = BucketStage(list_buckets(64, step=8, max_aspect=2)).open()(shard)
    assert table["bucket"].to_pylist() == ["48x88", "64x64", ""]


def signatures(images: list[Image.Image]) -> dict[str, pa.Table]:
    shard = measured([(encoded(image), "a caption") for image in images])
    return {"s": SignatureStage().open()(shard)}


def duplicates(dedup: Dedup, found: dict[str, pa.Table]) -> dict[str, pa.Table]:
    return dict(dedup.run(found.items()).iterate_tables())


def test_exact_and_perceptual_duplicates():
    image, other = gradient(256, 256), gradient(256, 256, seed=9)
    resized = image.resize((200, 200))
    squeezed = Image.open(io.BytesIO(encoded(image, "JPEG", quality=60)))
    found = signatures([image, other, resized, squeezed, image])
    assert duplicates(Dedup(None), found)["s"]["status"].to_pylist() == ["ok", "ok", "ok", "ok", "duplicate"]
    near = duplicates(Dedup(6), found)["s"]
    assert near["status"].to_pylist() == ["ok", "ok", "duplicate", "duplicate", "duplicate"]
    assert near["reason"].to_pylist()[2] == "perceptual: of s row 0"


def test_the_first_shard_in_order_keeps_a_duplicate():
    table = signatures([gradient()])["s"]
    result = duplicates(Dedup(), {"val": table, "train": table})
    assert (result["val"]["status"].to_pylist(), result["train"]["status"].to_pylist()) == (["ok"], ["duplicate"])


def test_one_bad_image_does_not_take_its_batch_along():
    class Picky:
        name, version = "picky", 1

        def caption(self, images):
            if any(image.width < 10 for image in images):
                raise ValueError("too small for me")
            return ["seen"] * len(images)

    images = [gradient(20, 20), gradient(5, 5), gradient(20, 20)]
    assert caption_images(Picky(), images) == ["seen", "", "seen"]


ROWS = st.dictionaries(
    st.tuples(st.sampled_from("abc"), st.integers(0, 20)), st.sampled_from(["train", "val"]), max_size=60
)


def runs(rows: dict[tuple[str, int], str]) -> list[RowSelection]:
    """Rows (shard, number) with their split, as the pipeline hands them to pack."""
    found: dict[tuple[str, str], list[int]] = {}
    for (shard, number), split in sorted(rows.items()):
        found.setdefault((shard, split), []).append(number)
    return [RowSelection(s, split, "64x64", np.array(n), np.zeros(len(n))) for (s, split), n in sorted(found.items())]


def shelved(found: Iterable[RowSelection]) -> RowSelections:
    made = RowSelections(ScratchDatabase())
    for run in found:
        made.put(run)
    return made


def rows_of(outputs: Iterable[PlannedShard]) -> list[tuple[str, str, int]]:
    return sorted((o.split, shard, number) for o in outputs for shard, rows in o.rows for number in rows.tolist())


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 9))
def test_the_plan_holds_every_row_once(rows, shard_rows):
    flat = sorted((split, shard, number) for (shard, number), split in rows.items())
    outputs = list(plan_shards(shelved(runs(rows)), {"x": "1"}, shard_rows={"64x64": shard_rows}))
    assert rows_of(outputs) == flat
    assert all(o.num_rows <= shard_rows for o in outputs)
    assert len({o.id for o in outputs}) == len(outputs)
    table = make_plan_table(outputs)  # as written down and read back
    some = {o.id for o in outputs[::2]}
    assert rows_of(read_planned_shards(table.to_batches(), some)) == rows_of(o for o in outputs if o.id in some)


@settings(max_examples=60, deadline=None)
@given(ROWS, ROWS, st.integers(1, 5))
def test_full_shards_stay_wherever_new_rows_sort_unless_a_row_of_theirs_left(first, then, shard_rows):
    outputs = plan_shards(shelved(runs(first)), {}, shard_rows={"64x64": shard_rows})
    full = [o for o in outputs if o.num_rows == shard_rows]
    left = shelved(runs(then))
    kept = list(keep_published(left, full))
    whole = [o for o in full if set(rows_of([o])) <= {(split, *place) for place, split in then.items()}]
    assert [o.id for o in kept] == [o.id for o in whole]
    again = list(plan_shards(left, {}, shard_rows={"64x64": shard_rows}))
    assert sorted(rows_of(kept) + rows_of(again)) == sorted((split, *place) for place, split in then.items())


def test_rows_without_a_split_go_by_their_pixels_and_stay_there():
    def undecided(count: int) -> list[RowSelection]:
        draws = np.array([draw_split_number(f"{n:032x}") for n in range(count)])
        return [RowSelection("a", "", "64x64", np.arange(count), draws)]

    def val(count: int, fraction: float) -> list[int]:
        assigned = {run.split: run.row_R.tolist() for run in assign_splits(undecided(count), fraction)}
        assert sorted(assigned["train"] + assigned.get("val", [])) == list(range(count))
        return assigned.get("val", [])

    assert [n for n in val(400, 0.1) if n < 200] == val(200, 0.1)
    assert 20 <= len(val(400, 0.1)) <= 60
    assert len(val(3, 0.001)) == 1
    assert val(400, 0) == []
    given = [RowSelection("a", "train", "64x64", np.array([0]), np.array([0]))]
    assert list(assign_splits(given, 0.9)) == given


def test_the_first_stage_that_objects_has_its_say():
    mine = status_table([0, 1, 2, 3], ["ok", "corrupt", "ok", "ok"], ["", "cut", "", ""])
    said = status_table([1, 2, 3], ["duplicate", "duplicate", "ok"], ["of 0", "of 0", ""])
    found = override_statuses(mine, said)
    assert found["status"].to_pylist() == ["ok", "corrupt", "duplicate", "ok"]
    assert found["reason"].to_pylist() == ["", "cut", "of 0", ""]
    assert (ok_rows(found).tolist(), select_rejected(found)["row"].to_pylist()) == ([0, 3], [1, 2])
    assert count_by_status({"a": found, "b": mine}) == {"ok": 5, "corrupt": 2, "duplicate": 1}
    empty = status_table([], [], [])
    assert (override_statuses(mine, empty), ok_rows(empty).tolist()) == (mine, [])


@given(st.sets(st.integers(0, 60)))
def test_row_ranges_hold_the_same_rows(rows):
    part = ColumnPart("s", "o", "h", 0, len(rows), to_ranges(rows))
    assert set(expand_ranges(part.rows)) == rows
    assert from_json(ColumnPart, to_json(part), where="part") == part
