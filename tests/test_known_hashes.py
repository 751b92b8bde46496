"""Hashes that name stored results: known answers, so that no change of code makes finished runs strangers.

The columns and the encoding of datasets have theirs in test_data_pipeline_known_answers.py.
"""

import hashlib
import json
import math
from dataclasses import replace

import pytest

from data_pipeline.plans import WORLD_TEXT
from eval.drawing.generate import Sampling
from eval.judging.judges import OfficialPaths, build_judges
from eval.metrics.registry import METRICS
from eval.protocol import describe_protocol, hash_protocol
from infra.results import ResultRow, ResultStore
from model.diffusion.validation import ValSettings
from trainer.recipe import Recipe, Student
from trainer.recipes import get_recipe

RECIPES = {  # with the precision that stands beside the hash: a recipe may leave it to the machine
    "world-d2": ("bf16", "211f41f73f58a2e3"),
    "world-d4": ("bf16", "5ddf090cd1f71530"),
    "world-dit-d3": ("bf16", "9d60e9139935de54"),
    "world-mmdit3-d2": ("bf16", "f60c8e64fba99b9d"),
    "world-uvit-d4": ("bf16", "7cf09f5a36a1a4cc"),
    "world-dpo-d4": ("bf16", "dd75c7b88f711e53"),
    "world-captions-original-d2": ("bf16", "29b6994774f4e387"),
    "world-captions-mixed-d2": ("bf16", "211f41f73f58a2e3"),
    "d15": ("bf16", "35ab81497fdd850f"),
    "d24": ("bf16", "58bedc2429f4dbb7"),
    "d38-1024": ("bf16", "e65d098ffa594fc9"),
    "dpo-d38": ("bf16", "64b077e512c2fe37"),
    "captions-mixed": ("bf16", "66214f6c5c7a7d55"),
    "study-mmdit": ("bf16", "07149e6de52780d8"),
    "study-cross_dit": ("bf16", "09a66d63274e843e"),
}
FP32, BF16 = (
    Sampling(precision="fp32"),
    Sampling(precision="bf16", without_t5=True, steps=50, solver="heun", shift=3.0),
)
PROTOCOLS = [
    ("geneval", FP32, "a9f7d59fe72dfdac"),
    ("compbench", FP32, "784e108191b21403"),
    ("clip_score", FP32, "d6104051a18b24f0"),
    ("fid", FP32, "67a82257431fe8f1"),
    ("typography", FP32, "9b1c2d499dbce9b9"),
    ("geneval", BF16, "3182b59b1b43a511"),
    ("compbench", BF16, "ef6f5275dccdb9a3"),
    ("clip_score", BF16, "4a21278945ca4713"),
    ("fid", BF16, "9056a0c1973dc2e7"),
    ("typography", BF16, "a2bde148907021e6"),
]


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", RECIPES)
def test_hashes_of_recipes(name):
    precision, known = RECIPES[name]
    recipe = replace(get_recipe(name), precision=precision)
    assert recipe.hash == known
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_a_recipes_hash_keeps_whole_numbers_where_it_has_them_and_one_name_for_each_formulation():
    base = replace(get_recipe("world-d2"), precision="bf16")
    whole = replace(base, optimizer=replace(base.optimizer, lr=1), schedule=replace(base.schedule, cooldown=0))
    assert whole.hash == "2c042ad4a53bb6f0"
    assert replace(base, formulation="rf/lognorm(0,1)").hash == base.hash
    assert replace(base, shift=3).hash == "8bbe200f1e4d449f"


def test_fields_younger_than_stored_hashes_count_where_they_differ_from_their_default():
    base = replace(get_recipe("world-d2"), precision="bf16")
    weighted = replace(base, data=replace(base.data, caption_weights=("original=1", "short=2")))
    assert weighted.hash == "6a2ff191efdaa186"
    assert replace(base, student=Student(loss="huber")).hash == "eafba13bd008472b"
    assert replace(base, student=Student(steps=1, difference=0.005)).hash == base.hash
    changed = replace(base, student=Student(steps=4))
    assert changed.hash == "43181e12c162908a"


def test_the_hash_of_what_a_validation_loss_is_measured_with():
    settings = ValSettings()
    assert settings.hash(samples=2048, formulation="rf/lognorm(0.00,1.00)", fingerprint="f") == "6f7058f15ab7f7e5"


def test_texts_and_networks_as_weights_name_them():
    assert digest(WORLD_TEXT.to_json()) == "d03e2aad67d2e4b9"
    assert digest(get_recipe("study-mmdit3").model.to_json()) == "c23de3f504fb75dd"


@pytest.fixture(scope="module")
def judges():
    return build_judges("world", OfficialPaths())


@pytest.mark.parametrize(("name", "sampling", "known"), PROTOCOLS)
def test_hashes_of_protocols(judges, name, sampling, known):
    metric = METRICS[name](judges)
    assert (
        hash_protocol(describe_protocol(metric, metric.prompts(4), sampling=sampling.protocol(), images_per_prompt=2))
        == known
    )


def test_lines_of_results(tmp_path):
    created = "2026-01-01T00:00:00.000+00:00"
    row = ResultRow("r", "h", "c", 10, "m/x", 0.5, True, 3, "p", math.nan, 1.0, "{}", created)
    ResultStore(str(tmp_path)).append([row])
    (written,) = tmp_path.iterdir()
    assert written.read_text() == (
        '{"code_version": "c", "created": "2026-01-01T00:00:00.000+00:00", "details": "{}", "high": 1.0, '
        '"higher_is_better": true, "images_seen": 10, "low": "nan", "metric": "m/x", "protocol_hash": "p", '
        '"recipe_hash": "h", "run": "r", "sample_count": 3, "value": 0.5}\n'
    )
