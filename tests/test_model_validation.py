"""Keyed randomness and the validation protocols: independent of batches, ranks and order."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from infra.errors import UserError
from model.diffusion.flow import FORMULATIONS, get_formulation
from model.diffusion.validation import VAL_PROTOCOLS, compute_validation_losses, get_protocol
from model.encoders.text import TextCond
from model.seeding import Normal, QuickNormal, keyed_normal, keyed_uniform


class Batch(NamedTuple):
    latent_BCHW: Tensor
    text: TextCond
    positions: Tensor
    noise_BCHW: Tensor | None = None


def batch_of(positions: list[int]) -> Batch:
    rows = len(positions)
    latents = keyed_normal(7, positions, "latents", (2, 4, 4))
    return Batch(latents, TextCond(torch.zeros(rows, 1, 1), torch.zeros(rows, 1)), torch.tensor(positions))


def zero(x: Tensor, t_B: Tensor, text: TextCond) -> Tensor:
    return torch.zeros_like(x)


def test_keyed_draws_depend_on_nothing_but_their_key() -> None:
    together = keyed_normal(3, [5, 9, 2**40], "noise", (2, 3))
    for row, position in enumerate([5, 9, 2**40]):
        assert torch.equal(keyed_normal(3, torch.tensor([position]), "noise", (2, 3))[0], together[row])
    assert not torch.equal(keyed_normal(4, [5], "noise", (2, 3))[0], together[0])
    assert not torch.equal(keyed_normal(3, [5], "other", (2, 3))[0], together[0])
    assert keyed_uniform(0, [], "t").shape == (0,)
    # Pinned: a run resumed by a later version must draw the same numbers.
    assert keyed_uniform(0, [5], "t").item() == pytest.approx(0.9564, abs=1e-4)


Kind = type[Normal] | type[QuickNormal]


def rows(kind: Kind, positions: range, size: int, at_once: int = 500) -> Tensor:
    draws, out = kind(0, "n"), np.empty((len(positions), size), np.float32)
    for start in range(0, len(positions), at_once):
        some = slice(start, start + at_once)
        draws.fill(positions[some], out[some])
    return torch.from_numpy(out)


@pytest.mark.parametrize("kind", [Normal, QuickNormal])
@pytest.mark.parametrize("size", [6, 7])
def test_rows_of_normal_numbers_depend_on_their_position_alone(kind: Kind, size: int) -> None:
    there, back = rows(kind, range(20), size), rows(kind, range(19, -1, -1), size, at_once=3).flip(0)
    assert torch.equal(there, back)
    assert len(there.unique()) == there.numel()
    if kind is Normal:
        assert torch.equal(there, keyed_normal(0, range(20), "n", (size,)))


@pytest.mark.parametrize("kind", [Normal, QuickNormal])
def test_keyed_draws_are_distributed_as_they_say(kind: Kind) -> None:
    table = rows(kind, range(500), 400)
    assert abs(float(torch.corrcoef(torch.stack([table[:, :200].flatten(), table[:, 200:].flatten()]))[0, 1])) < 0.01
    assert 4.2 < float(table.abs().max()) < 5.8
    normal = table.flatten().double().sort().values
    expected = torch.special.ndtr(normal)
    rank = torch.arange(len(normal)) / len(normal)
    assert float((expected - rank).abs().max()) < 1.95 / len(normal) ** 0.5
    uniform = keyed_uniform(0, range(20_000), "u").sort().values
    assert float((uniform - torch.arange(20_000) / 20_000).abs().max()) < 1.95 / 20_000**0.5
    neighbours = keyed_uniform(0, range(20_001), "u")
    assert abs(float(torch.corrcoef(torch.stack([neighbours[1:], neighbours[:-1]]))[0, 1])) < 0.03


def test_protocols_are_three_different_ones() -> None:
    assert VAL_PROTOCOLS["sd3"].levels == tuple(k / 8 for k in range(1, 9))
    assert VAL_PROTOCOLS["mlperf"].levels == tuple(i / 8 for i in range(8))
    assert VAL_PROTOCOLS["midpoint"].levels == tuple((i + 0.5) / 8 for i in range(8))
    losses = torch.arange(16, dtype=torch.float64).view(2, 8)
    assert VAL_PROTOCOLS["sd3"].mean(losses) == losses[:, :7].mean()
    assert VAL_PROTOCOLS["mlperf"].mean(losses) == losses.mean()
    with pytest.raises(UserError, match="did you mean 'sd3'"):
        get_protocol("sd")


def test_validation_loss_does_not_depend_on_the_batch() -> None:
    levels = VAL_PROTOCOLS["sd3"].levels
    whole = compute_validation_losses(zero, batch_of([3, 8, 1, 4]), levels, seed=0)
    parts = torch.cat([compute_validation_losses(zero, batch_of(p), levels, seed=0) for p in ([3], [8, 1], [4])])
    assert torch.equal(whole, parts)
    assert whole.dtype == torch.float64
    assert whole.shape == (4, 8)
    assert not torch.equal(whole, compute_validation_losses(zero, batch_of([3, 8, 1, 4]), levels, seed=1))


def test_couplings_are_validated_with_their_own_noise() -> None:
    """At a network that says 0 the loss is the mean square of e - x0, at each level and for any seed."""
    batch = batch_of([3, 8, 1])
    coupled = batch._replace(noise_BCHW=keyed_normal(1, [0, 1, 2], "their own", (2, 4, 4)))
    found = compute_validation_losses(zero, coupled, VAL_PROTOCOLS["coupled"].levels, seed=0)
    expected = (coupled.noise_BCHW - batch.latent_BCHW).double().square().flatten(1).mean(1)
    torch.testing.assert_close(found, expected[:, None].expand(3, 9), rtol=1e-6, atol=0)
    assert torch.equal(found, compute_validation_losses(zero, coupled, VAL_PROTOCOLS["coupled"].levels, seed=5))
    assert VAL_PROTOCOLS["coupled"].levels == tuple(k / 8 for k in range(9))


def test_validation_loss_of_the_zero_model_is_known() -> None:
    """The target is noise - x0, both of unit variance: 2 at every level."""
    losses = compute_validation_losses(zero, batch_of(list(range(400))), (0.25, 1.0), seed=0)
    assert losses.mean(0).tolist() == pytest.approx([2.0, 2.0], abs=0.1)
    other = compute_validation_losses(zero, batch_of(list(range(400))), (0.25,), seed=0, formulation="eps/cos")
    assert float(other.mean()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", ["edm(-1.20,1.20)", "edm/rf"])
def test_levels_that_edm_does_not_have_are_left_out_or_refused(name: str) -> None:
    """sigma is infinite at t = 1, which sd3 keeps out of its mean; the network's time is -inf at t = 0."""
    form, batch = get_formulation(name), batch_of([3, 8])
    chosen = get_protocol("sd3", form)
    assert chosen.levels == VAL_PROTOCOLS["sd3"].levels[:7]
    assert torch.isfinite(compute_validation_losses(zero, batch, chosen.levels, seed=0, formulation=form)).all()
    assert get_protocol("midpoint", form) == VAL_PROTOCOLS["midpoint"]
    with pytest.raises(UserError, match=r"no noise level t=0 .*sd3 or midpoint"):
        get_protocol("mlperf", form)
    with pytest.raises(UserError, match="no noise level t=1"):
        compute_validation_losses(zero, batch, (0.5, 1.0), seed=0, formulation=form)


def test_every_other_formulation_has_every_level() -> None:
    for name, form in FORMULATIONS.items():
        for protocol in VAL_PROTOCOLS if not name.startswith("edm") else ():
            assert get_protocol(protocol, form) == get_protocol(protocol)
