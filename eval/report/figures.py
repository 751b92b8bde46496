"""Which figures a report has, from what was found: each is drawn only when there is something to draw."""

from collections.abc import Iterator

from eval.report import plots as figures
from eval.report.analysis import Report
from eval.report.plots import Dots, Draw, Drawn, Line, Panel, render
from eval.report.series import Comparison, Point, Task, loss_when_scored
from eval.report.style import count_text
from eval.report.tables import PAPER_GENEVAL, PAPER_TASKS
from eval.scaling.laws import interpolate_loss


def draw_all(report: Report) -> list[Drawn]:
    count = max(len(report.runs), 1)
    return [
        render(name, draw, alt=alt, caption=caption, num_series=count)
        for name, draw, alt, caption in (*_loss(report), *_law(report), *_scores(report), *_correlations(report))
    ]


Plan = Iterator[tuple[str, Draw, str, str]]


def _loss(report: Report) -> Plan:
    losses, flops = report.losses, {run.name: run.flops_per_image for run in report.runs}
    if losses is None:
        return
    lines = [line for run in losses.points if (line := _line(report, losses, run))]
    if lines:
        ends = "; ".join(f"{line.label} ends at {line.y[-1]:.4g}" for line in lines)
        text = "One line per run, of the EMA weights on the validation split."
        text += " Where names do not fit, some lines bear none." if len(lines) > 16 else ""
        draw = figures.loss_curves(lines, xlabel="images seen", compute=False, ylabel="Validation loss")
        yield "loss_images", draw, f"Validation loss against images seen: {ends}.", text
    spent = [
        line for run in losses.points if flops[run] and (line := _line(report, losses, run, scale=flops[run] or 1))
    ]
    if spent:
        text = "Training FLOPs: exact counts, three forward passes per image."
        if report.scaling.compute is not None:
            text += " Dashed: L(C), the best size at each compute by L(N,D)."
        draw = figures.loss_curves(
            spent, xlabel="training FLOPs", compute=True, ylabel="Validation loss", scaling=report.scaling
        )
        yield "loss_compute", draw, f"Validation loss against training FLOPs: {ends}.", text
    yield from _levels(report)


def _levels(report: Report) -> Plan:
    if len(report.levels) < 2:
        return
    everywhere = [run.name for run in report.runs if all(run.name in c.points for c in report.levels.values())]
    common = [c.last_common for c in report.levels.values()]
    at = common[0] if None not in common and len(set(common)) == 1 else None
    lines = []
    for run in everywhere:
        points = [(t, p.value) for t, c in report.levels.items() if (p := c.at(run, at))]
        lines.append(_as_line(report, run, points))
    if lines:
        where = f"at {count_text(at)} images" if at else "at each run's last checkpoint"
        text = f"Loss per noise level {where}; the mean leaves out t = 1."
        draw = figures.noise_levels(lines, lines[0].label)
        yield "loss_levels", draw, f"Validation loss per noise level for {', '.join(n.label for n in lines)}.", text


def _law(report: Report) -> Plan:
    scaling = report.scaling
    if scaling.size is None:
        return
    dots = [_as_line(report, c.run, [(c.parameters, interpolate_loss(c, scaling.images))]) for c in scaling.curves]
    text = (
        "Dashed: L(N) = E + A/N^alpha; band: 95 % over resampled runs. Hollow: the next rung, its interval for one run."
    )
    yield "law", figures.size_law(scaling, dots), "Fitted loss against parameters with its 95 percent band.", text


def _scores(report: Report) -> Plan:
    panels = []
    for family, tasks in report.families.items():
        if len(tasks) > 1 or len(tasks[0].metrics) > 1:
            yield from _family(report, family, tasks)
        for task in tasks[:1]:
            for split, metric in sorted(task.metrics.items()):
                lines = [
                    line for run in report.found[metric].points if (line := _line(report, report.found[metric], run))
                ]
                if any(len(line.x) > 1 for line in lines):
                    panels.append((_title(family, split), [line for line in lines if len(line.x) > 1]))
    if panels:
        text = "Scores over the checkpoints of each run, at the same prompts and seeds."
        yield "progress", figures.progress(panels), "Scores against images seen.", text


def _family(report: Report, family: str, tasks: list[Task]) -> Plan:
    splits = [s for s in ("all", "seen", "unseen") if any(s in task.metrics for task in tasks)]
    rows = []
    for run in report.runs:
        scores = {
            (task.name, split): point
            for task in tasks
            for split, metric in task.metrics.items()
            if (point := report.found[metric].at(run.name))
        }
        if scores:
            rows.append(Dots(_short(report.labels[run.name]), _order(report, run.name), scores))
    text = "Last checkpoint of each run; bars are 95 % intervals over prompts."
    if family == "geneval":  # the official benchmark: only then may the paper's figures stand beside ours
        rows += _published(splits)
        text += " Hollow: SD3's own models (its Table 5, 512 px, before DPO; other data and far more compute)."
    values = [p.value for row in rows for p in row.scores.values()]
    draw = figures.scores(rows, [task.name for task in tasks], splits, unit_range=min(values) >= 0 and max(values) <= 1)
    yield score_figure(family), draw, f"{family} per task for {', '.join(row.label for row in rows)}.", text


def _published(splits: list[str]) -> list[Dots]:
    """SD3's smallest and largest model of that table."""
    found = []
    for order, depth in enumerate((min(PAPER_GENEVAL), max(PAPER_GENEVAL))):
        values = zip(PAPER_TASKS, PAPER_GENEVAL[depth])
        scores = {(task, splits[0]): Point(0, value, None, None, 553) for task, value in values}
        found.append(Dots(f"SD3 depth {depth}", order, scores, published=True))
    return found


def _correlations(report: Report) -> Plan:
    panels = []
    for metric, images, across, _ in report.correlations:
        if report.losses is None or images is None or across.num_runs < 2:
            continue
        x, y = loss_when_scored(report.losses, report.found[metric]), report.found[metric].values()
        runs = [run for run in x if images in x[run]]
        if len({y[run][images] for run in runs}) == 1:
            continue  # a flat line says nothing
        dots = tuple(_as_line(report, run, [(x[run][images], y[run][images])]) for run in runs)
        lines = tuple(
            _as_line(report, run, [(x[run][i], y[run][i]) for i in x[run]]) for run in runs if len(x[run]) > 1
        )
        note = f"r = {across.pearson.value:+.2f} over {across.num_runs} runs" if across.pearson else ""
        family, *rest = metric.split("/")
        panels.append(Panel(_title(family, rest[-1] if rest else "all"), note, dots, lines))
    if panels:
        text = "Big marks: runs at equal images, which the coefficient is over. Thin lines: each run's own checkpoints."
        yield "correlation", figures.correlations(panels), "Validation loss against each score, one mark per run.", text


def _line(report: Report, comparison: Comparison, run: str, *, scale: float = 1.0) -> Line | None:
    """Positive x only (an untrained checkpoint has no place on a log axis)."""
    points = [(p.images * scale, p.value) for p in comparison.points[run] if p.images > 0]
    return _as_line(report, run, points) if points else None


def _as_line(report: Report, run: str, points: list[tuple[float, float]]) -> Line:
    xs, ys = tuple(float(x) for x, _ in points), tuple(float(y) for _, y in points)
    return Line(_short(report.labels[run]), _order(report, run), xs, ys)


def _short(label: str, most: int = 22) -> str:
    """A figure has room for so much; the tables have the whole name."""
    return label if len(label) <= most else label[: most - 3] + "..."


def _order(report: Report, run: str) -> int:
    return [r.name for r in report.runs].index(run)


def _title(family: str, split: str) -> str:
    return family + {"seen": ", seen", "unseen": ", unseen"}.get(split, "")


def score_figure(family: str) -> str:
    """File name of a family's figure."""
    return "scores_" + "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in family)
