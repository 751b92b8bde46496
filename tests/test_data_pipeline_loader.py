"""The loader: batches do not depend on ranks or pieces, draws are keyed, and damage is quarantined, never fatal."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.formats.layout import SampleLayout
from data_pipeline.loading.loader import open_dataset
from data_pipeline.loading.order import DataExceptions
from data_pipeline.packing.shards import TrainingSample, build_shard, make_plain_key
from data_pipeline.packing.synthetic import CAPTIONS, TINY_TEXT, write_synthetic
from infra.errors import UserError
from model.encoders.text import EncodedText, TextSpec, assemble
from model.seeding import keyed_normal, keyed_uniform

SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    uri = str(tmp_path_factory.mktemp("data"))
    write_synthetic(
        uri,
        num_samples=300,
        val_samples=40,
        latent_shape=SHAPE,
        buckets=("32x32", "24x40"),
        shard_rows=32,
        synthetic_share=0.7,
    )
    return uri


def joined(lists) -> list:
    return list(itertools.chain.from_iterable(lists))


def take(dataset, count, **wanted):
    stream = dataset.batches(**{"seed": 7, "global_batch": 8, **wanted})
    batches = [next(stream) for _ in range(count)]
    stream.close()
    return batches


def test_what_a_dataset_says_of_itself(root):
    train, val = open_dataset(root), open_dataset(root, split="val")
    assert (train.num_samples, len(val)) == (300, 40)
    assert train.buckets == {"24x40": 150, "32x32": 150}
    assert train.latent_shape("24x40") == (4, 6, 10)
    assert train.resolution == 32
    assert train.text_spec == TINY_TEXT
    assert train.fingerprint == val.fingerprint


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_one_rank_batch(root, world_size):
    whole = take(open_dataset(root), 12)
    lanes = [take(open_dataset(root), 12, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        parts = [lane[step] for lane in lanes]
        assert batch.keys == joined(p.keys for p in parts)
        assert batch.captions == joined(p.captions for p in parts)
        assert torch.equal(batch.latent_BCHW, torch.cat([p.latent_BCHW for p in parts]))
        assert torch.equal(batch.text.context_BLD, torch.cat([p.text.context_BLD for p in parts]))
        assert torch.equal(batch.text.mask_BL, torch.cat([p.text.mask_BL for p in parts]))
        assert torch.equal(batch.positions, torch.cat([p.positions for p in parts]))
        assert len({p.latent_BCHW.shape[2:] for p in parts}) == 1


def test_samples_dealt_out_to_the_ranks_are_the_same_batch(root):
    whole = take(open_dataset(root), 4)
    lanes = [take(open_dataset(root), 4, rank=rank, world_size=2, dealt=True) for rank in range(2)]
    for step, batch in enumerate(whole):
        for rank, lane in enumerate(lanes):
            assert lane[step].keys == batch.keys[rank::2]
            assert torch.equal(lane[step].positions, batch.positions[rank::2])
            assert torch.equal(lane[step].latent_BCHW, batch.latent_BCHW[rank::2])
            assert lane[step].captions == batch.captions[rank::2]


def test_micro_batches_are_the_lane_in_pieces(root):
    whole, pieces = take(open_dataset(root), 3), take(open_dataset(root), 12, micro_batch=2)
    assert joined(b.keys for b in whole) == joined(b.keys for b in pieces)
    assert torch.equal(whole[0].text.pooled_BP, torch.cat([b.text.pooled_BP for b in pieces[:4]]))


def test_resume_at_a_position_equals_going_on(root):
    going_on, resumed = take(open_dataset(root), 90), take(open_dataset(root), 10, start=80 * 8)
    for one, other in zip(going_on[80:], resumed):
        assert one.keys == other.keys
        assert torch.equal(one.latent_BCHW, other.latent_BCHW)
        assert torch.equal(one.positions, other.positions)
    assert going_on[80].positions.tolist() == list(range(640, 648))


def test_an_epoch_shows_every_sample(root):
    dataset = open_dataset(root)
    steps = dataset.order(seed=7, global_batch=6).count_batches_before(1)
    batches = take(dataset, steps, global_batch=6)
    keys = [key for batch in batches for key in batch.keys]
    assert len(keys) == len(set(keys)) == 300
    assert all(batch.text.context_BLD.shape == (6, 16, 48) for batch in batches)


def test_encoders_drop_independently_at_the_stated_rate(root):
    batches = take(open_dataset(root), 100, global_batch=24, encoder_dropout=0.464)
    context = torch.cat([b.text.context_BLD for b in batches])
    clip, t5 = context[:, :8].abs().sum((1, 2)) == 0, context[:, 8:].abs().sum((1, 2)) == 0
    for share, expected in ((clip, 0.464), (t5, 0.464), (clip & t5, 0.464**2)):
        assert abs(share.float().mean().item() - expected) < 0.03
    mask = torch.cat([b.text.mask_BL for b in batches])
    pooled = torch.cat([b.text.pooled_BP for b in batches])
    assert mask[clip, :8].all()
    assert mask[t5, 8:].all()
    assert torch.equal(pooled.abs().sum(1) == 0, clip)


def test_captions_mix_by_weight_and_fall_back_to_what_is_there(root):
    batches = take(open_dataset(root), 100, global_batch=24)
    synthetic = np.mean([caption.startswith("one ") for batch in batches for caption in batch.captions])
    assert abs(synthetic - 0.35) < 0.03
    only = take(open_dataset(root), 20, caption_weights={"synthetic": 1.0})
    with_synthetic = np.mean([caption.startswith("one ") for batch in only for caption in batch.captions])
    assert abs(with_synthetic - 0.7) < 0.12


def test_draws_follow_the_position_not_the_batch(root):
    small, large = take(open_dataset(root), 24, global_batch=4), take(open_dataset(root), 4, global_batch=24)
    for batches in (small, large):
        for batch in batches:
            expected = keyed_uniform(7, batch.positions, "drop/t5") < 0.464
            assert torch.equal(batch.text.context_BLD[:, 8:].abs().sum((1, 2)) == 0, expected)


@pytest.mark.parametrize("layout", ["trimmed", "padded"])
def test_collate_places_features_like_assemble(tmp_path, layout):
    spec = TextSpec.from_json(TINY_TEXT.to_json() | {"layout": layout})
    write_synthetic(
        str(tmp_path), num_samples=24, val_samples=4, latent_shape=SHAPE, text_spec=spec, buckets=("32x32",)
    )
    dataset = open_dataset(str(tmp_path))
    batch = take(dataset, 1, global_batch=24, caption_weights={"original": 1.0})[0]
    tables = [dataset._reader.table(0)]
    stored = {key: _arrays(tmp_path / dataset.index.tars[0], key) for key in tables[0].keys}
    features, dropped = {}, {}
    for encoder in spec.encoders:
        hidden = [torch.from_numpy(stored[key][f"original.{encoder.seat}.hidden"]) for key in batch.keys]
        pooled = [
            torch.from_numpy(stored[key].get(f"original.{encoder.seat}.pooled", np.zeros(0, np.float32)))
            for key in batch.keys
        ]
        features[encoder.seat] = EncodedText.stack(hidden, pooled)
        dropped[encoder.seat] = keyed_uniform(7, batch.positions, f"drop/{encoder.seat}") < 0.464
    expected = assemble(spec, features, dropped)
    assert batch.text.context_BLD.dtype == torch.float16
    assert torch.equal(batch.text.context_BLD.float(), expected.context_BLD)
    assert torch.equal(batch.text.pooled_BP, expected.pooled_BP)
    assert (batch.text.mask_BL is None) == (expected.mask_BL is None)
    if expected.mask_BL is not None:
        assert torch.equal(batch.text.mask_BL, expected.mask_BL)
    moments = torch.from_numpy(np.stack([stored[key]["moments"] for key in batch.keys])).float()
    mean, std = moments.chunk(2, 1)
    noise = (batch.latent_BCHW / dataset.vae.scale + dataset.vae.shift - mean) / std
    assert abs(noise.mean().item()) < 0.05
    assert abs(noise.std().item() - 1) < 0.05


def test_memory_is_used_again_only_when_nobody_holds_a_batch(root):
    """Dropped encoders and short captions leave zeros where an earlier batch had states."""
    held, places = take(open_dataset(root), 30), set()
    stream = open_dataset(root).batches(seed=7, global_batch=8, micro_batch=4)
    for batch in held:
        pieces = [next(stream), next(stream)]
        places.add(pieces[0].text.context_BLD.data_ptr())
        for field in ("context_BLD", "pooled_BP", "mask_BL"):
            assert torch.equal(getattr(batch.text, field), torch.cat([getattr(p.text, field) for p in pieces]))
        assert torch.equal(batch.latent_BCHW, torch.cat([p.latent_BCHW for p in pieces]))
    stream.close()
    assert len(places) < len(held) / 2
    assert len({batch.text.context_BLD.data_ptr() for batch in held}) == len(held)


def test_batches_from_s3_are_those_from_a_disk(tmp_path, s3):
    for uri in (str(tmp_path), s3):
        write_synthetic(uri, num_samples=32, val_samples=4, latent_shape=SHAPE, buckets=("32x32",), shard_rows=8)
    for one, other in zip(take(open_dataset(str(tmp_path)), 6), take(open_dataset(s3), 6)):
        assert one.keys == other.keys
        assert torch.equal(one.latent_BCHW, other.latent_BCHW)
        assert torch.equal(one.text.context_BLD, other.text.context_BLD)
        assert torch.equal(one.text.pooled_BP, other.text.pooled_BP)


def test_latents_are_the_stored_moments_sampled_and_normalised(root):
    val = open_dataset(root, split="val")
    numbers = val.bucket_ranges["32x32"][:5]
    batch, mean = val.read(numbers, seed=3), val.read(numbers, seed=3, posterior="mean")
    shards, rows = val.index.locate(np.array(numbers))
    keys = [val._reader.table(shard).keys[row] for shard, row in zip(shards, rows)]
    stored = [_arrays(Path(root, val.index.tars[shard]), key)["moments"] for shard, key in zip(shards, keys)]
    moments, latents = torch.from_numpy(np.stack(stored)), val.vae
    noise = keyed_normal(3, numbers, "posterior", SHAPE)
    assert torch.equal(batch.latent_BCHW, latents.normalise(latents.sample(moments, noise)))
    assert torch.equal(mean.latent_BCHW, latents.normalise(latents.sample(moments, torch.zeros_like(noise))))


def _arrays(tar: Path, key: str) -> dict[str, np.ndarray]:
    import tarfile

    from safetensors.numpy import load

    with tarfile.open(tar) as archive:
        return load(archive.extractfile(f"{key}.safetensors").read())


def test_plain_webdataset_reads_our_shards(root):
    import webdataset

    dataset = open_dataset(root)
    paths = [f"{root}/{tar}" for tar in dataset.index.tars]
    from safetensors.numpy import load

    samples = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    assert len(samples) == 300
    assert {sample["__key__"] for sample in samples} == {
        key for shard in range(len(paths)) for key in dataset._reader.table(shard).keys
    }
    assert load(samples[0]["safetensors"])["moments"].dtype == np.float16


def test_read_gives_fixed_samples_without_dropout(root):
    val = open_dataset(root, split="val")
    samples = val.bucket_ranges["32x32"]
    batch, again = val.read(samples), open_dataset(root, split="val").read(samples)
    assert torch.equal(batch.latent_BCHW, again.latent_BCHW)
    assert (batch.text.context_BLD[:, :8].abs().sum((1, 2)) > 0).all()
    assert (batch.text.context_BLD[:, 8:].abs().sum((1, 2)) > 0).all()
    assert batch.positions.tolist() == list(samples)
    assert all(caption.startswith("a photo of") for caption in batch.captions)
    half = val.read(samples[len(samples) // 2 :])
    assert torch.equal(half.latent_BCHW, batch.latent_BCHW[len(samples) // 2 :])
    with pytest.raises(UserError, match="bucket by bucket"):
        val.read(range(len(val)))
    with pytest.raises(UserError, match="between 0 and 39"):
        val.read([40])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"global_batch": 7, "world_size": 2}, "cannot be shared by 2 ranks"),
        ({"start": 4}, "no multiple of global_batch=8"),
        ({"caption_weights": {"orginal": 1.0}}, "did you mean 'original'"),
        ({"encoder_dropout": 1.5}, "not a probability"),
        ({"micro_batch": 3}, "does not divide"),
    ],
)
def test_impossible_wishes_are_refused(root, wanted, message):
    with pytest.raises(UserError, match=message):
        take(open_dataset(root), 1, **wanted)


def test_missing_datasets_and_splits_are_one_line(root, tmp_path):
    with pytest.raises(UserError, match=r"no dataset.json there"):
        open_dataset(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="did you mean 'val'"):
        open_dataset(root, split="vall")


def damaged(tmp_path, how) -> tuple[str, str]:
    uri = str(tmp_path)
    write_synthetic(uri, num_samples=256, val_samples=8, latent_shape=SHAPE, buckets=("32x32",), shard_rows=8)
    tar = open_dataset(uri).index.tars[3]
    how(tmp_path / tar)
    return uri, tar


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for at in range(2000, len(data), 1500):
        data[at] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "how", [flip, lambda path: path.write_bytes(path.read_bytes()[:3000]), Path.unlink], ids=["flip", "cut", "gone"]
)
def test_a_damaged_shard_is_quarantined_and_the_run_goes_on(tmp_path, how, caplog):
    uri, tar = damaged(tmp_path, how)
    steps = 256 // 8
    dataset = open_dataset(uri)
    stream = dataset.batches(seed=1, global_batch=8)
    keys = [key for _ in range(steps) for key in next(stream).keys]
    assert stream.exceptions.shards == {tar}
    order = dataset.order(seed=1, global_batch=8)
    first = next(step for step in range(steps) if 3 in order.batch(step).shard_G)
    assert stream.exceptions.since == {tar: 8 * first}
    assert f"{tar} quarantined, other samples of its bucket stand in" in caplog.text
    bad = set(dataset._reader.table(3).keys)
    assert len(keys) == 256
    assert not bad & set(keys)
    # knowing the exception beforehand gives the same batches, whatever the ranks
    known = take(open_dataset(uri), steps, seed=1, exceptions=DataExceptions(frozenset({tar})))
    assert [key for batch in known for key in batch.keys] == keys
    lane = take(open_dataset(uri), steps, seed=1, rank=1, world_size=2, exceptions=stream.exceptions)
    assert [b.keys for b in lane] == [b.keys[4:] for b in known]
    stream.close()


def test_too_many_damaged_shards_stop_the_run(tmp_path):
    uri, _ = damaged(tmp_path, Path.unlink)
    for tar in open_dataset(uri).index.tars[4:10]:
        (tmp_path / tar).unlink()
    with pytest.raises(UserError, match=r"shards of .* cannot be read"):
        take(open_dataset(uri), 32)


def test_skipped_positions_get_substitutes(root):
    plain = take(open_dataset(root), 4)
    skipped = take(open_dataset(root), 4, exceptions=DataExceptions(positions=frozenset({3, 17})))
    before = [key for batch in plain for key in batch.keys]
    after = [key for batch in skipped for key in batch.keys]
    assert [n for n, (a, b) in enumerate(zip(before, after)) if a != b] == [3, 17]


def test_shards_are_the_same_bytes_every_time_and_keys_stay_apart():
    layout = SampleLayout(TINY_TEXT, CAPTIONS, (4, 2, 2))
    sample = TrainingSample(
        "a", np.ones((4, 2, 2)), {("original", "t5"): (np.ones((2, 48)), np.ones(0))}, {"original": "x"}, {}
    )
    one, rows = build_shard([sample, sample], layout)
    assert one == build_shard([sample, sample], layout)[0]
    assert rows.keys == ["a", "a-r1"]


@pytest.mark.parametrize("name", ["a b/c.d.jpg", "../x", "\u00e9\u4e2d", "", "x" * 300])
def test_keys_become_plain(name):
    assert make_plain_key(name) != make_plain_key(name + "!")
    assert make_plain_key(name).replace("-", "").replace("_", "").isalnum()
    assert len(make_plain_key(name)) <= 80
