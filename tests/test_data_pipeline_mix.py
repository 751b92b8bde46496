"""Mixes: shares by an independent count, caps, one sequence whatever ranks and restarts, and what is refused."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_data_pipeline_loader import take

from data_pipeline.formats.schema import read_dataset_info
from data_pipeline.loading.mix import MixedOrder, ShareBlocks, check_alike
from data_pipeline.loading.order import SampleOrder
from data_pipeline.packing.synthetic import write_synthetic
from data_pipeline.selection.choice import DataChoice
from infra.errors import UserError, UserErrors

weights = st.lists(st.integers(1, 40), min_size=2, max_size=6)
sizes = st.dictionaries(st.sampled_from(["32x32", "24x40", "40x24"]), st.integers(5, 60), min_size=1)


@settings(max_examples=25, deadline=None)
@given(weights, st.integers(0, 5000))
@example([1, 1, 1, 1, 6], 0)
def test_positions_are_shared_out_as_counted(given_weights, start):
    shares = [Fraction(weight, sum(given_weights)) for weight in given_weights]
    blocks = ShareBlocks(shares)
    # Up to 1 by the block; within it each count is up to 1/2 off its share of the time, which the sum carries on.
    bounds = [1 + (1 - share) / 2 + share * (len(shares) - 1) / 2 for share in shares]
    owner, rank = blocks.locate(np.arange(start + 400))
    counts = [0] * len(shares)
    for position, (part, number) in enumerate(zip(owner.tolist(), rank.tolist())):
        assert number == counts[part]
        counts[part] += 1
        assert abs(counts[part] - shares[part] * (position + 1)) < bounds[part]
        if (position + 1) % blocks.length == 0:
            assert all(abs(count - share * (position + 1)) < 1 for count, share in zip(counts, shares))
    assert blocks.count_before(start + 400).tolist() == counts
    late, numbers = blocks.locate(np.arange(start, start + 400))  # sought, not replayed
    assert late.tolist() == owner[start:].tolist()
    assert numbers.tolist() == rank[start:].tolist()


def make_order(parts: list[dict[str, int]], given_weights, seed=0, global_batch=4, max_repeats=None) -> MixedOrder:
    orders, first, firsts = {}, 0, []
    for number, found in enumerate(parts):
        shards = {name: (np.array([i]), np.array([size])) for i, (name, size) in enumerate(sorted(found.items()))}
        orders[f"d{number}"] = SampleOrder(shards, seed=seed, global_batch=1)
        firsts.append(first)
        first += len(found)
    named = {f"d{number}": Fraction(weight) for number, weight in enumerate(given_weights)}
    return MixedOrder(orders, named, firsts, seed=seed, global_batch=global_batch, max_repeats=max_repeats)


def owners(order: MixedOrder, parts: list[dict[str, int]], step: int) -> tuple[str, list[int], list[tuple[int, int]]]:
    plan = order.batch(step)
    edges = np.cumsum([0, *map(len, parts)])
    of = (np.searchsorted(edges, plan.shard_G, side="right") - 1).tolist()
    return plan.bucket, of, list(zip(plan.shard_G.tolist(), plan.row_G.tolist()))


@settings(max_examples=12, deadline=None)
@given(st.lists(sizes, min_size=2, max_size=4), st.data(), st.integers(0, 2**30))
def test_datasets_come_as_often_as_their_weights_say(parts, data, seed):
    given_weights = data.draw(st.lists(st.integers(1, 9), min_size=len(parts), max_size=len(parts)))
    order, steps = make_order(parts, given_weights, seed), 256
    counted: Counter = Counter()
    seen = [Counter() for _ in parts]
    for step in range(steps):
        bucket, of, places = owners(order, parts, step)
        for part, place in zip(of, places):
            counted[part, bucket] += 1
            assert bucket in parts[part]
            seen[part][place] += 1
    total, weight = steps * 4, sum(given_weights)
    buckets = {name for part in parts for name in part}
    for number, part in enumerate(parts):
        share = Fraction(given_weights[number], weight)
        mine = sum(count for (p, _), count in counted.items() if p == number)
        # a bucket's batches are whole, so at the end of two epochs each may lack one, and a count of it two
        assert abs(mine - share * total) <= (4 + 2) * len(buckets)
        for bucket, size in part.items():  # every pass of a dataset in a bucket shows each of its samples once
            shard = sorted(part).index(bucket) + sum(map(len, parts[:number]))
            times = [seen[number][shard, row] for row in range(size)]
            assert max(times) - min(times) <= 1
    assert {key: count for key, count in order.count_samples(steps).items() if count} == dict(counted)


@settings(max_examples=8, deadline=None)
@given(st.lists(sizes, min_size=2, max_size=3), st.integers(1, 3), st.integers(0, 99))
def test_no_image_comes_more_often_than_allowed(parts, most, seed):
    order = make_order(parts, range(1, len(parts) + 1), seed, max_repeats=most)
    seen: Counter = Counter()
    step = 0

    def use_up() -> None:
        nonlocal step
        while True:
            seen.update(owners(order, parts, step)[2])
            step += 1

    with pytest.raises(UserError) as caught:
        use_up()
    assert f"--max-repeats {most}: after {step * 4:,} images" in str(caught.value)
    assert max(seen.values()) <= most
    assert step > 0
    fresh = make_order(parts, range(1, len(parts) + 1), seed, max_repeats=most)
    assert fresh.batch(step - 1).row_G.tolist() == order.batch(step - 1).row_G.tolist()


def test_one_bucket_by_hand():
    """2 : 1 of 9 and 30 images, each at most twice: the first lasts 27 positions, then the other goes on alone."""
    parts = [{"32x32": 9}, {"32x32": 30}]
    order = make_order(parts, [2, 1], global_batch=3, max_repeats=2)
    of = [owners(order, parts, step)[1] for step in range(20)]
    assert [found.count(0) for found in of[:9]] == [2] * 9
    assert all(found == [1, 1, 1] for found in of[9:])


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, str]:
    found = {}
    for name, count, seed in (("a", 96, 0), ("b", 40, 0)):
        found[name] = str(tmp_path_factory.mktemp(name))
        buckets = ("32x32", "24x40") if name == "a" else ("32x32",)
        write_synthetic(found[name], num_samples=count, val_samples=8, latent_shape=(4, 8, 8), buckets=buckets,
                        shard_rows=16, seed=seed)  # fmt: skip
    return found


def choose(roots, *mix, **more) -> DataChoice:
    return DataChoice(tuple(f"{name}={uri}" for name, uri in roots.items()), mix=mix, **more)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_and_restarts_share_one_sequence(roots, world_size):
    dataset = choose(roots, "a=1", "b=3", max_repeats=3).open()
    assert dataset.datasets == ("a", "b")
    whole = take(dataset, 12)
    lanes = [take(dataset, 12, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        parts = [lane[step] for lane in lanes]
        assert batch.keys == [key for part in parts for key in part.keys]
        assert torch.equal(batch.latent_BCHW, torch.cat([part.latent_BCHW for part in parts]))
        assert torch.equal(batch.dataset_B, torch.cat([part.dataset_B for part in parts]))
        assert len({part.latent_BCHW.shape[2:] for part in parts}) == 1
    later = take(dataset, 5, start=7 * 8, micro_batch=4)
    assert [key for batch in later for key in batch.keys] == [key for batch in whole[7:10] for key in batch.keys][:20]


def test_the_order_of_names_changes_nothing_but_the_validation_set(roots):
    one, two = choose(roots, "a=1", "b=2").open(), choose(dict(reversed(roots.items())), "b=4", "a=2").open()
    assert one.fingerprint == two.fingerprint
    assert [batch.keys for batch in take(one, 4)] == [batch.keys for batch in take(two, 4)]
    assert choose(dict(reversed(roots.items()))).open_val().uri == roots["b"]
    prints = {choose(roots, *mix, **more).open().fingerprint for mix, more in (
        ((), {}), (("a=1", "b=2"), {}), ((), {"max_repeats": 4}), ((), {"where": ("bucket == '32x32'",)}),
        ((), {"where": ("a: bucket == '32x32'",)}),
    )}  # fmt: skip
    assert len(prints) == 5  # all rows of b lie in that bucket, but a condition was asked
    assert DataChoice((roots["a"],)).open().fingerprint not in prints


def test_a_damaged_shard_is_replaced_by_its_own_dataset(roots, tmp_path):
    import shutil

    copy = {name: str(shutil.copytree(uri, tmp_path / name)) for name, uri in roots.items()}
    dataset = choose(copy).open()
    whole = take(dataset, 10)
    for path in sorted((tmp_path / "b" / "train").rglob("*.tar"))[:1]:
        path.write_bytes(b"")
    stream = dataset.batches(seed=7, global_batch=8)
    damaged = [next(stream) for _ in range(10)]
    stream.close()
    assert all(name.startswith("b/train/") for name in stream.exceptions.shards)
    assert len(stream.exceptions.shards) == 1
    for one, two in zip(whole, damaged):
        assert torch.equal(one.dataset_B, two.dataset_B)
        same = [a == b for a, b, part in zip(one.keys, two.keys, one.dataset_B.tolist()) if part == 0]
        assert all(same)


def test_datasets_that_no_model_could_read_alike_are_refused(roots, tmp_path):
    for name, more in (("int8", {"int8_seats": ("t5",)}), ("vae", {"autoencoder": "other:vae"})):
        write_synthetic(str(tmp_path / name), num_samples=16, val_samples=8, latent_shape=(4, 8, 8),
                        buckets=("32x32",), **more)  # fmt: skip
        with pytest.raises(UserErrors, match="a and c cannot be mixed") as caught:
            DataChoice((f"a={roots['a']}", f"c={tmp_path / name}")).open()
        [line] = caught.value.lines
        assert {"int8": "seats in int8 none and t5", "vae": "synthetic:vae and other:vae"}[name] in line
    info = read_dataset_info(roots["a"])
    old, new = (replace(info, settings={"latents": {"weights": "1f", "crop": crop}}) for crop in ("center", "cover"))
    check_alike({"a": old, "b": old})
    with pytest.raises(UserErrors, match=r"latents.crop center and cover"):
        check_alike({"a": old, "b": new})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"data": ("A", "B")}, "several datasets have names"),
        ({"data": ("a=A", "a=B")}, "a name stands twice"),
        ({"data": ("A",), "mix": ("a=1",)}, "--mix and --max-repeats are for several datasets"),
        ({"mix": ("a=1", "c=2")}, "--mix c=2: no dataset 'c'"),
        ({"mix": ("a=1",)}, "gives no weight to b"),
        ({"mix": ("a=1", "b=0")}, "expected b=WEIGHT, a number above 0"),
        ({"mix": ("a=1", "b=x")}, "expected b=WEIGHT, a number above 0"),
        ({"mix": ("a=1", "b")}, "expected b=WEIGHT, a number above 0"),
        ({"max_repeats": 0}, "--max-repeats 0: expected 1 or more"),
        ({"where": ("c: width > 5",)}, "no dataset 'c'"),
        ({"where": ("a: widht > 5",)}, "no column widht"),
        ({"columns": ("a=X",)}, "--columns X: a table that no --where reads"),
    ],
)
def test_what_names_no_mix_is_refused(roots, words, says):
    words = {"data": tuple(f"{name}={uri}" for name, uri in roots.items()), **words}
    with pytest.raises(UserError, match=says):
        DataChoice(**words).open()


def test_the_words_of_a_choice_make_the_same_choice(roots):
    from trainer.commands import TrainArgs, parse_options
    from trainer.recipes import get_recipe

    choice = choose(roots, "a=1", "b=0.5", max_repeats=3, where=("a: bucket == '32x32'",), allow_other_data=True)
    read = parse_options(TrainArgs, [*choice.words(), "--out", "R"], "train", recipe=get_recipe("world-d2"))
    assert read.data == choice
    assert DataChoice(("D",)).words() == ["--data", "D"]
