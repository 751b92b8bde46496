"""Checkpoints that travel to S3 behind the training: through a wire that can be held and cut, with real ranks."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from test_infra_faults import Wire
from trainer_launch import TINY, finish, start_ranks, until

from infra import storage
from trainer.zero import checkpoint
from trainer.zero.group import Group
from trainer.zero.uploads import Uploads, get_staging_folder

pytestmark = pytest.mark.dist
SOLO = Group(0, 1, torch.device("cpu"))


@pytest.fixture
def wire(s3_server):
    wire = Wire(int(s3_server.rsplit(":", 1)[1]))
    yield wire
    wire.listener.close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BEELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Pair:
    """Two ranks in one process, joined by a real store; each rank stages one file."""

    def __init__(self, out: str) -> None:
        store = torch.distributed.HashStore()
        self.out, self.published = out, 0
        self.ranks = [Uploads(Group(r, 2, torch.device("cpu")), out, store=store) for r in range(2)]

    def start(self, content: bytes) -> None:
        for rank, uploads in enumerate(self.ranks):
            path = Path(uploads.place) / "checkpoints" / "step_1" / f"rank_{rank}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            uploads.start([], self.publish)

    def publish(self) -> None:
        here = [storage.read_bytes(f"{self.out}/checkpoints/step_1/rank_{rank}") for rank in range(2)]
        assert here[0] == here[1], "published before all files were there"
        self.published += 1


def test_all_ranks_agree_before_anything_is_published(s3, monkeypatch):
    pair = Pair(s3)
    pair.start(b"one")
    assert [rank.wait() for rank in pair.ranks] == [True, True]
    assert pair.published == 1
    put = storage.upload

    def only_rank_0(path: Path, uri: str) -> None:
        if "rank_1" in uri:
            time.sleep(0.5)  # rank 0 is through long before
            raise OSError("rank 1 cannot")
        put(path, uri)

    monkeypatch.setattr(storage, "upload", only_rank_0)
    pair.start(b"two")
    assert [rank.wait() for rank in pair.ranks] == [False, False]
    assert pair.published == 1
    monkeypatch.undo()
    pair.start(b"three")
    assert [rank.wait() for rank in pair.ranks] == [True, True]
    assert pair.published == 2
    for rank in pair.ranks:
        rank.close()
        assert not Path(rank.place).exists()


def test_a_local_run_folder_needs_no_journey(tmp_path):
    uploads = Uploads(SOLO, str(tmp_path))
    assert (uploads.place, uploads.remote, uploads.busy) == (str(tmp_path), False, False)
    uploads.close()
    assert tmp_path.exists()


# --- real ranks


def train(data: Path, run: str, images: int, *wires: Wire) -> list[subprocess.Popen[str]]:
    """Each rank reaches S3 through its own wire and waits long for an answer."""
    words = ["-m", "trainer", "train", "world-d2", "--data", str(data), "--out", run, "--images", str(images)]
    cadence = ["--logging.log-every", "8", "--logging.save-every", "64", "--validation.every", "None"]
    patient = {"BEELINE_S3_READ_TIMEOUT": "600", "BEELINE_S3_ATTEMPTS": "1"}
    own = {r: {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{wire.port}", **patient} for r, wire in enumerate(wires)}
    return start_ranks([*words, *TINY, *cadence], len(wires), of_rank=own)


def latest(run: str) -> str:
    return storage.read_bytes(f"{run}/checkpoints/latest").decode().strip()


def whole_steps(run: str) -> list[int]:
    """Of the checkpoints whose every file has its hash."""
    folders = checkpoint.list_checkpoints(f"{run}/checkpoints")
    return [found.step for found, _ in (checkpoint.inspect(folder, SOLO) for folder in folders) if found]


def test_training_goes_on_while_a_checkpoint_travels_and_sigterm_waits_for_it(data, s3, wire):
    run = f"{s3}/run"
    processes = train(data, run, 80_000, wire, wire)
    said = until(processes[0], "saved step_")
    wire.flows.clear()
    first = latest(run)
    said += until(processes[0], "still travels")  # the loop has reached the next save already
    assert latest(run) == first
    processes[1].send_signal(signal.SIGTERM)
    time.sleep(5)
    assert [process.poll() for process in processes] == [None, None]  # it waits, and beats
    wire.flows.set()
    codes, rest = finish(processes)
    assert codes == [75, 75], said + rest
    assert "stopped by signal" in rest
    last = int(latest(run).removeprefix("step_"))
    assert last == whole_steps(run)[0] > int(first.removeprefix("step_"))
    manifest = json.loads(storage.read_bytes(f"{run}/checkpoints/{latest(run)}/manifest.json"))
    assert manifest["state"]["images_seen"] == 8 * last
    assert storage.exists(f"{run}/weights/ema.safetensors")
    assert not any(get_staging_folder(run, rank).exists() for rank in range(2))


@pytest.mark.slow
def test_sigkill_while_a_checkpoint_travels_leaves_the_one_before(data, s3, wire):
    run = f"{s3}/run"
    processes = train(data, run, 80_000, wire, wire)
    until(processes[0], "saved step_")
    wire.flows.clear()
    until(processes[0], "still travels")
    for process in processes:
        process.kill()
    finish(processes)
    assert whole_steps(run)[0] == int(latest(run).removeprefix("step_"))
    stopped = 8 * whole_steps(run)[0]
    assert any(get_staging_folder(run, rank).exists() for rank in range(2))
    wire.flows.set()
    again = train(data, run, 80_000, wire, wire)
    said = until(again[0], "saved step_")
    assert f"at {stopped:,} images" in next(line for line in said.splitlines() if "resumed" in line)
    again[0].send_signal(signal.SIGTERM)
    codes, rest = finish(again)
    assert codes == [75, 75], said + rest
    assert not any(get_staging_folder(run, rank).exists() for rank in range(2))


@pytest.mark.slow
def test_a_rank_that_cannot_reach_s3_keeps_a_checkpoint_from_being_published(data, s3, s3_server, wire):
    own = Wire(int(s3_server.rsplit(":", 1)[1]))
    run = f"{s3}/run"
    processes = train(data, run, 80_000, wire, own)
    said = until(processes[0], "saved step_")
    own.break_it()
    before = latest(run)
    said += until(processes[0], "training goes on")
    assert "does not answer" in said
    assert "was not saved" in said
    own.cut = False
    said += until(processes[0], "saved step_")
    assert int(latest(run).removeprefix("step_")) == whole_steps(run)[0] > int(before.removeprefix("step_"))
    processes[0].send_signal(signal.SIGTERM)
    codes, rest = finish(processes)
    assert codes == [75, 75], said + rest
