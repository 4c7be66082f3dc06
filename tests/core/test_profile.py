"""Costs: exact prices of passes and steps, and the inverse that sizes a catch-up chunk."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balcony_edge.profile import CostModel, UnitCost

STAGE = UnitCost(first_row_ms=2.0, marginal_row_ms=0.5, context_ms_per_1k=1.0)
COSTS = CostModel(
    exits=(4, 8),
    stages=(STAGE, STAGE),
    balconies=(UnitCost(1.0, 0.1, 2.0), UnitCost(0.25)),
    head=UnitCost(3.0),
    overhead_ms=0.125,
)


def test_pass_charges_attention_per_query_row() -> None:
    assert STAGE.pass_ms(0, 1000) == 0.0
    assert STAGE.pass_ms(1, 0) == 2.0
    assert STAGE.pass_ms(4, 500) == 2.0 + 3 * 0.5 + 4 * 0.5
    assert STAGE.pass_ms(4, 500, query_rows=1) == 2.0 + 3 * 0.5 + 0.5


def test_step_runs_the_stages_up_to_the_exit_then_its_balcony_and_the_head() -> None:
    assert COSTS.steady_ms(4, 0) == 0.125 + 3.0 + 2.0 + 1.0
    assert COSTS.steady_ms(8, 1000) == 0.125 + 3.0 + 2 * (2.0 + 1.0) + 0.25
    # Going up pays the stage's ten pending rows, going down those of the balcony: keys and values only.
    assert COSTS.step_ms(8, (1, 11), (1, 1), 0) == 0.125 + 3.0 + 2.0 + (2.0 + 10 * 0.5) + 0.25
    assert COSTS.step_ms(4, (1, 1), (11, 1), 1000) == pytest.approx(0.125 + 3.0 + 3.0 + (1.0 + 10 * 0.1 + 2.0))
    assert COSTS.steps_ms((1, 11), (5, 1), 700) == [
        COSTS.step_ms(4, (1, 11), (5, 1), 700),
        COSTS.step_ms(8, (1, 11), (5, 1), 700),
    ]


@pytest.mark.parametrize(("available_ms", "rows"), [(1.9, 0), (2.0, 1), (2.49, 1), (2.5, 2), (4.0, 5), (1e9, 7)])
def test_rows_within_exact(available_ms: float, rows: int) -> None:
    assert STAGE.rows_within(available_ms, limit=7, context_length=0) == rows


def test_rows_within_when_further_rows_are_free() -> None:
    assert UnitCost(1.0).rows_within(1.0, limit=10**9, context_length=10**6) == 10**9
    assert UnitCost(1.0).rows_within(2.0, limit=0, context_length=0) == 0


millis = st.floats(0, 1e4)


@given(
    st.tuples(millis, millis, millis),
    st.floats(-10, 1e6),
    st.integers(0, 10**6),
    st.integers(0, 10**5),
    st.sampled_from([None, 1]),
)
def test_rows_within_is_the_most_that_fits(
    prices: tuple[float, float, float], available: float, limit: int, length: int, queries: int | None
) -> None:
    unit = UnitCost(*prices)
    rows = unit.rows_within(available, limit, length, queries)
    assert 0 <= rows <= limit
    if rows:
        assert unit.pass_ms(rows, length, queries) <= available
    if rows < limit:  # one more would not fit, but for rounding
        assert unit.pass_ms(rows + 1, length, queries) > available * (1 - 1e-9) - 1e-9


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_costs_are_finite_and_not_negative(bad: float) -> None:
    with pytest.raises(ValueError, match="marginal_row_ms"):
        UnitCost(1.0, bad)
    with pytest.raises(ValueError, match="overhead_ms"):
        CostModel((4,), (STAGE,), (STAGE,), STAGE, bad)


@pytest.mark.parametrize("exits", [(), (0,), (8, 4), (4, 4)])
def test_exits_ascend(exits: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        CostModel(exits, (STAGE,) * len(exits), (STAGE,) * len(exits), STAGE)


def test_every_exit_has_a_stage_and_a_balcony() -> None:
    with pytest.raises(ValueError, match="2 exits, 1 stages and 2 balconies"):
        CostModel((4, 8), (STAGE,), (STAGE, STAGE), STAGE)
