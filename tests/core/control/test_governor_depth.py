"""How the slow loop turns charge, memory, energy and a busy share into a depth, one tick at a time."""

from __future__ import annotations

import pytest

from balcony_edge.budget import Budget
from balcony_edge.control.governor import CEILING_DWELL_S, LEAST_SHARE, SETTLING_S, Demand, Governor, govern, paced_ms
from balcony_edge.control.response import GAUGES, Fit, Load
from balcony_edge.device.readings import Reading

STEPS_S = (0.012, 0.014, 0.016, 0.021)
LOWEST, HIGHEST = 0, 3


def tick(budget: Budget, *readings: Reading, before: Governor | None = None, pace_tps: float = 0.0) -> Governor:
    """One tick at second 10."""
    return govern(before or Governor(), Demand(budget, 10.0, 10.0, readings, STEPS_S, LOWEST, HIGHEST, pace_tps))


@pytest.mark.parametrize(
    ("charge", "ceiling", "infeasible"),
    [
        (0.31, 3, ()),  # above the ramp of ten points
        (0.29, 3, ()),  # a ramp has as many parts as there are exits
        (0.26, 2, ()),
        (0.23, 1, ()),
        (0.21, 0, ()),
        (0.20, 0, ("battery_floor_percent",)),  # at the floor no depth is allowed, so the shallowest exit is too deep
    ],
)
def test_charge_above_the_floor_is_a_ramp_of_depth(charge: float, ceiling: int, infeasible: tuple[str, ...]) -> None:
    battery = Reading("b", "battery", 10.0, charge=charge, charging=False)
    after = tick(Budget(battery_floor_percent=20), battery)
    assert (after.ceiling, after.infeasible) == (ceiling, infeasible)


@pytest.mark.parametrize(("charge", "binding"), [(0.29, ()), (0.26, ("battery_floor_percent",))])
def test_a_ramp_that_leaves_all_depth_limits_nothing(charge: float, binding: tuple[str, ...]) -> None:
    battery = Reading("b", "battery", 10.0, charge=charge, charging=False)
    assert tick(Budget(battery_floor_percent=20), battery).binding == binding
    only = Demand(Budget(battery_floor_percent=20), 10.0, 10.0, (battery,), STEPS_S, 2, 2, 0.0)
    assert govern(Governor(), only).binding == (), "there is no depth to take"


def test_a_battery_that_charges_takes_no_depth() -> None:
    battery = Reading("b", "battery", 10.0, charge=0.1, charging=True)
    after = tick(Budget(battery_floor_percent=20), battery)
    assert (after.ceiling, after.infeasible) == (HIGHEST, ())


@pytest.mark.parametrize(
    ("memory_mb", "ceiling", "infeasible"),
    [(94, 3, ()), (97, 2, ()), (98, 1, ()), (99.5, 0, ()), (100, 0, ("memory_mb",))],
)
def test_memory_below_the_ceiling_is_a_ramp_of_depth(
    memory_mb: float, ceiling: int, infeasible: tuple[str, ...]
) -> None:
    process = Reading("p", "process", 10.0, memory_bytes=int(memory_mb * 1e6))
    after = tick(Budget(memory_mb=100), process)
    assert (after.ceiling, after.infeasible) == (ceiling, infeasible)


@pytest.mark.parametrize(
    ("joules", "pace_tps", "ceiling", "infeasible"),
    [
        # 2 W without a step and 6 W more while one runs: unpaced tokens take 0.096, 0.112, 0.128 and 0.168 J
        (0.17, None, 3, ()),
        (0.13, None, 2, ()),
        (0.12, None, 1, ()),
        (0.10, None, 0, ()),
        (0.09, None, 0, ("energy_j_per_token",)),
        # at 25 tokens a second 2 W × 40 ms are spent anyway: 0.152, 0.164, 0.176 and 0.206 J
        (0.17, 25, 1, ()),
        (0.15, 25, 0, ("energy_j_per_token",)),
    ],
)
def test_the_deepest_exit_whose_tokens_are_affordable(
    joules: float, pace_tps: float | None, ceiling: int, infeasible: tuple[str, ...]
) -> None:
    sure = Load(1.0, fits=(Fit(2.0, 6.0, 1e-9, 0.0, 1e-9),) * len(GAUGES))
    budget = Budget(energy_j_per_token=joules, max_pace_tps=pace_tps)
    board = Reading("w", "board", 10.0, watts=8.0)
    after = tick(budget, board, before=Governor(power=sure, rail=budget.power_rail))
    assert (after.ceiling, after.infeasible) == (ceiling, infeasible)


def test_watts_that_are_not_known_yet_make_no_energy_infeasible() -> None:
    """The first guess is the ceiling, 15 W, which is 0.18 J at the shallowest exit. It takes 8 W, which is 0.096 J."""
    budget, state = Budget(power_w=15, energy_j_per_token=0.12), Governor()

    def seen(now_s: float, watts: float) -> Demand:
        board = (Reading("w", "board", now_s, watts=watts),)
        return Demand(budget, now_s, now_s, board, STEPS_S, LOWEST, HIGHEST, 0.0)

    for tenth in range(40):
        state = govern(state, seen(10 + tenth / 10, 2.0 if not tenth else 8.0 + 0.01 * (tenth % 2)))
        assert state.infeasible == ()
    budget = Budget(power_w=15, energy_j_per_token=0.05)
    assert govern(state, seen(14.0, 8.0)).infeasible == ("energy_j_per_token",)


def test_watts_from_before_a_pause_make_no_energy_infeasible_at_once() -> None:
    """Other programs drew 10 W. Replies that are refused at their first token would never learn that they have ended."""
    busy = Load(1.0, fits=(Fit(10.0, 6.0, 1e-4, 0.0, 1e-4),) * len(GAUGES))  # 0.192 J at the shallowest exit
    before, budget = Governor(ticked_s=0.0, power=busy, rail="board"), Budget(energy_j_per_token=0.13)

    def seen(now_s: float, watts: float) -> Demand:
        board = (Reading("w", "board", now_s, watts=watts),)
        return Demand(budget, now_s, now_s, board, STEPS_S, LOWEST, HIGHEST, 0.0, begins=now_s == 3600)

    begun = govern(before, seen(3600.0, 2.0))
    assert begun.infeasible == () and begun.ceiling == LOWEST
    assert govern(begun, seen(3600.0 + SETTLING_S, 16.0)).infeasible == ("energy_j_per_token",)


def test_energy_takes_no_depth_where_nothing_measures_power() -> None:
    after = tick(Budget(energy_j_per_token=0.01))
    assert after.ceiling == HIGHEST and after.lost == ("energy_j_per_token",)
    # nor where its sensor has been lost: what was learned of it may not hold any more
    sure = Load(1.0, fits=(Fit(2.0, 6.0, 1e-9, 0.0, 1e-9),) * len(GAUGES))
    after = tick(Budget(energy_j_per_token=0.01), before=Governor(power=sure, rail="board"))
    assert after.ceiling == HIGHEST and after.lost == ("energy_j_per_token",)


@pytest.mark.parametrize(("since_s", "ceiling"), [(CEILING_DWELL_S - 0.01, 3), (CEILING_DWELL_S, 1)])
def test_a_ceiling_changes_only_after_its_dwell(since_s: float, ceiling: int) -> None:
    process = Reading("p", "process", 10.0, memory_bytes=98_000_000)
    before = Governor(ticked_s=9.9, ceiling=3, changed_s=10.0 - since_s)
    assert tick(Budget(memory_mb=100), process, before=before).ceiling == ceiling


def heat(celsius: float) -> Reading:
    return Reading("t", "cpu", 10.0, celsius=celsius)


@pytest.mark.parametrize(("ceiling", "after"), [(3, 3), (2, 2)])
def test_going_deeper_needs_a_tenth_more_share_than_staying(ceiling: int, after: int) -> None:
    # 40 tokens a second with 5 % free need a share of 0.884 at the deepest exit; the tick allows 0.9
    budget = Budget(temperature_c=60)
    before = Governor(ticked_s=9.9, share=0.9, ceiling=ceiling, integral=0.9, binding=("temperature_c",))
    found = tick(budget, heat(59.5), before=before, pace_tps=40.0)
    assert found.share == pytest.approx(0.9)
    assert found.ceiling == after


@pytest.mark.parametrize(("ceiling", "celsius", "after"), [(3, 59.4, 3), (2, 59.4, 2), (2, 58.9, 3)])
def test_a_ceiling_that_just_leaves_all_the_time_does_not_change_the_depth(
    ceiling: int, celsius: float, after: int
) -> None:
    """50 tokens a second with 5 % free need more than all the time at the deepest exit: it is taken where a tenth is free."""
    before = Governor(ticked_s=9.9, ceiling=ceiling, integral=1.0, binding=("temperature_c",))
    found = tick(Budget(temperature_c=60), heat(celsius), before=before, pace_tps=50.0)
    assert (found.share, found.ceiling) == (1.0, after)


def test_a_key_that_takes_some_depth_is_not_out_of_reach_with_another() -> None:
    """A battery in the middle of its ramp, next to memory at its ceiling, and next to heat that no pace holds."""
    readings = (
        Reading("b", "battery", 10.0, charge=0.25, charging=False),
        Reading("p", "process", 10.0, memory_bytes=10**8),
    )
    found = tick(Budget(battery_floor_percent=20, memory_mb=100), *readings)
    assert found.infeasible == ("memory_mb",) and set(found.binding) == {"battery_floor_percent", "memory_mb"}
    asked = (("temperature_c", 60.0), ("battery_floor_percent", 20.0))
    before = Governor(ticked_s=9.9, share=LEAST_SHARE, short_s=0.0, asked=asked)
    found = tick(Budget(battery_floor_percent=20, temperature_c=60), readings[0], heat(90.0), before=before)
    assert found.infeasible == ("temperature_c",)


@pytest.mark.parametrize(
    ("short_s", "infeasible"), [(10.0 - SETTLING_S + 0.1, ()), (10.0 - SETTLING_S, ("temperature_c",))]
)
def test_a_ceiling_is_infeasible_only_after_it_was_out_of_reach_for_a_while(
    short_s: float, infeasible: tuple[str, ...]
) -> None:
    # the least pace, one token a second, needs a share of 0.012 at the shallowest exit
    asked = (("temperature_c", 60.0),)
    before = Governor(ticked_s=9.9, share=LEAST_SHARE, short_s=short_s, asked=asked)
    found = tick(Budget(temperature_c=60), heat(90.0), before=before)
    assert (found.share, found.ceiling, found.infeasible) == (LEAST_SHARE, 0, infeasible)
    assert tick(Budget(temperature_c=60), heat(20.0), before=before).short_s == pytest.approx(float("inf"))


def test_a_key_at_its_end_is_named_once() -> None:
    """A battery at its floor takes all depth at once, and after a while the slowest pace shows that it is out of reach."""
    battery = Reading("b", "battery", 10.0, charge=0.2, charging=False)
    before = Governor(ticked_s=9.9, share=LEAST_SHARE, short_s=0.0, asked=(("battery_floor_percent", 20.0),))
    assert tick(Budget(battery_floor_percent=20), battery, before=before).infeasible == ("battery_floor_percent",)


@pytest.mark.parametrize(
    ("keys", "gap_ms"), [({}, 1000.0), ({"min_pace_tps": 0.2}, 5000.0), ({"min_pace_tps": 8}, 125.0)]
)
def test_the_slowest_pace_is_reached_by_fast_steps_too(keys: dict[str, float], gap_ms: float) -> None:
    """A hundredth of the time is five tokens of 2 ms a second."""
    budget, state = Budget(battery_floor_percent=20, **keys), Governor()
    battery = Reading("b", "battery", 10.0, charge=0.2, charging=False)
    for _ in range(12):  # half at each tick
        state = govern(state, Demand(budget, 10.0, 10.0, (battery,), (0.002, 0.004), 0, 1, 0.0))
    assert paced_ms(budget, state.share, 2.0, 0.0) == pytest.approx(gap_ms)


@pytest.mark.parametrize(("base", "share", "infeasible"), [(0.5826, 0.006, ()), (0.5846, 0.002, ("cpu_utilization",))])
def test_what_the_slowest_pace_holds_is_held_and_nothing_else(
    base: float, share: float, infeasible: tuple[str, ...]
) -> None:
    """Others leave 0.585 - base of the CPUs; a token of 2 ms a second needs 0.002 of the time, and 0.4 of them in it."""
    known = Load(1.0, fits=(Fit(base, 0.4, 1e-9, 0.0, 1e-9),) * len(GAUGES))
    before = Governor(ticked_s=9.9, share=0.002, cpu=known, short_s=0.0, asked=(("cpu_utilization", 0.6),))
    seen = Reading("c", "cpu", 10.0, utilization=base)
    after = govern(before, Demand(Budget(cpu_utilization=0.6), 10.0, 1.0, (seen,), (0.002, 0.004), 0, 1, 0.0))
    assert (after.share, after.infeasible) == (pytest.approx(share), infeasible)


def test_a_pace_that_the_share_cannot_give_makes_latency_infeasible() -> None:
    before = Governor(
        ticked_s=9.9, share=0.4, short_s=0.0, integral=0.4, binding=("temperature_c",), asked=(("temperature_c", 60.0),)
    )
    found = tick(Budget(temperature_c=60), heat(59.5), before=before, pace_tps=50.0)
    assert found.infeasible == ("latency",)  # 50 tokens a second need a share of 0.6 at the shallowest exit


def test_a_deeper_exit_must_leave_a_part_of_the_energy_free() -> None:
    """Without this, an exit at the edge of its joules comes and goes every second."""
    fits = (Fit(base=2.0, gain=6.0),) * len(GAUGES)
    known = Governor(power=Load(1.0)._replace(fits=fits), rail="board", share=1.0, changed_s=-9.0)
    board = Reading("board", "board", 10.0, watts=8.0)
    most_j = 0.170  # the deepest exit takes 0.168 J; 5 % free would be 0.1615
    assert tick(Budget(energy_j_per_token=most_j), board, before=known._replace(ceiling=3)).ceiling == 3
    assert tick(Budget(energy_j_per_token=most_j), board, before=known._replace(ceiling=2)).ceiling == 2
    assert tick(Budget(energy_j_per_token=0.178), board, before=known._replace(ceiling=2)).ceiling == 3
    # a budget before this one left a shallower ceiling; the only exit that is allowed needs nothing free
    deepest = Demand(Budget(energy_j_per_token=most_j), 10.0, 10.0, (board,), STEPS_S, HIGHEST, HIGHEST, 0.0)
    assert govern(known._replace(ceiling=0), deepest).infeasible == ()
