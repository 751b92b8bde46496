"""The scaling part of a report: laws fitted to the ladder's validation losses, or the reason why there are none.

N is the number of parameters, D of training images, C the training FLOPs, L the validation loss.
"""

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

# Recipe fields in which runs of one size may differ without a note: the effect is that of another seed, or none. For
# `images` there is a note of its own.
LIKE_SEEDS = {"seed", "images", "data.fingerprint"}
LIKE_SEEDS_UNDER = ("logging.", "parallel.", "validation.", "guard.")


@dataclass(frozen=True)
class Prediction:
    """The law's prediction of the loss of a model that it was not fitted to, after `images`; `actual` is the measured
    loss, `inside` whether it lies in the interval (None before the model is trained)."""

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
    """The numbers of parameters and images that the law finds best for `compute` training FLOPs."""

    compute: float
    parameters: float
    images: float


@dataclass(frozen=True)
class ScalingLaws:
    """The laws of a ladder: "L(N)" at `images`, "L(N,D)" and "L(C)". `reason` says why there are none, if so.

    `notes`: sentences about the runs that a reader of the law must know. `equal_ends`: all runs end at the same number
    of images, so that L(N) compares final losses. `optimum` is for the compute of the costliest run.
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
    """Exponents of the best N and the best D as powers of compute: beta / (alpha + kappa beta) and alpha / (alpha +
    kappa beta). They follow from minimising A/N^alpha + B/D^beta at fixed C, which is proportional to N^kappa D."""
    alpha, beta = joint.law.exponents
    alpha_B, beta_B = joint.theta_BQ[:, 2], joint.theta_BQ[:, 4]
    total, total_B = alpha + kappa * beta, alpha_B + kappa * beta_B
    return Interval.of(beta / total, beta_B / total_B), Interval.of(alpha / total, alpha_B / total_B)


def _choose_backbone(runs: Sequence[RunFolder], curves: Sequence[LossCurve]) -> tuple[list[LossCurve], tuple[str, ...]]:
    """The curves of one backbone, as a law holds for one family: the backbone with most sizes, then most runs. Also a
    note that names the runs left out."""
    kinds = {run.name: run.backbone for run in runs}
    groups: dict[str, list[LossCurve]] = {}
    for curve in curves:
        groups.setdefault(kinds[curve.run], []).append(curve)
    chosen = max(groups, key=lambda kind: (len({c.parameters for c in groups[kind]}), len(groups[kind])), default="")
    others = [f"{kind} ({', '.join(c.run for c in groups[kind])})" for kind in groups if kind != chosen]
    note = (f"The law is of {chosen} alone; other backbones are not under it: {'; '.join(others)}.",) if others else ()
    return groups.get(chosen, []), note


def _describe_unlike_runs(runs: Sequence[RunFolder], curves: Sequence[LossCurve], images: float) -> Iterator[str]:
    """Notes on differences between the runs that the law takes for noise."""
    fields: set[str] = set()
    for size in {curve.parameters for curve in curves}:
        names = {curve.run for curve in curves if curve.parameters == size}
        recipes = [run for run in runs if run.name in names]
        fields |= {line.field for line in compare_recipes(recipes)}
    differing = sorted(field for field in fields if field not in LIKE_SEEDS and not field.startswith(LIKE_SEEDS_UNDER))
    if differing:
        yield f"Runs of one size differ in more than their seed ({', '.join(differing)}); the law takes that for noise."
    last = max(float(curve.images[-1]) for curve in curves)
    if last > images:
        yield (
            f"The runs end at different images, {format_count(images)} to {format_count(last)}: L(N) compares the ends "
            "of the shortest with checkpoints on the way."
        )


def collect_curves(runs: Sequence[RunFolder], losses: Comparison | None) -> list[LossCurve]:
    """Loss curves of the runs whose size and FLOPs are known. Runs that differ only in their seed are separate
    curves."""
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
    """The prediction for the next depth, as far from the largest one as that is from the one before. The number of
    parameters is that of the recipe's model, or a power law of depth if the model is not known."""
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
    """The prediction for the largest trained model by a law fitted to all smaller models."""
    largest = max(c.parameters for c in curves)
    smaller = [c for c in curves if c.parameters < largest]
    if find_shortage(smaller) is not None:
        return None
    target = next(c for c in curves if c.parameters == largest)
    depth = next((run.depth for run in runs if run.name == target.run), None)
    loss = _fit(collect_size_points(smaller, images)).loss(largest, new_run=True)
    return Prediction.of(depth, largest, images, loss, interpolate_loss(target, images))
