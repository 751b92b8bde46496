"""Figures of the few-step page: quality against steps and time, flows by t, drawn paths, strips of pictures."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from eval.report.fewsteps import COLUMNS, QUALITY, FewStepLine, FewSteps, find_flow, read_sheet
from eval.report.labels import PlotLine, add_legend, choose_color
from eval.report.pictures import open_picture
from eval.report.plots import Draw, RenderedFigure, draw_line, make_panels, render
from eval.report.runs import RunFolder
from eval.report.style import MARKERS, WIDTHS, Theme, set_log_axis
from eval.report.text import format_count
from eval.studies.fewstep_sheet import DrawnFlow, FewStepSheet
from infra.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panels = Sequence[tuple[str, Sequence[PlotLine]]]
MOST_PROMPTS, MOST_ROWS = 3, 8  # of a figure of strips


def draw_few_steps(found: FewSteps, runs: Sequence[RunFolder]) -> list[RenderedFigure]:
    """The figures that the page has room and data for."""
    sheets = {run.name: sheet for run in runs if (sheet := read_sheet(run))}
    count = max(len(found.lines), 1)
    return [
        render(name, draw, alt=alt, caption=caption, num_series=count)
        for name, draw, alt, caption in (*_specify_curves(found), *_specify_sheets(found, sheets))
    ]


def _specify_curves(found: FewSteps) -> Iterator[tuple[str, Draw, str, str]]:
    quality = [name for name in QUALITY if name in found.figures]
    by_steps = [(COLUMNS[name], _collect(found, name)) for name in quality]
    if by_steps:
        text = "The same noise for every line. Intervals stand in the table."
        yield "fewstep_quality", plot_curves(by_steps, "steps"), "Quality against the number of steps.", text
    for time in ("seconds/pictures_batch", "seconds/pictures"):
        timed = [(COLUMNS[name], lines) for name in quality[:2] if (lines := _collect(found, name, against=time))]
        if timed:
            what = "each picture of a batch" if time.endswith("_batch") else "one picture alone"
            text = f"Each dot is a number of steps. Time of {what} with the decoder; text features are made before."
            draw = plot_curves(timed, "seconds per picture", count=False)
            yield "fewstep_time", draw, "Quality against the time of a picture.", text
            break
    flows = [
        (title, lines)
        for name, title in (("straightness", "|Z1 - Z0 - v|\u00b2 per number"), ("bend", "bend |dv/dt|"))
        if (lines := _collect_flow(found, name))
    ]
    if flows:
        text = "Mean over paths, exact up to the solver's tolerance. Flat at 0: straight paths at constant speed."
        yield (
            "fewstep_flow", plot_curves(flows, "t (0 data, 1 noise)", log=False),
            "How far the velocity is from the straight way, by t.", text,
        )  # fmt: skip


def _collect(found: FewSteps, figure: str, *, against: str | None = None) -> list[PlotLine]:
    lines = []
    for order, line in enumerate(found.lines):
        points = [
            (cell[against].value if against else steps, cell[figure].value)
            for steps, cell in sorted(line.cells.items())
            if figure in cell and (against is None or against in cell)
        ]
        if points:
            x, y = zip(*points)
            lines.append(PlotLine(line.name, order, x, y))
    return lines


def _collect_flow(found: FewSteps, figure: str) -> list[PlotLine]:
    lines = []
    for order, line in enumerate(found.lines):
        by_t = {float(k.rpartition("/t")[2]): p.value for k, p in line.flow.items() if k.startswith(f"{figure}/t")}
        if by_t:
            t, values = zip(*sorted(by_t.items()))
            lines.append(PlotLine(line.name, order, t, values))
    return lines


def plot_curves(panels: Panels, xlabel: str, *, log: bool = True, count: bool = True) -> Draw:
    """A panel per figure, a line per run and guidance, one legend; x on a log axis unless told otherwise."""

    def draw(theme: Theme, narrow: bool) -> "Figure":
        figure, axes = make_panels(len(panels), narrow, columns=2, height=2.5)
        for ax, (title, lines) in zip(axes, panels):
            for line in lines:
                draw_line(ax, line, theme)
            if log:
                form = format_count if count else lambda value: f"{value:.2g}"
                set_log_axis(ax, "x", [x for line in lines for x in line.x], form)
            ax.margins(y=0.12)
            if not log:
                ax.set_ylim(bottom=0)
            ax.set_title(title)
            ax.set_xlabel(xlabel)
        add_legend(figure, max((lines for _, lines in panels), key=len), theme)
        return figure

    return draw


def _specify_sheets(
    found: FewSteps, sheets: Mapping[str, tuple[FewStepSheet, str]]
) -> Iterator[tuple[str, Draw, str, str]]:
    flows = [
        (order, line, flow)
        for order, line in enumerate(found.lines)
        if line.run in sheets and (flow := find_flow(sheets[line.run][0], line.guidance))
    ]
    if flows:
        text = (
            "Exact paths of some captions from noise (left) to data (right): across, how far along the straight way; "
            "up, how far off it, in the direction of the largest departure, both in lengths of that way. Dots are "
            "equal steps of t: evenly spaced on the line at constant speed."
        )
        yield "fewstep_paths", plot_paths(flows), "Paths from noise to data beside their straight way.", text
    strips = cut_strips(found, sheets)
    if strips:
        text = "The same caption and noise in every row and column: " + "; ".join(f"\u201c{p}\u201d" for p, _ in strips)
        yield "fewstep_strips", plot_strips(strips, found.steps), "Pictures of the same noise by number of steps.", text


def plot_paths(flows: Sequence[tuple[int, FewStepLine, DrawnFlow]]) -> Draw:
    """A panel per line; all panels share their scale."""

    def draw(theme: Theme, narrow: bool) -> "Figure":
        figure, axes = make_panels(len(flows), narrow, columns=3, height=1.9)
        high = max(max(map(abs, path)) for _, _, flow in flows for path in flow.aside)
        low = min(min(path) for _, _, flow in flows for path in flow.aside)
        for ax, (order, line, flow) in zip(axes, flows):
            color = choose_color(theme, order)
            ax.plot([0, 1], [0, 0], color=theme["muted"], lw=0.8, ls=(0, (4, 2)), zorder=1)
            for along, aside in zip(flow.along, flow.aside):
                ax.plot(along, aside, color=color, lw=1.1, zorder=2)
                every = max(1, (len(along) - 1) // 8)
                ax.plot(
                    along[::every], aside[::every], color=color, lw=0, marker=MARKERS[order % len(MARKERS)], ms=2.8,
                    zorder=3,
                )  # fmt: skip
            ax.set_ylim(min(1.15 * low, -0.08 * high) or -0.01, 1.15 * high or 0.01)
            ax.set_title(line.name, fontsize=8)
            ax.set_xlabel("along the way")
        axes[0].set_ylabel("off the way")
        return figure

    return draw


Tiles = dict[int, np.ndarray]  # by number of steps
Strips = list[tuple[str, list[tuple[str, Tiles]]]]  # prompt -> line -> tiles


def cut_strips(found: FewSteps, sheets: Mapping[str, tuple[FewStepSheet, str]]) -> Strips:
    """Tiles of the prompts that most sheets share."""
    asked = [tuple(sheet.prompts) for sheet, _ in sheets.values()]
    if not asked:
        return []
    prompts = max(asked, key=asked.count)
    pictures = {}
    for run, (sheet, uri) in sheets.items():
        if tuple(sheet.prompts) == prompts:
            try:
                pictures[run] = np.asarray(open_picture(uri))
            except UserError:
                continue
    lines = [line for line in found.lines if line.run in pictures][:MOST_ROWS]
    most = max(1, min(MOST_PROMPTS, MOST_ROWS * 2 // max(len(lines), 1)))
    return [
        (prompt, [(line.name, _cut_tiles(sheets[line.run][0], pictures[line.run], line, column)) for line in lines])
        for column, prompt in enumerate(prompts[:most])
        if lines
    ]


def _cut_tiles(sheet: FewStepSheet, picture: np.ndarray, line: FewStepLine, column: int) -> Tiles:
    width, height = sheet.tile
    return {
        steps: picture[row * height : (row + 1) * height, column * width : (column + 1) * width]
        for row, (steps, guidance) in enumerate(sheet.settings)
        if guidance == line.guidance
    }


def plot_strips(strips: Strips, steps: Sequence[int]) -> Draw:
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
