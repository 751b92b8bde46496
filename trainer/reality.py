"""A run's plan against what the run took, from its folder alone."""

import json
from typing import Any

from infra import storage
from infra.errors import UserError
from infra.results import ResultStore
from trainer.machines import Machine
from trainer.plan import layers, make_plan
from trainer.recipe import Recipe


def read_plan(run: str) -> dict[str, Any]:
    """RUN/plan.json."""
    uri = storage.join(run, "plan.json")
    if not storage.exists(uri):
        raise UserError(f"{run}: no plan.json there: give a run folder, or the name of a recipe")
    return json.loads(storage.read_bytes(uri))


def measured(run: str) -> dict[str, float]:
    """The last measured value of each cost."""
    found = {row.metric: row.value for row in ResultStore(storage.join(run, "results")).rows(prefix="cost")}
    if not found:
        raise UserError(f"{run}: no measured costs there yet: they are written with the first checkpoint")
    files = [uri for name in ("checkpoints", "weights") for uri in storage.list_files(storage.join(run, name))]
    return found | {"cost/storage_bytes": float(sum(storage.size(uri) for uri in files))}


def measured_efficiency(run: str) -> float:
    """Share of its devices' peak that a run reached: what other runs on the same kind of machine are planned with."""
    plan, costs = read_plan(run), measured(run)
    if "device_peak_flops" not in plan or "cost/images_per_second" not in costs:
        raise UserError(f"{run}: made by an older version, which measured no speed: run one rung again")
    return costs["cost/images_per_second"] * plan["train_flops_per_image"] / plan["device_peak_flops"]


def overhead_of(recipe: Recipe, step_seconds: float, machine: Machine, *, world: int, efficiency: float) -> float:
    """Seconds that a layer costs each time it runs, whatever its size: what a small run's step took beyond its plan."""
    plan = make_plan(recipe, world=world, machine=machine, efficiency=efficiency)
    return max(0.0, step_seconds - plan["time"]["step_seconds"]) / layers(recipe, world)


def graded(run: str) -> dict[str, tuple[float, float]]:
    """(planned, measured) by name."""
    plan, costs = read_plan(run), measured(run)
    predicted = sorted(plan.get("predicted", {}).items())
    return {name.removeprefix("cost/"): (planned, costs[name]) for name, planned in predicted if name in costs}


def compare(run: str) -> str:
    """Prediction, measurement and error, line by line."""
    lines = [f"{'':30}{'planned':>16}{'measured':>16}{'error':>9}"]
    for name, (planned, found) in graded(run).items():
        error = f"{planned / found - 1:+9.1%}" if found else ""
        lines.append(f"{name:30}{planned:16,.6g}{found:16,.6g}{error}")
    return "\n".join(lines)
