"""What a cluster needs to run the pipeline: Ray's cluster file and KubeRay's RayJob, with a plan file to run."""

import json
from pathlib import Path

import yaml

from infra.launch import TARGETS
from infra.launch.job import Job

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
