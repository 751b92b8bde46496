"""A job is a command with the machines it wants; infra/launch/ turns one into a run, a script or a manifest."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

from infra.errors import UserError

LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# How a command finds its peers; every target exports these three on every node.
CONNECT = "import ray; ray.init(logging_level='ERROR', log_to_driver=False)"
NODE_RANK, MASTER_ADDR, MASTER_PORT = "BEELINE_NODE_RANK", "MASTER_ADDR", "MASTER_PORT"
HOSTFILE = "BEELINE_HOSTFILE"
GRACE_S = 600  # where nobody knows how long saving takes
PORT = 29500  # where ranks meet, unless MASTER_PORT says otherwise: the default of DeepSpeed and torchrun, too
TRAINING = ("-m", "trainer", "train")
SUPERVISE = ("python", "-m", "infra", "supervise")
Launcher = Literal["deepspeed", "torchrun"]


def find_launcher(command: Sequence[str]) -> Launcher | None:
    """The program that the command leaves the start of its ranks to."""
    if PurePath(command[0]).name == "deepspeed":
        return "deepspeed"
    if PurePath(command[0]).name == "torchrun" or tuple(command[1:3]) == ("-m", "torch.distributed.run"):
        return "torchrun"
    return None


@dataclass(frozen=True)
class Job:
    """A command and the machines to run it on. `command` is argv. Put no secrets into `env`: it is written to the
    script.

    `ranks_per_node`: processes that train on each node; None: one per GPU. `grace_s`: from SIGTERM to SIGKILL.
    `max_restarts`: of what failed; None: the target's default.
    """

    name: str
    command: tuple[str, ...]
    nodes: int = 1
    gpus_per_node: int = 0
    ranks_per_node: int | None = None
    grace_s: int = GRACE_S
    max_restarts: int | None = None
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
        if self.num_ranks < 1 or self.grace_s < 1 or (self.max_restarts or 0) < 0:
            raise UserError(
                f"ranks_per_node={self.ranks_per_node}, grace_s={self.grace_s}, max_restarts={self.max_restarts}: "
                "at least 1 rank, 1 second and 0 restarts"
            )
        for name in self.env:
            if not VARIABLE.fullmatch(name):
                raise UserError(f"{name!r} is not a name for an environment variable")

    @property
    def num_ranks(self) -> int:
        """Ranks of a node."""
        return (self.gpus_per_node or 1) if self.ranks_per_node is None else self.ranks_per_node

    @property
    def launcher(self) -> Launcher | None:
        """deepspeed or torchrun, where the command begins with one."""
        return find_launcher(self.command)

    @property
    def is_ranks(self) -> bool:
        """The command is a rank: it is started once for each. `python -m trainer train` is one."""
        training = PurePath(self.command[0]).name.startswith("python") and self.command[1:4] == TRAINING
        return self.launcher is None and (training or self.ranks_per_node is not None)

    @property
    def on_every_node(self) -> bool:
        """Ranks and launchers start on every node; anything else runs once and reaches the others through Ray."""
        return self.launcher is not None or self.is_ranks


def write_command(job: Job) -> str:
    """The command as one shell line for each node. A launcher is told who its peers are; ranks are started by our
    own `supervise`."""
    if job.is_ranks:
        more = [] if job.num_ranks * job.nodes == 1 else ["--ranks", str(job.num_ranks), "--nodes", str(job.nodes)]
        return shlex.join([*SUPERVISE, *more, "--", *job.command])
    if job.launcher == "torchrun":
        return _write_torchrun(job)
    if job.launcher is None:
        return shlex.join(job.command)
    # deepspeed takes the last of equal options: the user's. On one node, too: another job may share the machine.
    peers = f'--hostfile "${HOSTFILE}" --no_ssh --node_rank "${NODE_RANK}" --master_addr "${MASTER_ADDR}" '
    port = f'--master_port "${{{MASTER_PORT}:-{PORT}}}"'
    return f"{shlex.quote(job.command[0])} {peers if job.nodes > 1 else ''}{port} {shlex.join(job.command[1:])}"


def write_supervised(job: Job) -> str:
    """The same below the supervisor, which alone passes SIGTERM on to the ranks and stays until they have saved."""
    return write_command(job) if job.is_ranks else f"{shlex.join(SUPERVISE)} -- {write_command(job)}"


def _write_torchrun(job: Job) -> str:
    """torchrun takes the last of equal options: what the user wrote wins over what is put before it."""
    at = 1 if PurePath(job.command[0]).name == "torchrun" else 3
    restarts = 3 if job.max_restarts is None else job.max_restarts
    options = f"--nproc-per-node {job.num_ranks} --max-restarts {restarts} --shutdown-timeout {job.grace_s}"
    if job.nodes > 1:
        # Agents that restart together need c10d; it finds its host by name, which not every cluster resolves.
        is_host = f'$([ "${NODE_RANK}" = 0 ] && echo true || echo false)'
        meet = f'--rdzv-endpoint "${MASTER_ADDR}:${{{MASTER_PORT}:-{PORT}}}" --rdzv-conf "is_host={is_host}"'
        options += f" --nnodes {job.nodes} --rdzv-backend c10d --rdzv-id {job.name} {meet}"
    return f"{shlex.join(job.command[:at])} {options} {shlex.join(job.command[at:])}"


def write_exports(job: Job) -> list[str]:
    """Shell lines that set the job's environment."""
    return [f"export {name}={shlex.quote(value)}" for name, value in job.env.items()]


def write_hostfile(job: Job) -> list[str]:
    """Shell lines, for deepspeed alone. With --no_ssh it only counts the lines: the names need not resolve."""
    if job.launcher != "deepspeed" or job.nodes == 1:
        return []
    slots = job.num_ranks
    hosts = f"for node in $(seq 0 {job.nodes - 1}); do echo node-$node slots={slots}; done"
    return [f"export {HOSTFILE}=$(mktemp)", f'{hosts} > "${HOSTFILE}"']


def write_ray_cluster(job: Job, *, rank: str, port: str, run: Sequence[str] = ()) -> list[str]:
    """Shell lines for every node: together they are one Ray cluster of this job's own, the first node runs the command,
    or the lines `run` that do.

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
        *(run or [write_command(job)]),
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
