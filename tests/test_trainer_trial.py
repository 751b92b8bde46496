"""Trials of a step: shallow models that stand for a deep one, tried by real ranks."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import UserError
from model.backbone import BACKBONES
from model.backbones.mmdit import MMDiTConfig
from trainer.machines import get_machine
from trainer.objective import count_train_flops
from trainer.planning import trial as trying
from trainer.planning.estimates import Cost, StepCost
from trainer.planning.reality import run_trial
from trainer.planning.trial import make_shallow, measure_flops, time_step
from trainer.recipe import Optimizer, Parallel, Recipe

NARROW = {"context_width": 64, "pooled_width": 64}


def recipe(**changes) -> Recipe:
    base = Recipe(name="r", model=MMDiTConfig(6, **NARROW), images=1000, global_batch=16, precision="fp32",
                  parallel=Parallel(micro_batch=2, zero_stage=3, persistence_threshold=0, max_live=0))  # fmt: skip
    return dataclasses.replace(base, **changes)


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(sorted(BACKBONES)), depth=st.integers(5, 40), latent=st.sampled_from([8, 16, 32]))
def test_further_blocks_of_one_width_count_alike(name, depth, latent):
    """The premise of a trial: FLOPs and parameters grow by the same with every block, whatever the backbone."""
    config = BACKBONES[name](depth=depth, **({"clip_tokens": 77} if name == "mmdit3" else {}))
    two, four = make_shallow(config, 2), make_shallow(config, 4)
    assert two.width == four.width == config.width
    steps = (depth - 2) / 2
    for count in (lambda c: c.count_parameters(), lambda c: c.count_forward_flops(latent, latent, 154)):
        assert count(config) == count(two) + steps * (count(four) - count(two))


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_a_shallow_model_is_one_of_its_kind(name):
    config = BACKBONES[name](depth=7, **({"clip_tokens": 77} if name == "mmdit3" else {}))
    with torch.device("meta"):
        whole, model = config.build(), make_shallow(config, 3).build()
    assert sum(p.numel() for p in model.parameters()) == make_shallow(config, 3).count_parameters()
    assert len(model.blocks) == 3
    mine = {n: p.shape for n, p in model.named_parameters() if not n.startswith("blocks")}
    assert mine == {n: p.shape for n, p in whole.named_parameters() if not n.startswith("blocks")}
    for block in (0, -1):
        found = [[(n, p.shape) for n, p in m.blocks[block].named_parameters()] for m in (model, whole)]
        assert found[0] == found[1]


def test_blocks_with_two_attentions_stay_where_there_is_room():
    config = MMDiTConfig(depth=6, dual_attention=(0, 1, 3, 4))
    assert make_shallow(config, 3).dual_attention == (0, 1)
    assert make_shallow(MMDiTConfig(depth=6), 3).dual_attention == ()


def stand_in(monkeypatch, cost_of) -> None:
    """Trials that take what a function of their blocks says."""
    monkeypatch.setattr(trying, "_try_model", lambda recipe, blocks, **more: cost_of(blocks))


def test_what_further_blocks_take_is_on_the_line_through_two_trials(monkeypatch):
    """Where a block takes 2 seconds of 1.5 seconds' work, and its update 1 of 0.5, beside 3 seconds of each."""
    stand_in(monkeypatch, lambda n: StepCost(Cost(3 + 2 * n, 3 + 1.5 * n), Cost(3 + n, 3 + 0.5 * n)))
    found = time_step(recipe(model=MMDiTConfig(30, **NARROW)), micro_batch=2, ranks=2)
    assert dataclasses.astuple(found.micro_batch) == pytest.approx((63, 48))
    assert dataclasses.astuple(found.update) == pytest.approx((33, 18))
    shallow_one = time_step(recipe(model=MMDiTConfig(3, **NARROW)), micro_batch=2, ranks=2)
    assert shallow_one == StepCost(Cost(9, 7.5), Cost(6, 4.5))
    deep = recipe(model=MMDiTConfig(30, **NARROW))
    more = [count_train_flops(dataclasses.replace(deep, model=make_shallow(deep.model, n))) for n in (2, 4)]
    assert measure_flops(deep, micro_batch=2) == pytest.approx(2 * (more[1] - more[0]) / 4)


def test_noise_gives_no_plan(monkeypatch):
    asked = []
    stand_in(monkeypatch, lambda n: asked.append(n) or StepCost(Cost(1.0, 1.0), Cost(1.0, 1.0)))
    with pytest.raises(UserError, match="4 blocks took no longer than 2: something else works on this machine"):
        time_step(recipe(), micro_batch=2, ranks=2)
    assert asked == [2, 4] * 3
    # less work and a shorter update of the deeper one are noise as well
    stand_in(monkeypatch, lambda n: StepCost(Cost(n, 5 - n), Cost(5 - n, 5 - n)))
    found = time_step(recipe(), micro_batch=2, ranks=2)
    assert dataclasses.astuple(found.micro_batch) == (pytest.approx(6), 1)
    assert found.update == Cost(1, 1)


def test_costs_lie_on_a_line():
    assert Cost(1.0, 2.0).interpolate(Cost(3.0, 3.0), 0) == Cost(1, 2)
    assert Cost(1.0, 2.0).interpolate(Cost(3.0, 3.0), 2.5) == Cost(6, 4.5)


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_try_a_step():
    found = time_step(recipe(), micro_batch=2, ranks=2)
    assert found.micro_batch.work > 0
    assert 0 < found.micro_batch.seconds < 60
    assert found.update.work > 0
    assert 0 < found.update.seconds < 60


@pytest.mark.dist
def test_another_backbone_tells_how_fast_one_device_computes():
    crossing = recipe(model=BACKBONES["cross_dit"](depth=2, **NARROW))
    assert 1e6 < measure_flops(crossing, micro_batch=2) < 1e16
    with pytest.raises(UserError, match="of the devices that are here, cpu, not of h100-80"):
        run_trial(crossing, get_machine("h100-80"), world_size=1)


@pytest.mark.dist
def test_a_trial_that_cannot_start_says_why():
    with pytest.raises(UserError, match=r"the trial of 2 blocks on 1 rank.s. did not end well: .*apex"):
        time_step(recipe(optimizer=Optimizer(kernel="apex")), micro_batch=2, ranks=1)
