"""Image files in and out: one reader that names a bad file, and labelled grids."""

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.images import ImageError, decode
from infra import storage
from infra.errors import UserError

LABEL_HEIGHT = 16


def read_picture(path: str | Path) -> np.ndarray:
    """uint8 RGB as the data pipeline reads it: upright, in sRGB, deep pixels scaled, transparency over white."""
    try:
        with Path(path).open("rb") as file:
            return np.asarray(decode(file))
    except (OSError, ImageError) as error:
        raise UserError(f"cannot read image {path}: {error}") from error


class PictureFile(Protocol):
    """Anything with the path of a picture."""

    @property
    def path(self) -> Path: ...


FileT = TypeVar("FileT", bound=PictureFile)


def read_pictures(files: Sequence[FileT], unreadable: list[str]) -> tuple[list[FileT], list[np.ndarray]]:
    """The files that can be read, and their pictures; what is wrong with the others joins `unreadable`."""
    kept: list[FileT] = []
    images: list[np.ndarray] = []
    for file in files:
        try:
            images.append(read_picture(file.path))
            kept.append(file)
        except UserError as error:
            unreadable.append(str(error))
    return kept, images


def refuse_unreadable(unreadable: Sequence[str], total: int, allow_partial: bool) -> None:
    """UserError, or (when a partial set is allowed) a line that says how many were left out."""
    if len(unreadable) == total:
        raise UserError(f"none of {total} images can be read, e.g. {unreadable[0]}")
    if unreadable and not allow_partial:
        raise UserError(
            f"{len(unreadable)} of {total} images unreadable, e.g. {unreadable[0]}; --allow-partial leaves them out"
        )
    if unreadable:
        print(f"{len(unreadable)} of {total} images could not be read", file=sys.stderr)


def refuse_target(path: str | Path) -> None:
    """UserError where a picture cannot be written: to be asked before minutes are spent on drawing it."""
    target = Path(path)
    if target.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"cannot write {path}: unknown kind of picture; use a name that ends in .png or .jpg")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: its folder cannot be made ({reason}); choose another place") from error
    if target.is_dir() or not os.access(target.parent, os.W_OK):
        raise UserError(f"cannot write {path}: a folder, or in one that is not yours to write to; choose another place")


def write_picture(path: str | Path, image: np.ndarray) -> None:
    """uint8 H x W x 3 (or H x W) in the format of the name, whole or not at all: a torn one would count as drawn."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind is None:
        raise UserError(f"cannot write {path}: unknown kind of picture; use a name that ends in .png or .jpg")
    held = io.BytesIO()
    Image.fromarray(image).save(held, format=kind)
    storage.write_bytes(str(path), held.getvalue())


def make_grid(rows: Sequence[tuple[str, Sequence[np.ndarray]]], *, scale: int = 1) -> np.ndarray:
    """One cell per row of images with its label underneath; cells stand beside each other, 1200 pixels at the most."""
    font = ImageFont.load_default()
    cells = [_draw_cell(label, images, scale, font) for label, images in rows]
    width, height = max(c.width for c in cells), max(c.height for c in cells)
    across = min(max(1, 1200 // width), len(cells))
    down = -(-len(cells) // across)
    sheet = Image.new("RGB", (across * (width + 4) + 4, down * (height + 4) + 4), "white")
    for index, cell in enumerate(cells):
        sheet.paste(cell, (4 + index % across * (width + 4), 4 + index // across * (height + 4)))
    return np.asarray(sheet)


def _draw_cell(
    label: str, images: Sequence[np.ndarray], scale: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> Image.Image:
    pictures = [
        Image.fromarray(i).resize((i.shape[1] * scale, i.shape[0] * scale), Image.Resampling.NEAREST) for i in images
    ]
    width = sum(p.width for p in pictures) + 2 * (len(pictures) - 1)
    lines = _wrap(label, width, font)
    height = max(p.height for p in pictures)
    cell = Image.new("RGB", (width, height + LABEL_HEIGHT * len(lines)), "white")
    left = 0
    for picture in pictures:
        cell.paste(picture, (left, 0))
        left += picture.width + 2
    draw = ImageDraw.Draw(cell)
    for number, line in enumerate(lines):
        draw.text((1, height + 2 + LABEL_HEIGHT * number), line, fill="#222222", font=font)
    return cell


def _wrap(label: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, most: int = 3) -> list[str]:
    """The label in at most `most` lines of `width` pixels; the last one is cut with an ellipsis."""
    lines = [""]
    for word in label.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]}..."]
    return lines
