"""Every target renders what its scheduler can read; local, Ray and the batch script are run for real."""

import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from kubelet import expand

from infra.errors import UserError
from infra.launch import TARGETS, get_target
from infra.launch.grace import PLAIN_FIELDS, list_plan_words
from infra.launch.job import Job, write_command
from trainer.recipe import Recipe
from trainer.recipes import get_recipe

ROOT = Path(__file__).parent.parent
RANKS = ("python", "-m", "trainer", "train", "d15", "--data", "s3://b/it's here")
TORCHRUN = ("torchrun", "-m", "trainer", "train", "d15", "--data", "s3://b/it's here")
TRAIN = ("deepspeed", "--num_gpus", "8", "--module", "trainer", "train", "d15", "--data", "s3://b/it's here")
DATA = ("python", "-m", "data_pipeline", "run", "sd3", "--out", "s3://b/x y")
OPTIONS = {"slurm": {"partition": "gpu"}, "skypilot": {"accelerator": "H100"}, "kubernetes": {"namespace": "team"}}


def job(target: str, command: tuple[str, ...], nodes: int) -> Job:
    return Job(
        name="ladder-d15",
        command=command,
        nodes=nodes,
        gpus_per_node=8,
        env={"NOTE": "two words $HOME 'q'"},
        image="registry/beeline:1" if target in ("kubernetes", "slurm", "skypilot") else None,
        options=OPTIONS.get(target, {}),
    )


def sky(**options: str) -> str:
    return TARGETS["skypilot"].render(Job(name="x", command=("x",), options=options))


def rdma(value: str) -> str:
    return TARGETS["kubernetes"].render(Job(name="x", command=("x",), image="b:1", options={"rdma": value}))


def batch_spec(document: dict) -> dict:
    """Of a Job, or of the one Job in a JobSet."""
    if document["kind"] == "JobSet":
        (replicated,) = document["spec"]["replicatedJobs"]
        return replicated["template"]["spec"]
    return document["spec"]


def check_shell(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("command", [RANKS, TORCHRUN, TRAIN, DATA], ids=["ranks", "torchrun", "deepspeed", "ray"])
@pytest.mark.parametrize("target", ["slurm", "kubernetes", "skypilot"])
def test_clusters_get_what_they_can_read(target, command, nodes):
    text = get_target(target).render(job(target, command, nodes))
    if target == "slurm":
        check_shell(text)
        assert "#SBATCH --partition=gpu\n" in text
        assert f"#SBATCH --nodes={nodes}\n" in text
        words = shlex.split(text.rpartition("srun ")[2], comments=True)
        check_shell(words[words.index("bash") + 2])
        return
    documents = list(yaml.safe_load_all(text))
    if target == "skypilot":
        (task,) = documents
        check_shell(task["run"])
        assert task["num_nodes"] == nodes
        assert task["resources"]["accelerators"] == "H100:8"
        assert task["envs"] == {"NOTE": "two words $HOME 'q'"}
        assert ("infra supervise" in task["run"]) == (command is not DATA)
        return
    (document,) = documents
    assert document["metadata"]["namespace"] == "team"
    assert document["kind"] == ("JobSet" if command is not DATA else "Job" if nodes == 1 else "RayJob")
    if document["kind"] == "RayJob":
        workers = document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
        (container,) = workers["template"]["spec"]["containers"]
        assert workers["replicas"] == 2
        assert shlex.split(document["spec"]["entrypoint"]) == list(DATA)
    else:
        spec = batch_spec(document)
        (container,) = spec["template"]["spec"]["containers"]
        check_shell(expand(container["command"][2], {}))
        assert container["command"][2].splitlines()[-1].startswith("exec python -m infra supervise")
        assert (spec["completions"], spec["parallelism"]) == (nodes, nodes)
    assert container["env"] == [{"name": "NOTE", "value": "two words $HOME 'q'"}]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"


@given(st.text("$()AB x"))
@example("$$ $$(A) $(A) $")
def test_a_pod_gets_each_word_as_it_was_written(word):
    """The kubelet expands `$$` and `$(A)` in commands and in values."""
    wanted = Job(name="x", command=("python", "own.py", word), image="b:1", env={"A": "value", "NOTE": word})
    document = yaml.safe_load(TARGETS["kubernetes"].render(wanted))
    (container,) = batch_spec(document)["template"]["spec"]["containers"]
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    assert expand(values["NOTE"], values) == word
    assert shlex.split(expand(container["command"][2], values))[-1] == word
    entrypoint = yaml.safe_load(TARGETS["kubernetes"].render(replace(wanted, nodes=2)))["spec"]["entrypoint"]
    assert shlex.split(expand(entrypoint, values))[-1] == word


@pytest.mark.parametrize(("nodes", "port"), [(1, None), (1, "24321"), (3, "24321")])
def test_deepspeed_meets_at_the_jobs_own_port(nodes, port):
    """Two jobs may share a machine; the user's own port wins, as deepspeed takes the last one."""
    from deepspeed.launcher.runner import parse_args

    for words, wanted in (("--module x", port or "29500"), ("--master_port 31000 --module x", "31000")):
        line = write_command(Job(name="x", command=("deepspeed", *words.split()), nodes=nodes))
        told = {"MASTER_ADDR": "a", "BEELINE_HOSTFILE": "h", "BEELINE_NODE_RANK": "0", "PATH": os.environ["PATH"]}
        said = subprocess.run(
            ["bash", "-uc", line.replace("deepspeed", r"printf '%s\n'", 1)], capture_output=True, text=True, check=True,
            env=told | ({"MASTER_PORT": port} if port else {}),
        )  # fmt: skip
        found = parse_args(said.stdout.splitlines())
        assert (str(found.master_port), found.user_script) == (wanted, "x")


def test_pods_that_saved_or_were_evicted_do_not_count_and_mistakes_end_the_job():
    wanted = Job(name="d15", command=RANKS, nodes=2, gpus_per_node=4, image="b:1", grace_s=900, max_restarts=5)
    document = yaml.safe_load(TARGETS["kubernetes"].render(wanted))
    assert document["spec"]["failurePolicy"]["maxRestarts"] == 5
    (mistake,) = document["spec"]["failurePolicy"]["rules"]
    assert (mistake["action"], mistake["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    spec = batch_spec(document)
    assert (spec["backoffLimit"], spec["podReplacementPolicy"]) == (0, "Failed")
    rules = spec["podFailurePolicy"]["rules"]
    codes = {value: rule["action"] for rule in rules for value in rule.get("onExitCodes", {}).get("values", [])}
    assert codes == {2: "FailJob", 75: "Ignore"}
    assert [rule["action"] for rule in rules if "onPodConditions" in rule] == ["Ignore"]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] == 900
    (container,) = spec["template"]["spec"]["containers"]
    assert "MASTER_ADDR=d15-ranks-0-0.d15 " in container["command"][2]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["resources"]["limits"] == {"cpu": "40", "memory": "256Gi", "nvidia.com/gpu": "4"}


def test_a_cluster_with_a_fast_network_and_a_queue():
    options = {"rdma": "vpc.amazonaws.com/efa=32", "queue": "gpu", "topology": "rack", "cpu": "90", "shm": "9Gi"}
    wanted = Job(name="d15", command=RANKS, nodes=2, gpus_per_node=8, image="b:1", options=options)
    document = yaml.safe_load(TARGETS["kubernetes"].render(wanted))
    assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
    template = batch_spec(document)["template"]
    assert template["metadata"]["annotations"] == {"kueue.x-k8s.io/podset-preferred-topology": "rack"}
    (container,) = template["spec"]["containers"]
    assert container["resources"]["limits"]["vpc.amazonaws.com/efa"] == "32"
    assert container["resources"]["limits"]["cpu"] == "90"
    assert container["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    assert template["spec"]["volumes"][0]["emptyDir"]["sizeLimit"] == "9Gi"
    alone = yaml.safe_load(TARGETS["kubernetes"].render(replace(wanted, options={"topology": "rack"})))
    assert alone["metadata"]["annotations"] == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "rack"}


def test_ray_command_line(tmp_path):
    words = shlex.split(
        TARGETS["ray"].render(Job(name="x", command=DATA, env={"A": "1"}, options={"address": "http://h:1"}))
    )
    assert words[:5] == ["ray", "job", "submit", "--address", "http://h:1"]
    assert words[words.index("--") + 1 :] == list(DATA)
    assert json.loads(words[words.index("--runtime-env-json") + 1])["env_vars"] == {"A": "1"}


def test_ray_without_a_token_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="RAY_AUTH_MODE=token and the cluster's RAY_AUTH_TOKEN"):
        TARGETS["ray"].submit(Job(name="x", command=("true",)))


def test_a_ray_that_does_not_answer_is_named(free_port, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match="no Ray answers at 127"):
        TARGETS["ray"].submit(Job(name="x", command=("true",), options={"address": address}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: get_target("slrm"), r"unknown target 'slrm' \(did you mean 'slurm'\?\)"),
        (lambda: Job(name="My Job", command=("x",)), "use lower-case letters"),
        (lambda: Job(name="x", command=()), "write it after '--'"),
        (lambda: Job(name="x", command=("x",), nodes=0), "nodes=0"),
        (lambda: Job(name="x", command=("x",), env={"a b": "1"}), "'a b' is not a name"),
        (lambda: TARGETS["local"].render(Job(name="x", command=("x",), nodes=2)), "nodes must be 1"),
        (lambda: TARGETS["local"].submit(Job(name="x", command=("no-such-program-here",))), "is it installed"),
        (lambda: TARGETS["local"].submit(Job(name="x", command=("true",), working_dir="/no/such")), "no such folder"),
        (lambda: TARGETS["kubernetes"].render(Job(name="x", command=("x",))), "needs --image"),
        (lambda: TARGETS["skypilot"].render(Job(name="x", command=("x",), gpus_per_node=1)), "accelerator=H100"),
        (lambda: TARGETS["ray"].refuse_unknown("ray", {"adress": "y"}), "'adress' .*'address'.*: it knows address"),
        (lambda: TARGETS["local"].refuse_unknown("local", {"a": "y"}), "it takes none"),
        (lambda: Job(name="x", command=("x",), ranks_per_node=0), "at least 1 rank"),
        (lambda: TARGETS["kubernetes"].render(Job(name="x" * 50, command=RANKS, image="b:1")), "at most 47 characters"),
        (lambda: rdma("efa"), "expected RESOURCE=COUNT"),
        (lambda: sky(disk_size="much"), "--option disk_size=much: expected a whole number of GB"),
        (lambda: sky(use_spot="maybe"), "--option use_spot=maybe: expected true or false"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(wrong, message):
    with pytest.raises(UserError, match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value)


def infra(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "infra", *words]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, timeout=280
    )


def test_local_really_runs(tmp_path):
    code = "import os,sys; print(os.getcwd(), os.environ['A'], sys.argv[1:]); sys.exit(7)"
    words = ("launch", "local", "--working-dir", str(tmp_path), "--env", "A=1 2")
    tail = ("--", sys.executable, "-c", code, "--dry-run", "--", "x y")
    done = infra(*words, *tail)
    assert done.returncode == 7, done.stderr
    assert done.stdout == f"{tmp_path} 1 2 ['--dry-run', '--', 'x y']\n"
    rendered = infra(*words, "--dry-run", *tail)
    script = subprocess.run(["bash"], input=rendered.stdout, text=True, capture_output=True)
    assert (script.returncode, script.stdout) == (7, done.stdout)


def test_local_passes_sigterm_on_and_waits(tmp_path):
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), sys.exit(75)))\n"
    code += "print('ready', flush=True)\nwhile True: time.sleep(0.02)"
    for job, ended in ((code, 75), ("import time; print('ready', flush=True); time.sleep(600)", 128 + signal.SIGTERM)):
        words = [sys.executable, "-m", "infra", "launch", "local", "--", sys.executable, "-c", job]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.stdout.read() == ""  # the job held it open, and is gone
        assert process.wait() == ended


def test_the_time_to_save_is_planned_from_what_the_command_trains():
    words = ("--data", "a.b", "--model.depth", "4", "--out", "x", "--optimizer.lr=1e-4")
    deepspeed = ("deepspeed", "--module", "trainer", "train", "d24", *words)
    wanted = ["plan", "d24", "--model.depth", "4", "--optimizer.lr=1e-4", "--gpus", "16", "--gpu", "h100-80", "--json"]
    assert list_plan_words(Job(name="x", command=deepspeed, nodes=2, gpus_per_node=8)) == wanted
    ranks = Job(name="x", command=("python", "-m", "trainer", "train", "d24"), nodes=2, ranks_per_node=3)
    assert list_plan_words(ranks) == ["plan", "d24", "--gpus", "6", "--json"]
    for command in (DATA, ("python", "-m", "trainer", "ladder", "world"), ("python", "-m", "trainer", "train")):
        assert list_plan_words(Job(name="x", command=command)) is None


def test_every_field_of_a_recipe_reaches_the_planner():
    """Those without a dot as well. --data is none of them here: it says where the data lie."""
    groups = {field.name for field in fields(Recipe) if is_dataclass(getattr(get_recipe("d24"), field.name))}
    plain = {field.name for field in fields(Recipe)} - groups - {"name", "init_weights"}  # which no option sets
    assert {name.replace("-", "_") for name in PLAIN_FIELDS} == plain
    kept = ("--global-batch", "64", "--precision=bf16", "--images", "1000", "--student.latent-weight", "0")
    left_out = ("--data", "x", "--student.perceptual", "lpips-vgg:f", "--where", "a.b > 1", "--resume", "none")
    command = ("python", "-m", "trainer", "train", "d24", *kept[:3], *left_out, *kept[3:])
    wanted = ["plan", "d24", *kept, "--gpus", "1", "--json"]
    assert list_plan_words(Job(name="x", command=command)) == wanted
    under = ("python", "-m", "trainer", "train", "d24", "--global_batch", "64", "--student.perceptual=lpips-vgg:f")
    assert list_plan_words(Job(name="x", command=under))[2:4] == ["--global_batch", "64"]


def test_a_large_model_gets_the_time_that_its_save_takes():
    done = infra("launch", "slurm", "--gpus-per-node", "8", "--nodes", "8", "--dry-run", "--", *RANKS[:4], "d38")
    assert (done.returncode, done.stderr) == (0, "")
    (lead,) = [int(line.partition("TERM@")[2]) for line in done.stdout.splitlines() if "--signal=B:TERM@" in line]
    parameters = get_recipe("d38").model.count_parameters()
    assert lead > 60 + 2 * 3 * 4 * parameters / 0.67e9  # weights alone, twice
    assert f"--wait={lead}" in done.stdout


def test_a_missing_client_is_named():
    done = infra("launch", "slurm", "--", "true", PATH="/nonexistent")
    assert done.returncode == 2
    assert done.stderr.startswith("error: sbatch not found on this machine: use --dry-run")


# Slurm's part, played on one machine: two "nodes", the step's shell run once for each in its own process group.
# As with srun, the step ends when its first node has ended, and takes the other one along after a while.
SRUN = """#!/usr/bin/env bash
set -m
while [ "$1" != bash ]; do shift; done
export SLURM_NTASKS=2 SLURM_LOCALID=0
SLURM_NODEID=0 SLURM_PROCID=0 "$@" & first=$!
SLURM_NODEID=1 SLURM_PROCID=1 "$@" & second=$!
trap 'kill -KILL -- -$first -$second 2>/dev/null' EXIT
wait $first; code=$?
[ $code = 0 ] && for try in $(seq ${GRACE:-0}); do kill -0 $second 2>/dev/null || break; sleep 1; done
exit $code
"""


@pytest.fixture
def two_nodes(tmp_path):
    """PATH with srun and scontrol for a Slurm of two nodes on loopback."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text(SRUN)
    (tools / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": str(os.getpid())}


MEET = """
import os, torch
torch.distributed.init_process_group("gloo")
total = torch.ones(1)
torch.distributed.all_reduce(total)
line = f"ranks {int(total)} of {os.environ['WORLD_SIZE']} {os.environ['NOTE']}\\n"
os.write(1, line.encode())  # in one piece: both nodes write to one log, and the launcher's python -u splits a print
torch.distributed.destroy_process_group()  # left standing, gloo's threads abort one exit in twenty
"""


def run_script(job: Job, environment: dict[str, str], log: Path) -> tuple[int, str]:
    """Exit code and output of the batch script. A file takes the output: daemons would hold a pipe open."""
    script = TARGETS["slurm"].render(job)
    with log.open("w") as out:
        done = subprocess.run(
            ["bash", "-c", script], stdout=out, stderr=subprocess.STDOUT, env=environment, timeout=540, check=False,
            cwd=log.parent,
        )  # fmt: skip
    return done.returncode, log.read_text()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "ranks"])
def test_the_batch_script_joins_ranks_over_two_nodes(two_nodes, tmp_path, launcher):
    (tmp_path / "meet.py").write_text(MEET)
    words = {"deepspeed": ["deepspeed"], "torchrun": ["torchrun"], "ranks": ["python"]}[launcher]
    wanted = Job(
        name="meet",
        command=(*words, str(tmp_path / "meet.py")),
        nodes=2,
        ranks_per_node=1 if launcher == "ranks" else None,
        env={"NOTE": "x y", "DS_ACCELERATOR": "cpu"},
    )
    code, output = run_script(wanted, {**two_nodes, "GRACE": "60"}, tmp_path / "log")
    assert code == 0, output
    assert output.count("ranks 2 of 2 x y") == 2


COUNT = """
import ray, time
ray.init(logging_level="ERROR", log_to_driver=False)
while len([n for n in ray.nodes() if n["Alive"]]) < 2:
    time.sleep(0.5)
print("nodes", len(ray.nodes()), flush=True)
"""


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(600)
def test_the_batch_script_makes_one_ray_of_two_nodes(ray_folder, two_nodes, tmp_path):
    (tmp_path / "count.py").write_text(COUNT)
    wanted = Job(name="count", command=("python", str(tmp_path / "count.py")), nodes=2)
    code, output = run_script(wanted, two_nodes, tmp_path / "log")
    assert code == 0, output
    assert output.count("nodes 2") == 1


def start_head(ports: dict[str, int], log: Path) -> subprocess.Popen[bytes] | None:
    """A Ray head in its own process group once it says that it is up; None when it gave up starting."""
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block"]
    command += ["--num-cpus=1", "--object-store-memory=100000000", "--node-ip-address=127.0.0.1"]
    command += [f"{name}={port}" for name, port in ports.items()]
    with log.open("w") as out:
        head = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    while "Ray runtime started" not in log.read_text():
        time.sleep(0.5)
        if head.poll() is not None:
            return None
    return head


@pytest.fixture
def ray_head(ray_folder, monkeypatch, tmp_path):
    """The address of a Ray cluster of its own that asks for a token, as a cluster should."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex * 2)
    for limit in ("DASHBOARD_STARTUP_TIMEOUT_S", "DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT"):
        monkeypatch.setenv(f"RAY_{limit}", "300")  # Ray goes on without a dashboard where that was too slow
    names = ("--port", "--dashboard-port", "--ray-client-server-port", "--dashboard-agent-listen-port")
    head = None
    for _ in range(3):  # a raylet whose agent is not up within 15 s aborts; a busy machine needs another try
        # Below the range from which Ray's own processes draw while it starts.
        ports = dict(zip(names, random.sample(range(30000, 32000), len(names)), strict=True))
        head = start_head(ports, tmp_path / "head.log")
        if head:
            break
    assert head, (tmp_path / "head.log").read_text()
    yield f"http://127.0.0.1:{ports['--dashboard-port']}"
    head.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(timeout=60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(600)
def test_ray_job_submit_packs_the_folder_and_sends_the_token(ray_head, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "hello.py").write_text("import os; print('hello from', os.environ['WHERE'])\n")
    words = ["launch", "ray", "--working-dir", str(tmp_path / "work"), "--option", f"address={ray_head}"]
    done = infra(*words, "--env", "WHERE=the cluster", "--", "python", "hello.py")
    while "No available agent" in done.stderr:  # the cluster is still coming up; the time limit ends this
        done = infra(*words, "--env", "WHERE=the cluster", "--", "python", "hello.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hello from the cluster" in done.stdout
    failed = infra(*words, "--", "python", "absent.py")
    assert failed.returncode == 1, failed.stdout + failed.stderr
