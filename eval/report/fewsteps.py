"""The page of `eval fewstep`, from the rows and sheets of runs: one line per run and guidance, one cell per steps."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eval.report.runs import RunFolder
from eval.report.series import Comparison, LeftOut, MetricPoint, compare, is_number
from eval.report.tables import find_best
from eval.report.text import format_significant
from eval.studies.fewstep_sheet import DrawnFlow, FewStepSheet
from infra import storage
from infra.codec import from_json
from infra.errors import UserError

_SETTING = re.compile(r"fewstep/(?P<steps>\d+)x(?P<guidance>[^/]+)/(?P<figure>.+)")
_FLOW = re.compile(r"fewstep/flow/(?P<guidance>[^/]+)/(?P<figure>.+)")
# The figures of the table, with what heads their columns; the world's judges put their name before.
COLUMNS = {
    "fid": "FID", "clip_score": "CLIP score", "clip_loss": "CLIP loss, %", "geneval/overall/seen": "GenEval, seen",
    "geneval/overall/unseen": "GenEval, unseen", "geneval/overall": "GenEval", "diversity": "diversity",
    "saturation": "saturation", "seconds/latents": "latents, s", "seconds/pictures": "picture, s",
    "seconds/pictures_batch": "picture of a batch, s",
}  # fmt: skip
QUALITY = ("fid", "clip_score", "geneval/overall/seen", "geneval/overall", "geneval/overall/unseen", "diversity")
# SD3 (arXiv 2403.03206), Table 6: CLIP score lost against 50 steps, in %, by 5, 10 and 20 steps.
PAPER_LOSS = {15: (4.30, 0.86, 0.21), 30: (3.59, 0.70, 0.24), 38: (2.71, 0.14, 0.08)}


@dataclass(frozen=True)
class FewStepLine:
    """One run at one guidance. `cells`: steps -> figure -> its point; `flow`: straightness, length, bend, whole and by
    t. `teacher`: the run whose couplings taught it, where that run is here."""

    run: str
    label: str
    kind: str
    guidance: float
    teacher: str | None
    cells: dict[int, dict[str, MetricPoint]]
    flow: dict[str, MetricPoint]

    @property
    def name(self) -> str:
        return f"{self.label}, guidance {self.guidance:g}"


@dataclass(frozen=True)
class FewSteps:
    """What few_steps.json holds. `best`: steps -> figure -> names of lines that the best one's interval holds."""

    format: int
    lines: list[FewStepLine]
    figures: list[str]
    higher_is_better: dict[str, bool]
    best: dict[int, dict[str, tuple[str, ...]]]
    findings: list[str]
    left_out: list[LeftOut]
    protocols: dict[str, str]
    """metric -> the protocol under which runs are compared"""

    @property
    def steps(self) -> list[int]:
        return sorted({steps for line in self.lines for steps in line.cells})


def compose_few_steps(runs: Sequence[RunFolder], labels: Mapping[str, str]) -> FewSteps | None:
    """None where no run has such rows."""
    only = [replace(run, rows=tuple(row for row in run.rows if row.metric.startswith("fewstep/"))) for run in runs]
    only = [run for run in only if run.rows]
    if not only:
        return None
    metrics = sorted({row.metric for run in only for row in run.rows if is_number(row)})
    found = {metric: comparison for metric in metrics if (comparison := compare(only, metric))}
    sheets = {run.name: sheet for run in only if (sheet := read_sheet(run))}
    teachers = {sheet.weights: run for run, (sheet, _) in sheets.items()}
    lines = []
    for run in only:
        student: Mapping[str, Any] = sheets[run.name][0].student if run.name in sheets else {}
        teacher = teachers.get(str(student.get("teacher")))
        kind = _describe(student) if student else "teacher" if _is_taught_by(run.name, sheets) else ""
        lines += _make_lines(run.name, found, label=labels[run.name], kind=kind, teacher=teacher)
    lines.sort(key=lambda line: (line.kind != "teacher", line.label, line.guidance))
    figures = [name for name in COLUMNS if any(name in cell for line in lines for cell in line.cells.values())]
    higher = {_shorten(metric): comparison.higher_is_better for metric, comparison in found.items()}
    best = {steps: _find_best_lines(lines, steps, figures, higher) for steps in _list_steps(lines)}
    left_out = [left for comparison in found.values() for left in comparison.left_out]
    protocols = {metric: comparison.protocol for metric, comparison in found.items()}
    return FewSteps(1, lines, figures, higher, best, compose_findings(lines, higher), left_out, protocols)


def _describe(student: Mapping[str, Any]) -> str:
    """`reflow, round 1, guidance 1.5 baked in`."""
    baked = student.get("guidance_kind") == "baked"
    parts = [str(student.get("objective", "student")), f"round {student['round']}" if "round" in student else ""]
    return ", ".join([*filter(None, parts), *([f"guidance {student['guidance']:g} baked in"] if baked else [])])


def _is_taught_by(run: str, sheets: Mapping[str, tuple[FewStepSheet, str]]) -> bool:
    return any(sheet.student.get("teacher") == sheets[run][0].weights for sheet, _ in sheets.values() if run in sheets)


def _make_lines(
    run: str, comparisons: Mapping[str, Comparison], *, label: str, kind: str, teacher: str | None
) -> list[FewStepLine]:
    lines: dict[float, FewStepLine] = {}
    for metric, comparison in comparisons.items():
        point = comparison.at(run)
        setting = _SETTING.fullmatch(metric) or _FLOW.fullmatch(metric)
        if point is None or setting is None:
            continue
        guidance = float(setting["guidance"])
        line = lines.setdefault(guidance, FewStepLine(run, label, kind, guidance, teacher, {}, {}))
        if setting.re is _FLOW:
            line.flow[setting["figure"]] = point
        else:
            line.cells.setdefault(int(setting["steps"]), {})[setting["figure"].removeprefix("world_")] = point
    return list(lines.values())


def _shorten(metric: str) -> str:
    return metric.split("/", 2)[2].removeprefix("world_")


def _list_steps(lines: Sequence[FewStepLine]) -> list[int]:
    return sorted({steps for line in lines for steps in line.cells})


def _find_best_lines(
    lines: Sequence[FewStepLine], steps: int, figures: Sequence[str], higher: Mapping[str, bool]
) -> dict[str, tuple[str, ...]]:
    judged = [name for name in figures if name != "saturation"]  # neither high nor low is good
    return {
        name: find_best({n.name: n.cells[steps][name] for n in lines if name in n.cells.get(steps, {})}, higher[name])
        for name in judged
    }


def compose_findings(lines: Sequence[FewStepLine], higher: Mapping[str, bool]) -> list[str]:
    """Each student beside its teacher: straightness, and quality at the same number of steps."""
    sentences = []
    for line in lines:
        rivals = [other for other in lines if other.run == line.teacher]
        if not rivals:
            continue
        flows = [other for other in rivals if "straightness" in other.flow]
        if "straightness" in line.flow and flows:
            rival = min(flows, key=lambda r: abs(r.guidance - line.guidance))
            both = _tell(line, line.flow["straightness"]), _tell(rival, rival.flow["straightness"])
            sentences.append(f"Straightness (0 is straight): {', '.join(both)}.")
        sentences += _compare_saturation(line, rivals)
        for figure in ("fid", "geneval/overall/seen", "geneval/overall"):
            for steps in _list_steps([line])[:3]:
                mine = line.cells[steps].get(figure)
                found = [(r, r.cells[steps][figure]) for r in rivals if figure in r.cells.get(steps, {})]
                if mine is None or not found or not any(point.value for point in (mine, *(p for _, p in found))):
                    continue
                best, point = (max if higher[figure] else min)(found, key=lambda item: item[1].value)
                sentences.append(_judge(line, best, steps, figure, (mine, point, higher[figure])))
    return sentences


def _compare_saturation(line: FewStepLine, rivals: Sequence[FewStepLine]) -> list[str]:
    """The student in its fewest steps against the teacher in its most, at the nearest guidance."""
    mine = [(steps, cell["saturation"]) for steps, cell in sorted(line.cells.items()) if "saturation" in cell]
    rival = min(rivals, key=lambda r: abs(r.guidance - line.guidance))
    theirs = [(steps, cell["saturation"]) for steps, cell in sorted(rival.cells.items()) if "saturation" in cell]
    if not mine or not theirs or not theirs[-1][1].value:
        return []
    (few, own), (most, other) = mine[0], theirs[-1]
    ratio = format_significant(own.value / other.value)
    return [
        f"Saturation: {_tell(line, own)} in {few} steps, {_tell(rival, other)} in {most} steps: {ratio} times the "
        "teacher's."
    ]


def _judge(
    line: FewStepLine, rival: FewStepLine, steps: int, figure: str, points: tuple[MetricPoint, MetricPoint, bool]
) -> str:
    mine, theirs, higher = points
    ends = [mine.low, mine.high, theirs.low, theirs.high]
    apart = None not in ends and (mine.low > theirs.high or mine.high < theirs.low)  # type: ignore[operator]
    better = (mine.value > theirs.value) == higher
    verdict = ("better" if better else "worse") + " by more than the intervals" if apart else "not told apart"
    many = f"{steps} step{'' if steps == 1 else 's'}"
    return f"{COLUMNS[figure]} in {many}: {_tell(line, mine)}, {_tell(rival, theirs)}: {verdict}."


def _tell(line: FewStepLine, point: MetricPoint) -> str:
    """`reflow-d4 at guidance 1 has 12.3 (11.9 to 12.8)`."""
    told = f"{line.label} at guidance {line.guidance:g} has {format_significant(point.value)}"
    if point.low is None or point.high is None:
        return told
    return f"{told} ({format_significant(point.low)} to {format_significant(point.high)})"


def read_sheet(run: RunFolder) -> tuple[FewStepSheet, str] | None:
    """The run's sheet of most settings and the address of its picture; None where it has no readable one."""
    found = []
    for uri in run.few_steps:
        try:
            sheet = from_json(FewStepSheet, storage.read_bytes(uri), where=uri)
        except UserError:
            continue
        found.append((len(sheet.settings), sheet.images_seen, sheet, uri.removesuffix(".json") + ".png"))
    return max(found, key=lambda item: item[:2])[2:] if found else None


def find_flow(sheet: FewStepSheet, guidance: float) -> DrawnFlow | None:
    return next((flow for flow in sheet.flows if flow.guidance == guidance and flow.along), None)
