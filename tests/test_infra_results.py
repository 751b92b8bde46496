"""Result rows survive any number of writers, kills and torn objects, and say the same thing on a disk and on S3."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from infra import storage
from infra.errors import UserError
from infra.results import ResultRow, ResultStore

ROW = ResultRow(
    run="d2",
    recipe_hash="abc",
    code_version="v1",
    images_seen=1000,
    metric="val_loss/sd3",
    value=0.25,
    higher_is_better=False,
    sample_count=64,
    protocol_hash="p1",
    low=0.24,
    high=0.26,
    details='{"seed": 0}',
    created="2026-11-22T10:00:00.000+00:00",
)

WRITER = """
import sys
from infra.results import ResultRow, ResultStore
store, name = ResultStore(sys.argv[1]), sys.argv[2]
for step in range(20):
    store.append([ResultRow(name, "h", "v", step, "loss", 0.5, False, 1, "p")])
"""


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    uri = str(tmp_path / "results") if request.param == "local" else request.getfixturevalue("s3")
    return ResultStore(uri)


def test_round_trip_and_table(store):
    assert store.rows() == []
    assert store.table().num_rows == 0
    rows = [ROW, replace(ROW, metric="world_geneval/overall/seen", value=math.nan, low=None, high=math.inf)]
    store.append(rows)
    back = ResultStore(store.uri).rows()
    assert back[0] == ROW
    assert math.isnan(back[1].value)
    assert (back[1].low, back[1].high) == (None, math.inf)
    table = store.table()
    assert table.column("metric").to_pylist() == ["val_loss/sd3", "world_geneval/overall/seen"]
    assert table.schema == ResultStore(store.uri + "/absent").table().schema


def test_the_same_rows_again_change_nothing(store):
    store.append([ROW])
    store.append([ROW])
    store.append([])
    assert len(storage.list_files(store.uri)) == 1
    assert store.rows() == [ROW]


def test_the_newest_row_of_a_key_is_read(store):
    again = replace(ROW, value=0.2, created="2026-11-22T11:00:00.000+00:00")
    store.append([again])
    store.append([ROW])
    assert store.rows() == [again]
    assert store.rows(latest=False) == [ROW, again]


def test_filters_and_has(store):
    store.append([ROW, replace(ROW, metric="val_loss/sd3/t0.125"), replace(ROW, metric="val_loss/sd3_other", run="d3")])
    assert [row.metric for row in store.rows(prefix="val_loss/sd3")] == ["val_loss/sd3", "val_loss/sd3/t0.125"]
    assert len(store.rows(prefix="val_loss")) == 3
    assert [row.run for row in store.rows(metric="val_loss/sd3_other")] == ["d3"]
    assert store.rows(run="d3", recipe_hash="other") == []
    assert store.has("abc", "val_loss/sd3")
    assert store.has("abc", "val_loss/sd3", images_seen=1000, protocol_hash="p1")
    assert not store.has("abc", "val_loss/sd3", images_seen=2000)
    assert not store.has("abc", "val_loss/sd3", protocol_hash="p2")
    assert not store.has("xyz", "val_loss/sd3")
    assert not store.has("abc", "val_loss")


def test_torn_and_foreign_objects_are_reported_and_skipped(store, capsys):
    store.append([ROW])
    (whole,) = storage.list_files(store.uri)
    data = storage.read_bytes(whole)
    storage.write_bytes(storage.join(store.uri, "0" * 32 + ".jsonl"), data[: len(data) // 2])
    for text in (b"[1, 2]\n", b'{"run": 3}\n', b"\xff\xfe\n", b"not json\n"):
        storage.write_bytes(storage.join(store.uri, storage.sha256_hex(text)[:32] + ".jsonl"), text)
    assert ResultStore(store.uri).rows() == [ROW]
    printed = capsys.readouterr().err
    assert printed.count("skipped") == 5
    assert "0" * 32 in printed


def test_rows_of_a_later_version_are_read(store):
    text = storage.read_bytes(_only_object(store)).replace(b'{"', b'{"from_the_future": 1, "', 1)
    storage.write_bytes(storage.join(store.uri, storage.sha256_hex(text)[:32] + ".jsonl"), text)
    assert ResultStore(store.uri).rows(latest=False) == [ROW, ROW]


def _only_object(store):
    store.append([ROW])
    (uri,) = storage.list_files(store.uri)
    return uri


def test_a_store_sees_what_others_append(store):
    reader = ResultStore(store.uri)
    store.append([ROW])
    assert len(reader.rows()) == 1
    store.append([replace(ROW, images_seen=2000)])
    assert len(reader.rows()) == 2


def test_concurrent_writers_lose_nothing(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name]) for name in "abc"]
    assert [writer.wait(timeout=180) for writer in writers] == [0, 0, 0]
    rows = ResultStore(str(tmp_path)).rows()
    assert sorted((row.run, row.images_seen) for row in rows) == [(name, step) for name in "abc" for step in range(20)]


def test_numpy_numbers_become_plain_ones_and_words_are_refused(store):
    store.append([replace(ROW, value=np.float32(0.5), images_seen=np.int64(7), higher_is_better=np.bool_(True))])
    (row,) = store.rows()
    assert (row.value, row.images_seen, row.higher_is_better) == (0.5, 7, True)
    with pytest.raises(UserError, match="result val_loss/sd3 of run d2 is not a number: value='high'"):
        store.append([replace(ROW, value="high")])


def test_creation_time_is_set():
    row = ResultRow("r", "h", "v", 1, "m", 1.0, True, 1, "p")
    assert row.created.endswith("+00:00")
