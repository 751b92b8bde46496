"""report.json, and the same shapes for the service: a report's numbers without its drawings."""

import dataclasses
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

from eval.report import tables
from eval.report.analysis import Report
from eval.report.data import Run
from eval.report.law import Scaling
from eval.scaling.coverage import read_coverage
from infra.version import code_version


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
