"""Local folders and a real S3 server keep the same promises: atomic, write once, the same names, the same errors."""

import multiprocessing
import subprocess
import sys
import tarfile

import pytest

from infra import storage
from infra.errors import MissingError, UserError
from infra.s3 import get_filesystem, list_objects, make_bucket

WRITER = """
import sys
from infra import storage
for turn in range(10_000):
    storage.write_bytes(sys.argv[1], (b"a" if turn % 2 else b"b") * 1_000_000)
"""

CLAIMER = """
import sys
from infra import storage
sys.stdin.readline()
for number in range(15):
    if storage.write_bytes_if_absent(f"{sys.argv[1]}/{number}", sys.argv[2].encode() * 50_000):
        print(number)
"""


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return str(tmp_path / "data") if request.param == "local" else request.getfixturevalue("s3")


def test_round_trip_ranges_and_replacement(root):
    uri = storage.join(root, "a", "b.bin")
    assert not storage.exists(uri)
    assert not storage.exists(root)
    storage.write_bytes(uri, b"0123456789")
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_bytes(uri, 3, 4) == b"3456"
    assert storage.read_bytes(uri, 7) == b"789"
    assert storage.read_bytes(uri, length=2) == b"01"
    assert storage.read_bytes(uri, 8, 100) == b"89"
    assert storage.read_bytes(uri, 50, 3) == b""
    assert storage.read_bytes(uri, 2, 0) == b""
    assert storage.get_size(uri) == 10
    assert storage.exists(uri)
    assert storage.exists(root)
    storage.write_bytes(uri, b"")
    assert storage.read_bytes(uri) == b""
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)


def test_a_file_is_uploaded_as_it_is(root, tmp_path, monkeypatch):
    """Also in several parts; S3 takes no part below 5 MiB but the last."""
    monkeypatch.setattr(storage, "UPLOAD_PART", 5 * 2**20)
    for numel in (0, 10, 12 * 2**20 + 1):
        data = bytes(range(256)) * (numel // 256) + b"x" * (numel % 256)
        (tmp_path / "file").write_bytes(data)
        storage.upload(tmp_path / "file", storage.join(root, "a", "b.bin"))
        assert storage.read_bytes(storage.join(root, "a", "b.bin")) == data
    assert storage.list_files(root) == [storage.join(root, "a", "b.bin")]


def test_missing_things_are_named(root):
    uri = storage.join(root, "nothing.bin")
    for look in (storage.read_bytes, storage.get_size, storage.localize, storage.open_read):
        with pytest.raises(MissingError) as caught:
            look(uri)
        assert uri in str(caught.value)
        assert isinstance(caught.value, UserError | FileNotFoundError)


def test_names_with_spaces_unicode_and_signs(root):
    names = ["a b/c d.txt", "caf\u00e9/\u4e2d\u6587 \U0001f41d.txt", "100%/%41+&?x=1#y.txt", "'quoted' [1]*{2}~!.txt"]
    for name in names:
        storage.write_bytes(storage.join(root, name), name.encode())
    found = storage.list_files(root)
    assert found == sorted(storage.join(root, name) for name in names)
    assert [storage.read_bytes(uri).decode() for uri in found] == [uri.removeprefix(root + "/") for uri in found]
    with storage.open_read(found[0]) as stream:
        assert stream.read().decode() == found[0].removeprefix(root + "/")


def test_listing(root):
    for name in ("x/1.tar", "x/2.tar", "x/2.json", "x/deep/3.tar", "xy/4.tar"):
        storage.write_bytes(storage.join(root, name), b"1")
    folder = storage.join(root, "x")

    def listed(uri, **how):
        return [found.removeprefix(root + "/") for found in storage.list_files(uri, **how)]

    assert listed(folder) == ["x/1.tar", "x/2.json", "x/2.tar", "x/deep/3.tar"]  # and nothing of "xy"
    assert listed(folder + "/", suffix=".tar", recursive=False) == ["x/1.tar", "x/2.tar"]
    assert listed(storage.join(folder, "1.tar")) == ["x/1.tar"]
    assert listed(storage.join(root, "absent")) == []


def test_more_objects_than_one_page(s3, monkeypatch):
    for number in range(12):
        storage.write_bytes(f"{s3}/{number:02d}", b"")
    fs, bucket, key = get_filesystem(), *s3.removeprefix("s3://").split("/")
    pages = list_objects(fs, bucket, key, page_size=5)
    assert [item["Key"][-2:] for item in pages] == [f"{number:02d}" for number in range(12)]


def test_a_reader_never_sees_a_partial_file(root):
    uri = storage.join(root, "flipping.bin")
    storage.write_bytes(uri, b"a" * 1_000_000)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, uri])
    try:
        seen = set()
        for _ in range(40 if storage.is_remote(root) else 600):
            data = storage.read_bytes(uri)
            assert len(data) == 1_000_000
            assert data.count(data[:1]) == len(data)
            seen.add(data[:1])
            assert storage.list_files(root) == [uri]
        while len(seen) < 2:  # the writer was really at work meanwhile
            seen.add(storage.read_bytes(uri, 0, 1))
    finally:
        writer.kill()
        writer.wait()


@pytest.fixture
def serial_s3(free_port, monkeypatch):
    """A server that answers one request at a time: moto's own threads do not make its conditional put atomic."""
    from conftest import start_server

    port = free_port()
    code = (
        "from moto.server import DomainDispatcherApplication as App, create_backend_app as make\n"
        "from werkzeug.serving import run_simple\n"
        f"run_simple('127.0.0.1', {port}, App(make), threaded=False)"
    )
    server = start_server([sys.executable, "-c", code], port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    make_bucket("s3://race")
    yield "s3://race/claims"
    server.terminate()
    server.wait(timeout=20)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_of_several_writers_exactly_one_wins(place, request, tmp_path):
    root = str(tmp_path) if place == "local" else request.getfixturevalue("serial_s3")
    names = "pqr"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMER, root, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in names
    ]
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    wins = [[int(line) for line in racer.communicate(timeout=180)[0].split()] for racer in racers]
    assert sorted(number for won in wins for number in won) == list(range(15))
    for name, won in zip(names, wins, strict=True):
        for number in won:
            assert storage.read_bytes(f"{root}/{number}") == name.encode() * 50_000
    assert len(storage.list_files(root)) == 15


def test_localize_brings_each_content_once(root, tmp_path):
    cache = tmp_path / "cache"
    storage.write_bytes(storage.join(root, "w", "config.json"), b"{}")
    storage.write_bytes(storage.join(root, "w", "deep", "model.bin"), b"1" * 1000)
    folder = storage.localize(storage.join(root, "w"), cache)
    assert folder.name == "w"
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
        "config.json",
        "deep/model.bin",
    ]
    stamp = (folder / "deep" / "model.bin").stat().st_mtime_ns
    assert storage.localize(storage.join(root, "w"), cache) == folder
    assert (folder / "deep" / "model.bin").stat().st_mtime_ns == stamp
    storage.write_bytes(storage.join(root, "w", "config.json"), b"{1}")
    assert (storage.localize(storage.join(root, "w"), cache) / "config.json").read_bytes() == b"{1}"
    single = storage.localize(storage.join(root, "w", "config.json"), cache)
    assert (single.name, single.read_bytes()) == ("config.json", b"{1}")


def test_a_stream_seeks_and_feeds_tarfile(root, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "READ_AHEAD", 1000)  # so that members straddle the ranges
    source = tmp_path / "source"
    source.mkdir()
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for number in range(5):
            (source / f"{number}.txt").write_bytes(bytes([number]) * 3333)
            tar.add(source / f"{number}.txt", f"{number}.txt")
    uri = storage.join(root, "s.tar")
    storage.write_bytes(uri, (tmp_path / "s.tar").read_bytes())
    with storage.open_read(uri) as stream, tarfile.open(fileobj=stream) as tar:
        assert [tar.extractfile(member).read() for member in tar] == [bytes([n]) * 3333 for n in range(5)]
        stream.seek(-10, 2)
        assert stream.read(100) == b"\0" * 10


def _read_in_child(uri):
    assert storage.read_bytes(uri) == b"seen from a fork"


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_child_reads(root):
    uri = storage.join(root, "x")
    storage.write_bytes(uri, b"seen from a fork")
    child = multiprocessing.get_context("fork").Process(target=_read_in_child, args=(uri,))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_join_and_schemes():
    assert storage.join("s3://b/x/", "/y/", "", "z.tar") == "s3://b/x/y/z.tar"
    assert storage.join("/", "tmp") == "/tmp"
    assert storage.join("runs") == "runs"
    assert storage.is_remote("s3://b/x")
    assert not storage.is_remote("b/x")
    with pytest.raises(UserError, match=r"gs:// is not supported.*s3://"):
        storage.exists("gs://bucket/x")


def test_file_scheme_and_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.write_bytes("~/a.txt", b"1")
    assert storage.read_bytes(f"file://{tmp_path}/a.txt") == b"1"
