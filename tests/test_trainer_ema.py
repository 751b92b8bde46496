"""The averages against the formulas they state, in float64."""

import pytest
import torch

from infra.errors import UserError
from trainer.zero.ema import ShardedEMA, parse_profile, solve_gamma


@pytest.mark.parametrize("width", [0.02, 0.05, 0.10, 0.20, 0.25])
def test_width_is_the_standard_deviation_of_the_profile(width):
    g = solve_gamma(width)
    assert ((g + 1) / ((g + 2) ** 2 * (g + 3))) ** 0.5 == pytest.approx(width, rel=1e-9)
    # The profile itself: weight of the value at time s of a run of length 1 is (g+1) s^g.
    s = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    weight = (g + 1) * s**g
    mean = torch.trapezoid(weight * s, s)
    assert torch.trapezoid(weight * (s - mean) ** 2, s).sqrt().item() == pytest.approx(width, rel=1e-6)


def test_updates_equal_the_profile_in_closed_form():
    """Averaging the values 1..n with beta_n = (1 - 1/n)^(g+1) is the power-weighted mean."""
    ema = ShardedEMA(["power:0.10"], [torch.zeros(1)])
    reference = torch.zeros(1, dtype=torch.float64)
    g = solve_gamma(0.10)
    for n in range(1, 401):
        value = torch.tensor([float(n)])
        ema.update([value], images_seen=32 * n, batch=32)
        reference = reference.lerp(value.double(), 1 - (1 - 1 / n) ** (g + 1))
    assert ema.first[0].item() == pytest.approx(reference.item(), rel=1e-6)
    assert reference.item() == pytest.approx(400 * (g + 1) / (g + 2), rel=0.01)  # mean of (g+1) s^g


def test_decay_every_so_many_images():
    profile = parse_profile("decay:0.9@100")
    betas = [profile.compute_beta(seen, 30) for seen in range(30, 331, 30)]
    assert [i for i, b in enumerate(betas) if b < 1] == [3, 6, 9]  # where 100, 200, 300 are crossed
    assert parse_profile("decay:0.999").compute_beta(30, 30) == 0.999


def test_several_profiles_stay_apart():
    start = [torch.randn(5), torch.randn(3)]
    ema = ShardedEMA(["power:0.05", "decay:0.5"], start)
    ema.update([s + 1 for s in start], images_seen=1000, batch=10)
    for shard, s in zip(ema.shards["decay:0.5"], start):
        torch.testing.assert_close(shard, s + 0.5)
    assert not torch.equal(ema.first[0], ema.shards["decay:0.5"][0])
    ema.update([torch.zeros(5), torch.zeros(3)], images_seen=10, batch=10)  # first step of a run: nothing old survives
    assert ema.first[0].abs().max() == 0


@pytest.mark.parametrize("text", ["power", "power:0", "power:0.3", "power:0.1@5", "decay:1", "decay:0.9@0", "mean:0.1"])
def test_profiles_that_make_no_sense_are_refused(text):
    with pytest.raises(UserError, match="EMA profile"):
        parse_profile(text)
