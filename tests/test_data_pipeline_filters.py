"""Filters: conditions are expressions and never code, kept rows are those that an independent reading keeps, and an
order over them is an order over the rows as if nothing else had been packed."""

import json
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.index import RowTables
from data_pipeline.loading.kept import KeptRows
from data_pipeline.loading.loader import Dataset, open_dataset
from data_pipeline.loading.order import SampleOrder
from data_pipeline.packing.synthetic import write_synthetic
from data_pipeline.selection.expressions import RowCondition
from data_pipeline.selection.filters import select_rows
from infra.errors import UserError

ROWS = pa.table(
    {
        "key": ["a", "b", "c", "d", "e"],
        "aesthetic": pa.array([1.0, 5.0, 6.5, None, 9.0], pa.float32()),
        "width": pa.array([64, 512, 512, 1024, None], pa.int32()),
        "flag": [True, False, None, True, False],
    }
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    uri = str(tmp_path_factory.mktemp("data"))
    write_synthetic(
        uri, num_samples=200, val_samples=8, latent_shape=(4, 8, 8), buckets=("32x32", "24x40"), shard_rows=32
    )
    return uri


def keys_of(dataset: Dataset) -> list[str]:
    tables = RowTables(dataset.index)
    return [key for shard in range(len(dataset.index.tars)) for key in tables[shard].keys]


def write_scores(root: str, path: Path, *, without: int = 0) -> str:
    """A score per key: its place in the split."""
    keys = keys_of(open_dataset(root))
    pq.write_table(pa.table({"key": keys[without:], "aesthetic": np.arange(without, len(keys)) / 10}), path)
    return str(path)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("aesthetic > 5", "ce"),
        ("aesthetic > 5 and width >= 512", "c"),
        ("aesthetic > 5 AND width >= 512", "c"),
        ("not aesthetic > 5", "ab"),
        ("aesthetic is None or width IS NULL", "de"),
        ("width is not null and 5 <= aesthetic < 7", "bc"),
        ("key in ('a', 'e')", "ae"),
        ("key IN ('a')", "a"),
        ("width not in (64, 1024)", "bc"),
        ("key = 'b' OR key <> 'b' and width > 600", "bd"),
        ("flag", "ad"),
        ("not flag", "be"),
        ("width * 2 > 1024", "d"),
        ("key != 'AND = <>'", "abcde"),
        ("aesthetic == -1 or aesthetic + 1 == 2", "a"),
    ],
)
def test_rows_that_fulfil_a_condition(text, kept):
    condition = RowCondition(text)
    assert "".join(np.array(list("abcde"))[condition.mask(ROWS)]) == kept
    assert RowCondition(condition.text).text == condition.text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("aesthetic >", "cannot be read"),
        ("", "cannot be read"),
        ("> 5", "cannot be read"),
        ("<> 5", "cannot be read"),
        ("aesthetic > 5; import os", "cannot be read"),
        ("x\0", "cannot be read"),
        ("1 < 2", "names no column"),
        ("aesthetic", "gives a float, not true or false"),
        ("aesthetic > 'x'", r"aesthetic float\): Function 'greater' has no kernel"),
        ("__import__('os').system('touch /tmp/x')", "cannot be used"),
        ("key.upper() == 'A'", "cannot be used"),
        ("(lambda: key)() == 'a'", "cannot be used"),
        ("key == f'{width}'", "cannot be used"),
        ("[k for k in key] == 'a'", "cannot be used"),
        ("width in (1, 'a')", "several types"),
        ("width in key", "cannot be used"),
        ("(" * 300 + "width" + ")" * 300 + " > 1", "cannot be read"),
    ],
)
def test_what_is_no_condition_is_refused_in_one_line(text, says):
    with pytest.raises(UserError, match=says) as caught:
        RowCondition(text).mask(ROWS)
    assert "\n" not in str(caught.value)


numbers = st.one_of(st.none(), st.integers(-3, 3))
comparisons = st.tuples(st.sampled_from("xy"), st.sampled_from(["<", "<=", ">", ">=", "=", "<>"]), st.integers(-3, 3))
conditions = st.recursive(
    comparisons.map(lambda c: f"{c[0]} {c[1]} {c[2]}") | st.sampled_from(["x IS NULL", "y IS NOT NULL", "x IN (1, 2)"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["AND", "OR"]), inner).map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
        inner.map(lambda text: f"(NOT {text})"),
    ),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(conditions, st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8))
def test_conditions_mean_what_they_mean_in_sql(text, rows):
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE t (n INTEGER, x INTEGER, y INTEGER)")
    database.executemany("INSERT INTO t VALUES (?, ?, ?)", [(n, *row) for n, row in enumerate(rows)])
    expected = [n for (n,) in database.execute(f"SELECT n FROM t WHERE {text} ORDER BY n")]
    table = pa.table({name: pa.array([row[i] for row in rows], pa.int64()) for i, name in enumerate("xy")})
    assert np.flatnonzero(RowCondition(text).mask(table)).tolist() == expected


def test_a_column_that_came_later_filters_by_key(root, tmp_path, caplog):
    scores = write_scores(root, tmp_path / "scores.parquet", without=7)
    dataset = open_dataset(root)
    kept = select_rows(dataset, ["aesthetic >= 10", "bucket == '32x32'"], [scores])
    names, tables = keys_of(dataset), RowTables(dataset.index)
    expected = {key for n, key in enumerate(names) if n >= 100 and key.startswith("train-32x32")}
    found = {tables[s].keys[row] for s in range(len(dataset.index.tars)) for row in kept.kept.rows_of(s)}
    assert found == expected
    assert "has no row for 7 of 200 samples: their columns are null" in caplog.text
    assert kept.buckets == {"32x32": len(expected)}
    assert kept.fingerprint != dataset.fingerprint
    # an epoch is every kept row once, and nothing else
    stream = kept.batches(seed=3, global_batch=len(expected))
    epoch = next(stream)
    stream.close()
    assert sorted(epoch.keys) == sorted(expected)


def test_a_selection_is_found_once_and_named_by_what_made_it(root, tmp_path, caplog):
    scores, dataset = write_scores(root, tmp_path / "scores.parquet"), open_dataset(root)
    one = select_rows(dataset, ["aesthetic > 5"], [scores])
    caplog.clear()
    same = select_rows(open_dataset(root), ["aesthetic>5"], [scores])
    assert same.fingerprint == one.fingerprint
    assert not caplog.text  # read, not found again
    assert [same.kept.rows_of(s).tolist() for s in range(4)] == [one.kept.rows_of(s).tolist() for s in range(4)]
    asked = pq.read_schema(f"{root}/selections/{one.fingerprint}.parquet").metadata[b"asked"]
    assert json.loads(asked)["where"] == ["aesthetic > 5"]
    others = {select_rows(dataset, ["aesthetic > 6"], [scores]).fingerprint}
    others.add(
        select_rows(dataset, ["aesthetic > 5"], [write_scores(root, tmp_path / "b.parquet", without=1)]).fingerprint
    )
    assert len(others | {one.fingerprint, dataset.fingerprint}) == 4


def test_a_table_in_several_files_and_bad_tables(root, tmp_path):
    dataset, names = open_dataset(root), keys_of(open_dataset(root))
    folder = tmp_path / "parts"
    folder.mkdir()
    for part in range(2):
        mine = names[part::2]
        pq.write_table(pa.table({"key": mine, "good": [part == 0] * len(mine)}), folder / f"{part}.parquet")
    assert select_rows(dataset, ["good"], [str(folder)]).kept.num_kept == 100

    def refused(columns: dict, where: str = "good", name: str = "bad.parquet") -> str:
        pq.write_table(pa.table(columns), tmp_path / name)
        with pytest.raises(UserError) as caught:
            select_rows(dataset, [where], [str(tmp_path / name)])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "'x' occurs twice" in refused({"key": ["x", "y", "x"], "good": [True] * 3})
    assert "row 1 has no key" in refused({"key": ["x", None], "good": [True] * 2})
    assert "no column `key`, it has good" in refused({"good": [True]})
    assert "no column besides `key`" in refused({"key": ["x"]})
    assert "no column aestetic" in refused({"key": ["x"], "aesthetic": [1]}, "aestetic > 1")
    assert "did you mean 'aesthetic'" in refused({"key": ["x"], "aesthetic": [1]}, "aestetic > 1")
    assert "keeps none of the 200 samples" in refused({"key": names[:1], "good": [False]})
    assert "no --where reads a column of it" in refused({"key": names, "good": [True] * 200}, "bucket == '32x32'")
    with pytest.raises(UserError, match="no parquet file there"):
        select_rows(dataset, ["good"], [str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="a table that no --where reads"):
        select_rows(dataset, [], [str(folder)])


shapes = st.lists(st.lists(st.booleans(), min_size=1, max_size=20), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(shapes, st.integers(0, 2**30), st.integers(1, 7))
def test_an_order_over_kept_rows_is_that_of_smaller_shards(masks, seed, global_batch):
    kept = KeptRows([np.array(mask) for mask in masks])
    numbers = np.flatnonzero(kept.counts)
    if not len(numbers):
        return
    shards = {"64x64": (numbers, kept.counts[numbers])}
    plain = SampleOrder(shards, seed=seed, global_batch=global_batch)
    chosen = SampleOrder(shards, seed=seed, global_batch=global_batch, kept=kept)
    for step in range(6):
        one, two = plain.batch(step), chosen.batch(step)
        assert one.shard_G.tolist() == two.shard_G.tolist()
        for shard, number, row in zip(one.shard_G, one.row_G, two.row_G):
            assert np.flatnonzero(masks[shard])[number] == row
    bucket = chosen.bucket("64x64")
    for position in range(8):
        shard, row = bucket.substitute(position, frozenset())
        assert masks[shard][row]
    for number in range(2):
        virtual = np.arange(number * bucket.num_samples, (number + 1) * bucket.num_samples)
        places = zip(*(part.tolist() for part in bucket.locate(virtual)))
        assert [bucket.invert(shard, row, number) for shard, row in places] == virtual.tolist()


def test_nothing_is_executed(tmp_path):
    before = set(sys.modules)
    for text in ("__import__('antigravity') > 1", "exec('1')", "width.__class__ > 1", "().__class__ == 1"):
        with pytest.raises(UserError):
            RowCondition(text).mask(ROWS)
    assert "antigravity" not in set(sys.modules) - before
