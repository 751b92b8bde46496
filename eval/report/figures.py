"""Which figures a report has, from what was found: each is drawn only when there is something to draw."""

from collections.abc import Iterator

from eval.report import plots
from eval.report.analysis import Analysis
from eval.report.plots import CorrelationPanel, Draw, PlotLine, RenderedFigure, ScoreDots, render
from eval.report.series import Comparison, MetricPoint, ScoreTask, interpolate_loss_at_scores
from eval.report.tables import PAPER_GENEVAL, PAPER_TASKS
from eval.report.text import format_count
from eval.scaling.laws import interpolate_loss


def draw_figures(analysis: Analysis) -> list[RenderedFigure]:
    count = max(len(analysis.runs), 1)
    return [
        render(name, draw, alt=alt, caption=caption, num_series=count)
        for name, draw, alt, caption in (
            *_specify_losses(analysis),
            *_specify_law(analysis),
            *_specify_scores(analysis),
            *_specify_correlations(analysis),
        )
    ]


FigureSpecs = Iterator[tuple[str, Draw, str, str]]  # file name, how it is drawn, alternative text, caption


def _specify_losses(analysis: Analysis) -> FigureSpecs:
    losses, flops = analysis.losses, {run.name: run.flops_per_image for run in analysis.runs}
    if losses is None:
        return
    lines = [line for run in losses.points if (line := _make_line(analysis, losses, run))]
    if lines:
        ends = "; ".join(f"{line.label} ends at {line.y[-1]:.4g}" for line in lines)
        text = "One line per run, of the EMA weights on the validation split."
        text += " Where names do not fit, some lines bear none." if len(lines) > 16 else ""
        draw = plots.plot_loss_curves(lines, xlabel="images seen", compute=False, ylabel="Validation loss")
        yield "loss_images", draw, f"Validation loss against images seen: {ends}.", text
    spent = [
        line
        for run in losses.points
        if flops[run] and (line := _make_line(analysis, losses, run, scale=flops[run] or 1))
    ]
    if spent:
        text = "Training FLOPs: exact counts, three forward passes per image."
        if analysis.fit.compute is not None:
            text += " Dashed: L(C), the best size at each compute by L(N,D)."
        draw = plots.plot_loss_curves(
            spent, xlabel="training FLOPs", compute=True, ylabel="Validation loss", fit=analysis.fit
        )
        yield "loss_compute", draw, f"Validation loss against training FLOPs: {ends}.", text
    yield from _specify_noise_levels(analysis)


def _specify_noise_levels(analysis: Analysis) -> FigureSpecs:
    if len(analysis.levels) < 2:
        return
    everywhere = [run.name for run in analysis.runs if all(run.name in c.points for c in analysis.levels.values())]
    common = [c.last_common for c in analysis.levels.values()]
    at = common[0] if None not in common and len(set(common)) == 1 else None
    lines = []
    for run in everywhere:
        points = [(t, p.value) for t, c in analysis.levels.items() if (p := c.at(run, at))]
        lines.append(_compose_line(analysis, run, points))
    if lines:
        where = f"at {format_count(at)} images" if at else "at each run's last checkpoint"
        text = f"Loss per noise level {where}; the mean leaves out t = 1."
        draw = plots.plot_noise_levels(lines, lines[0].label)
        yield "loss_levels", draw, f"Validation loss per noise level for {', '.join(n.label for n in lines)}.", text


def _specify_law(analysis: Analysis) -> FigureSpecs:
    fit = analysis.fit
    if fit.size is None:
        return
    images = fit.summary.images
    dots = [_compose_line(analysis, c.run, [(c.parameters, interpolate_loss(c, images))]) for c in fit.curves]
    text = (
        "Dashed: L(N) = E + A/N^alpha; band: 95 % over resampled runs. Hollow: the next rung, its interval for one run."
    )
    yield "law", plots.plot_size_law(fit, dots), "Fitted loss against parameters with its 95 percent band.", text


def _specify_scores(analysis: Analysis) -> FigureSpecs:
    panels = []
    for family, tasks in analysis.families.items():
        if len(tasks) > 1 or len(tasks[0].metrics) > 1:
            yield from _specify_family(analysis, family, tasks)
        for task in tasks[:1]:
            for split, metric in sorted(task.metrics.items()):
                lines = [
                    line
                    for run in analysis.found[metric].points
                    if (line := _make_line(analysis, analysis.found[metric], run))
                ]
                if any(len(line.x) > 1 for line in lines):
                    panels.append((_compose_title(family, split), [line for line in lines if len(line.x) > 1]))
    if panels:
        text = "Scores over the checkpoints of each run, at the same prompts and seeds."
        yield "progress", plots.plot_progress(panels), "Scores against images seen.", text


def _specify_family(analysis: Analysis, family: str, tasks: list[ScoreTask]) -> FigureSpecs:
    splits = [s for s in ("all", "seen", "unseen") if any(s in task.metrics for task in tasks)]
    rows = []
    for run in analysis.runs:
        scores = {
            (task.task, split): point
            for task in tasks
            for split, metric in task.metrics.items()
            if (point := analysis.found[metric].at(run.name))
        }
        if scores:
            rows.append(ScoreDots(_shorten(analysis.labels[run.name]), _find_order(analysis, run.name), scores))
    text = "Last checkpoint of each run; bars are 95 % intervals over prompts."
    if family == "geneval":  # the official benchmark: only then may the paper's figures stand beside ours
        rows += _list_published(splits)
        text += " Hollow: SD3's own models (its Table 5, 512 px, before DPO; other data and far more compute)."
    values = [p.value for row in rows for p in row.scores.values()]
    draw = plots.plot_scores(
        rows, [task.task for task in tasks], splits, unit_range=min(values) >= 0 and max(values) <= 1
    )
    yield name_score_figure(family), draw, f"{family} per task for {', '.join(row.label for row in rows)}.", text


def _list_published(splits: list[str]) -> list[ScoreDots]:
    """SD3's smallest and largest model of that table."""
    found = []
    for order, depth in enumerate((min(PAPER_GENEVAL), max(PAPER_GENEVAL))):
        values = zip(PAPER_TASKS, PAPER_GENEVAL[depth])
        scores = {(task, splits[0]): MetricPoint(0, value, None, None, 553) for task, value in values}
        found.append(ScoreDots(f"SD3 depth {depth}", order, scores, published=True))
    return found


def _specify_correlations(analysis: Analysis) -> FigureSpecs:
    panels = []
    for line in analysis.correlations:
        metric, images, across = line.metric, line.images, line.across_runs
        if analysis.losses is None or images is None or across.num_runs < 2:
            continue
        x, y = interpolate_loss_at_scores(analysis.losses, analysis.found[metric]), analysis.found[metric].values()
        runs = [run for run in x if images in x[run]]
        if len({y[run][images] for run in runs}) == 1:
            continue  # a flat line says nothing
        dots = tuple(_compose_line(analysis, run, [(x[run][images], y[run][images])]) for run in runs)
        paths = tuple(
            _compose_line(analysis, run, [(x[run][i], y[run][i]) for i in x[run]]) for run in runs if len(x[run]) > 1
        )
        note = f"r = {across.pearson.value:+.2f} over {across.num_runs} runs" if across.pearson else ""
        family, *rest = metric.split("/")
        panels.append(CorrelationPanel(_compose_title(family, rest[-1] if rest else "all"), note, dots, paths))
    if panels:
        text = "Big marks: runs at equal images, which the coefficient is over. Thin lines: each run's own checkpoints."
        yield (
            "correlation",
            plots.plot_correlations(panels),
            "Validation loss against each score, one mark per run.",
            text,
        )


def _make_line(analysis: Analysis, comparison: Comparison, run: str, *, scale: float = 1.0) -> PlotLine | None:
    """Positive x only (an untrained checkpoint has no place on a log axis)."""
    points = [(p.images * scale, p.value) for p in comparison.points[run] if p.images > 0]
    return _compose_line(analysis, run, points) if points else None


def _compose_line(analysis: Analysis, run: str, points: list[tuple[float, float]]) -> PlotLine:
    xs, ys = tuple(float(x) for x, _ in points), tuple(float(y) for _, y in points)
    return PlotLine(_shorten(analysis.labels[run]), _find_order(analysis, run), xs, ys)


def _shorten(label: str, most: int = 22) -> str:
    """A figure has room for so much; the tables have the whole name."""
    return label if len(label) <= most else label[: most - 3] + "..."


def _find_order(analysis: Analysis, run: str) -> int:
    return [r.name for r in analysis.runs].index(run)


def _compose_title(family: str, split: str) -> str:
    return family + {"seen": ", seen", "unseen": ", unseen"}.get(split, "")


def name_score_figure(family: str) -> str:
    """File name of a family's figure."""
    return "scores_" + "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in family)
