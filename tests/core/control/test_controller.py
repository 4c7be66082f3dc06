"""The controller's single decisions, worked out by hand; test_controller_under_load.py runs it on a simulated device."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from balcony_edge.budget import Budget
from balcony_edge.control.controller import Controller, ControllerState
from balcony_edge.control.decision import CatchUp, Decision, Measurement, Observation
from balcony_edge.control.governor import CEILING_DWELL_S, Governor
from balcony_edge.control.slowdown import Slowdown
from balcony_edge.device.costs import CostModel, UnitCost
from balcony_edge.device.readings import Reading
from balcony_edge.errors import BudgetError
from tests.support.prices import MARGIN, SETTLED_DEVIATION, SMALL

STEADY = (1, 1, 1)


def settled(exit_layer: int | None, tokens: int = 100, tpot_ms: float = 0.0, mean: float = 0.0) -> ControllerState:
    """A state whose filter is sure."""
    slowdown = Slowdown(mean=mean, variance=0.0, noise_variance=SETTLED_DEVIATION**2)
    return ControllerState(exit_layer, tokens, catching_up=False, tpot_ms=tpot_ms or math.inf, slowdown=slowdown)


def decide(
    state: ControllerState,
    budget: Budget,
    stage_rows: tuple[int, ...] = STEADY,
    balcony_rows: tuple[int, ...] = STEADY,
    last: Measurement | None = None,
) -> Decision:
    return Controller(SMALL).decide(state, Observation(budget, 0, stage_rows, balcony_rows, last))[1]


def test_prices_of_the_small_model() -> None:
    assert [SMALL.steady_ms(exit_layer, 0) for exit_layer in SMALL.exits] == [5.0, 7.0, 10.0]


@pytest.mark.parametrize(("room_ms", "exit_layer"), [(10.01, 8), (9.99, 6), (7.01, 6), (6.99, 4), (5.01, 4)])
def test_first_token_takes_the_deepest_exit_that_fits(room_ms: float, exit_layer: int) -> None:
    decision = decide(settled(None), Budget(tpot_ms=room_ms / MARGIN))
    assert (decision.exit_layer, decision.infeasible, decision.catch_up) == (exit_layer, False, None)
    assert decision.price_ms == decision.predicted_ms == SMALL.steady_ms(exit_layer, 0)


def test_a_step_with_a_backlog_is_priced_as_the_model_prices_it() -> None:
    costs = replace(SMALL, switch_ms=0.75)
    for rows, kept in (((1, 3, 3), STEADY), (STEADY, (5, 2, 1)), (STEADY, STEADY)):
        for exit_layer in SMALL.exits:
            seen = Observation(Budget(tpot_ms=1e3, min_exit=exit_layer, max_exit=exit_layer), 0, rows, kept)
            decision = Controller(costs).decide(settled(exit_layer), seen)[1]
            assert decision.price_ms == pytest.approx(costs.step_ms(exit_layer, rows, kept, 0))


@pytest.mark.parametrize(("slowdown", "exit_layer"), [(1.0, 8), (1.5, 8), (1.75, 6), (3.0, 6)])
def test_a_backlog_under_a_ceiling_costs_no_more_than_the_least_pace_allows(slowdown: float, exit_layer: int) -> None:
    """A step of 60 ms at slowdown 1 has room in 100 ms up to slowdown 1.6; without a target it is certain to be in time."""
    seen = Observation(Budget(power_w=8, min_pace_tps=10), 0, (1, 1, 201), STEADY, None)
    decision = Controller(SMALL).decide(settled(6, mean=math.log(slowdown)), seen)[1]
    assert decision.exit_layer == exit_layer and decision.probability == 1.0
    assert decision.predicted_ms <= 100 or exit_layer == 6


def test_probability_is_that_of_the_filter() -> None:
    decision = decide(settled(8, mean=math.log(2)), Budget(tpot_ms=20.8))
    # 10 ms at slowdown 2 against 20.8 ms: ln(1.04) / 0.02 = 1.961 deviations.
    assert decision.predicted_ms == pytest.approx(20.0)
    assert decision.probability == pytest.approx(0.97506, abs=1e-5)
    assert decision.reason == "deepest exit within 20.8 ms (p=0.98)"


def test_free_step_is_always_in_time() -> None:
    free = CostModel((4,), (UnitCost(0.0),), (UnitCost(0.0),), UnitCost(0.0))
    seen = Observation(Budget(tpot_ms=1e-9), 0, (9,), (1,))
    assert Controller(free).decide(ControllerState.initial(), seen)[1].probability == 1.0


def test_first_decision_of_all_is_cautious() -> None:
    assert decide(ControllerState.initial(), Budget(tpot_ms=11)).exit_layer == 6
    assert decide(ControllerState.initial(), Budget(tpot_ms=14)).exit_layer == 8


@pytest.mark.parametrize(
    ("budget", "exit_layer", "reason"),
    [
        (Budget(), 8, "deepest allowed exit, no target"),
        (Budget(max_exit=7), 6, "deepest allowed exit, no target"),
        (Budget(exit_layer=4), 4, "fixed exit"),
    ],
)
def test_without_a_target_one_shot(budget: Budget, exit_layer: int, reason: str) -> None:
    decision = decide(settled(4, tokens=1), budget, stage_rows=(1, 1001, 1001))
    assert (decision.exit_layer, decision.reason, decision.catch_up) == (exit_layer, reason, None)
    assert (decision.probability, decision.infeasible) == (1.0, False)


def test_up_waits_for_the_dwell() -> None:
    budget = Budget(tpot_ms=12, dwell_tokens=8)
    held = decide(settled(4, tokens=7, tpot_ms=12), budget)
    assert held.exit_layer == 4
    assert held.reason == "within 12 ms (p=1.00); 8 waits for its dwell"
    assert decide(settled(4, tokens=8, tpot_ms=12), budget).exit_layer == 8


def test_up_needs_the_hysteresis_but_staying_does_not() -> None:
    budget = Budget(tpot_ms=10.2 / MARGIN)
    below = decide(settled(6, tpot_ms=budget.tpot_ms or 0), budget)
    assert below.exit_layer == 6
    assert below.reason.endswith("; 8 leaves too little free")
    assert decide(settled(8, tpot_ms=budget.tpot_ms or 0), budget).exit_layer == 8
    assert decide(settled(6, tpot_ms=budget.tpot_ms or 0), Budget(tpot_ms=10.6 / MARGIN)).exit_layer == 8


def test_down_at_once() -> None:
    decision = decide(settled(8, tokens=1, tpot_ms=12), Budget(tpot_ms=8))
    assert (decision.exit_layer, decision.infeasible) == (6, False)
    assert decision.reason == "down to deepest exit within 8 ms (p=1.00)"


def test_tighter_target_switches_down_and_looser_one_up_without_dwell() -> None:
    controller = Controller(SMALL)
    state, exits = settled(None), []
    for tpot_ms in (12, 8, 12, 6, 6.1, 12):
        state, decision = controller.decide(state, Observation(Budget(tpot_ms=tpot_ms), 0, STEADY, STEADY))
        exits.append(decision.exit_layer)
    assert exits == [8, 6, 8, 4, 4, 8]
    # A target raised by no more than the hysteresis waits, so that one that creeps up does not make exits flap.
    assert decide(settled(4, tokens=1, tpot_ms=12), Budget(tpot_ms=12.4)).exit_layer == 4


def test_exit_that_the_budget_no_longer_allows_is_left_at_once() -> None:
    assert decide(settled(8, tokens=1), Budget(tpot_ms=12, max_exit=6)).exit_layer == 6
    assert decide(settled(4, tokens=1), Budget(tpot_ms=12, min_exit=5)).exit_layer == 8
    with pytest.raises(BudgetError, match="exit_layer = 5, but this bundle has exits 4, 6, 8"):
        decide(settled(4), Budget(exit_layer=5))


def test_state_of_another_bundle_is_taken_as_a_fresh_one() -> None:
    assert decide(settled(30, tokens=1), Budget(tpot_ms=12)).exit_layer == 8


def test_backlog_that_fits_is_paid_in_one_step() -> None:
    decision = decide(settled(6), Budget(tpot_ms=13 / MARGIN), stage_rows=(1, 1, 9))
    assert (decision.exit_layer, decision.price_ms) == (8, 10.0 + 8 * 0.25)


def test_backlog_that_does_not_fit_becomes_the_largest_chunk() -> None:
    decision = decide(settled(6), Budget(tpot_ms=13 / MARGIN), stage_rows=(1, 1, 101))
    # 13 - 7 = 6 ms free: 3.5 for the first row, 2.5 for ten more.
    assert (decision.exit_layer, decision.catch_up) == (6, CatchUp(stage=2, rows=11))
    assert decision.price_ms == 7.0 + 3.5 + 2.5
    assert decision.reason == "8 fits, catching up 11 rows of stage 2"
    assert decision.probability == pytest.approx(0.9)


def test_shallowest_missing_stage_first_then_the_next_then_the_balcony() -> None:
    budget = Budget(tpot_ms=13 / MARGIN)
    # Stage 2 has input for none of its rows before stage 1 has run.
    assert decide(settled(4), budget, (1, 101, 101)).catch_up == CatchUp(stage=1, rows=25)
    # Two rows at stage 1 are as many as two missing stages leave; stage 2 has 98 more with their input there.
    assert decide(settled(4, tokens=2), budget, (1, 3, 101)).catch_up == CatchUp(stage=2, rows=19)
    # 13 - 5 = 8 ms free: 1 ms and 56 more rows of 0.125 ms through the balcony of the exit 6.
    stuck = Budget(tpot_ms=13 / MARGIN, max_exit=6)
    assert decide(settled(4), stuck, (1, 1, 1), (1, 201, 1)).catch_up == CatchUp(stage=1, rows=57, balcony=True)


def test_chunk_that_only_keeps_pace_is_not_worth_its_price() -> None:
    # 10.6 ms hold exit 8 with the hysteresis (10 <= 10.07), but 10.6 - 7 = 3.6 ms buy a single row of stage 2.
    decision = decide(settled(6), Budget(tpot_ms=10.6 / MARGIN, min_exit=6), stage_rows=(1, 1, 101))
    assert (decision.exit_layer, decision.catch_up) == (6, None)
    assert decision.reason.endswith("; 8 has a backlog for which there is no time")


def test_no_chunk_where_only_the_dwell_is_in_the_way() -> None:
    decision = decide(settled(6, tokens=2, tpot_ms=13), Budget(tpot_ms=13), stage_rows=(1, 1, 5))
    assert (decision.exit_layer, decision.catch_up) == (6, None)


def test_down_pays_the_balcony_and_prefers_one_that_fits() -> None:
    # Exit 6 holds 9 ms, but its balcony has 100 rows pending; exit 4 has none.
    decision = decide(settled(8), Budget(tpot_ms=9 / MARGIN), (1, 1, 1), (1, 101, 1))
    assert (decision.exit_layer, decision.infeasible) == (4, False)
    assert decision.catch_up == CatchUp(stage=1, rows=25, balcony=True)


def test_backlog_of_every_balcony_is_paid_once_and_is_not_infeasible() -> None:
    decision = decide(settled(8), Budget(tpot_ms=9 / MARGIN), (1, 1, 1), (101, 101, 1))
    assert (decision.exit_layer, decision.infeasible, decision.catch_up) == (4, False, None)
    assert decision.reason == "no exit fits yet: predicted 17.5 ms (p=0.00)"


def test_a_deadline_is_priced_at_the_contexts_that_are_still_to_come() -> None:
    grows = replace(SMALL, stages=(UnitCost(3.0, 0.25, 10.0), *SMALL.stages[1:]))
    slowdown = Slowdown(variance=0.0, noise_variance=0.02**2, ratio_variance=0.0)
    state = settled(6)._replace(slowdown=slowdown)
    # 1,000 tokens at 12 ms on average at exit 6 and 15 at exit 8, of which 10 ms a thousand rows are attention
    budget = Budget(deadline_s=12.7, expected_tokens=1001)
    seen = Observation(budget, 0, STEADY, STEADY, None, made_tokens=1)
    assert Controller(grows).decide(state, seen)[1].exit_layer == 6
    assert Controller(SMALL).decide(state, seen)[1].exit_layer == 8


@pytest.mark.parametrize(
    ("mean", "ratio_mean", "exit_layer"),
    [
        (0.0, 1.0, 8),
        (math.log(1.4), 1.0, 6),  # a load that has just begun: the mean of 60 steps does not know it yet
        (0.0, 1.4, 6),  # bursts, of which there is none at the moment
    ],
)
def test_a_deadline_reckons_with_the_worse_of_now_and_the_mean(mean: float, ratio_mean: float, exit_layer: int) -> None:
    slowdown = Slowdown(mean=mean, variance=0.0, noise_variance=0.02**2, ratio_mean=ratio_mean, ratio_variance=0.0)
    state = settled(8)._replace(slowdown=slowdown)
    seen = Observation(Budget(deadline_s=0.85, expected_tokens=101), 0, STEADY, STEADY, None, made_tokens=1)
    assert Controller(SMALL).decide(state, seen)[1].exit_layer == exit_layer


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_deadline_keeps_the_same_share_of_the_rest_free_on_a_slower_device(factor: float) -> None:
    """100 tokens of 5 ms, of which one may be of exit 6: 502 ms, and 7.7 % of 500 ms for a load that has not begun."""
    slowdown = Slowdown(
        mean=math.log(factor), variance=0.0, noise_variance=0.02**2, ratio_mean=factor, ratio_variance=0.0
    )
    for deadline_s, exit_layer in ((0.545, 6), (0.53, 4)):
        budget = Budget(deadline_s=factor * deadline_s, expected_tokens=101)
        seen = Observation(budget, 0, STEADY, STEADY, None, made_tokens=1)
        assert Controller(SMALL).decide(settled(8)._replace(slowdown=slowdown), seen)[1].exit_layer == exit_layer


def test_one_step_that_hung_makes_no_deadline_infeasible() -> None:
    """A step of 5 s instead of 10 ms makes the mean ratio of 60 steps 8.8; 100 tokens of 5 ms have a second left."""
    slowdown = Slowdown(variance=0.0, noise_variance=0.02**2, ratio_variance=0.0)
    budget = Budget(deadline_s=6, expected_tokens=101, on_infeasible="error")
    seen = Observation(budget, 0, STEADY, STEADY, Measurement(8, 10.0, 5000.0), made_tokens=1, now_s=5.0)
    after, decision = Controller(SMALL).decide(settled(8)._replace(slowdown=slowdown), seen)
    assert after.slowdown.ratio_mean == pytest.approx(1 + 499 / 64) and after.slowdown.factor == 1.0
    assert decision.exit_layer == 4 and decision.refusal(budget) is None
    burst = seen._replace(last=None)  # the last steps took three times as long, and 60 of them one and a half times
    state = settled(8)._replace(slowdown=slowdown._replace(mean=math.log(3), ratio_mean=1.5))
    assert Controller(SMALL).decide(state, burst)[1].refusal(budget) is None
    late = burst._replace(now_s=5.6)
    assert "101 tokens take 6.1 s" in (Controller(SMALL).decide(settled(8), late)[1].refusal(budget) or "")


def test_a_ceiling_that_gave_depth_back_is_believed_after_a_second() -> None:
    reading = (Reading("x", "board", 10.0, watts=1.0),)
    for since_s, exit_layer in ((0.5, 4), (CEILING_DWELL_S, 8)):
        state = settled(4)._replace(governor=Governor(ticked_s=9.95, ceiling=2), switched_s=10.0 - since_s)
        seen = Observation(Budget(power_w=5), 0, STEADY, STEADY, None, 5, 0.0, 10.0, 0.0, reading)
        assert Controller(SMALL).decide(state, seen)[1].exit_layer == exit_layer


def test_infeasible_is_said_and_takes_the_shallowest_allowed() -> None:
    decision = decide(settled(8), Budget(tpot_ms=3))
    assert (decision.exit_layer, decision.infeasible) == (4, True)
    assert decision.reason == "infeasible: tpot_ms = 3: a step takes 5.0 ms at the shallowest exit"
    assert decide(settled(8), Budget(tpot_ms=3, min_exit=6, on_infeasible="error")).exit_layer == 6


@pytest.mark.parametrize(("tpot_ms", "infeasible"), [(5.5, False), (4.9, True)])
def test_noise_that_is_not_known_yet_makes_no_target_infeasible(tpot_ms: float, infeasible: bool) -> None:
    """The estimate begins at 10 %, a margin of 14 %; the shallowest exit takes 5 ms, which is a tenth less than asked for."""
    state = settled(4)._replace(slowdown=Slowdown(variance=1e-4, noise_variance=0.1**2))
    decision = decide(state, Budget(tpot_ms=tpot_ms))
    assert (decision.exit_layer, decision.infeasible) == (4, infeasible)
    if not infeasible:
        assert decision.reason == "no exit fits yet: predicted 5.0 ms (p=0.83)"


@pytest.mark.parametrize("made_tokens", [0, 1])
def test_a_target_that_was_held_is_in_reach_after_a_pause(made_tokens: int) -> None:
    """A pause leaves a deviation of 0.05, a margin of 7 %; the shallowest exit takes 5 ms, 4 % less than asked for."""
    budget, sure = Budget(tpot_ms=5.2, on_infeasible="error"), Slowdown(variance=1e-4, noise_variance=0.02**2)
    state = settled(4)._replace(slowdown=sure)
    assert decide(state, budget).reason == "deepest exit within 5.2 ms (p=0.96)"
    seen = Observation(budget, 0, STEADY, STEADY, None, made_tokens=made_tokens)
    decision = Controller(SMALL).decide(state.for_next_reply(), seen)[1]
    assert decision.refusal(budget) is None


@pytest.mark.parametrize(
    "keys", [{"tpot_ms": 10.0}, {"deadline_s": 1.0, "expected_tokens": 100}], ids=["gap", "deadline"]
)
def test_the_load_of_an_earlier_reply_refuses_none(keys: dict[str, Any]) -> None:
    """Where every reply is refused before its first step, nothing is measured, and no reply would ever begin again."""
    budget, controller = Budget(**keys, on_infeasible="error"), Controller(SMALL)
    state = settled(4, mean=math.log(3))  # 15 ms instead of 5 at the shallowest exit
    state = state._replace(slowdown=state.slowdown._replace(ratio_mean=3.0)).for_next_reply()
    for made in range(4):
        last = Measurement(4, 5.0, 5.0) if made > 1 else None  # the load has ended
        state, decision = controller.decide(state, Observation(budget, 0, STEADY, STEADY, last, made_tokens=made))
        assert decision.refusal(budget) is None
    assert state.slowdown.factor == pytest.approx(1.0, abs=0.1)


def test_a_load_that_goes_on_refuses_a_reply_after_two_measured_steps() -> None:
    budget, state = Budget(tpot_ms=10.0, on_infeasible="error"), settled(4, mean=math.log(3)).for_next_reply()
    seen = Observation(budget, 0, STEADY, STEADY, Measurement(4, 5.0, 15.0), made_tokens=2)
    assert Controller(SMALL).decide(state, seen)[1].refusal(budget) is None
    assert Controller(SMALL).decide(state, seen._replace(made_tokens=3))[1].refusal(budget) is not None


def test_forced_tokens_measure_nothing() -> None:
    """A structure may force six tokens with the first: the reply then has no measured step, and nothing was learned."""
    budget, state = Budget(tpot_ms=10.0, on_infeasible="error"), settled(4, mean=math.log(3)).for_next_reply()
    seen = Observation(budget, 0, STEADY, STEADY, None, made_tokens=7, forced_tokens=6)
    assert Controller(SMALL).decide(state, seen)[1].refusal(budget) is None
    assert Controller(SMALL).decide(state, seen._replace(forced_tokens=4))[1].refusal(budget) is not None


@pytest.mark.parametrize(
    ("budget", "infeasible"),
    [  # the prompt takes 755 ms at the shallowest exit, though a step takes 5
        (Budget(ttft_ms=100), "ttft_ms = 100: the first token takes 755.0 ms"),
        (Budget(ttft_ms=100, tpot_ms=50), "ttft_ms = 100: the first token takes 755.0 ms"),
        (Budget(ttft_ms=790), ""),
        (Budget(ttft_ms=790, tpot_ms=3), "tpot_ms = 3: a step takes 5.0 ms"),
        (
            Budget(ttft_ms=100, tpot_ms=3),
            "tpot_ms = 3: a step takes 5.0 ms and ttft_ms = 100: the first token takes 755.0 ms",
        ),
        (Budget(deadline_s=0.7, expected_tokens=5), "deadline_s = 0.7: 5 tokens take 0.775 s"),
        (Budget(deadline_s=1.0, expected_tokens=5), ""),
    ],
)
def test_a_prompt_that_no_exit_can_take_in_time_is_infeasible(budget: Budget, infeasible: str) -> None:
    seen = Observation(budget, 2000, (2001,) * 3, (2001,) * 3, None, made_tokens=0)
    decision = Controller(SMALL).decide(settled(None), seen)[1]
    assert (decision.exit_layer, decision.infeasible) == (4, bool(infeasible))
    wanted = f"infeasible: {infeasible} at the shallowest exit" if infeasible else "deepest exit within "
    assert decision.reason.startswith(wanted)


@pytest.mark.parametrize("on_infeasible", ["shallowest", "best_effort"])
def test_a_ceiling_that_takes_depth_takes_no_more_than_that(on_infeasible: str) -> None:
    budget = Budget(power_w=5, on_infeasible=on_infeasible)
    state = settled(8)._replace(governor=Governor(ticked_s=0.0, ceiling=1))
    decision = decide(state, budget, STEADY, (501, 501, 1))
    assert decision.exit_layer == 6 and decision.price_ms > 2 * 10  # the balconies lag behind alike


@pytest.mark.parametrize("measured_ms", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_measurement_that_cannot_be_is_ignored_and_said(measured_ms: float) -> None:
    state = settled(8)
    observation = Observation(Budget(tpot_ms=12), 0, STEADY, STEADY, Measurement(8, 10.0, measured_ms))
    after, decision = Controller(SMALL).decide(state, observation)
    assert after.slowdown == state.slowdown.for_exits(3)
    assert decision.reason == f"deepest exit within 12 ms (p=1.00); measurement of {measured_ms:g} ms at exit 8 ignored"


@pytest.mark.parametrize("last", [Measurement(8, 0.0, 5.0), Measurement(8, math.nan, 5.0), Measurement(7, 5.0, 5.0)])
def test_prediction_or_exit_that_cannot_be_is_ignored(last: Measurement) -> None:
    assert decide(settled(8), Budget(tpot_ms=12), last=last).reason.endswith("ignored")
