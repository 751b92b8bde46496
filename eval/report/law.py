"""The scaling part of a report: laws fitted to the ladder's validation losses, or the reason why there are none."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.report.data import Run, counted_parameters
from eval.report.series import Comparison
from eval.scaling.coverage import COVERAGE
from eval.scaling.intervals import Bootstrap, Interval, bootstrap, compute_bootstrap
from eval.scaling.laws import (
    Curve,
    Frontier,
    Points,
    fit_law,
    flops_law,
    frontier,
    joint_points,
    loss_at,
    size_points,
    thin,
    too_little,
)


@dataclass(frozen=True)
class Prediction:
    """What the law says about a model that is not trained, at the images of the others."""

    depth: int | None
    parameters: int
    images: float
    loss: Interval
    actual: float | None = None

    @property
    def inside(self) -> bool | None:
        return None if self.actual is None else self.loss.low <= self.actual <= self.loss.high


@dataclass(frozen=True)
class Scaling:
    """`reason` is set exactly when there is no fit. `optimum`: best size and images for the costliest run's FLOPs."""

    reason: str | None
    curves: tuple[Curve, ...] = ()
    images: float = 0.0
    size: Bootstrap | None = None
    joint: Bootstrap | None = None
    compute: Bootstrap | None = None
    best: Frontier | None = None
    size_exponent: Interval | None = None
    images_exponent: Interval | None = None
    optimum: dict[str, float] | None = None
    next_rung: Prediction | None = None
    held_out: Prediction | None = None


def fit_ladder(runs: Sequence[Run], losses: Comparison | None) -> Scaling:
    """Fits to the main validation loss of every run whose size and FLOPs are known."""
    curves = [thin(curve) for curve in curves_of(runs, losses)]
    curves = [curve for curve in curves if len(curve.images) >= 3]
    without = [run.name for run in runs if run.name not in {curve.run for curve in curves}]
    if not curves:
        return Scaling("no run has three validation losses together with its size and FLOPs (plan.json)")
    reason = too_little(curves)
    if reason is None and _overlap(curves) is None:
        reason = "the runs share no number of images at which their losses can be compared"
    if reason is not None:
        left = (
            f" ({len(without)} further run{'s' if len(without) > 1 else ''} without curve or size)" if without else ""
        )
        return Scaling(reason + left, tuple(curves))
    images = float(min(curve.images[-1] for curve in curves))
    size_boot, joint_boot = _fitted(size_points(curves, images)), _fitted(joint_points(curves))
    joint_law = joint_boot.law
    factor, kappa = flops_law(curves)
    joint = joint_law.exponents[0] + kappa * joint_law.exponents[1]
    alpha_B, beta_B = joint_boot.theta_BQ[:, 2], joint_boot.theta_BQ[:, 4]
    spread_B = alpha_B + kappa * beta_B
    best, most = frontier(joint_law, factor, kappa), max(float(curve.compute[-1]) for curve in curves)
    return Scaling(
        None, tuple(curves), images, size_boot, joint_boot, compute_bootstrap(joint_boot, factor, kappa),
        best=best,
        size_exponent=_quantiles(joint_law.exponents[1] / joint, beta_B / spread_B),
        images_exponent=_quantiles(joint_law.exponents[0] / joint, alpha_B / spread_B),
        optimum={"compute": most, "parameters": best.size_factor * most**best.size_exponent,
                 "images": best.images_factor * most**best.images_exponent},
        next_rung=_next_rung(runs, curves, size_boot, images),
        held_out=_held_out(runs, curves, images),
    )  # fmt: skip


def curves_of(runs: Sequence[Run], losses: Comparison | None) -> list[Curve]:
    """The runs of which size, FLOPs and a curve are known. Runs that only differ in seed are separate curves."""
    curves = []
    for run in runs:
        points = [p for p in losses.points.get(run.name, []) if p.images > 0 and p.value > 0] if losses else []
        if run.parameters and run.flops_per_image and points:
            images, loss = np.array([p.images for p in points], float), np.array([p.value for p in points])
            curves.append(Curve(run.name, run.parameters, run.flops_per_image, images, loss))
    return curves


def read_coverage() -> dict[str, Any]:
    """How often these intervals held the truth in simulated ladders (eval/scaling/coverage.py writes it)."""
    return json.loads(COVERAGE.read_text(encoding="utf-8")) if COVERAGE.exists() else {}


def _fitted(points: Points) -> Bootstrap:
    return bootstrap(points, fit_law(points))


def _overlap(curves: Sequence[Curve]) -> float | None:
    low, high = max(c.images[0] for c in curves), min(c.images[-1] for c in curves)
    return float(high) if low <= high else None


def _next_rung(runs: Sequence[Run], curves: Sequence[Curve], boot: Bootstrap, images: float) -> Prediction | None:
    """One more step of the ladder: the same difference in depth, exact parameters from the recipe's model."""
    known = [run for run in runs if run.depth and run.name in {curve.run for curve in curves}]
    depths = sorted({run.depth for run in known if run.depth})
    if len(depths) < 2:
        return None
    depth = depths[-1] + (depths[-1] - depths[-2])
    model = known[-1].recipe.get("model")
    parameters = counted_parameters({**model, "depth": depth}) if isinstance(model, Mapping) else None
    if parameters is None:
        depth_R = np.log([float(run.depth or 1) for run in known])
        slope, base = np.polyfit(depth_R, np.log([float(run.parameters or 1) for run in known]), deg=1)
        parameters = round(math.exp(base + slope * math.log(depth)))
    return Prediction(depth, parameters, images, boot.loss(parameters, new_run=True))


def _held_out(runs: Sequence[Run], curves: Sequence[Curve], images: float) -> Prediction | None:
    """The law of all smaller models, asked about the largest one that was really trained."""
    largest = max(c.parameters for c in curves)
    smaller = [c for c in curves if c.parameters < largest]
    if too_little(smaller) is not None:
        return None
    target = next(c for c in curves if c.parameters == largest)
    depth = next((run.depth for run in runs if run.name == target.run), None)
    loss = _fitted(size_points(smaller, images)).loss(largest, new_run=True)
    return Prediction(depth, largest, images, loss, actual=loss_at(target, images))


def _quantiles(value: float, value_B: np.ndarray) -> Interval:
    low, high = np.quantile(value_B, [0.025, 0.975])
    return Interval(value, float(low), float(high))
