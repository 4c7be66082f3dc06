"""The percentiles that benchmarks report."""

from __future__ import annotations

import pytest

from benchmarks.rounds import p95
from benchmarks.serving.server_abuse import _p99_ms


@pytest.mark.parametrize(("count", "rank"), [(1, 1), (10, 10), (20, 19), (100, 95)])
def test_the_95th_percentile_is_the_smallest_that_95_of_100_do_not_exceed(count: int, rank: int) -> None:
    assert p95([float(number) for number in range(count, 0, -1)]) == rank


def test_a_99th_percentile_is_a_time_that_was_measured() -> None:
    """Of 25 times it is the longest, and not a value beyond it."""
    assert _p99_ms([0.001 * number for number in range(1, 26)]) == pytest.approx(25.0)
    assert _p99_ms([0.001 * number for number in range(1, 1251)]) == pytest.approx(1238.0)
