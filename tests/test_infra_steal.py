"""Time that a host takes from a virtual machine's cores."""

import os

from hypothesis import given
from hypothesis import strategies as st

from infra import steal
from infra.steal import read_stolen_seconds, subtract_stolen


def test_ranks_lose_what_each_of_their_cores_loses(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert subtract_stolen(10.0, stolen=4.0, work=5.0, ranks=2) == 8.0
    assert subtract_stolen(10.0, stolen=4.0, work=5.0, ranks=1) == 9.0
    assert subtract_stolen(10.0, stolen=4.0, work=5.0, ranks=64) == 6.0
    assert subtract_stolen(10.0, stolen=4.0, work=9.0, ranks=4) == 9.0  # the work was done


@given(*[st.floats(0, 1e6) for _ in range(3)], st.integers(1, 100))
def test_what_is_left_lies_between_the_work_and_the_clock(seconds, lost, work, ranks):
    found = subtract_stolen(seconds, stolen=lost, work=work, ranks=ranks)
    assert min(seconds, work) <= found <= seconds
    assert subtract_stolen(seconds, stolen=0.0, work=work, ranks=ranks) == seconds


def test_the_kernel_s_own_count_is_read(monkeypatch, tmp_path):
    ticks = os.sysconf("SC_CLK_TCK")
    told = tmp_path / "stat"
    told.write_text(f"cpu  1 2 3 4 5 6 7 {30 * ticks} 9 10\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    monkeypatch.setattr(steal, "Path", lambda name: {"/proc/stat": told}[name])
    assert read_stolen_seconds() == 30.0
    told.write_text("cpu  1 2 3 4\n")  # of an old kernel
    assert read_stolen_seconds() == 0.0
    told.unlink()
    assert read_stolen_seconds() == 0.0
