"""Exactly once: real processes killed at named points, a zombie that wakes up late, S3 that fails, S3 that is cut."""

import io
import os
import random
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from data_faulty_proxy import FaultyProxy
from data_kill_points import POINTS, is_of, struck
from PIL import Image

from data_pipeline.flow.pipeline import Pipeline, PipelineResult
from data_pipeline.formats.parquet_io import decode_table
from data_pipeline.inspection.verify import verify_dataset
from data_pipeline.plans import world
from data_pipeline.sources.registry import open_source
from data_pipeline.world.write import write_world
from infra import storage
from infra.errors import UserError
from infra.runner import WorkerPool

PLAN = replace(world(), ingest_rows=5, pack_rows=6)
STAGES = ("ingest", "measure", "dedup", "caption", "latents", "text_t5", "pack")


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_world(str(folder), images=14, val_images=4, seed=8, images_per_shard=7)
    small = io.BytesIO()
    Image.new("RGB", (1, 1)).save(small, "PNG")
    with tarfile.open(folder / "train" / "00001.tar", "a") as archive:
        for name, data in {"tiny.png": small.getvalue(), "tiny.txt": b"a", "cut.png": b"no", "cut.txt": b"a"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return folder


def run(root: str | Path, raw: str | Path) -> PipelineResult:
    return Pipeline(PLAN, str(root), open_source(f"wds:{raw}"), workers=WorkerPool(0)).run()


@pytest.fixture(scope="module")
def reference(tmp_path_factory, raw) -> str:
    """The fingerprint of the data made without trouble."""
    return run(tmp_path_factory.mktemp("reference"), raw).info.fingerprint


def check(root: str | Path, outcome: PipelineResult, reference: str) -> None:
    assert outcome.info.fingerprint == reference
    assert outcome.info.counts == {"ok": 18, "too_small": 1, "corrupt": 1}
    findings = verify_dataset(str(root))
    assert findings.problems == []
    assert findings.samples == {"train": 14, "val": 4}
    dead = decode_table(storage.read_bytes(outcome.rejected), outcome.rejected)
    assert dict(zip(dead["source"].to_pylist(), dead["status"].to_pylist())) == {"tiny": "too_small", "cut": "corrupt"}


def start(root: Path, raw: Path, install: Callable[[], None]) -> int:
    """A process of its own that runs the pipeline; forked, so that it need not import everything again."""
    child = os.fork()
    if child:
        return child
    try:
        install()
        run(root, raw)
        os._exit(0)
    except BaseException:
        os._exit(1)
    raise AssertionError("not reached")


def test_processes_killed_at_named_points_lose_and_double_nothing(tmp_path, raw, reference):
    draws, root = random.Random(4), tmp_path / "data"
    hit: Counter[str] = Counter()
    for number, stage in enumerate(STAGES):
        point, mark = POINTS[number % len(POINTS)], tmp_path / f"mark-{number}"
        done = set(root.rglob("*.json"))
        count = 1 if stage == "dedup" else draws.randint(1, 2)
        child = start(root, raw, struck(point, stage, count, mark, signal.SIGKILL))
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), (stage, point, status)
        assert is_of(stage, mark.read_text(), manifest=point != "before data")
        hit[point] += 1
        assert done <= set(root.rglob("*.json"))
        assert not (root / "dataset.json").exists()
    assert set(hit) == set(POINTS)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.json")}
    outcome = run(root, raw)
    check(root, outcome, reference)
    # the last kill came before the second or first proof of a pack: nothing but packing is left to do
    assert set(outcome.computed) == {"pack"}
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())


def test_a_zombie_that_wakes_up_late_changes_nothing(tmp_path, raw, reference):
    root, mark = tmp_path / "data", tmp_path / "mark"
    child = start(root, raw, struck("between data and manifest", "latents", 2, mark, signal.SIGSTOP))
    try:
        until = time.monotonic() + 500
        while not mark.exists():
            assert time.monotonic() < until
            time.sleep(0.1)
        os.waitpid(child, os.WUNTRACED)
        check(root, run(root, raw), reference)
        before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    finally:
        os.kill(child, signal.SIGCONT)
    _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) == 0
    after = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert {path for path in after if before.get(path) != after[path]} <= set((root / "rejected").rglob("*"))
    assert verify_dataset(str(root)).problems == []


@pytest.fixture
def patient(monkeypatch) -> None:
    for name, value in {"READ_TIMEOUT": "2", "CONNECT_TIMEOUT": "2", "PROBE_TIMEOUT": "20", "ATTEMPTS": "6"}.items():
        monkeypatch.setenv(f"BEELINE_S3_{name}", value)


@pytest.mark.slow
def test_one_request_in_twenty_that_fails_changes_nothing(s3, s3_server, monkeypatch, patient, raw, reference):

    proxy = FaultyProxy(urlsplit(s3_server).port, share=0.05, seed=3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    outcome = run(f"{s3}/data", raw)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    check(f"{s3}/data", outcome, reference)
    assert all(proxy.hits[fault] for fault in ("500", "503", "timeout", "cut body", "lost answer")), proxy.hits
    faults = proxy.hits["requests"] - proxy.hits["passed"]
    assert 0.03 < faults / proxy.hits["requests"] < 0.07
    proxy.stop()


def test_s3_that_is_cut_is_one_line_and_the_same_command_goes_on(s3, s3_server, monkeypatch, patient, raw, reference):

    draws = random.Random(2)
    monkeypatch.setenv("BEELINE_S3_ATTEMPTS", "2")
    done: set[str] = set()
    for requests in sorted(draws.sample(range(20, 120), 2)):
        proxy = FaultyProxy(urlsplit(s3_server).port, cut_after=requests)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        with pytest.raises(UserError) as caught:
            run(f"{s3}/data", raw)
        assert "testing-secret" not in str(caught.value)
        assert proxy.hits["gone"] > 0
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
        now = set(storage.list_files(f"{s3}/data"))
        assert done <= now
        done = now
    check(f"{s3}/data", run(f"{s3}/data", raw), reference)
