"""Recipes: identity, JSON, learning rate, refusals; and every named recipe is built and planned on the meta device."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from infra.errors import UserError
from model.mmdit import MMDiTConfig
from trainer.__main__ import main
from trainer.plan import bytes_per_rank, describe, make_plan
from trainer.preflight import micro_batches
from trainer.recipe import Data, Logging, Optimizer, Parallel, Recipe, Schedule, Validation, check, differences
from trainer.recipes import FAMILIES, RECIPES, get_family, get_recipe


def recipe(**changes) -> Recipe:
    base = Recipe(name="r", model=MMDiTConfig(depth=2), images=1000, global_batch=10, precision="fp32")
    return dataclasses.replace(base, **changes)


def test_hash_knows_what_decides_the_weights_and_nothing_else():
    base = recipe()
    same = [
        recipe(name="other"),
        recipe(parallel=Parallel(zero_stage=1, micro_batch=5)),
        recipe(logging=Logging(log_every=1)),
        recipe(validation=Validation(every=None)),
    ]
    assert {r.hash for r in same} == {base.hash}
    other = [
        recipe(images=1001),
        recipe(seed=1),
        recipe(precision="bf16"),
        recipe(optimizer=Optimizer(lr=2e-4)),
        recipe(data=Data(fingerprint="abc")),
        recipe(model=MMDiTConfig(depth=3)),
        recipe(init_weights="00"),
    ]
    assert len({r.hash for r in [base, *other]}) == len(other) + 1


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json_and_is_planned_exactly(name):
    r = get_recipe(name)
    check(r)
    assert Recipe.from_json(json.loads(json.dumps(r.to_json()))) == r
    with torch.device("meta"):
        model = r.model.build()
    plan = make_plan(r, world=8)
    assert plan["parameters"] == sum(p.numel() for p in model.parameters())
    assert plan["train_flops_per_image"] == 3 * plan["forward_flops_per_image"]
    assert name in describe(plan)


def test_plan_bytes_by_stage():
    r = recipe(precision="bf16")
    total = [bytes_per_rank(r, 800, stage=stage, world=8)["total"] for stage in range(4)]
    assert total[3] == 100 * (2 + 4 + 8 + 4 + 4)
    assert total[1] == 800 * (2 + 4) + 100 * (4 + 8 + 4)
    assert total[0] > total[1] > total[2] > total[3]


def test_json_refuses_what_it_does_not_know():
    told = recipe().to_json()
    with pytest.raises(UserError, match=r"optimizer.*unknown field 'lrr'.*'lr'"):
        Recipe.from_json({**told, "optimizer": {"lrr": 1.0}})
    with pytest.raises(UserError, match="precision is 'fp8', expected one of fp32, bf16"):
        Recipe.from_json({**told, "precision": "fp8"})
    with pytest.raises(UserError, match=r"recipe.images is 'many', expected int"):
        Recipe.from_json({**told, "images": "many"})
    with pytest.raises(UserError, match="global_batch"):
        Recipe.from_json({key: value for key, value in told.items() if key != "global_batch"})


def test_learning_rate_is_counted_in_images():
    r = recipe(optimizer=Optimizer(lr=1.0), schedule=Schedule(warmup_images=50, cooldown=0.2, final=0.1))
    assert [r.lr_at(n) for n in (10, 25, 50, 800)] == [0.2, 0.5, 1.0, 1.0]
    assert r.lr_at(900) == pytest.approx(0.55)
    assert r.lr_at(1000) == r.lr_at(1010) == pytest.approx(0.1)
    for shape in ("linear", "cosine", "sqrt"):
        rates = [
            recipe(optimizer=Optimizer(lr=1.0), schedule=Schedule(cooldown=0.5, shape=shape)).lr_at(n)
            for n in range(500, 1001, 50)
        ]
        assert rates == sorted(rates, reverse=True)
        assert (rates[0], rates[-1]) == (1.0, pytest.approx(0.0))


def test_warmup_never_eats_a_short_run():
    r = recipe(optimizer=Optimizer(lr=1.0), schedule=Schedule(warmup_images=10**6))
    assert r.lr_at(50) == 0.5
    assert r.lr_at(100) == 1.0


def test_cadences():
    auto = recipe(images=6400, global_batch=64)
    assert [auto.cadence(what) for what in ("log", "validate", "save")] == [64, 800, 1600]
    assert recipe(validation=Validation(every=None)).cadence("validate") is None
    assert recipe(logging=Logging(save_every=123)).cadence("save") == 123


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"images": 0}, "images is 0"),
        ({"optimizer": Optimizer(lr=-1.0)}, "optimizer.lr is -1.0"),
        ({"data": Data(encoder_dropout=1.5)}, "encoder_dropout is 1.5"),
        ({"precision": "bf16", "parallel": Parallel(zero_stage=0)}, "bf16 needs fp32 master weights"),
    ],
)
def test_values_that_cannot_work_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        check(recipe(**changes))


def test_batches_must_divide():
    assert micro_batches(recipe(global_batch=24, parallel=Parallel(micro_batch=3)), 2) == 4
    with pytest.raises(UserError, match=r"24 does not divide by 5 ranks.*--global-batch 20"):
        micro_batches(recipe(global_batch=24), 5)
    with pytest.raises(UserError, match="micro_batch 5 does not divide the 12"):
        micro_batches(recipe(global_batch=24, parallel=Parallel(micro_batch=5)), 2)


def test_differences_name_the_field():
    assert differences(recipe(), recipe(optimizer=Optimizer(lr=0.5))) == ["optimizer.lr: 0.0001 -> 0.5"]
    assert differences(recipe(), recipe(name="z", parallel=Parallel(zero_stage=0))) == []


def test_names_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'world-d4'"):
        get_recipe("wrold-d4")
    with pytest.raises(UserError, match="did you mean 'world'"):
        get_family("worlds")
    assert set(FAMILIES) == {"world", "pretrain-256"}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["trian"], None, "did you mean 'train'"),
        (["train"], None, "needs a recipe"),
        (["train", "world-d44"], None, "did you mean 'world-d4'"),
        (["train", "world-d4", "--data", "x", "--out", "y", "--optimizr.lr", "1"], 2, "--optimizer.lr"),
        (["train", "world-d4", "--out", "y"], 2, "--data"),
        (["train", "world-d4", "--data", "/no/such", "--out", "y"], None, "/no/such"),
        (["plan", "world-d4", "--images", "many"], 2, "many"),
        (["ladder", "wrld", "--data", "x", "--out", "y"], None, "did you mean 'world'"),
        (["export", "/no/run", "--data", "x", "--out", "y"], None, "no such checkpoint"),
    ],
)
def test_command_line_mistakes(arguments, code, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trainer", "--local_rank=0", *arguments])
    with pytest.raises((UserError, SystemExit)) as caught:
        main()
    output = capsys.readouterr()
    assert says in str(caught.value) + output.err + output.out
    if code is not None:
        assert caught.value.code == code


def test_help_names_commands_and_recipes(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trainer", "--help"])
    main()
    told = capsys.readouterr().out
    assert all(word in told for word in ("train", "ladder", "plan", "export", "deepspeed --num_gpus 2", "world-d4"))


def test_a_mistake_is_one_line_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "plan", "world-d9"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown recipe 'world-d9'")
    assert len(done.stderr.strip().splitlines()) == 1
