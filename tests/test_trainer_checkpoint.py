"""The checkpoint format without DeepSpeed: any number of ranks, damage, a full disk, SIGKILL in the middle, S3."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainer_threads import run_threads

from infra import storage
from infra.errors import UnavailableError, UserError
from trainer.zero import checkpoint
from trainer.zero.group import Group
from trainer.zero.partition import Segment
from trainer.zero.rankfile import Ranges, copy_ranges, hash_file, write_rank_file

SOLO = Group(0, 1, torch.device("cpu"))
SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "b": (1,), "c": (4, 4)}


def full(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def partition(rank: int, world_size: int, values: dict[str, torch.Tensor]) -> tuple[tuple[Segment, ...], torch.Tensor]:
    """What ZeRO-3 gives a rank: equal ranges of each parameter, padded (here with nan, which must never be saved)."""
    found, pieces, offset = [], [], 0
    for name, value in values.items():
        share = -(-value.numel() // world_size)
        start = min(rank * share, value.numel())
        numel = min(share, value.numel() - start)
        pieces.append(torch.full((share,), float("nan")))
        pieces[-1][:numel] = value.view(-1)[start : start + numel]
        if numel:
            found.append(Segment(name, tuple(value.shape), start, numel, offset))
        offset += share
    return tuple(found), torch.cat(pieces)


def write_all(folder: str, world_size: int) -> None:
    for rank in range(world_size):
        segments, master = partition(rank, world_size, full(1))
        _, moment = partition(rank, world_size, full(2))
        write_rank_file(folder, rank, [segments], {"master": [master], "exp_avg": [moment]}, {"rank": rank})


@pytest.mark.parametrize(("saved", "loaded"), [(1, 1), (2, 2), (2, 1), (1, 2), (3, 2), (2, 3), (5, 4)])
def test_any_number_of_ranks_loads_what_any_number_saved(tmp_path, saved, loaded):
    write_all(str(tmp_path), saved)
    indexes = [json.loads((tmp_path / f"rank_{rank:05d}.json").read_text()) for rank in range(saved)]
    for rank in range(loaded):
        segments, master = partition(rank, loaded, full(1))
        _, moment = partition(rank, loaded, full(2))
        target = {"master": [torch.zeros_like(master)], "exp_avg": [torch.zeros_like(moment)]}
        copy_ranges(Ranges(str(tmp_path), indexes), [segments], target)
        for name, wanted in (("master", master), ("exp_avg", moment)):
            torch.testing.assert_close(target[name][0], wanted.nan_to_num(0.0), rtol=0, atol=0)


@pytest.mark.parametrize(("saved", "ranks", "objects"), [(8, 8, 3), (8, 4, 5), (2, 4, 3)])
def test_a_rank_reads_its_own_files_and_hears_of_the_others(tmp_path, monkeypatch, saved, ranks, objects):
    folder = tmp_path / "step_0000001"
    write_all(str(folder), saved)
    files = [
        {name: hash_file(str(folder / name)) for name in (f"rank_{rank:05d}.safetensors", f"rank_{rank:05d}.json")}
        for rank in range(saved)
    ]
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": 1, "state": {}, "files": files}))
    read_bytes, read = storage.read_bytes, {rank: set() for rank in range(ranks)}

    def watched(uri, *where):
        rank = threading.current_thread().name
        if rank.isdigit():
            read[int(rank)].add(uri)
        return read_bytes(uri, *where)

    monkeypatch.setattr(storage, "read_bytes", watched)
    found = run_threads(ranks, lambda group: checkpoint.inspect(str(folder), group)[0])
    assert max(len(uris) for uris in read.values()) == objects
    assert all(whole.extras == [{"rank": number} for number in range(saved)] for whole in found)
    monkeypatch.undo()
    segments, master = partition(0, 1, full(1))
    target = torch.zeros_like(master)
    copy_ranges(Ranges(str(folder), found[0].indexes), [segments], {"master": [target]})
    torch.testing.assert_close(target, master.nan_to_num(0.0), rtol=0, atol=0)


def test_rank_files_are_plain_safetensors_without_padding(tmp_path):
    write_all(str(tmp_path), 2)
    found = load_file(tmp_path / "rank_00001.safetensors")
    rows = json.loads((tmp_path / "rank_00001.json").read_text())["segments"]
    assert found["master"].numel() == sum(numel for *_, numel in rows)
    assert torch.isfinite(found["master"]).all()


def share(seed: int, numel: int = 1000) -> checkpoint.RankShare:
    value = torch.full((numel,), float(seed))
    return checkpoint.RankShare([(Segment("w", (numel,), 0, numel, 0),)], {"master": [value]}, {"seed": seed})


def loaded(found: checkpoint.StoredCheckpoint) -> float:
    target = share(-1)
    checkpoint.load(found, target, SOLO)
    assert (target.tensors["master"][0] == target.tensors["master"][0][0]).all()
    return target.tensors["master"][0][0].item()


def test_retention_and_latest(tmp_path):
    root = str(tmp_path)
    for step in (10, 20, 30, 40):
        assert checkpoint.save(root, share(step), SOLO, step=step, state={"n": step}, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_0000030", "step_0000040"]
    assert (tmp_path / "latest").read_text() == "step_0000040\n"
    found = checkpoint.find_newest(root, SOLO)
    assert (found.step, found.state, found.extras) == (40, {"n": 40}, [{"seed": 40}])
    assert loaded(found) == 40


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "rank_00000.safetensors"),
        lambda folder: (folder / "rank_00000.safetensors").write_bytes(b"short"),
        lambda folder: (folder / "rank_00000.json").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text('{"format": 9}'),
    ],
)
def test_a_damaged_newest_checkpoint_falls_back_with_a_line(tmp_path, capsys, damage):
    for step in (1, 2):
        checkpoint.save(str(tmp_path), share(step), SOLO, step=step, state={}, keep=3)
    damage(tmp_path / "step_0000002")
    found = checkpoint.find_newest(str(tmp_path), SOLO)
    assert found.step == 1
    told = capsys.readouterr().err
    assert "step_0000002 is damaged" in told
    assert "falling back" in told
    # The run passes step 2 again: the damaged one is replaced.
    assert checkpoint.save(str(tmp_path), share(5), SOLO, step=2, state={}, keep=3)
    assert loaded(checkpoint.find_newest(str(tmp_path), SOLO)) == 5


def test_nothing_good_left_is_said_and_nothing_there_is_none(tmp_path):
    assert checkpoint.find_newest(str(tmp_path / "none"), SOLO) is None
    checkpoint.save(str(tmp_path), share(1), SOLO, step=1, state={}, keep=3)
    flip(tmp_path / "step_0000001" / "rank_00000.safetensors")
    with pytest.raises(UserError, match="all 1 checkpoints are damaged"):
        checkpoint.find_newest(str(tmp_path), SOLO)


def test_another_architecture_is_refused_by_name(tmp_path):
    checkpoint.save(str(tmp_path), share(1), SOLO, step=1, state={}, keep=3)
    with pytest.raises(UserError, match=r"parameter w has shape \(1000,\).*\(900,\).*another architecture"):
        checkpoint.load(checkpoint.find_newest(str(tmp_path), SOLO), share(0, 900), SOLO)


CHILD = """
import os, resource, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_trainer_checkpoint import SOLO, share
from trainer.zero import checkpoint
root, what = sys.argv[1:]
assert checkpoint.save(root, share(1), SOLO, step=1, state={{}}, keep=3)
if what == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    print("saved", checkpoint.save(root, share(2), SOLO, step=2, state={{}}, keep=3))
else:
    def stopping(*args, **kwargs):
        print("now", flush=True)
        signal.pause()
    if what == "fsync":
        os.fsync = stopping
    else:
        Path.replace = stopping
    checkpoint.save(root, share(2), SOLO, step=2, state={{}}, keep=3)
"""


def child(root: Path, what: str) -> subprocess.Popen[str]:
    code = textwrap.dedent(CHILD).format(tests=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", code, str(root), what], stdout=subprocess.PIPE, text=True)


@pytest.mark.dist
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_sigkill_in_the_middle_of_a_save_leaves_the_last_good_one(tmp_path, where):
    process = child(tmp_path, where)
    assert process.stdout.readline() == "now\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "step_0000002").exists()
    found = checkpoint.find_newest(str(tmp_path), SOLO)
    assert (found.step, loaded(found)) == (1, 1)
    checkpoint.save(str(tmp_path), share(3), SOLO, step=3, state={}, keep=3)
    assert not (tmp_path / "step_0000002").exists()  # what the killed save left is gone


@pytest.mark.dist
def test_a_full_disk_leaves_the_last_good_one_and_the_run_alive(tmp_path):
    process = child(tmp_path, "full")
    assert process.communicate(timeout=120)[0] == "saved False\n"
    assert process.returncode == 0
    assert not (tmp_path / "step_0000002").exists()
    assert loaded(checkpoint.find_newest(str(tmp_path), SOLO)) == 1


def test_checkpoints_live_on_s3_too(s3):
    for step in (1, 2):
        assert checkpoint.save(f"{s3}/checkpoints", share(step), SOLO, step=step, state={}, keep=1)
    names = [uri.removeprefix(s3) for uri in storage.list_files(s3)]
    assert names == [
        "/checkpoints/latest",
        "/checkpoints/step_0000002/manifest.json",
        "/checkpoints/step_0000002/rank_00000.json",
        "/checkpoints/step_0000002/rank_00000.safetensors",
    ]
    assert loaded(checkpoint.find_newest(f"{s3}/checkpoints", SOLO)) == 2


def test_an_outage_is_no_damage(s3, free_port, monkeypatch):
    """The run must neither fall back to an older checkpoint nor call all of them damaged."""
    root = f"{s3}/checkpoints"
    for step in (1, 2):
        assert checkpoint.save(root, share(step), SOLO, step=step, state={}, keep=2)
    found = checkpoint.find_newest(root, SOLO)
    answers = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    said = run_threads(2, lambda group: raised(lambda: checkpoint.inspect(found.uri, group)))
    said += [raised(lambda: checkpoint.load(found, share(0), SOLO))]
    assert all("does not answer" in line for line in said), said
    monkeypatch.setenv("AWS_ENDPOINT_URL", answers)
    assert loaded(checkpoint.find_newest(root, SOLO)) == 2


def raised(call: Callable[[], object]) -> str:
    with pytest.raises(UnavailableError) as caught:
        call()
    return str(caught.value)


def test_the_manifest_is_written_last_and_latest_follows(tmp_path):
    checkpoint.save(str(tmp_path), share(1), SOLO, step=1, state={}, keep=1)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "step_0000001").iterdir()}
    assert max(times, key=times.__getitem__) == "manifest.json"
    assert (tmp_path / "latest").stat().st_mtime_ns >= times["manifest.json"]
