"""A batch script for sbatch: ranks as tasks, launchers on every node, or a Ray cluster of the job's nodes.

Slurm kills all that a task leaves behind when the task ends, so a rank or `supervise` is the task, never a launcher.
"""

import shlex

from infra import outcome
from infra.launch.job import (
    MASTER_ADDR,
    MASTER_PORT,
    NODE_RANK,
    Job,
    hand_over,
    write_command,
    write_exports,
    write_hostfile,
    write_ray_cluster,
    write_supervised,
)
from infra.launch.target import Target

CPUS_PER_GPU = 8  # srun binds a task to one core otherwise, and loader threads with it
MAX_RESTARTS = 3  # without a new checkpoint


def render(job: Job) -> str:
    """The sbatch script. `options` become #SBATCH lines (partition, account, time, ...) and win over the defaults."""
    settings = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.num_ranks) if job.is_ranks else "1",
        "output": "%x-%j.log",
        "open-mode": "append",
        "requeue": "",
        "signal": f"{'B:' if job.on_every_node or job.nodes > 1 else ''}TERM@{job.grace_s}",
    }
    if job.working_dir != ".":
        settings["chdir"] = job.working_dir
    if job.gpus_per_node:
        settings["gpus-per-node"] = str(job.gpus_per_node)
        settings["cpus-per-task"] = str(CPUS_PER_GPU * (1 if job.is_ranks else job.gpus_per_node))
    settings.update(job.options)
    header = [f"#SBATCH --{key}" + (f"={value}" if value else "") for key, value in settings.items()]
    # srun does not take the cores of a task from sbatch any more (22.05 and later).
    exports = [*write_exports(job), "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}"]
    body = _write_training(job) if job.on_every_node else _write_one_node(job) if job.nodes == 1 else _write_ray(job)
    strict = "set -uo pipefail" if job.on_every_node or job.nodes > 1 else "set -euo pipefail"
    return "\n".join(["#!/usr/bin/env bash", *header, strict, *exports, *body]) + "\n"


def submit(job: Job) -> int:
    """Give it to sbatch."""
    return hand_over("sbatch", [], render(job))


def _write_srun(job: Job, *arguments: str) -> str:
    container = [f"--container-image={shlex.quote(job.image)}"] if job.image else []  # needs the pyxis plugin
    return " ".join(["srun", *container, *arguments, "bash -c"])


def _write_one_node(job: Job) -> list[str]:
    """One task. If it was told to stop and did (as a ladder does), the job goes back to the queue."""
    requeue = f'[ "$code" != {outcome.PREEMPTED} ] || scontrol requeue "$SLURM_JOB_ID"'
    step = f"{_write_srun(job, '--kill-on-bad-exit=1')} {shlex.quote('exec ' + write_command(job))}"
    return [f'{step} || {{ code=$?; {requeue}; exit "$code"; }}']


HEAD = f'export {MASTER_ADDR}=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
# Two jobs may share a machine: each takes a port of its own, below those that systems give away.
OWN_PORT = f"export {MASTER_PORT}=$((20000 + SLURM_JOB_ID % 10000))"
# What each task does, by the variables that Slurm sets for it.
RANK = "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS"
# {step} is the srun of an attempt. A rank that ends, ends no other: those save, or notice within a minute (no
# --kill-on-bad-exit). srun itself must not hear SIGTERM, which makes it kill its tasks: setsid hides it.
# The trap only notes the signal: where it interrupts `wait`, the exit code of a step that ends meanwhile is lost.
ATTEMPTS = """export {folder}=$PWD/.beeline-$SLURM_JOB_ID  # where ranks leave their exit codes: all nodes must see it
stopped=
trap 'stopped=1' TERM
[ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ] || rm -rf "${folder}"  # of an older job: numbers come again
mkdir -p "${folder}" || exit 1
read_file() {{ cat "${folder}/$1" 2> /dev/null || echo "$2"; }}
go_back() {{
  echo "stopped: back to the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
  exit {preempted}
}}
while true; do
  saved=$(read_file {saved} none)
  [ "$saved" = "$(read_file before none)" ] || rm -f "${folder}/attempts"
  attempts=$(($(read_file attempts 0) + 1))
  if [ "$attempts" -gt {most} ]; then
    echo "error: {most} attempts without a new checkpoint: giving up; once it is mended: rm -r ${folder}" >&2
    exit "${{code:-1}}"
  fi
  echo "$saved" > "${folder}/before"
  if ! echo "$attempts" > "${folder}/attempts" || [ ! -s "${folder}/attempts" ]; then
    echo "error: cannot write to ${folder}: is the disk full?" >&2  # attempts that are not counted never end
    exit 1
  fi
  rm -f "${folder}"/[0-9]* "${folder}"/begun-*
  [ -z "$stopped" ] || go_back
  setsid {step} &
  step=$! heard=
  while kill -0 "$step" 2> /dev/null; do
    pause=1
    if [ -n "$stopped" ] && [ -z "$heard" ]; then  # again until all tasks are there to hear it; torchrun would mind
      if [ "$(ls "${folder}" | grep -c ^begun-)" -ge {tasks} ]; then heard=1; else pause=10; fi
      scancel --signal=TERM "$SLURM_JOB_ID"
    fi
    sleep "$pause"
  done
  wait "$step"; code=$?
  if [ "$code" = 0 ]; then rm -rf "${folder}"; exit 0; fi
  if [ "$code" = {mistake} ] || [ -e "${folder}/{mistake}" ]; then exit {mistake}; fi
  case $code in {preempted} | {terminated}) stopped=1 ;; esac
  if [ -n "$stopped" ] || [ -e "${folder}/{preempted}" ]; then go_back; fi
  echo "exit code $code: starting again from the last checkpoint" >&2
done"""


def _write_training(job: Job) -> list[str]:
    """Attempts at a training, each one step of the job. After SIGTERM the job goes back to the queue. After a failure
    the next attempt keeps the nodes; if one of them is gone, Slurm itself ends and requeues the job."""
    if job.is_ranks:
        sizes = f"LOCAL_SIZE={job.num_ranks} LOCAL_WORLD_SIZE={job.num_ranks}"
        task = [f"{RANK} {sizes}", f"exec {shlex.join(job.command)}"]
    else:
        task = [f"export {NODE_RANK}=$SLURM_NODEID", *write_hostfile(job), f"exec {write_supervised(job)}"]
    task.insert(0, f': > "${outcome.FOLDER}/begun-$SLURM_PROCID"')
    patience = f"--wait={max(job.grace_s, 300)}"  # from the first task's end to the last one's
    step = f"{_write_srun(job, '--kill-on-bad-exit=0', patience)} {shlex.quote(chr(10).join(task))}"
    most = 1 + (MAX_RESTARTS if job.max_restarts is None else job.max_restarts)
    attempts = ATTEMPTS.format(
        folder=outcome.FOLDER, saved=outcome.SAVED, mistake=outcome.MISTAKE, preempted=outcome.PREEMPTED,
        terminated=outcome.TERMINATED, step=step, most=most, tasks=job.nodes * (job.num_ranks if job.is_ranks else 1),
    )  # fmt: skip
    return [HEAD, OWN_PORT, attempts]


# Slurm signals all processes of a step, and Ray's would end before the command could save. So the batch script is told,
# and writes it to a file that the first node reads; there, too, stands the command's exit code, which srun may hide.
RAY_STEP = """export {file}=$PWD/.beeline-$SLURM_JOB_ID  # the nodes must see it
stopped=
trap 'stopped=1' TERM
echo run > "${file}" || exit 1
setsid {step} &
step=$!
while kill -0 "$step" 2> /dev/null; do
  if [ -n "$stopped" ] && [ "$(cat "${file}")" = run ]; then echo stop > "${file}"; fi
  sleep 1
done
wait "$step"; code=$?
said=$(cat "${file}")
rm -f "${file}"
case $said in run | stop | '') ;; *) code=$said ;; esac
if [ "$code" != 0 ] && {{ [ "$code" = {preempted} ] || [ -n "$stopped" ]; }}; then
  echo "stopped: back to the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
  exit {preempted}
fi
exit $code"""
# The command on the first node. At a pre-emption Slurm itself signals it, and Ray at once: the trap only notes it.
RAY_COMMAND = """finish() {{ echo "$1" > "${file}"; exit "$1"; }}
[ -z "$stopped" ] || finish {preempted}
{command} &
command=$! told=
while kill -0 "$command" 2> /dev/null; do
  if [ -z "$told" ] && [ "$(cat "${file}" 2> /dev/null)" = stop ]; then told=1 stopped=1; kill -TERM "$command"; fi
  sleep 1
done
wait "$command"; code=$?
[ -z "$stopped" ] || [ "$code" = 0 ] || code={preempted}
finish $code"""


def _write_ray(job: Job) -> list[str]:
    """Ray's control ports answer to anyone who holds the token, so each job draws its own."""
    address = f'export {MASTER_ADDR}=$(getent ahostsv4 "${MASTER_ADDR}" | head -n 1 | cut -d " " -f 1)'
    token = "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n')"
    # Two jobs may share a machine: each takes a port of its own.
    port = "export BEELINE_RAY_PORT=$((20000 + 2 * (SLURM_JOB_ID % 5000)))"
    words = {"file": "BEELINE_STOP", "preempted": outcome.PREEMPTED}
    run = RAY_COMMAND.format(command=write_command(job), **words)
    node = write_ray_cluster(job, rank="SLURM_NODEID", port="$BEELINE_RAY_PORT", run=[run])
    task = chr(10).join(["stopped=", "trap 'stopped=1' TERM", *node])
    # The head's end is the job's end: --wait ends workers that do not notice.
    step = f"{_write_srun(job, '--kill-on-bad-exit=1', '--wait=30')} {shlex.quote(task)}"
    return [HEAD, address, token, port, RAY_STEP.format(step=step, **words)]


TARGET = Target("a batch script for sbatch", render, submit, options=None, has_grace=True, client="sbatch")
