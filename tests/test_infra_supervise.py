"""`python -m infra supervise`: whom it signals, how long it stays, and what it makes of the ranks' ends."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import outcome
from infra.errors import UnavailableError, UserError
from infra.launch.job import Job, write_command, write_supervised
from infra.launch.supervise import Supervised, list_environments

ROOT = Path(__file__).parent.parent
# A rank that saves when it is told to, and reports as the trainer does.
RANK = """
import os, signal, sys, time
from infra.outcome import report_code, report_saved
def save(number, frame):
    time.sleep(0.5)
    open(f"{sys.argv[1]}/saved{os.environ['RANK']}", "w").close()
    report_code(75)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
open(f"{sys.argv[1]}/ready{os.environ['RANK']}", "w").write(" ".join(
    os.environ.get(name, "-") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE")))
while True:
    time.sleep(0.05)
"""


def start(*words: str, **environment: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "MASTER_PORT")}
    return subprocess.Popen(
        [sys.executable, "-m", "infra", "supervise", *words], env={**clean, "PYTHONPATH": str(ROOT), **environment},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for(*paths: Path) -> None:
    while not all(path.exists() for path in paths):
        time.sleep(0.05)


@pytest.mark.timeout(60)
def test_sigterm_reaches_every_rank_and_waits_for_all(tmp_path):
    words = ("--ranks", "2", "--nodes", "3", "--", sys.executable, "-c", RANK, str(tmp_path))
    process = start(*words, BEELINE_NODE_RANK="1")
    wait_for(tmp_path / "ready2", tmp_path / "ready3")
    process.terminate()
    assert process.wait() == 75, process.communicate()[0]
    assert {path.name for path in tmp_path.glob("saved*")} == {"saved2", "saved3"}
    assert (tmp_path / "ready3").read_text() == "3 1 6 2"


@pytest.mark.timeout(60)
def test_a_launcher_that_dies_of_sigterm_does_not_hear_it(tmp_path):
    """`deepspeed` ends at once when it is told; here its ranks are told, and outlive it even so."""
    launcher = tmp_path / "deepspeed"
    launcher.write_text(
        f'#!/usr/bin/env bash\nfor r in 0 1; do RANK=$r LOCAL_RANK=$r {sys.executable} -c "$2" "$1" & done\n'
        'while [ ! -e "$1/ready0" ] || [ ! -e "$1/ready1" ]; do sleep 0.05; done; [ "$3" = stay ] && wait; exit 0\n'
    )
    launcher.chmod(0o755)
    for how in ("stay", "leave"):
        (folder := tmp_path / how).mkdir()
        process = start("--", str(launcher), str(folder), RANK, how)
        wait_for(folder / "ready0", folder / "ready1")
        process.terminate()
        assert process.wait() == 75, process.communicate()[0]
        assert len(list(folder.glob("saved*"))) == 2


@pytest.mark.timeout(60)
def test_a_rank_that_waits_in_vain_for_a_lost_one_is_ended(tmp_path):
    code = "from infra.launch import supervise as s; import sys; s.PATIENCE_S = s.KILL_S = 0.5\n"
    code += "sys.exit(s.supervise(sys.argv[1:], ranks=2))"
    rank = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.environ["RANK"] == "0":
    open(sys.argv[1], "w").close()
while not os.path.exists(sys.argv[1]):
    time.sleep(0.02)
os.environ["RANK"] == "1" and os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""
    words = [sys.executable, "-c", code, sys.executable, "-c", rank, str(tmp_path / "ignores")]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 137


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("command", "code"), [("exit 7", 7), ("kill -KILL $$", 137), ("exit 0", 0)])
def test_any_command_keeps_its_exit_code(command, code):
    process = start("--", "bash", "-c", command)
    assert process.wait() == code, process.communicate()[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--", "no-such-program-here"), "is it installed and on PATH"),
        (("--ranks", "2"), "write it after '--'"),
        (("--ranks", "0", "--", "true"), "at least 1 of each"),
    ],
)
def test_mistakes_are_one_line(words, message):
    said = start(*words).communicate()[0]
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


def test_ranks_that_cannot_all_start_leave_none_behind(tmp_path):
    """The second one's environment is too large for the kernel (E2BIG), which is no mistake of the command."""
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(UnavailableError, match=r"cannot run .* has this machine run out"):
        Supervised(command, [{"RANK": "0"}, {"RANK": "1", "LARGE": "x" * 2**18}])
    assert not [child for child in psutil.Process().children() if child.cmdline() == command]
    (foreign := tmp_path / "foreign").write_bytes(b"\x7fno program")
    foreign.chmod(0o755)
    with pytest.raises(UserError, match="is it installed"):
        Supervised([str(foreign)], [{"RANK": "0"}])


RESTARTED = """
import os, signal, sys, time
from infra.outcome import FOLDER, report_code
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
    report_code(0)
    sys.exit()
if os.environ["RANK"] == "0":
    report_code(76)
    time.sleep(600)
while not os.path.exists(os.path.join(os.environ[FOLDER], "76")):
    time.sleep(0.02)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.timeout(120)
def test_ranks_that_torchrun_has_started_again_count_by_their_last_life(tmp_path):
    (script := tmp_path / "rank.py").write_text(RESTARTED)
    options = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    process = start("--", str(Path(sys.executable).parent / "torchrun"), *options, str(script))
    said = process.communicate()[0]
    assert "Signal 9" in said or "exitcode: -9" in said, said
    assert process.returncode == 0, said


def test_signals_before_a_rank_could_react_count_as_stopped(tmp_path):
    process = start("--ranks", "1", "--", "bash", "-c", f"touch {tmp_path}/ready; exec sleep 600")
    wait_for(tmp_path / "ready")
    process.terminate()
    assert process.wait() == outcome.PREEMPTED


codes = st.sampled_from([0, 1, 2, 69, 75, 76, 130, 137, 143])


@given(reported=st.lists(codes), ended=st.lists(codes, min_size=1), stopped=st.booleans())
def test_what_came_of_a_job_is_what_came_of_its_ranks(reported, ended, stopped):
    found = outcome.judge(reported, ended, stopped=stopped)
    everything = {*reported, *ended}
    assert (found == 2) == (2 in everything)
    again = {76, 69} & everything and 0 not in reported  # a launcher ends with 0, but no rank says that it finished
    assert (found == 0) == (set(ended) == {0} and not everything & {2, 75} and not again)
    if 137 in ended and 76 in reported and not everything & {2, 75}:
        assert found == 76  # the killed rank does not hide that the others continue
    assert found in everything | ({75} if stopped else set())


def test_a_rank_leaves_its_code_whatever_ends_it(tmp_path, monkeypatch):
    monkeypatch.setenv(outcome.FOLDER, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    ends = [(SystemExit(75), 75), (SystemExit(), 0), (SystemExit("words"), 1), (RuntimeError("x"), 1)]
    for error, code in ends:
        with pytest.raises(type(error)), outcome.report_outcome():
            raise error
        assert outcome.read_codes(str(tmp_path)) == {code}
        assert (tmp_path / str(code)).read_text() == "3\n"
        (tmp_path / str(code)).unlink()
    outcome.report_saved(7)
    assert ((tmp_path / "saved").read_text(), outcome.read_codes(str(tmp_path))) == ("7\n", set())
    monkeypatch.setenv(outcome.FOLDER, str(tmp_path / "gone"))
    outcome.report_code(0)  # a folder that is gone changes nothing


def test_ranks_get_what_launchers_give(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "BEELINE_NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    first, second = list_environments(2, 1)
    assert first.pop("MASTER_PORT") == second.pop("MASTER_PORT")
    sizes = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    assert first == {"RANK": "0", "LOCAL_RANK": "0", **sizes}
    assert second == {"RANK": "1", "LOCAL_RANK": "1", **sizes}


def test_who_starts_the_ranks():
    train = ("train", "world-d2", "--out", "a b")
    plain = Job(name="x", command=("python", "-m", "trainer", *train), nodes=2, gpus_per_node=8)
    assert write_command(plain) == (
        "python -m infra supervise --ranks 8 --nodes 2 -- python -m trainer train world-d2 --out 'a b'"
    )
    assert write_supervised(plain) == write_command(plain)
    deepspeed = Job(name="x", command=("deepspeed", "--module", "trainer", *train), nodes=2)
    assert write_supervised(deepspeed).startswith("python -m infra supervise -- deepspeed --hostfile ")
    assert not Job(name="x", command=("python", "-m", "trainer", "ladder", "world"), nodes=2).on_every_node
    assert Job(name="x", command=("python", "own.py"), nodes=2, ranks_per_node=4).is_ranks


@pytest.mark.dist
@pytest.mark.timeout(240)
def test_the_doctor_as_ranks_measures_their_exchange(tmp_path):
    process = start("--ranks", "2", "--", sys.executable, "-m", "infra", "doctor", "--folder", str(tmp_path))
    said = process.communicate()[0]
    found = re.findall(r"ok +(all-\w+) +2 ranks over gloo, 16 MiB: ([\d.e+]+) ms, ([\d.e+]+) GB/s", said)
    assert [name for name, *_ in found] == ["all-reduce", "all-gather"], said  # one rank speaks
    size = 16 * 2**20 / 1e6
    for (_, took, bandwidth), share in zip(found, (1.0, 0.5)):  # 2 (n - 1) / n and (n - 1) / n of the bytes
        assert float(bandwidth) == pytest.approx(share * size / float(took), rel=0.02)
