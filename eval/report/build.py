"""Writes a scaling report from run folders: report.html (self-contained), report.md, report.json, figures/.

runs.py reads, series.py compares, law.py fits, findings.py puts into words, analysis.py does all of it; document.py
composes report.json; figures.py decides on figures, which plots.py draws. Missing pieces make a smaller report that
says so.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.report import tables
from eval.report.analysis import Analysis, analyse
from eval.report.document import Report, compose_report, encode_report
from eval.report.fewstep_page import FewStepPage, compose_page
from eval.report.fewstep_plots import draw_few_steps
from eval.report.fewsteps import PAPER_LOSS
from eval.report.figures import draw_figures, name_score_figure
from eval.report.headline import choose_headlines
from eval.report.pictures import choose_progress_pictures, choose_rung_pictures
from eval.report.plots import RenderedFigure
from eval.report.runs import read_runs
from eval.report.style import make_themes, wrap_svg
from eval.report.text import escape_markdown, format_count, format_duration, format_power, format_significant
from infra import storage
from infra.codec import to_json
from infra.errors import UserError
from infra.markdown import wrap_prose
from infra.version import code_version

TEMPLATES = Path(__file__).parent / "templates"
N_IS_COUNTED = (
    "N is the exact number of parameters of the model, embeddings and both streams included; C is training FLOPs per "
    "image (counted exactly, three forward passes) times images; D is images."
)


def write_report(runs: str, out: str) -> Path:
    """Read the runs under `runs` (local or s3://), write the report into the local folder `out`, return report.html."""
    if storage.is_remote(out):
        raise UserError(f"--out {out}: a report is written to a local folder; copy it to S3 afterwards")
    analysis = analyse(read_runs(runs))
    folder = storage.local_path(out)
    for name, data in render_files(analysis, draw_figures(analysis)).items():
        storage.write_bytes(str(folder / name), data)
    return folder / "report.html"


def render_files(analysis: Analysis, drawn: Sequence[RenderedFigure]) -> dict[str, bytes]:
    """Every file of the report by its path, report.html last: whoever sees it has the rest. few_steps.* are there where
    `eval fewstep` measured something."""
    files = name_figure_files(drawn, len(analysis.runs))
    report = compose_report(analysis)
    files["report.json"] = encode_report(report)
    context = make_page_context(analysis, report, drawn)
    pages = [("report.md", context), ("report.html", context)]
    if analysis.few_steps is not None:
        page = compose_page(analysis.few_steps, analysis.runs)
        few = draw_few_steps(page)
        files |= name_figure_files(few, len(analysis.few_steps.lines))
        files["few_steps.json"] = (json.dumps(to_json(analysis.few_steps, finite=True), indent=1) + "\n").encode()
        few_context = make_few_steps_context(page, few, source=analysis.data.uri)
        pages = [("few_steps.md", few_context), ("few_steps.html", few_context), *pages]
    for name, page_context in pages:
        files[name] = render_page(name, page_context).encode()
    return files


def name_figure_files(drawn: Sequence[RenderedFigure], num_series: int) -> dict[str, bytes]:
    """Each figure as PNG for light and for dark ground and as SVG for both, by path."""
    light, dark = make_themes(max(num_series, 1))
    files = {}
    for figure in drawn:
        files[f"figures/{figure.name}.png"] = figure.light_png
        files[f"figures/{figure.name}-dark.png"] = figure.dark_png
        files[f"figures/{figure.name}.svg"] = wrap_svg(figure.wide_svg, light, dark).encode()
    return files


def make_few_steps_context(page: FewStepPage, drawn: Sequence[RenderedFigure], *, source: str) -> dict[str, Any]:
    """What the templates few_steps.* read."""
    found = page.found
    light, dark = make_themes(max(len(found.lines), 1))
    return {
        "source": source,
        "code_version": code_version(),
        "lines": found.lines,
        "members": found.members,
        "flows": [line for line in found.lines if line.flow],
        "order": {line.name: number for number, line in enumerate(found.lines)},
        "all_steps": found.steps,
        "shown": found.figures,
        "columns": page.columns,
        "best": found.best,
        "findings": found.findings,
        "left_out": found.left_out,
        "worldly": any("/world_" in metric for metric in found.protocols),
        "figures": {figure.name: figure for figure in drawn},
        "paper_loss": PAPER_LOSS,
        "light": light.variables(),
        "dark": dark.variables(),
    }


def make_page_context(analysis: Analysis, report: Report, drawn: Sequence[RenderedFigure]) -> dict[str, Any]:
    """What the templates read: all of report.json, pictures and figures, and how a page names things."""
    pictures, picture_notes = choose_rung_pictures(analysis.runs)
    with_samples = [run for run in analysis.runs if run.samples]
    strip, strip_notes = choose_progress_pictures(with_samples[-1]) if with_samples else ([], [])
    light, dark = make_themes(max(len(analysis.runs), 1))
    fields = to_json(report, finite=True)
    return {
        **fields,
        "created": report.created[:16].replace("T", " ") + " UTC",
        "missing": [*report.missing, *picture_notes, *strip_notes],
        "figures": {figure.name: figure for figure in drawn},
        "pictures": pictures,
        "strip": strip,
        "cooldown": any(run.recipe_field("schedule", "cooldown") for run in analysis.runs),
        "single_scores": [lines[0] for lines in fields["scores"].values() if len(lines) == 1],
        "figure_names": {family: name_score_figure(family) for family in report.scores},
        "n_is_counted": N_IS_COUNTED,
        "worldly": any(family.startswith("world_") for family in report.scores),
        "tiles": choose_headlines(analysis.losses, analysis.families, analysis.found, analysis.costs, analysis.labels),
        "light": light.variables(),
        "dark": dark.variables(),
        "few_steps": analysis.few_steps is not None,
        "paper_tasks": tables.PAPER_TASKS,
        "paper_geneval": tables.PAPER_GENEVAL,
    }


def render_page(name: str, context: dict[str, Any]) -> str:
    """report.html or report.md. Names and captions are data: escaped as HTML; in Markdown by the filter `cell`."""
    import jinja2
    from markupsafe import Markup

    html = name.endswith(".html")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=html, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters.update(
        count=lambda v: "" if v is None else format_count(v),
        power=lambda v: "" if v is None else format_power(v),
        duration=lambda v: "" if v is None else format_duration(v),
        sig=format_significant,
        words=lambda text: str(text).replace("_", " "),
        cell=escape_markdown,
    )
    if html:
        environment.filters["drawing"] = lambda svg: Markup(svg)  # matplotlib has escaped its texts
    page = environment.get_template(f"{name}.j2").render(context)
    return page if html else wrap_prose(page)


@dataclass(frozen=True)
class ReportOptions:
    """Where from and where to."""

    runs: str
    """folder (or s3:// prefix) of run folders, or one run folder"""
    out: str = "report"
    """local folder to write into"""


def report(options: ReportOptions) -> None:
    """Write report.html, report.md, report.json and figures from run folders."""
    print(write_report(options.runs, options.out))
