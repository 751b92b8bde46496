"""A metric from outside: a class and a line in METRICS, then the public command measures it as every other one."""

import json
import re
import subprocess
import sys
from pathlib import Path

from test_eval_run import export

from eval.metrics.registry import METRICS
from infra.results import ResultStore

EVAL = Path(__file__).parent.parent / "eval"
GENERAL = ["run.py", "measure.py", "calibrate.py", "judging/judges.py", "service/worker.py", "drawing/*.py"]

METRIC = """
import runpy

from eval.judging.metric import Clusters, PictureMetric, Prompt
from eval.metrics.registry import METRICS


class Brightness(PictureMetric):
    name = "brightness"

    def __init__(self, judges):
        self.clusters = Clusters()

    def prompts(self, count):
        return [Prompt(text, "light") for text in ("a lamp", "the sun", "a candle")][:count]

    def describe(self):
        return {"version": 1}

    def update(self, images):
        for item in images:
            self.clusters.add("light", item.prompt_index, item.image.mean() / 255)

    def compute(self):
        return [self.clusters.score("")]

    def values_per_prompt(self):
        return self.clusters.values_per_prompt()


METRICS["brightness"] = Brightness
runpy.run_module("eval", run_name="__main__")
"""


def test_a_metric_from_outside_is_measured_once_by_the_public_command(tmp_path):
    export(tmp_path / "runs" / "d1" / "weights" / "step_0000010" / "ema.safetensors", images_seen=40)
    (tmp_path / "brightness.py").write_text(METRIC)
    options = ["--metrics", "brightness", "--prompts-per-task", "2", "--images-per-prompt", "3", "--steps", "2"]
    command = [sys.executable, str(tmp_path / "brightness.py"), "run", "--runs", str(tmp_path / "runs"), *options]
    for _ in range(2):
        subprocess.run(command, check=True, timeout=300)
    results = tmp_path / "runs" / "d1" / "results"
    [row] = ResultStore(str(results)).rows()
    assert (row.metric, row.sample_count, row.higher_is_better) == ("world_brightness", 6, True)
    assert 0 < row.low <= row.value <= row.high < 1
    assert len(list(results.glob("*.jsonl"))) == 1, "measured again"
    assert len(list((results / "values" / row.protocol_hash).glob("*.npz"))) == 1, "nothing to compare by pairs"
    protocol = json.loads((results / "protocols" / f"{row.protocol_hash}.json").read_text())
    assert (protocol["metric"], protocol["prompts"]["count"], protocol["images_per_prompt"]) == ("brightness", 2, 3)
    told = subprocess.run([*command[:3], "--help"], check=True, timeout=300, capture_output=True, text=True).stdout
    assert "brightness" in told, "the help lists it"


def test_what_serves_every_metric_names_none():
    files = [path for pattern in GENERAL for path in EVAL.glob(pattern)]
    assert len(files) >= 8
    for path in files:
        named = set(re.findall(r"\w+", path.read_text(encoding="utf-8"))) & set(METRICS)
        assert not named, f"{path} names {named}"
