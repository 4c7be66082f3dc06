"""A decision's parts by hand: the exit that an outlook chooses, and the words, one sentence that does not contradict itself."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest

from balcony_edge.budget import Budget
from balcony_edge.control.decision import (
    Because,
    Decision,
    Observation,
    Outlook,
    Stayed,
    device_words,
    expected_words,
)
from balcony_edge.control.governor import Governor

BUDGET = Budget(tpot_ms=160, temperature_c=78)


@pytest.mark.parametrize(
    ("period_ms", "reason"),
    [
        (0.0, "deepest exit within 160 ms (p=0.99)"),
        (150.0, "deepest exit within 160 ms (p=0.99); limited by temperature_c, paced to 6.7 tokens a second"),
        (160.0, "deepest exit within 160 ms (p=0.99); limited by temperature_c, paced to 6.2 tokens a second"),
        (
            1000.0,
            "deepest exit within its ceilings (p=0.99); limited by temperature_c, paced to 1.0 tokens a second, "
            "which gives up tpot_ms = 160",
        ),
    ],
)
def test_a_pace_below_the_target_does_not_claim_the_target(period_ms: float, reason: str) -> None:
    governor = Governor()._replace(binding=("temperature_c",) if period_ms else ())
    words = (Stayed(BUDGET), *device_words(governor, BUDGET, period_ms))
    decision = Decision(30, 5.0, 5.0, 0.99, period_ms=period_ms, words=words)
    assert decision.reason == reason


def test_the_slow_loop_says_each_thing_that_it_knows() -> None:
    budget = Budget(temperature_c=78, critical_temperature_c=90, power_w=5)
    governor = Governor(
        critical_c=91.4, infeasible=("temperature_c", "power_w"), binding=("power_w", "temperature_c"),
        lost=("cpu_utilization", "power_w", "temperature_c"), asked=(("temperature_c", 78), ("power_w", 5)),
    )  # fmt: skip
    assert device_words(governor, budget, 0.0) == (
        "critical_temperature_c = 90: the hottest sensor is at 91 °C",
        "infeasible: temperature_c, power_w out of reach",
        "limited by power_w, temperature_c",
        "no reading for power_w, temperature_c: not held",
    )
    assert device_words(Governor(), budget, 100.0) == ()
    reader, frugal = Budget(energy_j_per_token=1, max_pace_tps=6), Governor(binding=("energy_j_per_token",))
    assert device_words(frugal, reader, 1000 / 6) == ("limited by energy_j_per_token",), "its own pace, with any energy"
    assert device_words(frugal, reader, 200.0) == ("limited by energy_j_per_token, paced to 5.0 tokens a second",)


@pytest.mark.parametrize(
    ("stops", "infeasible", "on_infeasible", "ends"),
    [
        (True, False, "shallowest", True),
        (False, True, "error", True),
        (False, True, "best_effort", False),
        (False, False, "error", False),
    ],
)
def test_a_reply_ends_where_it_must(
    stops: bool, infeasible: bool, on_infeasible: Literal["shallowest", "best_effort", "error"], ends: bool
) -> None:
    decision = Decision(8, stops=stops, infeasible=infeasible)
    assert (decision.refusal(Budget(on_infeasible=on_infeasible)) is not None) is ends


@pytest.mark.parametrize(
    ("made_tokens", "runs", "remaining"), [(0, True, 10), (4, True, 6), (9, True, 1), (10, False, 1), (50, False, 1)]
)
def test_a_deadline_is_for_the_expected_tokens(made_tokens: int, runs: bool, remaining: int) -> None:
    budget = Budget(deadline_s=3, expected_tokens=10)
    seen = Observation(budget, 64, (1,), (1,), made_tokens=made_tokens, started_s=100.0, now_s=101.25)
    assert (seen.deadline_runs, seen.remaining, seen.left_s) == (runs, remaining, 1.75)
    assert not seen._replace(budget=Budget(tpot_ms=10)).deadline_runs


def outlook(now_ms: list[float], room_ms: list[float], **more: Any) -> Outlook:
    values: dict[str, Any] = {"may_enter": [True] * 4, "lowest": 0, "highest": 3, "may_rise": True, **more}
    return Outlook(now_ms=now_ms, steady_ms=values.pop("steady_ms", now_ms), room_ms=room_ms, **values)


PRICES = [10.0, 14.0, 18.0, 22.0]


@pytest.mark.parametrize(
    ("room_ms", "current", "more", "chosen"),
    [
        (30.0, None, {}, 3),
        (22.0, None, {}, 3),  # as long as the room is enough
        (21.9, None, {}, 2),
        (30.0, None, {"highest": 2}, 2),
        (15.0, None, {"lowest": 1}, 1),
        (12.0, None, {"lowest": 1}, 1),  # none fits: the shallowest that is allowed
        (30.0, 1, {}, 3),
        (30.0, 1, {"may_rise": False}, 1),
        (30.0, 1, {"may_enter": [True, True, True, False]}, 2),  # it fits, but leaves too little free
        (30.0, 1, {"may_enter": [False, False, False, False]}, 1),
        (15.0, 3, {}, 1),  # down at once, whatever the dwell
        (15.0, 3, {"may_rise": False, "may_enter": [False] * 4}, 1),
        (18.0, 2, {}, 2),
        (5.0, 2, {}, 0),
    ],
)
def test_the_deepest_exit_that_fits(room_ms: float, current: int | None, more: dict[str, Any], chosen: int) -> None:
    assert outlook(PRICES, [room_ms] * 5, **more).choose(current, "shallowest") == chosen


@pytest.mark.parametrize(
    ("otherwise", "current", "chosen"),
    [("shallowest", 2, 0), ("deepest", 2, 2), ("deepest", None, 3), ("closest", 2, 1)],
)
def test_where_no_exit_fits_the_caller_names_the_choice(
    otherwise: Literal["shallowest", "closest", "deepest"], current: int | None, chosen: int
) -> None:
    # the share of the price for which there is room: 0.8, 13 of 14, 0.5, 0.5
    assert outlook(PRICES, [8.0, 13.0, 9.0, 11.0, 30.0]).choose(current, otherwise) == chosen


def test_the_deeper_of_two_that_are_equally_close() -> None:
    assert outlook(PRICES, [5.0, 7.0, 9.0, 9.0, 30.0]).choose(None, "closest") == 2
    assert outlook(PRICES, [9.0, 7.0, 9.0, 9.0, 30.0], lowest=1).choose(None, "closest") == 2  # exit 0 is not allowed
    assert outlook([0.0] * 4, [-1.0] * 5).choose(None, "closest") == 3  # steps that cost nothing


def test_an_exit_holds_what_its_steady_price_holds() -> None:
    one = outlook([30.0, 14.0, 18.0, 22.0], [20.0] * 5, steady_ms=PRICES)
    assert not one.fits(0) and one.holds(0)  # it only has a backlog
    assert not one.holds(3) and one.holds(3, luck=1.1)
    first = one._replace(first_ms=[25.0] * 4)
    assert not first.holds(0) and first.holds(0, luck=1.2)  # the prompt's rows are no backlog
    assert first.holds(1) and one._replace(first_ms=[30.0] * 4).holds(0)


def because(now: list[float], steady: list[float], chosen: int, current: int | None, **more: Any) -> str:
    made = outlook(now, [20.0] * 5, steady_ms=steady, **more)
    seen = Observation(Budget(tpot_ms=20, dwell_tokens=8), 64, (1,) * 4, (1,) * 4)
    words = (Because(made, (4, 8, 12, 16), chosen, current, seen),)
    return Decision(12, predicted_ms=24.04, probability=0.875, words=words).reason


@pytest.mark.parametrize(
    ("now", "steady", "chosen", "current", "more", "reason"),
    [
        ([24.0] * 4, PRICES, 0, 0, {}, "no exit fits yet: predicted 24.0 ms (p=0.88)"),
        (PRICES, PRICES, 2, 2, {}, "deepest exit within 20 ms (p=0.88)"),
        (PRICES, PRICES, 2, 3, {}, "down to deepest exit within 20 ms (p=0.88)"),
        (PRICES, PRICES, 2, None, {}, "deepest exit within 20 ms (p=0.88)"),
        (PRICES, PRICES, 1, 1, {"may_enter": [True, True, False, True]}, "within 20 ms (p=0.88); 12 leaves too little free"),
        (PRICES, PRICES, 1, 1, {}, "within 20 ms (p=0.88); 12 waits for its dwell"),
        (
            [10.0, 14.0, 29.0, 33.0], PRICES, 1, 1, {},
            "within 20 ms (p=0.88); 12 has a backlog for which there is no time",
        ),
        (PRICES, [10.0, 14.0, 15.0, 16.0], 1, 1, {}, "within 20 ms (p=0.88); 16 has a backlog for which there is no time"),
    ],
)  # fmt: skip
def test_the_reason_names_the_exit_that_was_not_taken(
    now: list[float], steady: list[float], chosen: int, current: int | None, more: dict[str, Any], reason: str
) -> None:
    assert because(now, steady, chosen, current, **more) == reason


@pytest.mark.parametrize(
    ("keys", "made_tokens", "words"),
    [
        ({}, 1, "without a target"),
        ({"power_w": 5}, 1, "within its ceilings"),
        ({"tpot_ms": 12.5, "power_w": 5}, 1, "within 12.5 ms"),
        ({"tpot_ms": 12.5, "ttft_ms": 900}, 1, "within 12.5 ms"),
        ({"tpot_ms": 12.5, "ttft_ms": 900}, 0, "within 12.5 ms and a first token after 900 ms"),
        ({"deadline_s": 3, "expected_tokens": 10}, 9, "within 10 tokens in 3 s"),
        ({"deadline_s": 3, "expected_tokens": 10}, 10, "without a target"),
    ],
)
def test_targets_in_words(keys: dict[str, Any], made_tokens: int, words: str) -> None:
    seen = Observation(Budget(**keys), 64, (1,) * 4, (1,) * 4, made_tokens=made_tokens)
    reason = Because(outlook(PRICES, [math.inf] * 5), (4, 8, 12, 16), 3, 3, seen)
    assert Decision(16, words=(reason,)).reason == f"deepest exit {words} (p=1.00)"


@pytest.mark.parametrize(("period_ms", "words"), [(100.0, "within 30 tokens in 3 s"), (101.0, "within its ceilings")])
def test_a_pace_that_misses_a_deadline_does_not_claim_it(period_ms: float, words: str) -> None:
    budget = Budget(deadline_s=3, expected_tokens=30, power_w=5)
    seen = Observation(budget, 64, (1,) * 4, (1,) * 4, made_tokens=10, now_s=1.0)  # 2 s for 20 tokens
    reason = Because(outlook(PRICES, [math.inf] * 5), (4, 8, 12, 16), 3, 3, seen)
    assert Decision(16, period_ms=period_ms, words=(reason,)).reason == f"deepest exit {words} (p=1.00)"


def test_a_token_after_the_first_says_nothing_of_the_first() -> None:
    assert (
        Decision(16, words=(Stayed(EVERY_TARGET),)).reason == "deepest exit within 20 ms and 50 tokens in 2 s (p=1.00)"
    )


EVERY_TARGET = Budget(tpot_ms=20, ttft_ms=500, deadline_s=2, expected_tokens=50)


@pytest.mark.parametrize(
    ("budget", "made_tokens", "now_ms", "steady_ms", "words"),
    [
        (Budget(tpot_ms=20), 1, 30.0, 25.04, "tpot_ms = 20: a step takes 25.0 ms"),
        (Budget(tpot_ms=0.5), 1, 0.54, 0.54, "tpot_ms = 0.5: a step takes 0.540 ms"),
        (Budget(deadline_s=2, expected_tokens=50), 10, 42.0, 37.5, "deadline_s = 2: 50 tokens take 2.0045 s"),
        # 0.5 s have passed; 300 ms, then 49 × 20 ms
        (EVERY_TARGET, 0, 600.0, 15.0, "ttft_ms = 500: the first token takes 1100.0 ms"),
        (
            EVERY_TARGET, 0, 600.0, 25.0,
            "tpot_ms = 20: a step takes 25.0 ms and deadline_s = 2: 50 tokens take 2.33 s and "
            "ttft_ms = 500: the first token takes 1100.0 ms",
        ),
        (EVERY_TARGET, 10, 15.0, 15.0, "tpot_ms = 20: a step takes 15.0 ms and deadline_s = 2: 50 tokens take 1.1 s"),
        (EVERY_TARGET, 10, 20.0, 40.0, "tpot_ms = 20: a step takes 40.0 ms and deadline_s = 2: 50 tokens take 2.08 s"),
        (
            EVERY_TARGET, 0, 600.0, 20.0,  # a step just within its target
            "deadline_s = 2: 50 tokens take 2.08 s and ttft_ms = 500: the first token takes 1100.0 ms",
        ),
        (EVERY_TARGET, 49, 1500.0, 25.0, "tpot_ms = 20: a step takes 25.0 ms"),  # the last token just within the deadline
        (EVERY_TARGET, 50, 15.0, 15.0, "tpot_ms = 20: a step takes 15.0 ms"),  # the deadline is over
        (
            Budget(deadline_s=2, expected_tokens=50, max_pace_tps=30), 10, 20.0, 15.0,
            "deadline_s = 2: 50 tokens take 1.1 s",  # waits are cut when the time runs out
        ),
    ],
)  # fmt: skip
def test_what_is_missed_is_said_with_its_number(
    budget: Budget, made_tokens: int, now_ms: float, steady_ms: float, words: str
) -> None:
    seen = Observation(budget, 64, (1,) * 4, (1,) * 4, made_tokens=made_tokens, started_s=10.0, now_s=10.5)
    assert expected_words(seen, now_ms, steady_ms, steady_ms) == words
