"""What breaks outside (endpoint, keys, bucket, disk) ends in one clear line, in bounded time, and spoils nothing."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from infra import storage
from infra.errors import DISK_FULL, MissingError, UnavailableError, UserError, UserErrors, nearest, run_cli

SECRET = "hunter2-do-not-print"
ONE_CALL = """
import sys
from infra import storage
from infra.errors import run_cli
run_cli(lambda: print(storage.read_bytes(sys.argv[1])))
"""


def refusal(uri: str, *, code: int = 69) -> str:
    """The one line that a command line tool prints about this URI, having exited with this code."""
    done = subprocess.run([sys.executable, "-c", ONE_CALL, uri], capture_output=True, text=True, timeout=180)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert SECRET not in done.stderr
    return done.stderr


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


@pytest.mark.usefixtures("secret")
@pytest.mark.timeout(180)
def test_endpoint_that_refuses(free_port, monkeypatch):
    port = free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{SECRET}@127.0.0.1:{port}")
    line = refusal("s3://bucket/x")
    assert f"s3://bucket/x: http://127.0.0.1:{port} does not answer" in line
    assert "check AWS_ENDPOINT_URL" in line


@pytest.mark.usefixtures("secret")
@pytest.mark.timeout(180)
def test_endpoint_that_accepts_and_never_answers(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("BEELINE_S3_PROBE_TIMEOUT", "1")
        assert "does not answer" in refusal("s3://bucket/x")


@pytest.mark.usefixtures("secret")
def test_missing_bucket_and_wrong_credentials(free_calls):
    assert "no bucket 'never-made'" in refusal("s3://never-made/x", code=2)
    free_calls(0)
    line = refusal("s3://beeline-tests/x")
    assert "takes these AWS credentials no longer, or never did (InvalidAccessKeyId): renew them" in line


def test_no_credentials_at_all(s3_server, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="no S3 credentials: set AWS_ACCESS_KEY_ID"):
        storage.read_bytes("s3://beeline-tests/x")


def test_settings_that_make_no_sense(monkeypatch):
    monkeypatch.setenv("BEELINE_S3_PROBE_TIMEOUT", "soon")
    with pytest.raises(UserError, match="BEELINE_S3_PROBE_TIMEOUT='soon' is not a number"):
        storage.exists("s3://beeline-tests-other/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"minio:{SECRET}")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL is not an address") as caught:
        storage.exists("s3://b/x")
    assert SECRET not in str(caught.value)


class Wire:
    """A TCP proxy in front of the server that can be cut and mended, as networks are; nothing passes while `flows` is
    cleared."""

    def __init__(self, target: int) -> None:
        self.target, self.cut, self.pairs = target, False, []
        self.flows = threading.Event()
        self.flows.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            if self.cut:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self.target))
            self.pairs += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self.pump, args=(source, sink), daemon=True).start()

    def pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self.flows.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def break_it(self) -> None:
        self.cut = True
        for end in self.pairs:
            end.close()
        self.pairs.clear()


@pytest.fixture
def wire(s3_server, monkeypatch):
    wire = Wire(int(s3_server.rsplit(":", 1)[1]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{wire.port}")
    yield wire
    wire.listener.close()


def test_a_short_outage_is_ridden_out(wire, s3):
    storage.write_bytes(f"{s3}/x", b"1" * 1000)
    wire.break_it()
    threading.Timer(0.7, lambda: setattr(wire, "cut", False)).start()
    assert storage.read_bytes(f"{s3}/x") == b"1" * 1000


@pytest.mark.timeout(180)
def test_a_long_outage_says_so(wire, s3, monkeypatch):
    monkeypatch.setenv("BEELINE_S3_ATTEMPTS", "2")
    storage.write_bytes(f"{s3}/x", b"1")
    wire.break_it()
    with pytest.raises(UnavailableError, match=f"{s3}/x.*does not answer"):
        storage.read_bytes(f"{s3}/x")
    with pytest.raises(UnavailableError):
        storage.write_bytes(f"{s3}/x", b"2")
    wire.cut = False
    assert storage.read_bytes(f"{s3}/x") == b"1"


FULL = """
import resource, sys
from infra import storage
from infra.errors import run_cli
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
run_cli(lambda: storage.write_bytes(sys.argv[1], b"x" * 2_000_000))
"""


def write_too_much(uri: str, how: str) -> str:
    done = subprocess.run([sys.executable, "-c", FULL, uri, how], capture_output=True, text=True, timeout=180)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_disk_full_by_limit(tmp_path):
    uri = f"{tmp_path}/out/big.bin"
    line = write_too_much(uri, "limit")
    assert f"{uri}: disk full: 2,000,000 bytes did not fit" in line
    assert os.listdir(tmp_path / "out") == []


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_disk_full_for_real(small_disk):
    storage.write_bytes(f"{small_disk}/kept.bin", b"k" * 1000)
    assert "disk full" in write_too_much(f"{small_disk}/big.bin", "really")
    assert "disk full" in write_too_much(f"{small_disk}/kept.bin", "really")
    assert storage.list_files(str(small_disk)) == [f"{small_disk}/kept.bin"]
    assert os.listdir(small_disk) == ["kept.bin"]
    assert storage.read_bytes(f"{small_disk}/kept.bin") == b"k" * 1000


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="a folder and a file stand in each other's way"):
        storage.write_bytes(f"{tmp_path}/file/inside.bin", b"x")
    with pytest.raises(UserError, match="in each other's way"):
        storage.read_bytes(str(tmp_path))


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (UserError("found 3,\n expected 4: add one"), 2, "error: found 3, expected 4: add one\n"),
        (UserErrors(["one\n of them", "another"]), 2, "error: one of them\nerror: another\n"),
        (UnavailableError("no answer: try again"), 69, "error: no answer: try again\n"),
        (UserErrors(["no answer", "another"], may_pass=True), 69, "error: no answer\nerror: another\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; the same command continues where it stopped\n"),
        (OSError(DISK_FULL[0], "No space left", "/x/y"), 2, "error: disk full while writing /x/y: "),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "error: /x/y: Permission denied; BEELINE_LOG=debug"),
    ],
)
def test_run_cli_ends_with_one_line(error, code, line, capsys):
    def main() -> None:
        if error:
            raise error

    with pytest.raises(SystemExit) as caught:
        run_cli(main)
    assert caught.value.code == code
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert printed.count("\n") == max(line.count("\n"), 1 if line else 0)


def test_a_bug_keeps_its_traceback():
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_cli(main)


def test_nearest_and_kinds():
    assert nearest("wrold-d4", ["world-d4", "mmdit-d15"]) == " (did you mean 'world-d4'?)"
    assert nearest("zzz", ["world-d4"]) == ""
    assert str(MissingError("x: no such file")) == "x: no such file"
    assert isinstance(MissingError("x"), FileNotFoundError)


def test_debugging_keeps_the_traceback_of_a_file_error(monkeypatch):
    monkeypatch.setenv("BEELINE_LOG", "debug")

    def main() -> None:
        Path("/nowhere/at/all").read_bytes()

    with pytest.raises(FileNotFoundError):
        run_cli(main)
