"""Draws the few-step page's figures: quality against steps and time, flows by t, paths, strips of pictures."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from eval.report.fewstep_page import PATHS, FewStepChart, FewStepPage, PathsPanel, Strip
from eval.report.labels import add_legend, choose_color
from eval.report.pictures import open_picture
from eval.report.plots import Draw, RenderedFigure, draw_line, make_panels, render
from eval.report.style import MARKERS, WIDTHS, Theme, set_log_axis
from eval.report.text import format_count
from infra.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_few_steps(page: FewStepPage) -> list[RenderedFigure]:
    """The figures that the page has data for."""
    count = max(len(page.found.lines), 1)
    return [
        render(name, draw, alt=alt, caption=caption, num_series=count) for name, draw, alt, caption in _specify(page)
    ]


def _specify(page: FewStepPage) -> Iterator[tuple[str, Draw, str, str]]:
    for chart in page.charts:
        yield chart.name, plot_chart(chart), chart.alt, chart.caption
    if page.paths:
        yield "fewstep_paths", plot_paths(page.paths), "Paths from noise to data beside their straight way.", PATHS
    strips = cut_strips(page.strips)
    if strips:
        text = "The same caption and noise in every row and column: " + "; ".join(f"\u201c{p}\u201d" for p, _ in strips)
        alt = "Pictures of the same noise by number of steps."
        yield "fewstep_strips", plot_strips(strips, page.found.steps), alt, text


def plot_chart(chart: FewStepChart) -> Draw:
    """A panel per figure, a line per arm and guidance, one legend; steps and seconds on a log axis."""

    def draw(theme: Theme, narrow: bool) -> "Figure":
        figure, axes = make_panels(len(chart.panels), narrow, columns=2, height=2.5)
        for ax, panel in zip(axes, chart.panels):
            for line in panel.lines:
                draw_line(ax, line, theme)
                if line.low:
                    ax.vlines(line.x, line.low, line.high, color=choose_color(theme, line.order), lw=1.2, alpha=0.6)
            if chart.axis != "t":
                form = format_count if chart.axis == "steps" else lambda value: f"{value:.2g}"
                set_log_axis(ax, "x", [x for line in panel.lines for x in line.x], form)
            ax.margins(y=0.12)
            if panel.from_zero:
                ax.set_ylim(0, max(ax.get_ylim()[1], 0.1))
            elif chart.axis == "t":
                ax.set_ylim(bottom=0)
            ax.set_title(panel.title)
            ax.set_xlabel(panel.xlabel)
        add_legend(figure, max((panel.lines for panel in chart.panels), key=len), theme)
        return figure

    return draw


def plot_paths(panels: Sequence[PathsPanel]) -> Draw:
    """All panels share their scale."""

    def draw(theme: Theme, narrow: bool) -> "Figure":
        figure, axes = make_panels(len(panels), narrow, columns=3, height=1.9)
        high = max(max(map(abs, path)) for panel in panels for path in panel.aside)
        low = min(min(path) for panel in panels for path in panel.aside)
        for ax, panel in zip(axes, panels):
            color, marker = choose_color(theme, panel.order), MARKERS[panel.order % len(MARKERS)]
            ax.plot([0, 1], [0, 0], color=theme["muted"], lw=0.8, ls=(0, (4, 2)), zorder=1)
            for along, aside in zip(panel.along, panel.aside):
                ax.plot(along, aside, color=color, lw=1.1, zorder=2)
                every = max(1, (len(along) - 1) // 8)
                ax.plot(along[::every], aside[::every], color=color, lw=0, marker=marker, ms=2.8, zorder=3)
            ax.set_ylim(min(1.15 * low, -0.08 * high) or -0.01, 1.15 * high or 0.01)
            ax.set_title(panel.label, fontsize=8)
            ax.set_xlabel("along the way")
        axes[0].set_ylabel("off the way")
        return figure

    return draw


Tiles = dict[int, np.ndarray]  # by number of steps
DrawnStrips = list[tuple[str, list[tuple[str, Tiles]]]]  # prompt -> line -> tiles


def cut_strips(strips: Sequence[Strip]) -> DrawnStrips:
    """The tiles of each strip; rows whose picture cannot be read are left out."""
    pictures: dict[str, np.ndarray] = {}
    for uri in {row.picture for strip in strips for row in strip.rows}:
        try:
            pictures[uri] = np.asarray(open_picture(uri))
        except UserError:
            continue
    drawn = []
    for strip in strips:
        block = []
        for row in strip.rows:
            if (picture := pictures.get(row.picture)) is not None:
                height, width = picture.shape[0] // row.sheet[0], picture.shape[1] // row.sheet[1]
                left = strip.column * width
                tiles = {
                    steps: picture[place * height : (place + 1) * height, left : left + width]
                    for steps, place in row.places.items()
                }
                block.append((row.label, tiles))
        if block:
            drawn.append((strip.prompt, block))
    return drawn


def plot_strips(strips: DrawnStrips, steps: Sequence[int]) -> Draw:
    """A block per prompt: a row per line, a column per number of steps."""

    def draw(theme: Theme, narrow: bool) -> "Figure":
        import matplotlib.pyplot as plt

        rows = [(label, tiles) for _, block in strips for label, tiles in block]
        width = WIDTHS["narrow" if narrow else "wide"]
        named = 0.24 if not narrow else 0.34  # the share of the width that names take
        side = width * (1 - named) / len(steps)
        figure, grid = plt.subplots(
            len(rows), len(steps), figsize=(width, side * len(rows) + 0.25), squeeze=False,
            gridspec_kw={"left": named, "right": 1, "top": 1 - 0.25 / (side * len(rows) + 0.25), "bottom": 0,
                         "wspace": 0.03, "hspace": 0.03},
        )  # fmt: skip
        for axes, (label, tiles) in zip(grid, rows):
            for ax, many in zip(axes, steps):
                ax.axis("off")
                if many in tiles:
                    ax.imshow(tiles[many], interpolation="nearest")
            axes[0].text(
                -0.08, 0.5, label.replace(", guidance ", "\nguidance "), transform=axes[0].transAxes, ha="right",
                va="center", fontsize=6.5 if narrow else 7.5, color=theme["ink"],
            )  # fmt: skip
        for ax, many in zip(grid[0], steps):
            ax.set_title(f"{many}" if narrow else f"{many} step{'' if many == 1 else 's'}", fontsize=7.5, loc="center")
        return figure

    return draw
