"""How every figure looks: one palette that reads on light and dark, ordered by model size, and axes with plain ticks.

An SVG carries CSS variables in place of colors, so the same drawing follows the reader's light or dark setting.
"""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Models are ordered, so their colors are: one ramp that falls (light) or rises (dark) in lightness, readable in grey
# and with any color blindness. The largest model has the most contrast to the page.
LIGHT_RAMP = ("#3fa39b", "#2b78ba", "#2b1d63")
DARK_RAMP = ("#7b86e0", "#3fb6c9", "#dff5c2")
LIGHT = {"ink": "#1b1f24", "muted": "#59626e", "grid": "#dfe3e8", "page": "#fdfdfc", "accent": "#b3471d"}
DARK = {"ink": "#e8eaed", "muted": "#a3adb9", "grid": "#30363e", "page": "#14171b", "accent": "#f0946a"}
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")
WIDTHS = {"wide": 7.4, "narrow": 3.75}  # inches: a desktop column and a phone held upright


@dataclass(frozen=True)
class Theme:
    """Colors of one drawing: names to hex, and one color per model from small to large."""

    names: dict[str, str]
    series: tuple[str, ...]

    def __getitem__(self, name: str) -> str:
        return self.names[name]

    def variables(self) -> dict[str, str]:
        """CSS variable (without the dashes) -> hex."""
        return {**self.names, **{f"s{i}": color for i, color in enumerate(self.series)}}


def make_themes(num_series: int) -> tuple[Theme, Theme]:
    """Light and dark, with as many series colors as there are models."""
    return Theme(LIGHT, mix_ramp(LIGHT_RAMP, num_series)), Theme(DARK, mix_ramp(DARK_RAMP, num_series))


def mix_ramp(anchors: Sequence[str], count: int) -> tuple[str, ...]:
    """`count` colors along the anchors, evenly in linear light; a single model takes the last and strongest."""
    stops = np.array([[int(a[i : i + 2], 16) / 255 for i in (1, 3, 5)] for a in anchors]) ** 2.2
    at = np.linspace(0, 1, count) if count > 1 else np.array([1.0])
    mixed = np.stack([np.interp(at, np.linspace(0, 1, len(stops)), stops[:, c]) for c in range(3)], axis=1)
    return tuple("#" + "".join(f"{round(255 * float(v)):02x}" for v in color ** (1 / 2.2)) for color in mixed)


@contextmanager
def use_theme(theme: Theme) -> Iterator[None]:
    """matplotlib set up for one figure. Text is never parsed: a run may be called `$x_1$`."""
    import matplotlib as mpl

    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans", "font.size": 8.5, "text.parse_math": False, "svg.fonttype": "none",
        "svg.hashsalt": "beeline", "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
        "text.color": theme["ink"], "axes.labelcolor": theme["muted"], "axes.edgecolor": theme["muted"],
        "xtick.color": theme["muted"], "ytick.color": theme["muted"], "axes.titlesize": 9, "axes.titleweight": "bold",
        "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
        "axes.grid": True, "grid.color": theme["grid"], "grid.linewidth": 0.6, "axes.axisbelow": True,
        "lines.linewidth": 1.8, "lines.markersize": 4.5, "lines.solid_capstyle": "round", "xtick.major.size": 0,
        "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0, "axes.unicode_minus": True,
    }  # fmt: skip
    with mpl.rc_context(style):
        yield


def render_svg(figure: "Figure", theme: Theme, prefix: str) -> str:
    """The figure as an inline SVG element whose colors are CSS variables and whose ids are unique on the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', lambda m: f"{m[0]}{prefix}-", svg)
    svg = re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font: \1system-ui, 'DejaVu Sans', sans-serif", svg)
    for name, color in theme.variables().items():
        svg = svg.replace(color, f"var(--{name}, {color})")
    return re.sub(
        r'^<svg ([^>]*?)width="[^"]*" ?', r"<svg \1", re.sub(r'^<svg ([^>]*?)height="[^"]*" ?', r"<svg \1", svg)
    )


def wrap_svg(svg: str, light: Theme, dark: Theme) -> str:
    """The SVG as a standalone file, which is light or dark as the reader's system asks."""

    def rules(theme: Theme) -> str:
        return ";".join(f"--{name}:{color}" for name, color in theme.variables().items())

    style = f"<style>svg{{{rules(light)}}}@media (prefers-color-scheme: dark){{svg{{{rules(dark)}}}}}</style>"
    start = svg.index(">") + 1
    return '<?xml version="1.0" encoding="utf-8"?>\n' + svg[:start] + style + svg[start:]


def render_png(figure: "Figure", theme: Theme) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor=theme["page"], metadata={"Software": None})
    return buffer.getvalue()


def choose_log_ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """Round values between low and high for a log axis: decades, then 1-2-5, then evenly spaced round numbers."""
    from matplotlib.ticker import MaxNLocator

    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [m * 10.0**d for d in decades for m in mantissas if low <= m * 10.0**d <= high]
        if 3 <= len(ticks) <= most:
            return ticks
        if len(ticks) > most:
            return ticks[:: math.ceil(len(ticks) / most)] if mantissas == (1,) else _thin_ticks(ticks, most)
    return [float(t) for t in MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= t <= high]


def _thin_ticks(ticks: list[float], most: int) -> list[float]:
    decades = [t for t in ticks if math.isclose(math.log10(t), round(math.log10(t)))]
    return decades if len(decades) >= 2 else ticks[:: math.ceil(len(ticks) / most)]


def set_log_axis(
    ax: "Axes", which: str, values: Sequence[float], form: Any, *, pad: tuple[float, float] = (0.04, 0.04)
) -> None:
    """A log axis around the values, with at most six labelled round ticks and none of matplotlib's minor clutter."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = math.log(min(values)), math.log(max(values))
    span = max(high - low, 0.05)
    low, high = math.exp(low - pad[0] * span), math.exp(high + pad[1] * span)
    ax.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_locator(FixedLocator(choose_log_ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
