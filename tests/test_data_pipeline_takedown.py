"""Takedowns: gone from every later batch, nothing else moves, runs that saw an image by an independent replay."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_pipeline.__main__ import COMMANDS
from data_pipeline.loading.loader import open_dataset
from data_pipeline.loading.order import DataExceptions
from data_pipeline.loading.taken_down import EFFECTIVE, Takedown, note_takedowns
from data_pipeline.packing.synthetic import write_synthetic
from data_pipeline.selection.choice import DataChoice, describe_choice
from data_pipeline.selection.takedown import describe_takedown, find_runs, find_sightings, take_down
from infra.cli import run_commands
from infra.codec import to_json
from infra.errors import UserError

KEY, OTHER = "train-32x32-000007", "train-24x40-000003"


@pytest.fixture
def root(tmp_path) -> str:
    uri = str(tmp_path / "data")
    write_synthetic(
        uri, num_samples=80, val_samples=8, latent_shape=(4, 8, 8), buckets=("32x32", "24x40"), shard_rows=16
    )
    return uri


def read_keys(dataset, steps: int, **wanted) -> list[list[str]]:
    stream = dataset.batches(**{"seed": 5, "global_batch": 8, **wanted})
    found = [next(stream).keys for _ in range(steps)]
    stream.close()
    return found


def write_run(run: Path, root: str, images: int, *, choice: DataChoice | None = None, **more: object) -> None:
    """A run folder as far as a takedown looks at it."""
    dataset = choice.open() if choice else open_dataset(root)
    (run / "checkpoints" / "step_0000001").mkdir(parents=True)
    (run / "recipe.json").write_text(json.dumps({"seed": 5, "global_batch": 8}))
    (run / "data.json").write_bytes(dataset.info.to_bytes())
    if choice:
        (run / "trained_on.json").write_text(json.dumps(to_json(describe_choice(choice, dataset))))
    state = {"state": {"images_seen": images}}
    (run / "checkpoints" / "step_0000001" / "manifest.json").write_text(json.dumps(state))
    rank = {"extra": {"exceptions": {"shards": [], "positions": [], **more}}}
    (run / "checkpoints" / "step_0000001" / "rank_00000.json").write_text(json.dumps(rank))


def test_what_is_taken_down_is_replaced_and_nothing_else_moves(root):
    before = read_keys(open_dataset(root), 40)
    fingerprint = open_dataset(root).fingerprint
    taken, new = take_down(root, [KEY, OTHER], [])
    assert new
    assert [key for _, _, key in taken.rows] == sorted([KEY, OTHER], key=[k for _, _, k in taken.rows].index)
    dataset = open_dataset(root)
    after = read_keys(dataset, 40)
    assert sum(key in (KEY, OTHER) for batch in before for key in batch) >= 6
    for one, two in zip(before, after):
        for a, b in zip(one, two):
            assert b not in (KEY, OTHER)
            assert a == b or (a in (KEY, OTHER) and a[:11] == b[:11])  # a stand-in of the same bucket
    assert dataset.fingerprint == fingerprint
    assert read_keys(open_dataset(root), 15, start=200) == after[25:]  # a restart reads the same stand-ins
    lanes = [read_keys(open_dataset(root), 40, rank=rank, world_size=2) for rank in range(2)]
    assert [a + b for a, b in zip(*lanes)] == after


def test_the_same_request_again_changes_nothing(root, capsys):
    words = ["takedown", root, "--keys", KEY]
    run_commands("python -m data_pipeline", COMMANDS, "", words=words)
    said = capsys.readouterr().out
    assert f"1 samples are taken down ({KEY})" in said
    files = sorted(Path(root, "takedown").iterdir())
    run_commands("python -m data_pipeline", COMMANDS, "", words=words)
    assert "1 samples were taken down before" in capsys.readouterr().out
    assert sorted(Path(root, "takedown").iterdir()) == files
    assert "no sample has the keys nobody" in _say(root, capsys, "--keys", "nobody")
    with pytest.raises(UserError, match="give --keys or --hashes"):
        take_down(root, [], [])
    with pytest.raises(UserError, match="no hashes of pixels: give --keys"):
        take_down(root, [], ["00"])


def test_runs_that_are_not_there_and_hashes_of_no_sample_are_told(root, tmp_path):
    with pytest.raises(UserError, match=r"--runs .*nowhere: no run there"):
        find_runs([str(tmp_path / "nowhere")])
    assert "no sample has the hashes ff" in describe_takedown(root, Takedown((), ("ff",), (), "x"), True, [], runs=0)


def _say(root: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    run_commands("python -m data_pipeline", COMMANDS, "", words=["takedown", root, *more])
    return capsys.readouterr().out


@pytest.mark.parametrize("images", [0, 8, 64, 400])
def test_runs_that_saw_an_image_are_those_of_a_replay(root, tmp_path, images):
    other = str(shutil.copytree(root, tmp_path / "other"))
    write_synthetic(
        other, num_samples=40, val_samples=8, latent_shape=(4, 8, 8), buckets=("32x32",), shard_rows=16, seed=3
    )
    choices = {
        "plain": None,
        "filtered": DataChoice((root,), where=("key != 'train-32x32-000001'",)),
        "without": DataChoice((root,), where=(f"key != '{KEY}'",)),
        "mixed": DataChoice((f"a={root}", f"b={other}"), mix=("a=1", "b=2"), max_repeats=4),
    }
    expected: dict[str, int] = {}
    for name, choice in choices.items():
        write_run(tmp_path / "runs" / name, root, images, choice=choice)
        dataset = choice.open() if choice else open_dataset(root)
        stream = dataset.batches(seed=5, global_batch=8)
        for _ in range(images // 8):
            batch = next(stream)
            own = [True] * 8 if batch.dataset_B is None else (batch.dataset_B == 0).tolist()
            expected[name] = expected.get(name, 0) + sum(k == KEY and mine for k, mine in zip(batch.keys, own))
        stream.close()
    taken, _ = take_down(root, [KEY], [])
    runs = find_runs([str(tmp_path / "runs")])
    assert len(runs) == 4
    found = {Path(s.run).name: s.times.get(KEY, 0) for s in find_sightings(root, taken, runs)}
    assert found == {name: expected.get(name, 0) for name in choices}
    assert not found["without"]


def test_a_run_counts_until_the_takedown_and_foreign_runs_are_not_listed(root, tmp_path):
    seen = Counter(key for batch in read_keys(open_dataset(root), 20) for key in batch)
    taken, _ = take_down(root, [KEY], [])
    write_run(tmp_path / "runs" / "later", root, 400)
    note_takedowns(str(tmp_path / "runs" / "later" / EFFECTIVE), [taken], images_seen=160)
    note_takedowns(str(tmp_path / "runs" / "later" / EFFECTIVE), [taken], images_seen=320)  # a second start
    write_synthetic(str(tmp_path / "else"), num_samples=16, val_samples=8, latent_shape=(4, 8, 8), seed=9)
    write_run(tmp_path / "runs" / "foreign", str(tmp_path / "else"), 400)
    sightings = {Path(s.run).name: s for s in find_sightings(root, taken, find_runs([str(tmp_path / "runs")]))}
    assert sightings["later"].times.get(KEY, 0) == seen[KEY]
    assert not sightings["later"].unsure
    assert "foreign" not in sightings


def test_images_that_stood_in_for_others_are_counted(root, tmp_path):
    other, alike = str(tmp_path / "other"), str(shutil.copytree(root, tmp_path / "alike"))
    write_synthetic(
        other, num_samples=40, val_samples=8, latent_shape=(4, 8, 8), buckets=("32x32",), shard_rows=16, seed=3
    )
    tar = next(tar for tar in open_dataset(root).index.tars if "24x40" in tar)
    mixed = DataChoice((f"a={root}", f"b={other}", f"c={alike}"), mix=("a=2", "b=1", "c=1"))
    filtered = DataChoice((root,), where=("key != 'train-32x32-000001'",))
    skipped = frozenset(range(40, 56))
    # positions that were skipped, a shard that is left out from image 80 on, an image taken down at image 160
    expected, undone = {}, {}
    for name, choice in {"plain": None, "filtered": filtered, "mixed": mixed}.items():
        whole = f"a/{tar}" if name == "mixed" else tar
        first = DataExceptions(positions=skipped)
        write_run(
            tmp_path / "runs" / name, root, 480, choice=choice, positions=sorted(skipped), shards=[whole],
            since={whole: 80},
        )  # fmt: skip
        spans = [(0, 10, first), (80, 10, first | DataExceptions(frozenset({whole}), since={whole: 80}))]
        keys = [(choice.open() if choice else open_dataset(root), start, steps, out) for start, steps, out in spans]
        expected[name] = count_own(keys)
        plain = count_own([(choice.open() if choice else open_dataset(root), 40, 2, DataExceptions())])
        undone[name] = plain
    earlier, _ = take_down(root, [OTHER], [])
    for name, choice in {"plain": None, "filtered": filtered, "mixed": mixed}.items():
        whole = f"a/{tar}" if name == "mixed" else tar
        out = DataExceptions(frozenset({whole}), skipped, {whole: 80})
        expected[name] += count_own([(choice.open() if choice else open_dataset(root), 160, 40, out)])
        note_takedowns(str(tmp_path / "runs" / name / EFFECTIVE), [earlier], images_seen=160)
    keys = sorted(key for key in expected["plain"] if key != OTHER)
    taken, _ = take_down(root, keys, [])
    found = {Path(s.run).name: s for s in find_sightings(root, taken, find_runs([str(tmp_path / "runs")]))}
    for name in expected:
        assert found[name].times == {key: count for key, count in expected[name].items() if key in keys}
        assert found[name].undone == {key: count for key, count in undone[name].items() if key in keys}
        assert not found[name].unsure


def count_own(spans) -> Counter[str]:
    """How often batches of these spans show each image of the dataset that is named first, as the loader reads."""
    seen: Counter[str] = Counter()
    for dataset, start, steps, out in spans:
        stream = dataset.batches(seed=5, global_batch=8, start=start, exceptions=out)
        for _ in range(steps):
            batch = next(stream)
            own = [True] * 8 if batch.dataset_B is None else (batch.dataset_B == 0).tolist()
            seen.update(key for key, mine in zip(batch.keys, own) if mine)
        stream.close()
    return seen


def test_ranks_that_met_unreadable_shards_are_told(root, tmp_path):
    tar = open_dataset(root).index.tars[0]
    run = tmp_path / "runs" / "two"
    write_run(run, root, 80, shards=[tar], since={tar: 8})
    rank = run / "checkpoints" / "step_0000001" / "rank_00000.json"
    shutil.copy(rank, rank.with_name("rank_00001.json"))
    taken, new = take_down(root, [KEY], [])
    sighting = find_sightings(root, taken, [str(run)])[0]
    assert sighting.unsure
    assert "perhaps more often" in describe_takedown(root, taken, new, [sighting], runs=1)


def test_the_next_pack_sets_the_rows_aside(tmp_path):
    from dataclasses import replace

    from data_pipeline.flow.pipeline import Pipeline
    from data_pipeline.plans import world
    from data_pipeline.selection.filters import select_rows
    from data_pipeline.selection.row_values import RowValues
    from data_pipeline.sources.registry import open_source
    from data_pipeline.world.write import write_world
    from infra.runner import WorkerPool

    write_world(str(tmp_path / "raw"), images=20, val_images=2, seed=3, images_per_shard=20)
    root, plan = str(tmp_path / "data"), replace(world(), ingest_rows=8, pack_rows=8)

    def run():
        return Pipeline(plan, root, open_source(f"wds:{tmp_path / 'raw'}"), workers=WorkerPool(0)).run()

    run()
    # what the pipeline measured can be asked for, row by row
    dataset = select_rows(open_dataset(root), ["width == 64 and height >= 64 and exact is not None"])
    assert dataset.kept.num_kept == dataset.num_samples == 20
    keys = read_keys(open_dataset(root), 1, global_batch=20)[0]
    known = {
        row["key"]: row["exact"]
        for _, rows in RowValues(open_dataset(root)).read(["exact"])
        for row in rows.to_pylist()
    }
    digest = known[keys[1]]
    taken, _ = take_down(root, [keys[0]], [digest])
    gone = {key for _, _, key in taken.rows}
    assert gone == set(keys[:2])
    assert not gone & {key for batch in read_keys(open_dataset(root), 6) for key in batch}
    packed = run()
    assert packed.info.counts["taken_down"] == 2
    listed = pq.read_table(packed.rejected).to_pylist()
    assert [row["status"] for row in listed].count("taken_down") == 2
    left = open_dataset(root)
    assert sum(open_dataset(root, split=split).num_samples for split in ("train", "val")) == 20
    assert not left.taken_down
    assert take_down(root, [keys[0]], [digest])[1] is False
