"""The 95 % intervals of scaling laws hold the truth about 95 times in 100, in simulation and as published."""

import pytest

from eval.scaling.coverage import COVERAGE, SimulatedLadder, read_coverage, simulate_coverage


@pytest.mark.skipif(not COVERAGE.exists(), reason="not published yet: python -m eval.scaling.coverage (minutes)")
def test_the_published_coverage_is_what_it_should_be():
    told = read_coverage()
    assert told.trials >= 1000
    names = " ".join(line.name for line in told.quantities)
    assert all(law in names for law in ("L(N)", "L(C)", "L(N,D)"))
    for line in told.quantities:
        assert 0.90 <= line.coverage <= 0.98, line
        assert line.low < line.coverage < line.high


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [4, 5, 8])
def test_intervals_hold_the_truth_as_often_as_they_say(sizes):
    """Wide enough limits that 200 trials of a 95 % interval stay inside them (0.95 +- 3 standard errors)."""
    for line in simulate_coverage(200, ladder=SimulatedLadder(sizes=sizes), seed=sizes).quantities:
        assert 0.90 <= line.coverage <= 0.995, line
