"""Pictures for the pages: only files that the index lists, decoded and encoded anew, never larger than asked for."""

import functools
import io
from typing import TYPE_CHECKING

from eval.service.gallery import Sheet
from infra import storage
from infra.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SheetKey = tuple[int, int, int]  # columns, tile width, tile height
MOST_BYTES = 200 * 2**20  # of a file that is opened at all
MOST_PIXELS = 150e6


@functools.lru_cache(maxsize=512)
def thumbnail(uri: str, width: int) -> bytes:
    """The picture as WEBP, at most `width` pixels wide; a small one keeps its own pixels, without loss."""
    from PIL import Image

    image = _open(uri)
    small = image.width <= width
    if not small:
        image.thumbnail((width, width * 8), Image.Resampling.LANCZOS)
    return _webp(image, lossless=small and image.width * image.height <= 2**20)


@functools.lru_cache(maxsize=512)
def tile(uri: str, sheet: SheetKey, index: int) -> bytes:
    """One tile of a gallery sheet, cut out."""
    columns, width, height = sheet
    image, left, top = _open(uri), index % columns * width, index // columns * height
    if left + width > image.width or top + height > image.height:
        raise UserError(f"{uri}: no tile {index} in a picture of {image.width} x {image.height} pixels")
    return _webp(image.crop((left, top, left + width, top + height)), lossless=width <= 512)


def layout(sheet: Sheet) -> SheetKey:
    return sheet.columns, sheet.tile_width, sheet.tile_height


def _open(uri: str) -> "Picture":
    from PIL import Image

    if storage.size(uri) > MOST_BYTES:
        raise UserError(f"{uri}: over {MOST_BYTES >> 20} MB, too large for a page")
    try:
        with Image.open(io.BytesIO(storage.read_bytes(uri)), formats=("PNG", "JPEG", "WEBP")) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise UserError(f"{uri}: {opened.width} x {opened.height} pixels, too many for a page")
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{uri}: not a readable picture") from error


def _webp(image: "Picture", *, lossless: bool) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88, lossless=lossless, method=2)
    return buffer.getvalue()
