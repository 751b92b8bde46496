"""The report's figures, drawn by matplotlib in one style: each function draws one at a given width and theme."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from eval.report.law import Scaling
from eval.report.series import Point
from eval.report.style import (
    MARKERS,
    WIDTHS,
    Theme,
    count_text,
    drawing,
    log_axis,
    png_of,
    power_text,
    spread,
    svg_of,
    themes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MOST_NAMED = 24  # more names than that hide what they name
T = TypeVar("T")
Draw = Callable[[Theme, bool], "Figure"]


@dataclass(frozen=True)
class Line:
    """One run in a figure: its place in the ladder decides color and marker."""

    label: str
    order: int
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Dots:
    """One run's scores: (task, split) -> value with interval. `published`: somebody else's, drawn hollow."""

    label: str
    order: int
    scores: dict[tuple[str, str], Point]
    published: bool = False


@dataclass(frozen=True)
class Panel:
    """Loss against one score: a dot per run at equal images, and each run's own path through its checkpoints."""

    title: str
    note: str
    dots: tuple[Line, ...]
    paths: tuple[Line, ...]


@dataclass(frozen=True)
class Drawn:
    """One figure in all its forms. `alt` says in words what it shows."""

    name: str
    alt: str
    caption: str
    wide_svg: str
    narrow_svg: str
    light_png: bytes
    dark_png: bytes


def render(name: str, draw: Draw, *, alt: str, caption: str, num_series: int) -> Drawn:
    """Wide and narrow SVG for the page, PNG for light and for dark ground."""
    import matplotlib.pyplot as plt

    light, dark = themes(num_series)
    svgs: dict[str, str] = {}
    with drawing(light):
        for width in WIDTHS:
            figure = draw(light, width == "narrow")
            svgs[width] = svg_of(figure, light, f"{name}-{width}")
            if width == "wide":
                figure.set_layout_engine("none")  # laid out by now; doing it again costs more than drawing
                light_png = png_of(figure, light)
            plt.close(figure)
    with drawing(dark):
        figure = draw(dark, False)
        dark_png = png_of(figure, dark)
        plt.close(figure)
    return Drawn(name, alt, caption, svgs["wide"], svgs["narrow"], light_png, dark_png)


def loss_curves(
    lines: Sequence[Line], *, xlabel: str, compute: bool, ylabel: str, scaling: Scaling | None = None
) -> Draw:
    """Validation loss on log axes, every line labelled at its end; with a law for compute, its fitted frontier."""

    def draw(theme: Theme, narrow: bool) -> "Figure":
        figure, ax = _one(narrow, height=3.6)
        for line in lines:
            _plot(ax, line, theme)
        ys = [v for line in lines for v in line.y]
        log_axis(ax, "x", [v for line in lines for v in line.x], power_text if compute else count_text)
        log_axis(ax, "y", ys, lambda v: f"{v:.3g}", pad=(0.06, 0.06))
        if compute and scaling is not None and scaling.compute is not None:
            x = np.geomspace(*ax.get_xlim(), 100)
            y = scaling.compute.law(x)
            ax.plot(x, y, color=theme["accent"], lw=1.3, ls=(0, (4, 2)), zorder=1)
            ax.annotate(
                "fitted L(C)", (x[8], y[8]), (2, 4), textcoords="offset points", va="bottom", ha="left",
                color=theme["accent"], fontsize=7.5,
            )  # fmt: skip
        ax.set_xlabel(xlabel)
        ax.set_title(ylabel)
        if compute:  # these curves end beside each other's middles, so names at their ends would lie on other curves
            _legend(figure, lines, theme)
        else:
            _end_labels(ax, lines, theme)
        return figure

    return draw


def noise_levels(lines: Sequence[Line], base: str) -> Draw:
    """Loss at each noise level, and how far below the smallest model the others are there."""

    def draw(theme: Theme, narrow: bool) -> "Figure":
        both = len(lines) > 1
        figure, axes = _panels(2 if both else 1, narrow, columns=2, height=3.0)
        for line in lines:
            _plot(axes[0], line, theme)
            if both:
                change = tuple(100 * (a / b - 1) for a, b in zip(line.y, lines[0].y))
                _plot(axes[1], Line(line.label, line.order, line.x, change), theme)
        axes[0].set_title("Loss at noise level t")
        for ax in axes:
            ax.set_xlabel("t (0 data, 1 noise)")
            ax.set_xlim(0, 1.02)
        axes[0].set_ylim(bottom=0)
        if both:
            axes[1].set_title(f"Difference from {base}, %")
            _end_labels(axes[1], [Line(n.label, n.order, n.x, _change(n, lines[0])) for n in lines], theme)
        else:
            _end_labels(axes[0], lines, theme)
        return figure

    return draw


def size_law(scaling: Scaling, lines: Sequence[Line]) -> Draw:
    """Loss against parameters at equal images, the fitted law with its 95 % band, and the predicted next rung."""

    def draw(theme: Theme, narrow: bool) -> "Figure":
        assert scaling.size is not None
        figure, ax = _one(narrow, height=3.4)
        sizes = [line.x[0] for line in lines]
        ahead = scaling.next_rung
        last = max([*sizes, ahead.parameters if ahead else 0])
        grid = np.geomspace(min(sizes) * 0.9, last * 1.1, 80)
        bands = [scaling.size.loss(n) for n in grid]
        ax.fill_between(grid, [b.low for b in bands], [b.high for b in bands], color=theme["accent"], alpha=0.16, lw=0)
        ax.plot(grid, scaling.size.law(grid), color=theme["accent"], lw=1.3, ls=(0, (4, 2)))
        values = [line.y[0] for line in lines]
        for line in lines:
            _plot(ax, line, theme, size=6.5)
        for line in _evenly(lines, MOST_NAMED):
            ax.annotate(
                line.label, (line.x[0], line.y[0]), (5, 6), textcoords="offset points", color=theme["ink"], fontsize=7.5
            )
        if ahead:
            error = [[ahead.loss.value - ahead.loss.low], [ahead.loss.high - ahead.loss.value]]
            ax.errorbar(
                [ahead.parameters], [ahead.loss.value], yerr=error, fmt="o", mfc=theme["page"], mec=theme["accent"],
                ecolor=theme["accent"], ms=5, lw=1.2, capsize=2.5,
            )  # fmt: skip
            name = f"depth {ahead.depth}, predicted" if ahead.depth else "predicted"
            ax.annotate(
                name, (ahead.parameters, ahead.loss.low), (0, -5), textcoords="offset points", ha="right", va="top",
                color=theme["accent"], fontsize=7.5,
            )  # fmt: skip
            # A prediction from four sizes can span everything; the frame then follows the measured points.
            values += [max(ahead.loss.low, min(values) * 0.8), min(ahead.loss.high, max(values) * 1.05)]
        log_axis(ax, "x", [*sizes, last], count_text, pad=(0.06, 0.08))
        log_axis(ax, "y", values, lambda v: f"{v:.3g}", pad=(0.1, 0.14))
        ax.set_xlabel("parameters")
        ax.set_title(f"Validation loss at {count_text(scaling.images)} images")
        return figure

    return draw


def scores(rows: Sequence[Dots], tasks: Sequence[str], splits: Sequence[str], *, unit_range: bool) -> Draw:
    """One line per task, one dot with its interval per run; seen and unseen compositions in panels side by side."""

    def draw(theme: Theme, narrow: bool) -> "Figure":
        step = 0.30 + 0.085 * len(rows)
        figure, axes = _panels(len(splits), narrow, columns=2, height=0.75 + step * len(tasks))
        offsets = np.linspace(-0.3, 0.3, len(rows)) if len(rows) > 1 else np.zeros(1)
        for ax, split in zip(axes, splits):
            for dots, offset in zip(rows, offsets):
                for i, task in enumerate(tasks):
                    _dot(ax, dots, dots.scores.get((task, split)), i + offset, theme)
            ax.set_yticks(range(len(tasks)), [_words(task) for task in tasks])
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
        _legend(figure, rows, theme)
        return figure

    return draw


def progress(panels: Sequence[tuple[str, Sequence[Line]]]) -> Draw:
    """Overall scores against images seen, one panel per score."""

    def draw(theme: Theme, narrow: bool) -> "Figure":
        figure, axes = _panels(len(panels), narrow, columns=2, height=2.5)
        for ax, (title, lines) in zip(axes, panels):
            for line in lines:
                _plot(ax, line, theme)
            log_axis(ax, "x", [v for line in lines for v in line.x], count_text)
            ax.margins(y=0.12)
            if min(v for line in lines for v in line.y) >= 0 > ax.get_ylim()[0]:
                ax.set_ylim(bottom=0)
            ax.set_title(title)
            ax.set_xlabel("images seen")
            _end_labels(ax, lines, theme)
        return figure

    return draw


def correlations(panels: Sequence[Panel]) -> Draw:
    """Validation loss against each score: big dots are runs at equal images, thin lines their own way there."""

    def draw(theme: Theme, narrow: bool) -> "Figure":
        figure, axes = _panels(len(panels), narrow, columns=2, height=2.6)
        for ax, panel in zip(axes, panels):
            for line in panel.paths:
                ax.plot(line.x, line.y, color=_color(theme, line.order), lw=0.9, alpha=0.45, zorder=1)
            for line in panel.dots:
                _plot(ax, line, theme, size=6.5)
            ax.margins(x=0.08, y=0.12)
            ax.set_title(panel.title + (f"\n{panel.note}" if panel.note else ""))
            ax.set_xlabel("validation loss (lower is better)")
        _legend(figure, max((panel.dots for panel in panels), key=len), theme)
        return figure

    return draw


def _one(narrow: bool, *, height: float) -> tuple["Figure", "Axes"]:
    figure, axes = _panels(1, narrow, columns=1, height=height)
    return figure, axes[0]


def _panels(count: int, narrow: bool, *, columns: int, height: float) -> tuple["Figure", list["Axes"]]:
    """Panels side by side on a desktop, below each other on a phone."""
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


def _color(theme: Theme, order: int) -> str:
    return theme.series[order % len(theme.series)]


def _plot(ax: "Axes", line: Line, theme: Theme, *, size: float = 4.5) -> None:
    color = _color(theme, line.order)
    crowded = len(line.x) > 24
    ax.plot(
        line.x, line.y, color=color, marker=None if crowded else MARKERS[line.order % len(MARKERS)], ms=size,
        mec=theme["page"], mew=0.5, zorder=3,
    )  # fmt: skip


def _dot(ax: "Axes", dots: Dots, point: Point | None, y: float, theme: Theme) -> None:
    if point is None:
        return
    color = theme["accent"] if dots.published else _color(theme, dots.order)
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


def _end_labels(ax: "Axes", lines: Sequence[Line], theme: Theme) -> None:
    """Each line's name beside its own last point; where lines end together, moved apart until they do not touch.

    Where more end together than fit beside the axes, evenly chosen ones from the lowest to the highest are named.
    """
    ax.autoscale_view()  # the layout is not made yet; its last few pixels do not matter to labels
    scale = ax.figure.dpi / 72
    ends = [ax.transData.transform((line.x[-1], line.y[-1])) for line in lines]
    heights = [float(end[1]) for end in ends]
    gap, named = 10.5 * scale, set[int]()
    for group in _together([float(end[0]) for end in ends], 50 * scale):
        shown = _evenly(sorted(group, key=lambda i: heights[i]), max(2, int(ax.bbox.height / gap)))
        places = spread([heights[i] for i in shown], gap=gap)
        inside = max(0.0, ax.bbox.y0 - min(places)) - max(0.0, max(places) - ax.bbox.y1)
        for i, height in zip(shown, places):
            heights[i] = height + inside
            named.add(i)
    for i in sorted(named):
        line, end, height = lines[i], ends[i], heights[i]
        ax.annotate(
            line.label, (line.x[-1], line.y[-1]), (7, (height - float(end[1])) / scale), textcoords="offset points",
            va="center", fontsize=8, color=_color(theme, line.order), fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def _evenly(items: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly chosen, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _together(values: Sequence[float], near: float) -> list[list[int]]:
    """Indices in groups whose neighbours are nearer than `near`."""
    groups: list[list[int]] = []
    for i in np.argsort(values, kind="stable").tolist():
        if groups and values[i] - values[groups[-1][-1]] < near:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _legend(figure: "Figure", rows: Sequence[Dots] | Sequence[Line], theme: Theme) -> None:
    from matplotlib.lines import Line2D

    shown = _evenly([*rows], MOST_NAMED)
    longest = max(len(row.label) for row in shown)
    columns = max(1, int(72 * float(figure.get_figwidth()) / (38 + 5.4 * longest)))
    handles = [_handle(row, theme) for row in shown]
    if len(shown) < len(rows):
        handles.append(Line2D([], [], lw=0, label=f"... {len(rows) - len(shown)} more"))
    figure.legend(
        handles=handles, loc="outside upper left", ncols=columns, frameon=False, handlelength=1.6,
        columnspacing=1.2, fontsize=8, labelcolor=theme["ink"],
    )  # fmt: skip


def _handle(row: Dots | Line, theme: Theme) -> "Line2D":
    from matplotlib.lines import Line2D

    published = isinstance(row, Dots) and row.published
    color = theme["accent"] if published else _color(theme, row.order)
    return Line2D(
        [], [], color=color, marker=MARKERS[row.order % len(MARKERS)], lw=0 if published else 1.4, ms=5,
        mfc=theme["page"] if published else color, label=row.label,
    )  # fmt: skip


def _change(line: Line, base: Line) -> tuple[float, ...]:
    return tuple(100 * (a / b - 1) for a, b in zip(line.y, base.y))


def _words(task: str) -> str:
    return task.replace("_", " ").replace("/", ", ")
