"""Rank 0 talks, the others only warn; progress is a plain line where there is no terminal. And the version is known."""

import io
import re

import pytest

from infra import log
from infra.log import Progress, format_duration, get_logger
from infra.version import code_version


def test_rank_zero_talks_and_others_only_warn(monkeypatch, capsys):
    get_logger("train").info("hello %d", 1)
    monkeypatch.setenv("RANK", "3")
    get_logger("train").info("hello again")
    get_logger("train").warning("lost a peer")
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"\d\d:\d\d:\d\d train: hello 1", lines[0])
    assert lines[1].endswith("[rank 3] train: warning: lost a peer")


def test_an_exception_is_shown_with_its_trace(capsys):
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        get_logger("x").exception("failed")
    printed = capsys.readouterr().err
    assert "x: error: failed" in printed
    assert "RuntimeError: boom" in printed


@pytest.fixture
def time_passes(monkeypatch):
    """A clock that this test moves."""
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_carry_rate_time_left_and_fields(time_passes):
    stream = io.StringIO()
    with Progress(1000, "images", desc="encode", initial=200, every_s=10, stream=stream) as progress:
        time_passes[0] = 5
        progress.update(100, ok=100)
        assert stream.getvalue() == ""
        time_passes[0] = 10
        progress.update(100, ok=199, loss=0.123456)
        time_passes[0] = 40
        progress.update(600)
    assert stream.getvalue().splitlines() == [
        "encode: 400/1,000 images (40%), 20.0 images/s, 30s left, ok=199 loss=0.1235",
        "encode: 1,000/1,000 images (100%), 20.0 images/s, 40s taken, ok=199 loss=0.1235",
    ]


def test_unknown_total_and_other_ranks(time_passes, monkeypatch):
    stream = io.StringIO()
    progress = Progress(None, "rows", stream=stream)
    time_passes[0] = 2
    progress.update(10)
    progress.close()
    progress.close()
    assert stream.getvalue() == "10 rows, 5.0 rows/s, 2s taken\n"
    monkeypatch.setenv("RANK", "1")
    with Progress(3, "rows", every_s=0, stream=stream) as silent:
        silent.update(3)
    assert stream.getvalue().count("\n") == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    with Progress(10, "rows", desc="pack", stream=stream) as progress:
        progress.update(10, ok=10)
    assert "pack: 100%" in stream.getvalue()
    assert "ok=10" in stream.getvalue()


def test_clock():
    assert [format_duration(s) for s in (0.4, 59.4, 59.6, 3599.7, 7500)] == ["0s", "59s", "1m00s", "1h00m", "2h05m"]


def test_code_version_names_a_commit():
    assert re.search(r"[0-9a-f]{7}|\d+\.\d+", code_version())
