"""How readings follow our busy share: gauges that are late, average, or show a value for seconds; ceilings out of reach."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from balcony_edge.budget import Budget
from balcony_edge.control.controller import Controller, ControllerState
from balcony_edge.control.decision import Observation
from balcony_edge.control.governor import Governor
from balcony_edge.control.response import GAUGES, Counter, Load, Sample
from balcony_edge.device.costs import CostModel, UnitCost
from balcony_edge.device.readings import Reading
from balcony_edge.errors import BudgetError, InfeasibleError
from balcony_edge.simulation.loads import parse_load
from balcony_edge.simulation.plant import Physics, Plant
from balcony_edge.simulation.simulate import SimulatedToken, simulate
from tests.support.prices import windows_w

#: Nearly the demo model's prices, without attention, so that a step takes as long at the end of a run as at its beginning.
COSTS = CostModel(
    exits=(14, 17, 20, 30),
    stages=(UnitCost(8.4, 0.34), UnitCost(1.8, 0.07), UnitCost(1.8, 0.07), UnitCost(6.0, 0.24)),
    balconies=(UnitCost(0.6), UnitCost(0.6), UnitCost(0.6), UnitCost(0.05)),
    head=UnitCost(3.0),
)


def run(
    budget: Budget, device: Physics, seconds: float, load: str = "idle", costs: CostModel = COSTS
) -> list[SimulatedToken]:
    return simulate(costs, Plant(costs, device, parse_load(load)), budget, tokens=10**6, seconds=seconds)


@pytest.mark.parametrize("load", ["idle", "square:high=1.5,period_s=20"])
@pytest.mark.parametrize(
    "gauge",
    [
        {},
        {"gauge_delay_s": 0.5},
        {"gauge_delay_s": 1.0},
        {"gauge_delay_s": 2.0},
        {"gauge_period_s": 1.0},
        {"gauge_average_s": 1.0},
        {"gauge_average_s": 2.0},
        {"gauge_delay_s": 0.5, "gauge_average_s": 1.0, "gauge_period_s": 0.5},
    ],
    ids=str,
)
def test_watts_are_held_whatever_the_gauge_does_to_them(gauge: dict[str, float], load: str) -> None:
    """Matched against the present share, a delay of a second made the gaps jump between 35 and 1,000 ms."""
    tokens = run(Budget(power_w=6), Physics(noise=0.03, **gauge), 60, load)
    shares = [watts / 6 for watts in windows_w(tokens, after_s=15)]
    assert min(shares) >= 0.95 and max(shares) <= 1.05
    gaps = [token.latency_ms for token in tokens if token.time_s > 15]
    assert max(gaps) <= 2 * sum(gaps) / len(gaps)


@pytest.mark.parametrize("gauge", [{"gauge_period_s": p, "gauge_average_s": p} for p in (4.0, 5.0, 10.0)], ids=str)
def test_a_battery_gauge_that_changes_every_few_seconds_is_followed(gauge: dict[str, float]) -> None:
    tokens = run(Budget(power_w=6), Physics(noise=0.03, **gauge), 90)
    shares = [watts / 6 for watts in windows_w(tokens, after_s=30)]
    assert min(shares) >= 0.9 and max(shares) <= 1.05


@pytest.mark.parametrize(("delay_s", "average_s"), [(0.0, 0.0), (1.0, 0.0), (2.0, 1.0), (0.0, 2.0)])
def test_the_gauge_is_found_by_what_it_predicts(delay_s: float, average_s: float) -> None:
    def busy(time_s: float) -> float:
        """Seconds busy until then: a share of 1, 0.2, 1, ... for three seconds each."""
        whole, rest = divmod(max(time_s, 0.0), 6.0)
        return whole * 3.6 + min(rest, 3.0) + 0.2 * max(rest - 3.0, 0.0)

    load, now_s = Load(5.0), 0.0
    while now_s < 40:
        end_s = now_s - delay_s
        span_s = max(average_s, 0.1)
        share = (busy(end_s) - busy(end_s - span_s)) / span_s
        load = load.see(Sample(2.0 + 6.0 * share + 1e-6 * now_s), now_s, busy(now_s))
        now_s += 0.1
    assert abs(sum(GAUGES[load.best]) - delay_s - average_s) <= 0.5
    assert load.at(0.5) == pytest.approx(5.0, rel=0.03)
    assert load.share_within(5.0) == pytest.approx(0.5, abs=0.03)


def test_a_load_remembers_when_we_were_busy() -> None:
    load = Load(1.0)
    for step in range(201):
        load = load.see(Sample(float(step)), step / 10, min(step / 10, 12.0))  # busy until second 12
    assert load.share(11.0, 12.0) == pytest.approx(1.0, abs=0.1)  # known to 0.2 s
    assert load.share(11.5, 12.5) == pytest.approx(0.5, abs=0.05)
    assert load.share(13.0, 20.0) == 0.0
    assert load.share(-3.0, -1.0) == 0.0  # before what is known
    assert len(load.past) < 80
    again = load.see(Sample(1.0), 5.0, 12.0)  # another clock: nothing of what was when
    assert again.past == ((5.0, 12.0),) and again.since_s == 5.0


def test_another_clock_loses_no_more_than_when_things_were() -> None:
    load = Load(5.0)
    for step in range(40):
        load = load.see(Sample(3.0 + step % 2), 1000 + step / 10, 1000 + step / 20)
    learned = load.fits
    for step in range(40):
        load = load.see(Sample(3.0 + step % 2), step / 10, step / 20)
    assert load.fits != learned and load.past[-1][0] == pytest.approx(3.9)


def test_our_part_of_a_gauge_that_holds_its_value_is_the_one_of_that_value() -> None:
    """Others take 0.1; we take all of the rest of our busy time, which changes every two seconds."""
    load, busy = Load(1.0), 0.0
    for tick in range(600):
        second = tick // 10
        share = 0.8 if second // 2 % 2 else 0.2
        shown = 0.8 if (second - 1) // 2 % 2 else 0.2  # of the second before
        load = load.see(Sample(0.1 + shown + 1e-9 * second, own=shown), tick / 10, busy)
        busy += share / 10
    assert load.at(0.0) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    ("before", "after", "mean_w"),
    [
        (Counter(10.0, 1.0, ("a", "b")), Counter(16.0, 3.0, ("a", "b")), 3.0),
        (Counter(10.0, 1.0, ("a", "b")), Counter(16.0, 3.0, ("a",)), None),  # a part that is gone
        (Counter(10.0, 1.0, ("a",)), Counter(16.0, 1.0, ("a",)), None),
        (Counter(10.0, 1.0, ("a",)), Counter(9.0, 2.0, ("a",)), None),
        (Counter(10.0, 1.0, ("a",)), Counter(10.0, 2.0, ("a",)), 0.0),
        (Counter(10.0, 1.0, ("a",)), Counter(10.5, 2.0, ("a",)), 0.5),
        (Counter(0.0, 1.0, ("a",)), Counter(99_999.0, 2.0, ("a",)), 99_999.0),
        (Counter(0.0, 1.0, ("a",)), Counter(100_000.0, 2.0, ("a",)), None),  # more than any device draws
        (None, Counter(9.0, 2.0, ("a",)), None),
    ],
)
def test_mean_watts_of_counters_that_compare(before: Counter | None, after: Counter, mean_w: float | None) -> None:
    assert after.mean(before) == mean_w


@pytest.mark.parametrize("window_s", [5.0, 20.0])
def test_a_device_that_rested_draws_no_more_than_its_ceiling(window_s: float) -> None:
    """Windows before a reply were idle, and those of the reply may not make up for them. The first reply learns the watts."""
    budget = Budget(power_w=5, power_window_s=window_s)
    plant = Plant(COSTS, Physics(), parse_load("idle"), prompt_tokens=1)
    controller, state, marks = Controller(COSTS), ControllerState.initial(), [(0.0, 0.0)]
    for _ in range(2):
        plant.wait(60)
        state, begin_s, marks = state.for_next_reply(), plant.now_s, [(plant.now_s, plant.joules)]
        plant.emitted_s = begin_s
        while plant.now_s < begin_s + 30:
            rows, made = plant.rows_due(), len(marks) - 1
            seen = Observation(
                budget, plant.length, *rows, None, made, begin_s, plant.now_s, plant.busy_s, plant.readings
            )
            state, decision = controller.decide(state, seen)
            plant.step(decision.exit_layer, period_ms=decision.period_ms, idle_ms=decision.idle_ms)
            marks.append((plant.now_s, plant.joules))
    for begin_s, begin_j in marks:
        end = next((mark for mark in marks if mark[0] >= begin_s + window_s), None)
        if end is not None:
            assert 0.95 * 5 <= (end[1] - begin_j) / (end[0] - begin_s) <= 5


# --- What no share holds. -----------------------------------------------------------------------------------------

FAST = replace(
    COSTS,
    stages=tuple(UnitCost(unit.first_row_ms / 4, unit.marginal_row_ms / 4) for unit in COSTS.stages),
    head=UnitCost(0.7),
)


@pytest.mark.parametrize("costs", [COSTS, FAST], ids=["slow", "fast"])
@pytest.mark.parametrize("power_w", [1.0, 1.9])
def test_a_ceiling_below_the_idle_device_is_out_of_reach(power_w: float, costs: CostModel) -> None:
    tokens = run(Budget(power_w=power_w), Physics(idle_w=2.0), 30, costs=costs)
    first = next(token for token in tokens if token.decision.infeasible)
    assert 5 <= first.time_s <= 11  # at the slowest pace a token takes a second
    assert "infeasible: power_w out of reach" in first.decision.reason
    assert all(token.decision.infeasible for token in tokens if token.time_s > 11)
    with pytest.raises(InfeasibleError, match="power_w out of reach"):
        run(Budget(power_w=power_w, on_infeasible="error"), Physics(idle_w=2.0), 30, costs=costs)


def test_a_ceiling_just_within_reach_is_none() -> None:
    tokens = run(Budget(power_w=2.3), Physics(idle_w=2.0), 30, costs=FAST)
    assert not any(token.decision.infeasible for token in tokens)


def _summer(device: Physics, begin_s: float, end_s: float, **hot: Any) -> tuple[Plant, Budget]:
    """A plant whose surroundings change for a while: the load is where it is told the time."""
    holder: list[Plant] = []

    def load(now_s: float) -> float:
        if holder:
            holder[0].physics = replace(device, **hot) if begin_s <= now_s < end_s else device
        return 1.0

    holder.append(Plant(COSTS, device, load))
    return holder[0], Budget(temperature_c=60)


@pytest.mark.parametrize("hot", [{"ambient_c": 55.0}, {"kelvin_per_watt": 30.0}], ids=["ambient", "fan"])
def test_heat_that_nothing_holds_is_said_and_is_over_when_it_is_over(hot: dict[str, float]) -> None:
    plant, budget = _summer(Physics(), 60, 260, **hot)
    tokens = simulate(COSTS, plant, budget, tokens=10**6, seconds=500)
    assert not any(token.decision.infeasible for token in tokens if token.time_s < 60)
    late = [token for token in tokens if 160 < token.time_s < 260]
    assert late and all("infeasible: temperature_c out of reach" in token.decision.reason for token in late)
    after = [token for token in tokens if token.time_s > 400]
    assert {token.decision.exit_layer for token in after} == {30}
    assert not any(token.decision.infeasible for token in after)
    assert max(token.celsius for token in after) <= 61


def test_a_critical_temperature_ends_the_reply() -> None:
    plant, _ = _summer(Physics(), 20, 500, kelvin_per_watt=30.0)
    critical = Budget(temperature_c=60, critical_temperature_c=75)
    with pytest.raises(InfeasibleError, match=r"critical_temperature_c = 75: the hottest sensor is at 7[5-7] °C"):
        simulate(COSTS, plant, critical, tokens=10**6, seconds=300)
    assert 75 <= plant.celsius < 78
    plant, _ = _summer(Physics(), 20, 500, kelvin_per_watt=30.0)
    alone = Budget(critical_temperature_c=75)  # without a ceiling: full speed until then
    with pytest.raises(InfeasibleError, match="critical_temperature_c = 75"):
        simulate(COSTS, plant, alone, tokens=10**6, seconds=300)
    # the last tick was for another budget: neither its limit nor its words are this one's
    tired = Governor(ticked_s=10.0, critical_c=95.0)
    readings = (Reading("t", "cpu", 10.0, celsius=95.0),)
    for budget in (Budget(power_w=5), Budget(critical_temperature_c=100), Budget(tpot_ms=50, temperature_c=99)):
        state = ControllerState.initial()._replace(governor=tired)
        seen = Observation(budget, 64, (1,) * 4, (1,) * 4, None, 3, 0.0, 10.05, 1.0, readings)
        decision = Controller(COSTS).decide(state, seen)[1]
        assert not decision.stops and "critical" not in decision.reason
    with pytest.raises(BudgetError, match="must be above the ceiling; lower the one or raise the other"):
        Budget(temperature_c=80, critical_temperature_c=80)


def scaled(times: float) -> CostModel:
    def slower(unit: UnitCost) -> UnitCost:
        return replace(unit, first_row_ms=unit.first_row_ms * times, marginal_row_ms=unit.marginal_row_ms * times)

    return replace(
        COSTS,
        stages=tuple(map(slower, COSTS.stages)),
        balconies=tuple(map(slower, COSTS.balconies)),
        head=slower(COSTS.head),
    )


@pytest.mark.parametrize("times", [20, 40])
@pytest.mark.parametrize("own_known", [False, True])
def test_a_share_of_the_processor_is_held_by_slow_tokens(times: float, own_known: bool) -> None:
    """The slow loop looks once a token, always after its wait: only sums tell what the step before took."""
    device = Physics(others_utilization=0.1, own_known=own_known)
    tokens = run(Budget(cpu_utilization=0.6), device, 150, costs=scaled(times))
    late = [token for token in tokens if token.time_s > 60]
    share = sum(token.step_ms for token in late) / sum(token.latency_ms for token in late)
    assert 0.55 <= 0.1 + 0.9 * share <= 0.6 * 1.05
    # Tokens of 0.84 s leave too little pace at full depth; the others have time for it.
    assert {token.decision.exit_layer for token in late} == {30 if times == 20 else 14}


def test_watts_are_held_by_tokens_that_take_a_second() -> None:
    """A gauge that nobody looked at for a second has not held its value: the counter tells the mean."""
    tokens = run(Budget(power_w=7.5), Physics(noise=0.03), 160, costs=scaled(40))
    late = [token for token in tokens if token.time_s > 40]
    joules = sum(token.watts * token.latency_ms for token in late)
    assert 0.9 * 7.5 <= joules / sum(token.latency_ms for token in late) <= 7.5 * 1.02


@pytest.mark.parametrize(("joules", "exit_layer"), [(0.21, 20), (0.2, 17), (0.18, 14)])
def test_joules_of_a_token_are_held_by_a_device_that_waits(joules: float, exit_layer: int) -> None:
    """2 W for 50 ms and 6 W more for a step of 15.6, 13.8 or 12 ms: 0.194, 0.183 and 0.172 J. A deeper exit leaves 5 % free."""
    tokens = run(Budget(max_pace_tps=20, energy_j_per_token=joules), Physics(), 15)
    late = [token for token in tokens if token.time_s > 8]
    assert {token.decision.exit_layer for token in late} == {exit_layer}
    assert sum(token.watts * token.latency_ms / 1000 for token in late) / len(late) <= joules
