"""Tasks and calls on workers: in this process and on Ray, with units that fail, workers that die, calls that stop."""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray import cloudpickle

from infra import runner
from infra.errors import UserError
from infra.runner import CallLost, RemoteCalls, WorkerPool, _greet, _size_pool, connect, run_tasks, run_units

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import a test file


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
    assert _size_pool(WorkerPool(count), 500, cpus) == pool
    assert _size_pool(WorkerPool(count), 1, cpus) == (1, 1)
    assert _size_pool(WorkerPool(), 10**6, 64)[1] == (2000 if address else 64)
    if not address and count is None:  # sixteen CPUs, two GPUs, four workers on each
        assert _size_pool(WorkerPool(gpus=0.25), 500, 16, 2) == (8, 8)
        assert _size_pool(WorkerPool(gpus=1), 500, 16, 2) == (2, 2)


def test_a_wave_of_units_is_bounded_in_number_and_bytes(monkeypatch):
    units = [{"id": "x" * (n % 50)} for n in range(1000)]
    monkeypatch.setattr(runner, "_WAVE", 60)
    monkeypatch.setattr(runner, "_WAVE_BYTES", 1500)
    waves = list(runner._split_into_waves(iter(units)))
    assert [json.loads(text) for wave in waves for text in wave] == units
    assert all(len(wave) <= 60 and sum(map(len, wave)) <= 1500 for wave in waves)
    assert len(waves) < 1000
    assert list(runner._split_into_waves([])) == []


@dataclass(frozen=True)
class Fragile:
    """Kills its own worker once, fails on one unit, works on the others."""

    marks: str

    def open(self):
        def run(unit):
            if unit["id"] == "deadly":
                mark = Path(self.marks) / "died"
                if not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            if unit["id"] == "bad":
                raise RuntimeError("a poisoned unit")
            return {"rows": 1}

        return run


@dataclass(frozen=True)
class Unopenable:
    def open(self):
        raise UserError("no weights at /nowhere")


@pytest.mark.dist
def test_a_dying_worker_and_a_poisoned_unit_do_not_end_the_job(tmp_path, ray_cluster):
    units = [{"id": name} for name in ("a", "deadly", "b", "bad", "c")]
    results = {r["id"]: r for r in run_tasks(Fragile(str(tmp_path)), units, WorkerPool(2, cpus=0.5))}
    assert (tmp_path / "died").exists()
    assert Counter(r["error"] for r in results.values()) == {"": 4, "RuntimeError: a poisoned unit": 1}
    assert set(results) == {"a", "deadly", "b", "bad", "c"}
    (result,) = run_tasks(Unopenable(), [{"id": "a"}], WorkerPool(1, cpus=0.5))
    assert (result["fatal"], result["error"]) == (True, "no weights at /nowhere")


def test_more_of_a_gpu_than_there_is_is_refused_and_not_waited_for(ray_cluster):
    with pytest.raises(UserError, match=r"a worker asks for 2 GPU\(s\), Ray here has 1 and would wait for ever"):
        list(run_tasks(Unopenable(), [{"id": "a"}], WorkerPool(1, cpus=0.5, gpus=2)))


@pytest.mark.dist
@pytest.mark.parametrize("workers", [0, 1])
def test_units_that_fail_are_named_with_their_reasons(tmp_path, request, workers):
    if workers:
        request.getfixturevalue("ray_cluster")
    units = [{"id": name} for name in ("a", "bad", "b")]
    assert run_units(Fragile(str(tmp_path)), units, workers=workers) == {"bad": "RuntimeError: a poisoned unit"}


def answer(folder: str, word: str) -> str:
    """Says the word back; three words do something else first."""
    if word == "ignore":  # as a worker does whose cluster was started in the background of a shell
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "wait":
        Path(folder, "waiting").touch()
        for _ in range(3000):  # Ray's interrupt is seen between two steps of Python, never within one long sleep
            time.sleep(0.1)
    return word


def collect(calls: RemoteCalls) -> dict:
    found: dict = {}
    while calls:
        found |= dict(calls.wait(1.0))
    return found


@pytest.mark.dist
def test_remote_calls_give_values_and_say_how_the_others_were_lost(tmp_path, ray_cluster):
    calls = RemoteCalls(answer, workers=1, slots=1)
    assert calls.on_gpus  # the cluster has one in its books
    for key, word in enumerate(("yes", "die", "no")):
        calls.start(key, str(tmp_path), word)
    assert len(calls) == 3
    found = collect(calls)
    lost = found.pop(1)
    assert found == {0: "yes", 2: "no"}
    assert isinstance(lost, CallLost)
    assert (str(lost), lost.cancelled) == ("its Ray worker was lost: WorkerCrashedError", False)


@pytest.mark.dist
def test_a_cancelled_call_is_interrupted_and_one_that_waits_never_begins(tmp_path, ray_cluster):
    calls = RemoteCalls(answer, workers=1, slots=1)
    calls.start("before", str(tmp_path), "ignore")
    assert collect(calls) == {"before": "ignore"}
    calls.start("first", str(tmp_path), "wait")
    while not (tmp_path / "waiting").exists():
        assert not dict(calls.wait(0.1))
    calls.start("second", str(tmp_path), "yes")
    calls.cancel()
    found = collect(calls)
    assert {key: lost.cancelled for key, lost in found.items()} == {"first": True, "second": True}


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "ray://[::1]:{port}"])
def test_a_cluster_that_is_gone_is_one_line(monkeypatch, address):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", address.format(port=port))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match=r"RAY_ADDRESS=.*nothing answers there.*unset RAY_ADDRESS"):
        connect(WorkerPool(count=1))


@pytest.mark.parametrize("answer", [b"HTTP/1.0 400 Bad request\r\n", b"", None])
def test_another_program_at_the_address_of_a_cluster_is_one_line(monkeypatch, answer):
    """It answers otherwise, hangs up, or says nothing: Ray itself would wait for minutes."""
    monkeypatch.setattr("infra.runner._FIRST_CONTACT_S", 0.5)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def serve():
            contact, _ = server.accept()
            held.append(contact)
            if answer is not None:
                contact.recv(100)
                contact.sendall(answer)
                contact.close()

        threading.Thread(target=serve, daemon=True).start()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(UserError, match="nothing answers there"):
            connect(WorkerPool(count=1))


def test_a_cluster_that_is_there_is_greeted(ray_cluster):
    import ray

    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    _greet((host, int(port)))


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_a_folder_too_long_for_rays_sockets_is_one_line(monkeypatch, tmp_path, name):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, str(long))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match=rf"{name}=.*too long for Ray's sockets"):
        connect(WorkerPool(count=1))
