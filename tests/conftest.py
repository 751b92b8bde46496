"""What all tests share: a quiet, offline environment, a real S3 server, one small Ray cluster.

The environment is set when pytest starts, so that every process a test starts (Ray's workers too) inherits it.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


S3_PORT = find_free_port()
BUCKET = "beeline-tests"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 gives a worker a thirtieth of a core beside the other pytest worker
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
    # Nothing a test does may reach a real bucket: the server behind this address starts when the first test asks.
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{S3_PORT}",
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
UNSET = ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN", "RANK", "WORLD_SIZE", "LOCAL_RANK", "RAY_ADDRESS")
os.environ.update(ENVIRONMENT)
for name in UNSET:
    os.environ.pop(name, None)


def make_ray_folder() -> str:
    """A folder for Ray: its name is short, as sockets' addresses below it end at 107 bytes."""
    return tempfile.mkdtemp(prefix="ray-", dir="/tmp")


def pytest_configure(config: pytest.Config) -> None:
    """What Ray leaves (logs, copied environments of gigabytes) lies where it can be removed: one folder a process.

    All tests but those of `make test-gpu` are about CPUs, two ranks at a time: GPUs are hidden from them.
    """
    os.environ["RAY_TMPDIR"] = make_ray_folder()
    if "gpu" not in config.option.markexpr or "not gpu" in config.option.markexpr:
        import torch

        if torch.cuda.device_count():
            os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu skip themselves where there is none."""
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if wanting:
        import torch

        if not torch.cuda.is_available():
            for item in wanting:
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and `-m gpu` (make test-gpu)"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums depend on torch's number of threads, which an earlier test may have set in this process."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset that TINY's models train on (trainer_launch.py). To be read only: many tests share it."""
    from data_pipeline.packing.synthetic import write_synthetic

    path = tmp_path_factory.mktemp("data")
    write_synthetic(str(path), num_samples=128, val_samples=16, latent_shape=(4, 8, 8), buckets=("32x32",))
    return path


@pytest.fixture
def best_on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """`best_on_cpu("fp32")`: from now on this machine's CPU is one that multiplies faster in fp32 (or "bf16"), as if it
    had been measured so; processes that the test starts see the same CPU."""

    def measured(precision: str) -> None:
        import json

        from infra.device import get_cpu_speed, locate_cpu_speed

        monkeypatch.setenv("BEELINE_CACHE", str(tmp_path / f"cache of a CPU for {precision}"))
        locate_cpu_speed().parent.mkdir(parents=True, exist_ok=True)
        locate_cpu_speed().write_text(json.dumps({"fp32": 60.0, "bf16": {"fp32": 0.6, "bf16": 600.0}[precision]}))
        assert get_cpu_speed().bf16_pays is (precision == "bf16")

    return measured


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A function that gives a loopback port nobody listens on."""
    return find_free_port


def start_server(command: list[str], port: int) -> subprocess.Popen[bytes]:
    """A server process that accepts connections on a loopback port. The caller ends it."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server
        if server.poll() is not None:
            break
        time.sleep(0.1)
    server.kill()
    raise RuntimeError(f"nothing answers on port {port} (exit code {server.poll()}): {' '.join(command)}")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a running S3 server with the tests' bucket; the AWS_* variables point there."""
    from infra.s3 import make_bucket

    server = start_server([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(S3_PORT)], S3_PORT)
    try:
        make_bucket(f"s3://{BUCKET}")
        yield f"http://127.0.0.1:{S3_PORT}"
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.fixture
def s3(s3_server: str) -> str:
    """An empty prefix of one's own: `s3://bucket/unique`."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"


@pytest.fixture
def free_calls(s3_server: str) -> Iterator[Callable[[int], None]]:
    """`free_calls(n)`: after n more requests the server asks who asks, and knows nobody, as if keys had expired."""

    def allow(count: int | float) -> None:
        call = urllib.request.Request(
            f"{s3_server}/moto-api/reset-auth", str(count).encode(), {"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(call, timeout=10)

    yield allow
    allow(float("inf"))


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder for Ray of the test's own, so that nobody's `ray.init` finds its cluster and nothing of it stays."""
    folder = make_ray_folder()
    monkeypatch.setenv("RAY_TMPDIR", folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """One local Ray with 2 CPUs, a GPU in its books alone and a 200 MB object store for all tests, started by the first
    that asks."""
    import logging

    import ray

    hidden = os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray refuses a GPU in its books where all are hidden
    ray.init(
        "local",  # never somebody else's that happens to run on this machine
        num_cpus=2,
        num_gpus=1,
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    if hidden is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = hidden
    yield ray
    ray.shutdown()
