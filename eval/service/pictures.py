"""Pictures for the pages: only files that the index lists, decoded and encoded anew, never larger than asked for."""

import functools

from PIL import Image

from eval.report.pictures import open_picture, webp
from eval.service.gallery import Sheet
from infra.errors import UserError

SheetKey = tuple[int, int, int]  # columns, tile width, tile height


@functools.lru_cache(maxsize=512)
def thumbnail(uri: str, width: int) -> bytes:
    """The picture as WEBP, at most `width` pixels wide; a small one keeps its own pixels, without loss."""
    image = open_picture(uri)
    small = image.width <= width
    if not small:
        image.thumbnail((width, width * 8), Image.Resampling.LANCZOS)
    return webp(image, lossless=small and image.width * image.height <= 2**20)


@functools.lru_cache(maxsize=512)
def tile(uri: str, sheet: SheetKey, index: int) -> bytes:
    """One tile of a gallery sheet, cut out."""
    columns, width, height = sheet
    image, left, top = open_picture(uri), index % columns * width, index // columns * height
    if left + width > image.width or top + height > image.height:
        raise UserError(f"{uri}: no tile {index} in a picture of {image.width} x {image.height} pixels")
    return webp(image.crop((left, top, left + width, top + height)), lossless=width <= 512)


def layout(sheet: Sheet) -> SheetKey:
    return sheet.columns, sheet.tile_width, sheet.tile_height
