"""A Ray cluster of several nodes on one machine, each with its own raylet: one loses power while the pipeline runs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from data_pipeline.flow.pipeline import Pipeline, PipelineResult
from data_pipeline.inspection.verify import verify_dataset
from data_pipeline.plans import world
from data_pipeline.sources.registry import open_source
from data_pipeline.world.write import write_world
from infra.runner import WorkerPool

PLAN = replace(world(), ingest_rows=8, pack_rows=16)
OPTIONS = ("--ingest-rows", "8", "--pack-rows", "16")
pytestmark = [pytest.mark.slow, pytest.mark.dist]


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_world(str(folder), images=80, val_images=8, seed=5, images_per_shard=8)
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory, raw) -> str:
    """The fingerprint of the data made without Ray and without trouble."""
    return run_here(tmp_path_factory.mktemp("reference"), raw).info.fingerprint


def run_here(root: Path, raw: Path) -> PipelineResult:
    return Pipeline(PLAN, str(root), open_source(f"wds:{raw}"), workers=WorkerPool(0)).run()


@pytest.fixture
def cluster(monkeypatch) -> Iterator:
    """A head that holds the driver and no work, and two nodes of one CPU."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")
    soon_missed = {"health_check_initial_delay_ms": 2000, "health_check_period_ms": 1000}
    store = {"object_store_memory": 100 * 2**20}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": soon_missed, **store}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1, **store)
    cluster.add_node(num_cpus=1, **store)
    yield cluster
    cluster.shutdown()


GROWS = """
import time
import ray
from infra.runner import WorkerPool, run_tasks

class Where:
    def open(self):
        node = ray.get_runtime_context().get_node_id()
        return lambda unit: time.sleep(0.5) or {"rows": 1, "node": node}

for report in run_tasks(Where(), [{"id": str(n)} for n in range(240)], WorkerPool()):
    print(report["node"], flush=True)
"""


def test_a_node_that_comes_after_the_start_gets_work(cluster):
    late = cluster.list_all_nodes()[-1]
    cluster.remove_node(late)
    (first,) = (node for node in cluster.list_all_nodes() if node is not cluster.head_node)
    run = subprocess.Popen(
        [sys.executable, "-c", GROWS], env={**os.environ, "RAY_ADDRESS": cluster.address}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert run.stdout.readline().strip() == first.node_id, run.stderr.read()[-3000:]
    late = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    rest, errors = run.communicate(timeout=400)
    assert run.returncode == 0, errors[-3000:]
    nodes = rest.split()
    assert len(nodes) == 239
    assert set(nodes) == {first.node_id, late.node_id}


def processes(node) -> list[psutil.Process]:
    """A node's raylet and all that runs below it."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [raylet, *raylet.children(recursive=True)]


def at_work(node) -> bool:
    return any("MapWorker" in " ".join(process.cmdline()) for process in processes(node))


def lose_power(node) -> None:
    for process in processes(node):
        process.send_signal(signal.SIGKILL)


def proofs(root: Path, stage: str) -> int:
    return len(list((root / "columns" / stage).rglob("*.json")))


@pytest.mark.parametrize("stage", ["measure", "latents"])
def test_a_node_that_loses_power_costs_its_units_and_no_row(tmp_path, raw, reference, cluster, stage):
    root = tmp_path / "data"
    command = [sys.executable, "-m", "data_pipeline", "run", "world", "--out", str(root), "--source", f"wds:{raw}"]
    run = subprocess.Popen(
        [*command, *OPTIONS], env={**os.environ, "RAY_ADDRESS": cluster.address},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 400
    while proofs(root, stage) < 3:
        assert run.poll() is None, run.stderr.read()[-3000:]
        assert time.monotonic() < until
        time.sleep(0.05)
    nodes = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
    assert all(map(at_work, nodes))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.json")}
    lose_power(nodes[0])
    assert proofs(root, stage) < 11  # one per shard: it was in the middle
    errors = run.communicate(timeout=500)[1]
    assert run.returncode == 0, errors[-3000:]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    findings = verify_dataset(str(root))
    assert findings.problems == []
    assert findings.samples == {"train": 80, "val": 8}
    again = run_here(root, raw)  # nothing is left to do, and the data are those of a run without Ray
    assert (again.computed, again.info.counts) == ({}, {"ok": 88})
    assert again.info.fingerprint == reference
