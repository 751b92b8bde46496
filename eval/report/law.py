"""The scaling part of a report: laws fitted to the ladder's validation losses, or the reason why there are none."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.report.data import Run, counted_parameters
from eval.report.series import Comparison
from eval.report.style import count_text
from eval.report.tables import recipe_differences
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
LIKE_SEEDS = {"seed", "images"}
LIKE_SEEDS_UNDER = ("logging.", "parallel.", "validation.", "guard.")


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
    """`reason` is set exactly when there is no fit. `optimum`: best size and images for the costliest run's FLOPs.

    `notes`: what a reader of the law must know of the runs under it, a sentence each.
    """

    reason: str | None
    curves: tuple[LossCurve, ...] = ()
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
    notes: tuple[str, ...] = ()

    @property
    def equal_ends(self) -> bool:
        """Do all runs end at the same images, so that L(N) compares ends with ends?"""
        return len({curve.images[-1] for curve in self.curves}) == 1


def fit_ladder(runs: Sequence[Run], losses: Comparison | None) -> Scaling:
    """Fits to the main validation loss of the runs of one backbone whose size and FLOPs are known."""
    known = [thin_curve(curve) for curve in curves_of(runs, losses)]
    known = [curve for curve in known if len(curve.images) >= 3]
    without = [run.name for run in runs if run.name not in {curve.run for curve in known}]
    curves, notes = _of_one_backbone(runs, known)
    if not curves:
        return Scaling("no run has three validation losses together with its size and FLOPs (plan.json)")
    reason = find_shortage(curves)
    if reason is None and _overlap(curves) is None:
        reason = "the runs share no number of images at which their losses can be compared"
    if reason is not None:
        left = (
            f" ({len(without)} further run{'s' if len(without) > 1 else ''} without curve or size)" if without else ""
        )
        return Scaling(reason + left, tuple(curves), notes=notes)
    images = float(min(curve.images[-1] for curve in curves))
    size_boot, joint_boot = _fitted(collect_size_points(curves, images)), _fitted(collect_joint_points(curves))
    joint_law = joint_boot.law
    factor, kappa = fit_flops_law(curves)
    joint = joint_law.exponents[0] + kappa * joint_law.exponents[1]
    alpha_B, beta_B = joint_boot.theta_BQ[:, 2], joint_boot.theta_BQ[:, 4]
    spread_B = alpha_B + kappa * beta_B
    best, most = solve_frontier(joint_law, factor, kappa), max(float(curve.compute[-1]) for curve in curves)
    return Scaling(
        None, tuple(curves), images, size_boot, joint_boot, derive_compute_bootstrap(joint_boot, factor, kappa),
        best=best,
        size_exponent=_quantiles(joint_law.exponents[1] / joint, beta_B / spread_B),
        images_exponent=_quantiles(joint_law.exponents[0] / joint, alpha_B / spread_B),
        optimum={"compute": most, "parameters": best.size_factor * most**best.size_exponent,
                 "images": best.images_factor * most**best.images_exponent},
        next_rung=_next_rung(runs, curves, size_boot, images),
        held_out=_held_out(runs, curves, images),
        notes=(*notes, *_cautions(runs, curves, images)),
    )  # fmt: skip


def _of_one_backbone(runs: Sequence[Run], curves: Sequence[LossCurve]) -> tuple[list[LossCurve], tuple[str, ...]]:
    """The curves of the backbone that has most sizes (then most runs), and who is left out: a law is of one family."""
    kinds = {run.name: run.backbone for run in runs}
    groups: dict[str, list[LossCurve]] = {}
    for curve in curves:
        groups.setdefault(kinds[curve.run], []).append(curve)
    chosen = max(groups, key=lambda kind: (len({c.parameters for c in groups[kind]}), len(groups[kind])), default="")
    others = [f"{kind} ({', '.join(c.run for c in groups[kind])})" for kind in groups if kind != chosen]
    told = (f"The law is of {chosen} alone; other backbones are not under it: {'; '.join(others)}.",) if others else ()
    return groups.get(chosen, []), told


def _cautions(runs: Sequence[Run], curves: Sequence[LossCurve], images: float) -> Iterator[str]:
    """What makes runs of one law less alike than it takes them for."""
    fields: set[str] = set()
    for size in {curve.parameters for curve in curves}:
        names = {curve.run for curve in curves if curve.parameters == size}
        recipes = [run for run in runs if run.name in names]
        fields |= {line["field"] for line in recipe_differences(recipes)}
    told = sorted(field for field in fields if field not in LIKE_SEEDS and not field.startswith(LIKE_SEEDS_UNDER))
    if told:
        yield f"Runs of one size differ in more than their seed ({', '.join(told)}); the law takes that for noise."
    last = max(float(curve.images[-1]) for curve in curves)
    if last > images:
        yield (
            f"The runs end at different images, {count_text(images)} to {count_text(last)}: L(N) compares the ends of "
            "the shortest with checkpoints on the way."
        )


def curves_of(runs: Sequence[Run], losses: Comparison | None) -> list[LossCurve]:
    """The runs of which size, FLOPs and a curve are known. Runs that only differ in seed are separate curves."""
    curves = []
    for run in runs:
        points = [p for p in losses.points.get(run.name, []) if p.images > 0 and p.value > 0] if losses else []
        if run.parameters and run.flops_per_image and points:
            images, loss = np.array([p.images for p in points], float), np.array([p.value for p in points])
            curves.append(LossCurve(run.name, run.parameters, run.flops_per_image, images, loss))
    return curves


def _fitted(points: FitPoints) -> Bootstrap:
    return bootstrap_law(points, fit_law(points))


def _overlap(curves: Sequence[LossCurve]) -> float | None:
    low, high = max(c.images[0] for c in curves), min(c.images[-1] for c in curves)
    return float(high) if low <= high else None


def _next_rung(runs: Sequence[Run], curves: Sequence[LossCurve], boot: Bootstrap, images: float) -> Prediction | None:
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


def _held_out(runs: Sequence[Run], curves: Sequence[LossCurve], images: float) -> Prediction | None:
    """The law of all smaller models, asked about the largest one that was really trained."""
    largest = max(c.parameters for c in curves)
    smaller = [c for c in curves if c.parameters < largest]
    if find_shortage(smaller) is not None:
        return None
    target = next(c for c in curves if c.parameters == largest)
    depth = next((run.depth for run in runs if run.name == target.run), None)
    loss = _fitted(collect_size_points(smaller, images)).loss(largest, new_run=True)
    return Prediction(depth, largest, images, loss, actual=interpolate_loss(target, images))


def _quantiles(value: float, value_B: np.ndarray) -> Interval:
    low, high = np.quantile(value_B, [0.025, 0.975])
    return Interval(value, float(low), float(high))
