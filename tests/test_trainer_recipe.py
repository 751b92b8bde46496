"""Recipes: identity, JSON, learning rate, refusals; and every named recipe is built and planned on the meta device."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest
import torch

from infra.errors import UserError, run_cli
from model.backbone import BACKBONES
from model.backbones.dit import DiTConfig
from model.backbones.mmdit import MMDiTConfig
from trainer import recipes
from trainer.__main__ import main
from trainer.checks.values import check_values
from trainer.commands import TrainArgs, parse_options
from trainer.machines import estimate_transfer, get_machine
from trainer.planning.estimates import estimate_bytes_per_rank
from trainer.planning.hardware_plan import make_hardware_plan
from trainer.recipe import (
    Data,
    Guard,
    Logging,
    Optimizer,
    Parallel,
    Recipe,
    Schedule,
    Validation,
    count_micro_batches,
    find_differences,
)  # fmt: skip
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
        recipe(guard=Guard()),
        recipe(formulation="rf/lognorm(0,1)"),
    ]
    assert {r.hash for r in same} == {base.hash}
    other = [
        recipe(images=1001),
        recipe(seed=1),
        recipe(formulation="rf"),
        recipe(precision="bf16"),
        recipe(optimizer=Optimizer(lr=2e-4)),
        recipe(data=Data(fingerprint="abc")),
        recipe(model=MMDiTConfig(depth=3)),
        recipe(init_weights="00"),
        recipe(guard=Guard(spike=None)),
        recipe(model=DiTConfig(depth=2)),
    ]
    assert len({r.hash for r in [base, *other]}) == len(other) + 1


SIZES = [(n, re.sub(r"^(dpo|reflow|distil|meanflow)-|-(512|1024)$", "", n)) for n in RECIPES]
LARGE = [name for name, size in SIZES if size in ("d21", "d24", "d30", "d38")]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n in RECIPES])
def test_every_recipe_survives_json_and_is_dry_run_on_the_meta_device(name):
    """Built, validated, run forward on the meta device (where activations are counted) and planned."""
    r = get_recipe(name)
    check_values(r)
    assert r.name == name
    assert Recipe.from_json(json.loads(json.dumps(r.to_json()))) == r
    with torch.device("meta"):
        model = r.model.build()
    plan = make_hardware_plan(r, world_size=8)
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    if r.lora.rank is None:
        # Beside the forward and the backward pass: two of a difference, or eight of the teacher.
        passes = 3 + {"meanflow": 2, "perflow": 8}.get(r.objective, 0)
        assert plan.train_flops_per_image == passes * plan.forward_flops_per_image
        assert plan.trained_parameters == plan.parameters
    kept = plan.activation_bytes_per_image
    assert kept["kept"] > 0
    assert kept["recomputed"] < kept["kept"] or r.model.depth == 1
    assert name in plan.describe()


def test_every_docstring_says_command_hardware_and_what_to_expect():
    paper = ("pretrain_256", "high_resolution", "captions", "study", "dpo", "reflow", "distil", "meanflow", "perflow")
    students = ("world_reflow", "world_distil", "world_meanflow", "world_perflow")
    for name in ("world", "world_backbone", "world_captions", "world_dpo", *students, *paper):
        text = getattr(recipes, name).__doc__
        assert "Command: " in text, name
        assert "deepspeed" in text, name
        # A length of time, between "Hardware and time" and the next field.
        assert re.search(r"Hardware and time[^:]*: [^:]*\d (minutes|hours|days)\b", text), name
        assert "xpected" in text, name
    # The command of a docstring names a recipe that exists.
    for found in re.findall(
        r"trainer train (\S+) ", "".join(f.__doc__ or "" for f in vars(recipes).values() if callable(f))
    ):
        assert found in RECIPES, found


def test_the_paper_s_recipes_say_what_the_paper_says():
    d24, high = get_recipe("d24"), get_recipe("d24-1024")
    assert (d24.global_batch, d24.steps, d24.data.encoder_dropout) == (4096, 500_000, 0.464)
    assert (high.shift, high.optimizer.eps, high.precision, high.model.qk_norm) == (3.0, 1e-15, "bf16", True)
    assert (high.model.pos_tokens, high.model.pos_base, high.model.pos_max) == (64, 16, 128)
    assert get_recipe("captions-original").data.original_captions == 1.0
    assert {get_recipe(f"study-{name}").model.name for name in BACKBONES} == set(BACKBONES)
    assert d24.model.count_parameters() == 2_028_334_144  # 2,028,328,000 and 256 for the QK-norms of each block


def test_plan_bytes_by_stage():
    r = recipe(precision="bf16")
    whole, share = r.model.count_parameters(), r.model.count_parameters() / 8
    total = [estimate_bytes_per_rank(r, stage=stage, world_size=8)["total"] for stage in range(4)]
    assert total[3] == share * (2 + 4 + 8 + 4 + 4)
    assert total[1] == whole * (2 + 4) + share * (4 + 8 + 4)
    assert total[0] > total[1] > total[2] > total[3]


def test_plan_against_arithmetic():
    """64 H100 in 8 nodes, bf16, stage 3, recomputing: every figure by hand."""
    r = dataclasses.replace(get_recipe("d15"), parallel=Parallel(zero_stage=3, micro_batch=16), images=4096 * 1000)
    h100, p = get_machine("h100-80"), 496_070_464
    plan = make_hardware_plan(r, world_size=64, machine=h100, dataset_images=10**6)
    compute = plan.train_flops_per_image * 64 / (989e12 * 0.4)
    gathered = 2 * p * (7 / 8) / (8 * 50e9)  # between nodes; inside a node 2 p (63/64) / 450e9 is less
    reduced = 4 * p * (7 / 8) / (8 * 50e9)
    assert plan.time.compute_seconds == pytest.approx(compute)
    state = 4 * p * (1 + 2 + len(r.ema.profiles))
    assert plan.save_seconds == pytest.approx((3 * 4 * p + state / 64) / 0.67e9)  # three files of weights by rank 0
    assert plan.time.communication_seconds == pytest.approx(4 * (gathered + reduced))  # until the backward pass
    assert plan.time.between_nodes_seconds == plan.time.communication_seconds
    assert plan.time.inside_node_seconds == pytest.approx(4 * 6 * p * (63 / 64) / 450e9)
    assert plan.bytes_per_rank["stage3"]["gathered"] == 2 * p
    parallel = dataclasses.replace(r.parallel, max_live=0)
    tight = make_hardware_plan(dataclasses.replace(r, parallel=parallel), world_size=64, machine=h100)
    assert tight.time.communication_seconds == pytest.approx(4 * (2 * gathered + reduced))
    assert tight.bytes_per_rank["stage3"]["gathered"] == math.ceil(2 * 2 * r.model.count_block_parameters() / 15)
    # Gathered parts are put together; gradients: bucket and widening 6 bytes, laid out by rank and divided 20.
    assert plan.time.copy_seconds == pytest.approx(4 * p * (2 * 2 + 26) / 3.35e12)
    # Adam moves seven numbers a parameter, each of three averages three; on an H100's 3.35 TB/s.
    assert plan.time.update_seconds == pytest.approx(p / 64 * 4 * (7 + 9) / 3.35e12)
    exchange = plan.time.communication_seconds + plan.time.copy_seconds
    longer = max(plan.time.compute_seconds, exchange)
    assert plan.time.step_seconds == longer + plan.time.update_seconds
    assert plan.time.hours == pytest.approx(plan.time.step_seconds * 1000 / 3600)
    assert plan.dollars == pytest.approx(plan.time.hours * 64 * 2.5)
    assert plan.checkpoint_bytes == p * 4 * (1 + 2 + 3)
    assert plan.precompute.passes == pytest.approx(4.096)
    # 3.1 million images encoded again cost 6.3 hours, $16; a month of storing 1.02 TB costs $23.
    assert not plan.precompute.pays
    assert make_hardware_plan(r, world_size=64, machine=h100, dataset_images=10**5).precompute.pays
    assert "stage 2 is enough" in plan.advice
    # Of an image, whatever machine the plan is made on: no matrix of tokens by tokens.
    assert plan.activation_bytes_per_image["kept"] == pytest.approx(16.22 / 64 * 2**30, rel=0.02)
    parallel = dataclasses.replace(r.parallel, hpz=8, max_live=0)
    hpz = make_hardware_plan(dataclasses.replace(r, parallel=parallel), world_size=64, machine=h100)
    assert hpz.time.communication_seconds < tight.time.communication_seconds
    assert hpz.time.communication_seconds == pytest.approx(
        hpz.time.between_nodes_seconds + 4 * 2 * p * (7 / 8) / 450e9  # the backward pass stays inside
    )
    assert hpz.bytes_per_rank["stage3"]["second_copy"] == p * 2 / 8


def test_offload_moves_bytes_to_the_host():
    r = recipe(precision="bf16", parallel=Parallel(offload_optimizer=True))
    sizes = estimate_bytes_per_rank(r, stage=3, world_size=8)
    assert (sizes["masters"], sizes["moments"], sizes["ema"]) == (0, 0, 0)
    assert sizes["host"] == r.model.count_parameters() / 8 * (4 + 8 + 4 + 4)


def test_what_does_not_fit_is_said():
    r = get_recipe("d15")
    assert "no stage fits" in make_hardware_plan(r, world_size=1, machine=get_machine("a100-40")).advice
    with pytest.raises(UserError, match=r"unknown machine 'h100'.*did you mean 'h100-80'"):
        get_machine("h100")


def test_link_times():
    h100 = get_machine("h100-80")
    assert max(estimate_transfer(h100, 450e9, 8)) == pytest.approx(7 / 8)
    assert max(estimate_transfer(h100, 450e9, 16)) == pytest.approx(15 / 16)  # inside the node is slower
    a100 = get_machine("a100-80")
    assert max(estimate_transfer(a100, 200e9, 64)) == pytest.approx(
        200e9 * 7 / 8 / 200e9
    )  # between nodes: 25 GB/s each
    assert max(estimate_transfer(h100, 1e9, 1)) == 0


def test_json_refuses_what_it_does_not_know():
    told = recipe().to_json()
    with pytest.raises(UserError, match=r"optimizer.*unknown field 'lrr'.*'lr'"):
        Recipe.from_json({**told, "optimizer": {"lrr": 1.0}})
    with pytest.raises(UserError, match="precision is 'fp8', expected one of auto, fp32, bf16"):
        Recipe.from_json({**told, "precision": "fp8"})
    with pytest.raises(UserError, match=r"recipe: images is 'many', expected an integer"):
        Recipe.from_json({**told, "images": "many"})
    with pytest.raises(UserError, match="global_batch"):
        Recipe.from_json({key: value for key, value in told.items() if key != "global_batch"})


def test_learning_rate_is_counted_in_images():
    r = recipe(optimizer=Optimizer(lr=1.0), schedule=Schedule(warmup_images=50, cooldown=0.2, final=0.1))
    assert [r.compute_lr(n) for n in (10, 25, 50, 800)] == [0.2, 0.5, 1.0, 1.0]
    assert r.compute_lr(900) == pytest.approx(0.55)
    assert r.compute_lr(1000) == r.compute_lr(1010) == pytest.approx(0.1)
    for shape in ("linear", "cosine", "sqrt"):
        rates = [
            recipe(optimizer=Optimizer(lr=1.0), schedule=Schedule(cooldown=0.5, shape=shape)).compute_lr(n)
            for n in range(500, 1001, 50)
        ]
        assert rates == sorted(rates, reverse=True)
        assert (rates[0], rates[-1]) == (1.0, pytest.approx(0.0))


def test_warmup_never_eats_a_short_run():
    r = recipe(optimizer=Optimizer(lr=1.0), schedule=Schedule(warmup_images=10**6))
    assert r.compute_lr(50) == 0.5
    assert r.compute_lr(100) == 1.0


def test_cadences():
    auto = recipe(images=6400, global_batch=64)
    assert [auto.get_cadence(what) for what in ("log", "validate", "save")] == [64, 800, 1600]
    assert recipe(validation=Validation(every=None)).get_cadence("validate") is None
    assert recipe(logging=Logging(save_every=123)).get_cadence("save") == 123


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"images": 0}, "images is 0"),
        ({"optimizer": Optimizer(lr=-1.0)}, "optimizer.lr is -1.0"),
        ({"optimizer": Optimizer(lr=math.nan)}, "optimizer.lr is nan, expected a positive number"),
        ({"optimizer": Optimizer(lr=math.inf)}, "optimizer.lr is inf"),
        ({"optimizer": Optimizer(eps=-1.0)}, "optimizer.eps is -1.0"),
        ({"optimizer": Optimizer(betas=(2.0, 3.0))}, "optimizer.betas are 2.0 3.0, expected numbers from 0 to below 1"),
        ({"optimizer": Optimizer(betas=(0.9, math.nan))}, "optimizer.betas are 0.9 nan"),
        ({"optimizer": Optimizer(clip_norm=-1.0)}, "optimizer.clip_norm is -1.0"),
        ({"optimizer": Optimizer(weight_decay=-0.1)}, "optimizer.weight_decay is -0.1, expected zero or more"),
        ({"schedule": Schedule(warmup_images=-1)}, "schedule.warmup_images is -1"),
        ({"validation": Validation(seed=-1)}, "validation.seed is -1, expected zero or more"),
        ({"validation": Validation(every=0)}, "validation.every is 0"),
        ({"logging": Logging(save_at=(8, 0))}, "logging.save_at is 0"),
        ({"guard": Guard(spike=math.nan)}, "guard.spike is nan"),
        ({"parallel": Parallel(max_live=-1)}, "parallel.max_live is -1"),
        ({"data": Data(latent_shape=(4, 0, 8))}, "data.latent_shape is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"shift": math.inf}, "shift is inf"),
        ({"data": Data(encoder_dropout=1.5)}, "encoder_dropout is 1.5"),
        ({"data": Data(encoder_dropout=math.nan)}, "encoder_dropout is nan"),
        ({"precision": "bf16", "parallel": Parallel(zero_stage=0)}, "bf16 needs fp32 master weights"),
        ({"precision": "bf16", "parallel": Parallel(zero_stage=1)}, "use --parallel.zero-stage 2"),
    ],
)
def test_values_that_cannot_work_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        check_values(recipe(**changes))


def test_batches_must_divide():
    assert count_micro_batches(recipe(global_batch=24, parallel=Parallel(micro_batch=3)), 2) == 4
    with pytest.raises(UserError, match=r"24 does not divide by 5 ranks.*--global-batch 20"):
        count_micro_batches(recipe(global_batch=24), 5)
    with pytest.raises(UserError, match="micro_batch 5 does not divide the 12"):
        count_micro_batches(recipe(global_batch=24, parallel=Parallel(micro_batch=5)), 2)


def test_differences_name_the_field():
    assert find_differences(recipe(), recipe(optimizer=Optimizer(lr=0.5))) == ["optimizer.lr: 0.0001 -> 0.5"]
    assert find_differences(recipe(), recipe(name="z", parallel=Parallel(zero_stage=0))) == []


def test_names_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'world-d4'"):
        get_recipe("wrold-d4")
    with pytest.raises(UserError, match="did you mean 'world'"):
        get_family("worlds")
    assert {"world", "pretrain-256", "world-uvit"} <= set(FAMILIES)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "did you mean 'train'"),
        (["train"], "needs a recipe"),
        (["train", "world-d44"], "did you mean 'world-d4'"),
        (["train", "world-d4", "--data", "x", "--out", "y", "--optimizr.lr", "1"], "(did you mean --optimizer.lr?)"),
        (["train", "world-d4", "--out", "y"], "needs --data"),
        (["train", "world-d4", "--data", "/no/such", "--out", "y"], "/no/such"),
        (["plan", "world-d4", "--images", "many"], "many"),
        (["ladder", "wrld", "--data", "x", "--out", "y"], "did you mean 'world'"),
        (["plan", "d15", "--gpu", "h100"], "did you mean 'h100-80'"),
        (["plan", "d38", "--gpus", "0"], "--gpus 0: expected a positive number"),
        (["plan", "d38", "--gpus", "-3"], "--gpus -3: expected a positive number"),
        (["plan", "d38", "--gpus", "48"], "global_batch 4096 does not divide by 48 ranks"),
        (["plan", "d38", "--gpus", "8", "--parallel.hpz", "3"], "parallel.hpz 3 does not divide the 8 ranks"),
        (["plan", "world-d2", "--images", "0"], "images is 0, expected a positive number"),
        (["plan", "d15", "--global-batch", "0"], "global_batch is 0"),
        (["plan", "d15", "--efficiency", "0"], "--efficiency 0.0: expected a positive number"),
        (["plan", "d15", "--efficiency", "nan"], "--efficiency nan"),
        (["plan", "d15", "--efficiency", "40"], "--efficiency 40.0: expected a share of the peak"),
        (["plan", "d15", "--dataset-images", "0"], "--dataset-images 0"),
        (["plan", "d15", "--dollars-per-gpu-hour", "-1"], "--dollars-per-gpu-hour -1.0: expected zero or more"),
        (["ladder", "world", "--data", "x", "--out", "y", "--images", "0"], "images is 0, expected"),
        (["ladder", "world", "--data", "x", "--out", "y", "--optimizer.lr", "0"], "optimizer.lr is 0.0, expected"),
        (["ladder", "world", "--data", "x", "--out", "y", "--model.depth=3"], "decides it: omit --model.depth"),
        (["sweep", "lr", "world", "--data", "x", "--out", "y", "--optimizer.lr", "1"], "--rates decides it"),
        (["ladder", "world", "--data", "x", "--out", "y", "--budgets", "nan"], "--budgets nan"),
        (["sweep", "lr", "world", "--data", "x", "--out", "y", "--rates", "1e-3", "nan"], "--rates 0.001 nan"),
        (["sweep", "lr", "world", "--data", "/no/such", "--out", "y"], "/no/such"),
        (["sweep", "formulations", "world-d2", "--data", "/no/such", "--out", "y"], "/no/such"),
        (["verify-resume", "world-d2", "--data", "x", "--out", "y", "--num-ranks", "0"], "--num-ranks 0"),
        (["plan", "/no/run"], "unknown recipe '/no/run'"),
        (["grade", "/no/run"], "no plan.json there"),
        (["export", "/no/run", "--data", "x", "--out", "y"], "no such checkpoint"),
    ],
)
def test_command_line_mistakes(arguments, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trainer", "--local_rank=0", *arguments])
    with pytest.raises(SystemExit) as caught:
        run_cli(main)
    output = capsys.readouterr()
    assert caught.value.code == 2
    assert says in output.err
    assert output.err.count("\n") == 1


def test_of_several_ranks_the_first_alone_says_it(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("trainer.__main__.time.sleep", lambda seconds: None)
    for words in (["train", "world-d4", "--bogus"], ["train", "wrld-d4"]):
        monkeypatch.setattr(sys, "argv", ["trainer", *words])
        with pytest.raises(SystemExit) as caught:
            run_cli(main)
        printed = capsys.readouterr()
        assert (caught.value.code, printed.out, printed.err) == (2, "", "")
    monkeypatch.setattr(sys, "argv", ["trainer", "train", "world-d4", "--help"])
    main()
    assert capsys.readouterr().out == ""


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


def test_the_switches_that_commands_hand_on_are_understood():
    """verify-resume and the documentation write switches without a value."""
    words = ["--data", "D", "--out", "O", "--parallel.compile", "--parallel.checkpoint-blocks", "--images", "2e9"]
    args = parse_options(TrainArgs, words, "train", recipe=get_recipe("d15"))
    assert args.recipe.parallel.compile
    assert args.recipe.parallel.checkpoint_blocks
    assert args.recipe.images == 2_000_000_000
    for name in ("world-uvit-d2", "world-mmdit3-d2"):  # fields of other networks are options too
        words = ["--data", "D", "--out", "O", "--model.depth", "3", "--images=1.5e6"]
        args = parse_options(TrainArgs, words, "train", recipe=get_recipe(name))
        assert args.recipe.images == 1_500_000
        assert (args.recipe.model.depth, args.recipe.model.name) == (3, name.split("-")[1])
