"""Every key of a budget held on a simulated device, loads, plant physics, and every shipped budget file."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from balcony_edge.budget import Budget, load_budget
from balcony_edge.control.controller import Controller, ControllerState
from balcony_edge.control.decision import Measurement, Observation
from balcony_edge.control.governor import Demand, Governor, govern
from balcony_edge.control.response import GAUGES, Fit, Load
from balcony_edge.device.readings import Reading
from balcony_edge.errors import InfeasibleError, InputError
from balcony_edge.simulation.loads import parse_load, recorded
from balcony_edge.simulation.plant import Physics, Plant, SimulatedDevice
from balcony_edge.simulation.simulate import SimulatedToken, explain, simulate, summary
from tests.support.prices import BOARD, DEMO, windows_w

PROFILES = Path(__file__).parents[2] / "profiles"


def run(
    budget: Budget,
    device: Physics = BOARD,
    load: str = "idle",
    *,
    seconds: float = 30.0,
    tokens: int = 10**6,
    **keys: Any,
) -> list[SimulatedToken]:
    plant = Plant(DEMO, device, parse_load(load), **keys)
    return simulate(DEMO, plant, budget, tokens=tokens, seconds=seconds)


def switch_times(tokens: list[SimulatedToken], after_s: float = 0.0) -> list[float]:
    times = [b.time_s for a, b in pairwise(tokens) if a.decision.exit_layer != b.decision.exit_layer]
    return [time for time in times if time > after_s]


def exits(tokens: list[SimulatedToken]) -> set[int]:
    return {token.decision.exit_layer for token in tokens}


def test_a_deadline_counts_the_waits_of_the_pace() -> None:
    budget = Budget(deadline_s=2, expected_tokens=40, max_pace_tps=25)
    tokens = run(budget, tokens=40, prompt_tokens=620)
    # at full depth the prompt takes 0.49 s, and 39 gaps of 40 ms take 1.56
    assert tokens[-1].time_s < 2.0 and tokens[0].decision.exit_layer < 30
    assert all(token.latency_ms > 36 for token in tokens[1:])
    assert not any(token.decision.infeasible for token in tokens) and 30 in exits(tokens)
    # even the shallowest prompt leaves too little to wait as long before every token: then waits are shorter, not exits
    tight = run(Budget(deadline_s=1.7, expected_tokens=40, max_pace_tps=25), tokens=40, prompt_tokens=620)
    assert tight[-1].time_s < 1.7 and 30 in exits(tight)
    assert not any(token.decision.infeasible for token in tight)


def test_a_reply_after_a_pause_starts_on_a_device_that_rested() -> None:
    busy = Load(5.0, fits=(Fit(base=0.4, gain=0.6),) * len(GAUGES), since_s=10.0, total=50.0, samples=8)
    tired = Governor(ticked_s=10.0, share=0.01, short_s=2.0, infeasible=("latency",), power=busy, ceiling=0,
                     asked=(("temperature_c", 60.0),))  # fmt: skip
    cool = (Reading("plant:soc", "board", 3600.0, celsius=25.0),)
    budget = Budget(temperature_c=60, tpot_ms=30)
    demand = Demand(budget, 3600.0, 9.0, cool, (0.012, 0.014, 0.016, 0.021), 0, 3, 33.0, begins=True)
    rested = govern(tired, demand)
    assert rested.share == 1.0 and rested.infeasible == () and rested.ceiling == 3
    assert rested.power is not None and (rested.power.fits[0].base, rested.power.samples) == (0.4, 0)
    # within a reply a share comes back a tenth at a time, and so it does where the next reply follows at once
    for now_s, begins in ((3600.0, False), (10.5, True)):
        soon = govern(tired, demand._replace(now_s=now_s, begins=begins, readings=(cool[0],)))
        assert soon.share == pytest.approx(0.11) and soon.infeasible == ("latency",)


def test_a_recorded_load_stays_within_what_a_load_may_be() -> None:
    load = recorded([0.0, 1.0], [math.inf, 1e-300])
    assert (load(0.5), load(1.5)) == (1e3, 1e-3)


# --- Power, degrees, utilization: by pace, and by depth where pace may not fall further. --------------------------


@pytest.mark.parametrize(
    ("keys", "load", "depths"),
    [
        ({}, "idle", {30}),
        ({"min_pace_tps": 20}, "idle", {30}),
        ({"min_pace_tps": 30}, "idle", {17, 20}),  # half the time in 21.3 ms steps is 23 a second, in 15.8 ms steps 32
        ({"tpot_ms": 60}, "idle", {30}),
        ({"min_pace_tps": 20}, "square:high=1.6,period_s=40", {17, 20, 30}),
    ],
)
def test_power_is_held_in_every_window(keys: dict[str, Any], load: str, depths: set[int]) -> None:
    tokens = run(Budget(power_w=5, **keys), load=load)
    windows = windows_w(tokens, after_s=8)
    assert min(windows) >= 0.95 * 5 and max(windows) <= 1.05 * 5
    steady = [token for token in tokens if token.time_s > 5]
    assert exits(steady) <= depths and max(depths) in exits(steady)
    assert all(b - a >= 1 for a, b in pairwise(switch_times(tokens, 5)))
    assert not any(token.decision.infeasible for token in steady)
    if "tpot_ms" in keys:  # while the watts are learned, power comes first
        assert not any(token.latency_ms > keys["tpot_ms"] for token in steady)


def test_power_of_others_is_told_apart() -> None:
    tokens = run(Budget(power_w=5), replace(BOARD, idle_w=3.5))
    windows = windows_w(tokens, after_s=8)
    assert min(windows) >= 0.95 * 5 and max(windows) <= 1.05 * 5
    # (5 - 3.5) / 6 of the time in steps of 21.3 ms and more, once that is learned
    later = [token for token in tokens if token.time_s > 8]
    assert len(later) / (tokens[-1].time_s - 8) == pytest.approx(0.25 / 0.0217, rel=0.05)


def test_without_pacing_unreachable_power_is_infeasible_and_said() -> None:
    tokens = run(Budget(power_w=5, pacing=False), seconds=20)
    assert exits(tokens[100:]) == {14}
    first = next(token for token in tokens if token.decision.infeasible)
    assert 5 <= first.time_s <= 8  # it takes some seconds to be sure
    assert first.decision.reason.endswith("infeasible: power_w out of reach; limited by power_w")
    assert all(token.decision.infeasible for token in tokens if token.time_s > 8)
    with pytest.raises(InfeasibleError, match=r"after \d+ tokens, .*infeasible: power_w out of reach"):
        run(Budget(power_w=5, pacing=False, on_infeasible="error"), seconds=20)


@pytest.mark.parametrize(("priority", "kept"), [("limits", "watts"), ("latency", "tpot")])
def test_priority_says_what_yields(priority: str, kept: str) -> None:
    # 3 W leave a sixth of the time; a token of 60 ms at the shallowest exit takes 12.1 of them, a fifth.
    tokens = run(Budget(power_w=3, tpot_ms=60, priority=priority))
    steady = [token for token in tokens if token.time_s > 10]
    mean_w, late = (
        sum(windows_w(tokens, 10)) / len(windows_w(tokens, 10)),
        summary(steady, Budget(tpot_ms=60))["late_tokens"],
    )
    assert exits(steady) == {14} and all(token.decision.infeasible for token in steady)
    if kept == "watts":
        assert mean_w == pytest.approx(3, rel=0.03) and late > 0.9 * len(steady)
        assert "latency out of reach" in steady[-1].decision.reason
    else:
        assert mean_w > 3.15 and late == 0
        assert "power_w out of reach" in steady[-1].decision.reason


@pytest.mark.parametrize("least_tps", [1, 25])
def test_temperature_overshoots_by_less_than_a_degree(least_tps: float) -> None:
    tokens = run(Budget(temperature_c=55, min_pace_tps=least_tps), seconds=300)
    assert max(token.celsius for token in tokens) <= 56
    late = [token for token in tokens if token.time_s > 200]
    assert min(token.celsius for token in late) >= 53.5  # and what is allowed is used
    assert len(switch_times(tokens, 150)) <= 2
    assert (30 in exits(late)) == (least_tps == 1)


@pytest.mark.parametrize("own_known", [False, True])
@pytest.mark.parametrize("key", ["cpu_utilization", "gpu_utilization"])
def test_utilization_leaves_others_theirs(key: str, own_known: bool) -> None:
    device = replace(BOARD, others_utilization=0.2, own_known=own_known)
    tokens = run(Budget(**{key: 0.6}), device)
    share = sum(token.step_ms for token in tokens if token.time_s > 8) / 1000 / (tokens[-1].time_s - 8)
    assert share + 0.2 == pytest.approx(0.6, abs=0.03)
    assert exits(tokens) == {30}


def test_utilization_that_others_exceed_alone_is_infeasible() -> None:
    tokens = run(Budget(cpu_utilization=0.5), replace(BOARD, others_utilization=0.7), seconds=20)
    assert tokens[-1].decision.infeasible
    assert "cpu_utilization out of reach" in tokens[-1].decision.reason
    assert tokens[-1].decision.period_ms == pytest.approx(1000, rel=0.01)  # the slowest that a stream may be


# --- Energy, charge, memory: by depth. ----------------------------------------------------------------------------


@pytest.mark.parametrize(("joules", "exit_layer"), [(0.2, 30), (0.15, 20), (0.12, 17)])
def test_energy_of_a_token_is_held_by_depth(joules: float, exit_layer: int) -> None:
    tokens = run(Budget(energy_j_per_token=joules), seconds=10)
    steady = [token for token in tokens if token.time_s > 3]
    assert exits(steady) == {exit_layer}
    assert all(token.watts * token.latency_ms / 1000 <= joules * 1.08 for token in steady)  # noise is 2 %
    assert summary(run(Budget(energy_j_per_token=0.05), seconds=5), Budget())["infeasible_tokens"] > 0


def test_battery_floor_takes_depth_then_pace() -> None:
    device = replace(BOARD, battery_j=1000, charge=0.35)
    tokens = run(Budget(battery_floor_percent=20), device, seconds=60)
    depth_at = {round(t.time_s): t.decision.exit_layer for t in tokens}
    assert depth_at[5] == 30  # 31 %
    assert [layer for layer in (30, 20, 17, 14) if layer in exits(tokens)] == [30, 20, 17, 14]
    assert tokens[-1].decision.infeasible and tokens[-1].decision.period_ms == pytest.approx(1000, rel=0.01)
    with pytest.raises(InfeasibleError, match="battery_floor_percent out of reach"):
        run(Budget(battery_floor_percent=20, on_infeasible="error"), device, seconds=60)
    tokens = run(Budget(), replace(device, battery_j=100), seconds=600)  # it ends with the 35 J of its battery
    assert 35 <= sum(token.watts * token.latency_ms / 1000 for token in tokens) < 36


def test_memory_ceiling_takes_depth_and_ends_there() -> None:
    # 200 MB of process and 48 kB a full-depth token: 300 MB are there after about 2,080 of them.
    plant = Plant(DEMO, BOARD, parse_load("idle"))
    with pytest.raises(InfeasibleError, match=r"after 2\d\d\d tokens.*memory_mb out of reach"):
        simulate(DEMO, plant, Budget(memory_mb=300, on_infeasible="error"), tokens=5000)
    assert 300e6 <= 200e6 + plant.rows_run * 12_000 <= 300.5e6
    tokens = run(Budget(memory_mb=300), tokens=2050, seconds=100)
    assert exits(tokens) == {17, 20, 30}


def test_sensors_that_are_lost_leave_latency_and_it_is_said() -> None:
    controller, state, costs = Controller(DEMO), ControllerState.initial(), (1, 1, 1, 1)
    budget = Budget(power_w=3, tpot_ms=60, temperature_c=50)

    def decide(now_s: float, readings: tuple[Reading, ...]) -> Any:
        nonlocal state
        seen = Observation(budget, 64, costs, costs, None, 5, 0.0, now_s, now_s, readings)
        state, decision = controller.decide(state, seen)
        return decision

    hot = (Reading("a", "board", 0.0, watts=8.0), Reading("b", "cpu", 0.0, celsius=70.0))
    for tick in range(20):
        decision = decide(tick * 0.2, tuple(replace(reading, time_s=tick * 0.2) for reading in hot))
    assert decision.period_ms > 0 and "limited by power_w, temperature_c" in decision.reason
    for tick in range(60):  # three seconds old, and nonsense
        decision = decide(
            4 + tick * 0.2, (*hot, Reading("c", "board", 4 + tick * 0.2, watts=float("nan"), celsius=999.0))
        )
    assert (decision.exit_layer, decision.period_ms) == (30, 0.0)
    assert decision.reason.endswith("no reading for power_w, temperature_c: not held")


# --- Pace, deadline, first token. ---------------------------------------------------------------------------------


def test_idle_time_is_for_the_balconies_backlog_too() -> None:
    plant = Plant(DEMO, BOARD, parse_load("idle"), prompt_tokens=40)
    for _ in range(4):
        plant.step(30, period_ms=400.0, idle_ms=350.0)
    # behind by what came with the next token, as on a device
    assert plant.rows_due()[1] == [1, 1, 1, 1]


def test_pace_is_an_upper_bound_and_its_waits_go_to_the_backlog() -> None:
    plant = Plant(DEMO, BOARD, parse_load("step:high=2.2,at_s=0.2"))
    shallow = simulate(DEMO, plant, Budget(tpot_ms=30), tokens=40)
    assert shallow[-1].decision.exit_layer < 30 and plant.pending_rows > 10
    budget = Budget(max_pace_tps=6, tpot_ms=180)
    tokens = simulate(DEMO, plant, budget, tokens=30)
    assert plant.pending_rows == 0
    gaps = [token.latency_ms for token in tokens[2:]]
    assert min(gaps) >= 155 and max(gaps) <= 180
    assert sum(gaps) / len(gaps) == pytest.approx(1000 / 6, rel=0.02)


@pytest.mark.parametrize(("ttft_ms", "exit_layer"), [(1000, 30), (600, 20), (500, 17)])
def test_first_token_is_held_by_the_depth_of_the_prefill(ttft_ms: float, exit_layer: int) -> None:
    # 512 rows: 24 % of a layer's row more each; 14 layers take 230 ms, 30 take 480 ms before attention
    tokens = run(Budget(ttft_ms=ttft_ms), tokens=3, prompt_tokens=512)
    assert tokens[0].decision.exit_layer == exit_layer
    assert tokens[0].latency_ms <= ttft_ms
    prefill = [DEMO.prefill_ms(e, 512) for e in DEMO.exits]
    assert tokens[0].decision.predicted_ms == pytest.approx(prefill[DEMO.exits.index(exit_layer)])


def test_first_token_out_of_reach_is_infeasible() -> None:
    decision = run(Budget(ttft_ms=10), tokens=1)[0].decision
    assert decision.infeasible and decision.exit_layer == 14
    assert decision.reason.startswith("infeasible: ttft_ms = 10: the first token takes ")


def test_deadline_mixes_two_exits_deep_first() -> None:
    tokens = run(Budget(deadline_s=2.0, expected_tokens=100), replace(BOARD, noise=0.0), tokens=100)
    assert tokens[-1].time_s <= 2.0
    assert tokens[-1].time_s >= 1.9  # the time is used
    assert exits(tokens) == {20, 30}
    assert len(switch_times(tokens)) <= 6  # what was kept for a load that has not begun is spent as the reply ends
    half = [sum(t.decision.exit_layer for t in part) for part in (tokens[:50], tokens[50:])]
    assert half[0] > half[1]


def test_deadline_is_met_under_bursts() -> None:
    # Steps take 1.5 times as long for a tenth of a second, after 0.4 s on average.
    def ends_s(budget: Budget) -> list[float]:
        loads = [f"bursts:high=1.5,mean_s=0.1,every_s=0.4,seed={seed}" for seed in range(30)]
        return [run(budget, load=load, tokens=100, seed=seed)[-1].time_s for seed, load in enumerate(loads)]

    shallowest_s = ends_s(Budget(exit_layer=14))
    deadline_s = 1.2 * sum(shallowest_s) / len(shallowest_s)
    budget = Budget(deadline_s=deadline_s, expected_tokens=100, probability=0.99)
    assert sum(end_s <= deadline_s for end_s in ends_s(budget)) >= 29  # benchmarks/control/controller.py: 100 runs
    assert exits(run(budget, tokens=100)) - {14}  # not by staying shallow


@pytest.mark.parametrize(("probability", "high"), [(0.9, 1.2), (0.99, 1.4)])
@pytest.mark.parametrize("at_share", [0.3, 0.5, 0.7])
def test_deadline_is_met_where_a_load_begins_in_mid_reply(probability: float, high: float, at_share: float) -> None:
    """The mean of 60 tokens alone takes half the reply to notice, and what was spent on depth before is gone."""
    shallow_s = (DEMO.prefill_ms(14, 64) + 99 * DEMO.steady_ms(14, 114)) / 1000
    deadline_s = 1.15 * shallow_s * (at_share + (1 - at_share) * high)
    asked = Budget(deadline_s=deadline_s, expected_tokens=100, probability=probability)
    for seed in range(5):
        plant = Plant(
            DEMO, Physics(noise=0.03), parse_load(f"step:high={high},at_s={deadline_s * at_share}"), seed=seed
        )
        tokens = simulate(DEMO, plant, asked, tokens=100)
        assert tokens[-1].time_s <= deadline_s
        assert {token.decision.exit_layer for token in tokens} != {14}  # depth is spent where there is time


def test_deadline_out_of_reach_is_infeasible_and_shallow() -> None:
    tokens = run(Budget(deadline_s=0.5, expected_tokens=100), tokens=50)
    assert exits(tokens) == {14} and all(token.decision.infeasible for token in tokens)


# --- Loads, records, shipped files. -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "times", "values"),
    [
        ("idle", (0, 9), (1, 1)),
        ("constant:high=3", (0, 9), (3, 3)),
        ("step:high=2,at_s=1", (0.9, 1.0), (1, 2)),
        ("ramp:high=3,from_s=1,to_s=3", (0, 2, 9), (1, 2, 3)),
        ("square:high=2,period_s=4", (1.9, 2, 4), (1, 2, 1)),
    ],
)
def test_loads(text: str, times: tuple[float, ...], values: tuple[float, ...]) -> None:
    load = parse_load(text)
    assert [load(time) for time in times] == pytest.approx(list(values))


def test_bursts_have_the_asked_share_of_time() -> None:
    load = parse_load("bursts:high=2,mean_s=0.2,every_s=1,seed=3")
    samples = [load(step * 0.01) for step in range(100_000)]
    assert set(samples) == {1.0, 2.0}
    assert sum(samples) / len(samples) == pytest.approx(1 + 0.2 / 1.2, abs=0.02)
    assert samples[5000] == load(50.0)  # asked again, the same


def test_recorded_load() -> None:
    load = recorded([0.0, 1.0, 2.0], [1.0, 3.0, 2.0])
    assert [load(time) for time in (-1, 0.5, 1.0, 99)] == [1.0, 1.0, 3.0, 2.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wave", "load 'wave': must be one of idle, constant, step, ramp, square, bursts, or the file of a recorded"),
        ("step:low=1", "load 'step:low=1': must be one of high, at_s, as key=value"),
        ("square:high=x", "load 'square:high=x': high must be 0.001 to 1000"),
        ("square:period_s=0", "load 'square:period_s=0': period_s must be 0.001 to 1e+06"),
        ("square:period_s=nan", "load 'square:period_s=nan': period_s must be 0.001 to 1e+06"),
        ("constant:high=1e9", "load 'constant:high=1e9': high must be 0.001 to 1000"),
        ("bursts:mean_s=1e-9", "load 'bursts:mean_s=1e-9': mean_s must be 0.001 to 1e+06"),
    ],
)
def test_loads_that_are_none(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_load(text)
    assert str(caught.value).startswith(message)


def test_throttling_slows_steps_and_ends_three_degrees_below() -> None:
    device = replace(BOARD, throttle_c=60.0, tau_s=5.0, noise=0.0)
    tokens = run(Budget(), device, seconds=30)
    slow = [token.step_ms > 1.4 * DEMO.steady_ms(30, 100) for token in tokens[1:]]
    assert slow.index(True) > 100
    warm = SimulatedDevice(DEMO, device, lambda _: 1.0)
    while not warm.throttled:
        warm.work(20.0)
    assert warm.celsius > 60
    before = warm.celsius
    while warm.throttled:
        before = warm.celsius
        warm.wait(0.05)
    assert warm.celsius <= 57 < before
    # a budget that stays below keeps the clocks up
    guarded = run(Budget(temperature_c=58), device, seconds=30)
    assert max(token.celsius for token in guarded) < 60


def test_explain_says_what_bound() -> None:
    tokens = run(Budget(tpot_ms=28), load="step:high=1.7,at_s=1", tokens=120)
    intervals = explain(tokens)
    first = [token.latency_ms for token in tokens[1 : intervals[0].tokens]]
    assert intervals[0].mean_ms == pytest.approx(sum(first) / len(first)), "without the time to first token"
    assert sum(interval.tokens for interval in intervals) == 120
    assert any(interval.exit_layer == 30 and interval.tokens > 20 for interval in intervals)
    assert intervals[-1].exit_layer < 30
    assert intervals[-1].slowdown == pytest.approx(1.7, rel=0.1)
    assert intervals[0].end_s == intervals[1].begin_s


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_file_is_held(path: Path) -> None:
    budget = load_budget(path)
    board = replace(BOARD, busy_w=20.0, kelvin_per_watt=3.0, others_utilization=0.3, step_utilization=0.7)
    board = replace(board, battery_j=2000.0, charge=0.5)
    tokens = run(budget, board, "square:high=1.5,period_s=8", seconds=40, tokens=40 if budget.deadline_s else 10**6)
    after = [token for token in tokens if token.time_s > 10]
    if budget.tpot_ms is not None:
        assert summary(tokens, budget)["late_tokens"] <= 0.05 * len(tokens)
    if budget.ttft_ms is not None:
        assert tokens[0].latency_ms <= budget.ttft_ms
    if budget.deadline_s is not None:
        assert tokens[-1].time_s <= budget.deadline_s
    if budget.power_w is not None:
        assert max(windows_w(tokens, 10)) <= 1.05 * budget.power_w
    if budget.temperature_c is not None:
        assert max(token.celsius for token in tokens) <= budget.temperature_c + 1
    if budget.max_pace_tps is not None:
        assert len(after) <= 30 * budget.max_pace_tps * 1.02
    for ceiling in (budget.gpu_utilization, budget.cpu_utilization):
        if ceiling is not None:
            share = sum(token.step_ms for token in after) / 1000 / (after[-1].time_s - 10)
            assert 0.3 + 0.7 * share <= ceiling + 0.03
    if budget.energy_j_per_token is not None and not after[-1].decision.infeasible:
        assert sum(t.watts * t.latency_ms / 1000 for t in after) / len(after) <= budget.energy_j_per_token * 1.05
    if not budget.has_target:
        assert exits(tokens) == {30}


def test_tokens_after_the_expected_ones_are_free_of_the_deadline() -> None:
    budget = Budget(deadline_s=2, expected_tokens=40, probability=0.99, on_infeasible="error")
    tokens = run(budget, tokens=256)
    assert tokens[39].time_s <= 2 and len(tokens) == 256
    late = tokens[60:]
    assert exits(late) == {30} and not any(token.decision.infeasible for token in late)
    assert "2 s" not in late[-1].decision.reason


@pytest.mark.parametrize(("tokens", "probability"), [(20, 0.9), (20, 0.99), (100, 0.9), (100, 0.99)])
def test_a_deadline_that_can_be_met_is_not_called_infeasible_before_anything_was_measured(
    tokens: int, probability: float
) -> None:
    """A tenth more time than the shallowest exit takes; the prior says that the rest may take half as long again."""
    prices = DEMO.steady_ms(DEMO.exits[0], 64 + tokens // 2)
    needs_s = (DEMO.prefill_ms(DEMO.exits[0], 64) + (tokens - 1) * prices) / 1000
    asked = Budget(deadline_s=1.1 * needs_s, expected_tokens=tokens, probability=probability, on_infeasible="error")
    made = run(asked, tokens=tokens, prompt_tokens=64)
    assert made[-1].time_s <= 1.1 * needs_s and not any(token.decision.infeasible for token in made)
    with pytest.raises(InfeasibleError, match="after 0 tokens"):
        run(asked.model_copy(update={"deadline_s": 0.9 * needs_s}), tokens=tokens, prompt_tokens=64)


@pytest.mark.parametrize(("tpot_ms", "probability"), [(13.5, 0.9), (15, 0.9), (16, 0.9), (14, 0.99), (20, 0.99)])
def test_a_target_that_can_be_met_is_not_called_infeasible_before_anything_was_measured(
    tpot_ms: float, probability: float
) -> None:
    asked = Budget(tpot_ms=tpot_ms, probability=probability, on_infeasible="error")
    tokens = run(asked, tokens=300)
    assert len(tokens) == 300
    assert summary(tokens, asked)["late_tokens"] <= 6


def test_a_target_below_every_price_is_infeasible_at_once() -> None:
    with pytest.raises(InfeasibleError, match=r"after 0 tokens.*: a step takes 12\.\d ms at the shallowest exit"):
        run(Budget(tpot_ms=11, on_infeasible="error"), tokens=10)


@pytest.mark.parametrize(
    ("keys", "device", "load", "most_ms"),
    [
        ({"cpu_utilization": 0.6, "min_pace_tps": 30}, BOARD, "step:high=0.5,at_s=40", 2.2 * 21.5),
        ({"power_w": 5, "min_pace_tps": 20}, BOARD, "square:high=1.6,period_s=40", 1.6 * 50),
    ],
)
def test_a_ceiling_that_is_lifted_costs_no_spike(
    keys: dict[str, Any], device: Physics, load: str, most_ms: float
) -> None:
    tokens = run(Budget(**keys), device, load, seconds=80)
    assert len(exits([token for token in tokens if token.time_s > 10])) > 1
    assert max(token.latency_ms for token in tokens[1:]) <= most_ms * 1.1


@pytest.mark.parametrize("power_w", [2.3, 2.5, 3.0, 5.0])
def test_power_is_held_at_every_duty(power_w: float) -> None:
    tokens = run(Budget(power_w=power_w, min_pace_tps=0.2), seconds=120)
    later = [token for token in tokens if token.time_s > 40]
    mean_w = sum(t.watts * t.latency_ms for t in later) / sum(t.latency_ms for t in later)
    assert mean_w == pytest.approx(power_w, rel=0.05)


def test_what_a_reply_learned_is_there_for_the_next() -> None:
    plant = Plant(DEMO, BOARD, parse_load("constant:high=1.5"))
    controller, state = Controller(DEMO), ControllerState.initial()
    last = None
    budget = Budget(tpot_ms=27)
    for made in range(60):
        seen = Observation(budget, plant.length, *plant.rows_due(), last, made, 0.0, plant.now_s, plant.busy_s)
        state, decision = controller.decide(state, seen)
        _, step_ms = plant.step(decision.exit_layer, decision.catch_up)
        last = Measurement(decision.exit_layer, decision.price_ms, step_ms) if made else None
    following = state.for_next_reply()
    assert following.exit_layer is None and following.slowdown.factor == pytest.approx(1.5, rel=0.05)
    # fresh, the profile is taken at its word: the deepest; then the slowdown shows
    seen = Observation(budget, 64, (1, 1, 1, 1), (1, 1, 1, 1), None, 1, 0.0, 0.0, 0.0)
    decision = controller.decide(following, seen)[1]
    assert decision.predicted_ms == pytest.approx(1.5 * DEMO.steady_ms(decision.exit_layer, 64), rel=0.05)
