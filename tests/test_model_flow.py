"""The 61 formulations by identities: derivative of the path, conversions, the unified loss; densities by quadrature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from model_kinds import KINDS
from torch import Tensor

from infra.errors import UserError
from model.diffusion.flow import FORMULATIONS, STUDY, Formulation, get_formulation
from model.diffusion.grids import make_sampling_grid
from model.diffusion.paths import Linear
from model.diffusion.timesteps import (
    DENSITIES,
    MODE_LIMIT,
    Density,
    get_density,
    make_lognorm,
    make_mode,
    shift_timesteps,
)
from model.seeding import keyed_uniform

ALL = list(FORMULATIONS)
DENSITY_NAMES = [
    *("uniform", "cosmap", "ushape(4)", "ushape(0.5)", "lognorm(-1,0.2)", "lognorm(0,1)", "lognorm(1,2.2)"),
    *(f"mode({s})" for s in (-1.0, -0.5, 0.0, 1.0, 1.29, 1.75)),
]


def times(form: Formulation, count: int = 40) -> Tensor:
    """Times inside (0, 1); for the discrete schedule between two levels, where its interpolation is smooth."""
    if isinstance(form.path, Linear):
        return (torch.linspace(2, 997, count, dtype=torch.float64).round() + 0.5) / 1000
    return torch.linspace(0.03, 0.97, count, dtype=torch.float64)


def pair(count: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(count, 2, 3, dtype=torch.float64, generator=g) for _ in range(2))  # type: ignore[return-value]


def test_there_are_61_of_the_stated_kinds() -> None:
    names = list(STUDY)
    counts = [
        sum(n.endswith(("/linear", "/cos")) and not n.startswith("edm") for n in names),
        sum(n == "rf" or n.startswith("rf/mode") for n in names),
        sum(n.startswith("rf/lognorm") for n in names),
        sum(n == "rf/cosmap" for n in names),
        sum(n.startswith("edm(") for n in names),
        sum(n in ("edm/rf", "edm/cos") for n in names),
    ]
    assert counts == [4, 9, 30, 1, 15, 2]
    assert len(names) == 61
    assert all(FORMULATIONS[name] is form for name, form in STUDY.items())
    assert all(form.name == name for name, form in FORMULATIONS.items())
    named = ["rf/lognorm(0.50,0.60)", "rf/mode(1.29)", "rf/mode(1.75)", "edm(0.00,0.60)", "edm(-1.20,1.20)"]
    assert set(named) < set(names)


@pytest.mark.parametrize("name", KINDS)
def test_path_derivative_is_the_velocity(name: str) -> None:
    form = get_formulation(name)
    t = times(form)
    x0, noise = pair(len(t))
    step = 1e-7 * torch.minimum(t, 1 - t)
    forward, back = (form.sample(x0, noise, t + sign * step).x_t for sign in (1, -1))
    slope = (forward - back) / (2 * step).view(-1, 1, 1)
    here = form.sample(x0, noise, t)
    velocity = form.to_velocity(here.target, here.x_t, t)
    scale = velocity.abs().amax((1, 2), keepdim=True)
    assert ((slope - velocity) / scale).abs().max() < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_conversions_round_trip(name: str) -> None:
    form = get_formulation(name)
    t = times(form)
    x0, noise = pair(len(t))
    drawn = form.sample(x0, noise, t)
    torch.testing.assert_close(form.to_x0(drawn.target, drawn.x_t, t), x0, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(form.to_noise(drawn.target, drawn.x_t, t), noise, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(form.from_x0_and_noise(x0, noise, t), drawn.target, atol=1e-12, rtol=1e-12)
    assert form.compute_loss_B(drawn.target, drawn).max() == 0


@pytest.mark.parametrize("name", ALL)
def test_loss_is_the_unified_loss_up_to_its_constant(name: str) -> None:
    """Own loss times the density of t = constant * (-1/2) w(t) lambda'(t) |noise error|^2 (paper section 2)."""
    form = get_formulation(name)
    t = times(form)
    x0, noise = pair(len(t))
    drawn = form.sample(x0, noise, t)
    prediction = drawn.target + 0.3 * noise.flip(0)
    own = form.compute_loss_B(prediction, drawn) * form.density.pdf(t)
    noise_error = (form.to_noise(prediction, drawn.x_t, t) - noise).square().mean((1, 2))
    unified = -0.5 * form.weight(t) * form.log_snr_slope(t) * noise_error
    torch.testing.assert_close(own, form.weight_constant * unified, atol=0, rtol=1e-10)
    coefficient = form.weight_constant * -0.5 * form.weight(t) * form.log_snr_slope(t)
    relative = form.noise_error_factor(t) * form.density.pdf(t) / coefficient - 1
    assert relative.abs().max() < 1e-10


def test_weights_are_the_papers_functions_of_the_log_snr() -> None:
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    close = {"atol": 0.0, "rtol": 1e-9}
    for name, of_lambda in (
        ("eps/cos", lambda x: 1 / torch.cosh(x / 2)),
        ("v/cos", lambda x: torch.exp(-x / 2)),
        ("rf", lambda x: torch.exp(-x / 2)),
        ("edm/rf", lambda x: 0.125 / torch.cosh(x / 4) ** 2 * (torch.exp(-x) + 0.25)),  # logistic of scale 2
        ("edm/cos", lambda x: 1 / (2 * math.pi * torch.cosh(x / 2)) * (torch.exp(-x) + 0.25)),
    ):
        form = get_formulation(name)
        torch.testing.assert_close(form.weight(t), of_lambda(form.log_snr(t)), **close)
    form = get_formulation("edm(-0.60,1.80)")
    normal = torch.distributions.Normal(torch.tensor(1.2, dtype=torch.float64), 3.6)
    lam = form.log_snr(t)
    torch.testing.assert_close(form.weight(t), normal.log_prob(lam).exp() * (torch.exp(-lam) + 0.25), **close)


def test_linear_schedule_sums_over_its_levels() -> None:
    """The discrete loss, a mean over 1000 levels, is the unified one as a sum over their steps of the log-SNR.

    Steps and pdf(lambda) come from a table of our own: level k carries the step to the next one, the last its own.
    """
    t = torch.arange(1000, dtype=torch.float64) / 1000
    signal = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    lam = np.log(signal / (1 - signal))
    drop = -np.diff(lam)
    drop = torch.from_numpy(np.append(drop, drop[-1]))
    smooth_pdf = torch.from_numpy(-1 / np.gradient(lam, 1 / 1000))
    noise_error = torch.from_numpy(1 / np.cosh(lam))
    for name, per_pdf in (("eps/linear", np.ones(1000)), ("v/linear", 1 / signal)):
        form, per_pdf = get_formulation(name), torch.from_numpy(per_pdf)
        torch.testing.assert_close(form.log_snr(t).numpy(), lam, atol=1e-10, rtol=0)
        torch.testing.assert_close(form.weight(t), per_pdf / (1000 * drop), atol=0, rtol=1e-9)
        torch.testing.assert_close(form.weight(t)[30:], (per_pdf * smooth_pdf)[30:], atol=0, rtol=0.02)
        own = (form.noise_error_factor(t) * noise_error).mean()
        unified = 0.5 * (form.weight(t) * drop * noise_error).sum()
        torch.testing.assert_close(own, form.weight_constant * unified, atol=0, rtol=1e-10)
    assert [round(x, 2) for x in lam[[0, -1]].tolist()] == [7.07, -5.36]
    assert round(signal[-1], 5) == 0.00466


def test_linear_schedule_draws_whole_levels_and_tells_them_to_the_network() -> None:
    form = get_formulation("eps/linear")
    t = form.draw_timesteps(keyed_uniform(0, [0], "levels", (1, 20_000))[0, 0])
    assert set((t * 1000).round().long().tolist()) <= set(range(1000))
    torch.testing.assert_close(form.path.level(t).network_time, t)
    assert len(t.unique()) > 990


def test_edm_preconditioning_is_edms() -> None:
    form = get_formulation("edm/rf")
    t = times(form)
    x0, noise = pair(len(t))
    drawn = form.sample(x0, noise, t)
    sigma = (t / (1 - t)).view(-1, 1, 1)
    total = sigma**2 + 0.25
    denoised = 0.25 / total * drawn.x_t + sigma * 0.5 / total.sqrt() * drawn.target
    torch.testing.assert_close(denoised, x0)
    torch.testing.assert_close(drawn.model_input, drawn.x_t / total.sqrt())
    torch.testing.assert_close(drawn.network_time_B, sigma.flatten().log() / 4)


def test_training_in_float32_keeps_dtypes() -> None:
    for name in KINDS:
        form = get_formulation(name)
        drawn = form.sample(torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), form.draw_timesteps(torch.rand(3)))
        assert {x.dtype for x in vars(drawn).values()} - {torch.float64} == {torch.float32}
        assert drawn.model_input.dtype == drawn.target.dtype == drawn.network_time_B.dtype == torch.float32
        assert form.compute_loss_B(torch.zeros(3, 2, 4, 4, dtype=torch.bfloat16), drawn).dtype == torch.float32


def quantile_grid(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Points spread as the density is, and its cumulative integral by the midpoint rule between them."""
    density = get_density(name)
    u = torch.linspace(1e-9, 1 - 1e-9, 80_001, dtype=torch.float64)
    t, middle = (density.draw(x).sort().values for x in (u, (u[1:] + u[:-1]) / 2))
    steps = density.pdf(middle) * t.diff()
    return t.numpy(), torch.cat([torch.zeros(1), steps.cumsum(0)]).numpy()


@pytest.mark.parametrize("name", DENSITY_NAMES)
def test_density_integrates_to_one_and_matches_its_draws(name: str) -> None:
    t, cumulative = quantile_grid(name)
    assert abs(cumulative[-1] - 1) < 2e-4
    draws = np.sort(get_density(name).draw(keyed_uniform(1, [0], name, (200_000,))[0]).numpy())
    expected = np.interp(draws, t, cumulative)
    rank = np.arange(200_000) / 200_000
    distance = max(np.abs(expected - rank).max(), np.abs(expected - rank - 1 / 200_000).max())
    assert distance < 1.95 / math.sqrt(200_000)  # Kolmogorov-Smirnov at the 0.1 % level


def test_mode_density_at_the_papers_points() -> None:
    half = torch.tensor([0.5], dtype=torch.float64)
    for scale, value in ((1.0, 2.33), (1.29, 3.79), (1.75, 904)):
        assert abs(float(make_mode(scale).pdf(half)) / value - 1) < 5e-3
    with pytest.raises(UserError, match=r"1\.7519"):
        make_mode(MODE_LIMIT + 1e-3)
    with pytest.raises(UserError, match="-1 <="):
        get_formulation("rf/mode(-1.1)")


def test_the_u_shape_is_that_of_the_code_of_2_rectified_flow() -> None:
    """It draws u = ln(1 + x (e^a - 1)) / a and turns half of the draws around; the printed e^(au) + e^(-au) would give
    0.147 at data and 4.0 at noise."""
    density = get_density("ushape(4)")
    ends = density.pdf(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist()
    assert ends == pytest.approx([2.075, 0.551, 2.075], abs=1e-3)
    x = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    one = torch.log(1 + x * (math.exp(4) - 1)) / 4
    theirs = torch.cat([one, 1 - one]).sort().values
    ours = density.draw((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    form = get_formulation("rf/ushape(4)")
    assert form.name == "rf/ushape(4.00)"
    t = form.draw_timesteps(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert 0 < t[0] < 1e-11 < 1 - 1e-11 < t[1] < 1
    for wrong, says in (("ushape(0)", "above 0"), ("ushape(nan)", "finite"), ("ushape(1e4)", "at most 100")):
        with pytest.raises(UserError, match=says):
            get_density(wrong)


def test_resolution_shift_moves_the_log_snr_by_its_log() -> None:
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    for name in ("rf", "v/cos", "edm/rf"):
        form = get_formulation(name)
        u = form.density.draw(t)
        moved = form.log_snr(form.draw_timesteps(t, shift=3.0)) - form.log_snr(u)
        torch.testing.assert_close(moved, torch.full_like(t, -2 * math.log(3)))
    torch.testing.assert_close(shift_timesteps(shift_timesteps(t, 3.0), 1 / 3), t)
    # A shifted lognorm(m, s) is lognorm(m + log shift, s).
    shifted, slope = shift_timesteps(t, 3.0), 3 / (1 + 2 * t) ** 2
    torch.testing.assert_close(make_lognorm(0.2, 0.7).pdf(t) / slope, make_lognorm(0.2 + math.log(3), 0.7).pdf(shifted))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("rf/lognrm(0,1)", "did you mean 'lognorm'"),
        ("vcos", "did you mean 'v/cos'"),
        ("rf/lognorm(0)", "1 parameters"),
        ("rf/lognorm(0,-1)", "positive"),
        ("edm(0,0)", "P_s is 0"),
        ("edm(1)", "two numbers"),
        ("rf/lognorm(a,b)", "cannot read"),
        ("rf/lognorm(nan,1)", "finite"),
        ("rf/lognorm(0,inf)", "finite"),
        ("rf/mode(nan)", "expected -1 <= s <= "),
        ("edm(0,nan)", "finite"),
    ],
)
def test_unknown_formulations_are_named(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        get_formulation(name)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["rf", "v/cos", "edm/rf", "eps/linear"])
def test_only_positive_shifts_are_taken(name: str, shift: float) -> None:
    form, half = get_formulation(name), torch.tensor([0.5])
    for use in (
        lambda: shift_timesteps(half, shift),
        lambda: form.draw_timesteps(half, shift=shift),
        lambda: make_sampling_grid(form, 4, shift=shift),
    ):
        with pytest.raises(UserError, match=f"shift is {shift}"):
            use()


def test_families_reach_beyond_the_61() -> None:
    form = get_formulation("rf/lognorm(0.3,0.9)")
    assert form.name == "rf/lognorm(0.30,0.90)"
    assert form.density.name == "lognorm(0.30,0.90)"
    assert get_formulation("edm(0.1,0.5)").path.formula == "a=1, b=exp(quantile(t; N(0.1,0.5^2)))"


def test_one_objective_has_one_name() -> None:
    """Recipes are hashed by it. Equal names mean equal numbers: the study's rf/mode(1.29) is not s = 1.29."""
    for written, name in (
        ("rf/lognorm(0,1)", "rf/lognorm(0.00,1.00)"),
        ("rf/uniform", "rf"),
        ("edm(-1.2,1.2)", "edm(-1.20,1.20)"),
        ("rf/mode(1)", "rf/mode(1.00)"),
    ):
        assert get_formulation(written) is FORMULATIONS[name]
    assert get_formulation("rf/lognorm(0.123,1)").name == "rf/lognorm(0.123,1.00)"
    assert FORMULATIONS["rf/mode(1.29)"].density.name == f"mode({-1 + 2.75 * 5 / 6})"


def test_a_density_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the README says: a function, one line; then it trains and samples under its name."""

    def beta2(strength: float) -> Density:
        power = 1 / strength
        return Density(f"beta2({strength})", lambda u: u**power, lambda t: strength * t ** (strength - 1))

    monkeypatch.setitem(DENSITIES, "beta2", beta2)
    form = get_formulation("rf/beta2(2)")
    assert form.name == "rf/beta2(2.0)"
    t = form.draw_timesteps(torch.linspace(0.1, 0.9, 9, dtype=torch.float64))
    torch.testing.assert_close(form.density.pdf(t), 2 * t)
    torch.testing.assert_close(form.weight(t), 2 * t * t / (1 - t))
    with pytest.raises(UserError, match=r"beta2\(0\)': .*division by zero"):
        get_formulation("rf/beta2(0)")
