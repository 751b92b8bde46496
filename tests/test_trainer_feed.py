"""Micro-batches with their draws: made ahead of the loop as beside it, in order, and no thread outlives the feed."""

import threading
from collections import deque
from functools import partial

import pytest
import torch

from data_pipeline.loading.loader import open_dataset
from data_pipeline.packing.synthetic import write_synthetic
from infra.errors import UserError
from model.backbones.mmdit import MMDiTConfig
from model.diffusion.flow import get_formulation
from model.seeding import keyed_normal
from trainer.feed import MicroBatch, Prefetcher, draw_for, draw_noise
from trainer.recipe import Recipe

RECIPE = Recipe(name="r", model=MMDiTConfig(2), images=64, global_batch=8, seed=3, shift=2.0)
GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("feed"))
    write_synthetic(path, num_samples=32, val_samples=8, latent_shape=(4, 8, 8), buckets=("32x32",))
    return open_dataset(path)


@pytest.fixture
def no_gpu(monkeypatch):
    """Page-locked memory exists only beside a GPU; threads and order are the same in other memory."""
    monkeypatch.setattr(MicroBatch, "pin_memory", lambda self: self)


def feed(dataset, device: torch.device) -> Prefetcher:
    return Prefetcher(dataset.batches(seed=3, global_batch=8, micro_batch=4), partial(draw_for, RECIPE), device=device)


def test_a_feed_ahead_gives_what_a_feed_beside_does(dataset, no_gpu):
    beside, ahead = feed(dataset, torch.device("cpu")), feed(dataset, GPU)
    seen = []
    for _ in range(10):
        one, two = next(beside), next(ahead)
        assert one.batch.keys == two.batch.keys
        assert one.exceptions == two.exceptions
        assert torch.equal(one.batch.positions, two.batch.positions)
        for a, b in (
            (one.t_B, two.t_B),
            (one.noise_BCHW, two.noise_BCHW),
            (one.batch.latent_BCHW, two.batch.latent_BCHW),
        ):
            assert torch.equal(a, b)
        seen += one.batch.positions.tolist()
    assert seen == list(range(40))
    beside.close()
    ahead.close()


def test_draws_belong_to_positions_and_go_to_the_device_with_the_batch(dataset):
    batches = dataset.batches(seed=3, global_batch=8)
    micro = draw_noise(next(batches), form := get_formulation(RECIPE.formulation), seed=3, shift=2.0)
    batches.close()
    assert torch.equal(micro.noise_BCHW[5:6], keyed_normal(3, [5], "noise", (4, 8, 8)))
    alone = draw_noise(micro.batch._replace(positions=micro.batch.positions[5:6]), form, seed=3, shift=2.0)
    assert torch.equal(alone.t_B, micro.t_B[5:6])
    pair = micro._replace(batch=micro.batch._replace(rejected_BCHW=-micro.batch.latent_BCHW))
    given = pair.to(torch.device("cpu"))
    assert torch.equal(given.x0_BCHW, torch.cat([micro.batch.latent_BCHW, -micro.batch.latent_BCHW]))
    assert torch.equal(given.t_B, micro.t_B)


def test_a_mistake_found_ahead_is_told_by_the_next_micro_batch(dataset, no_gpu, monkeypatch):
    ahead = feed(dataset, GPU)
    next(ahead)

    def broken(self):
        raise UserError("no shard can be read")

    monkeypatch.setattr(type(ahead._batches), "__next__", broken)
    with pytest.raises(UserError, match="no shard can be read"):
        deque(ahead, maxlen=0)  # what was made before is still given
    ahead.close()


def test_no_thread_outlives_a_feed(dataset, no_gpu):
    def running() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith(("feed", "batches"))]

    ahead = feed(dataset, GPU)
    next(ahead)
    assert sorted(thread.name.split("_")[0] for thread in running()) == ["batches", "feed"]
    ahead.close()
    for thread in running():
        thread.join(10)
    assert running() == []
    for closed in (ahead, feed(dataset, torch.device("cpu"))):
        closed.close()
        assert list(closed) == []
