"""The bound of benchmarks/serving/clairvoyant.py on runs whose best schedule is worked out by hand, and on simulated ones."""

from __future__ import annotations

import math

import pytest

from balcony_edge.budget import Budget
from balcony_edge.errors import InputError
from balcony_edge.simulation.company import Arrival, SimulatedStream, poisson, simulate_company, summary
from tests.support.prices import SMALL

pytest.importorskip("scipy", reason="scipy is not installed; it comes with the extra [eval]")

from benchmarks.serving.clairvoyant import deepest


def ran(arrival: Arrival, exits: list[int], gaps_ms: list[float]) -> SimulatedStream:
    late = sum(gap > (arrival.budget.tpot_ms or math.inf) for gap in gaps_ms[1:])
    return SimulatedStream(arrival, [], [], 0, exits=exits, gaps_ms=gaps_ms, late_tokens=late)


def pair(tpot_ms: float) -> list[SimulatedStream]:
    """Two streams of ten tokens that took their whole time."""
    arrival = Arrival(0.0, 1, 10, Budget(tpot_ms=tpot_ms))
    return [ran(arrival, [6] * 10, [tpot_ms] * 10) for _ in range(2)]


def test_two_streams_in_one_bin() -> None:
    """A round of two takes 10.75 ms at the full depth and 7.625 ms at exit 6; a step of one takes 10 and 7 ms."""
    assert deepest(SMALL, pair(11.0), bin_s=0.11) == pytest.approx(1.0)
    share = (10.6 - 7.625) / (10.75 - 7.625)  # of the rounds are at the full depth
    assert deepest(SMALL, pair(10.6), bin_s=0.106) == pytest.approx((8 * share + 6 * (1 - share)) / 8)


def test_a_token_in_time_does_not_come_from_an_exit_that_is_too_slow() -> None:
    """One stream at 8.5 ms: there is time for half the tokens at 10 ms, but only the first and a late one may take so long."""
    arrival = Arrival(0.0, 1, 10, Budget(tpot_ms=8.5))
    in_time = ran(arrival, [6] * 10, [8.5] * 10)
    assert deepest(SMALL, [in_time], bin_s=0.085) == pytest.approx((9 * 6 + 8) / 80)
    late = ran(arrival, [6] * 10, [8.5] * 9 + [12.0])
    assert deepest(SMALL, [late], bin_s=0.0885) == pytest.approx((8 * 6 + 2 * 8) / 80)


def test_it_knows_what_will_come() -> None:
    """Ten tokens by 100 ms would all be deep, alone. After 50 ms comes a prompt of 41 rows, whose token is due at 100 ms, too.

    40 rows cost 40 × (0.25 + 0.125) = 15 ms at exit 4, and the token 0.75 ms next to another one at the full depth. A token at
    exit 6 instead of 8 gives 3 ms for 2 layers: 15.75 / 3 tokens of the first reply, more than it has left after 50 ms.
    """
    first = ran(Arrival(0.0, 1, 10, Budget(deadline_s=0.1, expected_tokens=10)), [4] * 10, [9.0] * 10)
    second = ran(Arrival(0.05, 41, 1, Budget()), [4], [50.0])
    assert deepest(SMALL, [first], bin_s=0.05) == pytest.approx(1.0)
    assert deepest(SMALL, [first, second], bin_s=0.05) == pytest.approx((88 - 2 * 15.75 / 3) / 88)


def test_what_cannot_be_bounded_is_refused() -> None:
    with pytest.raises(InputError, match="no token"):
        deepest(SMALL, [])
    with pytest.raises(InputError, match="give the prices that it ran with"):
        deepest(SMALL, pair(3.0), bin_s=0.03)


@pytest.mark.parametrize("seed", range(3))
def test_no_simulated_run_is_deeper(seed: int) -> None:
    classes = [Arrival(0.0, 20, 30, Budget(tpot_ms=target)) for target in (9.0, 12.0, 40.0)]
    classes += [Arrival(0.0, 30, 20, Budget(deadline_s=2.0, expected_tokens=20)), Arrival(0.0, 60, 20, Budget())]
    quality = (0.5, 0.7, 1.0)
    streams = simulate_company(SMALL, poisson(3.0, 4.0, classes, seed=seed), quality=quality, seed=seed)
    coarse, fine = (deepest(SMALL, streams, bin_s=bin_s) for bin_s in (0.5, 0.1))
    assert summary(streams, SMALL)["mean_depth"] <= fine + 1e-9 <= coarse + 2e-9 <= 1 + 3e-9
