"""What holds for every state, observation and budget, however strange."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from balcony_edge.budget import Budget
from balcony_edge.control.controller import Controller, ControllerState
from balcony_edge.control.decision import Decision, Measurement, Observation
from balcony_edge.control.slowdown import Slowdown
from balcony_edge.device.readings import Reading
from balcony_edge.errors import BudgetError
from tests.support.prices import DEMO
from tests.support.properties import CHANCE, examples

#: Examples draw many numbers, and budgets whose keys contradict one another are drawn again.
LARGE = [HealthCheck.too_slow, HealthCheck.data_too_large]


def a_state(rng: random.Random) -> ControllerState:
    return ControllerState(
        exit_layer=rng.choice([None, 14, 17, 20, 30, 99]),
        tokens_since_switch=rng.randrange(0, 20),
        catching_up=rng.random() < 0.5,
        tpot_ms=rng.choice([math.inf, 10 ** rng.uniform(-3, 4)]),
        slowdown=Slowdown(
            mean=rng.uniform(-5, 5),
            variance=10 ** rng.uniform(-8, 2),
            process_variance=10 ** rng.uniform(-4, 2),
            noise_variance=10 ** rng.uniform(-3.4, 2),
            offsets=() if rng.random() < 0.2 else tuple(rng.uniform(-1, 1) for _ in range(5)),
            offset_variances=tuple(10 ** rng.uniform(-6, 0) for _ in range(5)),
            surprise=rng.choice([-1, 0, 1]),
        ),
    )


def an_observation(rng: random.Random) -> Observation:
    def few_or_many() -> int:
        return rng.choice([0, 0, 1, 3, rng.randrange(0, 3000)])

    stage_rows, rows = [], 1
    for _ in range(4):
        stage_rows.append(rows)
        rows += few_or_many()
    balcony_rows = (*(rows + few_or_many() for rows in stage_rows[:3]), 1)
    bounds: dict[str, Any] = rng.choice([{}, {"min_exit": 16}, {"max_exit": 20}, {"min_exit": 17, "max_exit": 17}])
    values = [math.nan, math.inf, -math.inf, 0.0, -1.0, 5e-324, 1e308, 10 ** rng.uniform(-3, 5)]
    return Observation(
        budget=Budget(
            tpot_ms=rng.choice([None, 5e-324, 1e300, 10 ** rng.uniform(-2, 4)]),
            probability=rng.choice([0.5, 0.9, 0.99, 1 - 2**-53]),
            dwell_tokens=rng.randrange(0, 12),
            hysteresis=rng.choice([0.0, 0.05, 0.5]),
            **bounds,
        ),
        context_length=rng.randrange(0, 100_000),
        stage_rows=stage_rows,
        balcony_rows=balcony_rows,
        last=rng.choice([None, Measurement(rng.choice([14, 30, 5]), rng.choice(values), rng.choice(values))]),
    )


def a_way_back(rng: random.Random, seen: Observation) -> tuple[ControllerState, Observation]:
    """A sure filter, a shallow exit and a target with room: chunks of the backlog are likely."""
    slowdown = Slowdown(variance=0.0, noise_variance=0.02**2)
    tpot_ms = rng.uniform(22, 60)
    state = ControllerState(rng.choice([14, 17, 20]), 100, catching_up=False, tpot_ms=tpot_ms, slowdown=slowdown)
    rows = [1, 1, 1, 1 + rng.randrange(1, 3000)]
    budget = Budget(tpot_ms=tpot_ms)
    return state, seen._replace(
        budget=budget, context_length=3000, stage_rows=rows, balcony_rows=(1, 1, 1, 1), last=None
    )


@pytest.mark.hypothesis
def test_any_state_and_observation_give_a_sound_decision() -> None:
    controller, chunks = Controller(DEMO), 0

    @examples(400, suppress_health_check=LARGE)
    @given(CHANCE, st.booleans())
    def sound(rng: random.Random, likely: bool) -> None:
        nonlocal chunks
        state, seen = a_state(rng), an_observation(rng)
        if likely:
            state, seen = a_way_back(rng, seen)
        after, decision = controller.decide(state, seen)
        budget = seen.budget
        assert decision.exit_layer in budget.allowed_exits(DEMO.exits)
        assert math.isfinite(decision.predicted_ms)
        assert math.isfinite(decision.price_ms)
        assert 0 <= decision.probability <= 1
        assert "nan" not in decision.reason.split("; measurement")[0]
        assert "\n" not in decision.reason
        slowdown = after.slowdown
        numbers = (slowdown.mean, slowdown.variance, slowdown.process_variance, slowdown.noise_variance)
        assert all(math.isfinite(x) for x in (*numbers, *slowdown.offsets, *slowdown.offset_variances))
        assert min(slowdown.variance, slowdown.noise_variance, *slowdown.offset_variances) >= 0
        if chunk := decision.catch_up:
            chunks += 1
            index = DEMO.exits.index(decision.exit_layer)
            before = seen.stage_rows[chunk.stage] if chunk.balcony else seen.stage_rows[chunk.stage - 1]
            pending = (seen.balcony_rows if chunk.balcony else seen.stage_rows)[chunk.stage] - before
            assert index < chunk.stage
            assert 0 < chunk.rows <= pending
            assert decision.probability >= budget.probability - 1e-9  # within the slack: the target still holds
            assert budget.tpot_ms is not None

    sound()
    assert chunks >= 20


class _Weighing(Controller):
    """Without the short way."""

    def _stayed(self, *_: Any) -> None:
        return None


@pytest.mark.hypothesis
def test_the_short_way_says_what_weighing_says() -> None:
    controller, weighing, stayed = Controller(DEMO), _Weighing(DEMO), 0

    @examples(400, suppress_health_check=LARGE)
    @given(CHANCE)
    def agrees(rng: random.Random) -> None:
        nonlocal stayed
        state, seen = a_state(rng), an_observation(rng)
        at = DEMO.exits.index(seen.budget.allowed_exits(DEMO.exits)[-1])
        state = state._replace(exit_layer=DEMO.exits[at])
        rows = [1] * (at + 1) + seen.stage_rows[at + 1 :]
        seen = seen._replace(
            stage_rows=rows, balcony_rows=(*(1,) * (at + 1), *seen.balcony_rows[at + 1 :]), made_tokens=3
        )
        short = controller.shortcut(seen.budget, state, seen.context_length, seen.last)
        if short is None:
            return
        stayed += 1
        after, decision = weighing.decide(state, seen)
        assert controller.decide(state, seen) == short
        assert short[0] == after
        exact = ("exit_layer", "infeasible", "catch_up", "period_ms", "idle_ms", "reason")
        assert [getattr(short[1], name) for name in exact] == [getattr(decision, name) for name in exact]
        numbers = ("price_ms", "predicted_ms", "probability")
        assert [getattr(short[1], name) for name in numbers] == pytest.approx(
            [getattr(decision, name) for name in numbers]
        )

    agrees()
    assert stayed > 50


@pytest.mark.parametrize(
    ("exit_layer", "tpot_ms", "why"),
    [
        (14, 13.0, "deepest exit within 13 ms"),
        (14, 14.5, "17 leaves too little free"),
        (17, 15.0, "deepest exit within 15 ms"),
        (20, 17.0, "deepest exit within 17 ms"),
        (20, 22.0, "30 leaves too little free"),
    ],
)
def test_the_short_way_at_a_shallower_exit_says_what_weighing_says(exit_layer: int, tpot_ms: float, why: str) -> None:
    """Steps take 12.2, 14.0, 15.8 and 21.3 ms. The filter keeps 2.5 % of a target free, and the hysteresis 2 %."""
    sure, at = Slowdown(variance=1e-8, noise_variance=0.02**2), DEMO.exits.index(exit_layer)
    state = ControllerState(exit_layer, 100, catching_up=False, tpot_ms=tpot_ms, slowdown=sure)
    pending = [1] * (at + 1) + [40] * (3 - at)
    seen = Observation(Budget(tpot_ms=tpot_ms), 64, pending, (*pending[:3], 1), made_tokens=3)
    short = Controller(DEMO).shortcut(seen.budget, state, seen.context_length, None)
    after, decision = _Weighing(DEMO).decide(state, seen)
    assert short is not None and short[0] == after and why in decision.reason
    exact = ("exit_layer", "infeasible", "catch_up", "period_ms", "idle_ms", "reason")
    assert [getattr(short[1], name) for name in exact] == [getattr(decision, name) for name in exact]
    assert short[1][1:4] == pytest.approx(decision[1:4])


def a_whole_budget(rng: random.Random) -> Budget:
    """Any keys that do not contradict one another."""
    options: dict[str, Any] = {
        "tpot_ms": 10 ** rng.uniform(0, 3),
        "ttft_ms": 10 ** rng.uniform(0, 4),
        "deadline_s": 10 ** rng.uniform(-2, 2),
        "expected_tokens": rng.randrange(1, 500),
        "min_exit": rng.choice([14, 16]),
        "max_exit": rng.choice([17, 25, 40]),
        "min_pace_tps": 10 ** rng.uniform(-2, 1),
        "max_pace_tps": 10 ** rng.uniform(1, 3),
        "power_w": 10 ** rng.uniform(-2, 3),
        "energy_j_per_token": 10 ** rng.uniform(-3, 2),
        "temperature_c": rng.uniform(30, 125),
        "gpu_utilization": rng.uniform(0.01, 1),
        "cpu_utilization": rng.uniform(0.01, 1),
        "battery_floor_percent": rng.uniform(1, 99),
        "memory_mb": 10 ** rng.uniform(0, 5),
        "priority": rng.choice(["limits", "latency"]),
        "on_infeasible": rng.choice(["shallowest", "best_effort"]),
        "probability": rng.choice([0.5, 0.9, 0.99]),
        "dwell_tokens": rng.randrange(0, 12),
        "hysteresis": rng.choice([0.0, 0.05, 0.5]),
    }
    while True:
        keys = {key: value for key, value in options.items() if rng.random() < 0.4}
        if rng.random() < 0.1:
            keys = {"exit_layer": 17, **{k: v for k, v in keys.items() if k in {"power_w", "temperature_c"}}}
        try:
            return Budget(**keys)
        except BudgetError:
            continue


def some_readings(rng: random.Random, now_s: float) -> tuple[Reading, ...]:
    """What sensors may say, nonsense included."""

    def any_of(*values: float) -> float | None:
        return rng.choice([None, math.nan, math.inf, -1.0, *values])

    return tuple(
        Reading(
            f"s:{scope}",
            scope,
            now_s - rng.choice([0.0, 0.1, 1.0, 99.0]),
            watts=any_of(0.0, rng.uniform(0, 50), 1e300),
            joules=any_of(rng.uniform(0, 1e6)),
            celsius=any_of(rng.uniform(0, 120), 1e9),
            utilization=any_of(rng.random(), 7.0),
            own_utilization=any_of(rng.random()),
            charge=any_of(rng.random()),
            charging=rng.choice([None, True, False]),
            memory_bytes=rng.choice([None, -5, 10**8, 10**12]),
        )
        for scope in rng.sample(["board", "cpu", "gpu", "battery", "process"], rng.randrange(0, 6))
    )


@examples(50, suppress_health_check=LARGE)
@given(CHANCE)
def test_random_budgets_and_traces_stay_sound(rng: random.Random) -> None:
    follow(Controller(DEMO), rng, decisions=8)


def soundness(controller: Controller, seeds: range) -> int:
    """Follow one random budget for each seed; returns the decisions made. benchmarks/control/controller.py takes 10,000."""
    for seed in seeds:
        follow(controller, random.Random(seed), decisions=25)
    return 25 * len(seeds)


def follow(controller: Controller, rng: random.Random, decisions: int) -> None:
    """A random budget over random observations that follow one another: every decision must be sound."""
    budget, state, now_s, busy_s = a_whole_budget(rng), ControllerState.initial(), 0.0, 0.0
    allowed = budget.allowed_exits(DEMO.exits)
    for made in range(decisions):
        seen = an_observation(rng)._replace(
            budget=budget, made_tokens=made, now_s=now_s, busy_s=busy_s, readings=some_readings(rng, now_s)
        )
        state, decision = controller.decide(state, seen)
        numbers = (decision.predicted_ms, decision.price_ms, decision.period_ms, decision.idle_ms)
        assert decision.exit_layer in allowed
        assert all(math.isfinite(number) and number >= 0 for number in numbers), decision
        assert 0 <= decision.probability <= 1
        assert "nan" not in decision.reason.split("measurement of")[0] and "\n" not in decision.reason
        assert 0 < state.governor.share <= 1
        gap_s = 10 ** rng.uniform(-4, 1)
        now_s, busy_s = now_s + gap_s, busy_s + gap_s * rng.random()


#: Key → how a looser value comes from a value and a factor of 1 or more.
LOOSER: dict[str, Any] = {
    **{
        key: lambda v, f: v * f
        for key in ("tpot_ms", "ttft_ms", "deadline_s", "power_w", "energy_j_per_token", "memory_mb")
    },
    "temperature_c": lambda v, f: min(v * f, 125.0),
    "gpu_utilization": lambda v, f: min(v * f, 1.0),
    "cpu_utilization": lambda v, f: min(v * f, 1.0),
    "battery_floor_percent": lambda v, f: v / f,
    "min_pace_tps": lambda v, f: v / f,
}


def depth_of(found: tuple[ControllerState, Decision]) -> int:
    """The exit of a decision; where shallow tokens make time for a backlog, the exit that they lead to."""
    state, decision = found
    return state.recovery.goal or decision.exit_layer


@examples(60, suppress_health_check=LARGE)
@given(CHANCE, st.floats(1.0, 3.0))
def test_any_looser_key_never_gives_less_depth(rng: random.Random, factor: float) -> None:
    budget = a_whole_budget(rng)
    controller, state, seen = Controller(DEMO), a_state(rng), an_observation(rng)
    given_keys = [key for key in LOOSER if getattr(budget, key) is not None]
    if not given_keys or budget.exit_layer is not None:
        return
    # a governor that has seen something: both budgets start from the same state
    for tick in range(12):
        seen = an_observation(rng)._replace(
            budget=budget,
            made_tokens=tick,
            now_s=tick * 0.3,
            busy_s=tick * 0.2,
            readings=some_readings(rng, tick * 0.3),
        )
        state, _ = controller.decide(state, seen)
    seen = seen._replace(now_s=12 * 0.3, last=None)
    key = rng.choice(given_keys)
    looser = budget.model_copy(update={key: LOOSER[key](getattr(budget, key), factor)})
    exits = [depth_of(controller.decide(state, seen._replace(budget=b))) for b in (budget, looser)]
    assert exits == sorted(exits), (key, budget, looser)


@examples(150, suppress_health_check=LARGE)
@given(CHANCE, st.floats(1.0, 400.0), st.floats(1.0, 3.0), st.booleans())
def test_looser_target_never_gives_less_depth(rng: random.Random, tpot_ms: float, looser: float, pending: bool) -> None:
    state, seen = a_state(rng), an_observation(rng)
    if not pending:
        due = (1,) * len(DEMO.exits)
        seen = seen._replace(stage_rows=due, balcony_rows=due)
    # With a late token to spend, a tight target may enter at once what a looser one comes to without being late.
    state = state._replace(recovery=state.recovery._replace(credit=0.0))
    found = [
        Controller(DEMO).decide(
            state, seen._replace(budget=Budget(**{**seen.budget.model_dump(), "tpot_ms": target_ms}))
        )
        for target_ms in (tpot_ms, tpot_ms * looser, None)
    ]
    for (_, tight), loose in itertools.combinations(found, 2):
        assert tight.exit_layer <= depth_of(loose)
