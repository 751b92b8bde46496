"""The driver's state on scratch disk: what it finds equals what plain Python finds, and its memory does not grow."""

import ast
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from data_pipeline_driver import Packed, driver, fill
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.curation.dedup import Dedup
from data_pipeline.curation.hash_matching import find_first_equal, find_first_near
from data_pipeline.flow import pipeline
from data_pipeline.formats import parquet_io
from data_pipeline.formats.parquet_io import encode_table, read_batches, write_tables
from data_pipeline.formats.schema import fingerprint, fingerprint_all
from data_pipeline.stages.row_status import RowStatuses, status_table
from data_pipeline.stages.scratch_db import ScratchDatabase, WorkList
from infra import storage
from infra.errors import UserError

KEYS = st.tuples(st.sampled_from(["", "a", "b", "\u00e9", "\U0001f525"]), st.integers(-3, 300))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(KEYS, st.none() | st.binary(max_size=9)), max_size=60), st.integers(0, 700))
def test_a_shelf_is_a_sorted_map(changes, more):
    map_, expected = ScratchDatabase().new_map("name", "number"), {("many", n): b"x" for n in range(more)}
    for key in expected:
        map_[key] = b"x"
    for key, value in changes:
        if value is None:
            del map_[key]
            expected.pop(key, None)
        else:
            map_[key] = expected[key] = value
    assert list(map_) == sorted(expected)
    assert list(map_.items()) == sorted(expected.items())
    assert list(map_.items("a")) == sorted(item for item in expected.items() if item[0][0] == "a")
    assert len(map_) == len(expected)
    assert map_.list_distinct("name") == sorted({name for name, _ in expected})
    assert (("a", 1) in map_) == (("a", 1) in expected)
    with pytest.raises(KeyError):
        map_["no", 0]


def test_units_and_verdicts_come_back_as_they_went():
    todo = WorkList()
    for number in range(3):
        todo.add({"id": f"\udc80{number}", "rows": ((0, 2),)}, rows=2)
    assert list(todo) == list(todo) == [{"id": f"\udc80{n}", "rows": [[0, 2]]} for n in range(3)]
    assert (len(todo), todo.rows) == (3, 6)
    verdicts = RowStatuses(ScratchDatabase())
    tables = {"b": status_table([0, 3], ["ok", "nsfw"], ["", "0.9"]), "a": status_table([], [], [])}
    verdicts.update(tables)
    assert list(verdicts) == ["a", "b"]
    assert all(verdicts[shard].equals(table) for shard, table in tables.items())
    assert ("b" in verdicts, "c" in verdicts) == (True, False)


FULL = """
import resource, signal
import pyarrow as pa
from data_pipeline.stages.scratch_db import ScratchDatabase, WorkList
from data_pipeline.formats.parquet_io import write_tables
from infra.errors import UserError
from infra.scratch import Spool, allocate
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
todo, map_, table = WorkList(), ScratchDatabase().new_map("name"), pa.table({"a": list(range(9999))})
for n in range(300):
    todo.add({"id": f"{n:09}"})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    WRITE
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("write", [
    "todo.add({'id': 'x' * 9999})", "list(todo)", "write_tables('.', 't-', [table])", "allocate(9999, int)",
    "map_['a',] = bytes(99_999_999)", "Spool(int).append(range(9999))",
])  # fmt: skip
def test_a_full_scratch_disk_is_one_line(tmp_path, write):
    """A file may grow to 4 kB here, of which a program is told as of a full disk."""
    command = [sys.executable, "-c", FULL.replace("WRITE", write)]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}: scratch disk full")


def test_all_that_is_remembered_lies_below_tmpdir(tmp_path):
    code = """
import os
from data_pipeline.stages.scratch_db import ScratchDatabase, WorkList
from infra.scratch import Spool
kept = ScratchDatabase(), WorkList(), Spool(int)
links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
print([os.readlink(link) for link in links if os.path.islink(link)])
"""
    env = os.environ | {"TMPDIR": str(tmp_path), "SQLITE_TMPDIR": "/var/tmp"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    found = [path for path in ast.literal_eval(done.stdout) if "deleted" in path]
    assert len(found) == 3
    assert all(path.startswith(str(tmp_path)) for path in found)
    assert not list(tmp_path.iterdir())


def test_tables_without_rows_take_no_memory(tmp_path):
    """Of a root where hardly any row is set aside."""
    alive: list[weakref.ref] = []

    def tables():
        for number in range(3000):
            rows = number % 700 == 699
            table = pa.table({"a": pa.array([number] * rows, pa.int64()), "b": pa.array(["x"] * rows, pa.string())})
            alive.append(weakref.ref(table))
            yield table

    name = write_tables(str(tmp_path), "t-", tables())
    assert (tmp_path / name).read_bytes() == encode_table(pa.concat_tables(tables()).combine_chunks())
    alive.clear()
    most = 0

    def counted():
        nonlocal most
        for table in tables():
            most = max(most, sum(ref() is not None for ref in alive[-600:]))
            yield table

    write_tables(str(tmp_path), "t-", counted())
    assert most < 300


@given(st.lists(st.lists(st.text(), max_size=3), max_size=4))
def test_a_long_fingerprint_is_the_fingerprint(values):
    assert fingerprint_all(iter(values)) == fingerprint(values)


def test_a_table_in_pieces_has_the_bytes_of_the_whole_where_it_fits_and_the_same_rows_where_not(tmp_path, monkeypatch):
    tables = [pa.table({"a": [n, n + 1], "b": ["x" * n, ""]}) for n in range(50)]
    whole = encode_table(pa.concat_tables(tables).combine_chunks())
    name = write_tables(str(tmp_path), "t-", iter(tables))
    assert name == f"t-{storage.sha256_hex(whole)[:16]}.parquet"
    assert (tmp_path / name).read_bytes() == whole
    monkeypatch.setattr(parquet_io, "_GROUP_BYTES", 64)
    other = write_tables(str(tmp_path), "t-", iter(tables))
    assert other != name
    monkeypatch.setattr(parquet_io, "_BATCH_ROWS", 7)
    rows = [row for batch in read_batches(str(tmp_path / other)) for row in batch.to_pylist()]
    assert rows == pa.concat_tables(tables).to_pylist()
    empty = tables[0].slice(0, 0)
    assert (tmp_path / write_tables(str(tmp_path), "e-", [empty])).read_bytes() == encode_table(empty)


# --- duplicates


def plain_equal(keys: list) -> list[int]:
    return [keys.index(key) if keys.index(key) < number else -1 for number, key in enumerate(keys)]


def plain_near(values: list[int], distance: int) -> list[int]:
    found: list[int] = []
    for number, value in enumerate(values):
        kept = (n for n in range(number) if found[n] < 0 and (values[n] ^ value).bit_count() <= distance)
        found.append(next(kept, -1))
    return found


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=70), st.integers(1, 9))
def test_equal_keys_are_found_whatever_the_blocks_and_parts(values, block_rows):
    keys = np.random.default_rng(1).integers(0, 2**63, (10, 2), np.uint64)[np.array(values, int)] << np.uint64(1)
    assert find_first_equal(keys, block_rows).tolist() == plain_equal(values)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=12), st.integers(0, 9), st.randoms(), st.integers(1, 40))
def test_near_hashes_are_found_whatever_the_blocks(values, distance, random, block_rows):
    for _ in range(3 if values else 0):  # chains: copies of copies
        values += [value ^ (1 << random.randrange(64)) ^ (1 << random.randrange(64)) for value in values]
    random.shuffle(values)
    assert find_first_near(np.array(values, np.uint64), distance, block_rows).tolist() == plain_near(values, distance)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.sampled_from("uvwxyz"), st.integers(0, 15), st.booleans()), max_size=6), max_size=5),
    st.none() | st.integers(0, 2),
    st.booleans(),
)
def test_statuses_and_reasons_of_duplicates_equal_a_plain_search(shards, distance, preferring):
    """Rows (pixels, hash, preferred) by shard, in order of precedence."""
    rows = [(f"s{s}", 10 * r, *row) for s, shard in enumerate(shards) for r, row in enumerate(shard)]
    order = sorted(range(len(rows)), key=lambda n: not rows[n][4]) if preferring else list(range(len(rows)))
    equal = plain_equal([rows[n][2] for n in order])
    near = [-1] * len(rows) if distance is None else plain_near([rows[n][3] for n in order], distance)
    expected = {row[:2]: ("ok", "") for row in rows}
    for rank, found in enumerate(zip(equal, near)):
        kind, first = ("equal", found[0]) if found[0] >= 0 else ("perceptual", found[1])
        if first >= 0:
            shard, row = rows[order[first]][:2]
            expected[rows[order[rank]][:2]] = ("duplicate", f"{kind}: of {shard} row {row}")
    signatures = [
        (f"s{s}", pa.table({
            "row": pa.array([10 * r for r in range(len(shard))], pa.int32()),
            "exact": pa.array([row[0] for row in shard], pa.string()),
            "perceptual": pa.array([row[1] for row in shard], pa.uint64()),
        })) for s, shard in enumerate(shards)
    ]  # fmt: skip

    def preferred(name: str) -> np.ndarray:
        return np.array([row[1] for row in rows if row[0] == name and row[4]], int)

    made = Dedup(distance).run(iter(signatures), preferred=preferred if preferring else None)
    tables = list(made.iterate_tables())
    assert [name for name, _ in tables] == [name for name, _ in signatures]
    assert {(n, r["row"]): (r["status"], r["reason"]) for n, t in tables for r in t.to_pylist()} == expected


# --- a driver over a root whose columns are there


def test_dedup_of_many_shards_is_a_series_of_manifests_that_counts_when_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "PackTask", Packed)
    fill(driver(str(tmp_path), 10_000))
    column = tmp_path / driver(str(tmp_path), 0).columns.dedup[1].folder

    def run() -> tuple[bool, set[str], str]:
        outcome = driver(str(tmp_path), 10_000).run()
        return "dedup" in outcome.computed, {path.name for path in column.glob("*.json")}, outcome.info.fingerprint

    computed, (single,), fingerprint = run()
    assert computed
    monkeypatch.setattr(pipeline, "_DEDUP_SHARDS", 3)
    assert run() == (False, {single}, fingerprint)  # as it was written before there were series
    (column / single).unlink()
    computed, series, _ = run()
    assert (computed, len(series)) == (True, 4)
    assert run() == (False, series, fingerprint)
    (column / max(series)).unlink()  # a driver that was killed
    assert run() == (True, series, fingerprint)
    next((column / "objects").glob("*.parquet")).unlink()
    assert run() == (True, series, fingerprint)


def test_a_run_goes_on_without_a_shard_whose_unit_fails_again(tmp_path, monkeypatch):
    """It was ingested by an earlier run and lacks a column, which this run cannot make: its object holds no images."""
    monkeypatch.setattr(pipeline, "PackTask", Packed)
    fill(driver(str(tmp_path), 20_000))
    whole = driver(str(tmp_path), 20_000).run().info.counts
    column = driver(str(tmp_path), 0).columns.fingerprints["measure"][:12]
    (tmp_path / "columns" / "measure" / column / "all-000001-003.0.json").unlink()
    for _ in range(2):
        again = driver(str(tmp_path), 20_000)
        again.jobs.keep_going = True
        assert {name: 20 * n for name, n in again.run().info.counts.items()} == {n: 19 * c for n, c in whole.items()}
        assert list(again.jobs.failed) == ["all-000001"]
    with pytest.raises(UserError, match="1 of 1 units failed, first all-000001"):
        driver(str(tmp_path), 20_000).run()


def test_a_root_of_which_nothing_is_left_is_told_so_each_time(tmp_path):
    fill(driver(str(tmp_path), 10_000))
    for path in (tmp_path / "columns" / "measure").glob("*/*.json"):
        path.unlink()
    for _ in range(3):
        made = driver(str(tmp_path), 10_000)
        made.jobs.keep_going = True
        with pytest.raises(UserError, match="the source gave no rows"):
            made.run()


def drive(root: Path, rows: int) -> dict:
    script = Path(__file__).parent / "data_pipeline_driver.py"
    command = [sys.executable, str(script), str(root), str(rows), "--small"]
    # what is freed goes back to the system, so that what is held is seen
    eager = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | eager)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_memory_of_the_driver_does_not_grow_with_rows(tmp_path):
    few, many = (drive(tmp_path / str(rows), rows) for rows in (100_000, 400_000))
    held = [found["mib"] - found["mib_before"] for found in (few, many)]
    assert (held[1] - held[0]) * 2**20 / 300_000 < 16, (few, many)  # it was 512 with everything in memory
