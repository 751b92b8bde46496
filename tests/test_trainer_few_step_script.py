"""`infra/runs/few_step.sh`: each command that it runs is parsed and checked by the product itself; none is run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.checkpoints import find_weights
from data_pipeline.couplings.command import CoupleOptions
from eval.report.build import ReportOptions
from eval.studies.fewstep import FewStepOptions
from infra.cli import parse
from model.files.weights import read_meta
from trainer.commands import TrainArgs, parse_options
from trainer.objective import check_objective
from trainer.recipe import count_micro_batches
from trainer.recipes import get_recipe

ROOT = Path(__file__).parent.parent
# Stands for python and deepspeed in the script: writes the words down, and leaves what later lines of it read.
RECORDER = """\
import json, pathlib, sys
log, name, *words = sys.argv[1:]
if words[0] == "-c":
    sys.argv = words[1:]
    exec(words[1])
    raise SystemExit
with open(log, "a") as file:
    file.write(json.dumps([name, *words]) + "\\n")
if "report" in words:
    out = pathlib.Path(words[words.index("--out") + 1])
    out.mkdir(parents=True, exist_ok=True)
    (out / "few_steps.json").write_text("{}")
    (out / "few_steps.md").write_text("![x](figures/x.png)\\ntable\\n")
"""


def run_script(tmp_path: Path, **settings: str) -> list[list[str]]:
    """The words of each command, in order."""
    (tmp_path / "recorder.py").write_text(RECORDER)
    (tmp_path / "data").mkdir()
    (tmp_path / "teacher.safetensors").write_bytes(b"weights")
    recorder = f"{sys.executable} {tmp_path / 'recorder.py'} {tmp_path / 'log'}"
    functions = {f"BASH_FUNC_{name}%%": f'() {{ {recorder} {name} "$@"; }}' for name in ("python", "deepspeed")}
    environment = os.environ | functions | settings | {"TEACHER": str(tmp_path / "teacher.safetensors")}
    subprocess.run(
        ["bash", str(ROOT / "infra/runs/few_step.sh"), "data", "out", "kept"],
        cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def test_the_teacher_that_is_taken_by_default_lies_in_the_tree():
    script = (ROOT / "infra/runs/few_step.sh").read_text()
    assert "teacher=${TEACHER:-world:d$depth}" in script
    assert read_meta(find_weights("world:d4"))["config"]["depth"] == 4


def parse_training(words: list[str]) -> TrainArgs:
    """`words` behind `trainer train`."""
    recipe = get_recipe(words[0])
    args = parse_options(TrainArgs, words[1:], "train", recipe=recipe)
    check_objective(args.recipe)
    count_micro_batches(args.recipe, 2)
    return args


@pytest.mark.parametrize("perceptual", ["", "features:world:clip"])
def test_every_command_of_the_script_is_one_that_works(tmp_path, perceptual):
    said = run_script(tmp_path, COUNT="40", IMAGES="64", SEEDS="0 7", RANKS="2", DEPTH="2", PERCEPTUAL=perceptual)
    couples = [parse(CoupleOptions, words[4:], prog="couple") for words in said if "couple" in words]
    assert [couple.estimate for couple in couples] == [True, False], "hours are told before anything is made"
    assert (couples[1].count, couples[1].steps, couples[1].guidance) == (40, 25, 1.5)
    runs = [parse_training(words[words.index("train") + 1 :]) for words in said if "train" in words]
    assert all(words[0] == "deepspeed" for words in said if "train" in words)
    assert {run.data.data for run in runs} == {(couples[1].out,)}, "equal couplings"
    folders = [Path(run.out).relative_to(tmp_path / "out/runs") for run in runs]
    assert [str(folder) for folder in folders] == [
        f"seed{seed}/{arm}" for arm in ("reflow", "distil", "direct", "meanflow") for seed in (0, 7)
    ]
    assert [run.recipe.seed for run in runs] == [0, 7] * 4
    images = {folder.name: run.recipe.images for folder, run in zip(folders, runs)}
    assert images["direct"] == images["meanflow"] == images["reflow"] + images["distil"] == 128, "equal images"
    teacher = tmp_path / "out/runs/teacher/weights/step_0000000/ema.safetensors"
    assert teacher.read_bytes() == b"weights"
    starts = {str(folder): run.init_from for folder, run in zip(folders, runs)}
    assert starts["seed7/distil"] == str(tmp_path / "out/runs/seed7/reflow/weights/ema.safetensors")
    assert {starts[f"seed7/{arm}"] for arm in ("reflow", "direct", "meanflow")} == {str(teacher)}
    perceptuals = {folder.name: run.recipe.student.perceptual for folder, run in zip(folders, runs)}
    assert perceptuals == {
        "reflow": None, "distil": perceptual or None, "direct": perceptual or None, "meanflow": None
    }  # fmt: skip
    *_, few, report = said
    options = parse(FewStepOptions, few[4:], prog="fewstep")
    options.check()
    assert (options.steps, options.guidance) == ((1, 2, 4, 8, 25, 50), (1.0, 1.5))
    assert parse(ReportOptions, report[4:], prog="report").runs == options.runs == str(tmp_path / "out/runs")
    assert (tmp_path / "kept/few_steps.md").read_text() == "table\n"


def test_one_rank_trains_the_seeds_side_by_side(tmp_path):
    said = run_script(tmp_path, SEEDS="0 1", RANKS="1", IMAGES="64")
    runs = [words for words in said if "train" in words]
    assert len(runs) == 8
    assert all(words[:4] == ["python", "-m", "trainer", "train"] for words in runs)
    assert {words[4] for words in runs} == {f"world-{arm}-d4" for arm in ("reflow", "distil", "meanflow")}
