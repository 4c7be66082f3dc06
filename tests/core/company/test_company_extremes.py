"""The joint decision on states that no simulation reaches: any times, budgets, backlogs and slowdowns, with jumps in time."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
from hypothesis import given

from balcony_edge.budget import Budget
from balcony_edge.control.company.joint import JointController
from balcony_edge.control.company.seen import CompanyState, RoundSeen, StreamSeen
from balcony_edge.control.decision import Measurement
from balcony_edge.control.slowdown import Slowdown
from balcony_edge.device.readings import Reading
from balcony_edge.errors import BudgetError
from tests.support.prices import DEMO
from tests.support.properties import CHANCE, examples

QUALITY = (0.6, 0.66, 0.74, 1.0)
EXITS = DEMO.exits
#: Key of a budget → values, from none at all to beyond reason.
VALUES: dict[str, tuple[Any, ...]] = {
    "tpot_ms": (1e-3, 0.5, 12.0, 40.0, 1e4),
    "ttft_ms": (1e-3, 5.0, 300.0, 1e5),
    "deadline_s": (1e-3, 1.0, 5.0, 1e4),
    "max_pace_tps": (0.1, 5.0, 100.0),
    "power_w": (0.5, 5.0, 500.0),
    "temperature_c": (30.0, 90.0),
    "cpu_utilization": (0.05, 0.9),
    "energy_j_per_token": (1e-3, 10.0),
    "weight": (0.01, 100.0),
    "max_exit": EXITS,
    "on_infeasible": ("error",),
    "hysteresis": (0.0, 0.5),
    "probability": (0.5, 0.99),
}


def random_budget(chance: Random) -> Budget:
    keys = {key: chance.choice(values) for key, values in VALUES.items() if chance.random() < 0.3}
    if "deadline_s" in keys:
        keys["expected_tokens"] = chance.choice((1, 5, 200, 10**6))
    try:
        return Budget(**keys)
    except BudgetError:  # the keys contradict one another
        return Budget()


def random_stream(chance: Random, key: int) -> StreamSeen:
    """A stream whose deeper stages and balconies have at least as many rows pending as the stage before."""
    stages = [chance.randint(1, 400)]
    for _ in EXITS[1:]:
        stages.append(stages[-1] + chance.choice((0, chance.randint(0, 50))))
    balconies = [*(rows + chance.choice((0, 3)) for rows in stages[:-1]), 1]
    made, context = chance.choice((0, 0, 1, 5, 300)), chance.randint(0, 2000)
    return StreamSeen(
        key, random_budget(chance), context, stages, balconies, made, chance.uniform(0, 10), chance.uniform(0, 10)
    )


@examples(60)
@given(CHANCE)
def test_every_company_gets_a_round(chance: Random) -> None:
    """No error, no NaN, only allowed exits, and something happens: a token, rows, a refusal, or a finite wait."""
    controller = JointController(DEMO, QUALITY)
    variance = chance.choice((0.0, 1e-9, 0.04, 4.0))
    state = CompanyState(Slowdown(chance.uniform(-3, 3), variance, noise_variance=1e-4))
    streams = {key: random_stream(chance, key) for key in range(chance.randint(1, 12))}
    now_s = 10.0
    for _ in range(5):
        measured = Reading("board", "board", now_s, watts=chance.uniform(0, 20), celsius=chance.uniform(20, 110))
        seen = RoundSeen(tuple(streams.values()), None, now_s, readings=chance.choice(((), (measured,))))
        state, found = controller.decide(state, seen)
        *others, newcomer = seen.streams
        controller.refusal(state, seen._replace(streams=tuple(others) or seen.streams), newcomer)
        assert found.moves or found.chunk or found.refused or found.wait_ms > 0
        assert 0 <= found.wait_ms < math.inf and 0 <= found.price_ms < math.inf
        for move in found.moves:
            one = streams[move.key]
            assert move.decision.exit_layer in one.budget.allowed_exits(EXITS)
            assert math.isfinite(move.decision.predicted_ms) and 0 <= move.decision.probability <= 1
            streams[move.key] = one._replace(made_tokens=one.made_tokens + 1, asked_s=now_s)
        for key, why in found.refused:
            assert streams.pop(key).budget.on_infeasible == "error" and why.endswith("or allow less depth")
        if not streams:
            return
        now_s += chance.choice((0.0, 0.001, 0.05, 3.0))


def test_rounds_in_which_nothing_changes_are_decided_as_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The short way gives the same state and the same round, to the digit, wherever it is taken."""
    chance, taken, rows = Random(0), 0, (1,) * len(EXITS)
    dues = [rows] * 19 + [(1, *(9 for _ in rows[1:]))]  # seldom with pending rows
    for _ in range(40):
        budgets = [
            Budget(tpot_ms=chance.choice((12.0, 60.0, 1e4)), probability=chance.choice((0.5, 0.95))) if chance.random() < 0.8
            else Budget()
            for _ in range(chance.randint(1, 5))
        ]  # fmt: skip
        controller, state, last, now_s = JointController(DEMO, QUALITY), CompanyState(), None, 10.0
        for made in range(1, 40):
            asked_s = [now_s - chance.uniform(0.0, 0.02) for _ in budgets]
            streams = [
                StreamSeen(
                    key, budget, 50 + made, chance.choice(dues), rows, made, 0.0, asked_s[key], chance.random() < 0.9
                )
                for key, budget in enumerate(budgets)
            ]
            seen = RoundSeen(tuple(streams), last, now_s)
            short = controller._unchanged(state, seen, controller._learn(state, last))
            with monkeypatch.context() as patch:
                patch.setattr(controller, "_unchanged", lambda *_: None)
                state, found = controller.decide(state, seen)
            assert short is None or repr(short) == repr((state, found))
            taken += short is not None
            last = Measurement(EXITS[found.deepest], found.price_ms, found.price_ms * chance.uniform(0.8, 1.3))
            now_s += 0.01
    assert 100 < taken < 1500
