"""`python -m infra`: examine this machine, launch jobs, make buckets."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from infra.cli import parse_command
from infra.errors import UserError, run_cli


@dataclass(frozen=True)
class Doctor:
    """Check Python, libraries, GPUs, precision, memory, disk, S3, checkpoints. Exits 2 when something is bad."""

    uri: str | None = None
    """Try to write and read there, for instance s3://bucket/prefix."""
    folder: str = "."
    """Where the work is meant to go; its disk is looked at."""

    def run(self) -> None:
        from infra.doctor import Where, examine, table

        findings = examine(Where(folder=self.folder, uri=self.uri))
        print(table(findings))
        bad = [finding.what for finding in findings if finding.state == "bad"]
        if bad:
            raise UserError(f"needs attention: {', '.join(bad)}")


@dataclass(frozen=True)
class Launch:
    """Run a command somewhere: python -m infra launch TARGET [options] -- COMMAND ...

    `deepspeed ...` starts on every node; anything else runs once, over several nodes inside a Ray cluster of its own.
    """

    target: tyro.conf.Positional[str]
    """local, slurm, ray, kubernetes or skypilot."""
    command: tyro.conf.Suppress[tuple[str, ...]] = ()
    name: str = "beeline"
    """Shown by the scheduler; names pods and log files."""
    nodes: int = 1
    """How many machines."""
    gpus_per_node: int = 0
    """GPUs of each; 0 for CPU machines."""
    env: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """Environment of the job. Written into scripts: no secrets here."""
    option: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """For the target: slurm takes any #SBATCH option; ray: address; kubernetes: namespace cpu memory shm;
    skypilot: accelerator infra use_spot disk_size."""
    image: str | None = None
    """Container image (kubernetes needs one)."""
    working_dir: str = "."
    """The folder to run in; target ray packs and sends it."""
    dry_run: bool = False
    """Print the script or manifest and stop."""

    def run(self) -> None:
        from infra.launch import get_target
        from infra.launch.job import Job

        target = get_target(self.target)
        job = Job(
            name=self.name,
            command=self.command,
            nodes=self.nodes,
            gpus_per_node=self.gpus_per_node,
            env=_pairs("--env", self.env),
            image=self.image,
            working_dir=self.working_dir,
            options=_pairs("--option", self.option),
        )
        if self.dry_run:
            print(target.render(job), end="")
            return
        code = target.submit(job)
        if code:
            sys.exit(code)


@dataclass(frozen=True)
class MakeBucket:
    """Create the bucket of an s3:// URI on the server that AWS_ENDPOINT_URL names, if it does not exist."""

    uri: tyro.conf.Positional[str]

    def run(self) -> None:
        from infra import storage
        from infra.s3 import make_bucket

        if not storage.is_remote(self.uri):
            raise UserError(f"{self.uri}: not an s3:// URI: write s3://bucket")
        make_bucket(self.uri)


def _pairs(flag: str, texts: tuple[str, ...]) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise UserError(f"{flag} {text!r}: write KEY=VALUE")
    return {key: value for key, _, value in (text.partition("=") for text in texts)}


@dataclass
class _Arguments:
    words: list[str] = field(default_factory=list)
    command: tuple[str, ...] = ()


def _split(words: list[str]) -> _Arguments:
    """What follows the first `--` is the job's own and must not be parsed."""
    if "--" not in words:
        return _Arguments(words)
    at = words.index("--")
    return _Arguments(words[:at], tuple(words[at + 1 :]))


def main() -> None:
    """Parse and run."""
    import dataclasses

    arguments = _split(sys.argv[1:])
    commands: dict[str, Callable[..., Any]] = {"doctor": Doctor, "launch": Launch, "make-bucket": MakeBucket}
    chosen = parse_command(commands, arguments.words, prog="python -m infra", doc=__doc__ or "")
    if isinstance(chosen, Launch):
        chosen = dataclasses.replace(chosen, command=arguments.command)
    elif arguments.command:
        raise UserError("only launch takes a command after '--'")
    chosen.run()


if __name__ == "__main__":
    run_cli(main)
