"""Differences between checkpoints: paired by prompt, refused across protocols, honest about what was not kept."""

import json

import numpy as np
import pytest

from eval.judging.metric import Clusters, split_scores, split_values
from eval.measure import to_rows
from eval.metrics.frechet import Moments, frechet_distance, resample_distances
from eval.protocol import keep_protocol
from eval.studies.compare import _draw_difference, compare, compare_runs, read_run
from infra.errors import UserError
from infra.results import ResultStore
from infra.values import SHARED, keep_values, read_values

PROTOCOL = {"metric": "m", "sampling": {"steps": 25, "guidance": 4.0}}


def scored(values):
    """{split: {task: (prompts, images)}} as clusters."""
    clusters = {}
    for split, tasks in values.items():
        clusters[split] = Clusters()
        for task, table in tasks.items():
            for prompt, images in enumerate(table):
                for value in images:
                    clusters[split].add(task, prompt, value)
    return clusters


def store(root, name, values, *, protocol=PROTOCOL, images=100, keep=True, metric="world_geneval", recipe="r"):
    """A run whose metric gave these values."""
    results, clusters = ResultStore(str(root / name / "results")), scored(values)
    key = keep_protocol(results.uri, protocol)
    if keep:
        keep_values(results.uri, key, recipe, images, split_values(clusters))
    origin = {"run": name, "recipe_hash": recipe, "images_seen": images}
    results.append(
        to_rows(metric, split_scores(clusters, ["a", "b"]), origin=origin, protocol=key, higher_is_better=True)
    )
    return str(root / name)


def hard_prompts(rng, gain):
    """Prompts of very different difficulty, four images each: what makes pairing pay."""
    level = np.linspace(0, 1, 60)[:, None]
    return np.clip(level + gain + 0.02 * rng.normal(size=(60, 4)), -1, 2)


@pytest.fixture
def runs(tmp_path):
    rng = np.random.default_rng(0)
    first = {True: {"a": hard_prompts(rng, 0), "b": hard_prompts(rng, 0)}, False: {"a": hard_prompts(rng, 0)}}
    second = {True: {"a": hard_prompts(rng, 0.05), "b": hard_prompts(rng, 0)}, False: {"a": hard_prompts(rng, -0.05)}}
    return store(tmp_path, "one", first), store(tmp_path, "two", second)


def test_pairing_finds_what_single_intervals_cannot_tell_apart(runs, capsys, tmp_path):
    found = {d.metric: d for d in compare_runs(*map(read_run, runs))[0]}
    a = found["world_geneval/a/seen"]
    assert (a.how, a.verdict) == ("paired", "better")
    assert a.low < 0.05 < a.high
    assert a.high - a.low < 0.02
    rows = ResultStore(f"{runs[0]}/results").rows(metric="world_geneval/a/seen")
    assert rows[0].high - rows[0].low > 0.1, "the plain intervals overlap"
    assert found["world_geneval/b/seen"].verdict == "no difference shown"
    assert found["world_geneval/overall/seen"].verdict == "better"
    assert found["world_geneval/overall/unseen"].verdict == "worse"
    compare(*runs, metrics=("world_geneval/overall",), out=str(tmp_path / "d.json"))
    printed = capsys.readouterr().out
    assert "two@100" in printed
    assert "better (paired)" in printed
    told = json.loads((tmp_path / "d.json").read_text())["differences"]
    assert [d["metric"] for d in told] == ["world_geneval/overall/seen", "world_geneval/overall/unseen"]


def test_a_checkpoint_with_itself_shows_nothing(runs):
    for difference in compare_runs(read_run(runs[0]), read_run(runs[0]))[0]:
        assert difference.a == difference.b
        assert difference.low < 0 < difference.high, "60 ties are no proof"
        assert difference.verdict == "no difference shown"


def alone(values):
    return {True: {"a": values}}


@pytest.mark.parametrize(
    ("a", "b", "low", "high", "verdict"),
    [
        ([0, 1] * 4, [0, 1] * 4, -0.21, 0.21, "no difference shown"),  # eight ties
        ([0] * 8, [1] * 8, 0.48, 1.0, "better"),  # eight wins: no certainty of a gain of exactly 1
        ([0], [0], -0.68, 0.68, "no difference shown"),
        ([0] * 8, [1, 1] + [0] * 6, -0.1, 0.57, "no difference shown"),  # two discordant pairs: McNemar's p is 0.5
    ],
)
def test_few_matched_pairs_never_claim_certainty(tmp_path, capsys, a, b, low, high, verdict):
    runs = [store(tmp_path, name, alone([[v] for v in values])) for name, values in (("one", a), ("two", b))]
    for found in compare_runs(*map(read_run, runs))[0]:
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.1)
        assert found.low < found.high
        assert found.low <= found.b - found.a <= found.high
        assert (found.how, found.verdict) == ("paired", verdict)
    compare(*runs)
    assert "[  +0.0000,   +0.0000]" not in capsys.readouterr().out


def test_intervals_of_matched_pairs_hold_the_truth():
    """A bootstrap of eight pairs that are won 9 times in 10 holds the truth in 53 cases of 100."""
    rng = np.random.default_rng(4)
    for count, won, lost in ((8, 0.9, 0.0), (8, 0.3, 0.1), (20, 0.1, 0.02)):
        held = 0
        for _ in range(300):
            one = rng.choice([-1.0, 0.0, 1.0], p=[lost, 1 - won - lost, won], size=count)
            sides = [np.stack([np.arange(count), side, np.ones(count)], axis=1) for side in (one < 0, one > 0)]
            drawn = _draw_difference(*sides, rng)
            low, high = np.percentile(drawn, [2.5, 97.5])
            held += one.mean() + min(low, 0) <= won - lost <= one.mean() + max(high, 0)
        assert held >= 0.9 * 300


@pytest.mark.parametrize(("prompts", "share"), [(8, 0.2), (20, 0.03), (20, 0.5), (80, 0.03)])
def test_several_images_a_prompt_seldom_show_what_is_not_there(prompts, share):
    """The same model twice, four images a prompt: a bootstrap of prompts found a difference in 7 to 28 of 100."""
    rng, shown = np.random.default_rng(5), 0
    for _ in range(300):
        chance = rng.beta(share, 1 - share, size=prompts)
        one, two = rng.binomial(4, chance), rng.binomial(4, chance)
        sides = [np.stack([np.arange(prompts), right, np.full(prompts, 4)], axis=1) for right in (one, two)]
        change = (two - one).mean() / 4
        low, high = np.percentile(_draw_difference(*sides, rng), [2.5, 97.5])
        shown += not change + min(low, 0) <= 0 <= change + max(high, 0)
    assert shown <= 0.07 * 300


def test_many_prompts_leave_the_intervals_of_a_bootstrap(tmp_path):
    """Losses of 400 samples: a win and a loss that were added weigh nothing among so many."""
    rng = np.random.default_rng(6)
    losses = rng.uniform(0.2, 0.4, size=400)
    gain = rng.normal(-0.01, 0.02, size=400)
    sides = [np.stack([np.arange(400), values, np.ones(400)], axis=1) for values in (losses, losses + gain)]
    low, high = np.percentile(_draw_difference(*sides, rng), [2.5, 97.5])
    half = 1.96 * gain.std() / 20
    assert (low, high) == pytest.approx((-half, half), rel=0.12)


@pytest.mark.parametrize("gain", [[0.25], [0.25, 0.25]])
def test_prompts_that_all_agree_leave_the_interval_unknown(tmp_path, capsys, gain):
    one = store(tmp_path, "one", alone([[0.25] for _ in gain]))
    two = store(tmp_path, "two", alone([[0.25 + x] for x in gain]))
    for found in compare_runs(read_run(one), read_run(two))[0]:
        assert (found.verdict, found.how) == ("no difference shown", "paired; all prompts agree")
    compare(one, two, out=str(tmp_path / "d.json"))
    assert "unknown" in capsys.readouterr().out
    assert json.loads((tmp_path / "d.json").read_text())["differences"][0]["low"] is None


def test_different_protocols_are_refused_and_the_difference_is_named(tmp_path, capsys):
    values = {True: {"a": [[0.0], [1.0]]}}
    one = store(tmp_path, "one", values)
    two = store(tmp_path, "two", values, protocol=PROTOCOL | {"sampling": {"steps": 50, "guidance": 4.0}})
    with pytest.raises(UserError, match="nothing that both checkpoints have can be compared"):
        compare(one, two)
    assert "not compared: world_geneval/a/seen: protocols differ in sampling.steps 25 and 50" in capsys.readouterr().out
    for kept in (tmp_path / "two").rglob("protocols/*.json"):
        kept.write_text("{")
    with pytest.raises(UserError, match="nothing that both checkpoints have can be compared"):
        compare(one, two)
    assert "measured under different protocols (" in capsys.readouterr().out
    both = store(tmp_path, "two", values)  # measured once more, the same way
    assert [d.how for d in compare_runs(read_run(one), read_run(both))[0]] == ["paired", "paired"]


def test_without_kept_values_the_wider_unpaired_interval_is_given_and_said(tmp_path):
    rng = np.random.default_rng(1)
    one = store(tmp_path, "one", {True: {"a": hard_prompts(rng, 0)}}, keep=False)
    two = store(tmp_path, "two", {True: {"a": hard_prompts(rng, 0.05)}}, keep=False)
    found = compare_runs(read_run(one), read_run(two))[0][0]
    assert (found.how, found.verdict) == ("unpaired", "no difference shown")


def test_other_prompts_are_never_paired(tmp_path):
    one = store(tmp_path, "one", {True: {"a": [[0.0], [1.0], [1.0]]}})
    two = store(tmp_path, "two", {True: {"a": [[0.0], [1.0]]}})
    assert {d.how for d in compare_runs(read_run(one), read_run(two))[0]} == {"unpaired"}


def test_checkpoints_are_named_by_their_images(tmp_path):
    run = store(tmp_path, "one", {True: {"a": [[0.0], [1.0]]}}, images=100)
    store(tmp_path, "one", {True: {"a": [[1.0], [1.0]]}}, images=200)
    assert read_run(run).images == 200
    found = compare_runs(read_run(f"{run}@100"), read_run(run))[0]
    assert [(d.a, d.b) for d in found] == [(0.5, 1.0)] * 2
    with pytest.raises(UserError, match="no rows at 150 images; it has 100, 200"):
        read_run(f"{run}@150")
    with pytest.raises(UserError, match="whole number"):
        read_run(f"{run}@last")
    with pytest.raises(UserError, match="no result rows"):
        read_run(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="not measured on both"):
        compare_runs(read_run(run), read_run(run), ["world_fid"])


def test_torn_values_are_named(tmp_path):
    run = store(tmp_path, "one", {True: {"a": [[0.0], [1.0]]}})
    [file] = (tmp_path / "one" / "results" / "values").rglob("*.npz")
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match="is torn"):
        compare_runs(read_run(run), read_run(run))


def test_fid_is_paired_over_the_same_prompts_and_its_reference_is_kept_once(tmp_path):
    rng = np.random.default_rng(2)
    reference, base = rng.normal(size=(400, 6)), rng.normal(size=(120, 6)) + 0.5
    moments = Moments(6)
    moments.update(reference)
    kept = {"reference_mean": moments.mean_E, "reference_covariance": moments.covariance_EE, "cluster": np.arange(120)}
    shift = {"one": base, "two": base * 0.98 - 0.02}
    for name, features in shift.items():
        results = ResultStore(str(tmp_path / name / "results"))
        key = keep_protocol(results.uri, PROTOCOL)
        keep_values(results.uri, key, "r", 100, kept | {"features": features})
        own = Moments(6)
        own.update(features)
        from eval.judging.metric import Score

        value = frechet_distance(own, moments)
        origin = {"run": name, "recipe_hash": "r", "images_seen": 100}
        results.append(
            to_rows("world_fid", [Score("", value, 120)], origin=origin, protocol=key, higher_is_better=False)
        )
    found = compare_runs(*(read_run(str(tmp_path / name)) for name in shift))[0][0]
    assert (found.how, found.verdict) == ("paired", "better"), "smaller is better"
    assert found.low < found.b - found.a < found.high
    again = compare_runs(*[read_run(str(tmp_path / "one"))] * 2)[0][0]
    assert (again.verdict, again.low) == ("no difference shown", -np.inf), "the same features: no interval of width 0"
    files = sorted(p.name for p in (tmp_path / "one" / "results" / "values").rglob("*.npz"))
    assert files == ["r-100.npz", SHARED]
    assert read_values(str(tmp_path / "one" / "results"), key, "r", 7) is None


def test_intervals_of_fid_hold_what_repetition_shows():
    """Coverage over independent sets: the interval around each set's distance holds the mean distance."""
    rng = np.random.default_rng(3)
    reference = Moments(4)
    reference.update(rng.normal(size=(2000, 4)))
    found, held = [], 0
    intervals = []
    for _ in range(40):
        features = rng.normal(size=(150, 4)) * 1.3 + 0.4
        own = Moments(4)
        own.update(features)
        value = frechet_distance(own, reference)
        ends = {"mean_ref_E": reference.mean_E, "cov_ref_EE": reference.covariance_EE}
        again = resample_distances(features, np.arange(150), **ends)
        intervals.append(value + np.percentile(again - again.mean(), [2.5, 97.5]))
        found.append(value)
    held = sum(low <= np.mean(found) <= high for low, high in intervals)
    assert 33 <= held <= 40, "95 % of 40 is 38"
