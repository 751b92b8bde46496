"""Images as they come in: decoding with guards, upright and RGB, the one crop rule, and what networks read."""
# Shapes: B batch, H and W height and width in pixels.

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

CROP_RULE = "cover-center/1"  # raise the number when pixels change
MAX_PIXELS = 178_956_970  # a quarter of a gigabyte of RGB; Pillow's own warning threshold is half of that
BACKGROUND = (255, 255, 255)


class ImageError(Exception):
    """Why an image is not taken; `status` is the word that gets counted."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def decode(file: BinaryIO, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB image, EXIF rotation applied, transparency over white, the first frame of an animation."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
            width, height = image.size
            # the header alone decides: a bomb is never unpacked
            if width * height > max_pixels:
                raise ImageError("too_large", f"{width}x{height} pixels, at most {max_pixels:,} are unpacked")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", str(error)) from error
    except UnidentifiedImageError as error:
        raise ImageError("corrupt", "not an image format that Pillow knows") from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, KeyError, MemoryError) as error:
        # what Pillow's decoders raise on damaged files is not one family
        raise ImageError("corrupt", f"{type(error).__name__}: {error}"[:200]) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):  # convert("RGB") would clip 16 bits instead of scaling them
        values = np.asarray(image, np.float64)
        scale = 255 / 65535 if values.max(initial=0) > 255 else 1.0
        return Image.fromarray((values.clip(0) * scale).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        above = image.convert("RGBA")
        below = Image.new("RGBA", above.size, (*BACKGROUND, 255))
        return Image.alpha_composite(below, above).convert("RGB")
    return image.convert("RGB")


def cover_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scaled so that it covers width x height, then cut around the center. The identity when the size is right."""
    if image.size == (width, height):
        return image
    scale = max(width / image.width, height / image.height)
    # the box is in source pixels: one resampling does both
    box_width, box_height = width / scale, height / scale
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def stack_pixels(images: Sequence[np.ndarray]) -> "Tensor":
    """uint8 images (H, W, 3) of one size as networks read them: (B, 3, H, W) in [-1, 1], fp32, channels last."""
    import torch

    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def encode_png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
