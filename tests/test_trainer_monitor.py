"""What the loop watches, against direct computation: loss by time, attention of the last blocks, efficiency."""

import math

import pytest
import torch
from trainer_threads import run_threads

from model.backbone import BACKBONES
from model.encoders.text import TextCond
from model.probe import AttentionProbe
from trainer.machines import get_machine
from trainer.objective import Losses
from trainer.recipe import Data, Recipe
from trainer.watching.monitor import BINS, Monitor
from trainer.watching.stragglers import Stragglers, measure_speed
from trainer.zero.group import Group

SOLO = Group(0, 1, torch.device("cpu"))
CONFIG = BACKBONES["mmdit"](depth=2, in_channels=4, context_width=48, pooled_width=32)
RECIPE = Recipe(
    name="tiny", model=CONFIG, images=64, global_batch=8, precision="fp32",
    data=Data(resolution=32, latent_shape=(4, 8, 8), text_tokens=6),
)  # fmt: skip


def inputs() -> tuple[torch.Tensor, torch.Tensor, TextCond]:
    g = torch.Generator().manual_seed(1)
    mask = torch.tensor([[True] * 4 + [False] * 2] * 3)
    text = TextCond(torch.randn(3, 6, 48, generator=g), torch.randn(3, 32, generator=g), mask)
    return torch.randn(3, 4, 8, 8, generator=g), torch.rand(3, generator=g), text


def monitor() -> Monitor:
    return Monitor(RECIPE, SOLO, get_machine("cpu"))


def test_attention_is_that_of_the_first_sample_without_masked_text():
    model, (x, t_B, text), watch = CONFIG.build(seed=1), inputs(), monitor()
    with torch.no_grad(), watch.watch_forward(model, attention=True):
        model(x, t_B, text)
    told = watch.take()
    alone = TextCond(text.context_BLD[:1, :4], text.pooled_BP[:1], None)
    with torch.no_grad(), AttentionProbe() as probe:
        model(x[:1], t_B[:1], alone)
    assert told["attention/max_logit"] == pytest.approx(max(seen.max_logit for seen in probe.seen), rel=1e-5)
    assert 0 < told["attention/entropy"] <= math.log(20)  # 16 image and 4 text keys that may be seen
    assert not any(name.startswith("attention/") for name in watch.take())


def test_silent_unless_asked():
    watch, model = monitor(), CONFIG.build()
    with torch.no_grad(), watch.watch_forward(model, attention=False):
        model(*inputs())
    assert not any(name.startswith("attention/") for name in watch.take())


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_can_be_watched(name):
    more = {"clip_tokens": 3} if name == "mmdit3" else {}
    model = BACKBONES[name].from_json({**CONFIG.to_json(), **more} if name == "mmdit" else shared(more)).build()
    watch = monitor()
    with torch.no_grad(), watch.watch_forward(model, attention=True):
        model(*inputs())
    assert 0 < watch.take()["attention/entropy"] < 4


def shared(more: dict[str, int]) -> dict[str, int]:
    return {"depth": 2, "in_channels": 4, "context_width": 48, "pooled_width": 32, **more}


def test_losses_go_to_the_bins_of_their_times_and_efficiency_is_exact():
    watch = monitor()
    t_B = torch.tensor([0.0, 0.05, 0.5, 0.999, 1.0])
    watch.add(t_B, Losses(torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0])))
    watch._since -= 10.0  # as if ten seconds had passed
    told = watch.take()
    width = 1 / BINS
    bins = {name: value for name, value in told.items() if name.startswith("loss/")}
    assert bins == {
        f"loss/t{width / 2:.4f}": 2.0, f"loss/t{0.5 + width / 2:.4f}": 5.0, f"loss/t{1 - width / 2:.4f}": 8.0,
    }  # fmt: skip
    counts = CONFIG.count_multiply_adds(8, 8, 6)
    flops = 2 * (2 * counts.stem + 3 * counts.inner)  # data needs no gradient: the stem runs backward once
    assert told["mfu"] == pytest.approx(flops * 5 / 10 / 63.5e9, rel=0.05)
    assert told["memory_gib"] > 0.05
    assert not any(name.startswith("loss/") for name in watch.take())


def test_a_rank_that_is_slow_again_and_again_is_named(capsys):
    def work(group: Group) -> list[dict[str, float]]:
        stragglers = Stragglers(group)
        lines = [{2: 40.0}, {1: 60.0}, {1: 50.0, 2: 30.0}, {1: 50.0}, {}]
        return [
            stragglers.compare(speed=slow.get(group.rank, 100.0), data_wait=0.9 if group.rank == 3 else 0.01)
            for slow in lines
        ]

    found = run_threads(4, work)
    assert all(figures == found[0] for figures in found)
    assert [figures["ranks/slowest"] for figures in found[0]] == [2, 1, 2, 1, 0]
    assert [figures["ranks/slowest_speed"] for figures in found[0]] == [0.4, 0.6, 0.3, 0.5, 1.0]
    assert {figures["ranks/longest_data_wait"] for figures in found[0]} == {3}
    lines = [line for line in capsys.readouterr().err.splitlines() if "ranks: " in line]
    assert len(lines) == 2  # each once, when it was slow twice in a row, though another one was slower then
    assert any("all wait: rank 1 (" in line and "rank 2" not in line for line in lines)
    assert any("for data: rank 3 (" in line and "90 % of the time, the median rank 1 %" in line for line in lines)


def test_of_two_ranks_the_slow_one_is_named(capsys):
    def work(group: Group) -> None:
        stragglers = Stragglers(group)
        for _ in range(2):
            stragglers.compare(speed=(100.0, 60.0)[group.rank], data_wait=(0.01, 0.95)[group.rank])

    run_threads(2, work)
    said = capsys.readouterr().err
    assert "all wait: rank 1 (" in said
    assert "for data: rank 1 (" in said


def test_the_product_that_ranks_are_compared_by_is_a_product():
    assert 1e8 < measure_speed(torch.device("cpu")) < 1e15
