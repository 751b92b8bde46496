"""What a launch target is: two functions of a job, and what `python -m infra launch` says about it."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from infra.errors import UserError, nearest
from infra.launch.job import Job


@dataclass(frozen=True)
class Target:
    """A place where jobs run, by the name that TARGETS gives it."""

    about: str
    """One line of help."""
    render: Callable[[Job], str]
    """The script, manifest or command line that `submit` uses; --dry-run prints it. UserError for a job that cannot run
    there."""
    submit: Callable[[Job], int]
    """Run the job or hand it to a scheduler; the exit code."""
    options: Mapping[str, str] | None = field(default_factory=dict)
    """What `--option KEY=VALUE` may set, with a line of help each; None: any KEY, checked by the scheduler."""
    has_grace: bool = False
    """Its scheduler sends SIGKILL `job.grace_s` after SIGTERM."""
    client: str | None = None
    """The program that `submit` starts; None: it needs no other than this interpreter."""

    @property
    def is_reachable(self) -> bool:
        """Can jobs be submitted from this machine?"""
        return self.client is None or shutil.which(self.client) is not None

    def refuse_unknown(self, name: str, options: Mapping[str, str]) -> None:
        """UserError for an option that the target would have to ignore."""
        if self.options is None:
            return
        for key in options:
            if key not in self.options:
                expected = f"it knows {', '.join(self.options)}" if self.options else "it takes none"
                raise UserError(f"target {name} does not know option {key!r}{nearest(key, self.options)}: {expected}")
