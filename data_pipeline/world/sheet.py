"""Draws the README's picture of the world: `python -m data_pipeline.world.sheet --out PATH.png`."""

import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.world.classes import BACKGROUNDS, CLASSES, COLORS
from data_pipeline.world.scenes import detailed_caption, make_scene
from data_pipeline.world.sprites import fit, sprite
from infra.cli import run_command
from infra.errors import run_cli

CELL = 40
COLUMNS, ROWS, TILE, TEXT = 5, 5, 128, 44


def palette() -> np.ndarray:
    """Every class (rows) in its own colors and in the ten re-fillings (columns)."""
    sheet = np.full((CELL * len(CLASSES), CELL * (1 + len(COLORS)), 3), BACKGROUNDS[0], np.uint16)
    for row, name in enumerate(CLASSES):
        for column, color in enumerate((None, *COLORS)):
            drawn = sprite(name, color, fit(name, 30, (CELL - 4, CELL - 4)))
            height, width = drawn.shape
            y, x = row * CELL + (CELL - height) // 2, column * CELL + (CELL - width) // 2
            region = sheet[y : y + height, x : x + width]
            region[:] = (drawn.premultiplied_HW3 + region * drawn.through_HW1 + 127) // 255
    return sheet.astype(np.uint8)


def draw(out: Path = Path("world.png"), seed: int = 0) -> None:
    """Palette on the left, the first scenes of the training split with both kinds of captions on the right."""
    left = palette()
    step_x, step_y = TILE + 32, TILE + TEXT
    picture = Image.new("RGB", (left.shape[1] + 16 + COLUMNS * step_x, max(left.shape[0], ROWS * step_y)), "white")
    picture.paste(Image.fromarray(left), (0, 0))
    pen = ImageDraw.Draw(picture)
    for index in range(COLUMNS * ROWS):
        scene = make_scene(seed, index, split="train")
        x, y = left.shape[1] + 16 + index % COLUMNS * step_x, index // COLUMNS * step_y
        picture.paste(Image.fromarray(scene.image).resize((TILE, TILE), Image.Resampling.NEAREST), (x, y))
        lines = [(text, "black") for text in textwrap.wrap(scene.caption, 32)]
        lines += [(text, "#2050b0") for text in textwrap.wrap(detailed_caption(scene), 32)]
        for number, (text, color) in enumerate(lines):
            pen.text((x, y + TILE + number * 10), text, fill=color, font_size=9)
    picture.quantize(160).save(out, optimize=True)


if __name__ == "__main__":
    run_cli(lambda: run_command(draw, sys.argv[1:], prog="python -m data_pipeline.world.sheet"))
