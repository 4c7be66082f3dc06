"""The way back to a deeper exit: sprints, chunks, and the one token that may be late."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from balcony_edge.budget import Budget
from balcony_edge.control.catching_up import CREDIT_SHARE, FIRST_WAIT, HELD, Recovery, Way, way_back
from balcony_edge.control.controller import Controller, ControllerState
from balcony_edge.control.decision import CatchUp, Measurement, Observation, Outlook
from balcony_edge.control.slowdown import Slowdown
from balcony_edge.device.costs import CostModel, UnitCost
from balcony_edge.device.profile import DeviceProfile
from balcony_edge.simulation.plant import Physics, Plant
from balcony_edge.simulation.simulate import simulate
from tests.support.prices import DEMO, MARGIN, SETTLED_DEVIATION, layers

INT4 = DeviceProfile.load(Path(__file__).parents[3] / "profiles" / "devices" / "server-2-cores-epyc-int4.json").costs
#: Time of the shipped int4 profile's full depth, and its prices at a context of constant length.
FULL_MS = INT4.steady_ms(30, 64)
FLAT = replace(
    INT4, stages=tuple(replace(unit, context_ms_per_1k=0.0, marginal_context_ms_per_1k=0.0) for unit in INT4.stages)
)
# Steady prices 10, 14 and 21 ms; a further row costs a fourth of the first, as in int4.
STEEP = CostModel(
    exits=(4, 6, 8),
    stages=(UnitCost(6.0, 1.5), UnitCost(4.0, 1.0), UnitCost(8.0, 2.0)),
    balconies=(UnitCost(1.0, 0.01), UnitCost(1.0, 0.01), UnitCost(0.0)),
    head=UnitCost(3.0),
    switch_ms=0.5,
)
TARGET = Budget(tpot_ms=23 / MARGIN)
FRESH = Recovery()


def at(exit_layer: int, recovery: Recovery = FRESH, tokens: int = 100) -> ControllerState:
    """A state whose filter is sure."""
    slowdown = Slowdown(variance=0.0, noise_variance=SETTLED_DEVIATION**2)
    state = ControllerState(exit_layer, tokens, catching_up=False, tpot_ms=TARGET.tpot_ms or 0.0, slowdown=slowdown)
    return state._replace(recovery=recovery)


def seen(
    stages: tuple[int, ...], balconies: tuple[int, ...], budget: Budget = TARGET, context: int = 500
) -> Observation:
    return Observation(budget, context, stages, balconies)


@pytest.mark.parametrize("loaded_s", [0.0, 1.0])
@pytest.mark.parametrize("of_full", [1.1, 1.15, 1.18, 1.25])
def test_a_target_just_above_the_full_depth_comes_back_to_it(loaded_s: float, of_full: float) -> None:
    """Without sprints and a late entry all of these stay at exit 20 for as long as one looks."""
    plant = Plant(FLAT, Physics(), lambda now_s: 1.7 if now_s < loaded_s else 1.0, seed=3)
    run = simulate(FLAT, plant, Budget(tpot_ms=of_full * FULL_MS), tokens=900)
    tokens = [token for token in run[1:] if token.time_s > loaded_s + 0.05]
    assert {token.decision.exit_layer for token in tokens[400:]} == {30}
    late = [token.latency_ms / of_full for token in tokens if token.latency_ms > of_full * 5.52]
    assert len(late) <= 9 and max(late, default=0.0) <= 2.2 * 5.52


def test_a_sprint_goes_where_the_slack_takes_two_rows() -> None:
    # 23 - 14 = 9 ms at exit 6 take one row of stage 2 (8 ms) for each that is added; 23 - 10 = 13 ms at exit 4 take three.
    state, decision = Controller(STEEP).decide(at(6), seen((1, 1, 61), (1, 1, 1)))
    assert (decision.exit_layer, decision.catch_up) == (4, CatchUp(2, 3))
    assert decision.reason == "8 fits, catching up 3 rows of stage 2 at 4: deeper exits leave no time for it"
    assert (state.recovery.goal, state.recovery.wait) == (8, FIRST_WAIT)
    # it goes on, also after the dwell, and though another could not begin
    again, decision = Controller(STEEP).decide(state._replace(tokens_since_switch=9), seen((1, 2, 59), (1, 61, 1)))
    assert (decision.exit_layer, again.recovery.goal) == (4, 8)
    assert again.recovery.wait == FIRST_WAIT  # which begins when it is over


@pytest.mark.parametrize(
    ("recovery", "budget", "exit_layer"),
    [
        (Recovery(), TARGET, 4),
        (Recovery(wait=1), TARGET, 4),  # this token is what was waited for
        (Recovery(wait=2), TARGET, 6),
        (Recovery(credit=0.5), TARGET, 6),  # it could not be ended by a late token
        (Recovery(), TARGET.model_copy(update={"min_exit": 6}), 6),
        (Recovery(), TARGET.model_copy(update={"tpot_ms": 21.3}), 6),  # the full depth is not within its hysteresis
    ],
)
def test_when_a_sprint_begins(recovery: Recovery, budget: Budget, exit_layer: int) -> None:
    decision = Controller(STEEP).decide(at(6, recovery), seen((1, 1, 61), (1, 1, 1), budget))[1]
    assert decision.exit_layer == exit_layer


def test_a_sprint_must_pay_within_the_length_of_the_sequence() -> None:
    # 3,000 rows at three a token, of which one is new, take 1,700 tokens at exit 4; 500 rows of context do not promise them.
    for context, exit_layer in ((500, 6), (9000, 4)):
        decision = Controller(STEEP).decide(at(6), seen((1, 1, 3001), (1, 1, 1), context=context))[1]
        assert decision.exit_layer == exit_layer


def test_a_balcony_that_lags_behind_is_served_before_the_sprint() -> None:
    # 1 + 2,000 rows × 0.01 ms of exit 4's balcony are no step within 23 ms: 9 ms at exit 6 take 801 of them.
    state, decision = Controller(STEEP).decide(at(6), seen((1, 1, 61), (2001, 1, 1)))
    assert (decision.exit_layer, decision.catch_up) == (6, CatchUp(0, 801, balcony=True))
    assert decision.reason == "8 fits, catching up 801 rows of balcony 4"
    assert state.recovery.goal is None


def test_the_last_rows_may_make_one_token_late() -> None:
    # 21 + 0.5 ms and one row of 2 ms do not fit into 23: by credit, or not at all
    rows = seen((1, 1, 2), (1, 1, 1))
    state, decision = Controller(STEEP).decide(at(6), rows)
    assert (decision.exit_layer, decision.price_ms, decision.catch_up) == (8, 23.5, None)
    assert decision.reason == "up to 8 with its last pending rows: one token may be late"
    assert decision.probability < 0.6
    assert Controller(STEEP).decide(at(6, Recovery(credit=0.9)), rows)[1].exit_layer == 6
    assert Controller(STEEP).decide(at(6, tokens=2), rows)[1].exit_layer == 6  # the dwell holds for it as well
    late = Measurement(8, decision.price_ms, 24.0)
    after, decision = Controller(STEEP).decide(state, seen((1, 1, 1), (2, 2, 1))._replace(last=late))
    assert decision.exit_layer == 8
    assert after.recovery.credit == pytest.approx(CREDIT_SHARE * 0.1)


def test_credit_grows_by_what_the_probability_leaves_and_a_late_token_takes_one() -> None:
    on_time, late = Measurement(8, 20.0, 22.0), Measurement(8, 20.0, 24.0)
    recovery = Recovery(credit=0.0).counted(on_time, 23.0, 0.9, held=0)
    assert recovery.credit == pytest.approx(0.05)
    assert recovery.counted(late, 23.0, 0.9, held=0).credit == pytest.approx(0.05 + 0.05 - 1)
    assert Recovery(credit=-0.9).counted(late, 23.0, 0.99, held=0).credit == -1.0
    assert Recovery().counted(on_time, 23.0, 0.9, held=0) == Recovery()  # one at most
    assert Recovery(credit=0.3).counted(late, math.inf, 0.9, held=0).credit == 0.3  # nothing is late without a target


def test_each_sprint_waits_twice_as_long_until_the_deepest_exit_is_held() -> None:
    recovery, waits = Recovery(), []
    for _ in range(7):
        recovery = recovery.towards(8)
        waits.append(recovery.wait)
        assert recovery.towards(8) is recovery  # it goes on
        recovery = recovery.towards(None)
    assert waits == [FIRST_WAIT << doublings for doublings in (0, 1, 2, 3, 4, 4, 4)]
    assert recovery.towards(8).counted(None, 23.0, 0.9, held=0).wait == FIRST_WAIT << 4  # it begins after the sprint
    first = ControllerState.initial()  # a first token has held nothing, and in a reply without switches all count
    assert (first.tokens_at_exit, first._replace(tokens_since_switch=first.tokens_since_switch + 7).tokens_at_exit) == (
        0,
        7,
    )
    counted = recovery.counted(None, 23.0, 0.9, held=HELD - 1)
    assert (counted.wait, counted.sprints) == (waits[-1] - 1, recovery.sprints)
    assert recovery.counted(None, 23.0, 0.9, held=HELD).wait == 0, "the next one may begin at once"
    assert recovery.counted(None, 23.0, 0.9, held=HELD).towards(8).wait == FIRST_WAIT


def test_a_sprint_that_comes_no_closer_is_given_up() -> None:
    """A second load, within the hysteresis, begins in mid-sprint: one row a token goes and one comes."""
    for of_full, load in ((1.06, 1.04), (1.08, 1.06), (1.1, 1.08), (1.12, 1.1)):
        plant = Plant(
            FLAT, Physics(noise=0.01), lambda s, load=load: 1.35 if s < 0.5 else 1.0 if s < 0.9 else load, seed=1
        )
        tokens = simulate(FLAT, plant, Budget(tpot_ms=of_full * FULL_MS), tokens=1200)
        late = [token.decision.exit_layer for token in tokens[500:]]
        assert sum(late) / len(late) >= 19, (of_full, load)


def test_a_lowered_target_does_not_judge_the_step_before_it() -> None:
    state = at(6)._replace(tpot_ms=40.0)
    last = Measurement(6, 14.0, 24.0)  # late for 23.6 ms, in time for the 40 that it was made for
    after, _ = Controller(STEEP).decide(state, seen((1, 1, 61), (1, 1, 1))._replace(last=last))
    assert after.recovery.credit == 1.0


def test_a_sprint_is_over_where_its_slack_takes_one_row() -> None:
    # 18.2 - 10 = 8.2 ms at exit 4 take one row of stage 2 for each that is added
    level = replace(STEEP, stages=(UnitCost(6.0, 1.5), UnitCost(1.0, 0.25), UnitCost(8.0, 2.0)))
    budget = Budget(tpot_ms=18.2 / MARGIN)
    state = at(4, Recovery(goal=8, wait=FIRST_WAIT, sprints=1))
    after, decision = Controller(level).decide(state, seen((1, 10, 70), (1, 70, 1), budget))
    assert (decision.exit_layer, after.recovery.goal) == (6, None)


# --- One token on the way, by hand: exits by index, steady prices 10, 14 and 21 ms. ---------------------------------


def way(
    stages: tuple[int, ...],
    balconies: tuple[int, ...] = (1, 1, 1),
    room_ms: float = 23.0,
    context: int = 500,
    costs: CostModel = STEEP,
    **more: Any,
) -> Way | None:
    """The next token on the way back; the room of a step with a chunk is that of any step unless ``beside_ms`` is given."""
    arguments = {"chosen": 1, "present": None, "credit": False, "may_sprint": False}
    arguments |= {name: more.pop(name) for name in arguments.keys() & more.keys()}
    outlook = Outlook(
        now_ms=costs.steps_ms(stages, balconies, context),
        steady_ms=costs.steps_ms((1, 1, 1), (1, 1, 1), context),
        room_ms=[room_ms] * 3 + [more.pop("beside_ms", room_ms)],
        may_enter=more.pop("may_enter", [True] * 3),
        lowest=more.pop("lowest", 0),
        highest=more.pop("highest", 2),
        may_rise=more.pop("may_rise", True),
    )
    assert not more
    return way_back(costs, outlook, seen(stages, balconies, context=context), **arguments)


@pytest.mark.parametrize(
    ("room_ms", "beside_ms", "rows"),
    [
        (34.0, 34.0, 7),  # 20 ms beside a token at exit 6: 8 ms and six further rows of 2 ms
        (33.9, 33.9, 6),
        (26.0, 26.0, 3),
        (34.0, 26.0, 3),  # a step with a chunk has less room
        (24.0, 24.0, 2),
        (22.0, 22.0, None),  # 21.5 ms and one row of 2 ms would be late at the entry
    ],
)
def test_a_chunk_fills_the_slack_of_the_present_exit(room_ms: float, beside_ms: float, rows: int | None) -> None:
    found = way((1, 1, 61), room_ms=room_ms, beside_ms=beside_ms)
    assert found == (None if rows is None else Way(1, 2, False, CatchUp(2, rows), 8.0 + 2.0 * (rows - 1)))


def test_the_shallowest_consumer_with_enough_rows_comes_first() -> None:
    """From exit 4, 24 ms beside a token take 21 rows of stage 1 or 9 of stage 2."""
    assert way((1, 40, 80), room_ms=34.0, chosen=0) == Way(0, 2, False, CatchUp(1, 21), 24.0)
    # 9 of 21 rows fill less of the slack than 9 of 9
    assert way((1, 10, 80), room_ms=34.0, chosen=0) == Way(0, 2, False, CatchUp(2, 9), 24.0)
    # a consumer needs more rows than there are consumers
    assert way((1, 3, 40), room_ms=34.0, chosen=0) == Way(0, 2, False, CatchUp(2, 9), 24.0)
    assert way((1, 30, 32), room_ms=34.0, chosen=0) == Way(0, 2, False, CatchUp(1, 21), 24.0)
    # neither fills it: 15 of 21 rows are more than 6 of 9
    assert way((1, 16, 22), room_ms=34.0, chosen=0) == Way(0, 2, False, CatchUp(1, 15), 18.0)
    assert way((1, 13, 21), room_ms=34.0, chosen=0) == Way(0, 2, False, CatchUp(2, 8), 22.0)


def test_a_balcony_that_lags_behind_its_stage_is_on_the_way() -> None:
    found = way((1, 1, 61), (1, 1001, 1), chosen=0, may_enter=[True, True, False])
    assert found == Way(0, 1, False, CatchUp(1, 1000, balcony=True), 1 + 999 * 0.01)
    # 13 ms beside a token at exit 4 take 1,201 of its rows
    longer = way((1, 1, 61), (1, 2001, 1), chosen=0, may_enter=[True, True, False])
    assert longer is not None and longer.chunk == CatchUp(1, 1201, balcony=True)
    # as many rows as its stage has: they go through both in one pass
    alone = way((1, 30, 30), (1, 30, 1), chosen=0, may_enter=[True, True, False])
    assert alone == Way(0, 1, False, CatchUp(1, 10), 13.0)


@pytest.mark.parametrize(("rows", "found"), [(5, Way(1, 1)), (6, Way(0, 1, False, CatchUp(1, 5, balcony=True), 1.04))])
def test_a_balconys_last_rows_are_those_that_come_on_the_way(rows: int, found: Way) -> None:
    # Stage and balcony of exit 6 are on the way from exit 4: two rows at the first and four at the second may be left.
    assert way((1, 1, 61), (1, rows, 1), room_ms=14.5, chosen=0, credit=True, may_enter=[True, True, False]) == found


def test_a_balconys_chunk_attends_with_one_row() -> None:
    """Its other rows only leave keys and values: 1 ms over 1,000 rows of context is paid once."""
    costs = replace(STEEP, balconies=(UnitCost(1.0, 0.01), UnitCost(1.0, 0.01, 1.0), UnitCost(0.0)))
    found = way((1, 1, 61), (1, 2001, 1), context=1000, costs=costs, chosen=0, may_enter=[True, True, False])
    assert found == Way(0, 1, False, CatchUp(1, 1101, balcony=True), 13.0)


def test_the_price_of_a_balconys_rows_is_that_of_one_query() -> None:
    """With each row as a query the entry would be late, and more rows of the balcony would come than go."""
    costs = replace(
        STEEP,
        stages=(UnitCost(6.0, 1.5), UnitCost(1.0, 0.1), UnitCost(8.0, 2.0)),
        balconies=(UnitCost(1.0, 0.01), UnitCost(1.0, 0.01, 1.0), UnitCost(0.0)),
    )
    rows: Any = {"stages": (1, 1, 61), "balconies": (1, 1001, 1), "context": 1000, "costs": costs, "chosen": 0}
    # a step at exit 6 takes 12 ms, and its entry 0.5 + 0.2 + 0.04 ms more
    found = way(**rows, room_ms=12.755, may_enter=[True, True, False])
    assert found is not None and found.chunk == CatchUp(1, 76, balcony=True)
    onward = way(**rows, room_ms=12.505, present=0)
    assert onward is not None and onward.sprint and onward.chunk == CatchUp(1, 51, balcony=True)


def test_a_balcony_that_has_as_many_rows_as_its_stage_is_no_consumer() -> None:
    found = way((1, 3, 3), (1, 3, 1), room_ms=14.5, chosen=0, credit=True, may_enter=[True, True, False])
    assert found == Way(0, 1, False, CatchUp(1, 1), 4.0)


@pytest.mark.parametrize(("may_sprint", "found"), [(False, Way(0, 2, False, CatchUp(1, 5), 8.0)), (True, None)])
def test_a_base_is_sought_where_too_few_rows_go(may_sprint: bool, found: Way | None) -> None:
    """From exit 4, 8 ms take five rows of stage 1 or one of stage 2: more rows come than go, whatever the base."""
    got = way((1, 40, 80), room_ms=18.0, chosen=0, credit=True, may_sprint=may_sprint, may_enter=[True, False, True])
    assert got == found


def test_a_goal_that_may_not_be_entered_gives_way_to_the_next() -> None:
    assert way((1, 40, 80), room_ms=34.0, chosen=0, highest=1) == Way(0, 1, False, CatchUp(1, 21), 24.0)
    assert way((1, 40, 80), room_ms=34.0, chosen=0, may_enter=[True, True, False]) == Way(
        0, 1, False, CatchUp(1, 21), 24.0
    )
    assert way((1, 40, 80), room_ms=34.0, chosen=0, may_enter=[True, False, False]) is None
    assert way((1, 40, 80), room_ms=34.0, chosen=2) is None  # the deepest has no goal


@pytest.mark.parametrize(
    ("room_ms", "more", "enters"),
    [
        (23.0, {"credit": True}, True),
        (23.0, {"credit": False}, False),
        (23.0, {"credit": True, "may_rise": False}, False),
        (23.5, {"credit": True}, False),  # it fits: a token in time, for which only the dwell is missing
        (11.7, {"credit": True}, False),  # more than two rooms
        (11.75, {"credit": True}, True),
    ],
)
def test_the_last_row_by_credit(room_ms: float, more: dict[str, Any], enters: bool) -> None:
    """21 + 0.5 ms and one further row of 2 ms."""
    found = way((1, 1, 2), room_ms=room_ms, **more)
    assert found == (Way(2, 2) if enters else None)


@pytest.mark.parametrize(
    ("stages", "credit", "found"),
    [
        # 2 rows at the first consumer and 4 at the second are those that the entry pays for: 2 + 8 ms more than 21.5
        ((1, 3, 5), True, Way(2, 2)),
        ((1, 3, 5), False, None),
        ((1, 3, 6), True, Way(0, 2, True, CatchUp(2, 3), 12.0)),
        ((1, 4, 5), True, Way(0, 2, True, CatchUp(1, 3), 6.0)),
        ((1, 3, 40), False, Way(0, 2, True, CatchUp(2, 3), 12.0)),
        ((1, 20, 40), False, Way(0, 2, True, CatchUp(1, 10), 13.0)),
    ],
)
def test_a_sprint_goes_on_until_its_goal_is_entered(stages: tuple[int, ...], credit: bool, found: Way | None) -> None:
    assert way(stages, present=0, credit=credit) == found


def test_a_sprint_without_slack_goes_on_without_a_chunk() -> None:
    found = way((1, 3, 40), (1201, 1, 1), present=0)  # its balcony's 1,200 rows take 12 ms and leave 0.5
    assert found == Way(0, 2, True)
    assert found.words(STEEP.exits) == "8 fits, catching up at 4: deeper exits leave no time for it"


@pytest.mark.parametrize(
    "more",
    [
        {"present": None},  # no sprint, and none may begin
        {"room_ms": 20.9},  # its goal would not hold the target any more
        {"room_ms": 20.9, "credit": True},
        {"beside_ms": 17.9},  # the slack takes no row of the last stage
        {"lowest": 1},  # its exit is not allowed any more
        {"chosen": 2},
    ],
)
def test_a_sprint_ends(more: dict[str, Any]) -> None:
    assert way((1, 3, 40), **{"present": 0, **more}) is None


def test_a_sprint_goes_to_a_nearer_goal_if_the_far_one_is_lost() -> None:
    """At 15 ms the deepest exit is out of reach, and from exit 4 exit 6 is not: 5 ms take two rows of stage 1."""
    assert way((1, 20, 40), room_ms=15.0, chosen=0, present=0) == Way(0, 1, True, CatchUp(1, 2), 5.0)


@pytest.mark.parametrize(
    ("way_of", "words"),
    [
        (Way(2, 2), "up to 8 with its last pending rows: one token may be late"),
        (Way(1, 2), "8 fits, catching up"),
        (Way(1, 2, False, CatchUp(2, 7)), "8 fits, catching up 7 rows of stage 2"),
        (Way(0, 1, False, CatchUp(1, 9, balcony=True)), "6 fits, catching up 9 rows of balcony 6"),
        (
            Way(0, 2, True, CatchUp(1, 9)),
            "8 fits, catching up 9 rows of stage 1 at 4: deeper exits leave no time for it",
        ),
    ],
)
def test_the_way_in_words(way_of: Way, words: str) -> None:
    assert way_of.words(STEEP.exits) == words


def test_rows_that_took_longer_than_a_wait_make_one_token_late_and_no_further() -> None:
    """A step at exit 8 takes 9 ms, and a row of the 22 layers after it 13: too long for a wait of 11."""
    far = replace(DEMO, exits=(8, 30), stages=(layers(8), layers(22)), balconies=(layers(1), UnitCost(0.05)))
    plant = Plant(far, Physics(noise=0.0), lambda _: 1.0, prompt_tokens=64)
    tokens = simulate(far, plant, Budget(max_pace_tps=50, tpot_ms=21), tokens=60)
    assert sum(token.latency_ms > 21 for token in tokens[1:]) <= 1


def test_rows_run_in_a_wait_only_if_it_has_time_for_a_step_as_on_a_device() -> None:
    """A step at exit 14 takes 12 ms. A wait of 7.5 has time for rows of stage 1, but the decode loop does not know that."""
    plant = Plant(DEMO, Physics(noise=0.0), lambda _: 1.0, prompt_tokens=40)
    plant.step(14)
    plant.step(14, period_ms=20.0, idle_ms=7.5)
    assert plant.rows_due()[0] == [1, 42, 42, 42]
    plant.step(14, period_ms=40.0, idle_ms=27.0)
    assert plant.rows_due()[0][1] < 42
