"""The batch script's own decisions, run by a real bash: srun and the like are scripts that do what a test wants."""

import os
import subprocess

import pytest

from infra.launch import TARGETS
from infra.launch.job import Job

NAME = ".beeline-7"
# Every pause is short here. `scontrol requeue` leaves a line.
TOOLS = {
    "sleep": "exec /bin/sleep 0.05",
    "scontrol": 'if [ $1 = show ]; then echo 127.0.0.1; else echo "scontrol $*"; fi',
    "scancel": "echo scancel",
}
OWN = Job(name="own", command=("python", "own.py"), nodes=2, ranks_per_node=2, max_restarts=1)


@pytest.fixture
def run(tmp_path):
    """Run a job's batch script with these tools: exit code and all that was said."""

    def run_script(job: Job = OWN, environment: dict[str, str] | None = None, **tools: str) -> tuple[int, str]:
        folder = tmp_path / "tools"
        folder.mkdir(exist_ok=True)
        for name, text in (TOOLS | tools).items():
            (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (folder / name).chmod(0o755)
        more = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-1]"}
        done = subprocess.run(
            ["bash", "-c", TARGETS["slurm"].render(job)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=tmp_path, env=os.environ | more | (environment or {}), timeout=60, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout

    return run_script


@pytest.mark.parametrize(("code", "requeued"), [(0, 0), (2, 0), (75, 1), (143, 1)])
def test_codes_of_ranks_that_leave_no_files_count(run, code, requeued):
    """Of an own script, or of `infra doctor` as ranks."""
    ended, said = run(srun=f"echo started; exit {code}")
    assert ended == (75 if requeued else code), said
    assert (said.count("started"), said.count("scontrol requeue 7")) == (1, requeued), said


def test_a_run_that_ends_while_a_signal_is_handled_is_complete(run, tmp_path):
    """The step ends with 0 while SIGTERM is handled: `kill -0` fails once bash has taken the exit code."""
    srun = "echo $$ > pid; kill -TERM $PPID; until [ -e told ]; do /bin/sleep 0.02; done"
    scancel = "touch told; while kill -0 $(cat pid) 2> /dev/null; do /bin/sleep 0.02; done"
    ended, said = run(srun=srun, scancel=scancel)
    assert ended == 0, said
    assert "requeue" not in said
    assert (tmp_path / "told").exists()


def test_a_signal_before_the_first_step_starts_none(run):
    ended, said = run(mkdir='/bin/mkdir "$@"; kill -TERM $PPID', srun="echo started")
    assert ended == 75, said
    assert (said.count("started"), said.count("scontrol requeue 7")) == (0, 1), said


def test_a_signal_is_repeated_until_all_tasks_are_there(run, tmp_path):
    """The first two reach nobody: the last task begins with the third."""
    srun = f"""kill -TERM $PPID
    touch {NAME}/begun-0 {NAME}/begun-1 {NAME}/begun-2
    for try in $(seq 500); do
      if [ -e {NAME}/begun-3 ] && [ $(wc -l < calls) -ge 3 ]; then /bin/sleep 0.5; exit 75; fi
      /bin/sleep 0.02
    done"""
    scancel = f'echo "$*" >> calls; [ $(wc -l < calls) -lt 2 ] || touch {NAME}/begun-3'
    ended, said = run(srun=srun, scancel=scancel)
    assert ended == 75, said
    assert (tmp_path / "calls").read_text() == "--signal=TERM 7\n" * 3  # and no more once all have heard it


def test_each_task_says_that_it_has_begun(run, tmp_path):
    """The task's own text, run for each of four tasks."""
    srun = 'for n in 0 1 2 3; do SLURM_PROCID=$n SLURM_LOCALID=0 SLURM_NTASKS=4 bash -c "${@: -1}"; done; exit 2'
    ended, said = run(srun=srun, python="echo rank $RANK of $WORLD_SIZE")
    assert ended == 2, said
    assert [line for line in said.splitlines() if line.startswith("rank")] == [f"rank {n} of 4" for n in range(4)]
    assert sorted(path.name for path in (tmp_path / NAME).glob("begun-*")) == [f"begun-{n}" for n in range(4)]


@pytest.mark.parametrize("what", ["folder", "count"])
def test_attempts_that_cannot_be_counted_are_not_made(run, tmp_path, what):
    """The folder, or the file of the count, cannot be written: root may write anywhere, but not to a folder."""
    if what == "folder":
        (tmp_path / NAME).write_text("")
    else:
        (tmp_path / NAME / "attempts").mkdir(parents=True)
    ended, said = run(environment={"SLURM_RESTART_COUNT": "1"}, srun="echo started; exit 2")
    assert ended == 1, said
    assert "started" not in said


def test_a_requeued_job_counts_on_and_a_new_one_of_the_same_number_does_not(run, tmp_path):
    def start(**environment: str) -> tuple[int, str]:
        (tmp_path / NAME).mkdir(exist_ok=True)
        (tmp_path / NAME / "attempts").write_text("2\n")
        return run(environment=environment, srun="echo started; exit 2")

    assert start(SLURM_RESTART_COUNT="1")[0] == 1
    ended, said = start()
    assert (ended, said.count("started")) == (2, 1), said


# A Ray that is one process, and the first node's task alone.
RAY = {
    "ray": "echo $$ > ray; exec /bin/sleep 60",
    "srun": 'SLURM_NODEID=0 exec bash -c "${@: -1}"',
    "python": "exit 0",
}


def make_ray_job(script: str) -> Job:
    return Job(name="ladder", command=("bash", "-c", script), nodes=2)


def test_a_command_with_a_ray_of_its_own_is_told_to_save_and_its_job_goes_back_to_the_queue(run, tmp_path):
    """The batch script alone is told, as at the time limit; Ray lives until the command has saved."""
    script = """trap 'kill -0 $(cat ray) && echo saved; exit 75' TERM
    kill -TERM $(cat batch); for try in $(seq 500); do /bin/sleep 0.02; done"""
    tools = RAY | {"srun": "echo $PPID > batch; " + RAY["srun"]}
    ended, said = run(make_ray_job(script), **tools)
    assert ended == 75, said
    assert (said.count("saved"), said.count("scontrol requeue 7")) == (1, 1), said
    assert not (tmp_path / NAME).exists()


def test_a_preemption_that_ends_ray_and_its_command_goes_back_to_the_queue(run):
    """Slurm signals all processes of the task; the command ends as one that lost its Ray."""
    script = "trap 'exit 1' TERM; kill -TERM $PPID $$; for try in $(seq 500); do /bin/sleep 0.02; done"
    ended, said = run(make_ray_job(script), **RAY)
    assert (ended, said.count("scontrol requeue 7")) == (75, 1), said


@pytest.mark.parametrize(("code", "requeued"), [(0, 0), (2, 0), (9, 0), (75, 1)])
def test_a_command_with_a_ray_of_its_own_gives_the_job_its_exit_code(run, code, requeued):
    """Even where srun reports the higher one of a worker that it killed."""
    tools = RAY | {"srun": 'SLURM_NODEID=0 bash -c "${@: -1}"; exit 137'}
    ended, said = run(make_ray_job(f"exit {code}"), **tools)
    assert (ended, said.count("scontrol requeue 7")) == (code, requeued), said
