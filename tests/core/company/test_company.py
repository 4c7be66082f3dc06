"""The joint decision about several streams: who steps, at which exits, and what else fits into a round."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balcony_edge.budget import Budget
from balcony_edge.control.company.assignment import Claim, assign, qualities
from balcony_edge.control.company.goals import Goals
from balcony_edge.control.company.joint import JointController
from balcony_edge.control.company.prices import RoundEntry, RoundPrices
from balcony_edge.control.company.seen import CompanyState, LearnedAlone, RoundSeen, StreamState
from balcony_edge.control.company.view import view_of
from balcony_edge.control.deadline import UNSEEN_LOAD
from balcony_edge.control.decision import Measurement
from tests.support.company import ONES, QUALITY, SETTLED, decided, exits, stream
from tests.support.prices import DEMO, SMALL
from tests.support.properties import CHANCE, examples


def test_an_exit_that_never_agrees_is_worth_nothing() -> None:
    assert qualities({8: 0.0, 16: 0.4, 20: 0.3, 30: None}) == [0.0, 0.4, 0.4, 1.0]
    assert qualities({15: None, 30: None}) == [0.5, 1.0]


PRICES = RoundPrices(SMALL)


def test_a_round_of_one_costs_what_a_step_costs() -> None:
    for index, exit_layer in enumerate(SMALL.exits):
        for stages, balconies in ((ONES, ONES), ((1, 4, 9), (3, 5, 1)), ((7, 7, 7), (7, 7, 1))):
            for costs in (SMALL, replace(SMALL, switch_ms=0.75)):
                price = RoundPrices(costs).round_ms([RoundEntry(index, stages, balconies, 30)])
                assert price == pytest.approx(costs.step_ms(exit_layer, stages, balconies, 30))


def test_the_further_row_of_a_round_costs_a_further_row() -> None:
    """Two at the full depth, one at exit 4: by hand from the prices of SMALL."""
    entries = [RoundEntry(2, ONES, ONES, 0), RoundEntry(2, ONES, ONES, 0), RoundEntry(0, ONES, ONES, 0)]
    stages = (3 + 2 * 0.25) + (2 + 0.25) + (3.5 + 0.25)
    assert PRICES.round_ms(entries) == pytest.approx(stages + 0.5 + 1.0 + 1.0)
    # a stream with a backlog runs its rows of that stage in a pass of its own
    behind = RoundEntry(2, (1, 5, 5), ONES, 0)
    assert PRICES.round_ms([*entries, behind]) == pytest.approx(
        (3 + 3 * 0.25) + 2.25 + (2 + 4 * 0.25) + 3.75 + (3.5 + 4 * 0.25) + 0.5 + 1.0 + 1.0
    )
    assert PRICES.round_ms([]) == 0.0


def test_streams_that_share_no_passes_pay_for_whole_steps() -> None:
    """Four at 10 ms each: by hand 40 ms. A target of 31 ms leaves two of them at the full depth, 10 ms, and two at 5 ms."""
    deep = RoundEntry(2, ONES, ONES, 0, shares=False)
    assert PRICES.round_ms([deep] * 4) == pytest.approx(40.0)
    both = PRICES.round_ms([RoundEntry(2, ONES, ONES, 0)] * 2)
    assert PRICES.round_ms([deep, RoundEntry(2, ONES, ONES, 0), RoundEntry(2, ONES, ONES, 0)]) == pytest.approx(
        10.0 + both
    )
    assert PRICES.steady_ms([(2, stream(key)._replace(shares=False)) for key in range(2)]) == pytest.approx(20.0)
    lone = [stream(key, Budget(tpot_ms=32.0))._replace(shares=False) for key in range(4)]
    _, found = decided(lone)
    assert found.price_ms <= 32.0 and sum(SMALL.steady_ms(one, 0) for one in exits(found).values()) == found.price_ms
    controller = JointController(SMALL, QUALITY)
    assert controller.refusal(CompanyState(), RoundSeen(tuple(lone[:3]), now_s=10.0), lone[3]) is None
    tight = [one._replace(budget=Budget(tpot_ms=18.0)) for one in lone]
    refusal = controller.refusal(CompanyState(), RoundSeen(tuple(tight[:3]), now_s=10.0), tight[3])
    assert refusal is not None and "a round of 4 streams takes 20 ms at their shallowest exits" in refusal


def test_rows_of_a_chunk_fill_the_time() -> None:
    assert PRICES.work_ms((5, 5, 9), 1, 0) == pytest.approx(3 + 1 + 2 + 1)


@examples(60)
@given(CHANCE, st.integers(1, 5), st.floats(4.0, 30.0))
def test_an_assignment_loses_little_more_than_the_best_one(chance: Any, count: int, limit_ms: float) -> None:
    """Compared with all assignments: it fits whenever one fits, and loses at most a third of a stream's depth more."""
    claims = [
        Claim(
            chance.randrange(2), 2, chance.choice([0.5, 1.0, 3.0]), chance.randrange(200), True, chance.random() < 0.7
        )
        for _ in range(count)
    ]
    found, price_ms = assign(PRICES, QUALITY, claims, limit_ms, 0)

    def price(chosen: Sequence[int]) -> float:
        pairs = zip(chosen, claims, strict=True)
        return PRICES.round_ms([RoundEntry(i, ONES, ONES, one.context, one.shares) for i, one in pairs])

    def loss(chosen: Sequence[int]) -> float:
        return sum(claim.weight * (1 - QUALITY[i]) for claim, i in zip(claims, chosen, strict=True))

    assert price_ms == pytest.approx(price(found))
    assert all(claim.lowest <= i <= claim.highest for claim, i in zip(claims, found, strict=True))
    every = itertools.product(*(range(claim.lowest, claim.highest + 1) for claim in claims))
    fitting = [chosen for chosen in every if price(chosen) <= limit_ms]
    if not fitting:
        assert price_ms > limit_ms
        return
    assert price_ms <= limit_ms
    best = min(loss(chosen) for chosen in fitting)
    assert loss(found) <= best + max(claim.weight for claim in claims) / 2


def test_the_deepest_of_the_others_have_room_in_a_round() -> None:
    tight, lax = Claim(0, 2, 1.0, 0, True), Claim(0, 2, 1.0, 0, False)
    one = PRICES.round_ms([RoundEntry(2, ONES, ONES, 0)])
    two = PRICES.round_ms([RoundEntry(2, ONES, ONES, 0)] * 2)
    assert assign(PRICES, QUALITY, [tight, lax, lax], one, 0) == ([2, 2, 2], pytest.approx(one))
    assert assign(PRICES, QUALITY, [tight, lax, lax], two, 1) == ([2, 2, 2], pytest.approx(two))
    found, price_ms = assign(PRICES, QUALITY, [tight, lax, lax], one, 1)
    assert price_ms <= one and found != [2, 2, 2]


def test_everybody_gets_the_full_depth_while_there_is_time() -> None:
    # 3.25 + 2.25 + 3.75 + 0.5 + 1 = 10.75 ms; with 5 % free, a target of 11.7 ms has room for 10.84 ms and 11.5 ms for 10.65
    _, found = decided([stream(0, Budget(tpot_ms=11.7)), stream(1)])
    assert exits(found) == {0: 8, 1: 8} and found.chunk is None
    assert found.price_ms == pytest.approx(10.75) and found.predicted_ms == pytest.approx(10.75)
    assert found.moves[0].decision.reason == "a round of 2 streams takes 10.8 ms"
    assert 0.9 < found.moves[0].decision.probability < 1 and found.moves[1].decision.probability == 1
    _, found = decided([stream(0, Budget(tpot_ms=11.5)), stream(1)])
    assert min(exits(found).values()) < 8


def test_depth_is_taken_from_who_loses_least() -> None:
    budgets = [Budget(tpot_ms=10.8, weight=weight) for weight in (3.0, 1.0)]
    _, found = decided([stream(key, budget) for key, budget in enumerate(budgets)])
    # one at the full depth and one at exit 6: 3.25 + 2.25 + 3.5 + 1 + 0.5 + 1 = 11.5 ms is too long; both at exit 6: 7.5 ms
    assert exits(found) == {0: 6, 1: 6}
    limits = [Budget(tpot_ms=12.5, weight=weight) for weight in (3.0, 1.0, 1.0)]
    _, found = decided([stream(key, budget) for key, budget in enumerate(limits)])
    # three at the full depth take 11.5 ms, and there is room for 11.58 ms
    assert exits(found) == {0: 8, 1: 8, 2: 8}


def test_streams_that_can_wait_are_left_out_before_depth_is_taken() -> None:
    """Two tokens take 10.75 ms and one takes 10: with 10.3 ms left, the other stream waits for the next round."""
    streams = [stream(0, Budget(tpot_ms=30.0), asked_s=9.9803), stream(1, Budget(tpot_ms=40.0))]
    _, found = decided(streams)
    assert exits(found) == {0: 8} and found.price_ms == pytest.approx(10.0)
    # once it cannot wait for another round, depth is taken instead
    streams[1] = stream(1, Budget(tpot_ms=40.0), asked_s=9.977)
    _, found = decided(streams)
    assert set(exits(found)) == {0, 1} and found.price_ms <= 0.976 * 10.3


def test_a_stream_without_a_target_is_not_starved() -> None:
    """The tight stream needs every round's time for its depth; the other one still gets a token every few rounds."""
    state, now_s, last, served = SETTLED, 10.0, None, []  # type: CompanyState, float, Measurement | None, list[float]
    asked = {0: now_s, 1: now_s}
    for _ in range(60):
        streams = [stream(0, Budget(tpot_ms=10.4), asked_s=asked[0]), stream(1, asked_s=asked[1])]
        state, found = decided(streams, state, now_s=now_s, last=last)
        now_s += found.price_ms / 1000
        last = Measurement(SMALL.exits[found.deepest], found.price_ms, found.price_ms)
        for key in exits(found):
            asked[key] = now_s
        if 1 in exits(found):
            served.append(now_s)
    gaps = [1000 * (b - a) for a, b in itertools.pairwise(served)]
    assert len(served) >= 12 and max(gaps) <= 60


def test_the_newest_of_the_least_weight_give_their_targets_up() -> None:
    """Four at the shallowest exit take 6.1 ms and three 5.75 ms; 5.85 ms are left. Two have to give up, because those that
    have given up still have a place in every round between them."""
    budgets = [Budget(tpot_ms=6.0, weight=w) for w in (1.0, 2.0, 1.0, 2.0)]
    state, found = decided([stream(key, budget) for key, budget in enumerate(budgets)])
    assert [state.streams[key].met for key in range(4)] == [False, True, False, True]
    unmet = {move.key: move.decision for move in found.moves}.get(2)
    if unmet is not None:
        assert unmet.infeasible and "infeasible in this company: tpot_ms = 6" in unmet.reason
    assert not any(move.decision.infeasible for move in found.moves if move.key in {1, 3})


def test_targets_out_of_reach_are_given_up_in_few_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen ask for 16 ms, and their shallowest round takes 19: eleven give up. A search for each of those that are left, for
    each that gives up, would be 127."""
    searched, search, rows = [0], Goals._goals, (1,) * 4

    def counted(self: Goals, *asked: Any) -> Any:
        searched[0] += 1
        return search(self, *asked)

    monkeypatch.setattr(Goals, "_goals", counted)
    budgets = [Budget(tpot_ms=16.0) for _ in range(16)]
    asked = {"context_length": 200, "stage_rows": rows, "balcony_rows": rows}
    streams = [stream(key, budget, **asked) for key, budget in enumerate(budgets)]
    seen = RoundSeen(tuple(streams), now_s=10.0)
    state, _ = JointController(DEMO, (0.5, 0.6, 0.7, 1.0)).decide(SETTLED, seen)
    assert sum(not one.met for one in state.streams.values()) == 11
    assert searched[0] < 40


def test_a_target_that_nobody_could_hold_drags_nobody_down() -> None:
    """One at 1 ms beside one at 12 ms: the second keeps the depth that it has without the first's target."""
    streams = [stream(0, Budget(tpot_ms=12.0)), stream(1, Budget(tpot_ms=1.0))]
    state, found = decided(streams)
    assert exits(found)[0] == 8 and not state.streams[1].met
    refused = stream(1, Budget(tpot_ms=1.0, on_infeasible="error"))
    _, found = decided([streams[0], refused])
    assert [key for key, _ in found.refused] == [1]
    assert "infeasible in this company: tpot_ms = 1" in found.refused[0][1]
    begun = refused._replace(budget=Budget(tpot_ms=1.0, ttft_ms=500.0, on_infeasible="error"))
    _, found = decided([streams[0], begun])
    assert "infeasible in this company: tpot_ms = 1;" in found.refused[0][1], "its first token was in time"


def test_a_backlog_gets_the_time_that_is_left() -> None:
    """Exit 8 fits; 30 rows of stages 1 and 2 are pending. The chunk fills the round, and the exit is entered at its end."""
    known = CompanyState(SETTLED.slowdown, streams={0: StreamState(0, 2, 50), 1: StreamState(2, 2, 50)})
    behind = stream(0, Budget(tpot_ms=16.0), stage_rows=(1, 30, 30), balcony_rows=(1, 30, 1), context_length=60)
    other = stream(1, Budget(tpot_ms=16.0))
    state, found = decided([behind, other], known)
    assert exits(found) == {0: 4, 1: 8} and found.chunk is not None
    assert found.chunk[:2] == (0, 1) and not found.chunk.balcony
    assert 13 <= found.price_ms <= 0.976 * 16 and state.caught_up
    assert "8 fits, with a backlog" in found.moves[0].decision.reason
    _, found = decided([behind._replace(stage_rows=(1, 1, 3), balcony_rows=(1, 1, 1)), other], known)
    assert exits(found) == {0: 8, 1: 8} and found.chunk is None


def test_lax_streams_step_aside_for_a_backlog() -> None:
    known = CompanyState(SETTLED.slowdown, streams={0: StreamState(0, 2, 50), 1: StreamState(2, 2, 50)})
    behind = stream(0, Budget(tpot_ms=16.0), stage_rows=(1, 30, 30), balcony_rows=(1, 30, 1), context_length=60)
    _, found = decided([behind, stream(1, Budget(tpot_ms=200.0))], known)
    assert set(exits(found)) == {0} and found.chunk is not None and found.chunk.rows > 20


def test_a_pace_is_not_exceeded() -> None:
    paced = stream(0, Budget(max_pace_tps=10.0), asked_s=9.95)
    _, found = decided([paced, stream(1)])
    assert set(exits(found)) == {1}
    _, found = decided([paced])
    assert not found.moves and found.wait_ms == pytest.approx(50.0 - 10.0), "the step takes 10 ms"


def test_a_deadline_leaves_each_token_its_part_of_the_time() -> None:
    """6 of 10 s are left for 60 of 100 tokens, on a device at half its speed; a part is kept for a load that has not begun."""
    budget = Budget(deadline_s=10.0, expected_tokens=100, probability=0.9)
    one = stream(1, budget, made_tokens=40, started_s=6.0, asked_s=9.99)
    found = view_of(one, None, (0, 2), 0.5, now_s=10.0)
    period_ms = 6000 / 60 * (1 - UNSEEN_LOAD * 1.28155)
    assert found.period_ms == pytest.approx(0.5 * period_ms, rel=1e-5)
    assert found.room_ms == pytest.approx(0.5 * (period_ms - 10), rel=1e-5)
    assert view_of(one._replace(made_tokens=100), None, (0, 2), 0.5, now_s=10.0).period_ms == math.inf


def test_admission_says_what_would_be_possible() -> None:
    controller = JointController(SMALL, QUALITY)
    three = RoundSeen(tuple(stream(key, Budget(tpot_ms=6.0)) for key in range(3)), now_s=10.0)
    assert controller.refusal(SETTLED, RoundSeen(three.streams[:2], now_s=10.0), three.streams[2]) is None
    sevens = RoundSeen(tuple(stream(key, Budget(tpot_ms=7.0)) for key in range(3)), now_s=10.0)
    reason = controller.refusal(SETTLED, sevens, stream(9, Budget(tpot_ms=6.0)))
    assert reason is not None
    assert "a round of 4 streams takes 6.12 ms at their shallowest exits" in reason and "tpot_ms = 7 or more" in reason
    assert controller.refusal(SETTLED, sevens, stream(9, Budget(tpot_ms=7.0))) is None, "as it says"
    lax = "a round of 4 streams takes 6.12 ms at their shallowest exits, and another one asked for tpot_ms = 6: wait until"
    for tpot_ms in (5.5, 6.0, 7.0, 1000.0):
        assert lax in str(controller.refusal(SETTLED, three, stream(9, Budget(tpot_ms=tpot_ms))))
    due = Budget(deadline_s=10.125, expected_tokens=29)  # 125 ms for 20 tokens
    reason = controller.refusal(SETTLED, sevens, stream(9, due))
    assert reason is not None and reason.endswith("ms at their shallowest exits: wait, or ask for more time")
    dues = RoundSeen(tuple(stream(key, due) for key in range(3)), now_s=10.0)
    assert "another one asked for deadline_s = 10.1" in str(controller.refusal(SETTLED, dues, stream(9)))
    # what could not be held alone is not the others' fault
    assert controller.refusal(SETTLED, three, stream(9, Budget(tpot_ms=1.0))) is None
    # a first token that comes too late anyway is no reason to break the others' gaps
    late = stream(9, Budget(ttft_ms=1.0, tpot_ms=6.0), made_tokens=0, stage_rows=(40, 40, 40), balcony_rows=(40, 40, 1))
    assert "a round of 4 streams takes 6.12 ms" in str(controller.refusal(SETTLED, three, late))
    overdue = RoundSeen((*three.streams[:2], stream(3, Budget(deadline_s=1.0, expected_tokens=99))), now_s=10.0)
    assert controller.refusal(SETTLED, overdue, stream(9, Budget(tpot_ms=6.0))) is None


def test_rounds_teach_the_slowdown() -> None:
    state = SETTLED
    for _ in range(30):
        last = Measurement(8, 10.0, 17.0)
        state, _ = decided([stream(0, Budget(tpot_ms=40.0)), stream(1)], state, last=last)
    assert state.slowdown.factor == pytest.approx(1.7, rel=0.03)
    assert decided([stream(0)], state, last=Measurement(8, 10.0, math.inf))[0].slowdown == state.slowdown


def test_a_round_to_an_exit_that_is_slower_than_its_price_has_its_true_probability() -> None:
    """Two at the full depth take 10.75 ms by their price and 11.9 by what was measured, of 11.7."""
    slow = SETTLED._replace(slowdown=SETTLED.slowdown._replace(offsets=(0.0, 0.0, 0.1, 0.0)))
    pair = [stream(key, Budget(tpot_ms=11.7)) for key in (0, 1)]
    for _ in range(2):  # the second time there is nothing to weigh
        slow, found = decided(pair, slow)
        assert found.predicted_ms > 11.7 and all(move.decision.probability < 0.5 for move in found.moves)


def test_streams_with_like_targets_stay_together() -> None:
    """One has just stepped and could wait for three rounds; a pass of both costs 0.25 ms a stage more than one."""
    state = SETTLED._replace(streams={key: StreamState(0, 2, 9) for key in (0, 1)})
    behind = {"stage_rows": (1, 40, 40), "balcony_rows": (1, 40, 1), "context_length": 50}
    pair = [stream(0, Budget(tpot_ms=30.0), asked_s=9.988, **behind), stream(1, Budget(tpot_ms=30.0), **behind)]
    _, found = decided(pair, state)
    assert set(exits(found)) == {0, 1} and found.chunk is not None
    lax = pair[1]._replace(budget=Budget(tpot_ms=90.0))
    _, found = decided([pair[0], lax], state)
    assert set(exits(found)) == {0} and found.chunk is not None


def test_a_target_that_was_given_up_is_still_come_close_to() -> None:
    """The newer stream could hold 5.2 ms alone, but not next to a row of the other, whose 100 ms leave time for depth."""
    state, _ = decided([stream(0, Budget(tpot_ms=100.0)), stream(1, Budget(tpot_ms=5.2))])
    assert state.streams[0].met and not state.streams[1].met
    assert (state.streams[0].goal, state.streams[1].goal) == (2, 0)


def test_a_slower_device_gets_new_goals() -> None:
    """Two at the full depth take 10.75 ms, for which 11.4 are left; a third slower, only 7.625 ms fit."""
    pair = [stream(key, Budget(tpot_ms=11.7)) for key in (0, 1)]
    before, _ = decided(pair)
    assert [before.streams[key].goal for key in (0, 1)] == [2, 2]
    after, _ = decided(pair, before._replace(slowdown=before.slowdown._replace(mean=0.3)))
    assert [after.streams[key].goal for key in (0, 1)] == [1, 1]


def test_goals_are_set_again_because_contexts_grow() -> None:
    """Two at the full depth take 22 ms at first and 36 ms after 8,000 tokens: seen at the assignment of round 32."""
    controller, pair = JointController(DEMO, (*QUALITY, 1.0)), [stream(key, Budget(tpot_ms=32.0)) for key in (0, 1)]
    pair = [one._replace(stage_rows=(1,) * 4, balcony_rows=(1,) * 4) for one in pair]
    state, _ = controller.decide(SETTLED, RoundSeen(tuple(pair), now_s=10.0))
    seen = RoundSeen(tuple(one._replace(context_length=8000) for one in pair), now_s=10.0)
    goals = []
    for number in (31, 32):
        state, _ = controller.decide(state._replace(round=number), seen)
        goals.append([state.streams[key].goal for key in (0, 1)])
    assert goals == [[3, 3], [2, 2]]


@pytest.mark.parametrize("goal", [0, 2])
def test_a_stream_in_company_stays_for_its_dwell(goal: int) -> None:
    """Before eight tokens at an exit a goal does not rise, and a deeper goal of before is not entered."""
    pair = [stream(key, Budget(tpot_ms=16.0)) for key in (0, 1)]
    for tokens, risen, exit_layer in ((7, goal, 4), (8, 2, 8)):
        streams = {0: StreamState(0, goal, tokens), 1: StreamState(2, 2, 50)}
        state, found = decided(pair, CompanyState(SETTLED.slowdown, streams=streams))
        assert (state.streams[0].goal, exits(found)[0]) == (risen, exit_layer)


def test_many_rows_of_one_stream_come_in_portions_next_to_the_others() -> None:
    """Forced tokens are rows at the stream's own stages: 40 of them, whole, would make the other stream late."""
    forced = stream(1, stage_rows=(41, 41, 41), balcony_rows=(41, 41, 1))
    _, found = decided([stream(0, Budget(tpot_ms=20.0)), forced])
    assert exits(found) == {0: 8} and found.price_ms <= 20.0
    assert found.chunk is not None and found.chunk.key == 1 and found.chunk.stage == 0 and found.chunk.rows > 10
    _, found = decided([stream(0, Budget(tpot_ms=60.0)), forced])
    assert exits(found) == {0: 8, 1: 8} and found.chunk is None
    # the next portion is of stage 1: that stage 0 has run its rows makes the token none of exit 4
    known = SETTLED._replace(streams={1: StreamState(2, 2, 50)})
    _, found = decided([stream(0, Budget(tpot_ms=20.0)), forced._replace(stage_rows=(1, 41, 41))], known)
    assert exits(found) == {0: 8} and found.chunk is not None and found.chunk.stage == 1
    # two of them, as in a batch with one schema; and rows that are left at a deeper stage of their own
    _, found = decided([stream(0, Budget(tpot_ms=20.0)), forced, forced._replace(key=2)])
    assert exits(found) == {0: 8} and found.price_ms <= 20.0 and found.chunk is not None
    late = stream(1, stage_rows=(1, 1, 41), balcony_rows=(1, 41, 1))
    _, found = decided([stream(0, Budget(tpot_ms=17.0)), late._replace(budget=Budget(min_exit=8))])
    assert exits(found) == {0: 8} and found.chunk is not None and found.chunk.stage == 2
    # a portion that would take many rounds is not worth its first row
    _, found = decided([stream(0, Budget(tpot_ms=13.5)), forced])
    assert set(exits(found)) == {0, 1}
    # rounds with more rows are known to be slower than their price
    slow = SETTLED.slowdown._replace(offsets=(0.0, 0.0, 0.0, 0.2), offset_variances=(1e-4,) * 4)
    _, found = decided([stream(0, Budget(tpot_ms=20.0)), forced], CompanyState(slow))
    assert found.chunk is not None and found.predicted_ms <= 20.0


def test_a_prompt_that_is_due_comes_before_portions_of_others() -> None:
    forced = stream(1, stage_rows=(41, 41, 41), balcony_rows=(41, 41, 1), made_tokens=50)
    urgent = stream(2, Budget(ttft_ms=65.0), made_tokens=0, started_s=10.0, stage_rows=(100, 100, 100),
                    balcony_rows=(100, 100, 1), context_length=0)  # fmt: skip
    _, found = decided([stream(0, Budget(tpot_ms=20.0), made_tokens=50), forced, urgent])
    assert set(exits(found)) == {2}


def test_a_controller_that_has_decided_before_decides_like_a_new_one() -> None:
    """What it keeps of a round must not reach the next one: here the same streams with other pending rows."""
    controller, state = JointController(SMALL, QUALITY), CompanyState()
    for due in (1, 40, 3, 1):
        streams = tuple(stream(key)._replace(stage_rows=(1, due, due), balcony_rows=(due, due, 1)) for key in range(3))
        seen = RoundSeen(streams, now_s=10.0)
        decided_again = JointController(SMALL, QUALITY).decide(state, seen)
        assert repr(controller.decide(state, seen)) == repr(decided_again)
        state = decided_again[0]


def test_a_backlog_leaves_time_for_who_will_ask_in_a_moment() -> None:
    """Nobody who asks has a target, but a reader with one is at its token: 15 ms are left, and the rows take 54."""
    behind = stream(0, stage_rows=(1, 100, 100), balcony_rows=(1, 100, 1), context_length=200)
    known = SETTLED._replace(streams={0: StreamState(0, 2, 50)})
    _, found = decided([behind], known)
    assert exits(found) == {0: 8} and found.chunk is None, "whole, if nobody is there"
    _, found = decided([behind], known, absent_ms=15.0)
    assert exits(found) == {0: 4} and found.chunk is not None and found.price_ms <= 5.0 + 15.0


def test_no_token_pays_for_the_whole_backlog_when_a_ceiling_is_lifted() -> None:
    """800 rows at each of two stages take 400 ms. Rows next to a round take a quarter of a second at most."""
    rows = {"stage_rows": (1, 800, 800), "balcony_rows": (1, 800, 1), "context_length": 900}
    known = SETTLED._replace(streams={key: StreamState(0, 2, 50) for key in (0, 1)})
    _, found = decided([stream(key, Budget(power_w=8.0), **rows) for key in (0, 1)], known)
    assert set(exits(found).values()) == {4} and found.chunk is not None and found.price_ms < 260.0


@pytest.mark.parametrize("known", [None, StreamState(2, 2, 50)])
def test_no_token_pays_for_the_backlog_of_steps_without_the_others(known: StreamState | None) -> None:
    """A stream that was alone, or stepped without the others, is not at the exit of its last round: 400 ms of rows are due."""
    rows = {"stage_rows": (1, 800, 800), "balcony_rows": (1, 800, 1), "context_length": 900}
    state = SETTLED if known is None else SETTLED._replace(streams={0: known})
    alone = LearnedAlone(SETTLED.slowdown, SETTLED.governor)
    streams = [stream(0, Budget(ttft_ms=500.0), **rows), stream(1, Budget(ttft_ms=500.0))]
    _, found = decided(streams, state, learned=alone)
    assert exits(found).get(0) != 8 and found.price_ms < 260.0
