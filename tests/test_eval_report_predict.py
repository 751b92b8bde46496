"""Predictions: stored before the depth is trained, graded after, and never counted when they came too late."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from eval_runs import write_ladder, write_run

from eval.report.analysis import analyse
from eval.report.build import write_report
from eval.report.predict import predict
from eval.report.runs import read_runs
from infra import storage
from infra.errors import UserError
from infra.results import ResultStore


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A ladder with a committed prediction for depth 10."""
    root = str(tmp_path_factory.mktemp("predict"))
    write_ladder(root, (2, 3, 4, 6, 8), samples=False, scored=False)
    predict(root)
    return root


def rows(root):
    return ResultStore(storage.join(root, "results")).rows(prefix="prediction")


def test_a_prediction_is_a_row_that_says_what_it_stands_on(root):
    (row,) = rows(root)
    told = json.loads(row.details)
    assert row.metric == "prediction/val_loss/sd3/d10"
    assert row.low < row.value < row.high
    assert told["depth"] == 10
    assert told["fitted_to"] == [f"world-d{depth}" for depth in (2, 3, 4, 6, 8)]
    (graded,) = analyse(read_runs(root)).graded
    assert graded.actual is None
    assert graded.reason == "not trained yet"


def test_it_is_graded_once_the_depth_is_trained(root, tmp_path):
    write_run(root, 10, samples=False, scored=False)
    page = write_report(root, str(tmp_path)).read_text()
    (told,) = json.loads((tmp_path / "report.json").read_text())["predictions"]
    assert told["run"] == "world-d10"
    assert told["first"]
    assert told["inside"] == (told["loss"]["low"] <= told["actual"] <= told["loss"]["high"])
    assert told["inside"]
    assert "Predicted on" in page
    assert "committed" in page
    assert "Predicted on" in Path(tmp_path / "report.md").read_text()
    with pytest.raises(UserError, match="depth 10 is there already"):
        predict(root, 10)


def test_the_same_curves_are_asked_once(tmp_path):
    write_ladder(str(tmp_path), (2, 3, 4, 6), samples=False, scored=False)
    told = predict(str(tmp_path))
    assert predict(str(tmp_path)) == told
    (row,) = rows(str(tmp_path))
    again = replace(row, value=row.value / 2, created="2999-01-01T00:00:00.000+00:00")
    ResultStore(storage.join(str(tmp_path), "results")).append([again])
    (graded,) = analyse(read_runs(str(tmp_path))).graded
    assert graded.created == row.created, "of two from the same curves the first counts"


def test_what_is_graded_is_the_run_that_began_first(tmp_path):
    """Else one could train many and show the one that fits; nor does a run that was trained anew begin later."""
    root = str(tmp_path)
    write_ladder(root, (2, 3, 4, 6), samples=False, scored=False)
    predict(root)
    for name in ("z", "a"):
        write_run(root, 8, name=name, seed=ord(name), samples=False, scored=False)
    other = tmp_path / "0-dit" / "recipe.json"
    write_run(root, 8, name="0-dit", samples=False, scored=False)
    other.write_text(other.read_text().replace('"depth": 8', '"depth": 8, "backbone": "dit"'))
    (graded,) = analyse(read_runs(root)).graded
    assert (graded.run, graded.first) == ("z", True)
    store = ResultStore(f"{root}/z/results")
    early = [replace(row, created="2000-01-01T00:00:00.000+00:00") for row in store.rows()]
    store.append(early)  # the rows that stand now are later ones of the same keys
    (graded,) = analyse(read_runs(root)).graded
    assert (graded.run, graded.first) == ("z", False)


def test_one_that_came_after_the_run_began_proves_nothing(root):
    (row,) = rows(root)
    data = read_runs(root)
    late = replace(row, created="2999-01-01T00:00:00.000+00:00")
    report = analyse(replace(data, predictions=(late,)))
    assert report.graded[0].first is False
    assert "proves nothing" in "\n".join(f.text for f in report.findings)
    other = replace(row, protocol_hash="another protocol")
    assert "another protocol" in analyse(replace(data, predictions=(other,))).graded[0].reason
    torn = replace(row, details="{")
    assert analyse(replace(data, predictions=(torn,))).graded == []


def test_too_small_a_ladder_predicts_nothing(tmp_path):
    write_ladder(str(tmp_path), (2, 3, 4), samples=False, scored=False)
    with pytest.raises(UserError, match="no law is fitted: 3 model sizes"):
        predict(str(tmp_path))
    assert rows(str(tmp_path)) == []
