"""`precision auto` of a run: resolved once, in the recipe and its hash, kept wherever the run goes on."""

import dataclasses
import json
import os

import pytest
import test_trainer_sweep
from test_trainer_sweep import launch, option
from trainer_launch import TINY, halted, run_ranks

from trainer.checks.preflight import settle_precision
from trainer.ladders.ladder import train_isoflop, train_ladder
from trainer.ladders.sweep import sweep_rates
from trainer.machines import MACHINES, detect_machine
from trainer.planning.hardware_plan import make_hardware_plan
from trainer.recipe import Recipe, find_differences
from trainer.recipes import RECIPES, get_recipe

commands = test_trainer_sweep.commands


def test_a_recipe_has_an_identity_once_its_precision_is_resolved():
    auto = get_recipe("world-d2")
    with pytest.raises(ValueError, match="world-d2 has no identity yet"):
        print(auto.hash)
    fp32, bf16 = (dataclasses.replace(auto, precision=precision) for precision in ("fp32", "bf16"))
    assert fp32.hash != bf16.hash
    assert Recipe.from_json(bf16.to_json()) == bf16


def test_recipes_of_the_paper_state_its_precision_and_others_leave_it_open():
    assert {get_recipe(name).precision for name in RECIPES if name.startswith("world")} == {"auto"}
    assert {get_recipe(name).precision for name in RECIPES if not name.startswith("world")} == {"bf16"}


@pytest.mark.parametrize(("first", "second"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_run_keeps_what_it_was_started_in(data, tmp_path, best_on_cpu, first, second):
    auto, run = get_recipe("world-d2"), tmp_path / "run"
    best_on_cpu(first)
    begun = settle_precision(auto, str(run), "latest")
    assert begun.precision == first
    saved = halted(begun, str(data), run)
    best_on_cpu(second)
    assert settle_precision(auto, str(run), "latest") == begun
    assert settle_precision(auto, str(tmp_path / "new"), "latest").precision == second
    assert settle_precision(auto, str(tmp_path / "branch"), str(saved)) == begun, "a branch goes on in the same numbers"
    asked = settle_precision(dataclasses.replace(auto, precision=second), str(run), "latest")
    assert find_differences(begun, asked) == [f"precision: {first} -> {second}"], "which is refused as another recipe"


@pytest.mark.parametrize("best", ["bf16", "fp32"])
def test_all_runs_of_a_ladder_or_sweep_compute_in_the_same(commands, tmp_path, best_on_cpu, best):
    best_on_cpu(best)
    train_ladder("world", [2], launch(tmp_path, 160))
    assert option(commands[-1], "precision") == best
    run = tmp_path / "world-d2"
    run.mkdir()
    (run / "recipe.json").write_text(json.dumps({"precision": best}))
    best_on_cpu({"bf16": "fp32", "fp32": "bf16"}[best])
    train_ladder("world", [2, 3, 4], launch(tmp_path, 320))
    assert [option(command, "precision") for command in commands[-3:]] == [best] * 3
    best_on_cpu(best)
    sweep_rates("world", [2], [1e-3, 2e-3], launch(tmp_path / "sweep", 160))
    train_isoflop("world", [2], [3e13], launch(tmp_path / "flops"))
    assert [option(command, "precision") for command in commands[-4:]] == [best] * 4
    asked = dataclasses.replace(launch(tmp_path / "asked"), overrides=("--precision", "fp32"))
    train_ladder("world", [2], asked)
    assert commands[-1].count("--precision") == 1
    assert option(commands[-1], "precision") == "fp32"


@pytest.mark.parametrize("best", ["bf16", "fp32"])
def test_plans_are_for_the_precision_of_their_machine(best_on_cpu, best):
    best_on_cpu(best)
    auto = get_recipe("world-d2")
    for name, machine in MACHINES.items():
        expected = "fp32" if name == "cpu" else "bf16"
        stated = dataclasses.replace(auto, precision=expected)
        assert make_hardware_plan(auto, world_size=2, machine=machine) == make_hardware_plan(
            stated, world_size=2, machine=machine
        )
    here = make_hardware_plan(auto, world_size=2)
    assert here.recipe_hash == dataclasses.replace(auto, precision=best).hash
    assert here.machine == detect_machine("auto").name == {"bf16": "cpu-amx", "fp32": "cpu"}[best]
    assert detect_machine("fp32").name == "cpu"


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_on_unlike_machines_take_the_answer_of_the_first_and_a_resume_keeps_it(data, tmp_path, best_on_cpu):
    cache = {}
    for best in ("bf16", "fp32"):
        best_on_cpu(best)
        cache[best] = {"BEELINE_CACHE": os.environ["BEELINE_CACHE"]}
    run = tmp_path / "run"
    words = ["-m", "trainer", "train", "world-d2", "--data", str(data), "--out", str(run), *TINY, "--precision", "auto"]
    words += ["--logging.save-every", "8"]
    run_ranks([*words, "--images", "16"], 2, of_rank={0: cache["fp32"], 1: cache["bf16"]})
    recipe = json.loads((run / "recipe.json").read_text())
    assert recipe["precision"] == "fp32"
    for name in ("ema.safetensors", "raw.safetensors"):
        (run / "weights" / name).unlink()
    for folder in (run / "checkpoints").glob("step_0000002"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    said = run_ranks([*words, "--images", "16"], 2, of_rank={0: cache["bf16"], 1: cache["bf16"]})
    assert json.loads((run / "recipe.json").read_text()) == recipe
    assert "step_0000001" in said
