"""On real Ray workers: the same data as without Ray, workers that die, drivers that are killed in the middle."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import data_kill_points
import psutil
import pytest
import yaml
from data_kill_points import POINTS
from ray import cloudpickle

from data_pipeline.flow.pipeline import Pipeline
from data_pipeline.flow.tasks import ColumnTask
from data_pipeline.inspection.verify import verify_dataset
from data_pipeline.plans import world
from data_pipeline.sources.registry import open_source
from data_pipeline.world.write import write_world
from infra.runner import WorkerPool

for module in (sys.modules[__name__], data_kill_points):
    cloudpickle.register_pickle_by_value(module)  # Ray's workers cannot import a test file
PLAN = replace(world(), ingest_rows=8, pack_rows=16)
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_world(str(folder), images=40, val_images=8, seed=5, images_per_shard=10)
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory, raw) -> str:
    """The fingerprint of the data made without Ray and without trouble."""
    root = tmp_path_factory.mktemp("reference")
    return Pipeline(PLAN, str(root), open_source(f"wds:{raw}"), workers=WorkerPool(0)).run().info.fingerprint


def command(root: Path, raw: Path, workers: int) -> list[str]:
    given = ["--ingest-rows", "8", "--pack-rows", "16", "--workers", str(workers)]
    return [sys.executable, "-m", "data_pipeline", "run", "world", "--out", str(root), "--source", f"wds:{raw}", *given]


def manifests(root: Path, stage: str) -> int:
    return (
        len(list((root / "columns" / stage).rglob("*.json")))
        if stage != "pack"
        else len(list((root / "pack").rglob("*/*.json")))
    )


def kill_when(process: subprocess.Popen, root: Path, stage: str, count: int, timeout: float = 540) -> bool:
    """SIGKILL the process and all it started once so many manifests of a stage are there. False: it ended before."""
    until = time.monotonic() + timeout
    while time.monotonic() < until and process.poll() is None:
        if manifests(root, stage) >= count:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.02)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{stage} had {manifests(root, stage)} manifests after {timeout} s")
    return False


def check(root: Path, raw: Path, reference: str) -> None:
    outcome = Pipeline(PLAN, str(root), open_source(f"wds:{raw}"), workers=WorkerPool(0)).run()
    assert outcome.info.fingerprint == reference
    assert outcome.info.counts == {"ok": 48}
    findings = verify_dataset(str(root))
    assert findings.problems == []
    assert findings.samples == {"train": 40, "val": 8}


def test_a_driver_killed_in_the_middle_goes_on_where_it_was(tmp_path, raw, reference):
    root = tmp_path / "data"
    process = subprocess.Popen(command(root, raw, 0), start_new_session=True, stderr=subprocess.DEVNULL)
    assert kill_when(process, root, "latents", 2)
    assert not (root / "dataset.json").exists()
    done = {path: path.stat().st_mtime_ns for path in root.rglob("*.json")}
    check(root, raw, reference)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())


@pytest.mark.dist
def test_ray_workers_make_the_same_data_in_waves(tmp_path, raw, reference, ray_cluster, monkeypatch):
    monkeypatch.setattr("infra.runner._WAVE", 4)  # of six units and more
    root = tmp_path / "data"
    outcome = Pipeline(PLAN, str(root), open_source(f"wds:{raw}"), workers=WorkerPool(2, cpus=1)).run()
    assert outcome.info.fingerprint == reference
    assert verify_dataset(str(root)).problems == []


STRUCK = {"caption": POINTS[0], "latents": POINTS[1], "text_t5": POINTS[2]}


class StruckTask(ColumnTask):
    """Kills its actor once at each of the points, and writes down every unit that is begun."""

    marks: ClassVar[str]

    def open(self):
        for stage, point in STRUCK.items():
            mark = Path(self.marks) / stage
            if not mark.exists():
                data_kill_points.struck(point, stage, 1, mark, signal.SIGKILL)()
        run = super().open()

        def noted(unit):
            (Path(self.marks) / f"begun-{unit['id']}-{os.getpid()}").touch()
            return run(unit)

        return noted


@pytest.mark.slow
@pytest.mark.dist
def test_actors_killed_at_named_points_cost_one_shard_each(tmp_path, raw, reference, ray_cluster, monkeypatch):
    monkeypatch.setattr(StruckTask, "marks", str(tmp_path), raising=False)
    monkeypatch.setattr("data_pipeline.flow.pipeline.ColumnTask", StruckTask)
    root = tmp_path / "data"
    outcome = Pipeline(PLAN, str(root), open_source(f"wds:{raw}"), workers=WorkerPool(2, cpus=1)).run()
    assert outcome.info.fingerprint == reference
    assert verify_dataset(str(root)).problems == []
    for stage, point in STRUCK.items():
        uri = (tmp_path / stage).read_text()  # each point was hit
        assert data_kill_points.is_of(stage, uri, manifest=point != POINTS[0])
    units = len(list((root / "columns" / "latents").rglob("*.json")))
    assert len(list(tmp_path.glob("begun-*"))) == units + len(STRUCK)


def wait_for(what, seconds: float = 400) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)


class WatchedTask(ColumnTask):
    """Notes when its actor opens and on which GPU, when pictures are decoded and when captioner and encoder work.

    The first captions are not given before another actor has decoded a picture, the last unit does not end before the
    other actor is gone: what would run one after the other would never end.
    """

    folder: ClassVar[str]
    units: ClassVar[int]

    def open(self):
        import ray

        from data_pipeline.captions import stage as caption
        from data_pipeline.stages import stage
        from model.encoders.vae import Latents

        folder, mine = Path(self.folder), f"{os.getpid()}"

        def noted(kind, work, before=lambda: None):
            def run(*args, **given):
                started = time.time()
                before()
                done = work(*args, **given)
                with (folder / f"spans-{mine}").open("a") as file:
                    file.write(json.dumps([kind, started, time.time()]) + "\n")
                return done

            return run

        def another_decodes():
            others = [path for path in folder.glob("spans-*") if path.name != f"spans-{mine}"]
            return any("decode" in path.read_text() for path in others)

        stage.decode = noted("decode", stage.decode)
        caption.caption_images = noted("caption", caption.caption_images, lambda: wait_for(another_decodes))
        Latents.encode = noted("encode", Latents.encode)
        (gpu,) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        (folder / f"opened-{mine}").write_text(json.dumps([gpu, time.time()]))
        run = super().open()

        def watched(unit):
            (folder / f"begun-{unit['id']}").touch()
            report = run(unit)
            if len(list(folder.glob("begun-*"))) == self.units:
                with contextlib.suppress(FileExistsError), (folder / "last").open("x"):
                    wait_for((folder / "shrunk").exists)
            return report

        return watched


@pytest.mark.slow
@pytest.mark.dist
def test_decoding_goes_on_while_others_caption_on_a_shared_gpu_and_the_pool_follows_the_work(
    tmp_path, raw, reference, ray_cluster, monkeypatch
):
    folder = tmp_path / "seen"
    folder.mkdir()
    monkeypatch.setattr(WatchedTask, "folder", str(folder), raising=False)
    monkeypatch.setattr("data_pipeline.flow.pipeline.ColumnTask", WatchedTask)
    monkeypatch.setattr("infra.runner._SMALL_POOL", 1)  # pools of more than eight grow, here those of two
    pipeline = Pipeline(PLAN, str(tmp_path / "data"), open_source(f"wds:{raw}"), workers=WorkerPool(0))
    verdicts = pipeline.run_gate()
    monkeypatch.setattr(WatchedTask, "units", len(verdicts), raising=False)
    pipeline.jobs.workers = WorkerPool(cpus=0.5, gpus=0.5)  # there is no real GPU: the networks stay on the CPU

    def watch():
        wait_for((folder / "last").exists)
        pids = [int(path.name.rpartition("-")[2]) for path in folder.glob("opened-*")]
        wait_for(lambda: sum(map(psutil.pid_exists, pids)) < 2)
        (folder / "shrunk").touch()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    pipeline.encode(verdicts)
    watcher.join()
    opened = {p.name.rpartition("-")[2]: json.loads(p.read_text()) for p in folder.glob("opened-*")}
    assert len(opened) == 2
    assert len({gpu for gpu, _ in opened.values()}) == 1  # half of the same one each
    spans = {pid: [json.loads(line) for line in (folder / f"spans-{pid}").read_text().splitlines()] for pid in opened}
    first, second = sorted(opened, key=lambda pid: opened[pid][1])
    assert opened[second][1] > min(start for _, start, _ in spans[first])  # it came when there was work for it
    busy = [span for span in spans[first] if span[0] in ("caption", "encode")]
    assert any(a < start and end < b for _, a, b in busy for kind, start, end in spans[second] if kind == "decode")
    assert {kind for found in spans.values() for kind, *_ in found} == {"decode", "caption", "encode"}
    assert (folder / "shrunk").exists()
    monkeypatch.undo()
    check(tmp_path / "data", raw, reference)


@pytest.mark.slow
@pytest.mark.dist
def test_ray_jobs_killed_at_seeded_points_lose_and_double_nothing(tmp_path, raw, reference):
    draws = random.Random(11)
    root = tmp_path / "data"
    hits = Counter()
    for stage, most in (("ingest", 3), ("measure", 5), ("caption", 4), ("latents", 5), ("text_t5", 6), ("pack", 2)):
        process = subprocess.Popen(command(root, raw, 2), start_new_session=True, stderr=subprocess.DEVNULL)
        hits[stage] += kill_when(process, root, stage, draws.randint(1, most))
        # what Ray started in sessions of its own ends when its head is gone; give it a moment
        time.sleep(5)
    assert set(hits.values()) == {1}, hits
    check(root, raw, reference)


@pytest.mark.slow
@pytest.mark.dist
def test_a_submitted_job_runs_a_plan_file_and_the_same_command(tmp_path, raw, reference, free_port):
    ray = str(Path(sys.executable).with_name("ray"))
    port, dashboard, agent = free_port(), free_port(), free_port()
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    temp = Path("/tmp") / f"r{os.getpid()}"  # sockets below it must have short names
    head = [ray, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    cluster = subprocess.Popen(
        # the agent that takes jobs has a fixed port by default, which an earlier test's cluster may hold
        [*head, f"--temp-dir={temp}", "--object-store-memory=200000000", f"--dashboard-agent-listen-port={agent}"],
        env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        root = tmp_path / "data"
        job = tmp_path / "job"  # what is sent: the code, and the plan as a file beside it
        for package in ("data_pipeline", "model", "infra"):
            shutil.copytree(ROOT / package, job / package, ignore=shutil.ignore_patterns("__pycache__"))
        asked = {"plan": "world", "out": str(root), "source": f"wds:{raw}", "workers": 2, "ingest_rows": 8}
        (job / "plan.yaml").write_text(yaml.safe_dump(asked))
        submit = [ray, "job", "submit", f"--address=http://127.0.0.1:{dashboard}", "--working-dir", str(job), "--"]
        from_file = ["python", "-m", "data_pipeline", "run", "plan.yaml", "--pack-rows", "16"]
        # the dashboard answers before the node's job agent has registered itself: both refusals mean "not up yet"
        starting = ("Failed to connect", "No available agent to submit job")
        for _ in range(60):
            done = subprocess.run([*submit, *from_file], env=env, capture_output=True, text=True)
            if not any(words in done.stdout + done.stderr for words in starting):
                break
            time.sleep(2)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        check(root, raw, reference)
        left = yaml.safe_load((root / "plan.yaml").read_text())
        assert left == asked | {"pack_rows": 16, "source": [asked["source"]]}
        relative = subprocess.run([*submit, *command("data", raw, 2)], env=env, capture_output=True, text=True)
        assert relative.returncode != 0
        assert "--out data: a submitted job runs in a temporary copy" in relative.stdout + relative.stderr
    finally:
        os.killpg(cluster.pid, signal.SIGKILL)
        cluster.wait()
        shutil.rmtree(temp, ignore_errors=True)
