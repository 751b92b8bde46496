"""Manifests against the API's own schemas, as the package kubeflow-trainer-api carries them: batch/v1 and JobSet.

Its classes check types and what is required, and drop fields that they do not know: a manifest that comes back changed
has such a field. It carries no KubeRay: of a RayJob the pods alone are checked.
"""

import copy
import itertools

import pytest
import yaml
from kubeflow_trainer_api.models.io_k8s_api_batch_v1_job import IoK8sApiBatchV1Job
from kubeflow_trainer_api.models.io_k8s_api_core_v1_pod_template_spec import IoK8sApiCoreV1PodTemplateSpec
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from infra.launch import TARGETS
from infra.launch.job import Job

COMMANDS = {
    "ranks": ("python", "-m", "trainer", "train", "d24"),
    "torchrun": ("torchrun", "-m", "trainer", "train", "d24"),
    "deepspeed": ("deepspeed", "--module", "trainer", "train", "d24"),
    "once": ("python", "-m", "eval", "run"),
}
OPTIONS = [
    {},
    {"namespace": "team", "cpu": "90", "memory": "1Ti", "shm": "64Gi", "rdma": "rdma/hca=8", "topology": "rack"},
    {"queue": "gpu", "topology": "rack"},
]


def render(command: str, nodes: int, options: dict[str, str], gpus: int = 8) -> dict:
    wanted = Job(
        name="d24",
        command=COMMANDS[command],
        nodes=nodes,
        gpus_per_node=gpus,
        env={"A": "1"},
        image="registry/beeline:1",
        working_dir="." if command == "once" and nodes > 1 else "/data",
        options=options,
    )
    return yaml.safe_load(TARGETS["kubernetes"].render(wanted))


@pytest.mark.parametrize(
    ("command", "nodes", "options"), itertools.product(COMMANDS, [1, 4], OPTIONS), ids=lambda value: str(value)[:40]
)
def test_manifests_are_what_the_schemas_say(command, nodes, options):
    for gpus in (0, 8):
        document = render(command, nodes, options, gpus)
        if document["kind"] == "RayJob":
            cluster = document["spec"]["rayClusterSpec"]
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                assert IoK8sApiCoreV1PodTemplateSpec.from_dict(group["template"]).to_dict() == group["template"]
            continue
        model = {"JobSet": JobsetV1alpha2JobSet, "Job": IoK8sApiBatchV1Job}[document["kind"]]
        assert model.from_dict(document).to_dict() == document


def test_the_schemas_know_a_misspelt_field_and_a_wrong_type():
    good = render("ranks", 4, {})
    wrong = copy.deepcopy(good)
    spec = wrong["spec"]["replicatedJobs"][0]["template"]["spec"]
    spec["podFailurePolicies"] = spec.pop("podFailurePolicy")
    assert JobsetV1alpha2JobSet.from_dict(wrong).to_dict() != wrong
    spec["podFailurePolicy"] = spec.pop("podFailurePolicies")
    spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] = ["2"]
    with pytest.raises(ValueError, match="integer"):
        JobsetV1alpha2JobSet.from_dict(wrong)
