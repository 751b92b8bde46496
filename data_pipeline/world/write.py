"""Writes the world to disk as img2dataset would have downloaded it, with the ground truth in a folder beside it.

URI/train/00000.tar (KEY.json, KEY.png, KEY.txt), 00000.parquet and 00000_stats.json, the same under val, and
URI/truth/<split>/00000.parquet. Every byte is a function of the arguments: no times, no names of the machine. So is a
local tar's modification time, by which the pipeline tells raw files apart: a world drawn again is the same source.
"""

import io
import json
import os
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.packing.shards import TarBuilder
from data_pipeline.world.grammar import official_prompt
from data_pipeline.world.scenes import SIZE, Scene, make_scene
from infra import storage
from infra.errors import UserError
from infra.log import Progress

IMAGES_PER_SHARD = 1000
TARS_FROM_NS = 1_577_836_800 * 10**9  # 2020-01-01
TARS_SPAN_NS = 10**17  # three years: two tars of different bytes do not share a time

# img2dataset's own columns and types (downloader.py); `url` names the scene.
DOWNLOAD_SCHEMA = pa.schema(
    [
        ("caption", pa.string()),
        ("url", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("exif", pa.string()),
        ("sha256", pa.string()),
    ]
)

TRUTH_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("tag", pa.string()),
        ("caption", pa.string()),
        ("prompt", pa.string()),
        ("include", pa.string()),
        ("exclude", pa.string()),
        ("seen", pa.bool_()),
        (
            "objects",
            pa.list_(
                pa.struct(
                    [
                        ("class", pa.string()),
                        ("color", pa.string()),
                        ("box", pa.list_(pa.float32())),
                        ("mask_png", pa.binary()),
                    ]
                )
            ),
        ),
    ]
)


def write_world(
    uri: str, *, images: int, seed: int = 0, val_images: int = 0, images_per_shard: int = IMAGES_PER_SHARD
) -> dict[str, int]:
    """Write both splits under `uri` (local or s3://); images written per split. Both hold seen compositions only."""
    if images < 1 or val_images < 0 or images_per_shard < 1:
        raise UserError(f"the world needs at least one image, got {images} (and {val_images} for validation)")
    splits = {"train": images, "val": val_images}
    with Progress(images + val_images, "images", desc="world") as progress:
        for split, total in splits.items():
            for number, first in enumerate(range(0, total, images_per_shard)):
                count = min(images_per_shard, total - first)
                _write_shard(uri, split, number, seed=seed, indices=range(first, first + count))
                progress.update(count)
    return splits


def _write_shard(uri: str, split: str, number: int, *, seed: int, indices: range) -> None:
    tar = TarBuilder()
    rows: list[dict[str, Any]] = []
    truths: list[dict[str, Any]] = []
    for place, index in enumerate(indices):
        scene = make_scene(seed, index, split=split)
        key = f"{number:05d}{place:04d}"
        png = png_bytes(scene.image)
        row = _download_row(scene.caption, key=key, url=f"world://{split}/{seed}/{index}", png=png)
        # webdataset's writer sorts the fields, so img2dataset's tars hold json, png, txt in this order.
        tar.add(f"{key}.json", json.dumps(row, indent=4).encode())
        tar.add(f"{key}.png", png)
        tar.add(f"{key}.txt", scene.caption.encode())
        rows.append(row)
        truths.append(truth_row(scene, key))
    name = f"{number:05d}"
    storage.write_bytes(storage.join(uri, "truth", split, f"{name}.parquet"), _parquet(truths, TRUTH_SCHEMA))
    _write_tar(storage.join(uri, split, f"{name}.tar"), tar.finish())
    storage.write_bytes(storage.join(uri, split, f"{name}.parquet"), _parquet(rows, DOWNLOAD_SCHEMA))
    # The stats come last: to img2dataset they are the mark of a finished shard.
    storage.write_bytes(storage.join(uri, split, f"{name}_stats.json"), _stats(len(rows)))


def _write_tar(uri: str, tar: bytes) -> None:
    storage.write_bytes(uri, tar)
    if not storage.is_remote(uri):
        time_ns = TARS_FROM_NS + int(storage.sha256_hex(tar)[:16], 16) % TARS_SPAN_NS
        os.utime(storage.local_path(uri), ns=(time.time_ns(), time_ns))


def png_bytes(image: np.ndarray) -> bytes:
    """An RGB image or a mask (bool, one bit per pixel) as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def truth_row(scene: Scene, key: str) -> dict[str, Any]:
    objects = [
        {"class": o.name, "color": o.color, "box": list(o.box), "mask_png": png_bytes(o.mask)} for o in scene.objects
    ]
    return {
        "key": key,
        "tag": scene.tag,
        "caption": scene.caption,
        "prompt": official_prompt(scene.tag, scene.include),
        "include": json.dumps(scene.include),
        "exclude": json.dumps(scene.exclude),
        "seen": scene.seen,
        "objects": objects,
    }


def _download_row(caption: str, *, key: str, url: str, png: bytes) -> dict[str, Any]:
    return {
        "caption": caption,
        "url": url,
        "key": key,
        "status": "success",
        "error_message": None,
        "width": SIZE,
        "height": SIZE,
        "original_width": SIZE,
        "original_height": SIZE,
        "exif": "{}",
        "sha256": storage.sha256_hex(png),
    }


def _stats(count: int) -> bytes:
    stats = {
        "count": count,
        "successes": count,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": {"success": count},
    }
    return json.dumps(stats, indent=4).encode()


def _parquet(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer)
    return buffer.getvalue()
