"""The plan after the run: graded against its goals, and calibrated by a small run, through the plain command."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from infra.codec import to_json
from infra.errors import UserError
from infra.results import ResultRow, ResultStore
from trainer.__main__ import main
from trainer.machines import detect_machine, get_machine
from trainer.planning.estimates import Cost, StepCost, count_passes
from trainer.planning.hardware_plan import make_hardware_plan
from trainer.planning.reality import calibrate, find_goal, find_missed
from trainer.recipe import Optimizer, Parallel, Recipe
from trainer.recipes import get_recipe

SMALL = dataclasses.replace(
    get_recipe("world-d2"), global_batch=8, images=64, precision="fp32", optimizer=Optimizer(lr=1e-3)
)


def write_run(
    folder: Path, recipe: Recipe, *, machine: str, world_size: int = 2, off: float = 1.0, **costs: float
) -> str:
    """A finished run's folder, measured as planned but for `costs`; bytes off by a factor."""
    plan = make_hardware_plan(recipe, world_size=world_size, machine=get_machine(machine))
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(to_json(plan)))
    (folder / "recipe.json").write_text(json.dumps(recipe.to_json()))
    (folder / "weights").mkdir()
    (folder / "weights" / "raw.safetensors").write_bytes(b"0" * plan.storage_bytes)
    found = {name.removeprefix("cost/"): value for name, value in plan.predicted.items()}
    found = {name: value * (off if name.startswith("bytes") else 1.0) for name, value in found.items()} | costs
    rows = [
        ResultRow(run=folder.name, recipe_hash=recipe.hash, code_version="", images_seen=recipe.images,
                  metric=f"cost/{name}", value=float(value), sample_count=1, higher_is_better=False, protocol_hash="")
        for name, value in found.items() if name != "storage_bytes"
    ]  # fmt: skip
    ResultStore(str(folder / "results")).append(rows)
    return f"{folder}/"


def run_command(monkeypatch, capsys, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["trainer", *words])
    main()
    return capsys.readouterr().out


def test_goals_are_those_of_the_project():
    assert [find_goal(name) for name in ("parameters", "bytes_per_rank/ema", "checkpoint_bytes", "storage_bytes",
                                       "step_seconds", "step_cpu_seconds", "images_per_second")] == [
        0.0, 0.05, 0.02, 0.02, 0.15, 0.15, None]  # fmt: skip
    rows = {"parameters": (5.0, 5.0), "bytes_per_rank/ema": (104.0, 100.0), "step_seconds": (1.16, 1.0)}
    assert find_missed(rows) == ["step_seconds"]
    assert find_missed({"parameters": (5.0, 6.0), "storage_bytes": (97.0, 100.0)}) == ["parameters", "storage_bytes"]


def test_a_run_is_graded_line_by_line(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", SMALL, machine="cpu", off=1.1)
    told = run_command(monkeypatch, capsys, "grade", run).splitlines()
    ema = next(line for line in told if line.startswith("bytes_per_rank/ema"))
    assert ema.split()[-3:] == ["-9.1%", "5%", "MISSED"]
    step = next(line for line in told if line.startswith("step_cpu_seconds"))
    assert step.split()[-2:] == ["+0.0%", "15%"]
    assert sum("MISSED" in line for line in told) == 6  # each category of bytes
    answer = json.loads(run_command(monkeypatch, capsys, "grade", run, "--json"))
    assert {name.split("/")[0] for name in answer["missed"]} == {"bytes_per_rank"}


def test_on_other_devices_a_run_s_whole_speed_plans_the_next(tmp_path, monkeypatch, capsys):
    """Of a kind that is not here: at half the planned speed the efficiency is half the usual, whatever the depth."""
    assert detect_machine("fp32").name != "h200-141"
    speed = make_hardware_plan(SMALL, world_size=2, machine=get_machine("h200-141")).predicted["cost/images_per_second"]
    run = write_run(tmp_path / "run", SMALL, machine="h200-141", images_per_second=speed / 2)
    found = calibrate(run)
    per_image = make_hardware_plan(SMALL, world_size=2).train_flops_per_image
    assert not found.by_trial
    assert found.efficiency == pytest.approx(speed / 2 * per_image / (2 * get_machine("h200-141").flops))
    plan = json.loads(run_command(monkeypatch, capsys, "plan", "d15", "--gpus", "8", "--calibrate", run, "--json"))
    assert (plan["machine"], plan["efficiency"], plan["world_size"]) == ("h200-141", found.efficiency, 8)
    assert "calibrated by the whole speed" in run_command(monkeypatch, capsys, "plan", "d15", "--calibrate", run)
    with pytest.raises(UserError, match="plans for h200-141 by what"):
        run_command(monkeypatch, capsys, "plan", "d15", "--calibrate", run, "--gpu", "h100-80")
    cpu = write_run(tmp_path / "cpu", SMALL, machine="cpu")
    with pytest.raises(UserError, match=r"ran on cpu, .* on h200-141: calibrate by a run on the same kind"):
        run_command(monkeypatch, capsys, "grade", cpu, "--calibrate", run)


def test_on_cpus_ranks_wait_for_each_other():
    cpu = get_machine("cpu")
    large = dataclasses.replace(get_recipe("world-d4"), global_batch=16, parallel=Parallel(micro_batch=4))
    plain = make_hardware_plan(large, world_size=2, machine=cpu, efficiency=0.3).time
    # A fifth of their own work for the exchange.
    assert plain.step_seconds == pytest.approx(plain.work_seconds + 0.2 * plain.communication_seconds)
    alone = make_hardware_plan(large, world_size=1, machine=cpu, efficiency=0.3).time
    assert alone.step_seconds == alone.work_seconds
    gpus = make_hardware_plan(large, world_size=2, machine=get_machine("h100-80")).time
    assert gpus.step_seconds == gpus.work_seconds


def test_what_was_tried_is_the_step_of_the_plan():
    recipe = dataclasses.replace(get_recipe("world-d4"), global_batch=16, parallel=Parallel(micro_batch=4))
    tried = StepCost(Cost(3.0, 2.5), Cost(1.0, 0.5))
    plan = make_hardware_plan(recipe, world_size=2, machine=get_machine("cpu"), tried=tried, extra=Cost(0.25, 0.125))
    assert count_passes(recipe, 2) == 2
    assert plan.time.step_seconds == plan.predicted["cost/step_seconds"] == 2 * 3.25 + 1
    assert plan.time.work_seconds == plan.predicted["cost/step_cpu_seconds"] == 2 * 2.625 + 0.5
    assert plan.predicted["cost/images_per_second"] == pytest.approx(16 / 7.5)
    assert "a step takes 7.5 s (tried here: 3 s a micro-batch, 1 s an update)" in plan.describe()
    assert plan.time.hours == pytest.approx(7.5 * recipe.steps / 3600)


def test_a_small_run_teaches_what_a_micro_batch_takes_beyond_its_trial(tmp_path):
    """A step of 100 seconds of work: whatever trials of these tiny models say, nearly all of it is beyond them."""
    costs = {"step_seconds": 101.0, "step_cpu_seconds": 100.0}
    run = write_run(tmp_path / "run", SMALL, machine=detect_machine("fp32").name, world_size=1, **costs)
    found = calibrate(run)
    assert found.by_trial
    assert (found.extra.seconds, found.extra.work) == (pytest.approx(101, rel=0.05), pytest.approx(100, rel=0.05))
    twice = dataclasses.replace(SMALL, parallel=Parallel(micro_batch=4))
    assert found.plan(twice, world_size=1).time.work_seconds == pytest.approx(200, rel=0.05)
    assert f"what a micro-batch of {run} took beyond its own trial" in found.describe()


def test_a_run_of_an_older_version_calibrates_nothing(tmp_path):
    run = write_run(tmp_path / "run", SMALL, machine="cpu")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    del plan["device_peak_flops"]
    (tmp_path / "run" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="older version"):
        calibrate(run)
