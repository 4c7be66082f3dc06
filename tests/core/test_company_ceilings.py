"""Ceilings in company: which of several budgets' hold, what they delay, and what is learned of the device meanwhile."""

from __future__ import annotations

import pytest

from balcony_edge.budget import Budget
from balcony_edge.control.company.ceilings import merged_ceilings
from balcony_edge.control.company.seen import CompanyState, LearnedAlone
from balcony_edge.control.governor import Governor
from balcony_edge.control.slowdown import Slowdown
from balcony_edge.device.readings import Reading
from tests.company import SETTLED, decided, exits, stream

#: A governor that has learned to use a tenth of the time, and looked at the sensors a moment ago.
BUSY = Governor(ticked_s=9.99, share=0.1)


def test_the_strictest_ceilings_hold_for_all() -> None:
    merged = merged_ceilings(
        [
            Budget(power_w=9.0, power_rail="cpu", temperature_c=80.0, tpot_ms=5.0),
            Budget(power_w=7.0, power_window_s=10.0, battery_floor_percent=20.0),
            Budget(temperature_c=70.0, battery_floor_percent=30.0, pacing=False),
            Budget(tpot_ms=1.0),
        ]
    )
    want = Budget(power_w=7.0, power_window_s=10.0, temperature_c=70.0, battery_floor_percent=30.0, pacing=False)
    assert merged == want
    assert merged_ceilings([]) == merged_ceilings([Budget(tpot_ms=3.0)]) == Budget()
    # a critical temperature below another budget's ceiling acts first
    assert merged_ceilings([Budget(temperature_c=80.0), Budget(critical_temperature_c=75.0)]) == Budget(
        critical_temperature_c=75.0
    )


def test_joules_keep_their_rail() -> None:
    graphics = Budget(energy_j_per_token=0.5, power_rail="gpu")
    assert merged_ceilings([graphics, Budget(energy_j_per_token=2.0)]) == graphics
    watts = Budget(power_w=8.0)
    assert merged_ceilings([graphics, watts]) == watts, "one rail is judged"
    assert merged_ceilings([Budget(energy_j_per_token=0.5), watts]) == Budget(power_w=8.0, energy_j_per_token=0.5)
    # of equal watts the first rail by name, in every process
    assert [merged_ceilings([Budget(power_w=5.0 + n, power_rail=one) for one in ("gpu", "board", "cpu")]).power_rail
            for n in range(8)] == ["board"] * 8  # fmt: skip


def test_the_pace_that_is_left_is_the_highest_that_is_asked_for() -> None:
    slow, fast = Budget(power_w=8.0, min_pace_tps=5.0), Budget(power_w=9.0, min_pace_tps=30.0, priority="latency")
    assert merged_ceilings([slow, fast]) == Budget(power_w=8.0, min_pace_tps=30.0, priority="latency")
    assert merged_ceilings([slow, Budget(power_w=9.0, pacing=False)]) == Budget(power_w=8.0, pacing=False)


@pytest.mark.parametrize(
    ("budgets", "wait_ms"),
    [
        # two streams at the full depth take 10.75 ms: a tenth of the time is a round every 107.5 ms
        ([Budget(power_w=8.0)] * 2, 96.75),
        ([Budget(power_w=8.0, pacing=False)] * 2, 0.0),
        ([Budget(power_w=8.0, min_pace_tps=20.0)] * 2, 50.0 - 10.75),
        ([Budget(power_w=8.0, tpot_ms=38.0, priority="latency"), Budget()], 0.95 * 38.0 - 10.75),
        ([Budget(power_w=8.0), Budget(tpot_ms=40.0, pacing=False)], 0.0),
        ([Budget(power_w=8.0), Budget(min_pace_tps=20.0)], 50.0 - 10.75),
        ([Budget(), Budget()], 0.0),
    ],
)
def test_a_ceiling_delays_rounds_as_the_budgets_allow(budgets: list[Budget], wait_ms: float) -> None:
    state = SETTLED._replace(governor=BUSY)
    _, found = decided([stream(key, one) for key, one in enumerate(budgets)], state)
    assert found.predicted_ms == pytest.approx(10.75) and set(exits(found).values()) == {8}
    assert found.wait_ms == pytest.approx(wait_ms)


def test_a_deadline_bounds_the_wait_and_comes_before_a_pace() -> None:
    """40 tokens in 2 s, with a twentieth to spare: 47.5 ms a token, of which the round takes 10.75."""
    urgent = {"made_tokens": 60, "started_s": 2.0}  # now is 10 s
    timed = Budget(power_w=8.0, priority="latency", deadline_s=10.0, expected_tokens=100)
    _, found = decided([stream(0, timed, **urgent), stream(1)], SETTLED._replace(governor=BUSY))
    assert found.wait_ms == pytest.approx(47.5 - 10.75)
    reader = Budget(max_pace_tps=12.0, deadline_s=10.0, expected_tokens=100)
    _, found = decided([stream(0, reader, **urgent, emitted_s=9.95), stream(1)])
    assert 0 in exits(found), "83 ms between two tokens would be too late"
    # a latency target of the same gap is no deadline: the token comes 40 ms after the last one, not after 38
    even = stream(0, Budget(max_pace_tps=25.0, tpot_ms=40.0), emitted_s=9.961)
    _, found = decided([even])
    assert not found.moves and found.wait_ms == pytest.approx(1.0)


def test_a_ceiling_out_of_reach_ends_only_who_asked_for_it() -> None:
    lost = SETTLED._replace(governor=BUSY._replace(infeasible=("power_w", "latency")))
    strict = {"on_infeasible": "error"}
    budgets = [Budget(power_w=3.0), Budget(tpot_ms=40.0, **strict), Budget(temperature_c=80.0, **strict)]
    after, found = decided([stream(key, one) for key, one in enumerate(budgets)], lost)
    assert after.governor.infeasible == ("power_w", "latency")
    assert [key for key, _ in found.refused] == [1], "its latency is out of reach"
    _, found = decided([stream(0, Budget(power_w=3.0, **strict)), stream(1, Budget(**strict))], lost)
    assert [key for key, _ in found.refused] == [0]
    infeasible = {move.key: move.decision.infeasible for move in found.moves}
    assert infeasible == {0: True, 1: False}


def test_what_was_learned_of_the_device_outlives_a_round_without_ceilings() -> None:
    state = SETTLED._replace(governor=BUSY._replace(ceiling=0))
    after, found = decided([stream(0), stream(1)], state)
    assert after.governor == state.governor, "kept for the next stream with ceilings"
    assert set(exits(found).values()) == {8} and found.wait_ms == 0.0, "and nobody here asks for them"
    _, found = decided([stream(0, Budget(power_w=8.0)), stream(1)], after)
    assert set(exits(found).values()) == {4} and found.wait_ms > 0


def test_a_round_begins_with_what_streams_have_learned_by_themselves() -> None:
    slower = Slowdown(mean=0.7, variance=1e-8, noise_variance=1e-4)
    alone = LearnedAlone(slower, BUSY)
    after, found = decided([stream(0, Budget(power_w=8.0)), stream(1)], CompanyState(SETTLED.slowdown), learned=alone)
    assert found.predicted_ms == pytest.approx(10.75 * 2.01375, rel=1e-4) and found.wait_ms > 100
    assert after.slowdown.mean == 0.7 and after.slowdown.noise_variance == SETTLED.slowdown.noise_variance
    # a moment after a round its own slowdown is the better one
    _, found = decided([stream(0), stream(1)], CompanyState(SETTLED.slowdown, decided_s=9.5), learned=alone)
    assert found.predicted_ms == pytest.approx(10.75)


def test_a_critical_temperature_ends_every_stream() -> None:
    hot = (Reading("board", "board", 10.0, celsius=95.0),)
    _, found = decided([stream(0, Budget(critical_temperature_c=90.0)), stream(1)], readings=hot)
    assert [key for key, _ in found.refused] == [0, 1]
    assert "critical_temperature_c = 90: the hottest sensor is at 95 °C" in found.refused[1][1].reason
