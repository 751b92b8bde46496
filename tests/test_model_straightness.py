"""Straightness in closed form: a linear field, Gaussian to Gaussian, straight flows, guidance; and what is refused."""
# Shapes: B batch.

import math

import pytest
import torch

from infra.errors import UserError
from model.diffusion.sampler import solve
from model.diffusion.straightness import measure_straightness
from model.encoders.text import TextCond

NOISE = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SIZE_B = NOISE.flatten(1).norm(dim=1)


def no_text(batch: int = 3) -> TextCond:
    return TextCond(torch.zeros(batch, 1, 1), torch.zeros(batch, 1))


def wide(t_B, x):
    return t_B.to(x.dtype).view(-1, 1, 1, 1)


def close(found, expected, rtol=1e-4):
    wanted = torch.as_tensor(expected, dtype=torch.float64).expand_as(found)
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-8)


@pytest.mark.parametrize("c", [0.5, -1.5, 3.0])
def test_a_linear_field(c):
    """v = c z: Z(t) = e^(c(t-1)) Z1, so S = |Z1|^2 (c (1 - e^-2c) / 2 - (1 - e^-c)^2), the length is |1 - e^-c|."""
    found = measure_straightness(lambda x, t_B, text: c * x, NOISE, no_text(), tolerance=1e-8)
    close(found.straightness_B, SIZE_B**2 * (c * (1 - math.exp(-2 * c)) / 2 - (1 - math.exp(-c)) ** 2))
    close(found.length_B, SIZE_B * abs(1 - math.exp(-c)))
    close(found.displacement_B, SIZE_B * abs(1 - math.exp(-c)))
    close(found.bend_BK.sum(1), SIZE_B * abs(c) * abs(1 - math.exp(-c)), rtol=1e-3)


@pytest.mark.parametrize("s", [0.1, 0.5, 2.0])
def test_gaussian_to_gaussian(s):
    """Data N(0, s^2): Z(t) = sigma(t) Z1 with sigma^2 = (1-t)^2 s^2 + t^2, whose integral of sigma'^2 is
    1 + s^2 - pi s / 2; so S = |Z1|^2 s (2 - pi/2)."""

    def velocity(x, t_B, text):
        t = wide(t_B, x)
        return x * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)

    found = measure_straightness(velocity, NOISE, no_text(), intervals=32, tolerance=1e-8)
    close(found.straightness_B, SIZE_B**2 * s * (2 - math.pi / 2), rtol=1e-3)
    close(found.displacement_B, SIZE_B * abs(1 - s))
    assert (found.length_B >= found.displacement_B * (1 - 1e-6)).all()


def test_a_turning_path_is_longer_than_its_displacement():
    """A rotation by a quarter: length pi/2 for a displacement of sqrt 2, and |dv/dt| constant."""
    noise = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    noise[0, 0] = 1.0
    quarter = math.pi / 2

    def turn(x, t_B, text):
        return quarter * torch.stack([-x[:, 1], x[:, 0]], dim=1)

    found = measure_straightness(turn, noise, no_text(1), tolerance=1e-9)
    close(found.length_B, quarter)
    close(found.displacement_B, math.sqrt(2))
    close(found.straightness_B, quarter**2 - 2)
    close(found.bend_BK, quarter**2 / 8, rtol=1e-3)


def test_the_integrals_by_t_say_where_a_path_bends():
    """v = 6 c t: (dZ - v)^2 = c^2 (3 - 6t)^2, an integral of each interval."""
    push = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    found = measure_straightness(lambda x, t_B, text: 6 * push * wide(t_B, x), push, no_text(1), intervals=4)
    edges = torch.linspace(1, 0, 5, dtype=torch.float64)
    antiderivative = -((3 - 6 * edges) ** 3) / 18
    close(found.straightness_BK[0], 4 * (antiderivative[:-1] - antiderivative[1:]))
    close(found.straightness_B, 4 * 3.0)
    close(found.bend_BK, 6 * 2.0 / 4)


def test_mean_slopes_are_a_lower_bound():
    """What `solve` keeps beside its latents; exact with Euler, whose path has these slopes."""
    push = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    slowing = lambda x, t_B, text: 6 * push * wide(t_B, x)  # noqa: E731
    exact = measure_straightness(slowing, push, no_text(1)).straightness_B
    bound = solve(slowing, push, no_text(1), steps=4, solver="heun", formulation="rf").straightness_B
    close(bound, float(exact) * (1 - 1 / 16))


def test_a_straight_flow_has_none_and_guidance_is_part_of_the_flow():
    found = measure_straightness(lambda x, t_B, text: torch.ones_like(x), NOISE, no_text())
    assert float(found.straightness_B.max()) < 1e-12
    assert float(found.bend_BK.max()) < 1e-9

    def network(x, t_B, text):
        return x * text.pooled_BP.to(x.dtype).view(-1, 1, 1, 1)

    one, nothing = TextCond(torch.zeros(3, 1, 1), torch.ones(3, 1)), no_text()
    guided = measure_straightness(network, NOISE, one, nothing, guidance=2.0, tolerance=1e-8)  # v = 2 z
    close(guided.straightness_B, SIZE_B**2 * ((1 - math.exp(-4.0)) - (1 - math.exp(-2.0)) ** 2))


def test_what_has_no_lines_in_t_is_refused():
    with pytest.raises(UserError, match="integrated over sigma"):
        measure_straightness(lambda x, t_B, text: x, NOISE, no_text(), formulation="edm(0.00,1.20)")
    with pytest.raises(UserError, match="expected at least 1 of 2"):
        measure_straightness(lambda x, t_B, text: x, NOISE, no_text(), intervals=0)
