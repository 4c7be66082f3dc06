"""What the controller returns: every field of a decision, and the state that the next token starts from."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import pytest

from balcony_edge.budget import Budget
from balcony_edge.control.catching_up import HELD, Recovery
from balcony_edge.control.controller import Controller, ControllerState
from balcony_edge.control.decision import Decision, Observation
from balcony_edge.control.governor import Governor
from balcony_edge.control.slowdown import Slowdown
from balcony_edge.control.step_prices import CONTEXT_STEP
from balcony_edge.device.costs import UnitCost
from balcony_edge.device.readings import Reading
from tests.support.prices import DEMO, SMALL

STEADY = (1, 1, 1)
WATT = (Reading("x", "board", 10.0, watts=1.0),)


def sure(exit_layer: int | None, tokens: int = 100) -> ControllerState:
    """A state whose filter has settled on a slowdown of 1."""
    slowdown = Slowdown(variance=0.0, noise_variance=0.02**2)
    return ControllerState(exit_layer, tokens, catching_up=False, tpot_ms=12.0, slowdown=slowdown)


def test_without_a_target_a_decision_predicts_nothing_and_the_state_starts_over() -> None:
    state = sure(8)._replace(catching_up=True, recovery=Recovery(goal=8))
    after, decision = Controller(SMALL).decide(state, Observation(Budget(), 0, STEADY, STEADY))
    words = ("deepest allowed exit, no target",)
    assert decision == Decision(8, 0.0, 0.0, 1.0, False, None, 0.0, 0.0, words)
    assert after == state._replace(
        tokens_since_switch=1, catching_up=False, tpot_ms=math.inf, recovery=Recovery(goal=None)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"exit_layer": 4},
        {"tokens_since_switch": 7},
        {"catching_up": True},
        {"tpot_ms": 12.0},
        {"recovery": Recovery(goal=8)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_without_a_target_the_short_way_keeps_a_state_that_says_so(change: dict[str, Any]) -> None:
    controller = Controller(SMALL)
    rested = sure(8, tokens=1)._replace(tpot_ms=math.inf)
    kept = controller.shortcut(Budget(), rested, 0, None)
    assert kept is not None and kept[0] is rested  # the same object: nothing is made for a token without a target
    assert controller.shortcut(Budget(), rested._replace(**change), 0, None) == kept


def test_the_short_way_plans_a_budget_that_it_meets_first() -> None:
    budget = Budget(tpot_ms=12)
    stayed = Controller(SMALL).shortcut(budget, sure(8), 0, None)
    assert stayed is not None
    assert stayed[0].tokens_since_switch == 101
    assert stayed[1].exit_layer == 8 and stayed[1].price_ms == 10.0


def test_the_deepest_exit_held_for_long_forgets_earlier_sprints() -> None:
    budget = Budget(tpot_ms=12, max_pace_tps=1000)  # a pace: the decision is weighed
    for exit_layer, tokens, sprints in ((8, HELD, 0), (8, HELD - 1, 3), (6, HELD, 3)):
        state = sure(exit_layer, tokens)._replace(recovery=Recovery(sprints=3))
        seen = Observation(budget, 0, STEADY, STEADY, None, made_tokens=5)
        assert Controller(SMALL).decide(state, seen)[0].recovery.sprints == sprints


@pytest.mark.parametrize(("short", "infeasible"), [((), False), (("power_w",), True)])
def test_a_ceiling_out_of_reach_makes_a_decision_infeasible(short: tuple[str, ...], infeasible: bool) -> None:
    asked = (("power_w", 5.0),)
    state = sure(8)._replace(governor=Governor(ticked_s=9.95, infeasible=short, asked=asked))
    seen = Observation(Budget(power_w=5), 0, STEADY, STEADY, None, 5, 0.0, 10.0, 0.0, WATT)
    decision = Controller(SMALL).decide(state, seen)[1]
    assert decision.infeasible is infeasible
    for other in (Budget(power_w=6), Budget(temperature_c=80)):  # the last tick was for another budget
        assert Controller(SMALL).decide(state, seen._replace(budget=other))[1].infeasible is False


def test_the_next_reply_hears_of_what_is_out_of_reach_from_a_tick_of_its_own() -> None:
    state = sure(8)._replace(governor=Governor(ticked_s=9.95, short_s=1.0, infeasible=("latency",)))
    after = state.for_next_reply().governor
    assert after.infeasible == () and after.short_s == 1.0


def test_what_another_budget_could_not_hold_does_not_end_the_reply() -> None:
    memory = (Reading("p", "process", 10.0, memory_bytes=50_000_000),)
    small, ample = Budget(memory_mb=1), Budget(memory_mb=1e6, on_infeasible="error")
    seen = Observation(small, 0, STEADY, STEADY, None, 5, 0.0, 10.0, 0.0, memory)
    state, decision = Controller(SMALL).decide(sure(8), seen)
    assert decision.infeasible
    _, decision = Controller(SMALL).decide(state, seen._replace(budget=ample, now_s=10.02))
    assert not decision.infeasible and decision.refusal(ample) is None


@pytest.mark.parametrize(("lost", "unseen"), [((), False), (("power_w",), True), (("temperature_c",), False)])
def test_a_decision_says_whether_a_ceiling_of_its_budget_is_unseen(lost: tuple[str, ...], unseen: bool) -> None:
    state = sure(8)._replace(governor=Governor(ticked_s=9.95, lost=lost))
    seen = Observation(Budget(power_w=5), 0, STEADY, STEADY, None, 5, 0.0, 10.0, 0.0, WATT)
    assert Controller(SMALL).decide(state, seen)[1].unseen is unseen
    assert Controller(SMALL).decide(state, seen._replace(budget=Budget(tpot_ms=12)))[1].unseen is False


def test_a_critically_hot_device_stops_the_reply_that_names_the_limit() -> None:
    state = sure(8)._replace(governor=Governor(ticked_s=9.95, critical_c=91.0))
    for limit_c, stops in ((90.0, True), (92.0, False)):
        budget = Budget(temperature_c=80, critical_temperature_c=limit_c)
        seen = Observation(budget, 0, STEADY, STEADY, None, 5, 0.0, 10.0, 0.0)
        assert Controller(SMALL).decide(state, seen)[1].stops is stops


def test_time_of_the_last_switch_is_kept_until_the_next() -> None:
    for exit_layer, switched_s, tokens in ((8, 3.0, 101), (6, 10.0, 1), (None, 3.0, 101)):
        state = sure(exit_layer)._replace(switched_s=3.0)
        seen = Observation(Budget(tpot_ms=12), 0, STEADY, STEADY, None, 5, 0.0, 10.0)
        after, decision = Controller(SMALL).decide(state, seen)
        assert decision.exit_layer == 8
        # the short way leaves the time alone as well
        assert (after.switched_s, after.tokens_since_switch) == (switched_s, tokens)


def test_a_backlog_alone_makes_no_target_infeasible() -> None:
    seen = Observation(Budget(tpot_ms=12, min_exit=8), 0, (1, 1, 101), STEADY, None, made_tokens=5)
    decision = Controller(SMALL).decide(sure(8), seen)[1]
    assert (decision.exit_layer, decision.price_ms, decision.infeasible) == (8, 35.0, False)


def test_the_wait_before_the_first_token_is_taken_off_its_time() -> None:
    # 1,010.3 ms, of which a second has gone: 10.04 with the margin of the filter, and the deepest exit takes 10
    for now_s, exit_layer in ((6.0, 8), (6.001, 6)):
        seen = Observation(Budget(ttft_ms=1010.3), 0, STEADY, STEADY, None, made_tokens=0, started_s=5.0, now_s=now_s)
        assert Controller(SMALL).decide(sure(None), seen)[1].exit_layer == exit_layer


def test_prices_are_those_of_the_context_rounded_down() -> None:
    grows = replace(SMALL, stages=(UnitCost(3.0, 0.25, 10.0), *SMALL.stages[1:]))
    budget, context = Budget(tpot_ms=1e3), 7 * CONTEXT_STEP
    for length in (context, context + CONTEXT_STEP - 1):
        seen = Observation(budget, length, STEADY, STEADY, None, made_tokens=5)
        decision = Controller(grows).decide(sure(8), seen)[1]
        assert decision.price_ms == pytest.approx(grows.steady_ms(8, context))


def test_a_balconys_backlog_is_priced_at_its_context_with_one_query() -> None:
    grows = replace(SMALL, balconies=(UnitCost(1.0, 0.125, 10.0), *SMALL.balconies[1:]))
    rows, context = (5, 1, 1), 7 * CONTEXT_STEP
    seen = Observation(Budget(tpot_ms=1e3, max_exit=4), context, STEADY, rows, None, made_tokens=5)
    decision = Controller(grows).decide(sure(4), seen)[1]
    assert decision.price_ms == pytest.approx(grows.step_ms(4, STEADY, rows, context))


@pytest.mark.parametrize(
    ("left_s", "remaining", "share", "period_ms"),
    [
        (5.0, 100, 0.1, 47.5),  # 20 tokens a second, with a twentieth for jitter
        (0.5, 1, 0.01, 475.0),
        (5.0, 1, 0.1, 100.0),  # there is time: the share of the device alone makes the gap
    ],
)
def test_a_busy_share_leaves_the_pace_that_a_deadline_needs(
    left_s: float, remaining: int, share: float, period_ms: float
) -> None:
    budget = Budget(
        power_w=5,
        deadline_s=10 + left_s,
        expected_tokens=remaining + 1,
        min_exit=8,
        min_pace_tps=0.5,
        priority="latency",
    )
    state = sure(8)._replace(governor=Governor(ticked_s=9.95, share=share))
    seen = Observation(budget, 0, STEADY, STEADY, None, 1, 0.0, 10.0, 0.0, WATT)
    assert Controller(SMALL).decide(state, seen)[1].period_ms == pytest.approx(period_ms)


@pytest.mark.parametrize(("keys", "idle_ms"), [({}, 40.0), ({"energy_j_per_token": 9.0}, 0.0)])
def test_waits_are_for_pending_rows_unless_each_token_has_its_joules(keys: dict[str, Any], idle_ms: float) -> None:
    seen = Observation(Budget(max_pace_tps=20, **keys), 0, STEADY, STEADY, None, 5, 0.0, 10.0, 0.0, WATT)
    decision = Controller(SMALL).decide(sure(8), seen)[1]
    assert (decision.period_ms, decision.idle_ms) == (50.0, pytest.approx(idle_ms))


@pytest.mark.parametrize(
    "keys",
    [
        {"tpot_ms": 50.0},
        {"tpot_ms": 50.0, "priority": "latency"},
        {"deadline_s": 15.0, "expected_tokens": 105},
        {"min_pace_tps": 20.0},
    ],
)
def test_rows_next_to_a_step_leave_time_for_the_pause_after_it(keys: dict[str, Any]) -> None:
    """Of 50 ms a busy share of a quarter leaves 12.5, of which the step at exit 4 takes 5."""
    state = sure(4)._replace(tpot_ms=50.0, governor=Governor(ticked_s=9.95, share=0.25))
    for rows in (301, 101):  # 101 fit into the target, but not into a quarter of it
        seen = Observation(Budget(power_w=5, **keys), 400, (1, rows, rows), (1, rows, 1), None, 5, 0.0, 10.0, 0.0, WATT)
        decision = Controller(SMALL).decide(state, seen)[1]
        assert decision.exit_layer == 4 and decision.catch_up is not None
        assert decision.period_ms <= 50 and decision.predicted_ms <= 0.25 * decision.period_ms + 1e-9


@pytest.mark.parametrize("keys", [{"tpot_ms": 50.0}, {"min_pace_tps": 20.0}])
def test_the_first_token_of_a_later_turn_runs_the_rows_that_the_turn_before_has_left(keys: dict[str, Any]) -> None:
    """No pause follows it, and a chat with ceilings runs nothing between its turns."""
    state = sure(None)._replace(governor=Governor(ticked_s=9.95, share=0.25))
    seen = Observation(Budget(power_w=5, **keys), 400, (20, 301, 301), (20, 301, 1), None, 0, 10.0, 10.0, 0.0, WATT)
    decision = Controller(SMALL).decide(state, seen)[1]
    assert decision.exit_layer == 8 and decision.period_ms == 0


@pytest.mark.parametrize(
    ("keys", "reading", "waits"),
    [
        ({"battery_floor_percent": 20}, Reading("x", "battery", 10.0, charge=0.25), False),
        ({"battery_floor_percent": 20}, Reading("x", "battery", 10.0, charge=0.25, charging=True), True),
        ({"battery_floor_percent": 20}, Reading("x", "battery", 10.0, charge=0.5), True),
        ({"memory_mb": 100}, Reading("x", "process", 10.0, memory_bytes=97_000_000), False),
        ({"memory_mb": 100}, Reading("x", "process", 10.0, memory_bytes=80_000_000), True),
    ],
)
def test_waits_take_no_charge_and_no_memory_that_less_depth_saves(
    keys: dict[str, Any], reading: Reading, waits: bool
) -> None:
    seen = Observation(Budget(max_pace_tps=20, **keys), 0, STEADY, STEADY, None, 5, 0.0, 10.0, 0.0, (reading,))
    assert (Controller(SMALL).decide(sure(8), seen)[1].idle_ms > 0) is waits


@pytest.mark.parametrize(
    ("keys", "least_ms", "most_ms"),
    [
        ({"energy_j_per_token": 0.008}, 5.0, 8.0),
        ({"energy_j_per_token": 0.015}, 14.0, 15.0),
        ({"energy_j_per_token": 9.0}, 19.0, 20.0),  # two of the deepest steps, as without joules
        ({"energy_j_per_token": 0.015, "power_rail": "gpu"}, 19.0, 20.0),  # nothing measures them
    ],
)
def test_rows_next_to_a_step_take_the_joules_of_a_token(keys: dict[str, Any], least_ms: float, most_ms: float) -> None:
    """The device draws 1 W."""
    seen = Observation(Budget(**keys), 400, (1, 301, 301), (1, 301, 1), None, 5, 0.0, 10.0, 0.0, WATT)
    decision = Controller(SMALL).decide(sure(4), seen)[1]
    assert decision.catch_up is not None and least_ms <= decision.price_ms <= most_ms


@pytest.mark.parametrize(("priority", "period_ms"), [("latency", 47.5), ("limits", 100.0)])
def test_a_busy_share_leaves_the_pace_of_a_gap_if_latency_comes_first(
    priority: Literal["latency", "limits"], period_ms: float
) -> None:
    budget = Budget(power_w=5, tpot_ms=50, min_exit=8, priority=priority)
    state = sure(8)._replace(governor=Governor(ticked_s=9.95, share=0.1))
    seen = Observation(budget, 0, STEADY, STEADY, None, 1, 0.0, 10.0, 0.0, WATT)
    assert Controller(SMALL).decide(state, seen)[1].period_ms == pytest.approx(period_ms)


@pytest.mark.parametrize(("left_ms", "way"), [(300, "8 fits"), (200, "6 fits"), (180, None)])
def test_a_deadline_has_its_time_for_pending_rows_only_once(left_ms: float, way: str | None) -> None:
    """20 tokens at exit 4 take 100 ms, 8 of them at exit 6 or 8 take 16 or 64 more, and the rows before it 75 or 100."""
    budget = Budget(deadline_s=10 + left_ms / 1000, expected_tokens=25, probability=0.5)
    seen = Observation(budget, 400, (1, 201, 201), (1, 201, 1), None, 5, 0.0, 10.0)
    decision = Controller(SMALL).decide(sure(4), seen)[1]
    assert (decision.catch_up is not None) is (way is not None)
    assert way is None or decision.reason.startswith(f"{way}, catching up")


def test_a_deadline_out_of_reach_names_the_time_with_the_context_to_come() -> None:
    """10,000 tokens take 122 s at the price of the next one, and 144 s at that of the middle one, whose context is longer."""
    seen = Observation(Budget(deadline_s=130, expected_tokens=10_005), 64, (1,) * 4, (1,) * 4, made_tokens=5)
    decision = Controller(DEMO).decide(ControllerState.initial(), seen)[1]
    assert decision.infeasible and "deadline_s = 130: 10005 tokens take 144 s" in decision.reason
