"""The controller's cache of prices agrees with the cost model, and recomputes only where the context has grown."""

from __future__ import annotations

import pytest

from balcony_edge.control.step_prices import CONTEXT_STEP, StepPrices
from balcony_edge.device.costs import CostModel, UnitCost

COSTS = CostModel(
    exits=(4, 6, 8),
    stages=(UnitCost(6.0, 1.5, 10.0), UnitCost(4.0, 1.0, 20.0, 3.0), UnitCost(8.0, 2.0, 30.0)),
    balconies=(UnitCost(1.0, 0.1, 5.0), UnitCost(1.5, 0.2, 6.0, 2.0), UnitCost(0.25)),
    head=UnitCost(3.0, 0.5, 1.0),
    overhead_ms=0.125,
    switch_ms=0.5,
)
ONES = (1, 1, 1)


@pytest.mark.parametrize("context", [0, CONTEXT_STEP, 4096])
@pytest.mark.parametrize(
    ("stage_rows", "balcony_rows"),
    [
        (ONES, ONES),
        ((1, 1, 5), ONES),
        ((1, 5, 9), (1, 3, 9)),
        ((1, 5, 5), ONES),
        (ONES, (7, 1, 2)),
        ((1, 2, 2), (7, 2, 2)),
    ],
)
def test_prices_are_those_of_the_cost_model(
    context: int, stage_rows: tuple[int, ...], balcony_rows: tuple[int, ...]
) -> None:
    prices = StepPrices(COSTS)
    assert prices.now_ms(context, stage_rows, balcony_rows) == pytest.approx(
        COSTS.steps_ms(stage_rows, balcony_rows, context)
    )
    assert prices.steady_ms(context) == COSTS.steps_ms(ONES, ONES, context) == prices.exact_ms(context)


def test_prices_are_recomputed_every_few_rows_of_context() -> None:
    prices = StepPrices(COSTS)
    assert prices.steady_ms(CONTEXT_STEP - 1) == prices.exact_ms(0)  # those of the last recomputation
    at_sixteen = prices.steady_ms(CONTEXT_STEP)
    assert at_sixteen == prices.exact_ms(CONTEXT_STEP) != prices.exact_ms(0)
    assert prices.steady_ms(2 * CONTEXT_STEP - 1) is at_sixteen
    assert prices.steady_ms(2 * CONTEXT_STEP) == prices.exact_ms(2 * CONTEXT_STEP)
    assert prices.steady_ms(3) == prices.exact_ms(0)  # another sequence
    assert prices.now_ms(2 * CONTEXT_STEP + 1, ONES, ONES) == pytest.approx(prices.exact_ms(2 * CONTEXT_STEP))
    assert prices.exact_ms(2 * CONTEXT_STEP + 1) != prices.exact_ms(2 * CONTEXT_STEP)


def test_rows_of_another_number_of_exits_are_an_error() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        StepPrices(COSTS).now_ms(64, ONES, (1, 1))
