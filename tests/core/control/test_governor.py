"""The slow loop on hand-made inputs: one tick after another, each number known."""

from __future__ import annotations

import math
from typing import Any

import pytest

from balcony_edge.budget import Budget
from balcony_edge.control.governor import (
    INTEGRAL_S,
    LEAST_SHARE,
    PAUSE_S,
    SETTLING_S,
    Demand,
    Governor,
    govern,
    least_pace_tps,
    needed_tps,
)
from balcony_edge.control.observed import hottest_c, newest, unseen, utilization, watts
from balcony_edge.control.response import GAUGES, Fit, Load, Sample
from balcony_edge.device.readings import Reading

STEPS_S = (0.012, 0.014, 0.016, 0.021)


def demand(budget: Budget, now_s: float, *readings: Reading, **more: Any) -> Demand:
    return Demand(budget, now_s, more.pop("busy_s", now_s), readings, STEPS_S, 0, 3, more.pop("pace_tps", 0.0), **more)


def known(base: float, gain: float, scale: float = 5.0) -> Load:
    """A load that is sure of itself, in units of its scale."""
    return Load(scale, fits=(Fit(base, gain, 1e-6, 0.0, 1e-6),) * len(GAUGES))


def degrees(celsius: float, now_s: float) -> Reading:
    return Reading("t", "cpu", now_s, celsius=celsius)


def test_the_integral_grows_only_while_degrees_bind() -> None:
    budget = Budget(temperature_c=60)
    cool = degrees(57.0, 1.0)  # 2.5 below the set point: half a share of room
    for binding, grows in ((("temperature_c",), True), (("power_w",), False), ((), False)):
        before = Governor(ticked_s=0.0, integral=0.1, share=0.5, binding=binding)
        after = govern(before, demand(budget, 1.0, cool))
        assert after.integral == pytest.approx(0.1 + (0.5 / INTEGRAL_S if grows else 0.0))
    hot = govern(Governor(ticked_s=0.0, integral=0.001, share=0.5), demand(budget, 1.0, degrees(64.5, 1.0)))
    assert hot.integral == 0.0  # it falls whatever binds, to nothing and not below


def test_a_share_falls_by_half_and_rises_by_a_tenth() -> None:
    budget = Budget(temperature_c=60)
    falling = govern(Governor(ticked_s=0.9, share=0.8), demand(budget, 1.0, degrees(80.0, 1.0)))
    assert falling.share == 0.4
    rising = govern(Governor(ticked_s=0.9, share=0.4), demand(budget, 1.0, degrees(30.0, 1.0)))
    assert rising.share == pytest.approx(0.5)
    least = govern(Governor(ticked_s=0.9, share=LEAST_SHARE), demand(budget, 1.0, degrees(80.0, 1.0)))
    assert least.share == LEAST_SHARE


def test_watts_of_another_rail_begin_a_new_filter() -> None:
    learned = Governor(ticked_s=0.9, power=known(0.4, 0.6), rail="board")
    reading = Reading("rapl:0", "cpu", 1.0, watts=3.0)
    same = govern(learned, demand(Budget(power_w=5), 1.0, Reading("x", "board", 1.0, watts=3.0)))
    other = govern(learned, demand(Budget(power_w=5, power_rail="cpu"), 1.0, reading))
    assert same.power is not None and same.power.fits[0].base == 0.4
    assert other.power is not None and other.power.fits == (Fit(),) * len(GAUGES) and other.rail == "cpu"


def test_a_mean_of_watts_is_not_that_of_another_rail_or_of_a_time_without_a_limit() -> None:
    before = Governor(ticked_s=9.0, share=0.7, power=known(0.4, 0.6), rail="board", average_w=90.0)
    asked = demand(Budget(power_w=5, power_rail="cpu"), 10.0, Reading("rapl:0", "cpu", 10.0, watts=3.0))
    fresh = govern(Governor(ticked_s=9.0, share=0.7), asked)
    assert govern(before, asked).average_w == fresh.average_w < 5
    assert math.isnan(govern(before, demand(Budget(temperature_c=60), 10.0, degrees(20.0, 10.0))).average_w)
    assert math.isnan(govern(before, demand(Budget(power_w=5), 10.0)).average_w), "the sensor says nothing"


def test_a_clock_that_goes_back_adds_nothing_to_the_integral() -> None:
    hot = demand(Budget(temperature_c=60), 1.0, degrees(90.0, 1.0))
    assert govern(Governor(ticked_s=100.0, integral=0.4), hot).integral == 0.4


def test_all_parts_of_a_rail_count_and_only_fresh_sensible_ones() -> None:
    two = (Reading("rapl:0", "cpu", 1.0, watts=3.0, joules=10.0), Reading("rapl:1", "cpu", 1.5, watts=4.0, joules=20.0))
    found = watts(two, "cpu", 2.0)
    assert found is not None and (found.value, found.counter) == (7.0, (30.0, 1.5, ("rapl:0", "rapl:1")))
    half = watts((two[0], Reading("rapl:1", "cpu", 1.5, watts=4.0)), "cpu", 2.0)
    assert half == Sample(7.0, counter=None)  # one part without a counter: no sum of joules
    assert watts(two, "cpu", 3.2) == Sample(4.0, counter=(20.0, 1.5, ("rapl:1",)))  # the first is 2.2 s old
    assert watts(two, "gpu", 2.0) is None
    whole = (Reading("ina238:VIN", "board", 1.0, watts=9.0), Reading("ina238:total", "board", 1.0, watts=8.0))
    assert watts(whole, "board", 1.0) == Sample(9.0)  # a board has one figure
    assert watts((Reading("x", "cpu", 1.0, watts=2e5),), "cpu", 1.0) is None


def test_degrees_of_the_hottest_sensible_sensor() -> None:
    readings = [Reading("a", "cpu", 1.0, celsius=c) for c in (40.0, 71.5, 999.0, -273.0)]
    assert hottest_c(readings, 1.0) == 71.5
    assert hottest_c(readings, 9.0) is None
    assert hottest_c([Reading("a", "cpu", 1.0)], 1.0) is None


def test_what_nothing_measures_is_named() -> None:
    budget = Budget(power_w=5, temperature_c=60, cpu_utilization=0.5, memory_mb=100, battery_floor_percent=20)
    assert unseen(budget, (), 1.0) == (
        "power_w", "temperature_c", "cpu_utilization", "battery_floor_percent", "memory_mb",
    )  # fmt: skip
    some = (Reading("a", "board", 1.0, watts=3.0), Reading("b", "cpu", 1.0, utilization=0.0), degrees(0.0, 1.0))
    assert unseen(budget, some, 1.0) == ("battery_floor_percent", "memory_mb")  # a zero is a reading
    assert unseen(Budget(), (), 1.0) == ()
    assert newest(some, "cpu", "utilization", 1.0, 1.0) == some[1]
    assert utilization((Reading("b", "cpu", 1.0, utilization=0.5, own_utilization=2.0),), "cpu", 1.0) == Sample(0.5)


def test_a_ceiling_without_a_reading_to_look_for_is_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was added to budgets only. It would count as held, and no one would be warned."""

    class Wider(Budget):
        npu_utilization: float | None = None

    monkeypatch.setattr("balcony_edge.budget._CEILINGS", ("npu_utilization",))
    assert unseen(Wider(npu_utilization=0.5), (), 1.0) == ("npu_utilization",)
    assert unseen(Wider(), (), 1.0) == ()


def test_joules_a_token_count_the_wait_for_the_pace() -> None:
    reading = Reading("x", "board", 1.0, watts=3.0)
    # 2 W idle and 6 more while a step runs: 0.1 s at 10 tokens a second take 0.2 + 6 × 0.021 = 0.326 J at the full depth
    before = Governor(ticked_s=0.9, power=known(0.4, 1.2), rail="board")
    for joules, ceiling in ((0.33, 3), (0.3, 2), (0.28, 0), (0.2, -1)):
        after = govern(before, demand(Budget(energy_j_per_token=joules, max_pace_tps=10), 1.0, reading))
        assert after.ceiling == max(ceiling, 0)
        assert (after.infeasible == ("energy_j_per_token",)) is (ceiling < 0)
    # a busy share of 0.35 spreads 0.021 s over 0.06: 0.12 + 6 × 0.021 = 0.246 J
    shared = before._replace(share=0.25, ceiling=3, changed_s=-9.0)
    room = Reading("c", "cpu", 1.0, utilization=0.3)  # the filter does not know it yet, and the share rises by a tenth
    for joules, ceiling in ((0.25, 3), (0.2, 2)):
        both = Budget(energy_j_per_token=joules, cpu_utilization=0.9)
        after = govern(shared, demand(both, 1.0, reading, room))
        assert (after.share, after.ceiling) == (pytest.approx(0.35), ceiling)
    # without a pace the step's own joules count: 8 W × 0.021 s = 0.168 J
    assert govern(before, demand(Budget(energy_j_per_token=0.17), 1.0, reading)).ceiling == 3


def test_depth_falls_only_as_far_as_the_pace_of_the_budget_needs() -> None:
    """A share of 0.01 is 0.48 full steps a second (0.021 s), and less than one at any exit."""
    budget = Budget(temperature_c=60, max_pace_tps=0.45)
    after = govern(Governor(ticked_s=0.9, share=0.02), demand(budget, 1.0, degrees(61.0, 1.0)))
    assert after.share == 0.01 and after.ceiling == 3


def test_out_of_reach_is_said_after_the_settling_time() -> None:
    budget = Budget(temperature_c=60, min_pace_tps=40, power_window_s=5.0, power_w=100)
    state, said = Governor(), None
    for tick in range(80):
        now_s = tick / 10
        state = govern(state, demand(budget, now_s, degrees(90.0, now_s), Reading("x", "board", now_s, watts=3.0)))
        if state.infeasible and said is None:
            said = now_s
    assert said == pytest.approx(SETTLING_S, abs=0.6)
    assert state.infeasible == ("temperature_c",)


def test_a_share_of_the_processor_is_held_below_the_limit() -> None:
    # others take 0.2, we would take 0.8: 0.6 × 0.975 leaves 0.385 / 0.8
    before = Governor(ticked_s=0.9, share=0.5, cpu=known(0.2, 0.8, scale=1.0))
    after = govern(before, demand(Budget(cpu_utilization=0.6), 1.0, Reading("b", "cpu", 1.0, utilization=0.6)))
    assert after.share == pytest.approx((0.6 * 0.975 - 0.2) / 0.8)


@pytest.mark.parametrize(
    ("keys", "pace_tps", "least"),
    [
        ({}, 40.0, 1.0),
        ({"min_pace_tps": 5}, 40.0, 5.0),
        ({"max_pace_tps": 0.5}, 40.0, 0.5),
        ({"priority": "latency"}, 40.0, 40.0),
        ({"priority": "latency", "min_pace_tps": 50}, 40.0, 50.0),
    ],
)
def test_the_least_pace(keys: dict[str, Any], pace_tps: float, least: float) -> None:
    assert least_pace_tps(Budget(**keys), pace_tps) == least


def test_our_own_part_tells_others_apart_at_once() -> None:
    load, now_s = Load(1.0), 0.0
    for tick in range(60):
        now_s = tick / 10
        load = load.see(Sample(0.7 + 1e-6 * tick, own=0.3), now_s, 0.5 * now_s)
    # others 0.4, and 0.3 of ours at half the time: 0.6 at full share
    assert load.at(0.0) == pytest.approx(0.4, abs=0.02)
    assert load.at(1.0) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("now_s", "begins", "rested"),
    [
        (10.0 + PAUSE_S + 0.1, True, True),
        (10.0 + PAUSE_S, True, False),
        (10.0 + PAUSE_S + 0.1, False, False),  # a long step is no pause
        (9.0, False, True),  # another clock
        (10.0, False, False),
    ],
)
def test_after_a_pause_ramps_begin_anew(now_s: float, begins: bool, rested: bool) -> None:
    half = Load(5.0)._replace(since_s=9.8, total=3.0, samples=1)
    before = Governor(
        ticked_s=10.0, share=0.1, ceiling=0, changed_s=now_s - 0.1, power=half, cpu=half, gpu=half, short_s=0.0,
        infeasible=("temperature_c",),
    )  # fmt: skip
    after = govern(before, demand(Budget(temperature_c=60), now_s, degrees(20.0, now_s), begins=begins))
    # the device is cool: full share and depth at once, or a tenth more and the depth after its dwell
    assert (after.share, after.ceiling) == ((1.0, 3) if rested else (pytest.approx(0.2), 0))
    assert (after.power, after.cpu, after.gpu) == (half.restarted() if rested else half,) * 3
    assert after.infeasible == () and after.short_s == math.inf


def test_a_pause_forgets_for_how_long_a_ceiling_was_out_of_reach() -> None:
    before = Governor(ticked_s=10.0, share=LEAST_SHARE, short_s=0.0, infeasible=("temperature_c",))
    after = govern(before, demand(Budget(temperature_c=60), 20.0, degrees(90.0, 20.0), begins=True))
    assert (after.short_s, after.infeasible) == (20.0, ())


def test_watts_above_the_windows_are_made_up_for_by_the_next_one() -> None:
    """2 W idle and 3 W more at full share; half a second of the last second was busy, so the device drew 3.5 W."""
    budget = Budget(power_w=4, power_window_s=5)
    load = known(0.4, 0.6)._replace(past=((9.0, 0.0),), since_s=9.0, shown=3.5, shown_s=9.0)
    reading = Reading("x", "board", 10.0, watts=3.5)
    for before_w, more_w in ((4.3, None), (2.0, 0.0), (9.0, -0.396)):  # at most a tenth of the aim, and never above it
        before = Governor(ticked_s=9.0, share=0.7, power=load, rail="board", average_w=before_w)
        after = govern(before, demand(budget, 10.0, reading, busy_s=0.5))
        average_w = 3.5 + (before_w - 3.5) * math.exp(-1 / 5)
        assert after.average_w == pytest.approx(average_w)
        aim_w = 3.96 + (0.5 * (3.96 - average_w) if more_w is None else more_w)
        assert after.share == pytest.approx((aim_w - 2) / 3, abs=0.001)
        assert after.binding == ("power_w",)
    first = govern(Governor(power=load, rail="board"), demand(budget, 10.0, reading, busy_s=0.5))
    assert first.average_w == pytest.approx(2.0)  # before the first tick nothing is known to have run


def test_a_first_reading_of_watts_begins_at_the_ceiling() -> None:
    reading = Reading("x", "board", 1.0, watts=3.0)
    held = govern(Governor(), demand(Budget(power_w=5, energy_j_per_token=1), 1.0, reading)).power
    assert held is not None and held.scale == 5
    counted = govern(Governor(), demand(Budget(energy_j_per_token=1), 1.0, reading)).power
    assert counted is not None and counted.scale == 3.0  # without a ceiling on watts, the reading is the unit
    dark = govern(Governor(), demand(Budget(energy_j_per_token=1), 1.0, Reading("x", "board", 1.0, watts=0.0))).power
    assert dark is not None and dark.scale == 1e-3
    assert govern(Governor(), demand(Budget(), 1.0, reading)).power is None  # nothing asks for watts


@pytest.mark.parametrize(("key", "scope"), [("cpu_utilization", "cpu"), ("gpu_utilization", "gpu")])
def test_each_processor_has_its_own_ceiling(key: str, scope: Any) -> None:
    sure = {"cpu": known(0.1, 0.8, scale=1.0), "gpu": known(0.3, 0.5, scale=1.0)}
    before = Governor(ticked_s=0.9, share=0.55, **sure)
    readings = [Reading(f"{name}:0", name, 1.0, utilization=0.5) for name in ("cpu", "gpu")]
    after = govern(before, demand(Budget(**{key: 0.6}), 1.0, *readings, busy_s=0.4))
    base, gain = (0.1, 0.8) if scope == "cpu" else (0.3, 0.5)
    assert after.share == pytest.approx((0.585 - base) / gain)
    assert after.binding == (key,)
    seen = after.cpu if scope == "cpu" else after.gpu
    assert seen is not None and seen.past == ((1.0, 0.4),)


def test_all_ceilings_that_hold_the_share_are_named() -> None:
    # degrees allow 0.5, the processor 0.51, the GPU 0.9
    before = Governor(
        ticked_s=0.9, share=0.5, cpu=known(0.0, 1.0, scale=1.0), gpu=known(0.0, 1.0, scale=1.0), integral=0.5
    )
    budget = Budget(temperature_c=60, cpu_utilization=0.51 / 0.975, gpu_utilization=0.9 / 0.975)
    readings = (
        degrees(59.5, 1.0),
        Reading("c", "cpu", 1.0, utilization=0.5),
        Reading("g", "gpu", 1.0, utilization=0.5),
    )
    after = govern(before, demand(budget, 1.0, *readings))
    assert after.share == pytest.approx(0.5) and after.binding == ("cpu_utilization", "temperature_c")


def test_an_empty_battery_leaves_the_smallest_share() -> None:
    budget, empty = Budget(battery_floor_percent=20), Reading("bat", "battery", 1.0, charge=0.2, charging=False)
    after = govern(Governor(ticked_s=0.9), demand(budget, 1.0, empty))
    assert (after.share, after.binding) == (0.5, ("battery_floor_percent",))  # half at each tick
    assert govern(Governor(ticked_s=0.9, share=0.015), demand(budget, 1.0, empty)).share == LEAST_SHARE
    nearly = Reading("bat", "battery", 1.0, charge=0.201, charging=False)
    assert govern(Governor(ticked_s=0.9), demand(budget, 1.0, nearly)).share == 1.0  # depth only


@pytest.mark.parametrize("span_s", [0.1, 1.0, 7.0])
def test_the_integral_counts_a_second_at_most(span_s: float) -> None:
    before = Governor(ticked_s=10.0 - span_s, integral=0.5, share=0.5, binding=("temperature_c",))
    after = govern(before, demand(Budget(temperature_c=60), 10.0, degrees(58.5, 10.0)))  # 1 °C of 5 below the set point
    assert after.integral == pytest.approx(0.5 + 0.2 * min(span_s, 1.0) / INTEGRAL_S)
    first = govern(Governor(integral=0.5), demand(Budget(temperature_c=60), 10.0, degrees(61.5, 10.0)))
    assert first.integral == 0.5  # no time has passed before the first tick
    full = before._replace(integral=0.999)
    assert 0.999 < govern(full, demand(Budget(temperature_c=60), 10.0, degrees(59.4975, 10.0))).integral < 1.0


def test_only_a_critical_temperature_that_is_asked_for_is_kept() -> None:
    both = Budget(temperature_c=60, critical_temperature_c=90)
    for budget, celsius, critical_c in (
        (both, 90.0, 90.0),
        (both, 89.9, None),
        (Budget(critical_temperature_c=90), 95.0, 95.0),
        (Budget(temperature_c=60), 95.0, None),
    ):
        after = govern(Governor(), demand(budget, 1.0, degrees(celsius, 1.0)))
        assert after.critical_c == critical_c
        assert after.critical(budget) is (critical_c is not None)


def test_depth_without_pacing_is_all_that_can_give_way() -> None:
    """Without pacing, less than a full share cannot be used: the shallowest exit, and the ceiling is out of reach."""
    budget = Budget(temperature_c=60, pacing=False)
    before = Governor(ticked_s=0.9, share=0.6, integral=0.6, short_s=-SETTLING_S, binding=("temperature_c",))
    before = before._replace(asked=(("temperature_c", 60.0),))
    after = govern(before, demand(budget, 1.0, degrees(59.5, 1.0)))
    assert (after.ceiling, after.infeasible) == (0, ("temperature_c",))
    warm = govern(before, demand(budget, 1.0, degrees(56.0, 1.0)))
    assert (warm.ceiling, warm.infeasible) == (0, ()), "it limits the share, and is held"
    slow = before._replace(short_s=-SETTLING_S, asked=(("temperature_c", 60.0),), share=0.3, integral=0.0)
    late = govern(slow, demand(Budget(temperature_c=60, tpot_ms=20), 1.0, degrees(59.0, 1.0), pace_tps=50.0))
    assert late.infeasible == ("latency",), "the pace that it leaves is too slow"
    first = Budget(temperature_c=60, tpot_ms=20, priority="latency")
    for kept in (first, Budget(temperature_c=60, tpot_ms=20, pacing=False)):
        held = govern(slow, demand(kept, 1.0, degrees(59.0, 1.0), pace_tps=50.0))
        assert held.infeasible == (), "no token waits for longer than its target"
    free = govern(Governor(ticked_s=0.9), demand(budget, 1.0, degrees(30.0, 1.0)))
    assert (free.ceiling, free.infeasible) == (3, ())


def test_the_first_ceiling_is_no_change_and_waits_for_no_dwell() -> None:
    budget, warm = Budget(temperature_c=60, min_pace_tps=40), degrees(56.5, 1.0)
    first = govern(Governor(ticked_s=0.9, share=0.6), demand(budget, 1.0, warm))
    assert (first.ceiling, first.changed_s) == (1, -math.inf)
    later = govern(Governor(ticked_s=0.9, share=0.6, ceiling=3, changed_s=-5.0), demand(budget, 1.0, warm))
    assert (later.ceiling, later.changed_s) == (1, 1.0)
    same = govern(Governor(ticked_s=0.9, share=0.6, ceiling=1, changed_s=-5.0), demand(budget, 1.0, warm))
    assert (same.ceiling, same.changed_s) == (1, -5.0)


@pytest.mark.parametrize(
    ("keys", "out"),
    [
        ({}, False),  # a token a second needs a share of 0.012
        ({"min_pace_tps": 30}, True),  # 0.36 of a share of 0.3
        ({"min_pace_tps": 20}, False),
        ({"priority": "latency"}, True),  # the 40 tokens a second of the targets may not be given up: 0.48
    ],
)
def test_a_share_below_the_least_pace_is_out_of_reach(keys: dict[str, Any], out: bool) -> None:
    before = Governor(ticked_s=0.9, share=0.3, integral=0.3, short_s=-SETTLING_S, binding=("temperature_c",))
    before = before._replace(asked=(("temperature_c", 60.0),))
    after = govern(before, demand(Budget(temperature_c=60, **keys), 1.0, degrees(59.5, 1.0), pace_tps=40.0))
    # Without such a pace the ceiling is kept, and the latency targets are what is missed.
    assert after.infeasible == (("temperature_c",) if out else ("latency",))


def test_what_is_missed_without_any_load_of_ours_is_out_of_reach() -> None:
    """Others alone take 0.7 of the processor: the smallest share is used and does not help."""
    budget, seen = Budget(cpu_utilization=0.5), Reading("c", "cpu", 1.0, utilization=0.7)
    before = Governor(ticked_s=0.9, share=LEAST_SHARE, cpu=known(0.7, 0.3, scale=1.0), short_s=-SETTLING_S)
    before = before._replace(asked=(("cpu_utilization", 0.5),))
    assert govern(before, demand(budget, 1.0, seen)).infeasible == ("cpu_utilization",)
    falling = before._replace(share=0.5)  # on its way down
    assert govern(falling, demand(budget, 1.0, seen)).infeasible == ()


@pytest.mark.parametrize("key", ["battery_floor_percent", "memory_mb"])
def test_no_depth_is_taken_for_what_nothing_measures(key: str) -> None:
    after = govern(Governor(), demand(Budget(**{key: 50}), 1.0))
    assert (after.ceiling, after.lost, after.binding) == (3, (key,), ())
    assert after.unseen(Budget(**{key: 50})) == (key,) and after.unseen(Budget()) == ()


def test_a_reading_of_two_seconds_ago_is_the_oldest_that_counts() -> None:
    reading = Reading("a", "cpu", 1.0, celsius=40.0, watts=3.0, utilization=0.5)
    assert hottest_c([reading], 3.0) == 40.0 and hottest_c([reading], 3.01) is None
    assert watts([reading], "cpu", 3.0) == Sample(3.0) and watts([reading], "cpu", 3.01) is None
    assert newest([reading], "cpu", "utilization", 3.0, 1.0) is reading
    assert newest([reading], "cpu", "utilization", 3.01, 1.0) is None
    assert newest([reading], "gpu", "utilization", 1.0, 1.0) is None


def test_values_at_the_ends_of_their_ranges_are_readings() -> None:
    for celsius, counts in ((-60.0, True), (-61.0, False), (200.0, True), (201.0, False)):
        assert (hottest_c([Reading("a", "cpu", 1.0, celsius=celsius)], 1.0) is not None) is counts
    for value, counts in ((0.0, True), (99_999.0, True), (1e5, False), (-0.1, False)):
        assert (watts([Reading("a", "cpu", 1.0, watts=value)], "cpu", 1.0) is not None) is counts
    assert watts((Reading("a", "cpu", 1.0, watts=0.0),), "cpu", 1.0) == Sample(0.0)
    full = (Reading("a", "gpu", 1.0, utilization=1.1), Reading("b", "gpu", 1.0, utilization=1.0, own_utilization=1.0))
    assert utilization(full, "gpu", 1.0) == Sample(1.0, 1.0)  # the first that is plausible
    assert utilization(full[:1], "gpu", 1.0) is None
    assert utilization((Reading("b", "gpu", 1.0, utilization=0.5, own_utilization=0.0),), "gpu", 1.0) == Sample(
        0.5, 0.0
    )


def test_a_counter_of_a_rail_without_a_finite_value_is_none() -> None:
    for joules, counted in ((20.0, True), (float("inf"), False), (float("nan"), False)):
        found = watts((Reading("rapl:0", "cpu", 1.0, watts=3.0, joules=joules),), "cpu", 1.0)
        assert found is not None and (found.counter is not None) is counted


def test_each_key_is_seen_by_its_own_readings() -> None:
    everything = {
        "power_w": Reading("a", "board", 1.0, watts=3.0),
        "energy_j_per_token": Reading("a", "board", 1.0, watts=3.0),
        "temperature_c": degrees(50.0, 1.0),
        "critical_temperature_c": degrees(50.0, 1.0),
        "gpu_utilization": Reading("g", "gpu", 1.0, utilization=0.5),
        "cpu_utilization": Reading("c", "cpu", 1.0, utilization=0.5),
        "battery_floor_percent": Reading("b", "battery", 1.0, charge=0.5),
        "memory_mb": Reading("p", "process", 1.0, memory_bytes=10**9),
    }
    asked = {"power_w": 5, "energy_j_per_token": 1, "temperature_c": 60, "critical_temperature_c": 90,
             "gpu_utilization": 0.5, "cpu_utilization": 0.5, "battery_floor_percent": 20, "memory_mb": 100}  # fmt: skip
    budget = Budget(**asked)
    assert unseen(budget, tuple(everything.values()), 1.0) == ()
    for key, reading in everything.items():
        others = tuple(other for other in everything.values() if other != reading)
        assert key in unseen(budget, others, 1.0)
        assert key not in unseen(budget, (reading,), 1.0)
    overfull = Reading("b", "battery", 1.0, charge=1.5)
    assert unseen(Budget(battery_floor_percent=20), (overfull,), 1.0) == ("battery_floor_percent",)


def test_what_is_out_of_reach_settles_anew_for_another_value() -> None:
    """A budget that another one replaced has had its five seconds; the new one has not."""
    tired = Governor(ticked_s=9.9, share=LEAST_SHARE, short_s=1.0, asked=(("power_w", 1.0),), infeasible=("power_w",))
    power = Load(1.0)._replace(fits=(Fit(base=8.0, gain=1.0),) * len(GAUGES))
    reading = (Reading("b", "board", 10.0, watts=8.0),)

    def after(power_w: float) -> Governor:
        before = tired._replace(power=power, rail="board")
        return govern(before, Demand(Budget(power_w=power_w), 10.0, 5.0, reading, (0.01, 0.02), 0, 1, 0.0))

    assert after(1.0).infeasible == ("power_w",) and after(1.0).short_s == 1.0
    assert after(2.0).infeasible == () and after(2.0).short_s == 10.0


def test_what_is_out_of_reach_settles_while_other_ceilings_come_and_go() -> None:
    """Rounds of several replies tick with the ceilings of those that ask."""
    state = Governor()
    for number in range(80):
        now_s = number / 10
        budget = Budget(power_w=3) if number % 2 else Budget(power_w=3, memory_mb=1e6)
        seen = Reading("b", "board", now_s, watts=9.0), Reading("p", "process", now_s, memory_bytes=1)
        state = govern(state, demand(budget, now_s, *seen))
    assert "power_w" in state.infeasible


def test_latency_is_out_of_reach_for_who_needs_more_than_the_share_leaves() -> None:
    late = Governor(infeasible=("latency",), pace_tps=10.0)
    due = Budget(deadline_s=9, expected_tokens=90)  # 10 a second at first
    for budget, made, elapsed_s, missed in (
        (Budget(tpot_ms=50), 0, 0.0, ("latency",)),
        (Budget(tpot_ms=200), 0, 0.0, ()),
        (Budget(power_w=3), 0, 0.0, ()),
        (due, 50, 4.0, ()),
        (due, 30, 4.0, ("latency",)),
    ):
        assert late.out_of_reach(budget, needed_tps(budget, made, elapsed_s)) == missed
    old = Governor(infeasible=("power_w",))  # of a trace that did not record what was asked for
    assert old.out_of_reach(Budget(temperature_c=60), 0.0) == ()
