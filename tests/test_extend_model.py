"""A timestep density, a formulation and a backbone from outside: a class or function and a line each, no other change.

Each is seen to work through the public commands: listed, described, planned, and trained with.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from trainer_launch import TINY, read_figure

from model.files.weights import read_meta

HEAD = """
import runpy
import sys
"""
RUN = """
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""
DENSITY = """
import torch

from model.diffusion.timesteps import DENSITIES, Density


def triangle() -> Density:
    \"\"\"pdf 2t: more noise than data.\"\"\"
    return Density("triangle", torch.sqrt, lambda t: 2 * t)


DENSITIES["triangle"] = triangle
"""
FORMULATION = """
from model.diffusion.flow import FORMULATIONS, Formulation
from model.diffusion.paths import RectifiedFlow
from model.diffusion.timesteps import make_uniform

# The rectified path, of which the network predicts the noise: squared error of noise, so w = -2 / (d lambda / dt).
FORMULATIONS["eps/rf"] = Formulation(
    "eps/rf", RectifiedFlow(), "eps", make_uniform(), lambda t: t * (1 - t), "t(1-t)", 1.0
)
"""
BACKBONE = """
from dataclasses import dataclass

from torch import nn

from model.backbone import BACKBONES
from model.backbones.trunk import TokenBackbone, TokenConfig


@dataclass(frozen=True)
class MixerConfig(TokenConfig):
    name = "mixer"

    def make_module(self):
        return Mixer(self)

    def count_block_parameters(self):
        return self.depth * (self.width**2 + self.width)

    def count_block_multiply_adds(self, tokens, text_tokens):
        return self.depth * self.width**2 * tokens


class MixerBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x_BND):
        return x_BND + self.linear(x_BND).tanh()


class Mixer(TokenBackbone):
    \"\"\"Each image token by itself, with the mean of the text.\"\"\"

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList([MixerBlock(config.width) for _ in range(config.depth)])
        self.final = self.make_final()

    def forward(self, x_BCHW, t_B, text):
        e = self.embed(x_BCHW, self.condition(t_B, text.pooled_BP), text)
        x_BND = e.x_BND + e.y_BLD.mean(1, keepdim=True)
        for block in self.blocks:
            x_BND = self.call(block, x_BND)
        return self.output(self.final, x_BND, e)


BACKBONES["mixer"] = MixerConfig
"""


@pytest.fixture
def beeline(tmp_path):
    """Run `python -m PACKAGE WORDS` with what the texts add; what it prints."""

    def run(addition: str, *words: object) -> str:
        program = tmp_path / "program.py"
        program.write_text(HEAD + addition + RUN)
        command = [sys.executable, str(program), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_a_density_from_outside_makes_a_formulation(beeline):
    plan = json.loads(beeline(DENSITY, "trainer", "plan", "world-d2", "--formulation", "rf/triangle()", "--json"))
    usual = json.loads(beeline(DENSITY, "trainer", "plan", "world-d2", "--json"))
    assert plan["parameters"] == usual["parameters"]
    assert plan["recipe_hash"] != usual["recipe_hash"]


def test_a_formulation_from_outside_is_listed(beeline):
    rows = {row["name"]: row for row in json.loads(beeline(FORMULATION, "model", "formulations", "--json"))}
    assert len(rows) == 62
    assert (rows["eps/rf"]["target"], rows["eps/rf"]["density"], rows["eps/rf"]["network_time"]) == (
        "eps", "uniform", "t"
    )  # fmt: skip


def test_a_backbone_from_outside_is_described_and_has_recipes(beeline):
    row = json.loads(beeline(BACKBONE, "model", "info", "mixer-d3", "--json"))
    assert row["backbone"] == "mixer-d3"
    assert row["width"] == 192
    assert row["activation_bytes_256"] > 0
    plan = json.loads(beeline(BACKBONE, "trainer", "plan", "world-mixer-d3", "--json"))
    assert plan["depth"] == 3
    assert json.loads(beeline(BACKBONE, "trainer", "plan", "study-mixer", "--json"))["depth"] == 15
    assert "world-mixer" in beeline(BACKBONE, "trainer", "ladder", "--help")


@pytest.mark.slow
@pytest.mark.dist
def test_all_three_train_and_are_exported(beeline, data, tmp_path):
    out = tmp_path / "runs"
    train = ["trainer", "train", "world-mixer-d2", "--data", data, *TINY, "--images", "32", "--logging.log-every", "8"]
    for name, formulation in (("density", "rf/triangle"), ("formulation", "eps/rf")):
        beeline(DENSITY + FORMULATION + BACKBONE, *train, "--out", out / name, "--formulation", formulation)
        losses = read_figure(out / name)
        assert len(losses) == 4
        assert losses[-1] < 2 * losses[0]
        meta = read_meta(Path(out / name / "weights" / "ema.safetensors"))
        assert (meta["backbone"], meta["formulation"]) == ("mixer", formulation)
    told = json.loads(beeline(BACKBONE, "model", "info", out / "density" / "weights" / "ema.safetensors", "--json"))
    assert told["images_seen"] == 32
