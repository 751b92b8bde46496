"""Decoding of images: size limits, rotation, sRGB, the one crop rule, and pixels as networks read them."""
# Shapes: B batch, H and W height and width in pixels.

import importlib.util
import io
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

CROP_RULE = "cover-center/1"  # raise the number when pixels change
MAX_PIXELS = 178_956_970  # a quarter of a gigabyte of RGB; Pillow's own warning threshold is half of that
BACKGROUND = (255, 255, 255)
_MAY_END_IN_ZEROS = (b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\x93NUMPY", b"P4", b"P5", b"P6")  # uncompressed
# Of pictures these alone have an end of their own: black pixels at the end of the others are zeros.
_COMPRESSED = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "JPEG2000", "AVIF", "HEIF", "JXL")
_LAST_BYTES = (b"\xff\xd9", b"IEND\xaeB`\x82")  # of JPEG (2000) and PNG
_FEW_ZEROS = 16  # that data of other formats may end in
# Formats whose decoders have copyleft parts or large libraries: a user installs them, this project never does.
_PLUGINS: tuple[tuple[str, str, tuple[tuple[int, bytes], ...]], ...] = (
    ("HEIC", "pillow-heif", tuple((4, b"ftyp" + brand) for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"))),
    ("JPEG XL", "pillow-jxl-plugin", ((0, b"\xff\x0a"), (4, b"JXL \r\n\x87\n"))),
)
_NUM_MAGIC = 16


class ImageError(Exception):
    """An image that cannot be used; `status` is the row's status."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def decode(file: BinaryIO, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB image in sRGB: EXIF rotation and the embedded profile applied, transparency over white, the first frame
    of an animation.

    Eight bits are kept. Sixteen are divided by 257. Floats and 32-bit integers say by their largest value what white
    is: 1, 255 or 65,535; other ranges, NaN and infinities are refused as `bad_range`. ImageError otherwise.
    """
    _register_plugins()
    start = file.read(_NUM_MAGIC)
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
            width, height = image.size
            # the header alone decides: a bomb is never unpacked
            if width * height > max_pixels:
                raise ImageError("too_large", f"{width}x{height} pixels, at most {max_pixels:,} are unpacked")
            image.load()
            if image.format in _COMPRESSED:
                _refuse_hole(file)
            return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", str(error)) from error
    except UnidentifiedImageError as error:
        raise _name_format(start) from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, KeyError, MemoryError) as error:
        # what Pillow's decoders raise on damaged files is not one family
        raise ImageError("corrupt", f"{type(error).__name__}: {error}"[:200]) from error


def describe_picture(file: BinaryIO) -> tuple[str, list[str]]:
    """("JPEG RGB", traits that `decode` settles) as the header says; unknown formats are "no picture"."""
    _register_plugins()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
            traits = {
                "turned by EXIF": image.getexif().get(ExifTags.Base.Orientation, 1) != 1,
                "transparent": image.has_transparency_data,
                "animated": getattr(image, "n_frames", 1) > 1,
                "with a profile": bool(image.info.get("icc_profile")),
            }
            return f"{image.format} {image.mode}", [name for name, true in traits.items() if true]
    except (Image.DecompressionBombError, OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, KeyError):
        return "no picture", []


def count_hole(data: bytes) -> int:
    """Zero bytes at the end of a picture's or text's data that its format does not have: what an unfinished download
    or a file allocated in advance leaves. Uncompressed formats may end in zeros, and cameras pad whole JPEGs."""
    if not data or data[-1] or data.startswith(_MAY_END_IN_ZEROS):
        return 0
    written = data.rstrip(b"\0")
    zeros = len(data) - len(written)
    return 0 if zeros < _FEW_ZEROS or written.endswith(_LAST_BYTES) else zeros


def _refuse_hole(file: BinaryIO) -> None:
    """ImageError for a file that ends in zeros: libjpeg would decode them to a grey area and report nothing."""
    file.seek(0, io.SEEK_END)
    size = file.tell()
    file.seek(max(0, size - 4096))
    tail = file.read()
    if tail and not tail[-1]:
        file.seek(0)
        zeros = count_hole(file.read())
        if zeros:
            raise ImageError("corrupt", f"the last {zeros:,} of {size:,} bytes are zeros: an unfinished download?")


@lru_cache(maxsize=1)
def _register_plugins() -> None:
    """Register the decoders of formats whose plugins are installed (HEIC, JPEG XL)."""
    if importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
    if importlib.util.find_spec("pillow_jxl"):
        importlib.import_module("pillow_jxl")


def _name_format(start: bytes) -> ImageError:
    """The error for an image that Pillow does not open; names the plugin that would open it, if one is known."""
    for name, plugin, marks in _PLUGINS:
        if any(start[at : at + len(mark)] == mark for at, mark in marks):
            return ImageError("no_decoder", f"{name}: `pip install {plugin}` lets Pillow read it")
    return ImageError("corrupt", "not an image format that Pillow knows")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert("RGB") would clip 16 bits instead of scaling them
        values = np.asarray(image)
        gray = _with_profile(Image.fromarray((values.astype(np.float32) / 257).round().astype(np.uint8)), image)
        if "transparency" in image.info:
            alpha = Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
            gray = _with_profile(Image.merge("LA", (gray, alpha)), image)
        image = gray
    elif image.mode in ("F", "I"):
        image = _with_profile(_scale_range(np.asarray(image, np.float64)), image)
    if image.mode in ("La", "RGBa"):  # premultiplied: Pillow knows one way back for each
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        above = _with_profile(image.convert("RGBA"), image)
        alpha = above.getchannel("A")
        # gray with alpha has a profile of gray
        above = _to_srgb(_with_profile(above.getchannel("R"), image) if image.mode in ("L", "LA") else above)
        above.putalpha(alpha)
        below = Image.new("RGBA", above.size, (*BACKGROUND, 255))
        return Image.alpha_composite(below, above).convert("RGB")
    if image.mode == "P":
        image = _with_profile(image.convert("RGB"), image)
    return _to_srgb(image)


def _with_profile(image: Image.Image, original: Image.Image) -> Image.Image:
    image.info = {key: value for key, value in original.info.items() if key == "icc_profile"}
    return image


def _scale_range(values: np.ndarray) -> Image.Image:
    if not np.isfinite(values).all():
        raise ImageError("bad_range", "pixels that are NaN or infinite")
    smallest, largest = float(values.min(initial=0)), float(values.max(initial=0))
    if 1 < largest < 2:  # a scale to 1 that shoots over it would be black in one to 255
        raise ImageError("bad_range", f"pixels up to {largest:g}: white may be 1 or 255")
    white = next((white for white in (1, 255, 65535) if largest <= white), None)
    if white is None or smallest < 0:
        raise ImageError("bad_range", f"pixels from {smallest:g} to {largest:g}: expected 0 to 1, 255 or 65535")
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


def _to_srgb(image: Image.Image) -> Image.Image:
    """RGB in sRGB by the image's own profile; one that does not fit its mode or is broken counts as absent."""
    profile = image.info.get("icc_profile")
    mode = {"RGBA": "RGB", "RGBX": "RGB"}.get(image.mode, image.mode)
    transform = _profile_transform(profile, mode) if profile else None
    if transform is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    converted = ImageCms.applyTransform(image if image.mode == mode else image.convert(mode), transform)
    assert converted is not None
    return converted


@lru_cache(maxsize=64)
def _profile_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None where the profile means sRGB, whose pixels stay exact, or cannot be used.

    Relative colorimetric with black point compensation is what browsers do.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}.get(mode):
            return None
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )  # fmt: skip
        return None if mode != "CMYK" and _changes_nothing(transform, mode) else transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Does the transform change no color of a grid over all colors by more than one level (of 255)? The name of a
    profile proves nothing."""
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    colors = Image.fromarray(grid if mode == "RGB" else grid[..., 0])
    converted = np.asarray(ImageCms.applyTransform(colors, transform)).astype(np.int16)
    return int(np.abs(converted - np.asarray(colors.convert("RGB")).astype(np.int16)).max()) <= 1


def cover_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image scaled to cover width x height, then cropped around the center; unchanged if it has that size."""
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
