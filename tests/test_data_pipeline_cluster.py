"""What a cluster needs to run the pipeline: Ray's cluster file and KubeRay's RayJob, with a plan file to run."""

import json
from pathlib import Path

import pytest
import yaml

from data_pipeline.flow.runner import Workers, _pool
from infra.job import Job
from infra.launch import TARGETS

ROOT = Path(__file__).parent.parent
COMMAND = ("python", "-m", "data_pipeline", "run", "s3://b/data/plan.yaml", "--gpus-per-worker", "0.25")


def test_rays_cluster_file_keeps_rays_schema():
    import jsonschema
    import ray.autoscaler

    config = yaml.safe_load((ROOT / "infra/runs/ray_cluster.yaml").read_text())
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert sum(kind.get("max_workers", 0) for kind in types.values()) <= config["max_workers"]


def test_a_rayjob_runs_the_plan_file():
    job = Job(name="data", command=COMMAND, nodes=4, gpus_per_node=1, image="registry/beeline:1")
    (document,) = yaml.safe_load_all(TARGETS["kubernetes"].render(job))
    assert (document["kind"], document["apiVersion"]) == ("RayJob", "ray.io/v1")
    assert document["spec"]["entrypoint"] == " ".join(COMMAND)
    (workers,) = document["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["replicas"] == 3


@pytest.mark.parametrize(
    ("address", "count", "cpus", "pool"),
    [
        ("", None, 4, (4, 4)),  # one machine: as many as it has CPUs, at once
        ("", 3, 4, (3, 3)),
        ("10.0.0.1:6379", 3, 400, (3, 3)),
        ("10.0.0.1:6379", None, 0, (1, 500)),  # infra/runs/ray_cluster.yaml: nobody there yet
        ("10.0.0.1:6379", None, 64, (1, 500)),
    ],
)
def test_a_pool_grows_with_a_cluster_and_stays_as_it_is_on_one_machine(monkeypatch, address, count, cpus, pool):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert _pool(Workers(count), 500, cpus) == pool
    assert _pool(Workers(count), 1, cpus) == (1, 1)
    assert _pool(Workers(), 10**6, 64)[1] == (2000 if address else 64)
    if not address and count is None:  # sixteen CPUs, two GPUs, four workers on each
        assert _pool(Workers(gpus=0.25), 500, 16, 2) == (8, 8)
        assert _pool(Workers(gpus=1), 500, 16, 2) == (2, 2)
