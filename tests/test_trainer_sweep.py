"""Sweeps and isoFLOP ladders: what is asked for, what is skipped, the law; runs are recorded, not trained."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from data_pipeline.selection.choice import DataChoice
from infra.errors import UserError
from infra.results import ResultRow, ResultStore
from model.diffusion.flow import STUDY
from model.flops import estimate_train_flops
from trainer.ladders import ladder, sweep
from trainer.ladders.isoflop import write_summary
from trainer.ladders.ladder import count_images, find_branch_point, train_isoflop
from trainer.ladders.launch import ManyRuns
from trainer.ladders.sweep import (
    RateResult,
    fit_best_rate,
    fit_transfer_law,
    name_folder,
    sweep_formulations,
    sweep_rates,
)
from trainer.ladders.workers import take_my_gpus
from trainer.recipes import get_recipe
from trainer.runfolder import UNSTABLE


def launch(out: Path, images: int | None = None) -> ManyRuns:
    words = () if images is None else ("--images", str(images))
    return ManyRuns(DataChoice(("D",)), str(out), num_ranks=1, overrides=(*words, "--logging.samples", "0"))


@pytest.fixture
def commands(monkeypatch):
    """Commands that would have trained; each then counts as trained for the images it names."""
    asked, trained = [], {}

    def record(command, run):
        asked.append(command)
        at = command.index("--images") if "--images" in command else None
        trained[run] = int(command[at + 1]) if at else 10**9

    monkeypatch.setattr(ladder, "run_command", record)
    monkeypatch.setattr(ladder, "count_trained_images", trained.get)
    monkeypatch.setattr(DataChoice, "open", lambda choice: None)
    return asked


def option(command: list[str], name: str) -> str:
    return command[command.index(f"--{name}") + 1]


def test_one_trunk_serves_all_horizons_of_a_depth(commands, tmp_path):
    budgets = (3e13, 1e14)
    runs = train_isoflop("world", [2, 3], budgets, launch(tmp_path))
    assert [run.rsplit("/", 1)[-1] for run in runs] == [
        "world-d2-3e13",
        "world-d2-1e14",
        "world-d3-3e13",
        "world-d3-1e14",
    ]
    assert len(commands) == 2 * (1 + 2)
    recipe = get_recipe("world-d2")
    trunk, _, short, long = commands[:4]  # all trunks first: workers share what does not wait for another run
    horizons = [count_images(recipe, budget) for budget in budgets]
    starts = [find_branch_point(recipe, images, 0.2) for images in horizons]
    assert option(trunk, "images") == str(starts[1])
    assert trunk[trunk.index("--logging.save-at") + 1 :][:2] == [str(start) for start in starts]
    assert option(trunk, "schedule.cooldown") == "0"
    for command, start, images in ((short, starts[0], horizons[0]), (long, starts[1], horizons[1])):
        assert option(command, "resume").endswith(f"world-d2-trunk/checkpoints/step_{start // 16:07d}")
        assert option(command, "images") == str(images)
        assert option(command, "schedule.cooldown") == "0.2"
        flops = images * estimate_train_flops(recipe.model, 16, 16, 32)
        assert flops == pytest.approx(3e13 if command is short else 1e14, rel=0.01)
    train_isoflop("world", [2, 3], budgets, launch(tmp_path))
    assert len(commands) == 6  # all is there
    runs = train_isoflop("world", [2], (1.5e13, 2e13), launch(tmp_path / "near"))
    assert [run.rsplit("/", 1)[-1] for run in runs] == ["world-d2-1.5e13", "world-d2-2e13"]


def test_budgets_find_their_depth(tmp_path):
    """Twice the FLOPs, one depth more; at the edge of the ladder the table says so."""
    runs, losses = [], {(1, 1e12): 1.0, (2, 1e12): 0.9, (3, 1e12): 1.1, (1, 2e12): 0.9, (2, 2e12): 0.8, (3, 2e12): 0.7}
    for (depth, budget), loss in losses.items():
        recipe = get_recipe(f"world-d{depth}")
        recipe = dataclasses.replace(recipe, images=count_images(recipe, budget))
        runs.append(str(tmp_path / f"{recipe.name}-{budget:g}".replace("+", "")))
        (tmp_path / runs[-1]).mkdir()
        (tmp_path / runs[-1] / "recipe.json").write_text(json.dumps(recipe.to_json()))
        row = ResultRow(run="r", recipe_hash="h", code_version="v", images_seen=recipe.images, metric="val_loss/sd3",
                        value=loss, higher_is_better=False, sample_count=8, protocol_hash="p", low=loss - 0.01,
                        high=loss + 0.01)  # fmt: skip
        ResultStore(f"{runs[-1]}/results").append([row])
    marks = [line.split("|")[-2].strip() for line in write_summary(runs, out=str(tmp_path)).splitlines()[2:]]
    assert marks == ["", "best", "", "", "", "best, at the edge"]
    found = json.loads((tmp_path / "isoflop.json").read_text())
    assert found["best_depth"] == {"1e+12": 2, "2e+12": 3}
    for cell in found["cells"]:
        assert cell["loss"] == losses[cell["depth"], cell["budget"]]
        assert cell["flops"] == pytest.approx(cell["budget"], rel=0.01)
        assert cell["parameters"] == get_recipe(f"world-d{cell['depth']}").model.count_parameters()
    assert (tmp_path / "isoflop.png").read_bytes().startswith(b"\x89PNG")


def test_a_budget_too_small_or_with_images_is_refused(commands, tmp_path):
    with pytest.raises(UserError, match="1e\\+10 FLOPs pay for 3 steps of world-d2"):
        train_isoflop("world", [2], [1e10], launch(tmp_path))
    with pytest.raises(UserError, match="omit --images"):
        train_isoflop("world", [2], [3e13], launch(tmp_path, 160))
    with pytest.raises(UserError, match=r"--depths decides it: omit --model.depth"):
        train_isoflop("world", [2], [3e13], ManyRuns(DataChoice(("D",)), str(tmp_path), overrides=("--model.depth=3",)))
    assert not commands


def test_a_horizon_counts_in_the_batches_that_were_asked_for(commands, tmp_path):
    wide = dataclasses.replace(launch(tmp_path), overrides=("--global-batch", "32"))
    train_isoflop("world", [2], [3e13], wide)
    recipe = dataclasses.replace(get_recipe("world-d2"), global_batch=32)
    images = count_images(recipe, 3e13)
    assert option(commands[1], "images") == str(images)
    start = find_branch_point(recipe, images, 0.2)
    assert option(commands[1], "resume").endswith(f"world-d2-trunk/checkpoints/step_{start // 32:07d}")


def test_all_61_formulations_or_any_of_them(commands, tmp_path):
    runs = sweep_formulations("world-d2", (), launch(tmp_path, 160))
    assert len(set(runs)) == len(commands) == len(STUDY) == 61
    assert {option(command, "formulation") for command in commands} == set(STUDY)
    assert option(commands[0], "logging.samples") == "0"
    sweep_formulations("world-d2", ("rf", "v/cos"), launch(tmp_path, 160))
    assert len(commands) == 61  # nothing is missing
    sweep_formulations("world-d2", ("rf", "v/cos"), launch(tmp_path, 320))
    assert len(commands) == 63
    assert name_folder("rf/lognorm(0.00,1.00)") == "rf-lognorm_0.00_1.00"
    with pytest.raises(UserError, match=r"unknown formulation 'v/coz'.*'v/cos'"):
        sweep_formulations("world-d2", ("v/coz",), launch(tmp_path, 160))


def test_a_run_on_a_ray_worker_takes_the_gpus_that_it_was_given(monkeypatch):
    """deepspeed's launcher would delete CUDA_VISIBLE_DEVICES and take the first two, as every other run of the node."""
    two = ladder.build_train_command("world-d2", [], data=DataChoice(("D",)), run="R", ranks=2)
    one = ladder.build_train_command("world-d2", [], data=DataChoice(("D",)), run="R", ranks=1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert take_my_gpus(two) == two
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert take_my_gpus(two) == ["deepspeed", "--include", "localhost:4,6", *two[3:]]
    assert take_my_gpus(one) == one


def test_rates_give_curves_and_a_law(commands, tmp_path, monkeypatch):
    """Runs whose losses are parabolas in log(rate), best at 0.4 / width; one of them diverged."""
    record = ladder.run_command

    def trained(command, run):
        record(command, run)
        rate, width = float(option(command, "optimizer.lr")), 64 * int(command[command.index("train") + 1][-1])
        if rate > 0.1:
            (tmp_path / run / UNSTABLE).parent.mkdir(parents=True)
            (tmp_path / run / UNSTABLE).write_text("{}")
            raise UserError("the run ended")
        loss = 0.5 + 0.1 * math.log(rate / (0.4 / width)) ** 2
        row = ResultRow(run="r", recipe_hash="h", code_version="v", images_seen=160, metric="val_loss/sd3", value=loss,
                        higher_is_better=False, sample_count=8, protocol_hash="p")  # fmt: skip
        ResultStore(f"{run}/results").append([row])

    monkeypatch.setattr(ladder, "run_command", trained)
    rates = (1e-3, 2e-3, 4e-3, 8e-3, 0.5)
    told = sweep_rates("world", (2, 3), rates, launch(tmp_path, 160))
    law = json.loads((tmp_path / "sweep.json").read_text())["law"]
    assert law["exponent"] == pytest.approx(-1, abs=1e-6)
    assert law["scale"] == pytest.approx(0.4, rel=1e-6)
    assert "width^-1.00" in told
    assert "nan" in told
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    before = len(commands)
    sweep_rates("world", (2, 3), rates, launch(tmp_path, 160))
    assert len(commands) == before  # the unstable ones are results too


def test_no_best_rate_at_the_edge():
    points = [RateResult(2, 128, rate, loss) for rate, loss in ((1e-4, 1.0), (1e-3, 0.9), (1e-2, 0.8))]
    assert fit_best_rate(points) is None
    assert fit_best_rate([*points, RateResult(2, 128, 1e-1, 0.85)]) == pytest.approx(1.468e-2, rel=1e-3)
    assert fit_best_rate(points[:2]) is None
    assert fit_transfer_law(points)["exponent"] is None
    assert sweep.read_final_loss("/no/run", get_recipe("world-d2")) != 0
