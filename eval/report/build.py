"""Writes a scaling report from run folders: report.html (self-contained), report.md, report.json, figures/.

Reading is data.py's, comparing series.py's, fitting law.py's, wording findings.py's, all of it together analysis.py's;
figures are figures.py's, drawn by plots.py.
Pieces that are missing make a smaller report that says so.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.report import findings as words
from eval.report import tables
from eval.report.analysis import Report, analyse
from eval.report.as_json import to_json
from eval.report.data import read_runs
from eval.report.figures import draw_all, score_figure
from eval.report.pictures import progress_pictures, rung_pictures
from eval.report.plots import Drawn
from eval.report.style import count_text, power_text, standalone, themes
from infra import storage
from infra.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
N_IS_COUNTED = (
    "N is the exact number of parameters of the model, embeddings and both streams included; C is training FLOPs per "
    "image (counted exactly, three forward passes) times images; D is images."
)


def write_report(runs: str, out: str) -> Path:
    """Read the runs under `runs` (local or s3://), write the report into the local folder `out`, return report.html."""
    if storage.is_remote(out):
        raise UserError(f"--out {out}: a report is written to a local folder; copy it to S3 afterwards")
    report = analyse(read_runs(runs))
    drawn = draw_all(report)
    folder = storage.local_path(out)
    for name, data in _files(report, drawn).items():
        storage.write_bytes(str(folder / name), data)
    return folder / "report.html"


def _files(report: Report, drawn: Sequence[Drawn]) -> dict[str, bytes]:
    """Every file of the report by its path, report.html last: whoever sees it has the rest."""
    light, dark = themes(max(len(report.runs), 1))
    files: dict[str, bytes] = {}
    for figure in drawn:
        files[f"figures/{figure.name}.png"] = figure.light_png
        files[f"figures/{figure.name}-dark.png"] = figure.dark_png
        files[f"figures/{figure.name}.svg"] = standalone(figure.wide_svg, light, dark).encode()
    told = to_json(report)
    files["report.json"] = (json.dumps(told, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()
    context = page_context(report, told, drawn)
    files["report.md"] = _environment(html=False).get_template("report.md.j2").render(context).encode()
    files["report.html"] = _environment(html=True).get_template("report.html.j2").render(context).encode()
    return files


def page_context(report: Report, told: Mapping[str, Any], drawn: Sequence[Drawn]) -> dict[str, Any]:
    pictures, picture_notes = rung_pictures(report.runs)
    with_samples = [run for run in report.runs if run.samples]
    strip, strip_notes = progress_pictures(with_samples[-1]) if with_samples else ([], [])
    light, dark = themes(max(len(report.runs), 1))
    return {
        **told,
        "created": told["created"][:16].replace("T", " ") + " UTC",
        "missing": [*report.missing, *picture_notes, *strip_notes],
        "figures": {figure.name: figure for figure in drawn},
        "pictures": pictures,
        "strip": strip,
        "cooldown": any(tables.recipe_field(run, "schedule", "cooldown") for run in report.runs),
        "single_scores": [lines[0] for lines in told["scores"].values() if len(lines) == 1],
        "figure_names": {family: score_figure(family) for family in told["scores"]},
        "n_is_counted": N_IS_COUNTED,
        "worldly": any(family.startswith("world_") for family in report.families),
        "tiles": words.tiles(report.losses, report.families, report.found, report.costs, report.labels),
        "light": light.variables(),
        "dark": dark.variables(),
        "paper_tasks": tables.PAPER_TASKS,
        "paper_geneval": tables.PAPER_GENEVAL,
    }


def significant(value: float | None, digits: int = 3) -> str:
    """So many significant digits; powers of ten from a million on only."""
    if value is None:
        return ""
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if "e+" in text and abs(value) < 1e6 else text


def _environment(*, html: bool) -> Any:
    """Names and captions are data: escaped as HTML in the page; the Markdown uses `cell` to the same end."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=html, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters.update(
        count=lambda v: "" if v is None else count_text(v),
        power=lambda v: "" if v is None else power_text(v),
        duration=lambda v: "" if v is None else words.duration(v),
        sig=significant,
        words=lambda text: str(text).replace("_", " "),
        cell=markdown_text,
    )
    if html:
        environment.filters["drawing"] = lambda svg: Markup(svg)  # matplotlib has escaped its texts
    return environment


def markdown_text(text: Any) -> str:
    """One line that Markdown shows literally, also inside a table."""
    line = re.sub(r"([\\`*\[\]<>|$~])", r"\\\1", " ".join(str(text).split()))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\_", line)  # inside a word it is only an underscore


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
