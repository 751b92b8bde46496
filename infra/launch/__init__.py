"""Where a job can run. A target is a module with `render(job) -> str` and `submit(job) -> int`, listed here."""

from types import MappingProxyType
from typing import Protocol

from infra.errors import UserError, nearest
from infra.launch import kubernetes, local, ray_job, skypilot, slurm
from infra.launch.job import Job


class Target(Protocol):
    """`render` gives the text that would be used (script or manifest), `submit` uses it and returns an exit code."""

    def render(self, job: Job, /) -> str: ...

    def submit(self, job: Job, /) -> int: ...


TARGETS: MappingProxyType[str, Target] = MappingProxyType(
    {"local": local, "slurm": slurm, "ray": ray_job, "kubernetes": kubernetes, "skypilot": skypilot}
)


def get_target(name: str) -> Target:
    """The target of that name; an unknown one is refused with the nearest known."""
    if name not in TARGETS:
        raise UserError(f"unknown target {name!r}{nearest(name, TARGETS)}: one of {', '.join(TARGETS)}")
    return TARGETS[name]
