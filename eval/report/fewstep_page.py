"""What the few-step page shows beside its tables, as data: the report draws it, the service sends it to its page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from eval.report.fewsteps import COLUMNS, QUALITY, FewStepLine, FewSteps, find_flow, read_sheet
from eval.report.labels import PlotLine
from eval.report.runs import RunFolder
from eval.report.series import MetricPoint
from eval.studies.fewstep_sheet import FewStepSheet

MOST_PROMPTS, MOST_ROWS = 3, 8  # of strips
PATHS = (
    "Exact paths of some captions from noise (left) to data (right): across, how far along the straight way; up, how "
    "far off it, in the direction of the largest departure, both in lengths of that way. Dots are equal steps of t: "
    "evenly spaced on the line at constant speed."
)
Sheets = Mapping[str, tuple[FewStepSheet, str]]  # run -> its sheet, and where the picture is


@dataclass(frozen=True)
class FewStepPanel:
    """`from_zero`: a share of pictures, whose axis begins at 0 also where all are 0."""

    title: str
    xlabel: str
    lines: list[PlotLine]
    from_zero: bool = False


@dataclass(frozen=True)
class FewStepChart:
    """`alt`: what it shows, in words, for readers who do not see it."""

    name: str
    alt: str
    caption: str
    axis: Literal["steps", "seconds", "t"]
    panels: list[FewStepPanel]


@dataclass(frozen=True)
class PathsPanel:
    """The exact paths of one line's captions in the plane of their straight way, as the sheet has them."""

    label: str
    order: int
    along: list[list[float]]
    aside: list[list[float]]


@dataclass(frozen=True)
class StripRow:
    """One line's tiles of a prompt in the picture of a run. `sheet`: how many tiles it has down and across; `places`:
    number of steps -> the tile's place from above."""

    label: str
    run: str
    picture: str
    sheet: tuple[int, int]
    places: dict[int, int]


@dataclass(frozen=True)
class Strip:
    """One prompt, drawn from the same noise by each line in each number of steps. `column`: of its tiles."""

    prompt: str
    column: int
    rows: list[StripRow]


@dataclass(frozen=True)
class FewStepPage:
    """Tables and figures of the page. `columns`: what heads each figure's column."""

    found: FewSteps
    columns: dict[str, str]
    charts: list[FewStepChart]
    paths: list[PathsPanel]
    strips: list[Strip]


def compose_page(found: FewSteps, runs: Sequence[RunFolder]) -> FewStepPage:
    """Pictures and paths are read from the sheets of the runs; an arm of several seeds shows those of its first."""
    sheets = {run.name: sheet for run in runs if (sheet := read_sheet(run))}
    paths = [
        PathsPanel(line.name, order, flow.along, flow.aside)
        for order, line in enumerate(found.lines)
        if line.runs[0] in sheets and (flow := find_flow(sheets[line.runs[0]][0], line.guidance))
    ]
    return FewStepPage(found, COLUMNS, list(_compose_charts(found)), paths, choose_strips(found, sheets))


def _compose_charts(found: FewSteps) -> Iterator[FewStepChart]:
    quality = [name for name in QUALITY if name in found.figures]
    if quality:
        yield FewStepChart(
            "fewstep_quality", "Quality against the number of steps.",
            "The same noise for every line. Bars are intervals over seeds, where an arm has several; all others stand "
            "in the table.",
            "steps", [_make_panel(found, name, "steps") for name in quality],
        )  # fmt: skip
    timed = [
        panel
        for name in quality[:2]
        for time, what in (("latents", "without"), ("pictures", "with"))
        if (panel := _make_panel(found, name, f"seconds per picture, {what} decoder", against=time)).lines
    ]
    if timed:
        yield FewStepChart(
            "fewstep_time", "Quality against the time of a picture, without and with the decoder.",
            "Each dot is a number of steps. Time of each picture of a batch, or of one alone where no batch was timed; "
            "text features are made before.",
            "seconds", timed,
        )  # fmt: skip
    flows = [
        FewStepPanel(title, "t (0 data, 1 noise)", lines)
        for name, title in (("straightness", "|Z1 - Z0 - v|\u00b2 per number"), ("bend", "bend |dv/dt|"))
        if (lines := _collect_flow(found, name))
    ]
    if flows:
        yield FewStepChart(
            "fewstep_flow", "How far the velocity is from the straight way, by t.",
            "Mean over paths, exact up to the solver's tolerance. Flat at 0: straight paths at constant speed.",
            "t", flows,
        )  # fmt: skip


def _make_panel(found: FewSteps, figure: str, xlabel: str, *, against: str | None = None) -> FewStepPanel:
    """A figure against the number of steps, or against seconds (`against`: latents or pictures)."""
    lines = []
    for order, line in enumerate(found.lines):
        points = [
            (place, cell[figure])
            for steps, cell in sorted(line.cells.items())
            if figure in cell and (place := steps if against is None else _find_seconds(cell, against)) is not None
        ]
        if points:
            xs, ys = (tuple(column) for column in zip(*points))
            lines.append(_make_line(line, order, xs, ys))
    return FewStepPanel(COLUMNS[figure], xlabel, lines, from_zero=figure.startswith("geneval"))


def _find_seconds(cell: Mapping[str, MetricPoint], what: str) -> float | None:
    point = cell.get(f"seconds/{what}_batch") or cell.get(f"seconds/{what}")
    return None if point is None else point.value


def _collect_flow(found: FewSteps, figure: str) -> list[PlotLine]:
    lines = []
    for order, line in enumerate(found.lines):
        by_t = {float(k.rpartition("/t")[2]): p for k, p in line.flow.items() if k.startswith(f"{figure}/t")}
        if by_t:
            t, points = (tuple(column) for column in zip(*sorted(by_t.items())))
            lines.append(_make_line(line, order, t, points))
    return lines


def _make_line(line: FewStepLine, order: int, x: tuple[float, ...], points: Sequence[MetricPoint]) -> PlotLine:
    """With its intervals, where they are over seeds."""
    y = tuple(point.value for point in points)
    low, high = ([end for point in points if (end := getattr(point, name)) is not None] for name in ("low", "high"))
    if len(line.runs) < 2 or len(low) < len(y) or len(high) < len(y):
        return PlotLine(line.name, order, x, y)
    return PlotLine(line.name, order, x, y, tuple(low), tuple(high))


def choose_strips(found: FewSteps, sheets: Sheets) -> list[Strip]:
    """Tiles of the prompts that most sheets share."""
    asked = [tuple(sheet.prompts) for sheet, _ in sheets.values()]
    if not asked:
        return []
    prompts = max(asked, key=asked.count)
    shown = {run for run, (sheet, _) in sheets.items() if tuple(sheet.prompts) == prompts}
    lines = [line for line in found.lines if line.runs[0] in shown][:MOST_ROWS]
    most = max(1, min(MOST_PROMPTS, MOST_ROWS * 2 // max(len(lines), 1)))
    rows = [_place_tiles(line, *sheets[line.runs[0]]) for line in lines]
    return [Strip(prompt, column, rows) for column, prompt in enumerate(prompts[:most]) if rows]


def _place_tiles(line: FewStepLine, sheet: FewStepSheet, picture: str) -> StripRow:
    places = {steps: row for row, (steps, guidance) in enumerate(sheet.settings) if guidance == line.guidance}
    return StripRow(line.name, line.runs[0], picture, (len(sheet.settings), len(sheet.prompts)), places)
