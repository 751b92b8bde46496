"""An objective from outside: a function and a line in OBJECTIVES, then the public command trains with it."""

import json
from pathlib import Path

import pytest
from trainer_launch import TINY, read_log, run_ranks

from infra.results import ResultStore
from trainer.recipe import Recipe

pytestmark = pytest.mark.dist
PROGRAM = '''
from torch.nn.functional import huber_loss

from infra.errors import run_cli
from trainer.__main__ import main
from trainer.objective import OBJECTIVES, Losses, Objective


def huber(network, batch, *, formulation, delta):
    """Huber's loss of the network's target: outliers count by their size, not by its square."""
    sample = formulation.sample(batch.x0_BCHW, batch.noise_BCHW, batch.t_B)
    prediction_BCHW = network(sample.model_input, sample.network_time_B, batch.text)
    loss_BCHW = huber_loss(prediction_BCHW, sample.target, reduction="none", delta=delta)
    outliers_BCHW = ((prediction_BCHW - sample.target).detach().abs() > delta).float()
    return Losses(loss_BCHW.mean((1, 2, 3)), {"huber/outliers": outliers_BCHW.mean((1, 2, 3))})


OBJECTIVES["huber"] = Objective(huber, options=lambda recipe: {"delta": 0.5})
run_cli(main)
'''


def test_an_objective_from_outside_trains_through_the_public_command(data: Path, tmp_path: Path) -> None:
    program, run = tmp_path / "program.py", tmp_path / "run"
    program.write_text(PROGRAM)
    words = ["train", "world-d1", "--objective", "huber", "--data", str(data), "--out", str(run), "--images", "64"]
    run_ranks([str(program), *words, *TINY, "--logging.log-every", "8"], 2)
    trained = read_log(run)
    assert [line["images_seen"] for line in trained] == list(range(8, 65, 8))
    assert trained[-1]["loss"] < trained[0]["loss"]
    assert all(0 < line["huber/outliers"] < 1 for line in trained)
    recipe = Recipe.from_json(told := json.loads((run / "recipe.json").read_text()))
    assert recipe.objective == "huber"
    assert recipe.hash != Recipe.from_json(told | {"objective": "pretrain"}).hash  # other results have other names
    assert ResultStore(str(run / "results")).rows(metric="val_loss/sd3")[-1].recipe_hash == recipe.hash
