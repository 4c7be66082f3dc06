"""The joint decision while prompts run: chunks between tokens, first tokens in time, and the depth that makes room for them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from balcony_edge.budget import Budget
from balcony_edge.control.company.joint import JointController
from balcony_edge.control.company.seen import Chunk, Round, RoundSeen, StreamState
from balcony_edge.control.slowdown import Slowdown
from balcony_edge.simulation.company import Arrival, CompanyPlant, simulate_company
from balcony_edge.simulation.plant import Physics
from tests.support.company import QUALITY, SETTLED, decided, exits, stream
from tests.support.prices import MARGIN, SMALL

#: A prompt of 200 rows: 53 ms of work at exit 4, or 25 rounds next to a stream at 10 ms.
PROMPT: dict[str, Any] = {
    "made_tokens": 0,
    "stage_rows": (200,) * 3,
    "balcony_rows": (200, 200, 1),
    "context_length": 199,
}


def test_a_prompt_runs_in_chunks_between_the_tokens_of_others() -> None:
    prompt = stream(1, Budget(), made_tokens=0, stage_rows=(140,) * 3, balcony_rows=(140, 140, 1), context_length=39)
    limit_ms = 25.0
    _, found = decided([stream(0, Budget(tpot_ms=limit_ms)), prompt])
    assert set(exits(found)) == {0} and found.chunk is not None and found.chunk.key == 1
    assert found.chunk.stage == 0, "one stage at a time: the first row of a pass is the dearest"
    assert found.price_ms <= 0.976 * limit_ms
    unit = SMALL.stages[0]
    longer_ms = found.price_ms + unit.pass_ms(found.chunk.rows + 1, 39) - unit.pass_ms(found.chunk.rows, 39)
    assert longer_ms > 0.974 * limit_ms, "one more row would be late"
    # the next stage takes what the one before has run
    _, found = decided([stream(0, Budget(tpot_ms=limit_ms)), prompt._replace(stage_rows=(1, 140, 140))])
    assert found.chunk is not None and found.chunk.stage == 1
    short = prompt._replace(stage_rows=(30,) * 3, balcony_rows=(30, 30, 1))
    _, found = decided([stream(0, Budget(tpot_ms=limit_ms)), short])
    assert found.chunk == Chunk(1, 0, 30)
    # the last stage keeps a row for the first token
    for rows in (1, 2, 20):
        last = prompt._replace(budget=Budget(exit_layer=8), stage_rows=(0, 0, rows))
        chunks = [decided([stream(0, Budget(tpot_ms=4.0 + ms / 4)), last])[1].chunk for ms in range(80)]
        assert {chunk.rows for chunk in chunks if chunk is not None} <= set(range(rows))
    assert chunks.count(None) < 80
    # the last rows bring the first token
    rest = prompt._replace(stage_rows=(3, 3, 3), balcony_rows=(3, 3, 1))
    _, found = decided([stream(0, Budget(tpot_ms=limit_ms)), rest])
    assert set(exits(found)) == {0, 1} and found.chunk is None


def test_portions_of_a_prompt_end_where_its_passes_end() -> None:
    """Its rows have the same last bits then as if it ran at once."""
    costs = replace(SMALL, stages=tuple(replace(unit, pass_rows=256) for unit in SMALL.stages))
    cursors, portions = [0, 0, 0], 0

    def followed(_: float, found: Round) -> None:
        nonlocal portions
        if found.chunk is not None:
            portions += 1
            cursors[found.chunk.stage] += found.chunk.rows
            ends = [*range(256, 2000, 256), *([2000] if found.chunk.stage < 2 else [])]
            assert not found.chunk.balcony and cursors[found.chunk.stage] in ends

    arrival = Arrival(0.0, 2000, 1, Budget())
    simulate_company(costs, [arrival], quality=QUALITY, physics=Physics(noise=0.0), log=followed)
    assert portions > 3 and cursors[:2] == [2000, 2000] and 2000 - cursors[2] > 1
    # no last row is left over for a pass by itself, where all rows but one fit
    controller = JointController(costs, QUALITY)
    rest = stream(1, made_tokens=0, stage_rows=(0, 0, 340), balcony_rows=(340, 340, 1), context_length=339)
    assert controller.decide(SETTLED, RoundSeen((rest,), now_s=10.0, absent_ms=92.0))[1].chunk == Chunk(1, 2, 256)


def test_a_prompt_that_is_due_has_all_the_time_that_is_left_in_a_round() -> None:
    """29 ms take 461 rows of stage 0: a pass of 256 and most of another one."""
    units = tuple(replace(unit, marginal_row_ms=0.05, pass_rows=256) for unit in SMALL.stages)
    rows: dict[str, Any] = {"stage_rows": (2000,) * 3, "balcony_rows": (2000, 2000, 1), "context_length": 1999}
    for budget, count in ((Budget(), 256), (Budget(ttft_ms=5000.0), 461)):
        prompt = stream(1, budget, made_tokens=0, started_s=10.0, **rows)
        seen = RoundSeen((stream(0, Budget(tpot_ms=40.0)), prompt), now_s=10.0)
        _, found = JointController(replace(SMALL, stages=units), QUALITY).decide(SETTLED, seen)
        assert exits(found) == {0: 8} and found.chunk == Chunk(1, 0, count)


def test_the_first_rows_of_a_prompt_do_not_pay_for_the_keys_of_the_last() -> None:
    """Of 2,000 rows the first ones attend to one another only, in the decision and on the simulated device."""
    costs = replace(SMALL, stages=tuple(replace(unit, context_ms_per_1k=0.05) for unit in SMALL.stages))
    rows: dict[str, Any] = {"stage_rows": (2000,) * 3, "balcony_rows": (2000, 2000, 1), "context_length": 1999}
    prompt = stream(1, Budget(), made_tokens=0, **rows)
    seen = RoundSeen((stream(0, Budget(tpot_ms=25.0)), prompt), now_s=10.0)
    _, found = JointController(costs, QUALITY).decide(SETTLED, seen)
    assert found.chunk is not None and found.chunk.stage == 0
    chunk_ms = costs.stages[0].pass_ms(found.chunk.rows, found.chunk.rows - 1)
    assert found.price_ms == pytest.approx(costs.steady_ms(exits(found)[0], 0) + chunk_ms)
    longer, others_ms = 21 * found.chunk.rows // 20, costs.steady_ms(exits(found)[0], 0)
    more_ms = others_ms + costs.stages[0].pass_ms(longer, longer - 1)
    assert found.price_ms <= 25.0 * MARGIN < more_ms, "nearly as many rows as fit"
    plant = CompanyPlant(costs, Physics(noise=0.0), lambda _: 1.0)
    plant.run_chunk(plant.stream(Arrival(0.0, 2000, 1, Budget()), 1), found.chunk)
    assert 1000 * plant.now_s == pytest.approx(chunk_ms)


def test_a_prompt_leaves_time_for_who_waits() -> None:
    """The other stream is due in 15 ms, and its pace wants no token yet: 14.6 ms are left for the prompt's rows."""
    waits = stream(0, Budget(max_pace_tps=60.0, tpot_ms=20.0), asked_s=9.995)
    prompt = stream(1, Budget(), made_tokens=0, stage_rows=(200,) * 3, balcony_rows=(200, 200, 1), context_length=199)
    _, found = decided([waits, prompt])
    assert not found.moves and found.chunk is not None and 13.5 <= found.price_ms <= 14.7


def test_a_prompt_leaves_time_for_who_will_ask_in_a_moment() -> None:
    """A reader is at its token: a portion of 49 rows of stage 0 takes 3 ms and 48 × 0.25."""
    prompt = stream(1, Budget(), **PROMPT)
    assert exits(decided([prompt])[1]) == {1: 8}, "whole, if nobody is there"
    _, found = decided([prompt], absent_ms=15.0)
    assert not found.moves and found.chunk == Chunk(1, 0, 49)


def test_depth_makes_room_for_a_first_token_in_time() -> None:
    """500 rows within 600 ms: 3 rows a millisecond at most, which the tokens of the other stream leave at exit 4 only."""
    other = stream(0, Budget(tpot_ms=25.0))
    prompt = {"made_tokens": 0, "stage_rows": (500,) * 3, "balcony_rows": (500, 500, 1), "context_length": 499}
    _, relaxed = decided([other, stream(1, Budget(), started_s=10.0, **prompt)])
    _, urgent = decided([other, stream(1, Budget(ttft_ms=600.0), started_s=10.0, **prompt)])
    assert relaxed.chunk is not None and urgent.chunk is not None
    assert urgent.chunk.rows > relaxed.chunk.rows and exits(urgent)[0] < exits(relaxed)[0]


@pytest.mark.parametrize(("ttft_ms", "exit_layer"), [(100.0, 4), (150.0, 6), (1e4, 8)])
def test_a_first_token_is_in_time_also_where_nobody_has_another_target(ttft_ms: float, exit_layer: int) -> None:
    """By itself the prompt takes 79.6 ms at exit 4, 131 ms at exit 6 and 159 ms at exit 8."""
    _, found = decided([stream(0), stream(1, Budget(ttft_ms=ttft_ms), started_s=10.0, **PROMPT)])
    assert exits(found) == {0: 8, 1: exit_layer} and found.price_ms <= ttft_ms


def test_a_first_token_that_is_out_of_reach_is_said_to_be() -> None:
    """The rows take 53 ms at exit 4."""
    late = stream(1, Budget(ttft_ms=40.0), started_s=10.0, **PROMPT)
    state, found = decided([stream(0), late])
    assert not state.streams[1].met and exits(found)[1] == 4
    _, found = decided([stream(0), late._replace(budget=Budget(ttft_ms=40.0, on_infeasible="error"))])
    assert [key for key, _ in found.refused] == [1] and "ttft_ms = 40" in found.refused[0][1]


def test_noise_that_is_not_known_yet_makes_no_first_token_infeasible() -> None:
    """A deviation of 10 % leaves 51 of the 58 ms, and the rows take 52.75 at exit 4."""
    unsure = SETTLED._replace(slowdown=Slowdown(variance=1e-4, noise_variance=0.1**2))
    budget = Budget(ttft_ms=58.0, on_infeasible="error")
    state, found = decided([stream(0), stream(1, budget, started_s=10.0, **PROMPT)], unsure)
    assert state.streams[1].met and not found.refused


def test_a_load_of_earlier_replies_refuses_no_prompt_that_is_alone() -> None:
    """At three times its price a step takes 15 ms at exit 4, and without the load 5."""
    slow = SETTLED._replace(slowdown=SETTLED.slowdown._replace(mean=math.log(3)))
    strict: dict[str, Any] = {"on_infeasible": "error"}
    hot = {**strict, "temperature_c": 90.0}  # ceilings change nothing in that
    for keys, tpot_ms, refused in ((strict, 10.0, []), (strict, 4.0, [1]), (hot, 10.0, []), (hot, 4.0, [1])):
        budget = Budget(tpot_ms=tpot_ms, **keys)
        _, found = decided([stream(1, budget, started_s=10.0, **PROMPT)], slow)
        assert [key for key, _ in found.refused] == refused


def test_forced_tokens_of_a_reply_that_is_alone_measure_nothing() -> None:
    """As for a single controller: a load of earlier replies counts once three of its tokens were made by steps."""
    slow = SETTLED._replace(slowdown=SETTLED.slowdown._replace(mean=math.log(3)))
    budget = Budget(tpot_ms=10.0, on_infeasible="error")
    for forced, refused in ((6, []), (4, [1])):
        _, found = decided([stream(1, budget, made_tokens=7, forced_tokens=forced)], slow)
        assert [key for key, _ in found.refused] == refused


def test_a_deadline_that_has_passed_next_to_a_prompt_that_is_due() -> None:
    """The first has no time left at all; it gives its target up, and the prompt's target is held."""
    over = stream(1, Budget(deadline_s=2.0, expected_tokens=50), started_s=0.0)
    prompt = stream(
        2, Budget(ttft_ms=500.0), made_tokens=0, stage_rows=(30, 30, 30), balcony_rows=(30, 30, 1), started_s=9.9
    )
    state, found = decided([over, prompt])
    assert not state.streams[1].met and state.streams[2].met
    assert exits(found) or found.chunk is not None


def test_depth_makes_room_for_the_rows_of_deeper_stages_as_well() -> None:
    """Stage 0 has run: 42 rows in each of 12 rounds take 12 ms at stage 1 and 14 at stage 2, of 24.4 ms a round."""
    rows = {"made_tokens": 0, "stage_rows": (1, 500, 500), "balcony_rows": (500, 500, 1), "context_length": 499}
    prompt = stream(1, Budget(ttft_ms=310.0), started_s=10.0, **rows)
    state, _ = decided([stream(0, Budget(tpot_ms=25.0)), prompt])
    assert [(state.streams[key].goal, state.streams[key].met) for key in (0, 1)] == [(1, True)] * 2


def test_patient_streams_step_aside_for_a_prompt_that_is_due() -> None:
    """Who can wait for three rounds leaves its time to the rows of a prompt with ``ttft_ms``, to no other prompt's."""
    steady = stream(1, Budget(tpot_ms=30.0), asked_s=9.999)
    patient = stream(2, Budget(tpot_ms=500.0))
    rows = {"made_tokens": 0, "stage_rows": (80, 80, 80), "balcony_rows": (80, 80, 1)}
    assert set(exits(decided([steady, patient, stream(3, Budget(ttft_ms=900.0), started_s=9.9, **rows)])[1])) == {1}
    assert set(exits(decided([steady, patient, stream(3, Budget(), started_s=9.9, **rows)])[1])) == {1, 2}


def test_a_prompt_that_would_be_late_runs_at_once_while_the_others_may_be_late() -> None:
    other, due = stream(0, Budget(tpot_ms=10.0)), stream(1, Budget(ttft_ms=80.0), started_s=10.0, **PROMPT)
    state, found = decided([other, due])
    assert exits(found) == {1: 4} and found.chunk is None and state.streams[1].met
    assert found.price_ms == pytest.approx(3 + 199 * 0.25 + 1 + 199 * 0.125 + 1), "whole, and alone"

    # one token of ten may be late at a probability of 0.9; after the first there is none left
    before = SETTLED._replace(streams={0: StreamState(0, 0, 9)})
    _, found = decided([other._replace(late=1), due], before)
    assert set(exits(found)) == {0}
    _, found = decided([other._replace(late=1, made_tokens=20), due], before)
    assert exits(found) == {1: 4}
    # a gap that is late already does not become longer
    _, found = decided([other._replace(asked_s=9.98), due], before)
    assert set(exits(found)) == {0}
    # nobody waits for longer than a quarter of a second
    long = due._replace(stage_rows=(1200,) * 3, balcony_rows=(1200, 1200, 1), budget=Budget(ttft_ms=400.0))
    _, found = decided([other, long])
    assert set(exits(found)) == {0}
    # a prompt with time left waits for the gaps of the others, and so does one that would be late in any case
    for ttft_ms in (400.0, 40.0):
        _, found = decided([other, due._replace(budget=Budget(ttft_ms=ttft_ms))])
        assert 0 in exits(found) and 1 not in exits(found), ttft_ms


def test_a_stage_that_has_run_its_rows_makes_no_prompt_late() -> None:
    """Next to a token run 50 rows of stage 1, or 44 of stage 2: nine rounds of 24 ms, and the prompt has 584."""
    rows = {**PROMPT, "stage_rows": (0, 200, 200)}
    prompt = stream(1, Budget(ttft_ms=600.0, min_exit=8), started_s=10.0, **rows)
    state, found = decided([stream(0, Budget(tpot_ms=25.0)), prompt])
    assert exits(found) == {0: 8} and found.chunk == Chunk(1, 1, 50) and state.streams[1].met


def test_prompts_that_came_lately_take_depth_before_the_next_one_comes() -> None:
    one = stream(0, Budget(tpot_ms=11.0))  # full depth takes 10 ms
    _, found = decided([one])
    assert exits(found) == {0: 8}
    state, share = SETTLED._replace(decided_s=10.0), 0.0
    for step in range(1, 100):
        now_s = 10.0 + 0.05 * step
        waits = stream(1, Budget(), started_s=10.0, **PROMPT)
        state, found = decided([one._replace(asked_s=now_s), waits], state, now_s=now_s)
        assert share <= state.prompt_share
        share = state.prompt_share
    assert share == pytest.approx(1 - math.exp(-98 * 0.05 / 10)), "since the decision after the first"
    busy = state._replace(streams={}, assigned_for=())
    _, found = decided([one._replace(asked_s=now_s)], busy, now_s=now_s)
    assert exits(found) == {0: 4}
    # it is forgotten, and does not count while nothing runs
    _, found = decided([one._replace(asked_s=now_s + 60)], busy, now_s=now_s + 60)
    assert exits(found) == {0: 8}


def test_no_target_is_given_up_for_prompts_without_one() -> None:
    """Two streams leave no time at all: the patient prompt gets that of the tokens that may be late."""
    strict = stream(0, Budget(tpot_ms=6.1))
    for late, begins in ((0, True), (1, False)):  # one of ten tokens may be
        state, found = decided([strict, stream(1, Budget(tpot_ms=6.1), late=late), stream(2, Budget(), **PROMPT)])
        assert state.streams[0].met and state.streams[1].met
        if begins:
            assert not found.moves and found.chunk is not None and found.chunk.key == 2 and found.price_ms <= 6.1
        else:
            assert set(exits(found)) == {0, 1} and found.chunk is None


def test_a_deadline_gives_no_round_to_a_prompt_that_nothing_hurries() -> None:
    """100 tokens in 704 ms, a part of which is kept, leave 6.3 ms for each; its step takes 5, and a row of the prompt 3."""
    due = stream(0, Budget(deadline_s=1.704, expected_tokens=110), made_tokens=10, started_s=9.0)
    state, found = decided([due, stream(1, Budget(), **PROMPT)])
    assert state.streams[0].met and exits(found) == {0: 4} and found.chunk is None
    over = due._replace(budget=Budget(deadline_s=0.5, expected_tokens=110))
    _, found = decided([over, stream(1, Budget(), **PROMPT)])
    assert found.chunk is not None or 1 in exits(found), "one that has passed waits for nothing"


def test_who_makes_room_for_nothing_is_not_left_out() -> None:
    """The first has 7 ms left, of which its own token leaves 1.8: too few for a row, but enough for the others' rows."""
    due = stream(9, Budget(ttft_ms=5000.0), started_s=10.0, **PROMPT)
    tight = stream(0, Budget(tpot_ms=30.0, max_exit=4), asked_s=9.977)
    others = [stream(key, Budget(tpot_ms=100.0, max_exit=4)) for key in (1, 2)]
    _, found = decided([tight, *others, due])
    assert exits(found) == {0: 4, 1: 4, 2: 4} and found.chunk is None and found.price_ms == pytest.approx(5.75)


def test_rounds_with_rows_next_to_them_are_as_slow_as_they_were_measured() -> None:
    prompt, one = stream(1, Budget(), **PROMPT), stream(0, Budget(tpot_ms=20.0))
    _, found = decided([one, prompt])
    slow = SETTLED._replace(slowdown=SETTLED.slowdown._replace(offsets=(0.0, 0.0, 0.0, math.log(1.25))))
    _, slower = decided([one, prompt], slow)
    assert found.chunk is not None and slower.chunk is not None
    assert 0.95 * 20 < found.price_ms <= 0.976 * 20 and 0.95 * 20 < 1.25 * slower.price_ms <= 0.976 * 20


def test_a_target_that_no_exit_holds_keeps_no_prompt_waiting() -> None:
    """The first row of a pass takes 3 ms, the step 5: 9 rows of stage 0 take as long as that."""
    state, found = decided([stream(0, Budget(tpot_ms=2.5)), stream(1, Budget(), **PROMPT)])
    assert not state.streams[0].met and exits(found) == {0: 4} and found.chunk == Chunk(1, 0, 9)


def test_a_prompt_whose_time_has_passed_goes_before_one_that_has_no_time() -> None:
    patient = stream(1, Budget(), started_s=5.0, **PROMPT)
    late = stream(2, Budget(ttft_ms=100.0), started_s=9.0, **PROMPT)
    state, found = decided([stream(0, Budget(tpot_ms=25.0)), patient, late])
    assert not state.streams[2].met and found.chunk is not None and found.chunk.key == 2


def test_rows_of_a_prompt_in_front_of_its_balcony_come_in_portions_too() -> None:
    """They are the last that its first token needs; whole, they would not fit next to a stream with a target."""
    waits = stream(1, made_tokens=0, stage_rows=(0, 200, 200), balcony_rows=(200, 200, 1), context_length=199)
    _, found = decided([stream(0, Budget(tpot_ms=10.0)), waits._replace(budget=Budget(max_exit=4))])
    assert set(exits(found)) == {0} and found.price_ms <= 0.976 * 10.0
    assert found.chunk is not None and found.chunk.rows > 1
    assert found.chunk == Chunk(1, 0, found.chunk.rows, balcony=True)


@pytest.mark.parametrize("tpot_ms", [None, 30.0])
def test_a_deadline_that_has_passed_leaves_a_prompt_its_rows(tpot_ms: float | None) -> None:
    """Who is too late goes on next to the prompt, which gets as many rows as next to anybody else without a target."""
    over = stream(1, Budget(deadline_s=2.0, expected_tokens=50, tpot_ms=tpot_ms), started_s=0.0)
    rows = {"made_tokens": 0, "stage_rows": (5000,) * 3, "balcony_rows": (5000, 5000, 1), "context_length": 4999}
    prompt = stream(2, Budget(), started_s=9.9, **rows)
    state, _ = decided([over, prompt])
    assert not state.streams[1].met
    _, found = decided([over, prompt], state)
    _, next_to_any = decided([stream(1, Budget()), prompt])
    assert set(exits(found)) == {1} and found.chunk is not None and next_to_any.chunk is not None
    assert found.chunk.key == 2 and 10 < found.chunk.rows <= next_to_any.chunk.rows
    if tpot_ms is None:
        assert found.chunk.rows == next_to_any.chunk.rows
    else:  # its own target still says how long a gap may not be
        assert found.price_ms < 2 * tpot_ms + 10 < next_to_any.price_ms
