"""The service through a whole ladder, as somebody sees it who opens it first and trains afterwards.

Real processes all the way: a ladder of the world, `python -m eval serve` (killed once), Chromium. Pictures of every
page stay in the test's folder (`pytest --basetemp`).
"""

import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from eval_browser import chromium

from infra.results import ResultStore

pytestmark = [pytest.mark.slow, pytest.mark.dist]
RUNS = ("world-d1", "world-d2")
IMAGES, EVERY, POINTS = 288, 96, 6  # three checkpoints of each run, two losses for each
OVERRIDES = ("--logging.save-every", str(EVERY), "--validation.every", str(IMAGES // POINTS), "--logging.log-every",
             "16", "--validation.samples", "16", "--logging.samples", "0")  # fmt: skip
JUDGED = ("--metrics", "geneval", "clip_score", "--prompts-per-task", "1", "--images-per-prompt", "1",
          "--captions", "4", "--steps", "4", "--every", "1")  # fmt: skip
WAIT = 900  # seconds: for a machine with much other work
PAGES = ("", "losses?axis=compute", "scores", "samples", "scaling", "plans", "failures", "run?name=world-d2")
STATUS = "document.getElementById('status')"
TEXT = "document.getElementById('content').innerText"


@contextmanager
def running(command, log):
    """A module of ours as a process, which is killed at the end if it still runs."""
    with open(log, "a") as out:
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=out, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@contextmanager
def paused(process):
    """It and all that it started stand still."""
    every = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in every:
        one.suspend()
    try:
        yield
    finally:
        for one in every:
            one.resume()


def points(run):
    """JavaScript: how many points the first chart has of a run."""
    charts = "Chart.getChart(document.querySelector('canvas'))"
    return f"({charts}?.data.datasets.find(set => set.label === '{run}')?.data.length ?? 0)"


def states(runs):
    """(run, step) -> kinds of the objects that its evaluations left."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for path in Path(runs).glob("*/evaluations/*/step_*/*.json"):
        found.setdefault((path.parts[-5], path.parts[-2]), Counter())[path.name.split(".")[1]] += 1
    return found


def under_way(runs):
    """Checkpoints of the second run that are being judged, once another one is judged."""
    found = states(runs)
    if not any(kinds["done"] for kinds in found.values()):
        return []
    return [where for where, kinds in found.items() if where[0] == RUNS[1] and not kinds["done"]]


def kill(service, runs):
    """What the service was judging. Nobody may go on with what the next service takes over."""
    evaluating, (interrupted,) = psutil.Process(service.pid).children(), under_way(runs)
    service.kill()
    _, alive = psutil.wait_procs(evaluating, timeout=WAIT)
    assert alive == []
    return interrupted


def assert_judged_once(runs, interrupted):
    """Of every checkpoint one evaluation ended, only the interrupted one began twice, no number was measured twice."""
    steps = [f"step_{number * EVERY // 16:07d}" for number in (1, 2, 3)]
    found = states(runs)
    assert {where: kinds["done"] for where, kinds in found.items()} == {
        (run, step): 1 for run in RUNS for step in steps
    }
    assert {where for where, kinds in found.items() if kinds["claim"] > 1} == {interrupted}
    for run in RUNS:
        rows = [row for row in ResultStore(f"{runs}/{run}/results").rows(latest=False) if "world_" in row.metric]
        assert {row.images_seen for row in rows} == {EVERY, 2 * EVERY, 3 * EVERY}
        assert set(Counter((row.metric, row.protocol_hash, row.images_seen) for row in rows).values()) == {1}


@pytest.mark.timeout(3 * WAIT)
def test_a_browser_watches_a_ladder_from_before_its_first_run(tmp_path, free_port):
    runs, data, port = tmp_path / "runs", tmp_path / "data", free_port()
    runs.mkdir()
    scenes = ["data_pipeline", "run", "world", "--out", data, "--images", "64", "--val-images", "16", "--workers", "0"]
    with running(scenes, tmp_path / "data.log") as drawing:
        assert drawing.wait(WAIT) == 0
    address, log = f"http://127.0.0.1:{port}", tmp_path / "service.log"
    serve = ["eval", "serve", "--runs", runs, "--port", str(port), *JUDGED]
    climb = ["trainer", "ladder", "world", "--depths", "1", "2", "--data", data, "--out", runs, "--num-ranks", "1",
             "--images", str(IMAGES), *OVERRIDES]  # fmt: skip
    with chromium() as browser, ExitStack() as processes:
        service = processes.enter_context(running(serve, log))
        until(lambda: "beeline eval service on" in log.read_text(), WAIT)
        browser.open(address)
        browser.wait(f"{TEXT}.includes('No runs yet')")
        ladder = processes.enter_context(running(climb, tmp_path / "ladder.log"))
        browser.wait(f"{TEXT}.includes('world-d1')", WAIT)  # the page was not loaded again
        browser.open(f"{address}/losses")
        until(lambda: [*(runs / RUNS[1] / "results").glob("*.jsonl")], WAIT)
        with paused(ladder):  # after the second run's first checkpoint, however slow the judges are
            until(lambda: under_way(runs), WAIT)
            interrupted = kill(service, runs)
            browser.wait(f"{STATUS}.textContent === 'the service does not answer'", WAIT)
            processes.enter_context(running(serve, log))
            browser.wait(f"!{STATUS}.className && {points('world-d2')} > 0", WAIT)
            browser.errors.clear()  # of the time without a service
            assert browser.js(points("world-d2")) < browser.js(points("world-d1")) == POINTS
        browser.wait(f"{points('world-d2')} === {POINTS}", WAIT)
        assert ladder.wait(WAIT) == 0
        browser.open(address)
        browser.wait(f"{TEXT}.includes('6 of 6')", WAIT)
        assert_judged_once(runs, interrupted)
        look_at_every_page(browser, address, tmp_path)


def look_at_every_page(browser, address, folder):
    """What each page shows of the finished ladder, on a desktop in light and on a phone in dark."""
    for width, dark in ((1280, False), (390, True)):
        for page in PAGES:
            browser.open(f"{address}/{page}", width=width, dark=dark)
            browser.wait("Number(document.body.dataset.drawn || 0) > 0 && !document.querySelector('.fitting')", WAIT)
            browser.wait("[...document.images].every(image => image.complete && image.naturalWidth > 0)", WAIT)
            text = browser.js(TEXT)
            for words in SHOWN[page.partition("?")[0]]:
                assert words.lower() in text.lower(), (page, words, text)
            assert browser.errors == [], page
            assert [url for url in browser.requests if not url.startswith((address, "data:"))] == [], page
            assert browser.js("document.documentElement.scrollWidth") <= width, page
            browser.picture(folder / f"{page.partition('?')[0] or 'runs'}-{width}.png")
            if page == "samples":
                assert browser.js("document.querySelectorAll('.strip img').length") == 6
            if page == "scores":
                assert browser.js("document.querySelectorAll('canvas').length") == 2


SHOWN = {
    "": (*RUNS, "6 of 6", "world geneval, overall, seen", "model.depth"),
    "losses": ("Loss per noise level", *RUNS),
    "scores": ("not GenEval or T2I-CompBench", "Can the judges be believed?", "ground truth", *RUNS),
    "samples": ("prompts, row by row", "96 images", "288 images"),
    "scaling": ("No law is fitted", "Loss against compute"),
    "plans": ("Measured / planned", "training FLOPs", "100 %"),
    "failures": ("Every evaluation so far ended well.", "None."),
    "run": ("evaluated", "val_loss/sd3", "world_geneval/overall/seen"),
}
