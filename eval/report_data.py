"""Reads run folders for a report: recipe, plan, rows, samples. Local or s3://; a damaged piece is noted, not fatal."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from infra import storage
from infra.errors import UserError
from infra.results import ResultRow, ResultStore

PIECES = ("recipe.json", "plan.json", "results", "samples", "weights", "checkpoints")
LOSS = "val_loss/"
NOT_BEGUN = "readable result rows (nothing was trained or evaluated yet)"


@dataclass(frozen=True)
class Run:
    """One run folder. `rows` are the latest of each key."""

    name: str
    uri: str
    recipe: Mapping[str, Any]
    plan: Mapping[str, Any]
    rows: tuple[ResultRow, ...]
    samples: tuple[str, ...]
    missing: tuple[str, ...] = ()
    began: str = ""
    """when its first row was written (ISO time), "" before that"""

    @property
    def depth(self) -> int | None:
        depth = _mapping(self.recipe.get("model")).get("depth", self.plan.get("depth"))
        return depth if isinstance(depth, int) else None

    @property
    def parameters(self) -> int | None:
        return _positive(self.plan.get("parameters")) or counted_parameters(_mapping(self.recipe.get("model")))

    @property
    def flops_per_image(self) -> float | None:
        """Of training: forward and backward."""
        return _positive(self.plan.get("train_flops_per_image"))

    @property
    def recipe_hash(self) -> str:
        return next((row.recipe_hash for row in reversed(self.rows)), "")

    @property
    def images(self) -> int:
        """The most images any row of this run has seen."""
        return max((row.images_seen for row in self.rows), default=0)


@dataclass(frozen=True)
class ReportData:
    uri: str
    runs: tuple[Run, ...]
    calibration: tuple[ResultRow, ...]
    predictions: tuple[ResultRow, ...] = ()
    notes: tuple[str, ...] = field(default=())


def read_runs(uri: str) -> ReportData:
    """All runs under `uri` (or the one run that `uri` is), smallest first."""
    files = storage.list_files(uri)
    if not files:
        raise UserError(f"{uri}: no runs there: expected a folder of run folders (recipe.json, plan.json, results/)")
    root = uri.rstrip("/")
    inside = [file.removeprefix(root).lstrip("/") for file in files]
    names = sorted({path.split("/")[0] for path in inside if is_piece(path, level=1)})
    if not names and any(is_piece(path, level=0) for path in inside):
        runs = [read_run(root.rsplit("/", 1)[-1], root, inside)]
    else:
        runs = [
            read_run(name, storage.join(root, name), [p.split("/", 1)[1] for p in inside if p.startswith(name + "/")])
            for name in names
        ]
    if not runs:
        raise UserError(f"{uri}: {len(files)} files, but no run folder (recipe.json, plan.json, results/) among them")
    runs.sort(key=lambda run: (run.parameters or 0, run.depth or 0, natural_key(run.name)))
    shared: list[ResultRow] = []
    if any(path.startswith("results/") for path in inside):
        # All of them: of two predictions from the same curves the earlier one counts.
        shared = ResultStore(storage.join(root, "results")).rows(latest=False)
    calibration = [row for row in shared if row.metric.startswith("calibration/")]
    calibration += [row for run in runs for row in run.rows if row.metric.startswith("calibration/")]
    predictions = tuple(row for row in shared if row.metric.startswith("prediction/"))
    return ReportData(uri, tuple(runs), tuple({row.key: row for row in calibration}.values()), predictions)


def is_piece(path: str, *, level: int) -> bool:
    """Does this path (relative to RUNS) show that the folder at `level` is a run?"""
    parts = path.split("/")
    if len(parts) <= level or (level == 1 and parts[0] in PIECES):
        return False
    return parts[level] in ("recipe.json", "plan.json") or (parts[level] in PIECES and len(parts) > level + 1)


def read_run(name: str, uri: str, inside: Iterable[str], *, store: ResultStore | None = None) -> Run:
    """The run in folder `uri` that holds the files `inside`; a store that is given again reads only what is new."""
    inside = list(inside)
    missing: list[str] = []
    recipe, plan = (_read_json(uri, file, inside, missing) for file in ("recipe.json", "plan.json"))
    rows: list[ResultRow] = []
    store_files = sum(path.startswith("results/") for path in inside)
    if store_files:
        rows = (store or ResultStore(storage.join(uri, "results"))).rows()
    if not rows:
        missing.append(NOT_BEGUN if store_files == 0 else "readable result rows")
    samples = sorted((p for p in inside if p.startswith("samples/") and p.lower().endswith(".png")), key=natural_key)
    pictures = tuple(storage.join(uri, path) for path in samples)
    began = min((row.created for row in rows), default="")
    return Run(name, uri, recipe, plan, tuple(rows), pictures, tuple(missing), began)


def _read_json(uri: str, file: str, inside: list[str], missing: list[str]) -> Mapping[str, Any]:
    if file not in inside:
        missing.append(file)
        return {}
    try:
        read = json.loads(storage.read_bytes(storage.join(uri, file)))
    except (UserError, ValueError) as error:
        missing.append(f"{file} (unreadable: {error})")
        return {}
    if not isinstance(read, dict):
        missing.append(f"{file} (holds no object)")
        return {}
    return read


def counted_parameters(model: Mapping[str, Any]) -> int | None:
    """Exact parameters of a recipe's model, where the plan does not say; None for a model this version cannot read."""
    from model.errors import ModelError
    from model.mmdit import MMDiTConfig

    try:
        return MMDiTConfig.from_json(dict(model)).parameter_count()
    except (ModelError, TypeError, ValueError, KeyError, AttributeError):
        return None


def _positive(value: Any) -> Any:
    return value if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key in which step_9 comes before step_10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]
