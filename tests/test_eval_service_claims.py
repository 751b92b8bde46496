"""Claims: one winner per attempt, outcomes from file names, abandoned claims; a watcher never does one twice."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
from eval_runs import write_run

from eval.run import RunOptions
from eval.service import claims
from eval.service.claims import ClaimMonitor, ClaimOwner, EvaluationOutcome, claim, read_outcomes
from eval.service.index import Index
from eval.service.watcher import Watcher
from eval.service.worker import EvaluationSettings, JudgesNotReady, WorkerDied, name_checkpoint
from infra import storage
from infra.results import ResultRow, ResultStore


def files(run_uri):
    return [uri.removeprefix(run_uri + "/") for uri in storage.list_files(run_uri)]


def test_of_many_claims_exactly_one_wins(tmp_path):
    run = str(tmp_path / "run")
    with ThreadPoolExecutor(8) as pool:
        won = [c for c in pool.map(lambda _: claim(run, "s", 100), range(16)) if c is not None]
    assert len(won) == 1
    assert read_outcomes(files(run), "s") == {100: EvaluationOutcome("running", 1, 0)}
    assert read_outcomes(files(run), "other settings") == {}


def test_outcomes_follow_the_last_attempt_and_count_the_silent_ones(tmp_path):
    run = str(tmp_path / "run")
    first = claim(run, "s", 5)
    assert claim(run, "s", 5) is None
    second = claim(run, "s", 5, after=first.attempt)  # the first was given up by everybody
    second.end("failed", reason="no room")
    assert read_outcomes(files(run), "s")[5] == EvaluationOutcome("failed", 2, 1)
    assert claims.read_reason(run, "s", 5, 2)[0] == "no room"
    third = claim(run, "s", 5, after=2)
    third.end("released")
    assert read_outcomes(files(run), "s")[5] == EvaluationOutcome("new", 3, 1)
    claim(run, "s", 5, after=3).end("done")
    assert read_outcomes(files(run), "s")[5].state == "done"
    first.end("done")  # a process that was believed dead comes back: still one outcome
    assert read_outcomes(files(run), "s")[5].state == "done"


def test_a_claim_of_a_dead_process_on_this_machine_is_abandoned_at_once(tmp_path):
    run = str(tmp_path / "run")
    program = f"from eval.service.claims import claim; claim({run!r}, 's', 7)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert ClaimMonitor().is_abandoned(run, "s", 7, 1)
    claim(run, "s", 8)
    assert not ClaimMonitor().is_abandoned(run, "s", 8, 1)  # ours, and we live


def test_a_claim_from_another_machine_is_abandoned_when_its_beat_stands_still(tmp_path, monkeypatch):
    run = str(tmp_path / "run")
    folder = storage.join(run, "evaluations", "s", "step_0000007")
    elsewhere = ClaimOwner("another-host", "boot", 1, "0.00")
    storage.write_bytes(folder + "/0001.claim.json", json.dumps({"owner": asdict(elsewhere)}).encode())
    clock = [1000.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: clock[0])
    watch = ClaimMonitor()
    for beat in range(4):
        assert not watch.is_abandoned(run, "s", 7, 1)
        storage.write_bytes(folder + "/0001.beat.json", json.dumps({"beat": beat}).encode())
        clock[0] += claims.STANDS_STILL - 1
    assert not watch.is_abandoned(run, "s", 7, 1)  # a new beat starts the wait anew
    clock[0] += claims.STANDS_STILL + 1
    assert watch.is_abandoned(run, "s", 7, 1)
    storage.write_bytes(folder + "/0001.claim.json", b'{"owner": "torn')
    assert not ClaimMonitor().is_abandoned(run, "s", 7, 1)


class Counting:
    """Stands for the evaluating process: remembers what it was asked, fails where it is told to."""

    def __init__(self, done, lock, broken=()):
        self.done, self.lock, self.broken = done, lock, broken

    def evaluate(self, checkpoints, alive):
        alive()
        with self.lock:
            self.done += [(checkpoint.run, checkpoint.step) for checkpoint in checkpoints]
        return {name_checkpoint(c): "cannot be read" for c in checkpoints if c.step in self.broken}

    def stop(self):
        pass


@pytest.fixture
def ladder(tmp_path):
    root = str(tmp_path / "runs")
    for depth in (2, 3):
        uri = write_run(root, depth, scored=False, samples=False)
        for step in (10, 20, 30):
            storage.write_bytes(f"{uri}/weights/step_{step:07d}/ema.safetensors", b"weights")
    return root


def settings(root, **options):
    return EvaluationSettings(RunOptions(runs=root, metrics=(), **options))


def test_the_last_checkpoint_of_every_run_comes_first(ladder):
    done = []
    watcher = Watcher(Index(ladder), settings(ladder), worker=Counting(done, threading.Lock()))
    while watcher.step():
        pass
    assert done == [(f"world-d{depth}", step) for step in (30, 20, 10) for depth in (2, 3)]


def test_two_services_on_one_store_do_each_checkpoint_once(ladder):
    done, lock = [], threading.Lock()
    watchers = [Watcher(Index(ladder), settings(ladder), worker=Counting(done, lock)) for _ in range(3)]

    def work(watcher):
        while watcher.step():
            pass

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, watchers))
    for watcher in watchers:  # whoever found all claimed comes back until nothing is open
        work(watcher)
    expected = [(f"world-d{depth}", step) for depth in (2, 3) for step in (10, 20, 30)]
    assert sorted(done) == expected
    started_anew = Watcher(Index(ladder), settings(ladder), worker=Counting(done, lock))
    assert not started_anew.step()
    assert sorted(done) == expected


def test_the_newest_checkpoint_comes_first_and_last_means_last(ladder):
    done = []
    watcher = Watcher(Index(ladder), settings(ladder, checkpoints="last"), worker=Counting(done, threading.Lock()))
    while watcher.step():
        pass
    assert done == [("world-d2", 30), ("world-d3", 30)]


def test_a_failure_is_kept_with_its_reason_and_tried_again_only_when_asked(ladder):
    done, lock = [], threading.Lock()
    watcher = Watcher(Index(ladder), settings(ladder), worker=Counting(done, lock, broken={20}))
    while watcher.step():
        pass
    assert len(done) == 6
    run = watcher.index.snapshot.by_name["world-d2"]
    assert read_outcomes(run.evaluations, watcher.settings.hash)[20] == EvaluationOutcome("failed", 1, 0)
    assert claims.read_reason(run.run.uri, watcher.settings.hash, 20, 1)[0] == "cannot be read"
    again = Watcher(Index(ladder), settings(ladder), worker=Counting(done, lock), retry=True)
    while again.step():
        pass
    assert len(done) == 8
    states = read_outcomes(again.index.snapshot.by_name["world-d2"].evaluations, again.settings.hash)
    assert {outcome.state for outcome in states.values()} == {"done"}


def test_a_checkpoint_that_kills_its_evaluation_again_and_again_is_given_up(ladder):
    done = []
    watcher = Watcher(Index(ladder), settings(ladder), worker=Counting(done, threading.Lock()))
    gone = {"owner": asdict(ClaimOwner(ClaimOwner.find_own().host, ClaimOwner.find_own().boot, 2**22 + 1, "1.00"))}
    run = storage.join(ladder, "world-d2")
    for attempt in range(claims.MOST_ATTEMPTS):
        folder = storage.join(run, "evaluations", watcher.settings.hash, "step_0000020")
        storage.write_bytes(f"{folder}/{attempt + 1:04d}.claim.json", json.dumps(gone).encode())
    while watcher.step():
        pass
    assert ("world-d2", 20) not in done
    assert len(done) == 5
    reason, _ = claims.read_reason(run, watcher.settings.hash, 20, claims.MOST_ATTEMPTS + 1)
    assert "died without a word" in reason


class Dying(Counting):
    """Ends in the middle whenever step 20 is among its work."""

    def evaluate(self, checkpoints, alive):
        if any(checkpoint.step == 20 for checkpoint in checkpoints):
            raise WorkerDied("ended with code -9")
        return super().evaluate(checkpoints, alive)


def test_a_batch_that_dies_is_given_back_and_its_culprit_found_alone(ladder):
    done = []
    watcher = Watcher(Index(ladder), settings(ladder, workers=3), worker=Dying(done, threading.Lock()))
    while watcher.step():
        pass
    assert sorted(done) == [(f"world-d{depth}", step) for depth in (2, 3) for step in (10, 30)]
    run = watcher.index.snapshot.by_name["world-d3"]
    states = read_outcomes(run.evaluations, watcher.settings.hash)
    assert {step: outcome.state for step, outcome in states.items()} == {10: "done", 20: "failed", 30: "done"}


def test_missing_judges_stop_the_evaluation_and_fail_no_checkpoint(ladder):
    class Unready(Counting):
        def evaluate(self, checkpoints, alive):
            raise JudgesNotReady("no detector at /nowhere")

    watcher = Watcher(Index(ladder), settings(ladder), worker=Unready([], threading.Lock()))
    watcher.step()
    assert not watcher.step()
    assert "no detector at /nowhere" in watcher.describe().problem
    states = read_outcomes(watcher.index.snapshot.by_name["world-d2"].evaluations, watcher.settings.hash)
    assert {outcome.state for outcome in states.values()} == {"new"}
    repaired = Watcher(Index(ladder), settings(ladder), worker=Counting([], threading.Lock()))
    assert repaired.step()


def test_other_settings_are_evaluated_beside_these_and_batch_size_is_none(ladder):
    from dataclasses import replace

    one = settings(ladder)
    assert settings(ladder, captions=7).hash != one.hash
    assert EvaluationSettings(one.options, gallery=("a cat",)).hash != one.hash
    faster = replace(one.options, sampling=replace(one.options.sampling, batch=2, device="cuda"))
    assert EvaluationSettings(faster).hash == one.hash


def test_pages_follow_what_is_trained_while_a_checkpoint_is_evaluated(ladder):
    """An evaluation may take hours; curves and the count of waiting checkpoints do not stand still meanwhile."""
    seen = []

    class Slow(Counting):
        def evaluate(self, checkpoints, alive):
            row = ResultRow("world-d3", "h", "v", 99_000, "val_loss/sd3", 0.1, False, 4, "p")
            ResultStore(storage.join(ladder, "world-d3", "results")).append([row])
            storage.write_bytes(storage.join(ladder, "world-d3", "weights", "step_0000040", "ema.safetensors"), b"x")
            alive()
            seen.append((watcher.index.snapshot.by_name["world-d3"].images, watcher.describe()))
            return super().evaluate(checkpoints, alive)

    watcher = Watcher(Index(ladder), settings(ladder), every=0.0, worker=Slow([], threading.Lock()))
    assert watcher.step()
    ((images, told),) = seen
    assert images == 99_000
    assert [(c.run, c.step) for c in told.working] == [("world-d2", 30)]
    assert (told.waiting, told.elsewhere) == (6, 0)


def test_the_status_tells_what_others_evaluate_and_what_failed(ladder):
    watcher = Watcher(Index(ladder), settings(ladder), worker=Counting([], threading.Lock()))
    run = storage.join(ladder, "world-d2")
    claim(run, watcher.settings.hash, 30)
    claim(run, watcher.settings.hash, 20).end("failed", reason="no room")
    watcher.index.refresh()
    told = watcher.describe()
    assert (told.elsewhere, told.failed, told.checkpoints) == (1, 1, 6)


def test_a_stop_that_reaches_the_evaluating_process_first_is_no_failure(ladder):
    """Service managers and batch systems send SIGTERM to every process at once."""

    class Stopped(Counting):
        def evaluate(self, checkpoints, alive):
            raise WorkerDied("ended with code -15", stopped=True)

    watcher = Watcher(Index(ladder), settings(ladder), worker=Stopped([], threading.Lock()))
    assert not watcher.step()  # and nothing new is begun at once
    watcher.index.refresh()
    states = read_outcomes(watcher.index.snapshot.by_name["world-d2"].evaluations, watcher.settings.hash)
    assert states == {30: EvaluationOutcome("new", 1, 0)}
