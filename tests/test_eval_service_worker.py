"""The evaluating process: real weights in, rows and a gallery out; reasons for what cannot be; a crash is survived."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace

import pytest
from test_eval_run import QUICK, export

from eval.measure import Checkpoint
from eval.run import RunOptions
from eval.service.gallery import choose_world_prompts, read_sheet
from eval.service.index import Index
from eval.service.serve import ServeOptions
from eval.service.serve import prepare as serve_prepare
from eval.service.watcher import Watcher
from eval.service.worker import (
    EvaluateAndDraw,
    EvaluationSettings,
    EvaluationWorker,
    JudgesNotReady,
    WorkerDied,
    prepare_judges,
)
from infra import storage
from infra.errors import UserError
from infra.results import ResultStore


def checkpoint(root, step=10, **meta):
    weights = f"{root}/tiny/weights/step_{step:07d}/ema.safetensors"
    os.makedirs(os.path.dirname(weights), exist_ok=True)
    export(weights, images_seen=step * 64, **meta)
    return Checkpoint("tiny", f"{root}/tiny", step, weights)


def settings(root, **options):
    options = {"metrics": (), "calibration": False, **options}
    return EvaluationSettings(
        RunOptions(runs=str(root), sampling=replace(QUICK, precision="fp32"), **options),
        gallery=("a red dog", "a cat", "a red dog"),
    )


def work_of(given):
    run = EvaluateAndDraw(given).open()
    return lambda c: run({"checkpoint": {"run": c.run, "run_uri": c.run_uri, "step": c.step, "weights": c.weights}})


def test_a_gallery_is_drawn_once_with_its_description(tmp_path):
    mine = checkpoint(tmp_path)
    work = work_of(settings(tmp_path))
    work(mine)
    uri = f"{tmp_path}/tiny/gallery/step_0000010.png"
    sheet = read_sheet(uri)
    assert [tile.prompt for tile in sheet.tiles] == ["a red dog", "a cat"]
    assert (sheet.images_seen, sheet.tile_width) == (640, 64)
    drawn = storage.read_bytes(uri)
    storage.write_bytes(uri, drawn + b"mark")
    work(mine)
    assert storage.read_bytes(uri) == drawn + b"mark"  # what is there is not drawn again
    storage.write_bytes(uri.replace(".png", ".json"), b"{")
    work(mine)
    assert storage.read_bytes(uri) == drawn  # a torn description is
    assert len(set(choose_world_prompts(20))) == 20


def test_weights_that_disappear_are_a_failure_with_words(tmp_path):
    mine = checkpoint(tmp_path)
    os.unlink(mine.weights)
    with pytest.raises(UserError, match="it was there when the evaluation began"):
        work_of(settings(tmp_path))(mine)
    assert not storage.exists(f"{tmp_path}/tiny/gallery")


def test_weights_that_are_no_weights_are_a_failure_with_words(tmp_path):
    mine = checkpoint(tmp_path)
    storage.write_bytes(mine.weights, b"not safetensors")
    with pytest.raises(UserError, match=r"ema\.safetensors"):
        work_of(settings(tmp_path))(mine)


@pytest.mark.parametrize(("wrong", "told"), [
    ({"captions": 0}, "--captions 0: expected 1 or more"), ({"workers": -1}, "--workers -1: expected 0 or more"),
    ({"checkpoints": "3"}, "all, or the last of each run"), ({"metrics": ("genevall",)}, "did you mean 'geneval'"),
])  # fmt: skip
def test_a_service_that_could_not_evaluate_does_not_start(tmp_path, wrong, told):
    with pytest.raises(UserError, match=told):
        serve_prepare(ServeOptions(RunOptions(runs=str(tmp_path), **wrong)))
    with pytest.raises(UserError, match="--every 0: expected seconds"):
        serve_prepare(ServeOptions(RunOptions(runs=str(tmp_path)), every=0))


def test_judges_that_are_not_there_are_found_before_any_checkpoint(tmp_path):
    checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"--official\."):
        prepare_judges(settings(tmp_path, metrics=("geneval",), judges="official"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_process_survives_bad_checkpoints_and_is_started_anew_after_it_was_killed(tmp_path):
    good, bad = checkpoint(tmp_path), checkpoint(tmp_path, 20)
    os.unlink(bad.weights)
    worker = EvaluationWorker(settings(tmp_path))
    beats = []
    try:
        reasons = worker.evaluate([good, bad], lambda: beats.append(1))
        assert list(reasons) == ["tiny step 20"]
        assert beats
        process = worker._process
        threading.Timer(0.2, os.kill, (process.pid, signal.SIGKILL)).start()
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(WorkerDied, match="code -9") as died:
            worker.evaluate([good], lambda: None)
        assert not died.value.stopped
        assert worker.evaluate([good], lambda: None) == {}
        assert worker._process is not process
        os.kill(worker._process.pid, signal.SIGTERM)
        with pytest.raises(WorkerDied) as died:
            worker.evaluate([good], lambda: None)
        assert died.value.stopped
    finally:
        worker.stop()
    unready = EvaluationWorker(settings(tmp_path, metrics=("geneval",), judges="official"))
    try:
        with pytest.raises(JudgesNotReady, match=r"--official\."):
            unready.evaluate([good], lambda: None)
    finally:
        unready.stop()


@pytest.mark.timeout(600)
def test_checkpoints_that_appear_get_rows_and_pictures_once_from_two_services(tmp_path):
    """Two services on one store, each with its evaluating process; a third one, started later, finds nothing to do."""
    checkpoint(tmp_path, 10)
    given = settings(tmp_path, metrics=("clip_score",), captions=2)
    services = [Watcher(Index(str(tmp_path)), given, every=0.2) for _ in range(2)]
    for service in services:
        service.start()
    try:
        wait_for(services, "done", 1)
        checkpoint(tmp_path, 20)
        checkpoint(tmp_path, 30)
        wait_for(services, "done", 3)
    finally:
        for service in services:
            service.stop()
    run = services[0].index.snapshot.by_name["tiny"]
    assert set(run.gallery) == {10, 20, 30}
    assert sum(path.endswith(".claim.json") for path in run.evaluations) == 3
    written = [
        json.loads(line)
        for path in (tmp_path / "tiny" / "results").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert sorted((row["metric"], row["images_seen"]) for row in written) == [
        ("world_clip_score", step * 64) for step in (10, 20, 30)
    ]
    before = sorted(storage.list_files(str(tmp_path)))
    again = Watcher(Index(str(tmp_path)), given)
    assert not again.step()
    assert sorted(storage.list_files(str(tmp_path))) == before


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)
def test_ray_workers_share_the_checkpoints_of_a_service(tmp_path, ray_folder):
    """Two at a time on a real Ray: rows and pictures of each once, a torn one has its reason, and nothing is left."""
    for step in (10, 20, 30):
        checkpoint(tmp_path, step)
    torn = tmp_path / "tiny" / "weights" / "step_0000040" / "ema.safetensors"
    torn.parent.mkdir()
    torn.write_bytes(b"no weights")
    given = settings(tmp_path, metrics=("clip_score",), captions=2, workers=2)
    service = Watcher(Index(str(tmp_path)), given, every=0.2)
    service.start()
    try:
        wait_for([service], "done", 3, seconds=800)
        wait_for([service], "failed", 1)
    finally:
        service.stop()
    run = service.index.snapshot.by_name["tiny"]
    assert set(run.gallery) == {10, 20, 30}
    rows = ResultStore(f"{tmp_path}/tiny/results").rows(latest=False)
    assert sorted((row.metric, row.images_seen) for row in rows) == [
        ("world_clip_score", step * 64) for step in (10, 20, 30)
    ]
    assert not Watcher(Index(str(tmp_path)), given).step(), "measured again"


def wait_for(services: list[Watcher], kind: str, count: int, *, seconds: float = 500) -> None:
    """Until every service has seen so many evaluations with this outcome."""
    end = time.monotonic() + seconds
    while True:
        runs = [service.index.snapshot.by_name.get("tiny") for service in services]
        if all(run and sum(path.endswith(f".{kind}.json") for path in run.evaluations) == count for run in runs):
            return
        assert time.monotonic() < end, [service.describe() for service in services]
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_says_its_address_answers_and_ends_on_ctrl_c(tmp_path):
    checkpoint(tmp_path)
    command = [sys.executable, "-m", "eval", "serve", "--runs", str(tmp_path), "--port", "0", "--no-evaluate"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().split()[-1]
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address + "api/status") as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130)  # 0 where uvicorn was asked while it was shutting a connection
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
    refused = subprocess.run([*command, "--host", "0.0.0.0"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "--token-file" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
