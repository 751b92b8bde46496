"""Near duplicates by embedding: planted copies of scenes are found, scenes that only look alike stay."""

import io
import random
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from data_pipeline.checkpoints import resolve
from data_pipeline.curation.dedup import Dedup
from data_pipeline.curation.embed import EmbedStage, load_embedder, make_thumbnail
from data_pipeline.curation.semantic import Load, SemanticDedup, crop_thumbnail, measure_difference
from data_pipeline.stages.stage import ShardView
from data_pipeline.world.scenes import make_scene
from infra.errors import UserError

WORLD = SemanticDedup(similarity=0.8, verify=15.0)


def planted(scenes: int, copies: int, seed: int = 0) -> tuple[list[Image.Image], np.ndarray]:
    """Scenes, then as many copies of each kind; the second is the number of each image's original, -1 for a scene."""
    rng = random.Random(seed)
    images = [Image.fromarray(make_scene(77, n, split="dedup").image) for n in range(scenes)]
    origins = [-1] * scenes
    for kind in (resized, recompressed, cropped):
        for original in rng.sample(range(scenes), copies):
            images.append(kind(images[original], rng))
            origins.append(original)
    return images, np.array(origins)


def resized(image: Image.Image, rng: random.Random) -> Image.Image:
    side = rng.choice([40, 48, 80, 96, 128])
    return image.resize((side, side), Image.Resampling.BICUBIC)


def recompressed(image: Image.Image, rng: random.Random) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=rng.choice([40, 60, 75, 90]))
    return Image.open(out).convert("RGB")


def cropped(image: Image.Image, rng: random.Random) -> Image.Image:
    side = round(0.95 * image.width)
    x, y = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
    return image.crop((x, y, x + side, y + side))


def embedding_table(images: list[Image.Image]) -> pa.Table:
    embed = load_embedder(resolve("world:clip"), "cpu")
    vectors = [v.tobytes() for first in range(0, len(images), 64) for v in embed(images[first : first + 64])]
    return pa.table(
        {
            "row": pa.array(range(len(images)), pa.int32()),
            "embedding": pa.array(vectors, pa.binary()),
            "thumb": pa.array([make_thumbnail(image) for image in images], pa.binary()),
        }
    )


def scores(first_N: np.ndarray, origin_N: np.ndarray) -> tuple[float, float]:
    """(recall, precision) of what was flagged."""
    flagged, copies = first_N >= 0, origin_N >= 0
    return (flagged & copies).sum() / copies.sum(), (flagged & copies).sum() / max(1, flagged.sum())


def first(semantic: SemanticDedup, places: list[tuple[str, int]], load: Load, skip: Sequence[int] = (), **given):
    """For each place (shard, row), in order of precedence, the number of the one that stands for it."""
    numbers: dict[str, list[int]] = {}
    for number, (shard, _) in enumerate(places):
        if number not in skip:
            numbers.setdefault(shard, []).append(number)
    grouped = [(shard, np.array([places[n][1] for n in mine]), np.array(mine)) for shard, mine in numbers.items()]
    return semantic.find_firsts(grouped, len(places), load, **given).tolist()


@pytest.fixture(scope="module")
def world() -> tuple[pa.Table, np.ndarray]:
    images, origins = planted(300, 30)
    return embedding_table(images), origins


def test_planted_copies_are_found_and_scenes_stay(world):
    table, origins = world
    places = [("s", n) for n in range(len(table))]
    recall, precision = scores(np.array(first(WORLD, places, lambda _: table)), origins)
    assert recall >= 0.95
    assert precision >= 0.98


def test_shards_groups_and_memory_change_nothing(world):
    table, _ = world
    places = [(f"s{n % 4}", n // 4) for n in range(len(table))]
    parts = {
        f"s{k}": table.take(list(range(k, len(table), 4))).set_column(
            0, "row", pa.array(range(len(range(k, len(table), 4))), pa.int32())
        )
        for k in range(4)
    }
    several = SemanticDedup(similarity=0.8, verify=15.0, clusters=5)
    one = first(several, [("s", n) for n in range(len(table))], lambda _: table)
    assert first(several, places, parts.__getitem__, max_bytes=1) == first(several, places, parts.__getitem__)
    assert sum(number >= 0 for number in one) > 60


def test_algorithm_1_flags_later_rows_by_similarity_alone():
    vectors = np.eye(4, dtype=np.float16)[[0, 1, 0, 2, 1, 0]]
    table = pa.table({
        "row": pa.array(range(6), pa.int32()),
        "embedding": [v.tobytes() for v in vectors],
        "thumb": [bytes(32 * 32 * 3)] * 6,
    })  # fmt: skip
    places = [("s", n) for n in range(6)]
    plain = SemanticDedup(similarity=0.9, clusters=1)
    assert first(plain, places, lambda _: table) == [-1, -1, 0, -1, 1, 0]
    assert first(plain, places[::-1], lambda _: table) == [-1, -1, -1, 0, 1, 0]
    assert first(plain, places, lambda _: table, skip=[0]) == [-1, -1, -1, -1, 1, 2]
    assert first(SemanticDedup(), [], lambda _: table) == []


def test_a_crop_is_nearer_than_another_picture():
    rng = random.Random(1)
    scenes = [Image.fromarray(make_scene(5, n, split="dedup").image) for n in range(2)]
    a, b, crop = (crop_thumbnail(make_thumbnail(i)) for i in (*scenes, cropped(scenes[0], rng)))
    assert measure_difference(a, a) == 0
    assert measure_difference(a, crop) == measure_difference(crop, a) < 16 < measure_difference(a, b)


def test_dedup_prefers_rows_that_will_be_kept_and_says_which_pass_found_what():
    table = pa.table({"row": pa.array([0, 1], pa.int32()), "exact": ["x", "x"], "perceptual": [0, 0]})
    assert dict(Dedup().run([("s", table)]).iterate_tables())["s"]["status"].to_pylist() == ["ok", "duplicate"]
    found = dict(Dedup().run([("s", table)], preferred={"s": np.array([1])}.__getitem__).iterate_tables())["s"]
    assert found["status"].to_pylist() == ["duplicate", "ok"]
    assert found["reason"].to_pylist() == ["equal: of s row 1", ""]


def test_a_torchscript_file_embeds_and_others_are_refused(tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3))

    torch.jit.script(Mean()).save(str(tmp_path / "tiny.torchscript.pt"))
    stage = EmbedStage(str(tmp_path / "tiny.torchscript.pt"), "hash")
    out = io.BytesIO()
    Image.new("RGB", (50, 40), (255, 0, 0)).save(out, "PNG")
    rows, files = pa.array([0, 1], pa.int32()), pa.array([out.getvalue(), b""], pa.large_binary())
    ingest = pa.table({"row": rows, "image": files})
    measure = pa.table({"row": rows, "status": ["ok", "corrupt"]})
    made = stage.open()(ShardView("", "s", {}, range(2), {"ingest": ingest, "measure": measure}))
    vector = np.frombuffer(made["embedding"][0].as_py(), np.float16)
    assert (made["row"].to_pylist(), vector.shape) == ([0], (3,))
    assert abs(float(np.linalg.norm(vector.astype(float))) - 1) < 1e-3
    (tmp_path / "bad.pt").write_bytes(b"not a model")
    for path in (tmp_path, tmp_path / "bad.pt"):
        with pytest.raises(UserError, match="TorchScript"):
            load_embedder(path, "cpu")
