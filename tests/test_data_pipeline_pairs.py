"""Preference pairs as shards: joined by key, the same draws on both sides, whatever the ranks; what does not fit."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.formats.schema import name_rejected_split, read_dataset_info
from data_pipeline.inspection.verify import verify_dataset
from data_pipeline.loading.loader import open_dataset
from data_pipeline.loading.pairs import RejectedLatents
from data_pipeline.packing.pairs import PreferencePair, read_pairs, write_pairs
from data_pipeline.packing.synthetic import write_synthetic
from data_pipeline.plans import WORLD_TEXT, read_vae_meta
from infra.errors import UserError


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("pairs"))
    write_synthetic(path, num_samples=40, val_samples=8, latent_shape=(4, 8, 8), buckets=("32x32",), pairs=True,
                    shard_rows=12)  # fmt: skip
    return path


def first_batch(uri: str, *, rank: int = 0, world: int = 1, micro: int | None = None):
    dataset = open_dataset(uri)
    batches = dataset.batches(
        seed=0, global_batch=16, rank=rank, world_size=world, micro_batch=micro, read_rejected=RejectedLatents(dataset)
    )
    found = [next(batches) for _ in range(16 // world // (micro or 16 // world))]
    batches.close()
    return found


def test_each_sample_meets_the_one_with_its_key_and_draws(uri):
    """The pair as if its rejected half had stood at the same position: caption, dropout and posterior noise alike."""
    [batch] = first_batch(uri)
    other = open_dataset(uri, split=name_rejected_split("train"))
    places = {key: (shard, row) for shard in range(len(other.index.tars))
              for row, key in enumerate(other._reader.table(shard).keys)}  # fmt: skip
    for i, key in enumerate(batch.keys):
        dataset = open_dataset(uri)
        batches = dataset.batches(seed=0, global_batch=16)
        alone = other.at([places[key]], [int(batch.positions[i])], batches._draws)
        batches.close()
        assert alone.keys == [key]
        assert alone.captions == [batch.captions[i]]
        torch.testing.assert_close(alone.latent_BCHW[0], batch.rejected_BCHW[i], rtol=0, atol=0)
        torch.testing.assert_close(alone.text.context_BLD[0], batch.text.context_BLD[i], rtol=0, atol=0)
    assert not torch.equal(batch.latent_BCHW, batch.rejected_BCHW)


def test_pairs_stay_together_on_any_number_of_ranks_and_micro_batches(uri):
    [whole] = first_batch(uri)
    for parts in ([*first_batch(uri, rank=0, world=2), *first_batch(uri, rank=1, world=2)], first_batch(uri, micro=4)):
        assert torch.equal(torch.cat([part.rejected_BCHW for part in parts]), whole.rejected_BCHW)
        assert [key for part in parts for key in part.keys] == whole.keys


def test_the_preferred_ones_alone_are_an_ordinary_data_set(uri):
    batches = open_dataset(uri).batches(seed=0, global_batch=16)
    batch = next(batches)
    batches.close()
    assert batch.rejected_BCHW is None
    assert torch.equal(batch.latent_BCHW, first_batch(uri)[0].latent_BCHW)


def test_what_is_no_set_of_pairs_is_refused(uri, tmp_path):
    write_synthetic(str(tmp_path / "plain"), num_samples=8, val_samples=4, latent_shape=(4, 8, 8))
    with pytest.raises(UserError, match="no preference pairs"):
        RejectedLatents(open_dataset(str(tmp_path / "plain")))
    assert not verify_dataset(uri).problems
    # The rejected ones of another data set in the place of this one's.
    write_synthetic(str(tmp_path / "odd"), num_samples=41, val_samples=4, latent_shape=(4, 8, 8), buckets=("32x32",),
                    pairs=True)  # fmt: skip
    path = tmp_path / "odd" / "dataset.json"
    raw = json.loads(path.read_text())
    raw["splits"]["train"] = raw["splits"]["val"]
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="samples in train and train_rejected have no partner"):
        RejectedLatents(open_dataset(str(tmp_path / "odd")))
    assert "no partner" in " ".join(verify_dataset(str(tmp_path / "odd")).problems)


def picture(color: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> np.ndarray:
    return np.full((*size, 3), color, np.uint8)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> str:
    """People's own pairs, from files, by the world's networks."""
    folder = tmp_path_factory.mktemp("own")
    Image.fromarray(picture((200, 30, 30), (80, 120))).save(folder / "red.png")
    Image.fromarray(picture((30, 30, 200))).save(folder / "blue.png")
    lines = [{"caption": "a photo of a red apple", "preferred": "red.png", "rejected": "blue.png"},
             {"caption": "a blue kite", "preferred": "blue.png", "rejected": "red.png"}]  # fmt: skip
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    write_pairs(
        str(folder / "out"), {"train": read_pairs(str(folder / "pairs.jsonl"))}, text_spec=WORLD_TEXT,
        vae=read_vae_meta("world:vae"), resolution=64, made_by={"by": "hand"},
    )  # fmt: skip
    return str(folder / "out")


def test_own_pictures_become_shards_that_the_tools_read(written):
    info = read_dataset_info(written)
    assert {name: split.num_samples for name, split in info.splits.items()} == {"train": 2, "train_rejected": 2}
    assert not verify_dataset(written).problems
    dataset = open_dataset(written)
    batches = dataset.batches(seed=0, global_batch=2, encoder_dropout=0.0, read_rejected=RejectedLatents(dataset))
    batch = next(batches)
    batches.close()
    red = batch.captions.index("a photo of a red apple")
    # The red picture is what one pair prefers and the other rejects: the same latents up to the posterior's noise.
    near = (batch.latent_BCHW[red] - batch.rejected_BCHW[1 - red]).square().mean()
    far = (batch.latent_BCHW[red] - batch.rejected_BCHW[red]).square().mean()
    assert near < 0.2 * far


def test_its_text_is_what_evaluation_gives_the_model(written):
    from data_pipeline.checkpoints import resolve
    from model.encoders.networks import load_text_encoders

    batch = open_dataset(written).read([0, 1])
    text = load_text_encoders(WORLD_TEXT, resolve).condition(batch.captions)
    torch.testing.assert_close(batch.text.context_BLD.float(), text.context_BLD, atol=5e-3, rtol=5e-3)  # stored in fp16
    assert torch.equal(batch.text.mask_BL, text.mask_BL)


@pytest.mark.parametrize(
    ("line", "says"),
    [("{", "line 1"), ('{"caption": "x"}', "expected"),
     ('{"caption": "x", "preferred": "no.png", "rejected": "no.png"}', "no.png"),
     ('{"caption": "x", "preferred": "pairs.jsonl", "rejected": "pairs.jsonl"}', "a picture is no good")],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path, line, says):
    (tmp_path / "pairs.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=says):
        read_pairs(str(tmp_path / "pairs.jsonl"))


def test_equal_keys_and_a_second_data_set_are_refused(written, tmp_path):
    more = {"text_spec": WORLD_TEXT, "vae": read_vae_meta("world:vae"), "resolution": 64, "made_by": {}}
    pair = PreferencePair("k", "a dog", picture((0, 0, 0)), picture((9, 9, 9)))
    with pytest.raises(UserError, match="all different"):
        write_pairs(str(tmp_path / "x"), {"train": [pair, pair]}, **more)
    with pytest.raises(UserError, match="holds a data set already"):
        write_pairs(written, {"train": [pair]}, **more)
