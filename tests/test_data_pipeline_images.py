"""One decoder for every picture: each mode that Pillow knows, profiles, deep pixels, holes, foreign formats."""

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from data_pipeline.images import ImageError, count_hole, decode
from data_pipeline.sources.registry import open_source

GRADIENT = np.linspace(0, 255, 64 * 48 * 3).reshape(48, 64, 3).astype(np.uint8)
# Saved as what keeps the mode; the color that (200, 100, 50) has in it is what must come back.
MODES = {
    "1": ("PNG", 255), "L": ("PNG", 120), "P": ("PNG", None), "RGB": ("PNG", (200, 100, 50)), "LA": ("PNG", (120, 255)),
    "RGBA": ("PNG", (200, 100, 50, 255)), "CMYK": ("TIFF", (55, 155, 205, 0)), "I;16": ("PNG", 120 * 257),
    "I": ("TIFF", 120), "F": ("TIFF", 120.0), "YCbCr": ("TIFF", (124, 86, 182)), "LAB": ("TIFF", None),
    "PA": (None, None), "HSV": (None, (14, 191, 200)), "La": (None, (120, 255)), "RGBa": (None, (200, 100, 50, 255)),
    "RGBX": (None, (200, 100, 50, 0)), "I;16B": (None, 120 * 257),
}  # fmt: skip


def save(image: Image.Image, kind: str = "PNG", **options: object) -> io.BytesIO:
    out = io.BytesIO()
    image.save(out, kind, **options)
    out.seek(0)
    return out


def read(data: bytes | io.BytesIO) -> np.ndarray:
    return np.asarray(decode(data if isinstance(data, io.BytesIO) else io.BytesIO(data)))


def make_profile(red: tuple, green: tuple, blue: tuple, gamma: float) -> bytes:
    """A matrix profile of three primaries under D65, adapted to D50 by Bradford (ICC.1:2010), as ImageCms reads it."""

    def xyz(x: float, y: float) -> np.ndarray:
        return np.array([x / y, 1, (1 - x - y) / y])

    white = xyz(0.3127, 0.3290)
    primaries = np.stack([xyz(*color) for color in (red, green, blue)], axis=1)
    matrix = primaries * np.linalg.solve(primaries, white)
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d50 = np.array([0.9642, 1.0, 0.8249])
    adapt = np.linalg.inv(bradford) @ np.diag(bradford @ d50 / (bradford @ white)) @ bradford
    columns = adapt @ matrix

    def fixed(value: float) -> bytes:
        return round(value * 65536).to_bytes(4, "big", signed=True)

    def tag(kind: bytes, body: bytes) -> bytes:
        data = kind + bytes(4) + body
        return data + bytes(-len(data) % 4)

    curve = tag(b"curv", (1).to_bytes(4, "big") + int(gamma * 256).to_bytes(2, "big"))
    text = b"a wide gamut\0"
    tags = {
        b"desc": tag(b"desc", len(text).to_bytes(4, "big") + text + bytes(78)),
        b"wtpt": tag(b"XYZ ", b"".join(map(fixed, d50))),
        **{bytes([name]) + b"XYZ": tag(b"XYZ ", b"".join(map(fixed, columns[:, n]))) for n, name in enumerate(b"rgb")},
        b"rTRC": curve, b"gTRC": curve, b"bTRC": curve,
    }  # fmt: skip
    offset, table, body = 128 + 4 + 12 * len(tags), len(tags).to_bytes(4, "big"), b""
    for name, data in tags.items():
        table += name + (offset + len(body)).to_bytes(4, "big") + len(data).to_bytes(4, "big")
        body += data
    header = bytearray(128)
    header[0:4] = (128 + len(table) + len(body)).to_bytes(4, "big")
    header[8:12], header[12:24] = b"\x02\x40\0\0", b"mntrRGB XYZ "
    header[36:40], header[68:80] = b"acsp", b"".join(map(fixed, d50))
    return bytes(header) + table + body


P3 = make_profile((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), 2.2)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_is_read_or_refused_with_a_status(mode):
    kind, color = MODES[mode]
    if mode in ("P", "PA", "LAB"):
        image = Image.new("RGB", (40, 30), (200, 100, 50))
        if mode == "LAB":
            transform = ImageCms.buildTransform(
                ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
            )
            image = ImageCms.applyTransform(image, transform)
        else:
            image = image.quantize(4).convert(mode)
    else:
        image = Image.new(mode, (40, 30), color)
    if kind is None:  # a mode that only plugins and code make: the same function as behind `decode`
        from data_pipeline.images import _to_rgb

        found = np.asarray(_to_rgb(image))
    else:
        stored = save(image, kind)
        assert Image.open(stored).mode == mode
        stored.seek(0)
        found = read(stored)
    assert found.shape == (30, 40, 3)
    assert found.dtype == np.uint8
    gray = {"1": 255, "L": 120, "LA": 120, "La": 120, "I": 120, "F": 120, "I;16": 120, "I;16B": 120}.get(mode)
    expected = (gray,) * 3 if gray is not None else (200, 100, 50)
    tolerance = 4  # eight bits of LAB and YCbCr
    assert np.abs(found.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1, np.float32), (255, np.float32), (65535, np.float32), (65535, np.int32)]
)
def test_floats_and_large_integers_are_scaled_by_their_range(scale, dtype):
    values = (np.linspace(0, 1, 64 * 64).reshape(64, 64) * scale).astype(dtype)
    found = read(save(Image.fromarray(values), "TIFF"))
    assert np.abs(found[..., 0].astype(float) - np.linspace(0, 255, 64 * 64).reshape(64, 64)).max() <= 1


@pytest.mark.parametrize("values", [[-1.0, 0.5], [0.0, 1.02], [0.0, 1e9], [0.0, np.nan], [0.0, np.inf]])
def test_ranges_that_say_no_white_are_refused(values):
    image = Image.fromarray(np.resize(np.array(values, np.float32), (8, 8)))
    with pytest.raises(ImageError) as error:
        read(save(image, "TIFF"))
    assert error.value.status == "bad_range"


def test_sixteen_bits_keep_their_darkness():
    """A night picture whose largest value is 200 of 65,535 is black, not a picture of eight bits."""
    found = read(save(Image.fromarray(np.full((8, 8), 200, np.uint16))))
    assert found.max() <= 1


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda rgb: Image.fromarray(rgb), "PNG"),
        (lambda rgb: Image.fromarray(np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])), "PNG"),
        (lambda rgb: Image.fromarray(rgb), "WEBP"),
    ],
)
def test_a_profile_is_converted_to_srgb(make, kind):
    """Display P3's green in sRGB, by arithmetic of our own: linear light, matrices of both spaces, clipped."""
    rgb = np.zeros((16, 16, 3), np.uint8)
    rgb[:] = (60, 160, 90)
    found = read(save(make(rgb), kind, icc_profile=P3, **({"lossless": True} if kind == "WEBP" else {})))
    linear = (rgb[0, 0] / 255) ** 2.2
    to_srgb = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])
    light = (to_srgb @ linear).clip(0, 1)
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(found[0, 0] - expected).max() <= 3
    assert np.abs(found[0, 0].astype(int) - rgb[0, 0]).max() > 8


def make_gray_profile(gamma: float) -> bytes:
    """A profile of gray: its curve alone says what a value means."""
    rgb = make_profile((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), gamma)
    count = int.from_bytes(rgb[128:132], "big")
    entries = [rgb[132 + 12 * n : 144 + 12 * n] for n in range(count)]
    kept = [(b"kTRC" if entry[:4] == b"rTRC" else entry[:4]) + entry[4:] for entry in entries]
    kept = [entry for entry in kept if entry[:4] in (b"desc", b"wtpt", b"kTRC")]
    table = len(kept).to_bytes(4, "big") + b"".join(kept)
    return (
        rgb[:16] + b"GRAY" + rgb[20:128] + table + bytes(132 + 12 * count - 128 - len(table)) + rgb[132 + 12 * count :]
    )


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_a_profile_of_gray_counts_in_every_gray_mode(mode):
    """Linear light of 60/255 in sRGB's curve."""
    color = {"L": 60, "LA": (60, 255), "I;16": 60 * 257}[mode]
    found = read(save(Image.new(mode, (8, 8), color), "PNG", icc_profile=make_gray_profile(1.0)))
    expected = 255 * (1.055 * (60 / 255) ** (1 / 2.4) - 0.055)
    assert np.abs(found - expected).max() <= 3


def test_deep_gray_with_a_transparent_value_lies_over_white():
    values = np.full((8, 8), 40_000, np.uint16)
    values[:, :4] = 1000
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    data = out.getvalue()
    chunk = b"tRNS" + (1000).to_bytes(2, "big")
    put = (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    at = data.index(b"IDAT") - 4
    found = read(data[:at] + put + data[at:])
    assert (found[:, :4] == 255).all()
    assert (found[:, 4:] == 156).all()


@pytest.mark.parametrize("kind", ["BMP", "DIB", "TIFF", "PPM", "DDS", "SGI", "TGA"])
def test_black_pictures_of_formats_without_an_end_are_read(kind):
    options = {"big_tiff": True} if kind == "TIFF" else {}
    assert read(save(Image.new("RGB", (64, 64)), kind, **options)).max() == 0


def test_srgb_itself_and_broken_profiles_change_no_pixel():
    image = Image.fromarray(GRADIENT)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (None, srgb, b"no profile", P3[:200]):
        options = {"icc_profile": profile} if profile else {}
        assert (read(save(image, "PNG", **options)) == GRADIENT).all()


def test_transparent_pixels_lie_over_white_with_the_profile_applied():
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :4] = (60, 160, 90, 255)
    found = read(save(Image.fromarray(rgba), "PNG", icc_profile=P3))
    assert (found[:, 4:] == 255).all()
    opaque = read(save(Image.fromarray(rgba[..., :3]), "PNG", icc_profile=P3))
    assert (found[:, :4] == opaque[:, :4]).all()


@settings(max_examples=40, deadline=None)
@given(st.floats(0.15, 0.95), st.sampled_from(["JPEG", "WEBP", "JPEG2000", "AVIF"]))
def test_a_picture_whose_end_is_zeros_is_corrupt(share, kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    whole = save(Image.fromarray(noise), kind).getvalue()
    cut = whole[: int(len(whole) * share)]
    with pytest.raises(ImageError) as error:
        read(cut + bytes(len(whole) - len(cut)))
    assert error.value.status == "corrupt"


def test_padding_behind_a_whole_jpeg_and_black_bitmaps_are_no_holes():
    jpeg = save(Image.fromarray(GRADIENT), "JPEG").getvalue()
    assert (read(jpeg + bytes(4000)) == read(jpeg)).all()
    assert read(save(Image.new("RGB", (40, 40)), "BMP")).max() == 0
    assert count_hole(b"text") == count_hole(b"") == 0
    assert count_hole(b"text" + bytes(100)) == 100


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(range(100)), "pillow-heif"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(range(100)), "pillow-jxl-plugin"),
        (b"\xff\x0a" + bytes(range(100)), "pillow-jxl-plugin"),
    ],
)
def test_formats_that_need_a_plugin_say_which(data, word):
    with pytest.raises(ImageError, match=word) as error:
        read(data)
    assert error.value.status == "no_decoder"


@pytest.mark.parametrize("suffix", ["j2k", "jpx", "apng", "dib", "tga", "ppm", "pgm", "pbm", "pnm"])
def test_further_names_that_pillow_reads_are_images_of_a_folder(tmp_path, suffix):
    mode = {"pgm": "L", "pbm": "1"}.get(suffix, "RGB")
    format = {"apng": "PNG", "jpx": "JPEG2000", "pnm": "PPM"}.get(suffix)
    Image.new(mode, (40, 40), 1 if mode == "1" else "white").save(tmp_path / f"a.{suffix}", format=format)
    (tmp_path / "a.txt").write_text("white")
    source = open_source(f"folder:{tmp_path}")
    [row] = [row for unit in source.list_units() for row in source.read_rows(unit)]
    assert np.asarray(decode(io.BytesIO(row.image))).min() > 250
