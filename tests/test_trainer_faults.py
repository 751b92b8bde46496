"""When things go wrong in a run of real ranks: bad numbers, spikes, a killed rank, a stuck rank, a full disk, no S3."""

import json
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_infra_faults import Wire
from test_trainer_uploads import whole_steps
from trainer_launch import TINY, finish, run_ranks, start_ranks, until

from data_pipeline.packing import synthetic
from infra import storage
from trainer.guard import ENOUGH, find_problem, find_suspects
from trainer.recipe import Guard
from trainer.watching.heartbeats import FAILED, RUNNING, SURE_S, Heartbeats
from trainer.watching.watchdog import Watchdog
from trainer.zero.group import Group

pytestmark = pytest.mark.dist
CADENCE = ["--logging.log-every", "8", "--validation.every", "None"]
BAD = 77  # the sample that spoils its batch


def command(data: Path, out: Path | str, images: int, *more: str) -> list[str]:
    arguments = ["-m", "trainer", "train", "world-d2", "--data", str(data), "--out", str(out), "--images", str(images)]
    return [*arguments, *TINY, *CADENCE, *more]


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "logs" / "train.jsonl").read_text().splitlines()]
    assert len({line["images_seen"] for line in lines if line["kind"] == "train"}) == len(lines)
    return {line["images_seen"]: line["loss"] for line in lines}


def write(path: Path, spoil: float | None = None) -> Path:
    """256 samples; one of them has latents that are `spoil`."""
    made = synthetic._make_samples

    def spoiled(*args, **kwargs):
        for sample in made(*args, **kwargs):
            if spoil is not None and sample.key.startswith("train") and sample.info["number"] == BAD:
                sample.moments_CHW[: len(sample.moments_CHW) // 2] = spoil
            yield sample

    synthetic._make_samples = spoiled
    try:
        synthetic.write_synthetic(
            str(path), num_samples=256, val_samples=16, latent_shape=(4, 8, 8), buckets=("32x32",)
        )
    finally:
        synthetic._make_samples = made
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("loss", "recent", "spike", "says"),
    [
        (float("nan"), [], 12.0, "the loss is nan"),
        (float("inf"), [1.0] * 50, None, "the loss is inf"),
        (1e9, [1.0] * 50, None, ""),
        (1e9, [1.0] * (ENOUGH - 1), 12.0, ""),
        (1.99, [1.0] * 50, 12.0, ""),
        (2.01, [1.0] * 50, 12.0, "jumped to 2.01 from a median of 1 over 50 steps"),
        (1.9, [0.9, 1.0, 1.1] * 20, 12.0, ""),
        (3.0, [0.9, 1.0, 1.1] * 20, 12.0, "jumped"),
    ],
)
def test_which_losses_are_refused(loss, recent, spike, says):
    problem = find_problem(loss, recent, Guard(spike=spike), batch=256)
    assert says in problem
    assert bool(problem) is bool(says)


def test_the_long_tail_of_small_batches_is_no_spike():
    recent = [0.4, 0.42, 0.44] * 20 + [0.6]  # a sound run in batches of 16 had these, and then
    for loss in (0.91, 2.654):
        assert find_problem(loss, recent, Guard(), batch=16) == ""
        assert bool(find_problem(loss, recent, Guard(), batch=4096)) is (loss > 1.2)
    assert "jumped" in find_problem(5.0, recent, Guard(), batch=16)


def test_a_batch_that_is_bad_again_takes_those_before_it_along():
    left_out: frozenset[int] = frozenset()
    for before in (0, 8, 72):
        suspects = find_suspects(1000 * 32, 32, left_out)
        assert suspects == range((1000 - before) * 32, 1001 * 32)
        left_out |= frozenset(suspects)
    assert find_suspects(3 * 32, 32, frozenset(range(3 * 32, 4 * 32))) == range(4 * 32)  # a run has a beginning
    assert find_suspects(1000 * 32, 32, frozenset(range(900 * 32, 901 * 32))) == range(1000 * 32, 1001 * 32)


@pytest.mark.slow
@pytest.mark.parametrize(("spoil", "ranks", "says"), [(np.nan, 2, "the loss is nan"), (5e4, 1, "the loss jumped to")])
def test_a_bad_batch_is_told_left_out_and_the_run_goes_back(tmp_path, spoil, ranks, says):
    """Every sample comes once; the spoiled one's batch is replaced. Counts stay right on all ranks."""
    path, run = write(tmp_path / "data", spoil), tmp_path / "run"
    bad_step = next(step for step in range(32) if BAD in batch_numbers(path, step))
    assert 16 < bad_step < 24
    said = run_ranks(command(path, run, 256, "--logging.save-every", "64", "--seed", str(SEED)), ranks)
    line = next(line for line in said.splitlines() if "the step was not taken" in line)
    assert says in line
    assert "back to the checkpoint at 128 images, without that batch (1 of 3)" in line
    dumps = [json.loads(file.read_text()) for file in sorted((run / "skipped").iterdir())]
    assert [dump["images_seen"] for dump in dumps] == [bad_step * 8] * ranks
    keys = [key for dump in dumps for key in dump["keys"]]
    assert len(keys) == 8
    assert f"train-32x32-{BAD:06d}" in keys
    found = losses(run)
    assert list(found) == list(range(8, 257, 8))
    assert max(found.values()) < 10
    manifest = json.loads((run / "checkpoints" / "step_0000032" / "manifest.json").read_text())
    assert (manifest["state"]["images_seen"], manifest["state"]["adam_steps"]) == (256, 32)
    kept = json.loads((run / "checkpoints" / "step_0000032" / "rank_00000.json").read_text())["extra"]
    assert kept["exceptions"]["positions"] == list(range(bad_step * 8, bad_step * 8 + 8))


SEED = 4


def batch_numbers(path: Path, step: int) -> set[int]:
    """Numbers of the samples in a global batch."""
    from data_pipeline.loading.loader import open_dataset

    batches = open_dataset(str(path)).batches(seed=SEED, start=step * 8, global_batch=8)
    keys = next(batches).keys
    batches.close()
    return {int(key.rsplit("-", 1)[-1]) for key in keys}


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "ranks"), [(0, 2), (2, 4)])
def test_sigkill_of_a_rank_ends_all_within_a_minute_in_one_line(data, tmp_path, victim, ranks):
    run = tmp_path / "run"
    words = command(data, run, 80_000, "--logging.save-every", "8")
    processes = start_ranks(words, ranks)
    while not (run / "checkpoints" / "latest").exists() and processes[0].poll() is None:
        time.sleep(0.5)
    processes[victim].kill()
    killed = time.monotonic()
    codes, said = finish(processes, timeout=120)
    assert time.monotonic() - killed < 60
    assert codes == [-9 if rank == victim else 76 for rank in range(ranks)], said
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert f"rank {victim} ended without a word" in errors[0]
    assert "the same command continues" in errors[0]
    assert "Traceback" not in said
    newest = whole_steps(str(run))[0]
    again = start_ranks(words, ranks)
    assert f"step_{newest:07d} at {8 * newest:,} images" in until(again[0], "resumed").splitlines()[-1]
    again[victim].send_signal(signal.SIGTERM)
    codes, said = finish(again, timeout=120)
    assert codes == [75] * ranks, said
    assert whole_steps(str(run))[0] > newest


class Store:
    """What ranks share, without a network."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.values[key] for key in keys]


class CountingStore(Store):
    """Counts keys that are written, asked for and read."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = 0

    def set(self, key: str, value: str) -> None:
        self.keys += 1
        super().set(key, value)

    def check(self, keys: list[str]) -> bool:
        self.keys += len(keys)
        return super().check(keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.keys += len(keys)
        return super().multi_get(keys)


class Beats:
    """Ranks that send and read heartbeats in turn, three seconds of a clock that only the test moves."""

    def __init__(self, monkeypatch, store: Store, count: int) -> None:
        self.now = 0.0
        monkeypatch.setattr("trainer.watching.heartbeats.time.monotonic", lambda: self.now)
        self.ranks = [Heartbeats(store, rank, count) for rank in range(count)]
        self.rounds = 0

    def beat(self, rounds: int, *, without: tuple[int, ...] = (), failed: int | None = None) -> None:
        for _ in range(rounds):
            self.now += 3.0
            self.rounds += 1
            for number, rank in enumerate(self.ranks):
                if number not in without:
                    rank.read()
                    state = FAILED if number == failed else RUNNING
                    rank.send(self.rounds, step=1, phase="computing", done=1, state=state, waits=False)

    def find_troubled(self, by: int) -> list[int]:
        """Whom a rank takes for dead."""
        return sorted(rank for rank, s in self.ranks[by].statuses.items() if s.is_in_trouble(after_s=SURE_S))


def test_the_store_s_work_grows_with_the_ranks_and_not_with_their_square(monkeypatch):
    for count in (16, 1024):
        store = CountingStore()
        beats = Beats(monkeypatch, store, count)
        beats.beat(2)
        store.keys = 0
        beats.beat(5)
        assert store.keys <= 5 * 3 * count


def test_all_ranks_learn_from_rank_0_who_is_dead(monkeypatch):
    beats = Beats(monkeypatch, Store(), 8)
    beats.beat(3)
    assert all(beats.find_troubled(rank) == [] for rank in range(8))
    beats.beat(6, without=(5,))
    assert all(beats.find_troubled(rank) == [5] for rank in range(8) if rank != 5)
    beats.beat(2)  # it was stopped, and goes on
    assert all(beats.find_troubled(rank) == [] for rank in range(8))
    beats.beat(6, without=(5,))
    beats.beat(12, without=(0, 5))  # without rank 0 they look themselves
    assert all(beats.find_troubled(rank) == [0, 5] for rank in range(8) if rank not in (0, 5))
    beats.beat(2)
    assert all(beats.find_troubled(rank) == [] for rank in range(8))
    beats.beat(2, failed=3)
    assert all(beats.find_troubled(rank) == [3] for rank in range(8) if rank != 3)


def test_a_stuck_rank_is_named_and_all_write_their_stacks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trainer.watching.watchdog.BEAT_S", 0.1)
    store = Store()
    ranks = [Watchdog(Group(r, 2, torch.device("cpu")), str(tmp_path), stall_s=1.5, store=store) for r in range(2)]
    for rank in ranks:
        rank.begin("reading data", 7)
    ranks[0].begin("computing", 7)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("logs/stall_*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(0.5)
    for watch in ranks:
        watch.close()
    said = capsys.readouterr().err
    assert "no progress" in said
    assert "longest without progress: rank 1 at step 7: reading data;" in said
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [
        "stall_rank_00000_step_0000007.txt", "stall_rank_00001_step_0000007.txt",
    ]  # fmt: skip
    assert "test_a_stuck_rank" in (tmp_path / "logs" / "stall_rank_00001_step_0000007.txt").read_text()


@pytest.mark.slow
def test_a_stopped_rank_is_named_by_the_one_that_beats(data, tmp_path):
    """SIGSTOP: nothing of that process moves, its watch neither. Woken in time, it goes on as if nothing had been."""
    run = tmp_path / "run"
    more = ["--logging.save-every", "8", "--logging.keep", "1", "--logging.stall-s", "16"]
    processes = start_ranks(command(data, run, 80_000, *more), 2)
    while not (run / "checkpoints" / "latest").exists() and processes[0].poll() is None:
        time.sleep(0.5)
    for stopped, awake in ((1, 0), (0, 1)):  # rank 0 holds the store through which they beat
        time.sleep(6)  # they hear of each other
        processes[stopped].send_signal(signal.SIGSTOP)
        line = until(processes[awake], "without a sign of life").splitlines()[-1]
        processes[stopped].send_signal(signal.SIGCONT)
        assert f"without a sign of life: rank {stopped} at step" in line
        assert f"rank {awake} at" not in line
        assert 16 <= float(line.partition("no progress for ")[2].partition(" s;")[0]) < 25
        stacks = Path(line.rpartition(": ")[2]).read_text()
        assert "trainer/train.py" in stacks  # where the one that waits stands
    processes[0].send_signal(signal.SIGTERM)
    codes, rest = finish(processes)
    assert codes == [75, 75], rest


@pytest.mark.slow
def test_a_full_disk_in_a_save_leaves_the_run_alive(data, tmp_path):
    """No file may grow beyond 4 KiB for a while: saves and curves fail, then work again; training goes on."""
    run = tmp_path / "run"
    process = start_ranks(command(data, run, 512, "--logging.save-every", "64"), 1)[0]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**12, resource.RLIM_INFINITY))
    said = until(process, "was not saved")
    assert said.count("no curves for TensorBoard") == 1
    assert "Traceback" not in said
    assert not (run / "checkpoints" / "latest").exists()
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    codes, rest = finish([process])
    assert codes == [0], said + rest
    assert (run / "checkpoints" / "latest").read_text() == "step_0000064\n"
    assert list(losses(run)) == list(range(8, 513, 8))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "logs" / "tensorboard")).Reload().Scalars("train/loss")
    assert events[-1].step == 512


@pytest.mark.slow
def test_a_failing_s3_in_a_save_leaves_the_run_alive(data, s3, tmp_path, monkeypatch):
    wire = Wire(int(os.environ["AWS_ENDPOINT_URL"].rsplit(":", 1)[1]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{wire.port}")
    monkeypatch.setenv("BEELINE_S3_ATTEMPTS", "1")
    process = start_ranks(command(data, f"{s3}/run", 1024, "--logging.save-every", "64"), 1)[0]
    said = until(process, "saved step_")
    wire.break_it()
    said += until(process, "training goes on")
    wire.cut = False
    codes, rest = finish([process])
    assert codes == [0], said + rest
    assert storage.read_bytes(f"{s3}/run/checkpoints/latest") == b"step_0000128\n"


def test_a_rank_ends_well_though_gloo_holds_the_last_tensor_still():
    for _ in range(4):
        run_ranks([str(Path(__file__).with_name("trainer_starved_exit.py"))], 2)
