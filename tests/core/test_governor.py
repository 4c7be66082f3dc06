"""The slow loop on hand-made inputs: one tick after another, each number known."""

from __future__ import annotations

from typing import Any

import pytest

from balcony_edge.budget import Budget
from balcony_edge.control.governor import (
    CEILING_DWELL_S,
    INTEGRAL_S,
    LEAST_SHARE,
    SETTLING_S,
    Demand,
    Governor,
    govern,
    least_pace_tps,
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


def test_all_parts_of_a_rail_count_and_only_fresh_sensible_ones() -> None:
    two = (Reading("rapl:0", "cpu", 1.0, watts=3.0, joules=10.0), Reading("rapl:1", "cpu", 1.5, watts=4.0, joules=20.0))
    found = watts(two, "cpu", 2.0)
    assert found is not None and (found.value, found.counter) == (7.0, (30.0, 1.5, ("rapl:0", "rapl:1")))
    half = watts((two[0], Reading("rapl:1", "cpu", 1.5, watts=4.0)), "cpu", 2.0)
    assert half == Sample(7.0, counter=None)  # one part without a counter: no sum of joules
    assert watts(two, "cpu", 4.2) == Sample(4.0, counter=(20.0, 1.5, ("rapl:1",)))  # the first is 3.2 s old
    assert watts(two, "gpu", 2.0) is None
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


def test_joules_a_token_count_the_wait_for_the_pace() -> None:
    reading = Reading("x", "board", 1.0, watts=3.0)
    # 2 W idle and 6 more while a step runs: 0.1 s at 10 tokens a second take 0.2 + 6 × 0.021 = 0.326 J at the full depth
    before = Governor(ticked_s=0.9, power=known(0.4, 1.2), rail="board")
    for joules, ceiling in ((0.33, 3), (0.3, 2), (0.28, 0), (0.2, -1)):
        after = govern(before, demand(Budget(energy_j_per_token=joules, max_pace_tps=10), 1.0, reading))
        assert after.ceiling == max(ceiling, 0)
        assert (after.infeasible == ("energy_j_per_token",)) is (ceiling < 0)
    # without a pace the step's own joules count: 8 W × 0.021 s = 0.168 J
    assert govern(before, demand(Budget(energy_j_per_token=0.17), 1.0, reading)).ceiling == 3


def test_depth_falls_with_a_dwell_where_the_pace_may_not() -> None:
    budget = Budget(temperature_c=60, min_pace_tps=40)
    # a share of 0.6 is 29 full steps a second and 43 at exit 1 (0.014 s)
    warm = degrees(56.5, 1.0)
    after = govern(Governor(ticked_s=0.9, share=0.6), demand(budget, 1.0, warm))
    assert after.share == pytest.approx(0.6) and after.ceiling == 1
    recent = Governor(ticked_s=0.9, share=0.6, ceiling=3, changed_s=1.0 - 0.9 * CEILING_DWELL_S)
    assert govern(recent, demand(budget, 1.0, warm)).ceiling == 3
    # going deeper again takes a tenth more: 0.6 holds exit 1 (0.56), and 0.57 would not take it from exit 0
    shallow = Governor(ticked_s=0.9, share=0.57, ceiling=0, changed_s=0.0)
    assert govern(shallow, demand(budget, 1.5, degrees(56.65, 1.5))).ceiling == 0


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


def test_a_battery_takes_depth_near_its_floor_unless_it_is_fed() -> None:
    budget = Budget(battery_floor_percent=20)
    for charge, charging, ceiling in ((0.5, False, 3), (0.26, False, 2), (0.21, False, 0), (0.21, True, 3)):
        reading = Reading("bat", "battery", 1.0, charge=charge, charging=charging)
        assert govern(Governor(), demand(budget, 1.0, reading)).ceiling == ceiling
    empty = govern(Governor(), demand(budget, 1.0, Reading("bat", "battery", 1.0, charge=0.2, charging=False)))
    assert empty.infeasible == ("battery_floor_percent",)


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
