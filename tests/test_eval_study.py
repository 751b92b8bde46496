"""The formulation study: non-dominated sorting, noise between seeds, and tiny real runs that are measured once."""

import itertools
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_eval_run import export

from eval.studies.formulations import StudyOptions, find_entries, parse_setting, study
from eval.studies.options import DrawingOptions
from eval.studies.ranking import TABLE_1, StudyCell, compare_with_paper, estimate_seed_noise, number_fronts, rank
from infra.errors import UserError
from infra.results import ResultRow, ResultStore


def test_fronts_of_known_points():
    #        best of both, worse FID, worse CLIP, worse than all, equal to the best
    clip = [0.30, 0.30, 0.25, 0.20, 0.30]
    fid = [10.0, 12.0, 10.0, 20.0, 10.0]
    assert number_fronts(clip, fid) == [1, 2, 2, 3, 1]
    assert number_fronts([0.1, 0.2, 0.3], [1, 2, 3]) == [1, 1, 1], "a trade-off ranks equal"
    with pytest.raises(ValueError, match="not finite"):
        number_fronts([math.nan], [1.0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_fronts_are_what_dominance_says(points):
    clip, fid = [float(a) for a, _ in points], [float(b) for _, b in points]
    numbers = number_fronts(clip, fid)
    for i, n in enumerate(numbers):
        above = [
            numbers[j]
            for j in range(len(points))
            if clip[j] >= clip[i] and fid[j] <= fid[i] and (clip[j], fid[j]) != (clip[i], fid[i])
        ]
        assert n == 1 + max(above, default=0)


CONTROLS = [("d", kind, setting) for kind in ("ema", "raw") for setting in ("50x1.0", "50x5.0", "5x5.0")]


def cells(quality, seeds=(0, 1)):
    """Variants whose CLIP and FID follow one quality number per (variant, seed)."""
    return [
        StudyCell(variant, seed, control, quality(variant, seed), -quality(variant, seed))
        for variant in ("rf", "v/cos", "edm/rf", "eps/linear")
        for seed in seeds
        for control in CONTROLS
    ]


def test_a_clear_order_is_found_and_compared_with_the_paper():
    order = {"rf": 3.0, "v/cos": 2.0, "edm/rf": 1.0, "eps/linear": 4.0}
    found = rank(cells(lambda variant, seed: order[variant]))
    assert [row.variant for row in found.rows] == ["eps/linear", "rf", "v/cos", "edm/rf"]
    assert [row.overall for row in found.rows] == [1, 2, 3, 4]
    assert [row.groups for row in found.rows] == [(1,), (2,), (3,), (4,)]
    assert found.seed_noise == 0
    assert (found.controls, found.seeds) == (6, [0, 1])
    paper = compare_with_paper(found)
    assert paper["spearman"] == pytest.approx(1)
    assert paper["variants"] == 4
    assert len(TABLE_1) == 16


def test_no_order_is_drawn_inside_the_noise_of_seeds():
    swapped = {
        0: {"rf": 4, "v/cos": 3, "edm/rf": 2, "eps/linear": 1},
        1: {"rf": 1, "v/cos": 2, "edm/rf": 3, "eps/linear": 4},
    }
    found = rank(cells(lambda variant, seed: swapped[seed][variant]))
    assert {row.overall for row in found.rows} == {2.5}
    assert {row.groups for row in found.rows} == {(1,)}
    assert found.seed_noise == pytest.approx(np.sqrt(np.mean([4.5, 0.5, 0.5, 4.5])))
    assert found.least_difference > found.seed_noise


def test_neighbours_inside_the_noise_share_a_group_wherever_the_line_of_ranks_is_cut():
    """The committed study: a tier that begins at 1.00 and ends before 3.04 would part 2.62 from 3.04."""
    folder = Path(__file__).parents[1] / "infra/docs/runs/world_study"
    lines = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    found = rank([StudyCell(**{**line, "control": tuple(line["control"])}) for line in lines])
    for one, two in itertools.combinations(found.rows, 2):
        close = abs(one.overall - two.overall) <= found.least_difference
        assert bool(set(one.groups) & set(two.groups)) == close, (one, two)
    assert {row.groups for row in found.rows} > {(1,), (1, 2)}
    told = json.loads((folder / "study.json").read_text())["ranking"]["rows"]
    assert told == json.loads(json.dumps([asdict(row) for row in found.rows])), "what is committed is what is computed"


def test_one_seed_gives_no_noise_and_no_order():
    found = rank(cells(lambda variant, seed: len(variant), seeds=(0,)))
    assert math.isnan(found.seed_noise)
    assert {row.groups for row in found.rows} == {(1,)}
    assert all(math.isnan(x) for x in estimate_seed_noise(np.zeros((3, 1))))


def test_columns_average_the_papers_controls():
    def quality(variant, seed, control):
        better = control[2] == "5x5.0"
        return {"rf": 2.0 if better else 1.0, "v/cos": 1.0 if better else 2.0}[variant]

    found = rank([StudyCell(v, 0, c, quality(v, 0, c), 0.0) for v in ("rf", "v/cos") for c in CONTROLS])
    rf = next(row for row in found.rows if row.variant == "rf")
    assert (rf.few_steps, rf.many_steps) == (1, 2), "50 steps: guidance 5.0 alone"
    assert rf.overall == pytest.approx(4 / 6 * 2 + 2 / 6)


def test_variants_with_missing_cells_do_not_play():
    found = rank(cells(lambda variant, seed: len(variant))[:-1])
    assert len(found.rows) == 3
    assert found.left_out == {"eps/linear": "1 cell is missing or not finite, e.g. seed 1, d/raw/5x5.0"}


def test_a_number_that_is_none_leaves_its_variant_out():
    played = cells(lambda variant, seed: len(variant))
    found = rank([*played[:-1], played[-1]._replace(fid=math.nan)])
    assert (len(found.rows), list(found.left_out)) == (3, ["eps/linear"])


def test_settings_are_read():
    assert parse_setting("50x2.5") == (50, 2.5)
    for bad in ("50", "x", "0x1", "5xnan"):
        with pytest.raises(UserError, match="STEPSxGUIDANCE"):
            parse_setting(bad)


def make_run(root, name, formulation, seed):
    """A run folder as a sweep leaves it: two exported steps, raw weights of the last one."""
    run = root / name
    changes = {"formulation": formulation, "run": name, "recipe_hash": f"{name}-hash"}
    export(run / "weights" / "step_0000010" / "ema.safetensors", images_seen=40, **changes)
    export(run / "weights" / "step_0000020" / "ema.safetensors", images_seen=80, seed=seed, **changes)
    export(run / "weights" / "raw.safetensors", images_seen=80, seed=seed + 9, kind="raw", **changes)
    (run / "recipe.json").write_text(json.dumps({"seed": seed, "formulation": formulation}))
    return run


def test_the_checkpoint_with_the_least_validation_loss_is_judged_where_it_has_raw_weights(tmp_path):
    run = make_run(tmp_path, "one", "rf", 0)
    [entry], unfit = find_entries(str(tmp_path))
    assert not unfit
    assert (entry.checkpoint.step, entry.chosen) == (20, "step 20: the only one with raw weights")
    assert entry.weights["raw"].endswith("weights/raw.safetensors")
    shutil.copy(run / "weights" / "raw.safetensors", run / "weights" / "step_0000010" / "raw.safetensors")
    rows = [
        ResultRow("one", "one-hash", "v", images, "val_loss/sd3", loss, False, 8, "p")
        for images, loss in ((40, 0.5), (80, 0.6))
    ]
    ResultStore(str(run / "results")).append(rows)
    [entry], _ = find_entries(str(tmp_path))
    assert (entry.checkpoint.step, entry.chosen) == (10, "step 10: least EMA validation loss")
    make_run(tmp_path, "again", "rf", 0)
    with pytest.raises(UserError, match="are both rf with seed 0"):
        find_entries(str(tmp_path))
    (tmp_path / "again" / "weights" / "raw.safetensors").unlink()
    entries, unfit = find_entries(str(tmp_path))
    assert [entry.checkpoint.run for entry in entries] == ["one"]
    assert "no raw weights" in unfit["again"]
    (tmp_path / "again" / "unstable.json").write_text(json.dumps({"problem": "loss nan", "images": 40}))
    assert find_entries(str(tmp_path))[1] == {"again": "its training was unstable (loss nan)"}
    for torn in ('{"seed": 0, "formu', "[0]", ""):
        (tmp_path / "again" / "recipe.json").write_text(torn)
        with pytest.raises(UserError, match=r"again/recipe\.json (is not JSON|is \[0\], expected an object)"):
            find_entries(str(tmp_path))
    (tmp_path / "again" / "recipe.json").unlink()
    with pytest.raises(UserError, match=r"no recipe\.json"):
        find_entries(str(tmp_path))


def test_a_study_of_tiny_real_runs_is_measured_once_and_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("eval.metrics.fid.REFERENCES", 40)
    runs = tmp_path / "runs"
    for name, formulation, seed in (("a", "rf", 0), ("b", "v/cos", 0)):
        make_run(runs, name, formulation, seed)
    few = DrawingOptions(batch=4)
    options = StudyOptions(str(runs), str(tmp_path / "out"), captions=2, settings=("1x1.0", "2x5.0"), drawing=few)
    study(options)
    printed = capsys.readouterr().out
    assert "One seed only" in printed
    assert "| rf |" in printed
    assert "| v/cos |" in printed
    record = json.loads((tmp_path / "out" / "study.json").read_text())
    assert record["ranking"]["controls"] == 4
    assert record["ranking"]["seed_noise"] is None
    cells = [json.loads(line) for line in (tmp_path / "out" / "cells.jsonl").read_text().splitlines()]
    assert len(cells) == 2 * 4, "every number of every run"
    stored = sorted(p.name for p in Path(runs).rglob("results/*.jsonl"))
    assert len(stored) == 2 * 2 * 2 * 2, "runs x kinds x settings x metrics: rows land one by one"
    gone = next(Path(runs / "b" / "results").glob("*.jsonl"))
    gone.unlink()
    study(options)
    assert sorted(p.name for p in Path(runs).rglob("results/*.jsonl")) != []
    rows = ResultStore(str(runs / "b" / "results")).rows(prefix="study")
    assert len(rows) == 8
    assert len(list((runs / "b" / "results").glob("*.jsonl"))) in (8, 9), "one setting was measured again, no more"
    assert len(list((runs / "a" / "results").glob("*.jsonl"))) == 8
