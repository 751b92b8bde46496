"""A job is a command with the machines it wants; infra/launch/ turns one into a run, a script or a manifest."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from infra.errors import UserError

LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# How a command finds its peers; every target exports these three on every node.
CONNECT = "import ray; ray.init(logging_level='ERROR', log_to_driver=False)"
NODE_RANK, MASTER_ADDR, HOSTFILE = "BEELINE_NODE_RANK", "MASTER_ADDR", "BEELINE_HOSTFILE"


@dataclass(frozen=True)
class Job:
    """A command and the machines to run it on. `command` is argv. Put no secrets into `env`: it is written to the
    script."""

    name: str
    command: tuple[str, ...]
    nodes: int = 1
    gpus_per_node: int = 0
    env: Mapping[str, str] = field(default_factory=dict)
    image: str | None = None
    working_dir: str = "."
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not LABEL.fullmatch(self.name):
            raise UserError(
                f"job name {self.name!r}: use lower-case letters, digits and '-', at most 63, as a host name"
            )
        if not self.command:
            raise UserError("no command to run: write it after '--', as in: launch slurm -- python -m eval ...")
        if self.nodes < 1 or self.gpus_per_node < 0:
            raise UserError(f"nodes={self.nodes}, gpus_per_node={self.gpus_per_node}: at least 1 node and 0 GPUs")
        for name in self.env:
            if not VARIABLE.fullmatch(name):
                raise UserError(f"{name!r} is not a name for an environment variable")

    @property
    def on_every_node(self) -> bool:
        """DeepSpeed starts on every node; anything else runs once and reaches the other nodes through Ray."""
        return self.command[0].rsplit("/", 1)[-1] == "deepspeed"


def write_command(job: Job) -> str:
    """The command as one shell line; over several nodes `deepspeed` is told who its peers are."""
    if not job.on_every_node or job.nodes == 1:
        return shlex.join(job.command)
    peers = f'--hostfile "${HOSTFILE}" --no_ssh --node_rank "${NODE_RANK}" --master_addr "${MASTER_ADDR}"'
    return f"{shlex.quote(job.command[0])} {peers} {shlex.join(job.command[1:])}"


def write_exports(job: Job) -> list[str]:
    """Shell lines that set the job's environment."""
    return [f"export {name}={shlex.quote(value)}" for name, value in job.env.items()]


def write_hostfile(job: Job) -> list[str]:
    """Shell lines. With --no_ssh DeepSpeed only counts the lines: the names need not resolve."""
    slots = max(job.gpus_per_node, 1)
    hosts = f"for node in $(seq 0 {job.nodes - 1}); do echo node-$node slots={slots}; done"
    return [f"export {HOSTFILE}=$(mktemp)", f'{hosts} > "${HOSTFILE}"']


def write_ray_cluster(job: Job, *, rank: str, port: str) -> list[str]:
    """Shell lines for every node: together they are one Ray cluster of this job's own, the first node runs the command.

    Only processes started here are ended: `ray stop` would end those of every other job on the machine as well.
    """
    gpus = f" --num-gpus={job.gpus_per_node}" if job.gpus_per_node else ""
    client = f"--ray-client-server-port=$(({port.lstrip('$')} + 1))"  # its default, 10001, would be shared as well
    head = f'ray start --head --node-ip-address="${MASTER_ADDR}" --port={port} {client} --include-dashboard=false{gpus}'
    answers = f'(exec 3<>"/dev/tcp/${MASTER_ADDR}/{port}") 2>/dev/null'
    wait = f"for try in $(seq 150); do {answers} && break; sleep 2; done"
    return [
        "export RAY_raylet_start_wait_time_s=300",  # 30 s are too few on a busy machine or a slow shared folder
        f'if [ "${rank}" = 0 ]; then',
        f"{head} --block > /dev/null &",
        "ray=$!",
        "trap 'kill $ray; wait $ray' EXIT",
        f'export RAY_ADDRESS="${MASTER_ADDR}:{port}"',
        # The port answers before the node has registered itself: only a driver that connects proves the cluster.
        f"for try in $(seq 150); do python -c {shlex.quote(CONNECT)} 2> /dev/null && break; sleep 2; done",
        write_command(job),
        "else",
        # A worker serves, and comes back if it breaks, as long as the head answers.
        wait,
        f'while {answers}; do ray start --address="${MASTER_ADDR}:{port}"{gpus} --block || sleep 5; done',
        "fi",
    ]


def hand_over(program: str, arguments: Sequence[str], text: str) -> int:
    """Give the rendered text to the scheduler's own client on stdin; its exit code comes back."""
    if shutil.which(program) is None:
        raise UserError(f"{program} not found on this machine: use --dry-run > FILE here and submit FILE where it is")
    return subprocess.run([program, *arguments], input=text, text=True, check=False).returncode
