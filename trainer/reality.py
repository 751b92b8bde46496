"""A run's plan against what the run took, from its folder alone."""

import json
from typing import Any

from infra import storage
from infra.errors import UserError
from infra.results import ResultStore


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
    return found


def measured_efficiency(run: str) -> float:
    """Share of its devices' peak that a run reached: what other runs on the same kind of machine are planned with."""
    plan, costs = read_plan(run), measured(run)
    if "device_peak_flops" not in plan or "cost/images_per_second" not in costs:
        raise UserError(f"{run}: made by an older version, which measured no speed: run one rung again")
    return costs["cost/images_per_second"] * plan["train_flops_per_image"] / plan["device_peak_flops"]


def compare(run: str) -> str:
    """Prediction, measurement and error, line by line."""
    plan, costs = read_plan(run), measured(run)
    lines = [f"{'':30}{'planned':>16}{'measured':>16}{'error':>9}"]
    for name, planned in sorted(plan.get("predicted", {}).items()):
        if name in costs:
            error = f"{planned / costs[name] - 1:+9.1%}" if costs[name] else ""
            lines.append(f"{name.removeprefix('cost/'):30}{planned:16,.6g}{costs[name]:16,.6g}{error}")
    return "\n".join(lines)
