"""From noise to latents: Euler, Heun, DPM-Solver++ and adaptive Runge-Kutta over a formulation's grid, with
classifier-free guidance.

Both branches of guidance go through the network in one batch. Conversions are affine in the prediction, so guiding the
prediction is guiding the velocity.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from infra.errors import UserError, nearest
from model.diffusion.few_step import FewStep
from model.diffusion.flow import Formulation, broadcast_like, get_formulation
from model.diffusion.grids import (
    Grid,
    find_lowest_ratio,
    get_level,
    integrates_over_sigma,
    make_sampling_grid,
    make_start_state,
)
from model.encoders.text import TextCond

Solver = Literal["euler", "heun", "dpm", "rk"]
Predict = Callable[..., Tensor]  # (x, t_B, text), and r_B for a student that predicts average velocities
Slope = Callable[..., Tensor]  # (state, coordinate), and the coordinate where the step ends


@dataclass(frozen=True)
class Trajectory:
    """The result of a solver, in the coordinate of integration; names that end in _B have one value per sample.

    straightness_B is the integral of |mean slope - slope|^2 (0 for a straight path), as in InstaFlow, with the mean
    slope between two kept states for the slope: exact for Euler's own path, a lower bound for Heun and rk (76.6 instead
    of 81.7 for the slope 6ct on 4 points). `model/diffusion/straightness.py` measures the exact one.
    """

    latents: Tensor
    evaluations: int
    path_length_B: Tensor
    displacement_B: Tensor
    straightness_B: Tensor


@torch.no_grad()
def solve(
    model_fn: Predict,
    noise_BCHW: Tensor,
    text: TextCond,
    uncond: TextCond | None = None,
    *,
    steps: int = 25,
    guidance: float = 1.0,
    shift: float = 1.0,
    solver: Solver = "euler",
    formulation: Formulation | str = "rf/lognorm(0.00,1.00)",
    grid: Grid = "default",
    tolerance: float = 1e-4,
    student: FewStep | None = None,
) -> Trajectory:
    """Integrate from noise to data. `guidance` 1 reads `text` only; any other value needs `uncond`.

    solver dpm is DPM-Solver++(2M): of second order, with one evaluation a step as Euler.
    solver rk is Dormand-Prince with relative and absolute `tolerance`; it chooses its own steps between the grid's ends
    for the batch as a whole, so `steps` only says where its states are kept. `student`: what the weights say of
    themselves; UserError for steps, guidance or a solver that do not fit it.
    """
    form = get_formulation(formulation) if isinstance(formulation, str) else formulation
    if solver not in get_args(Solver):
        raise UserError(
            f"unknown solver {solver!r}{nearest(solver, get_args(Solver))}; known: {', '.join(get_args(Solver))}"
        )
    if student is not None:
        student.check(steps=steps, guidance=guidance, solver=solver)
    average = student is not None and student.average
    predict = add_guidance(model_fn, text, uncond, guidance)
    evaluations = 0

    def slope(y: Tensor, at: Tensor, to: Tensor | None = None) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return compute_path_slope(form, predict, y, at, to if average else None)

    def predict_x0(y: Tensor, at: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return predict_ends(form, predict, y, at)[0]

    points = make_sampling_grid(form, steps, shift=shift, grid=grid)
    start, to_sigma = make_start_state(form, noise_BCHW, points[0]), integrates_over_sigma(form)
    if solver == "rk" and to_sigma and points[-2] > find_lowest_ratio(form):
        # The one step that rk does not choose, to 0, starts where it is shortest, however few points there are.
        points = torch.cat([points[:-1], torch.tensor([find_lowest_ratio(form)], dtype=points.dtype), points[-1:]])
    advance = {
        "euler": _make_fixed(slope, None),
        "heun": _make_fixed(slope, to_sigma),
        "dpm": _make_multistep(form, predict_x0),
        "rk": _make_adaptive(slope, tolerance, to_sigma),
    }
    states = advance[solver](start, points)
    return _measure_trajectory(states, points, evaluations)


def add_guidance(model_fn: Predict, text: TextCond, uncond: TextCond | None, guidance: float) -> Callable[..., Tensor]:
    """predict(x, network_time_B, ...) with classifier-free guidance folded in; further times go to the network."""
    if not math.isfinite(guidance):
        raise UserError(f"guidance is {guidance}, expected a finite number")
    if guidance == 1.0:
        return lambda x, t_B, *second: model_fn(x, t_B, text, *second)
    if uncond is None:
        raise UserError(f"guidance {guidance} needs an unconditional input: pass make_unconditional(spec, batch)")
    shapes = [(tuple(c.context_BLD.shape), tuple(c.pooled_BP.shape)) for c in (text, uncond)]
    if shapes[0] != shapes[1]:
        raise UserError(f"text of shapes {shapes[0]} but an unconditional input of {shapes[1]}; they share a batch")
    both = TextCond.cat([text, uncond])

    def predict(x: Tensor, t_B: Tensor, *second: Tensor) -> Tensor:
        # Classifier-free guidance (arXiv 2207.12598), in the form without + g (with - without): g = 1 is no guidance.
        further = [torch.cat([r_B, r_B]) for r_B in second]
        with_text, without = model_fn(torch.cat([x, x]), torch.cat([t_B, t_B]), both, *further).chunk(2)
        return without + guidance * (with_text - without)

    return predict


def compute_path_slope(
    form: Formulation, predict: Callable[..., Tensor], y: Tensor, at: Tensor, to: Tensor | None = None
) -> Tensor:
    """dy/d(coordinate) at one coordinate for the whole batch; with `to`, its average from there to `to`."""
    x0, noise = predict_ends(form, predict, y, at, to)
    if integrates_over_sigma(form):
        return noise
    da, db = form.path.slope(at.to(torch.float64).expand(y.shape[0]))
    return broadcast_like(da, y) * x0 + broadcast_like(db, y) * noise


def predict_ends(
    form: Formulation, predict: Callable[..., Tensor], y: Tensor, at: Tensor, to: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(x0, noise) that the network sees in the state at one coordinate; with `to`, those of its average velocity."""
    coordinate_B = at.to(torch.float64).expand(y.shape[0])
    level = get_level(form, coordinate_B)
    z = broadcast_like(level.a, y) * y if integrates_over_sigma(form) else y
    precise = torch.float64 if y.dtype == torch.float64 else torch.float32
    times = [level.network_time]
    if to is not None:
        times.append(get_level(form, to.to(torch.float64).expand(y.shape[0])).network_time)
    scaled, times = broadcast_like(level.input_scale, z) * z, [t_B.to(y.device, precise) for t_B in times]
    return form.split(predict(scaled, *times).to(y.dtype), z, level)


def _make_fixed(slope: Slope, skip_last: bool | None) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """Euler (skip_last None) or Heun; skip_last ends Heun with an Euler step where the level 0 has no network time."""

    def advance(y: Tensor, points: Tensor) -> list[Tensor]:
        states = [y]
        for i in range(len(points) - 1):
            step = (points[i + 1] - points[i]).to(y.dtype)
            first = slope(y, points[i], points[i + 1])
            nearly = y + step * first
            if skip_last is None or (skip_last and i == len(points) - 2):
                y = nearly
            else:
                y = y + step * (first + slope(nearly, points[i + 1])) / 2
            states.append(y)
        return states

    return advance


def _make_multistep(form: Formulation, predict_x0: Slope) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): exact for a constant x0, which it extrapolates over log(a/b)
    from the last two predictions. The first step and the step to level 0 take the latest one alone."""

    def advance(y: Tensor, points: Tensor) -> list[Tensor]:
        level = get_level(form, points)
        a, b = (torch.ones_like(points), points) if integrates_over_sigma(form) else (level.a, level.b)
        log_ratio = torch.log(a / b)  # lambda of the paper: -inf at pure noise, inf at 0
        states, earlier, before = [y], None, math.inf
        for i in range(len(points) - 1):
            x0 = latest = predict_x0(states[-1], points[i])
            step = float(log_ratio[i + 1] - log_ratio[i])
            if earlier is not None and math.isfinite(step):
                latest = x0 + step / before / 2 * (x0 - earlier)
            kept, added = float(b[i + 1] / b[i]), float(a[i + 1] * -math.expm1(-step))
            states.append(kept * states[-1] + added * latest)
            earlier, before = x0, step
        return states

    return advance


def _make_adaptive(slope: Slope, tolerance: float, skip_last: bool) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """Dormand-Prince; skip_last ends with an Euler step where the level 0 has no network time."""

    def advance(y: Tensor, points: Tensor) -> list[Tensor]:
        points = points.to(y.device)
        inner = points[:-1] if skip_last else points
        states = integrate_adaptive(slope, y, inner, tolerance=tolerance)
        if skip_last:
            states.append(states[-1] + (points[-1] - inner[-1]).to(y.dtype) * slope(states[-1], inner[-1]))
        return states

    return advance


def integrate_adaptive(slope: Slope, y: Tensor, points: Tensor, *, tolerance: float) -> list[Tensor]:
    """States at all points by Dormand-Prince, from the state at the first one."""
    from torchdiffeq import odeint

    points = points.to(y.device)
    # Without step_t the solver overshoots the last point and interpolates back: below 0, were it that.
    path = odeint(
        lambda at, x: slope(x, at),
        y,
        points,
        method="dopri5",
        rtol=tolerance,
        atol=tolerance,
        options={"step_t": points[-1:]},
    )
    return list(path)


def _measure_trajectory(states: list[Tensor], points: Tensor, evaluations: int) -> Trajectory:
    moves = torch.stack([(b - a).flatten(1) for a, b in itertools.pairwise(states)]).double()
    steps = points.diff().abs()[:, None].to(moves.device)
    squared = moves.square().sum(2)
    # Integral of |slope|^2 less |mean slope|^2 times the length: what is left is the variance along the path.
    displacement = moves.sum(0).norm(dim=1)
    straightness = (squared / steps).sum(0) - displacement**2 / steps.sum()
    return Trajectory(states[-1], evaluations, squared.sqrt().sum(0), displacement, straightness.clamp(min=0))
