"""`lint` reads a source as a run would, says what it found on one screen, and its figures are the run's."""

import json
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_data_pipeline_reconcile import WRITERS, png, write_folder, write_tars

from data_pipeline.__main__ import main
from data_pipeline.flow.pipeline import Pipeline
from data_pipeline.inspection.lint import LintFindings, lint_source
from data_pipeline.inspection.lint_text import WIDTH
from data_pipeline.plans import world
from data_pipeline.sources.registry import SOURCES, guess_kind, open_source
from data_pipeline.stages.row_status import count_by_status
from infra.codec import from_json
from infra.errors import UserError, run_cli
from infra.runner import WorkerPool


@pytest.fixture
def lint(monkeypatch, capsys):
    """`python -m data_pipeline lint ARGS`: (exit code, stdout, stderr)."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["data_pipeline", "lint", *map(str, args)])
        with pytest.raises(SystemExit) as done:
            run_cli(main)
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    return call


def list_tree(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in root.rglob("*")}


@pytest.mark.parametrize("kind", WRITERS)
def test_the_screen_and_the_json_of_each_layout(tmp_path, lint, kind):
    source = tmp_path / kind
    WRITERS[kind](source)
    before = list_tree(source)
    code, out, _ = lint(source, "--json", tmp_path / "found.json")
    assert code == 0
    assert out.startswith(f"{kind}:{source}\n")
    assert len(out.splitlines()) <= 40
    assert max(map(len, out.splitlines())) <= WIDTH
    assert list_tree(source) == before
    found = from_json(LintFindings, (tmp_path / "found.json").read_bytes(), where="found.json")
    assert found.whole
    assert f"{found.rows} rows" in out
    for outcome in found.outcomes.values():
        assert outcome.kept + sum(outcome.set_aside.values()) == found.rows
        assert sum(outcome.buckets.values()) == outcome.kept


def test_its_counts_are_those_of_the_run(tmp_path):
    """The gate of a real run over the same source, with a duplicate in it."""
    write_tars(tmp_path / "raw")
    (tmp_path / "raw" / "again.tar").write_bytes((tmp_path / "raw" / "packed.tar").read_bytes())
    source = open_source(f"wds:{tmp_path / 'raw'}")
    found = lint_source(source, "wds:raw", str(tmp_path / "raw"), rows=None)
    pipeline = Pipeline(world(), str(tmp_path / "root"), open_source(f"wds:{tmp_path / 'raw'}"), workers=WorkerPool(0))
    statuses = count_by_status(pipeline.run_gate())
    told = found.outcomes["world"]
    assert Counter(ok=told.kept) + told.set_aside == statuses
    assert statuses["duplicate"] == found.duplicates == 2
    assert found.seen == pipeline.seen


def test_a_sample_is_spread_over_the_source_and_says_so(tmp_path, lint):
    for number in range(50):
        folder = tmp_path / f"{number:02d}"
        folder.mkdir()
        table = pa.table({"image": [png(number * 50 + n) for n in range(4)], "caption": [f"{number}"] * 4})
        pq.write_table(table, folder / "t.parquet")
    code, out, _ = lint(f"parquet:{tmp_path}", "--sample", 40, "--json", tmp_path / "f.json")
    assert code == 0
    assert "40 rows, a sample: the first rows of 20 of 50 units; --all reads everything" in out
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["statuses"] == {"ok": 40}
    assert found["caption_copies"] == 20
    code, out, _ = lint(f"parquet:{tmp_path}", "--all")
    assert "200 rows, all of it" in out


def test_modes_profiles_and_captions_of_every_type_are_shown(tmp_path, lint):
    found = tmp_path / "F"
    found.mkdir()
    for number, mode in enumerate(("RGBA", "L", "P", "I;16", "CMYK")):
        image = Image.new("RGB", (64, 64 + number)).convert(mode) if mode != "I;16" else Image.new(mode, (64, 68))
        image.save(found / f"{number}.{'tif' if mode == 'CMYK' else 'png'}")
        (found / f"{number}.json").write_text(json.dumps({"caption": ["a", {"en": "b"}, 7, None, "a"][number]}))
    turned, exif = Image.new("RGB", (90, 64)), Image.Exif()
    exif[0x0112] = 6
    turned.save(found / "5.jpg", exif=exif)
    code, out, _ = lint(found)
    assert code == 0
    for words in ("1 PNG RGBA", "1 PNG L", "1 PNG P", "1 PNG I;16", "1 TIFF CMYK", "1 JPEG RGB", "1 turned by EXIF",
                  "1 transparent", "2 nothing, 2 text, 1 number, 1 struct", "height 64 to 90",
                  "1 rows have a caption that an earlier one has"):  # fmt: skip
        assert words in out, words


def test_a_table_whose_caption_is_a_guess_shows_its_columns_and_is_refused(tmp_path, lint):
    table = pa.table({"image": [png()], "title": ["a red square"], "alt": ["red"], "views": [7]})
    pq.write_table(table, tmp_path / "t.parquet")
    code, out, err = lint(tmp_path / "t.parquet")
    assert code == 2
    assert 'title (string): "a red square"' in out
    assert "candidates: title (string), alt (string)" in err
    assert err.count("\n") == 1
    code, out, _ = lint(tmp_path / "t.parquet", "--caption-column", "title")
    assert code == 0
    assert "column title: 1 text" in out


def test_every_line_is_short_where_everything_is_wrong_at_once(tmp_path, lint):
    """Sixty fields, long names, control characters, more statuses than fit."""
    root = tmp_path / ("long-name-" * 15)
    root.mkdir()
    write_folder(root / "folder")
    rows = [{f"field {n}": "\x1b[31m" + "w" * 300 for n in range(60)} | {"file_name": f"{n}.png", "text": "\u202e" * 9}
            for n in range(30)]  # fmt: skip
    (root / "folder" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = lint(f"folder:{root}/folder")
    assert code == 0
    assert len(out.splitlines()) <= 40
    assert max(map(len, out.splitlines())) <= WIDTH
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{tmp}/nowhere"], "no such file or folder, or nothing in it"),
        (["{tmp}"], "nothing in it"),
        (["folder:{tmp}"], "holds no images"),
        (["wds:{tmp}/{{0..3}}.tar"], "0.tar: no such file (4 of 4"),
        (["zip:{tmp}"], "expected one of folder:URI"),
        (["gs://bucket/x"], "scheme gs:// is not supported"),
        (["folder:{tmp}", "--sample", "0"], "--sample 0: expected 1 or more"),
        (["folder:{tmp}", "--smaple", "9"], "did you mean --sample?"),
    ],
)
def test_mistakes_are_one_line(tmp_path, lint, args, message):
    (tmp_path / "empty").mkdir()
    code, _, err = lint(*(arg.replace("{tmp}", str(tmp_path / "empty")).replace("{{", "{").replace("}}", "}")
                          for arg in args))  # fmt: skip
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["0.tar", "0.parquet"], "wds"), (["x/0.tgz"], "wds"), (["a.JPG", "metadata.parquet"], "folder"),
        (["t.parquet"], "parquet"), (["train/dataset_info.json", "train/data.arrow"], "hf"), (["c.tsv"], "cc12m"),
        (["annotations/captions_val2014.json", "val2014/0.jpg"], "coco"),
        (["LOC_synset_mapping.txt", "train/n0/0.JPEG"], "imagenet"), (["notes.md"], "folder"),
    ],
)  # fmt: skip
def test_the_kind_of_a_place_is_seen_by_its_names(tmp_path, names, kind):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert guess_kind(str(tmp_path)) == kind
    assert kind in SOURCES


def test_reading_stops_where_the_sample_ends(tmp_path):
    """Of an endless unit no more than the sample is taken."""

    class Endless:
        def list_units(self):
            return [open_source(f"wds:{tmp_path}").list_units()[0]]

        def read_rows(self, unit):
            row = next(iter(open_source(f"wds:{tmp_path}").read_rows(unit)))
            for number in range(10**9):
                assert number <= 30
                yield row._replace(key=f"{number}")

    write_tars(tmp_path / "t")
    for path in (tmp_path / "t").iterdir():
        path.rename(tmp_path / path.name)
    found = lint_source(Endless(), "x:y", str(tmp_path), rows=30)
    assert (found.rows, found.whole) == (30, False)


def test_places_of_another_layout_are_one_line_that_says_what_lies_there(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"x")
    for kind in ("folder", "wds", "parquet", "hf", "cc12m"):
        with pytest.raises(UserError, match=r"nothing to do; it holds 1 .mp4 \(clip.mp4\)"):
            open_source(f"{kind}:{tmp_path}").list_units()
    (tmp_path / "data.arrow").write_bytes(b"junk")
    for broken in ("{broken", "[]", '{"features": 3}'):
        (tmp_path / "dataset_info.json").write_text(broken)
        source = open_source(f"hf:{tmp_path}")
        for look in (source.list_units, source.list_fields):  # type: ignore[attr-defined]
            with pytest.raises(UserError, match="not what save_to_disk writes"):
                look()
    with pytest.raises(UserError, match="no source is named"):
        guess_kind("")
