"""The targets of `python -m infra launch TARGET`: places where a job can run. A new target gets a line in TARGETS."""

from infra.errors import UserError, nearest
from infra.launch import kubernetes, local, ray_job, skypilot, slurm
from infra.launch.target import Target

TARGETS: dict[str, Target] = {
    "local": local.TARGET,
    "slurm": slurm.TARGET,
    "ray": ray_job.TARGET,
    "kubernetes": kubernetes.TARGET,
    "skypilot": skypilot.TARGET,
}


def get_target(name: str) -> Target:
    """The target of that name; UserError for an unknown name, with the nearest known one."""
    if name not in TARGETS:
        raise UserError(f"unknown target {name!r}{nearest(name, TARGETS)}: one of {', '.join(TARGETS)}")
    return TARGETS[name]


def describe_targets() -> str:
    """A paragraph for each target: what it is, and what --option may set."""
    lines = []
    for name, target in TARGETS.items():
        options = {"any option of the scheduler": ""} if target.options is None else target.options
        texts = [f"{key} ({text})" if text else key for key, text in options.items()]
        lines.append(f"{name}: {target.about}." + (f" --option: {', '.join(texts)}." if texts else ""))
    return "\n\n".join(lines)
