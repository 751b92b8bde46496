"""The batch script under a real Slurm: pre-emption, a killed rank, a user's mistake, attempts that come to nothing."""

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import ALLOWED, WHY_NOT, Cluster, find_leftovers, read_logs, start_cluster

from infra.launch import TARGETS
from infra.launch.job import Job

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.dist, pytest.mark.skipif(not ALLOWED, reason=WHY_NOT)]
# A rank that reports as the trainer does and needs no second to start. It counts steps in a file, saves when it is told
# to stop, and does in its n-th life what the n-th word says: run until it is stopped, die, err, or end well.
RANK = """
import os, pathlib, signal, sys, time
from infra.outcome import report_code, report_outcome, report_saved
folder, *lives = sys.argv[1:]
rank = os.environ["RANK"]
life = pathlib.Path(folder, f"life{rank}")
number = int(life.read_text()) if life.exists() else 0
life.write_text(str(number + 1))
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
pathlib.Path(folder, f"pid{rank}-{number}").write_text(str(os.getpid()))
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR")
print("rank", *(os.environ[name] for name in names), "life", number, lives[number], flush=True)
with report_outcome():
    if lives[number] == "mistake":
        sys.exit(2)
    if lives[number] == "stop":
        sys.exit(75)
    if lives[number] == "lost":
        if rank == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(76)
    if lives[number] == "run":
        while not told:
            time.sleep(0.1)
        time.sleep(1)
        if rank == "0":
            report_saved(number)
        sys.exit(75)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with start_cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def submit(cluster: Cluster, folder: Path, lives: str, **more: object) -> str:
    command = (sys.executable, "-c", RANK, str(folder), *lives.split())
    wanted = Job(
        name="job", command=command, nodes=2, ranks_per_node=2, env={"PYTHONPATH": str(ROOT)}, grace_s=60, **more
    )
    return cluster.submit(TARGETS["slurm"].render(wanted))


def wait_for_life(folder: Path, number: int) -> None:
    while len(list(folder.glob(f"pid*-{number}"))) < 4:
        time.sleep(0.1)


@pytest.mark.timeout(120)
def test_a_cluster_leaves_nothing_behind(tmp_path):
    """Nor what a job has hidden from Slurm: a process of another session whose parent is gone."""
    assert read_logs(tmp_path) == "no log"
    with start_cluster(tmp_path) as cluster:
        cluster.submit("#!/bin/bash\n(setsid sleep 600 &)\ntouch hidden\nsleep 600\n")
        while not (tmp_path / "hidden").exists():
            time.sleep(0.1)
        conf = cluster.environment["SLURM_CONF"]
        assert "sleep" in {process.name() for process in find_leftovers(conf)}
    assert find_leftovers(conf) == []
    assert "slurmctld.log:\n" in read_logs(tmp_path)


@pytest.mark.timeout(300)
def test_a_preempted_job_saves_goes_back_to_the_queue_and_ends_well(cluster, tmp_path):
    """Once by a job of higher priority, whose SIGTERM reaches the tasks alone; once as at the time limit, where the
    batch script alone is told; once with a signal to all processes."""
    job = submit(cluster, tmp_path, "run run run done")
    wait_for_life(tmp_path, 0)
    urgent = cluster.submit("#!/bin/sh\necho urgent\n", "--partition=high", "--nodes=2", "--exclusive")
    cluster.wait_for(urgent, "COMPLETED")
    cluster.wait_for(job, "RUNNING")
    wait_for_life(tmp_path, 1)
    cluster.call("scancel", "--batch", "--signal=TERM", job)
    cluster.wait_for(job, "PENDING")
    cluster.wait_for(job, "RUNNING")
    wait_for_life(tmp_path, 2)
    cluster.call("scancel", "--full", "--signal=TERM", job)
    cluster.wait_for(job, "PENDING")
    found = cluster.wait_for(job, "COMPLETED", "FAILED")
    said = cluster.read_log("job", job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "3"), said
    assert said.count("stopped: back to the queue") == 3
    host = socket.gethostname().split(".")[0]
    ranks = sorted(line for line in said.splitlines() if line.startswith("rank ") and "life 0" in line)
    assert ranks == [f"rank {n} {n % 2} 4 2 {host} life 0 run" for n in range(4)]
    assert not (cluster.folder / f".beeline-{job}").exists()


@pytest.mark.timeout(300)
def test_a_killed_rank_restarts_the_step_and_a_mistake_ends_the_job(cluster, tmp_path):
    job = submit(cluster, tmp_path, "lost lost mistake")
    found = cluster.wait_for(job, "COMPLETED", "FAILED")
    said = cluster.read_log("job", job)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "2:0", "0"), said
    assert said.count("exit code 137: starting again from the last checkpoint") == 2  # the highest: it hides 76


@pytest.mark.timeout(300)
def test_attempts_without_a_new_checkpoint_are_counted(cluster, tmp_path):
    """Two restarts are allowed. A stop saves between the second and the third loss, so that the count begins anew."""
    job = submit(cluster, tmp_path, "lost lost run lost lost lost done", max_restarts=2)
    wait_for_life(tmp_path, 2)
    cluster.call("scancel", "--batch", "--signal=TERM", job)
    cluster.wait_for(job, "PENDING")
    found = cluster.wait_for(job, "COMPLETED", "FAILED")
    said = cluster.read_log("job", job)
    assert found["JobState"] == "FAILED", said
    assert "error: 3 attempts without a new checkpoint: giving up" in said
    assert said.count("starting again") == 5


@pytest.mark.timeout(300)
def test_a_job_that_is_stopped_before_it_can_save_does_not_loop_for_ever(cluster, tmp_path):
    """As under a time limit shorter than the lead of the signal."""
    job = submit(cluster, tmp_path, "stop stop done", max_restarts=1)
    found = cluster.wait_for(job, "COMPLETED", "FAILED")
    said = cluster.read_log("job", job)
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "2"), said
    assert "error: 2 attempts without a new checkpoint: giving up" in said


@pytest.mark.timeout(300)
def test_a_command_that_stops_with_75_goes_back_to_the_queue(cluster, tmp_path):
    """`python -m trainer ladder` does, which starts its ranks itself."""
    again = tmp_path / "again"
    script = f"if [ -e {again} ]; then exit 0; fi; trap 'exit 75' TERM; touch {again}; sleep 90 & wait"
    wanted = Job(name="ladder", command=("bash", "-c", script), grace_s=60)
    job = cluster.submit(TARGETS["slurm"].render(wanted))
    while not again.exists():
        time.sleep(0.1)
    cluster.call("scancel", "--signal=TERM", job)
    found = cluster.wait_for(job, "COMPLETED", "FAILED")
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), cluster.read_log("ladder", job)


# Stands for Ray's program: the head listens, a worker stays as long as the head does. SIGTERM ends both.
RAY = """#!{python}
import socket, sys, time
options = dict(word.removeprefix("--").split("=", 1) for word in sys.argv if "=" in word)
if "--head" in sys.argv:
    with socket.create_server((options["node-ip-address"], int(options["port"])), backlog=64) as server:
        while True:
            server.accept()[0].close()
host, port = options["address"].split(":")
open({folder!r} + "/worker", "a").close()
while True:
    socket.create_connection((host, int(port))).close()
    time.sleep(0.2)
"""


@pytest.mark.timeout(300)
def test_a_command_in_a_ray_of_its_own_saves_while_ray_lives_and_goes_back_to_the_queue(cluster, tmp_path):
    """Told as at the time limit, then pre-empted, where Slurm's SIGTERM ends Ray as well; then it ends well."""
    (tmp_path / "ray").write_text(RAY.format(python=sys.executable, folder=str(tmp_path)))
    (tmp_path / "python").write_text("#!/bin/sh\nexit 0\n")  # it would ask Ray whether it is up
    for name in ("ray", "python"):
        (tmp_path / name).chmod(0o755)
    answers = "(exec 3<>/dev/tcp/${RAY_ADDRESS/:/\\/}) 2> /dev/null"
    script = f"""cd {tmp_path}; life=$(ls | grep -c ^life); touch life$life
    [ $life != 2 ] || exit 0
    trap '/bin/sleep 2; {answers} && echo saved; exit $((75 - 70 * life))' TERM
    while true; do sleep 0.2; done"""
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    wanted = Job(name="ladder", command=("bash", "-c", script), nodes=2, grace_s=60, env={"PATH": path})
    job = cluster.submit(TARGETS["slurm"].render(wanted))
    while not ((tmp_path / "life0").exists() and (tmp_path / "worker").exists()):
        time.sleep(0.1)
    cluster.call("scancel", "--batch", "--signal=TERM", job)
    cluster.wait_for(job, "PENDING")
    cluster.wait_for(job, "RUNNING")
    while not (tmp_path / "life1").exists():
        time.sleep(0.1)
    urgent = cluster.submit("#!/bin/sh\necho urgent\n", "--partition=high", "--nodes=2", "--exclusive")
    cluster.wait_for(urgent, "COMPLETED")
    found = cluster.wait_for(job, "COMPLETED", "FAILED")
    said = cluster.read_log("ladder", job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "2"), said
    assert (said.count("saved"), said.count("stopped: back to the queue")) == (1, 2), said
