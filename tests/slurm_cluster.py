"""A real Slurm of two nodes on this machine: slurmctld and two slurmd from Debian's packages, as root, on loopback."""

import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel", "squeue")
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


@contextmanager
def start_cluster(folder: Path) -> Iterator[Cluster]:
    """Daemons in the foreground of sessions of their own, ended at the end."""
    first = random.randrange(30000, 32000)  # below the range from which systems give away ports
    ports = [first, first + 1, first + 2]
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
            assert all(daemon.poll() is None for daemon in daemons), (folder / "slurmctld.log").read_text()
            time.sleep(0.5)
        yield cluster
    finally:
        for how in ([], ["--signal=KILL", "--full"]):
            subprocess.run(["scancel", *how, "--user=root"], env=cluster.environment, capture_output=True)
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=20)
            daemon.kill()
            daemon.wait()
