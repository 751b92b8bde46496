"""Manifests for kubectl: an Indexed Job with a headless Service for DeepSpeed, a KubeRay RayJob for everything else.

Secrets (AWS keys) come from an optional Secret `beeline-env`, which is made once by hand and never rendered here.
"""

from typing import Any

import yaml

from infra.errors import UserError
from infra.launch.job import MASTER_ADDR, NODE_RANK, Job, hand_over, write_command, write_hostfile
from infra.launch.target import Target

CPU, MEMORY, SHM = "8", "64Gi", "16Gi"  # of a node, where no --option says otherwise


def render(job: Job) -> str:
    """YAML for `kubectl apply -f -`."""
    if not job.image:
        raise UserError("target kubernetes needs --image: a container image with this repository installed")
    documents = _make_indexed_job(job) if job.on_every_node or job.nodes == 1 else [_make_ray_job(job)]
    for document in documents:
        if "namespace" in job.options:
            document["metadata"]["namespace"] = job.options["namespace"]
    return yaml.safe_dump_all(documents, sort_keys=False, width=120)


def submit(job: Job) -> int:
    """Give it to kubectl."""
    return hand_over("kubectl", ["apply", "-f", "-"], render(job))


def _make_container(job: Job, name: str) -> dict[str, Any]:
    limits = {"cpu": job.options.get("cpu", CPU), "memory": job.options.get("memory", MEMORY)}
    if job.gpus_per_node:
        limits["nvidia.com/gpu"] = str(job.gpus_per_node)
    return {
        "name": name,
        "image": job.image,
        "env": [{"name": key, "value": value} for key, value in job.env.items()],
        "envFrom": [{"secretRef": {"name": "beeline-env", "optional": True}}],
        "resources": {"limits": limits, "requests": dict(limits)},
        # NCCL, data loader workers and Ray's object store live in /dev/shm, which is 64 MiB by default.
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }


def _make_volumes(job: Job) -> list[dict[str, Any]]:
    return [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": job.options.get("shm", SHM)}}]


def _make_working_dir(job: Job) -> dict[str, str]:
    """A relative folder is the image's own; an absolute one is a path inside the image."""
    return {} if job.working_dir == "." else {"workingDir": job.working_dir}


def _make_indexed_job(job: Job) -> list[dict[str, Any]]:
    labels = {"app": job.name}
    script = write_command(job)
    container = {**_make_container(job, "main"), **_make_working_dir(job)}
    if job.nodes > 1:
        first = f"export {MASTER_ADDR}={job.name}-0.{job.name} {NODE_RANK}=$JOB_COMPLETION_INDEX"
        script = "\n".join([first, *write_hostfile(job), f"exec {script}"])
    container["command"] = ["bash", "-c", script]
    pod = {
        "restartPolicy": "Never",
        "subdomain": job.name,
        "containers": [container],
        "volumes": _make_volumes(job),
    }
    batch = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name, "labels": labels},
        "spec": {
            "completions": job.nodes,
            "parallelism": job.nodes,
            "completionMode": "Indexed",
            # One lost node ends the step for all; every pod may be made anew that often.
            "backoffLimit": 3 * job.nodes,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job.name, "labels": labels},
        # Peers look each other up before they are ready.
        "spec": {"clusterIP": "None", "selector": labels, "publishNotReadyAddresses": True},
    }
    return [service, batch] if job.nodes > 1 else [batch]


def _make_ray_job(job: Job) -> dict[str, Any]:
    import ray

    def pod(name: str) -> dict[str, Any]:
        return {"spec": {"containers": [_make_container(job, name)], "volumes": _make_volumes(job)}}

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
        "metadata": {"name": job.name},
        "spec": {
            "entrypoint": write_command(job),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": cluster,
        },
    }


TARGET = Target(
    "a Job, or a RayJob of KubeRay, for kubectl; needs --image", render, submit, client="kubectl",
    options={
        "namespace": "of all that is made", "cpu": f"of each node, {CPU}", "memory": f"of each node, {MEMORY}",
        "shm": f"shared memory, {SHM}",
    },
)  # fmt: skip
