"""A real Slurm of two nodes on this machine: slurmctld and two slurmd from Debian's packages, as root, on loopback."""

import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel", "squeue", "sinfo")
ALLOWED = os.geteuid() == 0 and all(shutil.which(program) for program in PROGRAMS)
WHY_NOT = "needs root and a Slurm: apt-get install --no-install-recommends slurmctld slurmd slurm-client"
# Jobs of partition `high` pre-empt those of `low`, which get SIGTERM and a minute.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT CPUs=4 RealMemory=1000
NodeName={nodes[0]},{nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}]
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """Jobs of a running cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *words: str, text: str | None = None) -> str:
        done = subprocess.run(
            words, input=text, capture_output=True, text=True, env=self.environment, check=True, cwd=self.folder
        )
        return done.stdout.strip()

    def submit(self, script: str, *options: str) -> str:
        """The job's number; it runs in `folder` and logs there."""
        return self.call("sbatch", "--parsable", *options, text=script)

    def read_log(self, name: str, job: str) -> str:
        path = self.folder / f"{name}-{job}.log"
        return path.read_text() if path.exists() else ""

    def describe(self, job: str) -> dict[str, str]:
        """`scontrol show job`, read."""
        found = self.call("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in found.split() if "=" in word)

    def wait_for(self, job: str, *states: str) -> dict[str, str]:
        """Until the job is in one of these states; a requeued job need not wait out Slurm's two minutes."""
        while True:
            found = self.describe(job)
            if found["JobState"] in states:
                return found
            if found["Reason"] == "BeginTime":
                time.sleep(3)  # nodes refuse a job that they killed in the same second
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(0.5)

    def end_jobs(self, *, limit_s: float = 60.0) -> None:
        """Cancel all jobs and wait until they are gone: their daemons take the tasks with them only as long as they
        live themselves."""
        for how in ([], ["--signal=KILL", "--full"]):
            subprocess.run(["scancel", *how, "--user=root"], env=self.environment, capture_output=True)
        end, look = time.monotonic() + limit_s, ["squeue", "--noheader"]
        while time.monotonic() < end:
            done = subprocess.run(look, env=self.environment, capture_output=True)
            if done.returncode or not done.stdout.strip():
                return  # no job, or nobody who knows of one
            time.sleep(0.5)


@contextmanager
def start_cluster(folder: Path) -> Iterator[Cluster]:
    """Daemons in the foreground of sessions of their own, ended at the end."""
    ports = find_ports(3)
    (folder / "state").mkdir()
    host = socket.gethostname().split(".")[0]
    nodes = [host, f"{host}-2"]  # Slurm takes a node named localhost for this host
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, nodes=nodes, folder=folder, ports=ports))
    cluster = Cluster(folder)
    commands = [("slurmctld", "-D", "-c"), *(("slurmd", "-D", "-N", node) for node in nodes)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": cluster.environment}
    daemons = [subprocess.Popen(command, **quiet) for command in commands]
    try:
        look = ["sinfo", "--Node", "--noheader", "--states=idle", "--partition=low"]
        while len(subprocess.run(look, env=cluster.environment, capture_output=True).stdout.splitlines()) < 2:
            assert all(daemon.poll() is None for daemon in daemons), read_logs(folder)
            time.sleep(0.5)
        yield cluster
    finally:
        cluster.end_jobs()
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=20)
            daemon.kill()
            daemon.wait()
        leftovers = find_leftovers(cluster.environment["SLURM_CONF"])
        for process in leftovers:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(leftovers, timeout=10)


def find_ports(number: int) -> list[int]:
    """Ports in a row that nobody holds, below the range from which systems give away ports."""
    while True:
        first = random.randrange(30000, 32000)
        ports = list(range(first, first + number))
        with suppress(OSError), ExitStack() as stack:
            for port in ports:
                stack.enter_context(socket.socket()).bind(("", port))
            return ports


def read_logs(folder: Path) -> str:
    """What the daemons have written, if anything."""
    return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(folder.glob("*.log"))) or "no log"


def find_leftovers(conf: str) -> list[psutil.Process]:
    """Processes of this cluster: its slurm.conf stands in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("SLURM_CONF") == conf:
                found.append(process)
    return found
