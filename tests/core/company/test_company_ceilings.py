"""Ceilings in company: which of several budgets' hold, what they delay, and what is learned of the device meanwhile."""

from __future__ import annotations

import math

import pytest

from balcony_edge.budget import Budget
from balcony_edge.control.company import ceilings
from balcony_edge.control.company.ceilings import longest_pause_s, merged_ceilings
from balcony_edge.control.company.prices import RoundPrices
from balcony_edge.control.company.seen import CompanyState, LearnedAlone, StreamState
from balcony_edge.control.governor import Governor
from balcony_edge.control.response import GAUGES, Fit, Load
from balcony_edge.control.slowdown import Slowdown
from balcony_edge.device.readings import Reading
from tests.support.company import SETTLED, decided, exits, stream
from tests.support.prices import SMALL

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


def test_of_a_ceiling_that_is_added_to_budgets_the_lowest_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ceiling that is left out would hold for a reply alone, and for none next to another one."""

    class Wider(Budget):
        npu_utilization: float | None = None

    monkeypatch.setattr("balcony_edge.budget._CEILINGS", ("npu_utilization",))
    monkeypatch.setattr(ceilings, "Budget", Wider)
    merged = merged_ceilings([Wider(npu_utilization=0.5), Wider(npu_utilization=0.4), Wider()])
    assert merged.ceilings == {"npu_utilization": 0.4}


def test_joules_keep_their_rail() -> None:
    graphics = Budget(energy_j_per_token=0.5, power_rail="gpu")
    board = Budget(energy_j_per_token=2.0)
    assert merged_ceilings([graphics, board]) == board, "joules of two rails are no numbers to compare"
    assert merged_ceilings([graphics, Budget(energy_j_per_token=0.9, power_rail="gpu")]) == graphics
    measured = Budget(power_w=3.0, power_rail="gpu")
    assert merged_ceilings([measured, board]) == measured, "watts are measured, a rail with joules alone may be not"
    watts = Budget(power_w=8.0)
    assert merged_ceilings([graphics, watts]) == watts, "one rail is judged"
    assert merged_ceilings([Budget(energy_j_per_token=0.5), watts]) == Budget(power_w=8.0, energy_j_per_token=0.5)
    # of equal watts the first rail by name, in every process
    assert [merged_ceilings([Budget(power_w=5.0 + n, power_rail=one) for one in ("gpu", "board", "cpu")]).power_rail
            for n in range(8)] == ["board"] * 8  # fmt: skip


def test_watts_of_the_board_come_before_those_of_its_parts() -> None:
    """Five watts for the graphics alone must not let go of the board's fifteen; who is not held hears of it."""
    board, graphics = Budget(power_w=15.0), Budget(power_w=5.0, power_rail="gpu")
    assert merged_ceilings([board, graphics]) == board
    assert merged_ceilings([Budget(power_w=3.0, power_rail="cpu"), graphics]).power_rail == "cpu"
    power = (Reading("board", "board", 10.0, watts=10.0),)
    _, found = decided([stream(0, board), stream(1, graphics), stream(2)], readings=power)
    assert {move.key: move.decision.unseen for move in found.moves} == {0: False, 1: True, 2: False}
    words = [move.decision.reason for move in found.moves]
    assert ["no ceiling for the gpu rail: another reply has one for the board rail" in one for one in words] == [
        False, True, False,
    ]  # fmt: skip


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
    _, found = decided([stream(0, reader, **urgent, asked_s=9.95), stream(1)])
    assert 0 in exits(found), "83 ms between two tokens would be too late"


def test_a_step_lies_inside_the_gap_of_its_pace() -> None:
    """20 ms of a gap of 40 ms are left: the round of the stream begins so that it ends with them."""
    own_ms = RoundPrices(SMALL).steady_ms([(2, stream(0))])
    _, found = decided([stream(0, Budget(max_pace_tps=25.0), asked_s=9.98)])
    assert not found.moves and found.wait_ms == pytest.approx(20.0 - own_ms)
    _, found = decided([stream(0, Budget(max_pace_tps=25.0), asked_s=9.96 + own_ms / 1000 + 1e-6)])
    assert not found.moves
    _, found = decided([stream(0, Budget(max_pace_tps=25.0), asked_s=9.96 + own_ms / 1000 - 1e-6)])
    assert exits(found) == {0: 8}
    # A target of the same gap comes before the pace: a round with all streams must fit, with the probability asked for.
    even, both_ms = Budget(max_pace_tps=25.0, tpot_ms=40.0), RoundPrices(SMALL).steady_ms([(2, stream(0))] * 2)
    _, found = decided([stream(0, even, asked_s=9.98), stream(1, even, asked_s=9.98)])
    assert not found.moves and found.wait_ms == pytest.approx(20.0 - both_ms / 0.975, abs=0.02)


def test_who_waits_for_a_pace_works_off_pending_rows() -> None:
    behind = stream(0, Budget(max_pace_tps=5.0), stage_rows=(1, 30, 30), balcony_rows=(1, 30, 1), context_length=60)
    known = SETTLED._replace(streams={0: StreamState(0, 2, 50)})
    _, found = decided([behind], known)
    assert not found.moves and found.chunk is not None and found.wait_ms == 0
    assert found.chunk.stage == 1 and found.chunk.rows == 29, "the newest row runs with the token"
    _, found = decided([behind], known, absent_ms=5.0)
    assert found.chunk is not None and found.price_ms <= 5.0, "a reader is at its token, and will ask in a moment"
    _, found = decided([stream(0, Budget(max_pace_tps=5.0))], known)
    assert found.chunk is None and found.wait_ms > 0
    _, found = decided([behind._replace(budget=Budget(max_pace_tps=5.0, energy_j_per_token=9.0))], known)
    assert not found.moves and found.chunk is None and found.wait_ms > 0, "each token has its joules"


def test_a_pause_of_the_ceilings_makes_nobody_late() -> None:
    """A round of both takes 10.75 ms, and the next one comes 107.5 ms later."""
    state = SETTLED._replace(governor=BUSY)
    late = stream(0, Budget(power_w=3.0, tpot_ms=30.0), asked_s=9.95)
    for left_ms, chosen in ((240.0, {0}), (60.0, {0, 1})):  # two rounds like this one, with their pauses
        patient = stream(1, Budget(tpot_ms=400.0), asked_s=10.0 - (400.0 - left_ms) / 1000)
        assert set(exits(decided([late, patient], state)[1])) == chosen
    # a reader's pace is over in 20 ms less its step, and its target in 35: the others wait for it
    reader = stream(1, Budget(max_pace_tps=10.0, tpot_ms=115.0), asked_s=9.92)
    _, found = decided([stream(0, Budget(power_w=3.0)), reader], state)
    assert not found.moves and found.chunk is None and found.wait_ms == pytest.approx(10.0)
    # or it steps with who cannot wait
    _, found = decided([stream(0, Budget(power_w=3.0, tpot_ms=60.0), asked_s=9.955), reader], state)
    assert set(exits(found)) == {0, 1}
    # rows next to the others' step leave the reader a tenth of the 350 ms until it is due
    backlog = {"stage_rows": (1, 401, 401), "balcony_rows": (1, 401, 1), "context_length": 500}
    later = stream(1, Budget(max_pace_tps=5.0, tpot_ms=400.0), asked_s=9.95)
    _, found = decided([stream(0, Budget(power_w=3.0), **backlog), later], state)
    assert found.chunk is not None and 30 < found.price_ms <= 35


def test_a_prompt_with_little_time_waits_for_no_pace() -> None:
    """The reader's pace is over in 10 ms, and its round would end before the pause after another one."""
    reader = stream(1, Budget(max_pace_tps=10.0, tpot_ms=115.0), asked_s=9.92)
    rows = {"made_tokens": 0, "stage_rows": (200,) * 3, "balcony_rows": (200, 200, 1), "context_length": 199}
    due = stream(2, Budget(ttft_ms=500.0), started_s=10.0, asked_s=10.0, **rows)
    _, found = decided([stream(0, Budget(power_w=3.0)), reader, due], SETTLED._replace(governor=BUSY))
    assert found.chunk is not None and found.chunk.key == 2


def test_a_ceiling_out_of_reach_ends_only_who_asked_for_it() -> None:
    asked = (("power_w", 3.0),)
    lost = SETTLED._replace(governor=BUSY._replace(infeasible=("power_w", "latency"), asked=asked))
    strict = {"on_infeasible": "error"}
    budgets = [Budget(power_w=3.0), Budget(tpot_ms=40.0, **strict), Budget(temperature_c=80.0, **strict)]
    after, found = decided([stream(key, one) for key, one in enumerate(budgets)], lost)
    assert after.governor.infeasible == ("power_w", "latency")
    assert [key for key, _ in found.refused] == [1], "its latency is out of reach"
    _, found = decided([stream(0, Budget(power_w=3.0, **strict)), stream(1, Budget(**strict))], lost)
    assert [key for key, _ in found.refused] == [0]
    infeasible = {move.key: move.decision.infeasible for move in found.moves}
    assert infeasible == {0: True, 1: False}
    _, found = decided([stream(0, Budget(power_w=3.0, **strict)), stream(1, Budget(power_w=50.0, **strict))], lost)
    assert [key for key, _ in found.refused] == [0], "the device keeps to 3 W, so 50 W are held"


def test_a_pace_that_is_enough_for_a_deadline_does_not_end_its_reply() -> None:
    """The ceilings leave 10 tokens a second: too few for the first reply, and the second needs 2, or 20."""
    late = SETTLED._replace(governor=BUSY._replace(infeasible=("latency",), pace_tps=10.0))
    limited = stream(0, Budget(power_w=3.0, tpot_ms=30.0))
    for left, refused in ((100, []), (1000, [1])):
        due = Budget(deadline_s=60.0, expected_tokens=9 + left, on_infeasible="error")
        _, found = decided([limited, stream(1, due)], late)
        assert [key for key, _ in found.refused] == refused


def test_only_who_names_a_ceiling_hears_that_nothing_measures_it() -> None:
    _, found = decided([stream(0, Budget(power_w=8.0)), stream(1)])
    assert {move.key: move.decision.unseen for move in found.moves} == {0: True, 1: False}
    assert ["no reading for power_w" in move.decision.reason for move in found.moves] == [True, False]


@pytest.mark.parametrize(
    ("most_j", "slower", "exit_layer"), [(0.2, 1, 8), (0.2, 2, 6), (0.09, 1, 6), (0.06, 1, 4), (0.01, 1, 4)]
)
def test_joules_take_depth_from_a_company(most_j: float, slower: float, exit_layer: int) -> None:
    """Rounds of two take 10.75, 7.625 and 5.375 ms, at 10 W. One reading proves nothing to be out of reach."""
    power = (Reading("board", "board", 10.0, watts=10.0),)
    slow = SETTLED._replace(slowdown=SETTLED.slowdown._replace(mean=math.log(slower)))
    state, found = decided([stream(0, Budget(energy_j_per_token=most_j)), stream(1)], slow, readings=power)
    assert set(exits(found).values()) == {exit_layer} and not state.governor.infeasible


def test_joules_of_a_company_count_the_wait_for_the_pace() -> None:
    """Rounds of two take 10.75, 7.625 and 5.375 ms. In a gap of 40 ms these are 0.145, 0.126 and 0.112 J, of which 0.08 J
    are spent anyway."""
    sure = Load(1.0, fits=(Fit(2.0, 6.0, 1e-9, 0.0, 1e-9),) * len(GAUGES))
    before = SETTLED._replace(governor=Governor(power=sure, rail="board"))
    power = (Reading("board", "board", 10.0, watts=8.0),)
    paced = Budget(energy_j_per_token=0.13, max_pace_tps=25.0)
    state, _ = decided([stream(0, paced), stream(1, paced)], before, readings=power)
    assert state.governor.ceiling == 1, "as for a reply that is alone"
    state, _ = decided([stream(0, paced), stream(1)], before, readings=power)
    assert state.governor.ceiling == 2, "the other one waits for nothing"


def test_joules_take_depth_between_the_shallowest_and_the_deepest_exit_of_all() -> None:
    power = (Reading("board", "board", 10.0, watts=10.0),)
    _, found = decided([stream(0, Budget(energy_j_per_token=0.2, max_exit=4)), stream(1)], readings=power)
    assert exits(found) == {0: 4, 1: 8}
    state, found = decided([stream(0, Budget(energy_j_per_token=0.06)), stream(1, Budget(min_exit=8))], readings=power)
    assert exits(found) == {0: 4, 1: 8} and not state.governor.infeasible


def test_a_share_of_the_time_leaves_the_depth_that_the_pace_has_time_for() -> None:
    """A quarter of 38 ms, which are 40 less a twentieth, is 9.5 ms: rounds of two take 10.75, 7.625 and 5.375 ms."""
    pair = [stream(0, Budget(power_w=8.0, tpot_ms=40.0)), stream(1)]
    before = SETTLED._replace(governor=Governor(share=0.15))  # it rises by a tenth
    state, found = decided(pair, before)
    assert state.governor.share == pytest.approx(0.25) and exits(found) == {0: 6, 1: 6}
    state, _ = decided([pair[0], stream(1, made_tokens=0)], before)
    assert state.governor.share == 1.0, "after a pause it need not rise slowly"


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


def test_a_critical_temperature_ends_the_streams_that_name_it() -> None:
    hot = (Reading("board", "board", 10.0, celsius=95.0),)
    limits = [Budget(critical_temperature_c=90.0), Budget(), Budget(critical_temperature_c=99.0)]
    _, found = decided([stream(key, one) for key, one in enumerate(limits)], readings=hot)
    assert [key for key, _ in found.refused] == [0]
    assert "critical_temperature_c = 90: the hottest sensor is at 95 °C" in found.refused[0][1]


def test_a_token_a_second_is_left_also_where_nobody_names_it() -> None:
    slow, plain = Budget(power_w=3.0, min_pace_tps=0.05), Budget(tpot_ms=50.0)
    assert merged_ceilings([slow, plain]).min_pace_tps == 1.0
    assert merged_ceilings([slow, Budget(min_pace_tps=0.2), Budget(max_pace_tps=0.1)]).min_pace_tps == 0.2
    assert longest_pause_s([slow], [slow]) == 20.0
    assert longest_pause_s([slow, plain], [slow, plain]) == longest_pause_s([slow, plain], [plain]) == 1.0
    assert longest_pause_s([slow, plain], [slow]) == 20.0, "the other one is paused, or waits"
    assert longest_pause_s([plain], [Budget(max_pace_tps=0.1)]) == 0.0, "no ceiling, no pause"


@pytest.mark.parametrize("lost", [Budget(tpot_ms=1.0), Budget(deadline_s=2.0, expected_tokens=50)])
def test_a_target_that_was_given_up_takes_no_depth_under_a_ceiling(lost: Budget) -> None:
    """A quarter of the time leaves rounds of two the exit 6 at 40 ms; nothing would leave a token a millisecond."""
    pair = [stream(0, Budget(power_w=8.0, tpot_ms=40.0)), stream(1, lost)]
    before = SETTLED._replace(governor=Governor(share=0.15), streams={1: StreamState(0, 0, 9, met=False)})
    state, found = decided(pair, before)
    assert not state.streams[1].met and state.governor.share == pytest.approx(0.25)
    assert exits(found)[0] == 6
