"""The report's figures, drawn by matplotlib in one style.

Each `plot_*` function returns a function that draws the figure; `render` calls that for each width and theme.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from eval.report.labels import MOST_NAMED, PlotLine, ScoreDots, add_legend, choose_color, label_line_ends, pick_evenly
from eval.report.law import LadderFit
from eval.report.series import MetricPoint
from eval.report.style import MARKERS, WIDTHS, Theme, make_themes, render_png, render_svg, set_log_axis, use_theme
from eval.report.text import format_count, format_power

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[[Theme, bool], "Figure"]  # (theme, narrow); narrow: for a phone, else for a desktop column


@dataclass(frozen=True)
class CorrelationPanel:
    """Validation loss (x) against one score (y). `dots`: one point per run, all runs at equal images. `paths`: for each
    run its checkpoints, in order. `note`: a line below the title, or ""."""

    title: str
    note: str
    dots: tuple[PlotLine, ...]
    paths: tuple[PlotLine, ...]


@dataclass(frozen=True)
class RenderedFigure:
    """One figure in all its forms. `alt`: what it shows, in words, for readers who do not see it."""

    name: str
    alt: str
    caption: str
    wide_svg: str
    narrow_svg: str
    light_png: bytes
    dark_png: bytes


def render(name: str, draw: Draw, *, alt: str, caption: str, num_series: int) -> RenderedFigure:
    """Draw a figure in all its forms: SVG of both widths for the page, PNG for light and for dark backgrounds.
    `num_series`: models in the figure, each of which gets a color of its own."""
    import matplotlib.pyplot as plt

    light, dark = make_themes(num_series)
    svgs: dict[str, str] = {}
    with use_theme(light):
        for width in WIDTHS:
            figure = draw(light, width == "narrow")
            svgs[width] = render_svg(figure, light, f"{name}-{width}")
            if width == "wide":
                figure.set_layout_engine("none")  # laid out by now; doing it again costs more than drawing
                light_png = render_png(figure, light)
            plt.close(figure)
    with use_theme(dark):
        figure = draw(dark, False)
        dark_png = render_png(figure, dark)
        plt.close(figure)
    return RenderedFigure(name, alt, caption, svgs["wide"], svgs["narrow"], light_png, dark_png)


def plot_loss_curves(
    lines: Sequence[PlotLine], *, xlabel: str, compute: bool, ylabel: str, fit: LadderFit | None = None
) -> Draw:
    """Validation loss on two log axes, one line per run with its name. `compute`: x is training FLOPs, else images; the
    law L(C) of `fit` is then drawn too, if there is one."""

    def draw(theme: Theme, narrow: bool) -> "Figure":
        figure, ax = _make_axes(narrow, height=3.6)
        for line in lines:
            draw_line(ax, line, theme)
        ys = [v for line in lines for v in line.y]
        set_log_axis(ax, "x", [v for line in lines for v in line.x], format_power if compute else format_count)
        set_log_axis(ax, "y", ys, lambda v: f"{v:.3g}", pad=(0.06, 0.06))
        if compute and fit is not None and fit.compute is not None:
            x = np.geomspace(*ax.get_xlim(), 100)
            y = fit.compute.law(x)
            ax.plot(x, y, color=theme["accent"], lw=1.3, ls=(0, (4, 2)), zorder=1)
            ax.annotate(
                "fitted L(C)", (x[8], y[8]), (2, 4), textcoords="offset points", va="bottom", ha="left",
                color=theme["accent"], fontsize=7.5,
            )  # fmt: skip
        ax.set_xlabel(xlabel)
        ax.set_title(ylabel)
        if compute:  # these curves end beside each other's middles, so names at their ends would lie on other curves
            add_legend(figure, lines, theme)
        else:
            label_line_ends(ax, lines, theme)
        return figure

    return draw


def plot_noise_levels(lines: Sequence[PlotLine], base: str) -> Draw:
    """Loss at each noise level, one line per run; beside it the difference of each run from the first one in percent.
    `base`: the name of that first run."""

    def draw(theme: Theme, narrow: bool) -> "Figure":
        several = len(lines) > 1
        figure, axes = make_panels(2 if several else 1, narrow, columns=2, height=3.0)
        for line in lines:
            draw_line(axes[0], line, theme)
            if several:
                change = tuple(100 * (a / b - 1) for a, b in zip(line.y, lines[0].y))
                draw_line(axes[1], PlotLine(line.label, line.order, line.x, change), theme)
        axes[0].set_title("Loss at noise level t")
        for ax in axes:
            ax.set_xlabel("t (0 data, 1 noise)")
            ax.set_xlim(0, 1.02)
        axes[0].set_ylim(bottom=0)
        if several:
            axes[1].set_title(f"Difference from {base}, %")
            label_line_ends(
                axes[1], [PlotLine(run.label, run.order, run.x, _compute_change(run, lines[0])) for run in lines], theme
            )
        else:
            label_line_ends(axes[0], lines, theme)
        return figure

    return draw


def plot_size_law(fit: LadderFit, lines: Sequence[PlotLine]) -> Draw:
    """Loss against parameters at equal images, the law L(N) with its 95 % band, and its prediction for the next rung.

    `fit` must have that law. Each line is one run with a single point: parameters and loss.
    """

    def draw(theme: Theme, narrow: bool) -> "Figure":
        assert fit.size is not None
        figure, ax = _make_axes(narrow, height=3.4)
        sizes = [line.x[0] for line in lines]
        rung = fit.summary.next_rung
        last = max([*sizes, rung.parameters if rung else 0])
        grid = np.geomspace(min(sizes) * 0.9, last * 1.1, 80)
        bands = [fit.size.loss(n) for n in grid]
        ax.fill_between(grid, [b.low for b in bands], [b.high for b in bands], color=theme["accent"], alpha=0.16, lw=0)
        ax.plot(grid, fit.size.law(grid), color=theme["accent"], lw=1.3, ls=(0, (4, 2)))
        values = [line.y[0] for line in lines]
        for line in lines:
            draw_line(ax, line, theme, size=6.5)
        for line in pick_evenly(lines, MOST_NAMED):
            ax.annotate(
                line.label, (line.x[0], line.y[0]), (5, 6), textcoords="offset points", color=theme["ink"], fontsize=7.5
            )
        if rung:
            error = [[rung.loss.value - rung.loss.low], [rung.loss.high - rung.loss.value]]
            ax.errorbar(
                [rung.parameters], [rung.loss.value], yerr=error, fmt="o", mfc=theme["page"], mec=theme["accent"],
                ecolor=theme["accent"], ms=5, lw=1.2, capsize=2.5,
            )  # fmt: skip
            name = f"depth {rung.depth}, predicted" if rung.depth else "predicted"
            ax.annotate(
                name, (rung.parameters, rung.loss.low), (0, -5), textcoords="offset points", ha="right", va="top",
                color=theme["accent"], fontsize=7.5,
            )  # fmt: skip
            # A prediction from four sizes can span everything; the frame then follows the measured points.
            values += [max(rung.loss.low, min(values) * 0.8), min(rung.loss.high, max(values) * 1.05)]
        set_log_axis(ax, "x", [*sizes, last], format_count, pad=(0.06, 0.08))
        set_log_axis(ax, "y", values, lambda v: f"{v:.3g}", pad=(0.1, 0.14))
        ax.set_xlabel("parameters")
        ax.set_title(f"Validation loss at {format_count(fit.summary.images)} images")
        return figure

    return draw


def plot_scores(rows: Sequence[ScoreDots], tasks: Sequence[str], splits: Sequence[str], *, unit_range: bool) -> Draw:
    """One row per task, in it one dot with its interval per run. One panel per split: seen and unseen compositions.
    `unit_range`: scores lie between 0 and 1, and so does the axis."""

    def draw(theme: Theme, narrow: bool) -> "Figure":
        step = 0.30 + 0.085 * len(rows)
        figure, axes = make_panels(len(splits), narrow, columns=2, height=0.75 + step * len(tasks))
        offsets = np.linspace(-0.3, 0.3, len(rows)) if len(rows) > 1 else np.zeros(1)
        for ax, split in zip(axes, splits):
            for dots, offset in zip(rows, offsets):
                for i, task in enumerate(tasks):
                    _draw_point(ax, dots, dots.scores.get((task, split)), i + offset, theme)
            ax.set_yticks(range(len(tasks)), [_separate_words(task) for task in tasks])
            ax.set_ylim(len(tasks) - 0.5, -0.5)
            ax.grid(False, axis="y")
            for i in range(1, len(tasks)):
                ax.axhline(i - 0.5, color=theme["grid"], lw=0.6)
            if unit_range:
                ax.set_xlim(-0.02, 1.02)
            ax.set_title({"seen": "Seen compositions", "unseen": "Unseen compositions"}.get(split, ""))
        if not narrow:
            for ax in axes[1:]:
                ax.tick_params(labelleft=False)
        add_legend(figure, rows, theme)
        return figure

    return draw


def plot_progress(panels: Sequence[tuple[str, Sequence[PlotLine]]]) -> Draw:
    """Overall scores against images seen. `panels`: for each score its title and one line per run."""

    def draw(theme: Theme, narrow: bool) -> "Figure":
        figure, axes = make_panels(len(panels), narrow, columns=2, height=2.5)
        for ax, (title, lines) in zip(axes, panels):
            for line in lines:
                draw_line(ax, line, theme)
            set_log_axis(ax, "x", [v for line in lines for v in line.x], format_count)
            ax.margins(y=0.12)
            if min(v for line in lines for v in line.y) >= 0 > ax.get_ylim()[0]:
                ax.set_ylim(bottom=0)
            ax.set_title(title)
            ax.set_xlabel("images seen")
            label_line_ends(ax, lines, theme)
        return figure

    return draw


def plot_correlations(panels: Sequence[CorrelationPanel]) -> Draw:
    """Each score against validation loss, one panel per score. Large dots are runs at equal images; thin lines join
    each run's checkpoints."""

    def draw(theme: Theme, narrow: bool) -> "Figure":
        figure, axes = make_panels(len(panels), narrow, columns=2, height=2.6)
        for ax, panel in zip(axes, panels):
            for line in panel.paths:
                ax.plot(line.x, line.y, color=choose_color(theme, line.order), lw=0.9, alpha=0.45, zorder=1)
            for line in panel.dots:
                draw_line(ax, line, theme, size=6.5)
            ax.margins(x=0.08, y=0.12)
            ax.set_title(panel.title + (f"\n{panel.note}" if panel.note else ""))
            ax.set_xlabel("validation loss (lower is better)")
        add_legend(figure, max((panel.dots for panel in panels), key=len), theme)
        return figure

    return draw


def _make_axes(narrow: bool, *, height: float) -> tuple["Figure", "Axes"]:
    figure, axes = make_panels(1, narrow, columns=1, height=height)
    return figure, axes[0]


def make_panels(count: int, narrow: bool, *, columns: int, height: float) -> tuple["Figure", list["Axes"]]:
    """A figure of `count` panels: in up to `columns` columns, in one if `narrow`. `height`: of a row, in inches."""
    import matplotlib.pyplot as plt

    columns = 1 if narrow else min(columns, count)
    rows = -(-count // columns)
    width = WIDTHS["narrow" if narrow else "wide"]
    height = height * (0.88 if narrow else 1.0)
    figure, grid = plt.subplots(rows, columns, figsize=(width, height * rows), squeeze=False, layout="constrained")
    axes = list(grid.flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def draw_line(ax: "Axes", line: PlotLine, theme: Theme, *, size: float = 4.5) -> None:
    """Draw a run's line in its color, with markers of `size` points unless they would be too many."""
    color = choose_color(theme, line.order)
    crowded = len(line.x) > 24
    ax.plot(
        line.x, line.y, color=color, marker=None if crowded else MARKERS[line.order % len(MARKERS)], ms=size,
        mec=theme["page"], mew=0.5, zorder=3,
    )  # fmt: skip


def _draw_point(ax: "Axes", dots: ScoreDots, point: MetricPoint | None, y: float, theme: Theme) -> None:
    if point is None:
        return
    color = theme["accent"] if dots.published else choose_color(theme, dots.order)
    if point.low is not None and point.high is not None:
        ax.plot([point.low, point.high], [y, y], color=color, lw=1.4, alpha=0.6, solid_capstyle="butt", zorder=2)
    ax.plot(
        [point.value],
        [y],
        color=color,
        marker=MARKERS[dots.order % len(MARKERS)],
        ms=5,
        mfc=theme["page"] if dots.published else color,
        mec=color if dots.published else theme["page"],
        mew=1.2 if dots.published else 0.5,
        zorder=3,
    )


def _compute_change(line: PlotLine, base: PlotLine) -> tuple[float, ...]:
    """Difference of `line` from `base` in percent, point by point; both have the same x."""
    return tuple(100 * (a / b - 1) for a, b in zip(line.y, base.y))


def _separate_words(task: str) -> str:
    return task.replace("_", " ").replace("/", ", ")
