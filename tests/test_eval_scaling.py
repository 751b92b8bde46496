"""Scaling laws: known laws are found again, derivatives and frontiers are exact, too little is refused."""

import dataclasses
import math

import numpy as np
import pytest

from eval.scaling.correlation import correlate_across_runs, correlate_within_runs, find_equal_images
from eval.scaling.frontier import derive_compute_laws, fit_flops_law, solve_frontier
from eval.scaling.intervals import bootstrap_law
from eval.scaling.laws import (
    FitPoints,
    LossCurve,
    PowerLaw,
    collect_joint_points,
    collect_size_points,
    find_shortage,
    fit_law,
    huber_loss,
    interpolate_loss,
    predict_with_jacobian,
    refit,
    thin_curve,
)

IMAGES = np.geomspace(1e4, 1e6, 10)
# (E, A, alpha, B, beta): Chinchilla's published fit, its replication, and one at the scale of the world's losses.
LAWS = [(1.69, 406.4, 0.34, 410.7, 0.28), (1.8172, 482.01, 0.3478, 2085.43, 0.3658), (0.25, 3.0, 0.3, 20.0, 0.45)]


def curves(law, sizes, images=IMAGES, noise=0.0, seed=0):
    """Runs on the law with 6 N FLOPs per image; `noise` is each run's own offset in log loss."""
    e, a, alpha, b, beta = law
    rng = np.random.default_rng(seed)
    return [
        LossCurve(
            f"r{i}",
            int(n),
            6.0 * int(n),
            images,
            (e + a / int(n) ** alpha + b / images**beta) * math.exp(noise * rng.normal()),
        )
        for i, n in enumerate(sizes)
    ]


@pytest.mark.parametrize("law", LAWS)
def test_noise_free_points_give_the_joint_law_back(law):
    found = fit_law(collect_joint_points(curves(law, np.geomspace(1e6, 1e8, 4))))
    got = (found.floor, found.coefficients[0], found.exponents[0], found.coefficients[1], found.exponents[1])
    np.testing.assert_allclose(got, law, rtol=0.01)


@pytest.mark.parametrize(("floor", "factor", "exponent"), [(0.3, 4.0, 0.3), (0.05, 30.0, 0.12), (2.0, 1e4, 0.9)])
def test_noise_free_points_give_a_law_of_one_variable_back(floor, factor, exponent):
    x = np.geomspace(1e12, 1e15, 6) if factor == 30.0 else np.geomspace(1e6, 1e8, 5)
    y = np.log(floor + factor / x**exponent)
    found = fit_law(FitPoints(np.log(x)[None], y, np.arange(len(x)), tuple("abcdef"[: len(x)])))
    np.testing.assert_allclose(
        (found.floor, found.coefficients[0], found.exponents[0]), (floor, factor, exponent), rtol=0.01
    )


def test_the_derivative_of_the_law_is_its_finite_difference():
    rng = np.random.default_rng(0)
    theta, x = np.array([[-1.0, 0.3, 0.4, -0.2, 0.7]]), rng.normal(size=(2, 7))
    value, jacobian = predict_with_jacobian(theta, x)
    for q in range(5):
        moved = theta.copy()
        moved[0, q] += 1e-6
        numeric = (predict_with_jacobian(moved, x)[0] - value) / 1e-6
        np.testing.assert_allclose(jacobian[0, :, q], numeric[0], atol=1e-5)


def test_refitting_side_by_side_ends_where_the_many_starts_end():
    points = collect_joint_points(curves(LAWS[2], np.geomspace(1e6, 1e8, 5), noise=0.004))
    law = fit_law(points)
    center = points.x_KP.mean(axis=1)
    truth = np.log([0.25, 3.0, 20.0])
    start = np.array([[truth[0], truth[1] - 0.3 * center[0], 0.3, truth[2] - 0.45 * center[1], 0.45]])
    again = refit(start, points.x_KP - center[:, None], points.y_P, iterations=200)
    assert huber_loss(again, points.x_KP - center[:, None], points.y_P)[0] == pytest.approx(law.objective, rel=1e-3)


def test_one_bad_run_does_not_move_the_law():
    """Huber's point: least squares would follow it."""
    runs = curves(LAWS[2], np.geomspace(1e6, 1e9, 8))
    runs[4] = dataclasses.replace(runs[4], loss=runs[4].loss * 1.05)
    assert fit_law(collect_size_points(runs)).exponents[0] == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize(("factor", "kappa"), [(6.0, 1.0), (250.0, 0.8)])
def test_the_frontier_is_the_minimum_at_fixed_compute(factor, kappa):
    e, a, alpha, b, beta = LAWS[1]
    law = PowerLaw(np.array([math.log(e), math.log(a), alpha, math.log(b), beta]), 0.0)
    best = solve_frontier(law, factor, kappa)
    for compute in (1e17, 1e20):
        sizes = np.geomspace(1e3, 1e14, 200_001)
        images = compute / (factor * sizes**kappa)
        n = sizes[np.argmin(a / sizes**alpha + b / images**beta)]
        assert best.size_factor * compute**best.size_exponent == pytest.approx(n, rel=1e-3)
        d = best.images_factor * compute**best.images_exponent
        assert factor * n**kappa * d == pytest.approx(compute, rel=1e-3)
    if kappa == 1.0:  # Hoffmann et al.: a = beta / (alpha + beta)
        assert best.size_exponent == pytest.approx(beta / (alpha + beta))


@pytest.mark.parametrize(("factor", "kappa"), [(6.0, 1.0), (250.0, 0.8)])
def test_the_law_of_compute_is_the_joint_law_along_its_frontier(factor, kappa):
    theta_BQ = np.array([[math.log(e), math.log(a), alpha, math.log(b), beta] for e, a, alpha, b, beta in LAWS])
    compute = np.geomspace(1e12, 1e24, 13)
    for theta_Q, found in zip(theta_BQ, derive_compute_laws(theta_BQ, factor, kappa)):
        joint = PowerLaw(theta_Q, 0.0)
        best = solve_frontier(joint, factor, kappa)
        size = best.size_factor * compute**best.size_exponent
        assert PowerLaw(found, 0.0)(compute) == pytest.approx(joint(size, compute / (factor * size**kappa)), rel=1e-9)
        assert PowerLaw(found, 0.0).exponents == [pytest.approx(best.loss_exponent)]


def test_too_little_is_refused_with_the_reason():
    assert "3 model sizes" in find_shortage(curves(LAWS[2], [1e6, 1e7, 1e8]))
    assert "3 model sizes" in find_shortage(curves(LAWS[2], [1e6, 1e7, 1e7, 1e8]))  # two seeds are no fourth size
    assert "factor of 4.0" in find_shortage(curves(LAWS[2], [1e6, 2e6, 3e6, 4e6]))
    assert find_shortage(curves(LAWS[2], [1e6, 2e6, 5e6, 1e7])) is None


def test_curves_are_thinned_without_their_warm_up():
    curve = LossCurve("r", 10, 60.0, np.arange(1, 1001, dtype=float), np.linspace(2, 1, 1000))
    less = thin_curve(curve)
    assert len(less.images) <= 16
    assert less.images[0] >= 100
    assert less.images[-1] == 1000
    assert interpolate_loss(curve, 500.5) == pytest.approx(2 - 499.5 / 999, rel=1e-4)
    assert math.isnan(interpolate_loss(curve, 2000))
    assert fit_flops_law([curve, dataclasses.replace(curve, parameters=1000, flops_per_image=6000.0)]) == pytest.approx(
        (6.0, 1.0)
    )


def test_more_points_on_a_curve_do_not_narrow_the_interval_but_more_runs_do():
    def width(runs):
        points = collect_joint_points(runs)
        interval = bootstrap_law(points, fit_law(points), replicates=100).exponent(0)
        return interval.high - interval.low

    few = curves(LAWS[2], np.geomspace(1e6, 1e8, 6), noise=0.003, images=np.geomspace(1e5, 1e6, 5))
    dense = curves(LAWS[2], np.geomspace(1e6, 1e8, 6), noise=0.003, images=np.geomspace(1e5, 1e6, 15))
    many = [dataclasses.replace(run, run=f"{run.run}-{copy}") for run in few for copy in range(4)]
    assert width(dense) == pytest.approx(width(few), rel=0.3)
    assert width(many) < 0.6 * width(few)


def test_a_prediction_for_a_new_run_is_wider_than_for_the_law():
    points = collect_size_points(curves(LAWS[2], np.geomspace(1e6, 1e8, 5), noise=0.003))
    boot = bootstrap_law(points, fit_law(points), replicates=300)
    law, run = boot.loss(3e8), boot.loss(3e8, new_run=True)
    assert run.high - run.low > law.high - law.low
    assert law.low < law.value < law.high


def test_correlation_and_its_interval_are_scipys():
    from scipy.stats import pearsonr, spearmanr

    rng = np.random.default_rng(1)
    x = rng.normal(size=9)
    x[3] = x[4]  # a tie
    y = -x + 0.3 * rng.normal(size=9)
    found = correlate_across_runs(x, y)
    assert found.pearson.value == pytest.approx(pearsonr(x, y).statistic)
    assert found.spearman.value == pytest.approx(spearmanr(x, y).statistic)
    assert found.pearson.low < found.pearson.value < found.pearson.high < 0
    theirs = pearsonr(x, y).confidence_interval(0.95)
    assert (found.pearson.low, found.pearson.high) == pytest.approx((theirs.low, theirs.high), rel=1e-6)
    assert found.spearman.low < found.spearman.value < found.spearman.high


@pytest.mark.parametrize("runs", [4, 6])
def test_the_interval_of_a_correlation_holds_the_truth_as_often_as_it_says(runs):
    """2,000 ladders of that many runs, true Pearson -0.8 (true Spearman of a normal pair: 6/pi asin(r/2))."""
    rng = np.random.default_rng(3)
    truth, held = (-0.8, 6 / np.pi * np.arcsin(-0.4)), np.zeros(2)
    for _ in range(2000):
        x = rng.normal(size=runs)
        found = correlate_across_runs(x, -0.8 * x + 0.6 * rng.normal(size=runs))
        held += [c.low <= t <= c.high for c, t in zip((found.pearson, found.spearman), truth)]
    assert 0.93 <= held[0] / 2000 <= 0.98
    assert held[1] / 2000 >= 0.92  # ranks of few runs take few values, so this one is on the wide side


def test_ranks_that_agree_completely_are_not_certainty():
    found = correlate_across_runs([1, 2, 3, 4, 5], [5, 4, 3, 2, 1.5])
    assert found.spearman.value == -1
    assert found.spearman.low == -1
    assert found.spearman.high > -0.5


def test_within_runs_carries_an_interval_over_runs():
    rng = np.random.default_rng(0)
    curves = [(x, -x + 0.5 * rng.normal(size=6)) for x in np.sort(rng.normal(size=(4, 6)), axis=1)]
    found = correlate_within_runs(curves)
    assert found.num_runs == 4
    assert -1 <= found.pearson.low < found.pearson.value < found.pearson.high
    assert correlate_within_runs(curves[:2]).pearson.low is None


def test_a_correlation_that_means_nothing_has_a_reason():
    assert correlate_across_runs([1, 2], [1, 2]).pearson is None
    three = correlate_across_runs([1, 2, 3], [3, 2, 1])
    assert three.pearson.value == pytest.approx(-1)
    assert three.pearson.low is None
    assert "3 runs" in three.reason
    assert "same value" in correlate_across_runs([1, 1, 1], [1, 2, 3]).reason
    assert correlate_within_runs([([1, 2], [1, 2])]).pearson is None
    assert correlate_within_runs([([1, 2, 3], [2, 4, 6])] * 5).pearson.low == pytest.approx(1)


def test_runs_are_compared_where_most_of_them_were_measured():
    loss = {"a": {10: 1.0, 20: 0.9}, "b": {10: 1.0, 20: 0.8, 30: 0.7}, "c": {10: 1.0}}
    score = {"a": {10: 0.1, 20: 0.2}, "b": {10: 0.1, 20: 0.2, 30: 0.3}, "c": {10: 0.1}}
    assert find_equal_images(loss, score) == 10
    assert find_equal_images({"a": loss["a"]}, score) == 20
    assert find_equal_images({}, score) is None
