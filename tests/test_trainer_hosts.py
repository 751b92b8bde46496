"""Two hosts on one machine: two network namespaces joined by a cable (veth). The cable is cut while they train."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from trainer_launch import ROOT, TINY, finish, read_figure

pytestmark = [pytest.mark.slow, pytest.mark.dist]
NAMES = (f"bee{os.getpid()}a", f"bee{os.getpid()}b")
ADDRESSES = ("10.77.13.1", "10.77.13.2")
ALLOWED = os.geteuid() == 0 and shutil.which("ip") is not None


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces, each with one end of the cable, named `cable` inside."""
    one, two = NAMES
    for name in NAMES:
        ip(f"netns add {name}")
    try:
        ip(f"-n {one} link add cable type veth peer name cable netns {two}")
        for name, address in zip(NAMES, ADDRESSES):
            ip(f"-n {name} addr add {address}/24 dev cable")
            ip(f"-n {name} link set cable up")
            ip(f"-n {name} link set lo up")
        yield NAMES
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False)


def start(hosts: tuple[str, str], hostfile: Path, words: list[str]) -> list[subprocess.Popen[str]]:
    """The same command on both hosts, as an administrator without ssh types it."""
    found = []
    for number, name in enumerate(hosts):
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": "cable", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        launcher = [
            "deepspeed", "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(number),
            "--master_addr", ADDRESSES[0], "--master_port", "29511", "--module", "trainer",
        ]  # fmt: skip
        command = ["ip", "netns", "exec", name, *launcher, *words]
        found.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                start_new_session=True,
            )
        )  # fmt: skip
    return found


@pytest.mark.skipif(not ALLOWED, reason="needs root and the ip command (Debian's iproute2) to make network namespaces")
def test_two_hosts_train_lose_their_cable_and_resume(hosts, data, tmp_path):
    (tmp_path / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    run = tmp_path / "run"
    words = ["train", "world-d2", "--data", str(data), "--out", str(run), *TINY]
    words += [
        "--images",
        "2400",
        "--logging.log-every",
        "8",
        "--logging.save-every",
        "80",
        "--validation.every",
        "None",
    ]
    processes = start(hosts, tmp_path / "hosts", words)
    while not (run / "checkpoints" / "latest").exists():
        assert processes[0].poll() is None, finish(processes, timeout=10)[1]
        time.sleep(0.5)
    ip(f"-n {hosts[0]} link set cable down")
    codes, said = finish(processes, timeout=180)
    assert all(codes), said
    lost = [line for line in said.splitlines() if "ended without a word (killed, stopped or out of reach)" in line]
    assert {line.split("rank ")[1][0] for line in lost} == {"0", "1"}, said  # each side misses the other
    assert all("the same command continues from the last checkpoint" in line for line in lost)

    ip(f"-n {hosts[0]} link set cable up")
    codes, said = finish(start(hosts, tmp_path / "hosts", words), timeout=1200)
    assert codes == [0, 0], said
    assert "resumed" in said
    assert read_figure(run, "images_seen") == list(range(8, 2401, 8))
