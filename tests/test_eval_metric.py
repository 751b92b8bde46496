"""Frechet distance against scipy, running moments, clustered bootstrap, prompt files and grids."""

import warnings

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import beta

from eval.drawing.pictures import make_grid, read_picture, write_picture
from eval.judging.metric import Clusters, split_scores
from eval.judging.prompts import list_compbench_prompts, list_geneval_prompts, read_lines
from eval.metrics.frechet import (
    Moments,
    RankDeficientWarning,
    frechet_distance,
    resample_distances,
    resample_pair_distances,
)
from infra.errors import UserError


def moments(x, chunk=37):
    result = Moments(x.shape[1])
    for start in range(0, len(x), chunk):
        result.update(x[start : start + chunk].astype(np.float32))
    return result


def features(count, width, seed):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width) * 3).astype(
        np.float32
    )


def by_scipy(a, b):
    cov_a, cov_b = np.cov(a.astype(float), rowvar=False), np.cov(b.astype(float), rowvar=False)
    offset = a.astype(float).mean(0) - b.astype(float).mean(0)
    return offset @ offset + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(sqrtm(cov_a @ cov_b)).real


def test_running_moments_equal_numpy():
    x = features(500, 12, 0)
    running = moments(x)
    assert running.count == 500
    np.testing.assert_allclose(running.mean_E, x.astype(float).mean(0), rtol=1e-12)
    np.testing.assert_allclose(running.covariance_EE, np.cov(x.astype(float), rowvar=False), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("width", [2, 16, 64])
def test_frechet_distance_equals_scipy(width):
    a, b = features(400, width, 1), features(300, width, 2)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(by_scipy(a, b), rel=1e-6)


def test_frechet_distance_of_known_gaussians():
    # one dimension: (mu1 - mu2)^2 + (s1 - s2)^2
    a, b = np.array([[-1.0], [1.0]]), np.array([[1.0], [5.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankDeficientWarning)
        assert frechet_distance(moments(a), moments(b)) == pytest.approx(9 + (2**0.5 - 8**0.5) ** 2, rel=1e-6)


def test_frechet_distance_of_one_set_with_itself_is_zero():
    x = features(400, 16, 3)
    assert frechet_distance(moments(x), moments(x)) == pytest.approx(0, abs=1e-8 * np.trace(moments(x).covariance_EE))


def test_rank_deficient_covariances_survive_with_a_warning():
    a, b = features(20, 64, 4), features(500, 64, 5)
    with pytest.warns(RankDeficientWarning, match="20 images for features of width 64"):
        value = frechet_distance(moments(a), moments(b))
    assert value == pytest.approx(by_scipy(a, b), rel=1e-4)  # scipy itself is only this good on a singular product


@pytest.mark.parametrize(("count", "width"), [(30, 6), (12, 20)])
def test_resample_distances_are_those_of_the_repeated_rows(count, width, monkeypatch):
    monkeypatch.setattr("eval.metrics.frechet.RESAMPLES", 3)
    a, b = features(count, width, 6), features(count, width, 7)
    reference = moments(features(200, width, 8))
    ends = {"mean_ref_E": reference.mean_E, "cov_ref_EE": reference.covariance_EE}
    found = resample_distances(a, np.arange(count), **ends, seed=9)
    pairs = resample_pair_distances(a, b, seed=9)
    rng = np.random.default_rng(9)
    for one, pair in zip(found, pairs, strict=True):
        rows = rng.integers(count, size=count)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RankDeficientWarning)
            assert one == pytest.approx(frechet_distance(moments(a[rows]), reference), rel=1e-6)
            assert pair == pytest.approx(frechet_distance(moments(a[rows]), moments(b[rows])), rel=1e-6)


def test_moments_refuse_what_is_not_finite_and_single_images():
    with pytest.raises(ValueError, match="not finite"):
        Moments(2).update(np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match="2 images or more"):
        _ = moments(features(1, 2, 0)).covariance_EE


def clusters(correlated):
    rng = np.random.default_rng(0)
    values = Clusters()
    for prompt in range(60):
        chance = rng.random()
        for _ in range(8):
            values.add("task", prompt, (chance if correlated else rng.random()) < 0.5)
    return values


def test_mean_is_over_images_inside_tasks_then_over_tasks():
    values = Clusters()
    for task, prompt, value in [("a", 0, 1), ("a", 0, 1), ("a", 1, 0), ("b", 2, 0)]:
        values.add(task, prompt, value)
    assert values.mean() == pytest.approx(1 / 3)
    assert values.mean(["a"]) == pytest.approx(2 / 3)
    assert values.count() == 4


def test_bootstrap_draws_prompts_not_images():
    """Eight identical images of a prompt are one observation: the interval must be about sqrt(8) times as wide."""

    def width(values):
        low, high = values.interval()
        assert low < values.mean() < high
        return high - low

    assert width(clusters(correlated=True)) / width(clusters(correlated=False)) == pytest.approx(8**0.5, rel=0.25)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_none_of_twenty_does_not_prove_none(value):
    """All images wrong (or right) leave nothing to resample; the interval is then Jeffreys' over one prompt less."""
    values = Clusters()
    for prompt in range(20):
        for _ in range(4):
            values.add("task", prompt, value)
    low, high = values.interval()
    expected = beta.ppf(0.975, 0.5, 19.5)
    assert max(abs(low - value), abs(high - value)) == pytest.approx(expected, abs=0.02)
    assert value in (low, high)
    values.add("other", 20, 0.4)  # a number that is no share draws itself
    values.add("other", 21, 0.6)
    assert values.interval(["other"]) == (0.4, 0.6)


@pytest.mark.parametrize("table", [[[0.125]], [[0, 1, 1, 0]], [[0.3], [0.3]], [[0.1] * 3, [0.1] * 7]])
def test_prompts_that_agree_on_a_number_between_leave_the_interval_unknown(table):
    values = Clusters()
    for prompt, images in enumerate(table):
        for value in images:
            values.add("task", prompt, value)
    assert values.interval() is None
    score = values.score("task")
    assert (score.low, score.high) == (None, None)
    values.add("other", 9, 0.0)
    assert values.interval() is None, "an overall with one unknown part is unknown"
    assert values.interval(["other"]) is not None


@pytest.mark.parametrize(
    ("tasks", "prompts", "share"),
    [(1, 8, 0.03), (1, 8, 0.1), (1, 8, 0.6), (1, 20, 0.1), (6, 8, 0.03), (6, 8, 0.6), (6, 20, 0.03)],
)
def test_intervals_of_shares_hold_the_truth_as_often_as_they_say(tasks, prompts, share):
    """Four images a prompt, unlike tasks. Drawing prompts with repetition held 84 in 100 of eight prompts at 0.1."""
    rng, held = np.random.default_rng(7), 0
    true_T = share * np.array([1.0] if tasks == 1 else [0.4, 0.7, 1.0, 1.0, 1.3, 1.6])
    for _ in range(300):
        values = Clusters()
        for task, true in enumerate(true_T):
            chance_P = rng.beta(1.5 * true, 1.5 * (1 - true), size=prompts)
            for prompt, right in enumerate(rng.random((prompts, 4)) < chance_P[:, None]):
                for image in right:
                    values.add(str(task), prompt, image)
        low, high = values.interval() or (0, 1)
        held += low <= true_T.mean() <= high
    assert 0.91 * 300 <= held <= 0.99 * 300


def test_bootstrap_is_the_same_twice():
    assert clusters(True).interval() == clusters(True).interval()


def test_scores_are_split_by_seen():
    seen, unseen = Clusters(), Clusters()
    seen.add("colors", 0, 1.0)
    seen.add("counting", 1, 0.0)
    unseen.add("colors", 2, 1.0)
    scores = {s.path: s.value for s in split_scores({True: seen, False: unseen}, ["counting", "colors"])}
    assert scores == {
        "counting/seen": 0.0,
        "colors/seen": 1.0,
        "overall/seen": 0.5,
        "colors/unseen": 1.0,
        "overall/unseen": 1.0,
    }


def test_prompt_files(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"a dog\r\n\r\n a cat \r\n")
    assert read_lines(tmp_path / "p.txt") == ["a dog", "a cat"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a kite"}\n')
    assert read_lines(tmp_path / "p.jsonl") == ["a kite"]
    (tmp_path / "empty.txt").write_text("\n")
    for name in ("empty.txt", "missing.txt"):
        with pytest.raises(UserError, match=name):
            read_lines(tmp_path / name)


def test_compbench_prompts_know_their_kind(tmp_path):
    for name, lines in {
        "color_val": "a red dog and a blue cat",
        "complex_val": "The dog is left of the cat.\nThe dog runs.\nThe dog runs left of the cat.",
        "complex_val_spatial": "the dog is left of the cat.",
        "complex_val_action": "The dog runs.",
    }.items():
        (tmp_path / f"{name}.txt").write_text(lines.replace("\n", "\r\n"))
    prompts = list_compbench_prompts(tmp_path)
    assert [p.task for p in prompts] == ["color", "complex", "complex", "complex"]
    assert [p.metadata.get("kind") for p in prompts] == [None, "spatial", "action", "both"]


def test_geneval_prompts_can_be_cut_per_task():
    assert len(list_geneval_prompts()) == 553
    assert len(list_geneval_prompts(3)) == 18


def test_grids_and_pictures(tmp_path):
    red = np.zeros((16, 16, 3), dtype=np.uint8)
    red[..., 0] = 255
    grid = make_grid(
        [("a red square", [red, red]), ("a label that is much too long for so small a picture", [red])], scale=4
    )
    assert (grid[10, 10] == red[0, 0]).all()
    write_picture(tmp_path / "sub" / "grid.png", grid)
    assert (read_picture(tmp_path / "sub" / "grid.png") == grid).all()
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bad\.png"):
        read_picture(tmp_path / "bad.png")
    with pytest.raises(UserError, match="ends in"):
        write_picture(tmp_path / "grid.unknown", grid)
