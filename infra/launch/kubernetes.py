"""Manifests for kubectl: a JobSet for ranks, a Job for one pod, a KubeRay RayJob for all that needs several.

Secrets (AWS keys) come from an optional Secret `beeline-env`, which is made once by hand and never rendered here.
"""

import re
from typing import Any

import yaml

from infra import outcome
from infra.errors import UserError
from infra.launch.job import MASTER_ADDR, NODE_RANK, Job, hand_over, write_command, write_hostfile, write_supervised
from infra.launch.target import Target

# Of a node, where no --option says otherwise: per GPU, and of a machine without any. The smallest of the clouds' nodes
# of 8 GPUs have 96 CPUs and 680 GB; some of both is the system's.
PER_GPU = {"cpu": 10, "memory": 64, "shm": 16}
WITHOUT = {"cpu": 8, "memory": 64, "shm": 16}
# Of the JobSet's whole life. Hardware alone interrupted 16,384 GPUs 466 times in 54 days (Llama 3, arXiv 2407.21783,
# section 3.3.4): of 512 GPUs that are 8 in a month.
MAX_RESTARTS = 20
LONGEST_POD_NAME = 63  # as a host name


def render(job: Job) -> str:
    """YAML for `kubectl apply -f -`."""
    if not job.image:
        raise UserError("target kubernetes needs --image: a container image with this repository installed")
    make = _make_job_set if job.on_every_node else _make_single_job if job.nodes == 1 else _make_ray_job
    document = make(job)
    if "namespace" in job.options:
        document["metadata"]["namespace"] = job.options["namespace"]
    return yaml.safe_dump(document, sort_keys=False, width=120)


def submit(job: Job) -> int:
    """Give it to kubectl."""
    return hand_over("kubectl", ["apply", "-f", "-"], render(job))


def choose_resource(job: Job, name: str) -> str:
    """cpu, memory or shm of a node, as Kubernetes writes it."""
    amount = PER_GPU[name] * job.gpus_per_node or WITHOUT[name]
    return job.options.get(name, str(amount) if name == "cpu" else f"{amount}Gi")


def escape(text: str) -> str:
    """The text so that the kubelet, which makes `$` of `$$` and values of `$(NAME)`, gives it to the process."""
    return re.sub(r"\$(?=[$(])", "$$", text)


def _make_container(job: Job, name: str) -> dict[str, Any]:
    limits = {"cpu": choose_resource(job, "cpu"), "memory": choose_resource(job, "memory")}
    if job.gpus_per_node:
        limits["nvidia.com/gpu"] = str(job.gpus_per_node)
    if "rdma" in job.options:
        resource, _, count = job.options["rdma"].partition("=")
        if "/" not in resource or not count.isdecimal():
            raise UserError(
                f"--option rdma={job.options['rdma']}: expected RESOURCE=COUNT, as in rdma=vpc.amazonaws.com/efa=32"
            )
        limits[resource] = count
    container: dict[str, Any] = {
        "name": name,
        "image": job.image,
        "env": [{"name": key, "value": escape(value)} for key, value in job.env.items()],
        "envFrom": [{"secretRef": {"name": "beeline-env", "optional": True}}],
        "resources": {"limits": limits, "requests": dict(limits)},
        # NCCL, data loader workers and Ray's object store live in /dev/shm, which is 64 MiB by default.
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    if "rdma" in job.options:
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}  # adapters pin the memory they read
    return container


def _make_pod(job: Job, container: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = {"containers": [container]}
    if job.gpus_per_node:  # nodes with GPUs are commonly tainted by that name
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    shm = {"medium": "Memory", "sizeLimit": choose_resource(job, "shm")}
    spec["volumes"] = [{"name": "shm", "emptyDir": shm}]
    return spec


def _make_batch_spec(job: Job, lines: list[str], *, backoff: int) -> dict[str, Any]:
    """Spec of a batch/v1 Job whose pods are PID 1 and all below it.

    The podFailurePolicy makes a user's mistake fail at once. Pods that were evicted, or have saved and left, are made
    anew and do not count. A relative working folder is the image's own; an absolute one is a path inside the image.
    """
    container = _make_container(job, "main") | ({} if job.working_dir == "." else {"workingDir": job.working_dir})
    container["command"] = ["bash", "-c", escape("\n".join([*lines, f"exec {write_supervised(job)}"]))]
    pod = {"restartPolicy": "Never", "terminationGracePeriodSeconds": job.grace_s, **_make_pod(job, container)}
    template: dict[str, Any] = {"metadata": {"labels": {"app": job.name}}, "spec": pod}
    if "topology" in job.options and "queue" in job.options:
        template["metadata"]["annotations"] = {"kueue.x-k8s.io/podset-preferred-topology": job.options["topology"]}

    def on_code(action: str, code: int) -> dict[str, Any]:
        return {"action": action, "onExitCodes": {"containerName": "main", "operator": "In", "values": [code]}}

    evicted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    rules = [on_code("FailJob", outcome.MISTAKE), on_code("Ignore", outcome.PREEMPTED), evicted]
    return {
        "completions": job.nodes,
        "parallelism": job.nodes,
        "completionMode": "Indexed",
        "backoffLimit": backoff,
        "podReplacementPolicy": "Failed",  # not while the old pod still saves
        "podFailurePolicy": {"rules": rules},
        "template": template,
    }


def _make_metadata(job: Job) -> dict[str, Any]:
    labels = {"app": job.name}
    if "queue" in job.options:
        labels["kueue.x-k8s.io/queue-name"] = job.options["queue"]  # Kueue starts all pods of a job, or none
    return {"name": job.name, "labels": labels}


def _make_single_job(job: Job) -> dict[str, Any]:
    """A command that runs once, in one pod."""
    restarts = 3 if job.max_restarts is None else job.max_restarts
    spec = _make_batch_spec(job, [], backoff=restarts)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _make_metadata(job), "spec": spec}


def _make_job_set(job: Job) -> dict[str, Any]:
    """One pod a node. Any other failure than those of the podFailurePolicy ends the Job, and the JobSet makes all of
    its pods anew: ranks cannot go on without the lost ones."""
    longest = LONGEST_POD_NAME - len(f"-ranks-0-{job.nodes - 1}-abcde")
    if len(job.name) > longest:
        raise UserError(f"job name {job.name!r}: at most {longest} characters, as the names of pods are made of it")
    first = f"export {MASTER_ADDR}={job.name}-ranks-0-0.{job.name} {NODE_RANK}=$JOB_COMPLETION_INDEX"
    lines = [first] if job.nodes > 1 else []
    metadata = _make_metadata(job)
    if "topology" in job.options and "queue" not in job.options:
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": job.options["topology"]}
    mistake = {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ranks = {"spec": _make_batch_spec(job, [*lines, *write_hostfile(job)], backoff=0)}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            # Peers look each other up before they are ready.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": MAX_RESTARTS if job.max_restarts is None else job.max_restarts,
                "rules": [mistake],
            },
            "replicatedJobs": [{"name": "ranks", "replicas": 1, "template": ranks}],
        },
    }


def _make_ray_job(job: Job) -> dict[str, Any]:
    import ray

    def pod(name: str) -> dict[str, Any]:
        return {"spec": _make_pod(job, _make_container(job, name))}

    workers = {
        "groupName": "workers",
        "replicas": job.nodes - 1,
        "minReplicas": job.nodes - 1,
        "maxReplicas": job.nodes - 1,
        "rayStartParams": {},
        "template": pod("ray-worker"),
    }
    cluster = {
        "rayVersion": ray.__version__,
        "authOptions": {"mode": "token"},  # KubeRay draws the token and hands it to every pod
        "headGroupSpec": {"rayStartParams": {}, "template": pod("ray-head")},
        "workerGroupSpecs": [workers],
    }
    if job.working_dir != ".":
        raise UserError("a RayJob runs in the image's own folder: omit --working-dir and set WORKDIR in the image")
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _make_metadata(job),
        "spec": {
            "entrypoint": escape(write_command(job)),  # KubeRay makes a pod of it, which submits it
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": cluster,
        },
    }


TARGET = Target(
    "a JobSet for ranks, a Job or KubeRay's RayJob for the rest, for kubectl; needs --image", render, submit,
    client="kubectl", has_grace=True,
    options={
        "namespace": "of all that is made",
        "cpu": "of each node, 10 per GPU", "memory": "of each node, 64Gi per GPU", "shm": "/dev/shm, 16Gi per GPU",
        "rdma": "RESOURCE=COUNT of each node, as vpc.amazonaws.com/efa=32",
        "queue": "a LocalQueue of Kueue, which starts all pods or none",
        "topology": "a label of nodes; pods share its value, preferred with a queue, else required",
    },
)  # fmt: skip
