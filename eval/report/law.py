"""The scaling part of a report: laws fitted to the ladder's validation losses, or the reason why there are none."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from eval.report.runs import RunFolder, count_parameters
from eval.report.series import Comparison
from eval.report.tables import compare_recipes
from eval.report.text import format_count
from eval.scaling.frontier import Frontier, fit_flops_law, solve_frontier
from eval.scaling.intervals import Bootstrap, Interval, bootstrap_law, derive_compute_bootstrap
from eval.scaling.laws import (
    FitPoints,
    LossCurve,
    collect_joint_points,
    collect_size_points,
    find_shortage,
    fit_law,
    interpolate_loss,
    thin_curve,
)

# Recipe fields that make two runs of one size no more unlike than two seeds do; `images` has a caution of its own.
LIKE_SEEDS = {"seed", "images", "data.fingerprint"}
LIKE_SEEDS_UNDER = ("logging.", "parallel.", "validation.", "guard.")


@dataclass(frozen=True)
class Prediction:
    """What the law says of a model that it has not seen, at `images`; `actual`: what that model then had."""

    depth: int | None
    parameters: int
    images: float
    loss: Interval
    actual: float | None
    inside: bool | None

    @staticmethod
    def of(depth: int | None, parameters: int, images: float, loss: Interval, actual: float | None) -> "Prediction":
        return Prediction(depth, parameters, images, loss, actual, is_inside(loss, actual))


@dataclass(frozen=True)
class FittedLaw:
    """L = floor + sum of coefficient / x ** exponent. `scatter_between_runs`: standard deviation in log loss."""

    floor: Interval
    coefficients: tuple[float, ...]
    exponents: tuple[Interval, ...]
    scatter_between_runs: float
    degrees_of_freedom: float

    @staticmethod
    def of(boot: Bootstrap) -> "FittedLaw":
        exponents = tuple(boot.exponent(k) for k in range(len(boot.law.exponents)))
        coefficients = tuple(boot.law.coefficients)
        return FittedLaw(boot.floor(), coefficients, exponents, boot.scatter.between_runs, boot.scatter.freedom)


@dataclass(frozen=True)
class ComputeOptimum:
    """The best parameters and images for a compute in training FLOPs."""

    compute: float
    parameters: float
    images: float


@dataclass(frozen=True)
class ScalingLaws:
    """The laws of a ladder: "L(N)" at `images`, "L(N,D)" and "L(C)". `reason` says why there are none.

    `notes`: what a reader of the law must know of the runs under it, a sentence each. `equal_ends`: all runs end at
    the same images, so that L(N) compares ends with ends. `optimum` is for the costliest run's compute.
    """

    reason: str | None
    notes: tuple[str, ...]
    images: float
    equal_ends: bool
    laws: dict[str, FittedLaw]
    frontier: Frontier | None
    optimum: ComputeOptimum | None
    size_exponent: Interval | None
    images_exponent: Interval | None
    next_rung: Prediction | None
    held_out: Prediction | None


@dataclass(frozen=True)
class LadderFit:
    """The curves of a ladder, what their laws say, and the bootstraps of L(N) and L(C) where there is a fit."""

    curves: tuple[LossCurve, ...]
    summary: ScalingLaws
    size: Bootstrap | None = None
    compute: Bootstrap | None = None


def is_inside(interval: Interval, value: float | None) -> bool | None:
    return None if value is None else interval.low <= value <= interval.high


def refuse_fit(reason: str, *, curves: Sequence[LossCurve] = (), notes: tuple[str, ...] = ()) -> LadderFit:
    """A ladder without a law, and why."""
    return LadderFit(tuple(curves), ScalingLaws(reason, notes, 0.0, False, {}, None, None, None, None, None, None))


def fit_ladder(runs: Sequence[RunFolder], losses: Comparison | None) -> LadderFit:
    """Fit the laws to the main validation loss of the runs of one backbone whose size and FLOPs are known."""
    known = [thin_curve(curve) for curve in collect_curves(runs, losses)]
    known = [curve for curve in known if len(curve.images) >= 3]
    without = [run.name for run in runs if run.name not in {curve.run for curve in known}]
    curves, notes = _choose_backbone(runs, known)
    if not curves:
        return refuse_fit("no run has three validation losses together with its size and FLOPs (plan.json)")
    reason = find_shortage(curves)
    if reason is None and max(c.images[0] for c in curves) > min(c.images[-1] for c in curves):
        reason = "the runs share no number of images at which their losses can be compared"
    if reason is not None:
        left = (
            f" ({len(without)} further run{'s' if len(without) > 1 else ''} without curve or size)" if without else ""
        )
        return refuse_fit(reason + left, curves=curves, notes=notes)
    images = float(min(curve.images[-1] for curve in curves))
    size, joint = _fit(collect_size_points(curves, images)), _fit(collect_joint_points(curves))
    factor, kappa = fit_flops_law(curves)
    compute = derive_compute_bootstrap(joint, factor, kappa)
    frontier = solve_frontier(joint.law, factor, kappa)
    size_exponent, images_exponent = _estimate_frontier_exponents(joint, kappa)
    most = max(float(curve.compute[-1]) for curve in curves)
    summary = ScalingLaws(
        reason=None,
        notes=(*notes, *_describe_unlike_runs(runs, curves, images)),
        images=images,
        equal_ends=len({curve.images[-1] for curve in curves}) == 1,
        laws={"L(N)": FittedLaw.of(size), "L(N,D)": FittedLaw.of(joint), "L(C)": FittedLaw.of(compute)},
        frontier=frontier,
        optimum=ComputeOptimum(
            most,
            frontier.size_factor * most**frontier.size_exponent,
            frontier.images_factor * most**frontier.images_exponent,
        ),
        size_exponent=size_exponent,
        images_exponent=images_exponent,
        next_rung=_predict_next_rung(runs, curves, size, images),
        held_out=_predict_largest(runs, curves, images),
    )
    return LadderFit(tuple(curves), summary, size, compute)


def _estimate_frontier_exponents(joint: Bootstrap, kappa: float) -> tuple[Interval, Interval]:
    """Of size and images against compute: beta / (alpha + kappa beta) and alpha / (alpha + kappa beta)."""
    alpha, beta = joint.law.exponents
    alpha_B, beta_B = joint.theta_BQ[:, 2], joint.theta_BQ[:, 4]
    total, total_B = alpha + kappa * beta, alpha_B + kappa * beta_B
    return Interval.of(beta / total, beta_B / total_B), Interval.of(alpha / total, alpha_B / total_B)


def _choose_backbone(runs: Sequence[RunFolder], curves: Sequence[LossCurve]) -> tuple[list[LossCurve], tuple[str, ...]]:
    """The curves of the backbone that has most sizes (then most runs), and who is left out: a law is of one family."""
    kinds = {run.name: run.backbone for run in runs}
    groups: dict[str, list[LossCurve]] = {}
    for curve in curves:
        groups.setdefault(kinds[curve.run], []).append(curve)
    chosen = max(groups, key=lambda kind: (len({c.parameters for c in groups[kind]}), len(groups[kind])), default="")
    others = [f"{kind} ({', '.join(c.run for c in groups[kind])})" for kind in groups if kind != chosen]
    told = (f"The law is of {chosen} alone; other backbones are not under it: {'; '.join(others)}.",) if others else ()
    return groups.get(chosen, []), told


def _describe_unlike_runs(runs: Sequence[RunFolder], curves: Sequence[LossCurve], images: float) -> Iterator[str]:
    """What makes runs of one law less alike than it takes them for."""
    fields: set[str] = set()
    for size in {curve.parameters for curve in curves}:
        names = {curve.run for curve in curves if curve.parameters == size}
        recipes = [run for run in runs if run.name in names]
        fields |= {line.field for line in compare_recipes(recipes)}
    told = sorted(field for field in fields if field not in LIKE_SEEDS and not field.startswith(LIKE_SEEDS_UNDER))
    if told:
        yield f"Runs of one size differ in more than their seed ({', '.join(told)}); the law takes that for noise."
    last = max(float(curve.images[-1]) for curve in curves)
    if last > images:
        yield (
            f"The runs end at different images, {format_count(images)} to {format_count(last)}: L(N) compares the ends "
            "of the shortest with checkpoints on the way."
        )


def collect_curves(runs: Sequence[RunFolder], losses: Comparison | None) -> list[LossCurve]:
    """The runs of which size, FLOPs and a curve are known. Runs that only differ in seed are separate curves."""
    curves = []
    for run in runs:
        points = [p for p in losses.points.get(run.name, []) if p.images > 0 and p.value > 0] if losses else []
        if run.parameters and run.flops_per_image and points:
            images, loss = np.array([p.images for p in points], float), np.array([p.value for p in points])
            curves.append(LossCurve(run.name, run.parameters, run.flops_per_image, images, loss))
    return curves


def _fit(points: FitPoints) -> Bootstrap:
    return bootstrap_law(points, fit_law(points))


def _predict_next_rung(
    runs: Sequence[RunFolder], curves: Sequence[LossCurve], boot: Bootstrap, images: float
) -> Prediction | None:
    """One more step of the ladder: the same difference in depth, exact parameters from the recipe's model."""
    known = [run for run in runs if run.depth and run.name in {curve.run for curve in curves}]
    depths = sorted({run.depth for run in known if run.depth})
    if len(depths) < 2:
        return None
    depth = depths[-1] + (depths[-1] - depths[-2])
    parameters = count_parameters(known[-1].recipe_field("model"), depth=depth)
    if parameters is None:
        depth_R = np.log([float(run.depth or 1) for run in known])
        slope, base = np.polyfit(depth_R, np.log([float(run.parameters or 1) for run in known]), deg=1)
        parameters = round(math.exp(base + slope * math.log(depth)))
    return Prediction.of(depth, parameters, images, boot.loss(parameters, new_run=True), None)


def _predict_largest(runs: Sequence[RunFolder], curves: Sequence[LossCurve], images: float) -> Prediction | None:
    """The law of all smaller models, asked about the largest one that was really trained."""
    largest = max(c.parameters for c in curves)
    smaller = [c for c in curves if c.parameters < largest]
    if find_shortage(smaller) is not None:
        return None
    target = next(c for c in curves if c.parameters == largest)
    depth = next((run.depth for run in runs if run.name == target.run), None)
    loss = _fit(collect_size_points(smaller, images)).loss(largest, new_run=True)
    return Prediction.of(depth, largest, images, loss, interpolate_loss(target, images))
