"""Costs: exact prices of passes and steps, and the inverse that sizes a catch-up chunk."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balcony_edge.control.company.prices import RoundEntry, RoundPrices
from balcony_edge.device.costs import MAX_MS, MAX_ROWS, Bend, CostModel, ExpertCost, UnitCost
from balcony_edge.errors import InputError

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


def test_a_step_with_a_backlog_pays_for_the_switch() -> None:
    costs = replace(COSTS, switch_ms=0.5)
    assert costs.steady_ms(8, 100) == COSTS.steady_ms(8, 100)
    # whatever has more rows than the new one, up to the exit: pending rows of the deeper stage say nothing about exit 4
    assert costs.steps_ms((1, 11), (1, 1), 0) == [COSTS.steady_ms(4, 0), COSTS.step_ms(8, (1, 11), (1, 1), 0) + 0.5]
    assert costs.step_ms(4, (1, 1), (11, 1), 0) == COSTS.step_ms(4, (1, 1), (11, 1), 0) + 0.5
    assert costs.prefill_ms(8, 30) == COSTS.prefill_ms(8, 30) + 0.5


@pytest.mark.parametrize(("available_ms", "rows"), [(1.9, 0), (2.0, 1), (2.49, 1), (2.5, 2), (4.0, 5), (1e9, 7)])
def test_rows_within_exact(available_ms: float, rows: int) -> None:
    assert STAGE.rows_within(available_ms, limit=7, context_length=0) == rows


def test_further_rows_of_a_mixture_read_ever_fewer_further_experts() -> None:
    unit = UnitCost(2.0, marginal_row_ms=0.5, experts=ExpertCost(share=0.25, all_ms=6.0))
    assert [unit.pass_ms(rows, 0) for rows in (1, 2, 3)] == [2.0, 2.5 + 6 * 0.25, 3.0 + 6 * (1 - 0.75**2)]
    assert unit.pass_ms(100, 0) == pytest.approx(2.0 + 99 * 0.5 + 6.0)
    prices = [unit.pass_ms(rows, 0) for rows in range(1, 60)]
    steps = [later - earlier for earlier, later in pairwise(prices)]
    assert steps == sorted(steps, reverse=True) and min(steps) >= 0.5
    for rows in (1, 2, 5, 30):
        assert unit.rows_within(unit.pass_ms(rows, 0), limit=100, context_length=0) == rows
    # streams that share a pass share its experts in the same way
    one_stage = CostModel(exits=(1,), stages=(unit,), balconies=(UnitCost(0.0),), head=UnitCost(0.0))
    together = [RoundEntry(0, (1,), (1,), 0)] * 3
    assert RoundPrices(one_stage).round_ms(together) == pytest.approx(unit.pass_ms(3, 0))
    for share, all_ms in ((0.0, 1.0), (1.5, 1.0), (0.5, -1.0)):
        with pytest.raises(ValueError, match=r"share =|all_ms ="):
            ExpertCost(share, all_ms)


def test_streams_that_share_a_pass_pay_for_its_bends() -> None:
    """Five rows are one, one more at 0.5 ms, and three at 0.25; the bends of a balcony are for keys and values alone."""
    stage = UnitCost(2.0, 0.5, 1.0, bends=(Bend(2, 0.25, 0.5),))
    one_stage = CostModel(exits=(1,), stages=(stage,), balconies=(UnitCost(0.0),), head=UnitCost(0.0))
    together = [RoundEntry(0, (1,), (1,), 0)] * 5
    assert RoundPrices(one_stage).round_ms(together) == pytest.approx(stage.pass_ms(5, 0))
    two = CostModel((1, 2), (UnitCost(0.0),) * 2, (stage, UnitCost(0.0)), UnitCost(0.0))
    shallow = [RoundEntry(0, (1, 1), (1, 1), 0)] * 5
    assert RoundPrices(two).round_ms(shallow) == pytest.approx(2.0 + 4 * 0.5)


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
    with pytest.raises(ValueError, match="switch_ms"):
        CostModel((4,), (STAGE,), (STAGE,), STAGE, switch_ms=bad)


@pytest.mark.parametrize("exits", [(), (0,), (8, 4), (4, 4)])
def test_exits_ascend(exits: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        CostModel(exits, (STAGE,) * len(exits), (STAGE,) * len(exits), STAGE)


def test_every_exit_has_a_stage_and_a_balcony() -> None:
    with pytest.raises(ValueError, match="2 exits, 1 stages and 2 balconies"):
        CostModel((4, 8), (STAGE,), (STAGE, STAGE), STAGE)


BENT = UnitCost(
    first_row_ms=10.0,
    marginal_row_ms=2.0,
    context_ms_per_1k=8.0,
    marginal_context_ms_per_1k=4.0,
    key_bucket=128,
    pass_rows=16,
    bends=(Bend(2, 1.0, 2.0), Bend(8, 0.5, 1.0)),
)


@pytest.mark.parametrize(
    ("rows", "context", "queries", "expected"),
    [
        (1, 0, None, 10 + 8 * 0.128),  # one bucket of keys is bound however few there are
        (1, 127, None, 10 + 8 * 0.128),
        (1, 128, None, 10 + 8 * 0.256),  # the row after 128 others opens the next bucket
        (2, 99, None, 12 + (8 + 4) * 0.128),
        (4, 99, None, 12 + 2 * 1 + (8 + 4 + 2 * 2) * 0.128),
        (16, 200, None, 12 + 6 * 1 + 8 * 0.5 + (8 + 4 + 6 * 2 + 8 * 1) * 0.256),
        (16, 200, 1, 12 + 6 * 1 + 8 * 0.5 + 8 * 0.256),  # a balcony: keys and values of all rows, one query
    ],
)
def test_prices_bend_and_keys_come_in_buckets(rows: int, context: int, queries: int | None, expected: float) -> None:
    assert BENT.pass_ms(rows, context, queries) == pytest.approx(expected, rel=1e-12)


def test_more_rows_than_a_pass_takes_are_several_passes_each_over_its_own_keys() -> None:
    # rows 168 to 200 in passes of 16, 16 and 1, as the engine cuts them: from the first pending row on
    parts = (BENT.pass_ms(16, 183), BENT.pass_ms(16, 199), BENT.pass_ms(1, 200))
    assert BENT.pass_ms(33, 200) == pytest.approx(sum(parts), rel=1e-12)
    # a prompt on an empty sequence ends at its own last row, even if the caller says that nothing came before
    assert BENT.pass_ms(33, 0) == BENT.pass_ms(33, 32)


@given(st.integers(1, 200), st.integers(0, 1000), st.floats(0, 500))
def test_rows_within_is_exact_in_one_pass_and_fits_in_several(limit: int, context: int, available: float) -> None:
    rows = BENT.rows_within(available, limit, context)
    if limit <= 16:
        assert rows == max((n for n in range(1, limit + 1) if BENT.pass_ms(n, context) <= available), default=0)
    assert rows == 0 or BENT.pass_ms(rows, context) <= available
    assert rows == limit or BENT.pass_ms(rows + 1, context) > available


def test_prefill_is_a_step_with_all_rows_at_once() -> None:
    assert COSTS.prefill_ms(4, 10) == pytest.approx(
        0.125 + 3.0 + (2.0 + 9 * 0.5 + 10 * 0.009) + (1.0 + 0.9 + 2 * 0.009)
    )
    assert COSTS.prefill_ms(8, 1) == COSTS.steady_ms(8, 0)
    assert COSTS.prefill_ms(8, 5, context_length=95) == COSTS.step_ms(8, (5, 5), (5, 1), 99)


def test_what_bends_must_ascend() -> None:
    with pytest.raises(ValueError, match="must ascend"):
        UnitCost(1.0, bends=(Bend(8, 1.0), Bend(4, 1.0)))
    with pytest.raises(ValueError, match="rows = 1: prices bend after 2 to"):
        Bend(1, 1.0)
    with pytest.raises(ValueError, match="key_bucket = 0"):
        UnitCost(1.0, key_bucket=0)


def test_limits_themselves_are_allowed() -> None:
    assert UnitCost(MAX_MS).first_row_ms == MAX_MS
    assert UnitCost(1.0, key_bucket=1, pass_rows=MAX_ROWS).key_bucket == 1
    assert Bend(2, 1.0).rows == 2
    assert Bend(MAX_ROWS, 1.0).rows == MAX_ROWS


def test_a_long_number_is_cut_after_twenty_digits() -> None:
    with pytest.raises(ValueError, match=r"pass_rows = 1{20}: must be"):
        UnitCost(1.0, pass_rows=int("1" * 30))


def test_each_pass_of_several_attends_to_the_keys_before_its_last_row() -> None:
    # rows 8, 9 and 10 after ten others less: two at once over 9 keys each, then one over 10
    assert UnitCost(1.0, 0.0, 1000.0, pass_rows=2).pass_ms(3, 10) == (1 + 2 * 9) + (1 + 10)


def test_the_head_and_the_norm_take_one_row() -> None:
    steep = replace(COSTS, head=UnitCost(3.0, 7.0), balconies=(COSTS.balconies[0], UnitCost(0.25, 9.0)))
    assert steep.steady_ms(8, 0) == COSTS.steady_ms(8, 0)
    assert steep.prefill_ms(8, 30) == COSTS.prefill_ms(8, 30)


def test_rows_of_another_number_of_exits_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        COSTS.steps_ms((1,), (1,), 0)


def test_an_exit_without_prices_is_refused() -> None:
    with pytest.raises(InputError, match=r"^exit_layer = 5: these prices are for exits 4, 8: pick one of them$"):
        COSTS.steady_ms(5, 0)
    with pytest.raises(InputError, match=r"^exit_layer = '8': "):
        COSTS.prefill_ms("8", 30)  # type: ignore[arg-type]
