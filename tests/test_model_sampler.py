"""Samplers on problems with known answers: a Gaussian mixture's exact denoiser, known flows, diffusers' step grid."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from model_kinds import KINDS
from scipy.stats import norm
from torch import Tensor

from infra.errors import UserError
from model.diffusion.flow import TARGETS, Formulation, broadcast_like, get_formulation
from model.diffusion.grids import make_sampling_grid
from model.diffusion.paths import EDM, Linear
from model.diffusion.sampler import solve
from model.encoders.text import TextCond

# A mixture of two Gaussians in one dimension: the flow is the quantile map, so single answers are known too.
WEIGHT, MEAN, STD = (torch.tensor(x, dtype=torch.float64) for x in ([0.3, 0.7], [-1.2, 0.5], [0.2, 0.3]))
COUNT = 400


def no_text(batch: int) -> TextCond:
    return TextCond(torch.zeros(batch, 1, 1), torch.zeros(batch, 1))


def mixture_network(form: Formulation) -> Callable[..., Tensor]:
    """The prediction with the least expected loss, from the noise level that the network is told."""

    def predict(x: Tensor, t_B: Tensor, text: TextCond) -> Tensor:
        path = form.path
        level = path.level_of_ratio(torch.exp(4 * t_B)) if isinstance(path, EDM) else path.level(t_B)
        z, a, b = x / broadcast_like(level.input_scale, x), broadcast_like(level.a, x), broadcast_like(level.b, x)
        variance = (a * STD) ** 2 + b**2
        log_share = -0.5 * (z - a * MEAN) ** 2 / variance - 0.5 * variance.log() + WEIGHT.log()
        means = MEAN + a * STD**2 / variance * (z - a * MEAN)
        x0 = (log_share.softmax(-1) * means).sum(-1, keepdim=True)
        noise = torch.where(b > 0, (z - a * x0) / b.clamp(min=1e-30), 0.0)
        alpha, beta = TARGETS[form.target](level)
        return broadcast_like(alpha, x) * x0 + broadcast_like(beta, x) * noise

    return predict


def exact_quantiles(noise: Tensor) -> Tensor:
    grid = np.linspace(-3, 3, 60_001)
    weight, mean, std = (x.numpy() for x in (WEIGHT, MEAN, STD))
    cdf = (weight * norm.cdf((grid[:, None] - mean) / std)).sum(1)
    return torch.from_numpy(np.interp(norm.cdf(noise.numpy()), cdf, grid))


def moment_error(name: str, solver: str, steps: int = 8, tolerance: float = 1e-4) -> float:
    """Of mean and variance, the larger one."""
    form = get_formulation(name)
    u = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
    noise = torch.special.ndtri(u).view(-1, 1, 1, 1)
    out = solve(
        mixture_network(form), noise, no_text(COUNT), steps=steps, solver=solver, formulation=form, tolerance=tolerance
    ).latents
    exact = exact_quantiles(noise)
    return max(abs(float(out.mean() - exact.mean())), abs(float(out.var() - exact.var())))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("solver", ["euler", "heun", "dpm"])
def test_fixed_steps_recover_a_mixtures_moments(name: str, solver: str) -> None:
    """Mean and variance (of 0.71) within 0.02 at 128 steps, an eighth of the error at 8 or less."""
    few, many = moment_error(name, solver, 8), moment_error(name, solver, 128)
    assert many < 0.02
    assert many < few / 8


@pytest.mark.parametrize("name", KINDS)
def test_adaptive_steps_recover_a_mixtures_moments(name: str) -> None:
    """Within 0.001 at the default tolerance, an eighth of the error at 0.01 or less, and by any number of points.

    The floor is the start: z = noise at the last level of the linear schedule still holds 7 % of the signal.
    """
    loose, tight = moment_error(name, "rk", tolerance=1e-2), moment_error(name, "rk")
    assert tight < 1e-3
    assert tight < loose / 8
    assert abs(moment_error(name, "rk", 1) - tight) < 1e-4


@pytest.mark.parametrize("name", ["rf", "eps/linear", "eps/cos", "v/cos", "edm(-1.20,1.20)"])
def test_order_of_the_solvers(name: str) -> None:
    """Halving the step divides Euler's error by about 2, Heun's by about 4, DPM-Solver++'s by clearly more than 2: its
    steps are even in t and not in log(a/b), and its first and last one are Euler's.

    Not for the linear schedule: trailing levels end with a long step to 0, which both take as Euler.
    """
    form = get_formulation(name)
    noise = torch.tensor([-1.0, 0.4, 1.3], dtype=torch.float64).view(-1, 1, 1, 1)
    network = mixture_network(form)
    exact = solve(network, noise, no_text(3), solver="rk", tolerance=1e-9, formulation=form).latents
    trailing = isinstance(form.path, Linear)
    bounds = {
        "euler": (1.6, 2.4), "heun": (1.6 if trailing else 3.0, 5.5), "dpm": (1.6 if trailing else 2.5, 5.5)
    }  # fmt: skip
    for solver, (low, high) in bounds.items():
        coarse, fine = (
            solve(network, noise, no_text(3), steps=n, solver=solver, formulation=form).latents for n in (100, 200)
        )
        errors = [float((out - exact).norm()) for out in (coarse, fine)]
        assert low < errors[0] / errors[1] < high, (solver, errors)


def test_euler_recovers_a_known_flow() -> None:
    velocity = lambda x, t_B, text: (3 * t_B**2).view(-1, 1, 1, 1).expand_as(x)  # noqa: E731  exact answer: x - 1
    out = solve(velocity, torch.zeros(2, 1, 2, 2), no_text(2), steps=1000, formulation="rf").latents
    torch.testing.assert_close(out, -torch.ones(2, 1, 2, 2), atol=2e-3, rtol=0)
    # rk chooses its own steps: one point of the grid is enough.
    out = solve(velocity, torch.zeros(2, 1, 2, 2), no_text(2), steps=1, solver="rk", formulation="rf").latents
    torch.testing.assert_close(out, -torch.ones(2, 1, 2, 2), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (2, 3.0), (5, 1.0), (20, 3.0)])
def test_dpm_is_diffusers(steps: int, shift: float) -> None:
    """Its DPMSolverMultistepScheduler on the same times."""
    from diffusers import DPMSolverMultistepScheduler

    network = mixture_network(get_formulation("rf"))
    noise = torch.linspace(-2, 2, 7, dtype=torch.float64).view(-1, 1, 1, 1)
    found = solve(network, noise, no_text(7), steps=steps, shift=shift, solver="dpm", formulation="rf")
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    grid = make_sampling_grid(get_formulation("rf"), steps, shift=shift)
    scheduler.sigmas, scheduler.timesteps = grid, torch.arange(steps)
    state = noise
    for number in range(steps):
        velocity = network(state, grid[number].expand(7), no_text(7))
        state = scheduler.step(velocity, scheduler.timesteps[number], state).prev_sample
    assert found.evaluations == steps
    torch.testing.assert_close(found.latents, state, atol=1e-6, rtol=1e-6)


def test_a_straight_path_is_read_off_as_straight() -> None:
    push = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    straight = solve(lambda x, t_B, text: push, torch.zeros_like(push), no_text(3), steps=5, formulation="rf")
    torch.testing.assert_close(straight.latents, -push)
    torch.testing.assert_close(straight.path_length_B, push.flatten(1).norm(dim=1).double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(straight.displacement_B, straight.path_length_B, atol=1e-5, rtol=1e-5)
    assert straight.straightness_B.max() < 1e-5
    slowing = lambda x, t_B, text: push * t_B.view(-1, 1, 1, 1)  # noqa: E731
    bent = solve(slowing, torch.zeros_like(push), no_text(3), steps=50)
    assert bent.straightness_B.min() > 0.01
    assert straight.evaluations == 5


def test_guidance_takes_both_branches_in_one_batch() -> None:
    seen: list[int] = []

    def model(x: Tensor, t_B: Tensor, text: TextCond) -> Tensor:
        seen.append(len(x))
        return text.pooled_BP.view(-1, 1, 1, 1).expand_as(x).to(x.dtype)

    text = TextCond(torch.zeros(2, 1, 1), torch.full((2, 1), 3.0))
    out = solve(model, torch.zeros(2, 1, 1, 1), text, no_text(2), steps=4, guidance=2.5, formulation="rf").latents
    torch.testing.assert_close(out, torch.full_like(out, -7.5))
    assert seen == [4] * 4
    solve(model, torch.zeros(2, 1, 1, 1), text, steps=1, formulation="rf")
    assert seen[-1] == 2
    with pytest.raises(UserError, match="unconditional"):
        solve(model, torch.zeros(2, 1, 1, 1), text, guidance=2.0)


@pytest.mark.parametrize(("steps", "shift"), [(28, 3.0), (10, 1.0), (1, 3.0)])
def test_released_grid_is_diffusers(steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(steps)
    ours = make_sampling_grid(get_formulation("rf"), steps, shift=shift, grid="released")
    torch.testing.assert_close(ours.float(), scheduler.sigmas, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_grids_fall_to_zero_from_the_stated_level(name: str) -> None:
    form = get_formulation(name)
    for steps in (1, 2, 7, 50):
        grid = make_sampling_grid(form, steps)
        assert len(grid) == steps + 1
        assert (grid.diff() < 0).all()
        assert grid[-1] == 0


@pytest.mark.parametrize(
    ("names", "start"),
    [
        (["rf", "v/cos"], 1.0),
        (["eps/cos"], 0.999),
        (["edm/rf", "edm/cos", "edm(-1.20,1.20)"], 80.0),
        (["eps/linear", "v/linear"], (1 / 0.0046598 - 1) ** 0.5),
    ],
)
def test_grids_start_at_the_stated_level(names: list[str], start: float) -> None:
    for name in names:
        assert abs(float(make_sampling_grid(get_formulation(name), 7)[0]) - start) < 2e-3


def test_wrong_requests_are_named() -> None:
    zero = lambda x, t_B, text: torch.zeros_like(x)  # noqa: E731
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(UserError, match="did you mean 'euler'"):
        solve(zero, x, no_text(1), solver="eulr")  # type: ignore[arg-type]
    for steps in (0, 2.5):
        with pytest.raises(UserError, match=rf"{steps} steps; expected an integer"):
            solve(zero, x, no_text(1), steps=steps)  # type: ignore[arg-type]
    for guidance in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"guidance is {guidance}"):
            solve(zero, x, no_text(1), no_text(1), guidance=guidance)
    longer = TextCond(torch.zeros(1, 2, 1), torch.zeros(1, 1))
    with pytest.raises(UserError, match=r"\(1, 1, 1\).* unconditional input of .*\(1, 2, 1\)"):
        solve(zero, x, no_text(1), longer, guidance=2.0)
    with pytest.raises(UserError, match="rectified flow"):
        solve(zero, x, no_text(1), grid="released", formulation="v/cos")
