"""The index reads what changed and nothing else, keeps protocols apart, and survives what is torn, odd or gone."""

import json

import numpy as np
import pytest
from eval_runs import write_calibration, write_run

from eval.drawing.precision import settle_precision
from eval.report.runs import read_runs
from eval.report.series import compare
from eval.service.answers import JsonAnswer
from eval.service.index import Index
from eval.service.numbers_api import list_calibration, list_series
from eval.service.runs_api import list_runs
from infra import storage
from infra.errors import UserError
from infra.results import ResultRow, ResultStore


def row(run, metric, value, images=100, protocol="p", **fields):
    return ResultRow(run, "hash", "v1", images, metric, value, False, 4, protocol, **fields)


def test_it_says_what_the_report_says(tmp_path):
    root = str(tmp_path)
    for depth in (2, 3):
        write_run(root, depth)
    write_run(root, 4, protocol="another")
    write_calibration(root)
    index = Index(root)
    index.refresh()
    data = read_runs(root)
    assert [run.name for run in index.snapshot.runs] == [run.name for run in data.runs]
    for metric in ("val_loss/sd3", "world_geneval/overall/seen", "val_loss/sd3/t0.5", "world_fid"):
        theirs, ours = compare(data.runs, metric), index.snapshot.select_curves(metric)
        assert theirs.protocol == ours.protocol
        assert {left.run for left in theirs.left_out} == set(ours.left_out)
        for run, points in theirs.points.items():
            assert ours.by_run[run].images_P.tolist() == [p.images for p in points]
            np.testing.assert_array_equal(ours.by_run[run].value_P, [p.value for p in points])
    assert index.snapshot.select_curves("no/such") is None
    assert list_calibration(index.snapshot).lines[0].ground_truth.value == pytest.approx(0.972)


def test_a_refresh_reads_only_runs_that_changed(tmp_path, monkeypatch):
    root = str(tmp_path)
    for depth in (2, 3):
        write_run(root, depth, samples=False, scored=False)
    index = Index(root)
    assert index.refresh()
    before = index.snapshot
    assert not index.refresh()
    assert index.snapshot is before
    read = []
    original = Index._read
    monkeypatch.setattr(Index, "_read", lambda self, name, *a, **k: read.append(name) or original(self, name, *a, **k))
    store = ResultStore(storage.join(root, "world-d3", "results"))
    store.append([row("world-d3", "val_loss/sd3", 0.1, images=99_000)])
    assert index.refresh()
    assert read == ["world-d3"]
    assert index.snapshot.by_name["world-d3"].images == 99_000
    assert index.snapshot.by_name["world-d2"] is before.by_name["world-d2"]
    assert before.by_name["world-d3"].images == 12_000  # a snapshot that is being shown does not change
    (tmp_path / "world-d2" / "logs").mkdir()
    (tmp_path / "world-d2" / "logs" / "train.jsonl").write_text("{}")
    assert not index.refresh()


def test_a_service_that_only_shows_tells_what_others_evaluated(tmp_path):
    from eval.service.claims import claim

    uri = write_run(str(tmp_path), 2, samples=False, scored=False)
    for step in (10, 20, 30):
        storage.write_bytes(f"{uri}/weights/step_{step:07d}/ema.safetensors", b"weights")
    claim(uri, "theirs", 10).end("done")
    claim(uri, "theirs", 20).end("failed", reason="no room")
    claim(uri, "older", 20).end("done")
    index = Index(str(tmp_path))
    index.refresh()
    [run] = index.snapshot.runs
    assert run.list_states("theirs") == {10: "done", 20: "failed"}
    assert run.list_states("") == {10: "done", 20: "done"}
    assert list_runs(index.snapshot, "").runs[0].evaluated == 2
    assert list_runs(index.snapshot, "mine").runs[0].evaluated == 0
    ResultStore(f"{uri}/results").append([row("world-d2", "world_fid", 9.0, images=30 * 64)])  # by `eval run`
    index.refresh()
    assert index.snapshot.runs[0].list_states("") == {10: "done", 20: "done", 30: "done"}


def test_torn_rows_and_recipes_are_told_and_the_rest_is_shown(tmp_path):
    root = str(tmp_path)
    uri = write_run(root, 2, samples=False, scored=False)
    (tmp_path / "world-d2" / "results" / "0123.jsonl").write_text('{"run": "world-d2", "met')
    (tmp_path / "world-d2" / "recipe.json").write_text('{"name": ')
    index = Index(root)
    index.refresh()
    run = index.snapshot.by_name["world-d2"]
    assert run.series["val_loss/sd3"]
    assert any("0123.jsonl" in said for said in run.skipped)
    assert any("recipe.json" in said for said in run.run.missing)
    ResultStore(uri + "/results").append([row("world-d2", "val_loss/sd3", 0.1, images=99_000)])
    index.refresh()  # still told, though the store does not read the torn object again
    assert any("0123.jsonl" in said for said in index.snapshot.by_name["world-d2"].skipped)
    (tmp_path / "world-d2" / "results" / "0123.jsonl").unlink()
    index.refresh()
    assert index.snapshot.by_name["world-d2"].skipped == ()


def test_runs_that_go_and_a_store_that_is_empty_or_one_run(tmp_path):
    root = str(tmp_path)
    settle_precision("auto", "cpu", results=str(tmp_path / "results"))  # a service that starts before the first run
    index = Index(root)
    assert index.refresh()
    assert index.snapshot.runs == ()
    with pytest.raises(UserError, match="no run folder"):
        read_runs(root)
    write_run(root, 2, scored=False)
    assert index.refresh()
    alone = Index(root + "/world-d2/")
    alone.refresh()
    assert [run.name for run in alone.snapshot.runs] == ["world-d2"]
    assert alone.snapshot.runs[0].run.depth == 2
    for path in sorted((tmp_path / "world-d2").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert index.refresh()
    assert index.snapshot.runs == ()


def test_weights_galleries_and_evaluations_are_found_and_other_files_are_not(tmp_path):
    root = str(tmp_path)
    uri = write_run(root, 2, scored=False)
    for path in ("weights/step_0000100/ema.safetensors", "weights/ema.safetensors", "gallery/step_0000100.png",
                 "gallery/step_0000100.json", "evaluations/s/step_0000100/0001.done.json", "notes.txt"):  # fmt: skip
        storage.write_bytes(f"{uri}/{path}", b"x")
    index = Index(root)
    index.refresh()
    run = index.snapshot.by_name["world-d2"]
    assert run.weights == {100: f"{uri}/weights/step_0000100/ema.safetensors"}
    assert run.gallery == {100: f"{uri}/gallery/step_0000100.png"}
    assert list_runs(index.snapshot, "s").runs[0].evaluated == 1
    assert list_runs(index.snapshot, "other").runs[0].evaluated == 0
    assert list_runs(index.snapshot, "").runs[0].evaluated == 1  # whatever it was evaluated with


def test_a_store_on_s3_is_read_claimed_and_judged_alike(s3):
    from eval.service.claims import claim, read_outcomes
    from eval.studies.human import HumanStudies, StudySide

    root = storage.join(s3, "runs")
    uri = write_run(root, 2, scored=False, checkpoints=1)
    storage.write_bytes(f"{uri}/weights/step_0000100/ema.safetensors", b"x")
    index = Index(root)
    assert index.refresh()
    assert not index.refresh()
    assert index.snapshot.by_name["world-d2"].weights == {100: f"{uri}/weights/step_0000100/ema.safetensors"}
    first = claim(uri, "s", 100)
    assert claim(uri, "s", 100) is None
    first.end("done")
    assert index.refresh()
    assert read_outcomes(index.snapshot.by_name["world-d2"].evaluations, "s")[100].state == "done"
    studies = HumanStudies(root)
    study = studies.create("one", StudySide("a", 1), StudySide("b", 1), prompts=["a", "b"], gallery="g")
    assert studies.vote(study, "ann", 0, dict.fromkeys(study.list_questions(0), "left"))
    assert not studies.vote(study, "ann", 0, dict.fromkeys(study.list_questions(0), "right"))
    assert studies.list_names() == ["one"]
    assert not index.refresh()  # studies are no runs


def test_nan_and_infinite_values_never_reach_json(tmp_path):
    root = str(tmp_path)
    uri = write_run(root, 2, scored=False)
    store = ResultStore(uri + "/results")
    store.append([row("world-d2", "odd", float("nan")), row("world-d2", "odd", float("inf"), images=200)])
    store.append([row("world-d2", "odd", 3.0, images=300, low=float("nan"), high=4.0)])
    index = Index(root)
    index.refresh()
    told = list_series(index.snapshot, "odd", [], points=10)
    told = json.loads(JsonAnswer(told).body)
    assert told["runs"][0]["value"] == [None, 3.0]
    assert told["runs"][0]["low"] == [None, None]


def test_long_series_are_thinned_with_both_ends(tmp_path):
    uri = write_run(str(tmp_path), 2, scored=False)
    ResultStore(uri + "/results").append([row("world-d2", "long", float(i), images=i) for i in range(1, 1001)])
    index = Index(str(tmp_path))
    index.refresh()
    images = list_series(index.snapshot, "long", [], points=50).runs[0].images
    assert len(images) == 50
    assert (images[0], images[-1]) == (1, 1000)
