"""The training objectives by name: a path, what the network predicts, and the density of its timesteps.

Every prediction is a known mixture alpha*x0 + beta*noise, so one 2x2 solve gives all conversions. Time runs from data
(t=0) to noise (t=1). To add a formulation: build a Formulation, one line in FORMULATIONS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from infra.errors import UserError, nearest
from model.diffusion.paths import EDM, SIGMA_DATA, Cosine, Level, Linear, Path, RectifiedFlow
from model.diffusion.timesteps import (
    Density,
    format_number,
    get_density,
    make_cosmap,
    make_lognorm,
    make_mode,
    make_uniform,
    parse_call,
    require_shift,
)

Target = Literal["velocity", "eps", "v", "F"]
Coefficients = Callable[[Level], tuple[Tensor, Tensor]]


def _mix_edm(level: Level) -> tuple[Tensor, Tensor]:
    """EDM: F = (x0 - c_skip z) / c_out with z = x0 + sigma noise; b is sigma."""
    sigma, total = level.b, level.b**2 + SIGMA_DATA**2
    skip, out = SIGMA_DATA**2 / total, sigma * SIGMA_DATA * total**-0.5
    return (1 - skip) / out, -skip * sigma / out


TARGETS: dict[Target, Coefficients] = {
    "velocity": lambda level: (-torch.ones_like(level.a), torch.ones_like(level.a)),
    "eps": lambda level: (torch.zeros_like(level.a), torch.ones_like(level.a)),
    "v": lambda level: (-level.b, level.a),
    "F": _mix_edm,
}


@dataclass(frozen=True)
class FlowSample:
    """A noised batch. The network reads `model_input` and `network_time_B`, and is asked for `target`."""

    x_t: Tensor
    target: Tensor
    t_B: Tensor
    network_time_B: Tensor
    input_scale_B: Tensor

    @property
    def model_input(self) -> Tensor:
        return self.x_t * broadcast_like(self.input_scale_B, self.x_t)


def broadcast_like(values_B: Tensor, x: Tensor) -> Tensor:
    """Values (B) in x's dtype and on its device, with trailing axes of size 1 so that they multiply x. Coefficients
    stay float64 until here."""
    return values_B.to(x.device, x.dtype).view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Formulation:
    """One way to train and sample; `weight` is the paper's w(t) and own loss = weight_constant * unified loss."""

    name: str
    path: Path
    target: Target
    density: Density
    weight: Callable[[Tensor], Tensor]
    weight_formula: str
    weight_constant: float

    def draw_timesteps(self, u_B: Tensor, shift: float = 1.0) -> Tensor:
        """Uniform draws to training times, float64; `shift` moves them for another resolution."""
        # The quantiles of the normal laws are infinite at u = 0 and 1, and a uniform draw can be exactly 0.
        t = self.density.draw(u_B.double().clamp(1e-12, 1 - 1e-12))
        if isinstance(self.path, Linear):
            t = (t * self.path.num_levels).floor() / self.path.num_levels
        if shift != 1.0:
            require_shift(shift)
            level = self.path.level(t)
            t = self.path.time_of_ratio(shift * level.b / level.a)
        return t

    def sample(self, x0: Tensor, noise: Tensor, t_B: Tensor) -> FlowSample:
        """Data and noise of one shape (B, ...), mixed at times t_B."""
        level = self.path.level(t_B.double())
        alpha, beta = TARGETS[self.target](level)
        x_t = broadcast_like(level.a, x0) * x0 + broadcast_like(level.b, x0) * noise
        target = broadcast_like(alpha, x0) * x0 + broadcast_like(beta, x0) * noise
        precise = torch.float64 if x0.dtype == torch.float64 else torch.float32
        network_time_B, input_scale_B = (v.to(x0.device, precise) for v in (level.network_time, level.input_scale))
        return FlowSample(x_t, target, t_B, network_time_B, input_scale_B)

    def compute_loss_B(self, prediction: Tensor, sample: FlowSample) -> Tensor:
        """Mean squared error per sample, never below float32."""
        precise = torch.promote_types(prediction.dtype, torch.float32)
        return (prediction.to(precise) - sample.target.to(precise)).square().flatten(1).mean(1)

    def split(self, prediction: Tensor, z: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """(x0, noise) that a prediction at z implies."""
        alpha, beta = TARGETS[self.target](level)
        # Two equations, z = a x0 + b e and p = alpha x0 + beta e, by Cramer's rule. Its determinant is 0 nowhere on the
        # sampling grids of the 61; for eps it is a, which is why eps/cos does not start at t = 1 (grids.py).
        a, b = level.a, level.b
        determinant = a * beta - b * alpha
        x0 = broadcast_like(beta / determinant, z) * z - broadcast_like(b / determinant, z) * prediction
        return x0, broadcast_like(a / determinant, z) * prediction - broadcast_like(alpha / determinant, z) * z

    def to_x0(self, prediction: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
        return self.split(prediction, x_t, self.path.level(t_B.double()))[0]

    def to_noise(self, prediction: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
        return self.split(prediction, x_t, self.path.level(t_B.double()))[1]

    def to_velocity(self, prediction: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
        """dx_t/dt along the path's own time."""
        x0, noise = self.split(prediction, x_t, self.path.level(t_B.double()))
        da, db = self.path.slope(t_B.double())
        return broadcast_like(da, x_t) * x0 + broadcast_like(db, x_t) * noise

    def from_x0_and_noise(self, x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """The prediction that implies this x0 and this noise."""
        alpha, beta = TARGETS[self.target](self.path.level(t_B.double()))
        return broadcast_like(alpha, x0) * x0 + broadcast_like(beta, x0) * noise

    def log_snr(self, t: Tensor) -> Tensor:
        level = self.path.level(t)
        return 2 * torch.log(level.a / level.b)

    def log_snr_slope(self, t: Tensor) -> Tensor:
        level, (da, db) = self.path.level(t), self.path.slope(t)
        return 2 * (da / level.a - db / level.b)

    def noise_error_factor(self, t: Tensor) -> Tensor:
        """c(t) with own squared error = c(t) * squared error of the implied noise."""
        level = self.path.level(t)
        alpha, beta = TARGETS[self.target](level)
        return (beta - alpha * level.b / level.a) ** 2


def _make_rf(name: str, density: Density) -> Formulation:
    return Formulation(
        name, RectifiedFlow(), "velocity", density, lambda t: t / (1 - t) * density.pdf(t), "t/(1-t) * pdf(t)", 1.0
    )


def _make_edm(name: str, path: EDM) -> Formulation:
    def weight(t: Tensor) -> Tensor:
        # pdf(lambda) = -1/lambda' = sigma / (2 dsigma/dt), as lambda = -2 ln sigma; exp(-lambda) = sigma^2.
        level, rate = path.level(t), path.slope(t)[1]
        return level.b / (2 * rate) * (level.b**2 + SIGMA_DATA**2)

    formula = "pdf(lambda) * (exp(-lambda) + 0.25)"
    return Formulation(name, path, "F", make_uniform(), weight, formula, 8.0)


def _make_cosine(target: Target) -> Formulation:
    if target == "eps":
        weight, formula, constant = lambda t: torch.sin(torch.pi * t), "sech(lambda/2)", 1 / torch.pi
    else:
        weight, formula, constant = lambda t: torch.tan(torch.pi / 2 * t), "exp(-lambda/2)", 2 / torch.pi
    return Formulation(f"{target}/cos", Cosine(), target, make_uniform(), weight, formula, constant)


def _make_linear(target: Target) -> Formulation:
    path = Linear()

    def weight(t: Tensor) -> Tensor:
        level, (da, db) = path.level(t), path.slope(t)
        # Under uniform t the density of lambda is -1/lambda'(t); this discrete schedule has no closed form of it.
        pdf_of_log_snr = -1 / (2 * (da / level.a - db / level.b))
        return pdf_of_log_snr if target == "eps" else pdf_of_log_snr / level.a**2

    formula = "pdf(lambda)" if target == "eps" else "pdf(lambda) / a^2"
    return Formulation(f"{target}/linear", path, target, make_uniform(), weight, formula, 2.0)


MODE_SCALES = tuple(-1 + 2.75 * i / 6 for i in range(7))
LOGNORM_MEANS, LOGNORM_STDS = (-1.0, -0.5, 0.0, 0.5, 1.0), (0.2, 0.6, 1.0, 1.4, 1.8, 2.2)
EDM_MEANS, EDM_STDS = (-1.2, -0.6, 0.0, 0.6, 1.2), (0.6, 1.2, 1.8)

# The 61 of the paper's study: 4 + 9 + 30 + 1 + 15 + 2. rf/mode(1.29) is the paper's name for s = -1 + 5/6 * 2.75.
STUDY: dict[str, Formulation] = {
    "eps/linear": _make_linear("eps"),
    "v/linear": _make_linear("v"),
    "eps/cos": _make_cosine("eps"),
    "v/cos": _make_cosine("v"),
    "rf": _make_rf("rf", make_uniform()),
    "rf/mode(1.00)": _make_rf("rf/mode(1.00)", make_mode(1.0)),
    **{f"rf/mode({s:.2f})": _make_rf(f"rf/mode({s:.2f})", make_mode(s)) for s in MODE_SCALES},
    **{
        f"rf/lognorm({m:.2f},{s:.2f})": _make_rf(f"rf/lognorm({m:.2f},{s:.2f})", make_lognorm(m, s))
        for m in LOGNORM_MEANS
        for s in LOGNORM_STDS
    },
    "rf/cosmap": _make_rf("rf/cosmap", make_cosmap()),
    **{
        f"edm({m:.2f},{s:.2f})": _make_edm(f"edm({m:.2f},{s:.2f})", EDM("normal", m, s))
        for m in EDM_MEANS
        for s in EDM_STDS
    },
    "edm/rf": _make_edm("edm/rf", EDM("rf")),
    "edm/cos": _make_edm("edm/cos", EDM("cos")),
}

# All that have a name. Further ones go here.
FORMULATIONS: dict[str, Formulation] = {
    **STUDY,
}


def get_formulation(name: str) -> Formulation:
    """One of FORMULATIONS by name, or another member of a family: rf/<density>(...), edm(P_m,P_s).

    However the numbers are written, rf/lognorm(0,1) is the formulation whose name is rf/lognorm(0.00,1.00).
    """
    if name in FORMULATIONS:
        return FORMULATIONS[name]
    if name.startswith("rf/"):
        density = get_density(name.removeprefix("rf/"))
        form = _make_rf("rf" if density.name == "uniform" else f"rf/{density.name}", density)
        return FORMULATIONS.get(form.name, form)
    if name.startswith("edm("):
        numbers = parse_call(name)[1]
        if len(numbers) != 2:
            raise UserError(f"{name!r}: edm takes two numbers, P_m and P_s")
        form = _make_edm(f"edm({format_number(numbers[0])},{format_number(numbers[1])})", EDM("normal", *numbers))
        return FORMULATIONS.get(form.name, form)
    raise UserError(
        f"unknown formulation {name!r}{nearest(name, FORMULATIONS)}; `python -m model formulations` lists all of them"
    )
