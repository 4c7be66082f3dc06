"""Prices of rounds: what one step of several streams costs, from the prices of passes.

Owns the arithmetic of sharing. A pass reads its weights once: the first row pays for them, and every further row, of the same
stream or of another one, costs what a further row costs. Attention is paid for each stream's own context. A stream that
shares no passes pays for a whole step.

So the price of a round is a sum over its tokens, plus the price of the passes that at least one of them shares. One decision
compares dozens of rounds that differ in a token or two, so each token's part is reckoned for itself, and how many of them share
each pass is one integer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import starmap
from typing import NamedTuple

from balcony_edge.control.company.seen import StreamSeen
from balcony_edge.device.costs import CostModel, UnitCost

#: Bits that count the tokens of one pass.
COUNT_BITS = 16
#: Sets of shared passes whose prices are kept.
MOST_KEPT = 4096


class RoundEntry(NamedTuple):
    """One stream's token in a round: exit index, rows due at each stage and balcony, rows of context, and whether it shares."""

    exit_index: int
    stage_rows: Sequence[int]
    balcony_rows: Sequence[int]
    context: int
    shares: bool = True


class _Steady(NamedTuple):
    """A token at an exit with one row due: price of its rows, of its attention to one row of context, and its passes."""

    rows_ms: float
    attention_ms: float
    passes: int


class RoundPrices:
    """Prices of rounds over one cost model, in milliseconds at slowdown 1.

    What a token adds to a round is its own price (a further row in every pass that it shares, its attention, and passes that
    it does not share) and the passes that it shares: an integer with a 1 in each pass's ``COUNT_BITS``, so that a sum counts
    the tokens of every pass.

    Attributes:
        costs: the cost model.
    """

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self._units = (*costs.stages, *costs.balconies, costs.head)
        # The bends of a balcony are those of rows that only leave keys and values, which no stream's own row is.
        self._shared = [
            *map(_without_attention, costs.stages),
            *(replace(_without_attention(unit), bends=()) for unit in self._units[len(costs.stages) :]),
        ]
        self._kept: dict[int, float] = {}  # tokens of every pass → price of the passes
        self._steady = [self._at(index) for index in range(len(costs.exits))]

    @cached_property
    def of_stages(self) -> RoundPrices:
        """Prices on a device whose balconies cost nothing: what no choice of exits can save."""
        return RoundPrices(replace(self.costs, balconies=(UnitCost(0.0),) * len(self.costs.exits)))

    def _at(self, index: int) -> _Steady:
        count = len(self.costs.exits)
        passed = (*range(index + 1), count + index, 2 * count)
        units = [self._units[place] for place in passed]
        return _Steady(
            sum(unit.marginal_row_ms for unit in units),
            sum(unit.context_ms_per_1k for unit in units[:-1]) / 1000,
            sum(1 << COUNT_BITS * place for place in passed),
        )

    def steady(self, index: int, context: int, shares: bool = True) -> tuple[float, int]:
        """Own price and passes of a token of a stream without pending rows, at an exit index."""
        rows_ms, attention_ms, passes = self._steady[index]
        return self._paid(rows_ms + attention_ms * context, passes, shares)

    def token(
        self, index: int, stage_rows: Sequence[int], balcony_rows: Sequence[int], context: int, shares: bool = True
    ) -> tuple[float, int]:
        """Own price and passes of a :class:`RoundEntry`. With more than one row due at a stage it has its own pass there.

        As in a step of one stream, pending rows cost ``switch_ms`` besides.
        """
        if stage_rows[0] == stage_rows[index] == 1 and balcony_rows[index] <= 1:  # deeper stages have no fewer
            return self.steady(index, context, shares)
        own_ms, passes = self.steady(index, context)
        costs = self.costs
        own_ms += costs.switch_ms
        for stage in range(index + 1):
            if (due := stage_rows[stage]) != 1:
                unit = costs.stages[stage]
                own_ms += unit.pass_ms(due, context) - unit.marginal_row_ms - unit.context_ms_per_1k * context / 1000
                passes -= 1 << COUNT_BITS * stage
        if (kept := balcony_rows[index]) > 1:
            balcony = costs.balconies[index]
            own_ms += balcony.pass_ms(kept, context, 1) - balcony.pass_ms(1, context, 1)
        return self._paid(own_ms, passes, shares)

    def _paid(self, own_ms: float, passes: int, shares: bool) -> tuple[float, int]:
        """A token that shares its passes, or pays for all of them."""
        return (own_ms, passes) if shares else (own_ms + self.passes_ms(passes), 0)

    def passes_ms(self, passes: int) -> float:
        """Price of shared passes beyond the rows of their tokens, from the sum of the tokens' ``passes``; 0 for none."""
        price_ms = self._kept.get(passes)
        if price_ms is None:
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            price_ms = self._kept[passes] = self._passes_ms(passes)
        return price_ms

    def _passes_ms(self, passes: int) -> float:
        total_ms = self.costs.overhead_ms if passes else 0.0
        for unit in self._shared:
            if tokens := passes & ((1 << COUNT_BITS) - 1):
                total_ms += unit.pass_ms(tokens, 0) - tokens * unit.marginal_row_ms
            passes >>= COUNT_BITS
        return total_ms

    def sum_ms(self, tokens: Iterable[tuple[float, int]]) -> float:
        """Price of a round of some tokens; 0 without any."""
        total_ms, passes = 0.0, 0
        for own_ms, shared in tokens:
            total_ms += own_ms
            passes += shared
        return total_ms + self.passes_ms(passes)

    def round_ms(self, entries: Iterable[RoundEntry]) -> float:
        """Price of a round."""
        return self.sum_ms(starmap(self.token, entries))

    def steady_ms(self, streams: Iterable[tuple[int, StreamSeen]]) -> float:
        """Price of a round of streams without pending rows, each with its exit index."""
        return self.sum_ms(self.steady(index, one.context_length, one.shares) for index, one in streams)

    def work_ms(self, stage_rows: Sequence[int], index: int, context: int) -> float:
        """Price of running the rows that are due at each stage on the way to exit ``index``, in one pass of each."""
        return sum(self.costs.stages[stage].pass_ms(stage_rows[stage], context) for stage in range(index + 1))


def _without_attention(unit: UnitCost) -> UnitCost:
    """Prices of a graph's rows without their attention; one pass takes all tokens of a round."""
    bends = tuple(replace(bend, marginal_context_ms_per_1k=0.0) for bend in unit.bends)
    return replace(unit, context_ms_per_1k=0.0, marginal_context_ms_per_1k=0.0, pass_rows=None, bends=bends)
