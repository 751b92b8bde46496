"""Writes a scaling report from run folders: report.html (self-contained), report.md, report.json, figures/.

Reading is data.py's, comparing series.py's, fitting law.py's, drawing plots.py's, wording findings.py's.
Pieces that are missing make a smaller report that says so.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from eval.report import findings as words
from eval.report import tables
from eval.report.data import ReportData, Run, read_runs
from eval.report.figures import draw_all, score_figure
from eval.report.law import Scaling, fit_ladder, read_coverage
from eval.report.pictures import progress_pictures, rung_pictures
from eval.report.plots import Drawn
from eval.report.predict import Graded, grade
from eval.report.series import Comparison, Task, compare, level_metrics, loss_when_scored, main_loss, score_families
from eval.report.style import standalone, themes
from eval.scaling.correlation import Correlation, across_runs, equal_images, within_runs
from infra import storage
from infra.errors import UserError
from infra.version import code_version

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Report:
    """Everything that the pages show, before it is drawn."""

    data: ReportData
    labels: dict[str, str]
    losses: Comparison | None
    levels: dict[float, Comparison]
    families: dict[str, list[Task]]
    found: dict[str, Comparison]
    scaling: Scaling
    correlations: list[tuple[str, int | None, Correlation, Correlation]]
    calibration: list[dict[str, Any]]
    costs: dict[str, dict[str, Any]]
    graded: list[Graded]
    findings: list[words.Finding]
    missing: list[str]

    @property
    def runs(self) -> tuple[Run, ...]:
        return self.data.runs


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


def analyse(data: ReportData) -> Report:
    runs, labels = data.runs, label_runs(data.runs)
    loss = main_loss(runs)
    losses = compare(runs, loss) if loss else None
    levels = {t: c for t, name in level_metrics(runs, loss).items() if (c := compare(runs, name))} if loss else {}
    families = score_families(runs)
    found = {
        metric: comparison
        for tasks in families.values()
        for task in tasks
        for metric in task.metrics.values()
        if (comparison := compare(runs, metric))
    }
    scaling = fit_ladder(runs, losses)
    correlations = [
        (metric, *correlate(losses, found[metric])) for metric in headline_metrics(families) if losses is not None
    ]
    graded = grade(data.predictions, runs, losses)
    calibration = tables.calibration_table(data.calibration)
    costs = {run.name: tables.cost_of(run) for run in runs}
    sizes = {run.name: run.parameters or run.depth or 0 for run in runs}
    findings = [
        *words.loss_findings(losses, labels, sizes),
        *words.law_findings(scaling),
        *words.prediction_findings(graded),
        *(f for family, tasks in families.items() for f in words.score_findings(family, tasks, found, labels)),
        *words.calibration_findings(calibration, any(name.startswith("world_") for name in families)),
        *words.correlation_findings([(metric, across) for metric, _, across, _ in correlations]),
        *words.cost_findings(costs),
        *words.protocol_findings([left for c in (losses, *found.values()) if c for left in c.left_out]),
    ]
    missing = words.missing_findings(runs, labels, families, calibration)
    return Report(
        data, labels, losses, levels, families, found, scaling, correlations, calibration, costs, graded, findings,
        missing,
    )  # fmt: skip


def label_runs(runs: Sequence[Run]) -> dict[str, str]:
    """`depth 4` where depths tell the runs apart, else their names."""
    depths = [run.depth for run in runs]
    unique = None not in depths and len(set(depths)) == len(depths)
    return {run.name: f"depth {run.depth}" if unique else run.name for run in runs}


def headline_metrics(families: Mapping[str, Sequence[Task]]) -> list[str]:
    """Each family's overall score: on seen compositions and, where there are such, on unseen ones."""
    overall = [task for tasks in families.values() for task in tasks if task.name == "overall"]
    return [metric for task in overall for _, metric in sorted(task.metrics.items())]


def correlate(losses: Comparison, scores: Comparison) -> tuple[int | None, Correlation, Correlation]:
    """(images, across runs at those images, within runs), with the loss that each run had when it was scored."""
    x, y = loss_when_scored(losses, scores), scores.values()
    images = equal_images(x, y)
    both = [run for run in x if images in x[run]] if images is not None else []
    across = (
        across_runs([x[run][images] for run in both], [y[run][images] for run in both])
        if images
        else across_runs([], [])
    )
    return images, across, within_runs([(list(x[run].values()), [y[run][i] for i in x[run]]) for run in x])


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
        "worldly": any(family.startswith("world_") for family in report.families),
        "tiles": words.tiles(report.losses, report.families, report.found, report.costs, report.labels),
        "light": light.variables(),
        "dark": dark.variables(),
        "paper_tasks": tables.PAPER_TASKS,
        "paper_geneval": tables.PAPER_GENEVAL,
    }


def to_json(report: Report) -> dict[str, Any]:
    """report.json: all figures of the report, without the drawings."""
    compared = {**report.found, **{c.metric: c for c in (report.losses, *report.levels.values()) if c}}
    return plain(
        {
            "format": 1,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "code_version": code_version(),
            "source": report.data.uri,
            "findings": report.findings,
            "runs": [_run(run, report) for run in report.runs],
            "loss_metric": report.losses.metric if report.losses else None,
            "losses": report.losses.points if report.losses else {},
            "loss_levels": {f"{t:g}": c.points for t, c in report.levels.items()},
            "scaling": scaling_json(report.scaling),
            "predictions": [{**dataclasses.asdict(found), "inside": found.inside} for found in report.graded],
            "scores": {
                family: tables.score_rows(family, tasks, report.found, report.labels)
                for family, tasks in report.families.items()
            },
            "correlations": [
                {"metric": metric, "images": images, "across_runs": across, "within_runs": within}
                for metric, images, across, within in report.correlations
            ],
            "calibration": report.calibration,
            "recipe_differences": tables.recipe_differences(report.runs),
            "left_out": [left for c in compared.values() for left in c.left_out],
            "missing": report.missing,
            "provenance": tables.provenance(report.runs),
            "protocols": tables.protocols(compared),
            "labels": report.labels,
        }
    )


def _run(run: Run, report: Report) -> dict[str, Any]:
    return {
        "run": run.name,
        "label": report.labels[run.name],
        "depth": run.depth,
        "parameters": run.parameters,
        "train_flops_per_image": run.flops_per_image,
        "recipe": run.recipe,
        "cost": report.costs[run.name],
        "predicted": tables.plan_against_reality(run),
    }


def scaling_json(scaling: Scaling) -> dict[str, Any]:
    """The laws with 95 % intervals, or the reason why there are none."""
    if scaling.reason is not None:
        return {"reason": scaling.reason, "notes": scaling.notes, "coverage": read_coverage()}
    laws = {}
    for name, boot in (("L(N)", scaling.size), ("L(N,D)", scaling.joint), ("L(C)", scaling.compute)):
        if boot is None:
            continue
        laws[name] = {
            "floor": boot.floor(),
            "coefficients": boot.law.coefficients,
            "exponents": [boot.exponent(k) for k in range(len(boot.law.exponents))],
            "scatter_between_runs": boot.scatter.between_runs,
            "degrees_of_freedom": boot.scatter.freedom,
        }
    return {
        "reason": None,
        "notes": scaling.notes,
        "images": scaling.images,
        "equal_ends": scaling.equal_ends,
        "laws": laws,
        "frontier": scaling.best,
        "optimum": scaling.optimum,
        "size_exponent": scaling.size_exponent,
        "images_exponent": scaling.images_exponent,
        "next_rung": scaling.next_rung,
        "held_out": scaling.held_out,
        "coverage": read_coverage(),
    }


def plain(value: Any) -> Any:
    """Dataclasses, tuples, sets and numpy numbers as JSON has them; a number that is none becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(inner) for inner in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


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

    from eval.report.style import count_text, power_text

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
    """Write report.html, report.md, report.json and figures from run folders."""

    runs: str
    """folder (or s3:// prefix) of run folders, or one run folder"""
    out: str = "report"
    """local folder to write into"""


def main(args: Sequence[str]) -> None:
    """`python -m eval report`."""
    from infra.cli import parse

    options = parse(ReportOptions, args, prog="python -m eval report")
    print(write_report(options.runs, options.out))
