"""The order of samples: once per pass, the same for any number of ranks, seek equals replay, nothing starves."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.order import DataExceptions, SampleOrder
from infra.codec import from_json, to_json
from infra.errors import UserError

shapes = st.dictionaries(
    st.sampled_from(["64x64", "48x80", "80x48"]), st.lists(st.integers(1, 40), min_size=1, max_size=20), min_size=1
)


def make(buckets: dict[str, list[int]], seed: int, global_batch: int, block_shards: int = 3) -> SampleOrder:
    shards, first = {}, 0
    for name, sizes in buckets.items():
        shards[name] = (np.arange(first, first + len(sizes)), np.array(sizes))
        first += len(sizes)
    return SampleOrder(shards, seed=seed, global_batch=global_batch, block_shards=block_shards)


def entries(order: SampleOrder, first: int, last: int) -> list[tuple[str, int, int]]:
    found = []
    for step in range(first, last):
        plan = order.batch(step)
        found += [(plan.bucket, s, r) for s, r in zip(plan.shard_G.tolist(), plan.row_G.tolist())]
    return found


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**40), st.integers(1, 16))
def test_every_sample_comes_once_per_pass(buckets, seed, global_batch):
    order = make(buckets, seed, global_batch)
    epochs = 3
    seen = Counter(entries(order, 0, order.count_batches_before(epochs)))
    first = 0
    for name, sizes in buckets.items():
        total = sum(sizes)
        dealt = epochs * total // global_batch * global_batch
        counts = [seen[name, first + shard, row] for shard, size in enumerate(sizes) for row in range(size)]
        # passes are whole: nobody is a second ahead, and the stated remainder is smaller than one batch
        assert sum(counts) == dealt
        assert set(counts) <= {dealt // total, -(-dealt // total)}
        assert epochs * total - dealt < global_batch
        first += len(sizes)
    assert len(seen) == sum(1 for count in seen.values() if count)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**40), st.integers(1, 16), st.integers(0, 300))
def test_seek_equals_replay(buckets, seed, global_batch, step):
    replayed = make(buckets, seed, global_batch)
    for earlier in range(max(0, step - 40), step):
        replayed.batch(earlier)
    sought = make(buckets, seed, global_batch)
    for one, other in zip(replayed.batch(step), sought.batch(step)):
        np.testing.assert_array_equal(one, other)


def test_one_bucket_reads_the_same_sequence_under_any_global_batch():
    sizes = {"64x64": [10, 20, 5, 7, 30]}
    assert entries(make(sizes, 3, 4), 0, 36) == entries(make(sizes, 3, 12), 0, 12)


def test_an_epoch_mixes_buckets_and_a_rare_bucket_is_not_starved():
    order = make({"64x64": [100] * 9, "48x80": [3]}, 1, 8)
    buckets = [order.batch(step).bucket for step in range(order.count_batches_before(16))]
    assert buckets.count("48x80") == 16 * 3 // 8
    other = make({"64x64": [80] * 3, "48x80": [80] * 3}, 1, 8)
    labels = [other.batch(step).bucket for step in range(other.count_batches_before(1))]
    changes = sum(a != b for a, b in itertools.pairwise(labels))
    assert labels.count("48x80") == 30
    assert changes > 15


def test_passes_and_seeds_differ_and_blocks_bound_what_is_open():
    sizes = {"64x64": [16] * 12}
    order = make(sizes, 1, 16, block_shards=3)
    first, second = entries(order, 0, 12), entries(order, 12, 24)
    assert sorted(first) == sorted(second)
    assert first != second
    assert first != entries(make(sizes, 2, 16, block_shards=3), 0, 12)
    for block in range(4):
        assert len({shard for _, shard, _ in first[block * 48 : (block + 1) * 48]}) == 3


def test_a_hundred_million_samples_seek_at_once():
    order = make({"64x64": [1000] * 100_000}, 0, 4096, block_shards=8)
    plan = order.batch(123_456_789)
    assert len(plan.shard_G) == 4096
    assert len(set(plan.shard_G.tolist())) <= 16


def test_substitutes_are_deterministic_and_avoid_banned_shards():
    bucket = make({"64x64": [10, 20, 30]}, 5, 4).buckets[0]
    stand_ins = [bucket.substitute(position, frozenset({1})) for position in range(200)]
    assert stand_ins == [bucket.substitute(position, frozenset({1})) for position in range(200)]
    assert {shard for shard, _ in stand_ins} == {0, 2}
    assert len(set(stand_ins)) > 30
    with pytest.raises(UserError, match="no shard of it can be read: run `python -m data_pipeline verify URI`"):
        bucket.substitute(0, frozenset({0, 1, 2}))


def test_exceptions_survive_json_and_add_up():
    one = DataExceptions(frozenset({"b", "a"}), frozenset({5, 3}), {"a": 16, "b": 8})
    assert from_json(DataExceptions, to_json(one), where="exceptions") == one
    other = DataExceptions(frozenset("ac"), since={"a": 24, "c": 0})
    assert one | other == DataExceptions(frozenset("abc"), frozenset({3, 5}), {"a": 16, "b": 8, "c": 0}) == other | one
    assert one.go_back_to(12).since == {"a": 12, "b": 8}


def test_nothing_to_order_is_refused():
    with pytest.raises(UserError, match="no samples"):
        make({}, 0, 4)
