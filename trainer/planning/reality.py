"""A run's plan against what the run took, and what a small run teaches about the steps of larger ones.

    python -m trainer grade RUN/                           the plan that the run was started with, graded
    python -m trainer grade RUN/ --calibrate SMALL_RUN/    its steps planned anew by what the small run measured
    python -m trainer plan d38 --gpus 64 --calibrate SMALL_RUN/

On the devices that are here, trials take steps as they go now (trial.py).
"""

import os
from dataclasses import dataclass, replace
from typing import Any

from infra import storage
from infra.codec import from_json
from infra.errors import UserError
from infra.results import ResultStore
from trainer.machines import Machine, detect_machine, get_machine
from trainer.planning.estimates import NOTHING, Cost, choose_micro_batch, count_passes
from trainer.planning.hardware_plan import CalibratedBy, HardwarePlan, make_hardware_plan, plan_precision
from trainer.planning.trial import measure_flops, time_step
from trainer.recipe import Recipe
from trainer.runfolder import PLAN, read_recipe

# Of the planned value, by how the names begin; what has no goal is shown alone.
GOALS = {"parameters": 0.0, "bytes_per_rank/": 0.05, "checkpoint_bytes": 0.02, "storage_bytes": 0.02, "step_": 0.15}
Grades = dict[str, tuple[float, float]]


def read_plan(run: str) -> HardwarePlan:
    """RUN/plan.json."""
    uri = storage.join(run, PLAN)
    if not storage.exists(uri):
        raise UserError(f"{run}: no plan.json there: give a run folder, or the name of a recipe")
    advice = "made by an older version? run one rung again"
    return from_json(HardwarePlan, storage.read_bytes(uri), where=uri, advice=advice)


def read_costs(run: str) -> dict[str, float]:
    """The last measured value of each cost."""
    found = {row.metric: row.value for row in ResultStore(storage.join(run, "results")).rows(prefix="cost")}
    if not found:
        raise UserError(f"{run}: no measured costs there yet: they are written with the first checkpoint")
    files = [uri for name in ("checkpoints", "weights") for uri in storage.list_files(storage.join(run, name))]
    return found | {"cost/storage_bytes": float(sum(storage.get_size(uri) for uri in files))}


@dataclass(frozen=True)
class Calibration:
    """What the steps of one run teach. Without `by_trial` its `efficiency` holds for all sizes; with it each recipe is
    tried on this device, and `extra` is what a micro-batch of the run took beyond its own trial: reading, logging."""

    run: str
    machine: Machine
    efficiency: float
    extra: Cost = NOTHING
    by_trial: bool = False

    def plan(self, recipe: Recipe, *, world_size: int, **more: Any) -> HardwarePlan:
        """A plan for a recipe on the same kind of machine, as `make_hardware_plan` gives it."""
        given = (
            run_trial(recipe, self.machine, world_size=world_size) if self.by_trial else {"efficiency": self.efficiency}
        )
        found = make_hardware_plan(
            recipe, world_size=world_size, machine=self.machine, extra=self.extra, **given, **more
        )
        return replace(found, calibration=CalibratedBy(self.run, self.extra, self.by_trial))

    def describe(self) -> str:
        if not self.by_trial:
            return f"calibrated by the whole speed of {self.run}: {self.efficiency:.3g} of the peak"
        return (
            "planned by steps of shallow models of the recipe's width, and what a micro-batch of "
            f"{self.run} took beyond its own trial, {self.extra.seconds * 1000:.3g} ms"
        )


def calibrate(run: str) -> Calibration:
    """What a finished run teaches the planner: on a device of its kind by a trial of its recipe, on another device by
    its overall speed."""
    plan, costs, recipe = read_plan(run), read_costs(run), read_recipe(run)
    if "cost/step_seconds" not in costs:
        raise UserError(f"{run}: no steps were measured there: run one rung again")
    machine, world_size = get_machine(plan.machine), plan.world_size
    utilisation = costs["cost/images_per_second"] * plan.train_flops_per_image / plan.device_peak_flops
    if detect_machine(recipe.precision) != machine:
        return Calibration(run, machine, utilisation)
    trial = run_trial(recipe, machine, world_size=world_size)
    time = make_hardware_plan(recipe, world_size=world_size, machine=machine, perceptual=plan.perceptual, **trial).time
    seconds = costs["cost/step_seconds"]
    beyond = seconds - time.step_seconds, costs.get("cost/step_cpu_seconds", seconds) - time.work_seconds
    extra = Cost(*(max(0.0, value) / count_passes(recipe, world_size) for value in beyond))
    return Calibration(run, machine, utilisation, extra, by_trial=True)


def run_trial(recipe: Recipe, machine: Machine, *, world_size: int) -> dict[str, Any]:
    """What `make_hardware_plan` is to know of a recipe's steps on this device, in micro-batches as `world_size` ranks
    run them: on a CPU all that they take, on as many ranks as there are cores; on a GPU how fast it computes."""
    recipe = plan_precision(recipe, machine)
    machine_here = detect_machine(recipe.precision)
    if machine_here != machine:
        raise UserError(f"a trial tells of the devices that are here, {machine_here.name}, not of {machine.name}")
    micro = choose_micro_batch(recipe, world_size)
    if not machine.overlap:
        ranks = min(world_size, len(os.sched_getaffinity(0)))
        return {"tried": time_step(recipe, micro_batch=micro, ranks=ranks)}
    return {"efficiency": measure_flops(recipe, micro_batch=micro) / machine.flops}


def grade_run(run: str, calibration: Calibration | None = None) -> Grades:
    """(planned, measured) by name; by a calibration, the steps are planned anew."""
    plan, costs = read_plan(run), read_costs(run)
    predicted = dict(plan.predicted)
    if calibration is not None:
        if plan.machine != calibration.machine.name:
            raise UserError(
                f"{run} ran on {plan.machine}, {calibration.run} on {calibration.machine.name}: "
                "calibrate by a run on the same kind of device"
            )
        again = calibration.plan(read_recipe(run), world_size=plan.world_size, perceptual=plan.perceptual).predicted
        predicted |= {name: value for name, value in again.items() if name in predicted or "step" in name}
    return {name.removeprefix("cost/"): (planned, costs[name])
            for name, planned in sorted(predicted.items()) if name in costs}  # fmt: skip


def find_goal(name: str) -> float | None:
    """The largest relative error that a plan may have."""
    return next((goal for start, goal in GOALS.items() if name.startswith(start)), None)


def find_missed(rows: Grades) -> list[str]:
    """Names whose error is beyond their goal."""
    return [name for name, (planned, found) in rows.items()
            if (goal := find_goal(name)) is not None and abs(planned - found) > goal * abs(found)]  # fmt: skip


def compare(run: str, calibration: Calibration | None = None) -> str:
    """Prediction, measurement, error and goal, line by line."""
    rows = grade_run(run, calibration)
    beyond = find_missed(rows)
    lines = [f"{'':30}{'planned':>16}{'measured':>16}{'error':>9}{'goal':>9}"]
    for name, (planned, found) in rows.items():
        error = f"{planned / found - 1:+9.1%}" if found else f"{'':9}"
        goal = find_goal(name)
        limit = "" if goal is None else f"{goal:9.0%}" + ("  MISSED" if name in beyond else "")
        lines.append(f"{name:30}{planned:16,.6g}{found:16,.6g}{error}{limit}".rstrip())
    if calibration is not None:
        lines.append(calibration.describe())
    elif any(name.startswith("step_") for name in rows):
        lines.append("steps by the planner's own figures of this machine; --calibrate SMALL_RUN plans them by a run")
    return "\n".join(lines)
