"""Prices of the next step at every exit, recomputed only when the context grows.

Owns the cache over one cost model. Nothing here depends on a budget or on the slowdown of the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from balcony_edge.device.costs import CostModel

#: Rows of context after which steady prices are recomputed: attention over 16 keys takes microseconds.
CONTEXT_STEP = 16


class _Steady(NamedTuple):
    """Prices with one row at every stage and balcony, for a context of ``step`` × ``CONTEXT_STEP`` rows."""

    step: int
    shared_ms: float
    stages_ms: list[float]
    balconies_ms: list[float]
    exits_ms: list[float]


class StepPrices:
    """Milliseconds of a step at slowdown 1, for the exits of one cost model in ascending order."""

    def __init__(self, costs: CostModel) -> None:
        self._costs, self._ones = costs, (1,) * len(costs.exits)
        self._steady = self._at(0)

    def steady_ms(self, context: int) -> list[float]:
        """Prices without a backlog, for a context that may be up to ``CONTEXT_STEP`` rows shorter."""
        if context // CONTEXT_STEP != self._steady.step:
            self._steady = self._at(context // CONTEXT_STEP * CONTEXT_STEP)
        return self._steady.exits_ms

    def now_ms(self, context: int, stage_rows: Sequence[int], balcony_rows: Sequence[int]) -> list[float]:
        """Prices with the rows that are due at each stage and balcony, the new ones included."""
        self.steady_ms(context)
        costs, steady, bound = self._costs, self._steady, True
        shared_ms, now_ms = steady.shared_ms, []
        for index, (rows, kept) in enumerate(zip(stage_rows, balcony_rows, strict=True)):
            bound = bound and rows == 1
            shared_ms += steady.stages_ms[index] if rows == 1 else costs.stages[index].pass_ms(rows, context)
            balcony_ms = steady.balconies_ms[index] if kept == 1 else costs.balconies[index].pass_ms(kept, context, 1)
            price_ms = shared_ms + balcony_ms
            now_ms.append(price_ms if bound and kept == 1 else price_ms + costs.switch_ms)
        return now_ms

    def exact_ms(self, context: int) -> list[float]:
        """Prices without a backlog at exactly this context."""
        return self._costs.steps_ms(self._ones, self._ones, context)

    def _at(self, context: int) -> _Steady:
        costs = self._costs
        return _Steady(
            step=context // CONTEXT_STEP,
            shared_ms=costs.overhead_ms + costs.head.pass_ms(1, context),
            stages_ms=[unit.pass_ms(1, context) for unit in costs.stages],
            balconies_ms=[unit.pass_ms(1, context) for unit in costs.balconies],
            exits_ms=self.exact_ms(context),
        )
