"""What the loop watches, against direct computation: loss by time, attention of the last blocks, efficiency."""

import math

import pytest
import torch

from model.backbone import BACKBONES
from model.text import TextCond
from trainer.machines import get_machine
from trainer.monitor import BINS, AttentionWatch, Monitor
from trainer.objective import Losses
from trainer.recipe import Data, Recipe
from trainer.zero.group import Group

SOLO = Group(0, 1, torch.device("cpu"))
CONFIG = BACKBONES["mmdit"]({"depth": 2, "in_channels": 4, "context_width": 48, "pooled_width": 32})
RECIPE = Recipe(
    name="tiny", model=CONFIG, images=64, global_batch=8, precision="fp32",
    data=Data(resolution=32, latent_shape=(4, 8, 8), text_tokens=6),
)  # fmt: skip


def inputs() -> tuple[torch.Tensor, torch.Tensor, TextCond]:
    g = torch.Generator().manual_seed(1)
    mask = torch.tensor([[True] * 4 + [False] * 2] * 3)
    text = TextCond(torch.randn(3, 6, 48, generator=g), torch.randn(3, 32, generator=g), mask)
    return torch.randn(3, 4, 8, 8, generator=g), torch.rand(3, generator=g), text


def test_attention_is_that_of_the_block():
    """Queries and keys are taken where attention takes them; masked text counts for nothing."""
    model = CONFIG.build(seed=1)
    watch = AttentionWatch(model)
    seen: list[tuple[torch.Tensor, ...]] = []
    import model.mmdit as mmdit

    true = mmdit.attend

    def listening(q, k, v, bias=None):
        seen.append((q[0], k[0], bias))
        return true(q, k, v, bias)

    mmdit.attend = listening
    try:
        watch.on = True
        with torch.no_grad():
            model(*inputs())
    finally:
        mmdit.attend = true
    found = watch.take()
    entropies, logits = [], []
    for q_SHK, k_SHK, bias in seen:
        for head in range(q_SHK.shape[1]):
            scores = q_SHK[:16, head] @ k_SHK[:, head].T / 8 + bias[0, 0]
            logits.append(scores.max().item())
            p = scores.softmax(-1)
            entropies += (-(p * p.clamp_min(1e-30).log()).sum(-1)).tolist()
    assert found.largest == pytest.approx(max(logits), rel=1e-5)
    assert found.entropy == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert found.entropy <= math.log(20)  # 16 image and 4 text keys that may be seen
    assert watch.take() is None


def test_silent_unless_asked():
    model = CONFIG.build()
    watch = AttentionWatch(model)
    with torch.no_grad():
        model(*inputs())
    assert watch.take() is None


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_can_be_watched(name):
    more = {"clip_tokens": 3} if name == "mmdit3" else {}
    model = BACKBONES[name]({**CONFIG.to_json(), **more} if name == "mmdit" else shared(more)).build()
    watch = AttentionWatch(model)
    watch.on = True
    with torch.no_grad():
        model(*inputs())
    assert 0 < watch.take().entropy < 4


def shared(more: dict[str, int]) -> dict[str, int]:
    return {"depth": 2, "in_channels": 4, "context_width": 48, "pooled_width": 32, **more}


def test_losses_go_to_the_bins_of_their_times_and_efficiency_is_exact():
    monitor = Monitor(RECIPE, CONFIG.build(), SOLO, get_machine("cpu"))
    t_B = torch.tensor([0.0, 0.05, 0.5, 0.999, 1.0])
    monitor.add(Losses(torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]), t_B))
    monitor._since -= 10.0  # as if ten seconds had passed
    told = monitor.take()
    width = 1 / BINS
    bins = {name: value for name, value in told.items() if name.startswith("loss/")}
    assert bins == {
        f"loss/t{width / 2:.4f}": 2.0, f"loss/t{0.5 + width / 2:.4f}": 5.0, f"loss/t{1 - width / 2:.4f}": 8.0,
    }  # fmt: skip
    counts = CONFIG.multiply_adds(8, 8, 6)
    flops = 2 * (2 * counts.stem + 3 * counts.inner)  # data needs no gradient: the stem runs backward once
    assert told["mfu"] == pytest.approx(flops * 5 / 10 / 63.5e9, rel=0.05)
    assert told["memory_gib"] > 0.05
    assert not any(name.startswith("loss/") for name in monitor.take())
