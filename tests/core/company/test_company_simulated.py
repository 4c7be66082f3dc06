"""Several streams on a simulated device with the joint controller: any mix of them, and what each of them gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balcony_edge.budget import Budget
from balcony_edge.control.company.seen import Chunk, Round
from balcony_edge.simulation.company import (
    Arrival,
    CompanyPlant,
    SimulatedStream,
    poisson,
    simulate_company,
    summary,
)
from balcony_edge.simulation.plant import Physics
from tests.support.prices import DEMO
from tests.support.properties import examples
from tests.support.replies import PRICES

CLASSES = [
    Arrival(0.0, prompt, tokens, budget)
    for prompt, tokens, budget in (
        (30, 60, Budget(tpot_ms=30.0)),
        (60, 80, Budget(tpot_ms=60.0)),
        (100, 60, Budget(tpot_ms=120.0, min_exit=17)),
        (40, 50, Budget(deadline_s=4.0, expected_tokens=50)),
        (20, 40, Budget()),
        (20, 40, Budget(max_exit=20, max_pace_tps=8.0)),
        (200, 20, Budget(ttft_ms=800.0)),
        (20, 30, Budget(tpot_ms=2.0)),
        (20, 30, Budget(tpot_ms=2.0, on_infeasible="error")),
        (20, 40, Budget(power_w=5.0, tpot_ms=80.0)),
    )
]

#: Agreement of the exits of DEMO.
QUALITY = (0.5, 0.6, 0.7, 1.0)


@examples(12)
@given(st.integers(0, 10_000), st.floats(0.3, 4.0), st.integers(1, 6))
def test_any_mix_of_streams_comes_to_its_end(seed: int, rate: float, burst: int) -> None:
    arrivals = poisson(rate, 6.0, CLASSES, seed=seed, burst=burst)
    quality = (0.6, 0.66, 0.74, 1.0)
    streams = simulate_company(DEMO, arrivals, quality=quality, seed=seed)
    for one in streams:
        assert one.done and all(math.isfinite(gap) and gap > 0 for gap in one.gaps_ms)
        assert set(one.exits) <= set(one.arrival.budget.allowed_exits(DEMO.exits))
        assert one.refused_s is None or one.arrival.budget.on_infeasible == "error"
    if any(one.exits for one in streams):
        assert 0 < summary(streams, DEMO)["mean_depth"] <= 1


def test_a_feasible_company_is_in_time() -> None:
    """Three classes at a quarter of the device's capacity: at most a tenth late, as their probability says."""
    classes = [Arrival(0.0, 30, 120, Budget(tpot_ms=target)) for target in (30.0, 45.0, 90.0)]
    quality = (0.6, 0.66, 0.74, 1.0)
    streams = simulate_company(DEMO, poisson(0.4, 30.0, classes, seed=4), quality=quality, seed=2)
    found = summary(streams, DEMO)
    assert len(streams) > 6 and found["late_share"] <= 0.05 and found["mean_depth"] > 0.85


@pytest.mark.parametrize("count", [1, 2, 3])
def test_readers_at_one_pace_keep_the_full_depth(count: int) -> None:
    """The budget of profiles/reading.toml: 166.7 ms between two tokens leave time for everybody's deepest exit."""
    budget = Budget(max_pace_tps=6.0, tpot_ms=180.0)
    streams = simulate_company(DEMO, [Arrival(0.0, 20, 40, budget)] * count, quality=QUALITY)
    for one in streams:
        assert one.exits == [30] * 40 and one.late_tokens == 0
        assert sum(one.gaps_ms[1:]) / 39 == pytest.approx(1000 / 6, rel=0.01)


def test_a_reader_is_in_time_next_to_a_reply_with_a_ceiling() -> None:
    """The budget of profiles/reading.toml: rounds with their pauses come every 85 to 110 ms, and a token every 167."""
    reader = Budget(max_pace_tps=6.0, tpot_ms=180.0)
    arrivals = [Arrival(0.0, 20, 200, Budget(power_w=3.0)), Arrival(0.0, 20, 60, reader)]
    _, one = simulate_company(DEMO, arrivals, quality=QUALITY)
    assert one.late_tokens <= 3 and sum(one.gaps_ms[1:]) / 59 == pytest.approx(1000 / 6, rel=0.03)
    assert sum(one.exits) / 60 > 25


def test_a_target_comes_before_a_pace_of_the_same_gap() -> None:
    budget = Budget(max_pace_tps=25.0, tpot_ms=40.0)
    streams = simulate_company(DEMO, [Arrival(0.0, 20, 40, budget)] * 2, quality=QUALITY)
    assert [one.late_tokens for one in streams] == [0, 0]


def test_a_deadline_is_kept_at_its_own_pace() -> None:
    budget = Budget(deadline_s=4.0, expected_tokens=40, max_pace_tps=10.1)
    for one in simulate_company(DEMO, [Arrival(0.0, 20, 40, budget)] * 2, quality=QUALITY):
        assert sum(one.gaps_ms) <= 4000 and sum(one.exits) / 40 > 17


def test_a_deadline_is_kept_next_to_a_long_prompt() -> None:
    """80 tokens take 1 s at exit 14, and the prompt 0.7 s: it used to run alone until its end, once there was no time left."""
    due = Budget(deadline_s=2.0, expected_tokens=80)
    arrivals = [Arrival(0.0, 20, 80, due), Arrival(0.1, 1000, 20, Budget())]
    one, other = simulate_company(DEMO, arrivals, quality=QUALITY, physics=Physics(noise=0.0))
    assert not one.missed_deadline and max(one.gaps_ms[1:]) < 60 and len(other.exits) == 20


def test_watts_of_a_company_are_held() -> None:
    """8 W while a step runs and 2 W otherwise: half of the time, once that is learned from our busy seconds."""
    marks: list[tuple[float, float]] = []

    class Metered(CompanyPlant):
        def step(self, moves: Sequence[tuple[SimulatedStream, int]]) -> None:
            super().step(moves)
            marks.append((self.now_s, self.joules))

    simulate_company(DEMO, [Arrival(0.0, 20, 250, Budget(power_w=5.0))] * 2, quality=QUALITY, plant_class=Metered)
    begin_s, begin_j = next(mark for mark in marks if mark[0] > 8)
    end_s, end_j = marks[-1]
    assert (end_j - begin_j) / (end_s - begin_s) == pytest.approx(5.0, rel=0.05)


def test_replies_whose_target_no_exit_holds_still_run_at_once() -> None:
    """The shallowest exit takes 12 ms, of which 8.4 are the first row of stage 0."""
    arrivals = [Arrival(0.1 * number, 64, 60, Budget(tpot_ms=7.0)) for number in range(4)]
    streams = simulate_company(DEMO, arrivals, quality=QUALITY, physics=Physics(noise=0.0))
    assert max(one.gaps_ms[0] for one in streams) < 400, "nobody waits for the end of another one"


def test_chunks_name_rows_that_exist() -> None:
    """The plant refuses rows that are not ready; every mix above would stop there."""
    plant = CompanyPlant(DEMO, Physics(), lambda _: 1.0)
    one = plant.stream(Arrival(0.0, 8, 1, Budget()))
    one.length = 8
    with pytest.raises(AssertionError, match="3 rows of stage 1 asked for, 0 are ready"):
        plant.run_chunk(one, Chunk(0, 1, 3))
    plant.run_chunk(one, Chunk(0, 0, 5))
    with pytest.raises(AssertionError, match="9 rows of stage 1 asked for, 5 are ready"):
        plant.run_chunk(one, Chunk(0, 1, 9))
    plant.run_chunk(one, Chunk(0, 1, 5))
    plant.run_chunk(one, Chunk(0, 0, 2, balcony=True))
    assert one.stages == [5, 5, 0, 0] and one.balconies == [2, 0, 0]


def test_a_prompt_attends_to_its_own_rows() -> None:
    """128 rows fill one bucket of keys; a row more would bind two."""
    costs = replace(DEMO, stages=tuple(replace(unit, key_bucket=128) for unit in DEMO.stages))
    plant = CompanyPlant(costs, Physics(noise=0.0), lambda _: 1.0)
    plant.step([(plant.stream(Arrival(0.0, 128, 1, Budget())), 3)])
    assert 1000 * plant.now_s == pytest.approx(costs.prefill_ms(30, 128))


def test_who_there_is_no_time_for_waits_or_is_refused() -> None:
    """Six ask for a gap that three can have at once; one of them does not want to wait, and one counts more than the others."""
    asked = [Budget(tpot_ms=8.0)] * 4 + [Budget(tpot_ms=8.0, on_infeasible="error"), Budget(tpot_ms=8.0, weight=9)]
    arrivals = [Arrival(0.0, 2, 40, budget) for budget in asked]
    runs = [simulate_company(PRICES, arrivals, quality=(0.5, 0.7, 1.0), admission=one) for one in (True, False)]
    assert [[one.refused_s for one in run] for run in runs] == [[None] * 4 + [0.0, None], [None] * 6]
    assert all(len(one.exits) == 40 for run in runs for one in run if one.refused_s is None)
    order, crowded = ([one.key for one in sorted(run, key=lambda one: sum(one.gaps_ms[:1]))] for run in runs)
    assert order[1:4] == [0, 1, 5] and crowded == [0, 1, 2, 3, 4, 5], "the weightiest is among the first three"


def test_changes_of_exits_and_waits_are_counted() -> None:
    one, other = (CompanyPlant(DEMO, Physics(), lambda _: 1.0).stream(Arrival(0.0, 4, 4, Budget())) for _ in range(2))
    first, second, *_ = DEMO.exits
    one.exits, one.gaps_ms = [first, first, second, first], [50.0, 10.0, 70.0, 10.0]
    other.exits, other.gaps_ms = [second] * 4, [500.0, 10.0, 10.0, 10.0]
    found = summary([one, other], DEMO)
    assert (found["switches"], found["longest_gap_ms"]) == (25.0, 70.0)


def test_who_waits_for_a_place_does_not_stop_the_clock() -> None:
    """The only place is taken by a stream that waits for its pace: the time passes, and the other one follows."""
    rounds: list[float] = []

    def counted(now_s: float, found: Round) -> None:
        rounds.append(now_s)
        assert len(rounds) < 100, "the clock stands still"

    paced = Arrival(0.0, 8, 4, Budget(max_pace_tps=10.0))
    first, second = simulate_company(DEMO, [paced, paced], quality=(1, 1, 1, 1), most_streams=1, log=counted)
    assert all(gap == pytest.approx(100, rel=0.3) for gap in first.gaps_ms[1:])
    assert second.gaps_ms[0] > 300 and len(second.exits) == 4


def test_a_round_does_not_look_at_requests_that_are_still_to_come() -> None:
    """Of 100,000, which the command takes, each round would look at all: 21 ms instead of 0.2."""
    looks, rounds = 0, 0

    class Later(SimulatedStream):
        def __getattribute__(self, name: str) -> Any:
            nonlocal looks
            looks += name == "arrival"
            return super().__getattribute__(name)

    class Plant(CompanyPlant):
        def stream(self, arrival: Arrival, key: int = 0) -> SimulatedStream:
            kind = Later if arrival.time_s else SimulatedStream
            return kind(arrival, [0] * 4, [0] * 3, arrival.prompt_tokens, emitted_s=arrival.time_s, key=key)

    def counted(*_: object) -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 40:
            raise StopIteration

    arrivals = [Arrival(0.0, 20, 60, Budget()), *[Arrival(1e3, 20, 1, Budget())] * 50]
    with pytest.raises(StopIteration):
        simulate_company(DEMO, arrivals, quality=QUALITY, plant_class=Plant, log=counted)
    assert looks < 4 * rounds


def test_late_tokens_are_counted() -> None:
    budget = Budget(tpot_ms=0.01)
    (one,) = streams = simulate_company(DEMO, [Arrival(0.0, 20, 40, budget)], quality=QUALITY)
    assert one.late_tokens == 39, "all but the first"
    assert summary(streams, DEMO)["late_share"] == 1.0


def test_missed_deadlines_are_counted() -> None:
    """Of the tokens that they are for: two come in 90 ms, and three in 110."""
    plant = CompanyPlant(DEMO, Physics(), lambda _: 1.0)
    budgets = [*(Budget(deadline_s=0.1, expected_tokens=count) for count in (2, 3)), Budget()]
    streams = [plant.stream(Arrival(0.0, 4, 3, budget)) for budget in budgets]
    for one in streams:
        one.exits, one.gaps_ms = [30] * 3, [50.0, 40.0, 20.0]
    assert [one.missed_deadline for one in streams] == [False, True, False]
    assert summary(streams, DEMO)["deadlines_missed"] == 0.5


def test_a_deadline_is_not_held_by_fewer_tokens_than_it_is_for() -> None:
    """Three of four in time: unknown if no more were asked for, and missed if the reply ended before."""
    plant = CompanyPlant(DEMO, Physics(), lambda _: 1.0)
    cut, ended, late = (
        plant.stream(Arrival(0.0, 4, 3, Budget(deadline_s=due, expected_tokens=4))) for due in (1, 1, 0.1)
    )
    for one in (cut, ended, late):
        one.exits, one.gaps_ms = [30] * 3, [50.0, 40.0, 20.0]
    ended.exits, ended.gaps_ms = [30] * 2, [50.0, 40.0]
    assert [one.missed_deadline for one in (cut, ended, late)] == [None, True, True]
    assert summary([cut], DEMO)["deadlines_missed"] == 0.0 and summary([cut, ended], DEMO)["deadlines_missed"] == 1.0
