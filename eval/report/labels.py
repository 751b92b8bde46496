"""Marks of runs in a figure and their names: colors by model size, labels at line ends that do not touch, legends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from eval.report.series import MetricPoint
from eval.report.style import MARKERS, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MOST_NAMED = 24  # more names than that hide what they name
T = TypeVar("T")


@dataclass(frozen=True)
class PlotLine:
    """One run in a figure: its place in the ladder decides color and marker. `low`, `high`: ends of intervals, where
    they are drawn."""

    label: str
    order: int
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class ScoreDots:
    """One run's scores: (task, split) -> value with interval. `published`: somebody else's, drawn hollow."""

    label: str
    order: int
    scores: dict[tuple[str, str], MetricPoint]
    published: bool = False


def choose_color(theme: Theme, order: int) -> str:
    return theme.series[order % len(theme.series)]


def label_line_ends(ax: "Axes", lines: Sequence[PlotLine], theme: Theme) -> None:
    """Each line's name beside its own last point; where lines end together, moved apart until they do not touch.

    Where more end together than fit beside the axes, evenly chosen ones from the lowest to the highest are named.
    """
    ax.autoscale_view()  # the layout is not made yet; its last few pixels do not matter to labels
    scale = ax.figure.dpi / 72
    ends = [ax.transData.transform((line.x[-1], line.y[-1])) for line in lines]
    heights = [float(end[1]) for end in ends]
    gap, named = 10.5 * scale, set[int]()
    for group in _group_near([float(end[0]) for end in ends], 50 * scale):
        shown = pick_evenly(sorted(group, key=lambda i: heights[i]), max(2, int(ax.bbox.height / gap)))
        places = spread_apart([heights[i] for i in shown], gap=gap)
        inside = max(0.0, ax.bbox.y0 - min(places)) - max(0.0, max(places) - ax.bbox.y1)
        for i, height in zip(shown, places):
            heights[i] = height + inside
            named.add(i)
    for i in sorted(named):
        line, end, height = lines[i], ends[i], heights[i]
        ax.annotate(
            line.label, (line.x[-1], line.y[-1]), (7, (height - float(end[1])) / scale), textcoords="offset points",
            va="center", fontsize=8, color=choose_color(theme, line.order), fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def pick_evenly(items: Sequence[T], most: int) -> list[T]:
    """At most `most` items, evenly spaced, with the first and the last one."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _group_near(values: Sequence[float], near: float) -> list[list[int]]:
    """Indices in groups whose neighbours are nearer than `near`."""
    groups: list[list[int]] = []
    for i in np.argsort(values, kind="stable").tolist():
        if groups and values[i] - values[groups[-1][-1]] < near:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def add_legend(figure: "Figure", rows: Sequence[ScoreDots] | Sequence[PlotLine], theme: Theme) -> None:
    from matplotlib.lines import Line2D

    shown = pick_evenly([*rows], MOST_NAMED)
    longest = max(len(row.label) for row in shown)
    columns = max(1, int(72 * float(figure.get_figwidth()) / (38 + 5.4 * longest)))
    handles = [_make_handle(row, theme) for row in shown]
    if len(shown) < len(rows):
        handles.append(Line2D([], [], lw=0, label=f"... {len(rows) - len(shown)} more"))
    figure.legend(
        handles=handles, loc="outside upper left", ncols=columns, frameon=False, handlelength=1.6,
        columnspacing=1.2, fontsize=8, labelcolor=theme["ink"],
    )  # fmt: skip


def _make_handle(row: ScoreDots | PlotLine, theme: Theme) -> "Line2D":
    from matplotlib.lines import Line2D

    published = isinstance(row, ScoreDots) and row.published
    color = theme["accent"] if published else choose_color(theme, row.order)
    return Line2D(
        [], [], color=color, marker=MARKERS[row.order % len(MARKERS)], lw=0 if published else 1.4, ms=5,
        mfc=theme["page"] if published else color, label=row.label,
    )  # fmt: skip


def spread_apart(values: Sequence[float], gap: float) -> list[float]:
    """Positions near `values` at least `gap` apart (labels at line ends), keeping their order."""
    order = np.argsort(values, kind="stable")
    placed = np.array(values, float)[order]
    for _ in range(200):
        moved = False
        for i in range(len(placed) - 1):
            lack = gap - (placed[i + 1] - placed[i])
            if lack > 1e-9:
                placed[i] -= lack / 2
                placed[i + 1] += lack / 2
                moved = True
        if not moved:
            break
    result = np.empty(len(placed))
    result[order] = placed
    return result.tolist()
