"""The page of `eval fewstep`, from the rows and sheets of runs: one line per run and guidance, one cell per steps."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from eval.report.runs import RunFolder
from eval.report.seeds import average_points, group_seeds, spread_over
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
    "seconds/latents_batch": "latents of a batch, s", "seconds/pictures_batch": "picture of a batch, s",
}  # fmt: skip
QUALITY = ("fid", "clip_score", "geneval/overall/seen", "geneval/overall", "geneval/overall/unseen", "diversity")
# SD3 (arXiv 2403.03206), Table 6: CLIP score lost against 50 steps, in %, by 5, 10 and 20 steps.
PAPER_LOSS = {15: (4.30, 0.86, 0.21), 30: (3.59, 0.70, 0.24), 38: (2.71, 0.14, 0.08)}


@dataclass(frozen=True)
class FewStepLine:
    """One arm at one guidance: a run, or the mean of runs that differ in their seed alone. `run`: its name.

    `cells`: steps -> figure -> its point; `flow`: straightness, length, bend, whole and by t. Intervals are over
    prompts, those of several runs over seeds. `teacher`: the arm whose couplings taught it, `origin`: the one whose
    weights it started from; None where that is not here.
    """

    run: str
    label: str
    kind: str
    guidance: float
    teacher: str | None
    cells: dict[int, dict[str, MetricPoint]]
    flow: dict[str, MetricPoint]
    runs: tuple[str, ...] = ()
    objective: str = ""
    origin: str | None = None
    baked_guidance: float = 1.0
    """The teacher's guidance in what the student learnt from."""
    over_prompts: dict[int, dict[str, MetricPoint]] = field(default_factory=dict)
    """Of several runs: the mean of their intervals over prompts; what one set of prompts leaves open."""

    @property
    def name(self) -> str:
        return f"{self.label}, guidance {self.guidance:g}"

    def find_taught(self, rivals: Sequence["FewStepLine"]) -> "FewStepLine":
        """The one of the teacher's lines whose guidance is nearest to what this student draws with: its own and the
        baked one multiply."""
        return min(rivals, key=lambda rival: abs(rival.guidance - self.guidance * self.baked_guidance))

    def find_widest(self, steps: int, figure: str) -> MetricPoint | None:
        """The point with an interval that holds the one over seeds and the one over prompts."""
        point, other = (cells.get(steps, {}).get(figure) for cells in (self.cells, self.over_prompts))
        return point if point is None or other is None else spread_over(point, other)


@dataclass(frozen=True)
class FewSteps:
    """What few_steps.json holds. `best`: steps -> figure -> names of lines that the best one's interval holds."""

    format: int
    lines: list[FewStepLine]
    members: list[FewStepLine]
    """the single runs behind those lines that are means over seeds"""
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


def is_few_step(metric: str) -> bool:
    """Does `eval fewstep` write rows of that name?"""
    return metric.startswith("fewstep/")


def compare_few_steps(runs: Sequence[RunFolder]) -> dict[str, Comparison]:
    """Every metric of `eval fewstep`, from the runs' rows."""
    only = [replace(run, rows=tuple(row for row in run.rows if is_few_step(row.metric))) for run in runs]
    metrics = sorted({row.metric for run in only for row in run.rows if is_number(row)})
    return {metric: comparison for metric in metrics if (comparison := compare(only, metric))}


def compose_few_steps(
    runs: Sequence[RunFolder], comparisons: Mapping[str, Comparison], labels: Mapping[str, str]
) -> FewSteps | None:
    """`comparisons`: metric -> the runs' points. None where no run has such rows."""
    found = {metric: comparison for metric, comparison in sorted(comparisons.items()) if is_few_step(metric)}
    having = {run for comparison in found.values() for run in comparison.points}
    only = [run for run in runs if run.name in having]
    if not only:
        return None
    arms = group_seeds(only)
    origins = _find_origins(only, arms)
    singles = [
        line for run in only for line in _make_lines(run.name, found, label=labels[run.name], **origins[run.name])
    ]
    lines = [line for arm, names in arms.items() for line in _make_arm(arm, names, singles)]
    for each in (lines, singles):
        each.sort(key=lambda line: (line.kind != "teacher", line.label, line.guidance))
    figures = [name for name in COLUMNS if any(name in cell for line in lines for cell in line.cells.values())]
    higher = {_shorten(metric): comparison.higher_is_better for metric, comparison in found.items()}
    return FewSteps(
        format=2,
        lines=lines,
        members=[line for line in singles if any(line.run in arm.runs and len(arm.runs) > 1 for arm in lines)],
        figures=figures,
        higher_is_better=higher,
        best={steps: _find_best_lines(lines, steps, figures, higher) for steps in _list_steps(lines)},
        findings=compose_findings(lines, higher),
        left_out=[left for comparison in found.values() for left in comparison.left_out],
        protocols={metric: comparison.protocol for metric, comparison in found.items()},
    )


def _find_origins(runs: Sequence[RunFolder], arms: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """For each run the fields of its lines that say what it is and whom it learnt from."""
    sheets = {run.name: read[0] for run in runs if (read := read_sheet(run))}
    arm_of = {name: arm for arm, names in arms.items() for name in names}
    by_weights = {sheet.weights: arm_of[name] for name, sheet in sheets.items()}
    taught = {str(sheet.student.get("teacher")) for sheet in sheets.values()}
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        student = sheets[run.name].student if run.name in sheets else {}
        origin = by_weights.get(str(run.recipe_field("init_weights"))) if student else None
        is_teacher = not student and run.name in sheets and sheets[run.name].weights in taught
        found[run.name] = {
            "kind": _describe(student, origin) if student else "teacher" if is_teacher else "",
            "teacher": by_weights.get(str(student.get("teacher"))),
            "objective": str(student.get("objective", "")),
            "origin": origin,
            "baked_guidance": float(student["guidance"]) if student.get("guidance_kind") == "baked" else 1.0,
        }
    return found


def _describe(student: Mapping[str, Any], origin: str | None) -> str:
    """`reflow, round 1, guidance 1.5 baked in`."""
    baked = student.get("guidance_kind") == "baked"
    parts = [
        str(student.get("objective", "student")), f"round {student['round']}" if "round" in student else "",
        f"from {origin}" if origin else "", f"guidance {student['guidance']:g} baked in" if baked else "",
    ]  # fmt: skip
    return ", ".join(filter(None, parts))


def _make_lines(run: str, comparisons: Mapping[str, Comparison], *, label: str, **origin: Any) -> list[FewStepLine]:
    lines: dict[float, FewStepLine] = {}
    for metric, comparison in comparisons.items():
        point = comparison.at(run)
        setting = _SETTING.fullmatch(metric) or _FLOW.fullmatch(metric)
        if point is None or setting is None:
            continue
        guidance = float(setting["guidance"])
        line = lines.setdefault(
            guidance, FewStepLine(run, label, guidance=guidance, cells={}, flow={}, runs=(run,), **origin)
        )
        if setting.re is _FLOW:
            line.flow[setting["figure"]] = point
        else:
            line.cells.setdefault(int(setting["steps"]), {})[setting["figure"].removeprefix("world_")] = point
    return list(lines.values())


def _make_arm(arm: str, names: Sequence[str], singles: Sequence[FewStepLine]) -> list[FewStepLine]:
    """The lines of an arm: those of its run, or the means of its runs, one for each guidance."""
    mine = [line for line in singles if line.run in names]
    if len(names) == 1:
        return [replace(line, run=arm) for line in mine]
    found = []
    for guidance in sorted({line.guidance for line in mine}):
        each = [line for line in mine if line.guidance == guidance]
        if len(each) == 1:
            found.append(replace(each[0], run=arm))
            continue
        cells = {steps: _average([line.cells.get(steps, {}) for line in each]) for steps in _list_steps(each)}
        found.append(
            replace(
                each[0], run=arm, label=f"{arm} ({len(each)} seeds)", runs=tuple(line.run for line in each),
                cells={steps: over_seeds for steps, (over_seeds, _) in cells.items()},
                over_prompts={steps: over_prompts for steps, (_, over_prompts) in cells.items()},
                flow=_average([line.flow for line in each])[0],
            )
        )  # fmt: skip
    return found


def _average(each: Sequence[Mapping[str, MetricPoint]]) -> tuple[dict[str, MetricPoint], dict[str, MetricPoint]]:
    """For figures that two runs have at least: the mean with its interval over seeds, and the mean of intervals."""
    points = {name: [cell[name] for cell in each if name in cell] for cell in each for name in cell}
    averaged = {name: average_points(found) for name, found in points.items() if len(found) > 1}
    return {name: found[0] for name, found in averaged.items()}, {name: found[1] for name, found in averaged.items()}


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
    """Each student beside its teacher: straightness, and quality at the same number of steps. Then students of one
    objective beside each other: those that started from another student against those from the teacher."""
    sentences = []
    for line in lines:
        rivals = [other for other in lines if other.run == line.teacher]
        if not rivals:
            continue
        flows = [other for other in rivals if "straightness" in other.flow]
        if "straightness" in line.flow and flows:
            rival = line.find_taught(flows)
            both = _tell(line, line.flow["straightness"]), _tell(rival, rival.flow["straightness"])
            sentences.append(f"Straightness (0 is straight): {', '.join(both)}.")
        sentences += _compare_saturation(line, rivals)
        sentences += _compare_quality(line, rivals, higher, most=3)
    for line in lines:
        direct = [
            other for other in lines
            if (other.objective, other.guidance, other.teacher) == (line.objective, line.guidance, line.teacher)
            and other.origin == other.teacher != line.origin
        ]  # fmt: skip
        if line.teacher is not None and line.origin is not None and direct:
            sentences += _compare_quality(line, direct, higher, most=2)
    return sentences


def _compare_quality(
    line: FewStepLine, rivals: Sequence[FewStepLine], higher: Mapping[str, bool], *, most: int
) -> list[str]:
    """The line against the best of its rivals, in its `most` fewest numbers of steps."""
    sentences = []
    for figure in ("fid", "geneval/overall/seen", "geneval/overall"):
        for steps in _list_steps([line])[:most]:
            mine = line.find_widest(steps, figure)
            found = [(r, point) for r in rivals if (point := r.find_widest(steps, figure))]
            if mine is None or not found or not any(point.value for point in (mine, *(p for _, p in found))):
                continue
            best, point = (max if higher[figure] else min)(found, key=lambda item: item[1].value)
            sentences.append(_judge(line, best, steps, figure, (mine, point, higher[figure])))
    return sentences


def _compare_saturation(line: FewStepLine, rivals: Sequence[FewStepLine]) -> list[str]:
    """The student in its fewest steps against the teacher in its most, at the guidance that it taught with."""
    mine = [(steps, cell["saturation"]) for steps, cell in sorted(line.cells.items()) if "saturation" in cell]
    rival = line.find_taught(rivals)
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
