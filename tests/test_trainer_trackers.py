"""W&B and MLflow: what they are told, by stand-ins of their modules; what is missing or fails."""

import json
import sys

import pytest

from infra.errors import UserError
from model.backbones.mmdit import MMDiTConfig
from trainer.recipe import Logging, Recipe
from trainer.watching.trackers import Trackers, check_trackers

WANDB = """
import json, pathlib
FILE = pathlib.Path(__file__).with_name("told.jsonl")
def tell(*what):
    with FILE.open("a") as file:
        file.write(json.dumps(what) + "\\n")
class Run:
    def define_metric(self, name, step_metric=None): tell("axis", name, step_metric)
    def log(self, figures):
        if figures["images_seen"] == 13: raise ConnectionError("no route\\nto host")
        tell("log", figures)
    def finish(self): tell("finish")
def init(**settings):
    tell("init", settings["project"], settings["id"], settings["resume"], settings["config"]["images"])
    return Run()
"""
MLFLOW = """
import json, pathlib
FILE = pathlib.Path(__file__).with_name("told.jsonl")
def tell(*what):
    with FILE.open("a") as file:
        file.write(json.dumps(what) + "\\n")
def set_tracking_uri(uri): tell("uri", uri)
def set_experiment(name): tell("experiment", name)
def search_runs(filter_string, output_format): return []
def start_run(run_id=None, run_name=None, tags=None): tell("start", run_name, tags)
def log_params(params): tell("params", params["depth"])
def log_metrics(figures, step): tell("log", figures, step)
def end_run(): tell("end")
"""


def recipe(**logging) -> Recipe:
    model, precision = MMDiTConfig(depth=2), "fp32"  # a run has settled it
    return Recipe("r", model, images=64, global_batch=8, precision=precision, logging=Logging(**logging))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Puts a stand-in on the path; gives what it was told."""

    def put(name: str, code: str):
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return lambda: [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]

    yield put
    for name in ("wandb", "mlflow"):
        sys.modules.pop(name, None)


def test_wandb_gets_curves_over_images(module, tmp_path):
    told, r = module("wandb", WANDB), recipe(wandb="bees")
    trackers = Trackers(r, "run", str(tmp_path))
    trackers.log("train", {"loss": 0.5}, 8)
    trackers.close()
    assert told() == [
        ["init", "bees", f"run-{r.hash}", "allow", 64], ["axis", "images_seen", None], ["axis", "*", "images_seen"],
        ["log", {"train/loss": 0.5, "images_seen": 8}], ["finish"],
    ]  # fmt: skip


def test_mlflow_gets_curves_over_images(module, tmp_path):
    told, r = module("mlflow", MLFLOW), recipe(mlflow="file:/x")
    trackers = Trackers(r, "run", str(tmp_path))
    trackers.log("val", {"loss/sd3": 0.5}, 16)
    trackers.close()
    assert told() == [
        ["uri", "file:/x"], ["experiment", "r"], ["start", "run", {"beeline_run": f"run-{r.hash}"}], ["params", 2],
        ["log", {"val/loss/sd3": 0.5}, 16], ["end"],
    ]  # fmt: skip


def test_a_tracker_that_fails_is_told_once_and_left(module, tmp_path, capsys):
    told = module("wandb", WANDB)
    trackers = Trackers(recipe(wandb="bees"), "run", str(tmp_path))
    for images in (5, 13, 21):
        trackers.log("train", {"loss": 0.5}, images)
    trackers.close()
    assert [line[1]["images_seen"] for line in told() if line[0] == "log"] == [5]
    assert capsys.readouterr().err.count("wandb: no route to host; the run goes on without it") == 1


def test_what_is_not_installed_is_refused_before_any_work():
    with pytest.raises(UserError, match=r"asks for --logging.wandb, but wandb is not installed: pip install wandb"):
        check_trackers(recipe(wandb="bees").logging)
    check_trackers(recipe().logging)
