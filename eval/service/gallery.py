"""A few prompts drawn from every checkpoint with the same seeds: what the pages show side by side, and people compare.

RUN/gallery/step_XXXXXXX.png is one sheet of equal tiles, row by row; a .json beside it says what each tile is.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.drawing.generate import ImageRequest, Painter, Sampling
from infra import storage
from infra.codec import from_json, to_json
from infra.errors import UserError

COLUMNS = 4
SheetLayout = tuple[int, int, int]  # columns, tile width and height in pixels
# One of each kind of composition: first seen ones, then unseen ones, then the next of each.
WORLD_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@dataclass(frozen=True)
class GalleryTile:
    prompt: str
    seed: int
    number: int


@dataclass(frozen=True)
class GallerySheet:
    """What a gallery picture holds. Sheets with one `key` show the same prompts at the same seeds, tile by tile."""

    tiles: tuple[GalleryTile, ...]
    columns: int
    tile_width: int
    tile_height: int
    images_seen: int
    sampling: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.tiles or min(self.layout) < 1:
            raise UserError(f"{len(self.tiles)} tiles; columns, width and height {self.layout}: expected 1 or more")

    @property
    def layout(self) -> SheetLayout:
        return self.columns, self.tile_width, self.tile_height

    @property
    def key(self) -> str:
        content = to_json([self.tiles, self.sampling])
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def choose_world_prompts(count: int) -> list[str]:
    """`count` prompts of the world, one task after the other, seen and unseen compositions in turn."""
    from data_pipeline.world.grammar import world_prompts
    from eval.judging.prompts import WORLD_SEED

    found: list[str] = []
    for turn in range(count):
        for seen in (True, False):
            for task in WORLD_TASKS:
                rows = world_prompts(task, turn + 1, WORLD_SEED, seen) if seen or task != "single_object" else ()
                if len(rows) > turn:
                    found.append(str(rows[turn]["prompt"]))
        if len(found) >= count:
            break
    return found[:count]


def draw_gallery(run_uri: str, step: int, painter: Painter, prompts: Sequence[str], sampling: Sampling) -> None:
    """Write the sheet of a checkpoint, its description last. One image per prompt."""
    jobs = [ImageRequest(text, "gallery") for text in dict.fromkeys(prompts)]
    images = [image for _, image in painter.paint(jobs, sampling)]
    height, width = images[0].shape[:2]
    tiles = tuple(GalleryTile(job.text, sampling.seed, job.number) for job in jobs)
    sheet = GallerySheet(tiles, COLUMNS, width, height, int(painter.meta["images_seen"]), sampling.protocol())
    uri = locate_sheet(run_uri, step)
    storage.write_bytes(uri, _encode_sheet(images))
    record = to_json(sheet) | {"key": sheet.key, "run": painter.meta.get("run", ""), "step": step}
    storage.write_bytes(locate_description(uri), (json.dumps(record, indent=1) + "\n").encode())


def locate_sheet(run_uri: str, step: int) -> str:
    return storage.join(run_uri, "gallery", f"step_{step:07d}.png")


def locate_description(uri: str) -> str:
    return uri.removesuffix(".png") + ".json"


def read_sheet(uri: str) -> GallerySheet:
    """The description beside a gallery picture, without its key, run and step; UserError where it is none."""
    description = locate_description(uri)
    return from_json(
        GallerySheet, storage.read_bytes(description), where=description, extra="ignore",
        advice="delete it and evaluate the checkpoint again",
    )  # fmt: skip


def _encode_sheet(images: Sequence[np.ndarray]) -> bytes:
    from PIL import Image

    height, width = images[0].shape[:2]
    rows = -(-len(images) // COLUMNS)
    canvas = np.full((rows * height, min(COLUMNS, len(images)) * width, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // COLUMNS * height, index % COLUMNS * width
        canvas[top : top + height, left : left + width] = image
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, "PNG")
    return buffer.getvalue()
