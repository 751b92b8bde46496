"""Reads run folders, local or s3://: recipe, plan, result rows, samples. A damaged piece is noted and not fatal."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from infra import storage
from infra.errors import UserError
from infra.results import ResultRow, ResultStore, keep_newest

MARKS = ("recipe.json", "plan.json")
PIECES = (*MARKS, "results", "samples", "weights", "checkpoints")
LOSS = "val_loss/"
UNSTABLE = "unstable.json"  # of a run that the trainer's guard ended
NOT_BEGUN = "readable result rows (nothing was trained or evaluated yet)"


@dataclass(frozen=True)
class RunFolder:
    """One run folder as read. `rows` are the latest of each key; `missing` names pieces that are absent or damaged."""

    name: str
    uri: str
    recipe: Mapping[str, Any]
    plan: Mapping[str, Any]
    rows: tuple[ResultRow, ...]
    samples: tuple[str, ...]
    missing: tuple[str, ...] = ()
    few_steps: tuple[str, ...] = ()
    """sheets of `eval fewstep` (JSON, a picture beside each)"""
    began: str = ""
    """when its first row was written (ISO time), also one that a later row replaced; "" before that"""

    def recipe_field(self, *path: str) -> Any:
        """`recipe_field("schedule", "cooldown")`, or None where the recipe has no such field."""
        value: Any = self.recipe
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    @property
    def depth(self) -> int | None:
        depth = self.recipe_field("model", "depth") or self.plan.get("depth")
        return depth if isinstance(depth, int) and not isinstance(depth, bool) else None

    @property
    def backbone(self) -> str:
        return str(self.recipe_field("model", "backbone") or "mmdit")

    @property
    def parameters(self) -> int | None:
        planned = parse_positive(self.plan.get("parameters"))
        return int(planned) if planned else count_parameters(self.recipe_field("model"))

    @property
    def flops_per_image(self) -> float | None:
        """FLOPs of training on one image, forward and backward, from plan.json."""
        return parse_positive(self.plan.get("train_flops_per_image"))

    @property
    def recipe_hash(self) -> str:
        return next((row.recipe_hash for row in reversed(self.rows)), "")

    @property
    def images(self) -> int:
        """The most images any row of this run has seen."""
        return max((row.images_seen for row in self.rows), default=0)

    @cached_property
    def metrics(self) -> frozenset[str]:
        """Names of all metrics that the run has rows of."""
        return frozenset(row.metric for row in self.rows)


@dataclass(frozen=True)
class StoredRuns:
    """All runs under one URI, with the rows beside them that belong to no run."""

    uri: str
    runs: tuple[RunFolder, ...]
    calibration: tuple[ResultRow, ...]
    predictions: tuple[ResultRow, ...] = ()


def read_runs(uri: str) -> StoredRuns:
    """All runs under `uri` (or the one run that `uri` is), smallest first."""
    files = storage.list_files(uri)
    if not files:
        raise UserError(f"{uri}: no runs there: expected a folder of run folders (recipe.json, plan.json, results/)")
    root = uri.rstrip("/")
    inside = [file.removeprefix(root).lstrip("/") for file in files]
    runs = [read_run(name, *folder) for name, folder in find_run_folders(root, inside).items()]
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
    return StoredRuns(uri, tuple(runs), tuple({row.key: row for row in calibration}.values()), predictions)


def find_run_folders(root: str, inside: Sequence[str]) -> dict[str, tuple[str, list[str]]]:
    """Name -> URI and files of each run among the paths `inside` RUNS. The name is the path below RUNS: sweeps lay runs
    deeper (seed0/world-d2), where a recipe or a plan shows them. Where `root` is itself a run, that one."""
    names = {path.split("/")[0] for path in inside if _is_piece(path, level=1)}
    deeper = {folder for folder, _, file in (path.rpartition("/") for path in inside) if file in MARKS}
    names |= {folder for folder in deeper if folder and folder.split("/")[0] not in PIECES}
    names = {name for name in names if names.isdisjoint(map(str, PurePosixPath(name).parents))}
    if not names and any(_is_piece(path, level=0) for path in inside):
        return {root.rsplit("/", 1)[-1]: (root, list(inside))}
    folders: dict[str, tuple[str, list[str]]] = {name: (storage.join(root, name), []) for name in sorted(names)}
    levels = range(1, 2 + max((name.count("/") for name in names), default=0))
    for path in inside:
        parts = path.split("/")
        above = ("/".join(parts[:level]) for level in levels)
        name = next((folder for folder in above if folder in folders), None)
        if name is not None:
            folders[name][1].append(path[len(name) + 1 :])
    return folders


def _is_piece(path: str, *, level: int) -> bool:
    """Does this path (relative to RUNS) show that the folder at `level` is a run?"""
    parts = path.split("/")
    if len(parts) <= level or (level == 1 and parts[0] in PIECES):
        return False
    if parts[level] == "results":  # rows make a run; the precision kept for all runs of RUNS lies beside such rows
        return path.endswith(".jsonl")
    return parts[level] in MARKS or (parts[level] in PIECES and len(parts) > level + 1)


def read_run(name: str, uri: str, inside: Sequence[str], *, store: ResultStore | None = None) -> RunFolder:
    """The run in folder `uri` that holds the files `inside`; a store that is given again reads only what is new."""
    missing: list[str] = []
    recipe, plan = (_read_json(uri, file, inside, missing) for file in ("recipe.json", "plan.json"))
    written: list[ResultRow] = []
    store_files = sum(path.startswith("results/") for path in inside)
    if store_files:
        written = (store or ResultStore(storage.join(uri, "results"))).rows(latest=False)
    rows = keep_newest(written)
    if UNSTABLE in inside:
        missing.append(f"stable end ({_read_json(uri, UNSTABLE, inside, missing).get('problem', 'unstable')})")
    if not rows:
        missing.append(NOT_BEGUN if store_files == 0 else "readable result rows")
    samples = sorted((p for p in inside if p.startswith("samples/") and p.lower().endswith(".png")), key=natural_key)
    pictures = tuple(storage.join(uri, path) for path in samples)
    began = min((row.created for row in written), default="")
    sheets = tuple(storage.join(uri, p) for p in inside if p.startswith("fewstep/") and p.endswith(".json"))
    return RunFolder(name, uri, recipe, plan, tuple(rows), pictures, tuple(missing), sheets, began)


def _read_json(uri: str, file: str, inside: Sequence[str], missing: list[str]) -> Mapping[str, Any]:
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


def count_parameters(model: Any, **changed: Any) -> int | None:
    """Exact parameters of a recipe's model with `changed` fields; None for a model that this version cannot read."""
    from model.backbones.mmdit import MMDiTConfig

    try:
        return MMDiTConfig.from_json({**model, **changed}).count_parameters()
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        return None


def parse_finite(value: Any) -> int | float | None:
    """The number that a recipe or a plan holds, or None: JSON may also hold a text, 1e999 or, to Python, Infinity."""
    try:
        known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return None
    return value if known else None


def parse_positive(value: Any) -> int | float | None:
    """As `parse_finite`, but None for zero and less."""
    found = parse_finite(value)
    return found if found is not None and found > 0 else None


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key in which step_9 comes before step_10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text)]
