"""The commands of `python -m infra`."""

import os
import sys
from dataclasses import dataclass, replace
from typing import Annotated, TypeVar

import tyro

from infra.cli import parse
from infra.errors import UserError

Options = TypeVar("Options")


def doctor(*, uri: str | None = None, folder: str = ".") -> None:
    """Check Python, libraries, GPUs, precision, memory, disk, S3, checkpoints. Exits 2 when something is bad.

    Started once per rank (`python -m infra supervise --ranks 8 -- python -m infra doctor`, or `launch slurm|kubernetes
    --ranks-per-node 8`) it also measures an all-reduce and an all-gather between them; one rank of each node reports.

    Args:
        uri: try to write and read there, for instance s3://bucket/prefix.
        folder: where the work is meant to go; its disk is looked at.
    """
    from infra.doctor import CHECKS, CheckedPlaces, check_collectives, describe_diagnoses, examine

    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    findings = examine(CheckedPlaces(folder=folder, uri=uri), CHECKS if speaks else (check_collectives,))
    if speaks:
        print(describe_diagnoses(findings), flush=True)
    bad = [finding.what for finding in findings if finding.state == "bad"]
    if bad:
        raise UserError(f"needs attention: {', '.join(bad)}")


def make_bucket(uri: Annotated[str, tyro.conf.Positional]) -> None:
    """Create the bucket of an s3:// URI on the server that AWS_ENDPOINT_URL names, if it does not exist.

    Args:
        uri: s3://bucket
    """
    from infra import storage
    from infra.s3 import make_bucket as make

    if not storage.is_remote(uri):
        raise UserError(f"{uri}: not an s3:// URI: write s3://bucket")
    make(uri)


SUPERVISE_HELP = """Start ranks, pass SIGTERM on to them, and stay until all have saved:
python -m infra supervise [--ranks 8 [--nodes 4]] -- COMMAND ... It is PID 1 of the containers that `launch` writes.

Exit codes: 0 done, 2 a user's mistake, 69 something did not answer, 75 stopped after saving, 76 a rank was lost, else
that of the command."""


@dataclass(frozen=True)
class SuperviseOptions:
    """How often a command is to run on this node."""

    ranks: int | None = None
    """Start it so many times, each with its RANK, LOCAL_RANK and WORLD_SIZE; without: once."""
    nodes: int = 1
    """How many machines do the same; BEELINE_NODE_RANK and MASTER_ADDR say which this one is, and where the first."""


def supervise(words: list[str]) -> None:
    """The command `supervise`. All words after the first `--` are the command to run."""
    from infra.launch.supervise import supervise as run

    options, command = _split_command(words, SuperviseOptions, "python -m infra supervise", SUPERVISE_HELP)
    if not command:
        raise UserError("no command to run: write it after '--'")
    if options.nodes < 1 or (options.ranks is not None and options.ranks < 1):
        raise UserError(f"--ranks {options.ranks} --nodes {options.nodes}: at least 1 of each")
    sys.exit(run(command, ranks=options.ranks, nodes=options.nodes))


LAUNCH_HELP = """Run a command somewhere: python -m infra launch TARGET [options] -- COMMAND ...

`python -m trainer train ...` starts once per rank, `deepspeed ...` and `torchrun ...` on every node; anything else runs
once, over several nodes inside a Ray cluster of its own."""


@dataclass(frozen=True)
class LaunchOptions:
    """Where a command is to run."""

    target: tyro.conf.Positional[str]
    """Where: one of those above."""
    name: str = "beeline"
    """Shown by the scheduler; names pods and log files."""
    nodes: int = 1
    """How many machines."""
    gpus_per_node: int = 0
    """GPUs of each; 0 for CPU machines."""
    ranks_per_node: int | None = None
    """Training processes of each; one per GPU where it is not given."""
    grace_seconds: int | None = None
    """From SIGTERM to SIGKILL; else by the planner's time of a save, or 600 for what trains nothing."""
    max_restarts: int | None = None
    """How often what failed is started again."""
    env: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """Environment of the job. Written into scripts: no secrets here."""
    option: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """For the target; what each one takes stands above."""
    image: str | None = None
    """Container image."""
    working_dir: str = "."
    """The folder to run in; target ray packs and sends it."""
    dry_run: bool = False
    """Print the script or manifest and stop."""


def launch(words: list[str]) -> None:
    """The command `launch`. All words after the first `--` are the command of the job and are not parsed."""
    from infra.launch import describe_targets, get_target
    from infra.launch.grace import choose_grace
    from infra.launch.job import Job

    help_text = f"{LAUNCH_HELP}\n\n{describe_targets()}"
    options, command = _split_command(words, LaunchOptions, "python -m infra launch", help_text)
    target = get_target(options.target)
    job = Job(
        name=options.name,
        command=tuple(command),
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        ranks_per_node=options.ranks_per_node,
        max_restarts=options.max_restarts,
        env=_parse_pairs("--env", options.env),
        image=options.image,
        working_dir=options.working_dir,
        options=_parse_pairs("--option", options.option),
    )
    target.refuse_unknown(options.target, job.options)
    if options.grace_seconds is not None:
        job = replace(job, grace_s=options.grace_seconds)
    elif target.has_grace:
        job = replace(job, grace_s=choose_grace(job))
    if options.dry_run:
        print(target.render(job), end="")
        return
    code = target.submit(job)
    if code:
        sys.exit(code)


def _split_command(words: list[str], kind: type[Options], prog: str, help_text: str) -> tuple[Options, list[str]]:
    """The options before the first `--`, and the words after it, which are not parsed."""
    at = words.index("--") if "--" in words else len(words)
    return parse(kind, words[:at], prog=prog, description=help_text), words[at + 1 :]


def _parse_pairs(flag: str, texts: tuple[str, ...]) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise UserError(f"{flag} {text!r}: write KEY=VALUE")
    return {key: value for key, _, value in (text.partition("=") for text in texts)}
