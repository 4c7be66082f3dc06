"""Prices of rounds: what one step of several streams costs, from the prices of passes.

Owns the arithmetic of sharing. A pass reads its weights once: the first row pays for them, and every further row, of the same
stream or of another one, costs what a further row costs. Attention is paid for each stream's own context.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from balcony_edge.device.costs import CostModel, UnitCost


class Entry(NamedTuple):
    """One stream's token in a round: exit index, rows due at each stage and balcony, and rows of context."""

    exit_index: int
    stage_rows: Sequence[int]
    balcony_rows: Sequence[int]
    context: int


def shared_ms(unit: UnitCost, rows: int, context: int) -> float:
    """Price of a pass that takes one row of each of ``rows`` streams, whose contexts have ``context`` rows in all."""
    if not rows:
        return 0.0
    return unit.first_row_ms + (rows - 1) * unit.marginal_row_ms + unit.context_ms_per_1k * context / 1000


def round_ms(costs: CostModel, entries: Sequence[Entry]) -> float:
    """Price of a round at slowdown 1.

    A stream with one row due at a stage shares the stage's pass. One with more rows has a pass of its own there.
    """
    if not entries:
        return 0.0
    total_ms = costs.overhead_ms + shared_ms(costs.head, len(entries), 0)
    for stage in range(max(entry.exit_index for entry in entries) + 1):
        unit, rows, context = costs.stages[stage], 0, 0
        for entry in entries:
            if entry.exit_index < stage:
                continue
            if entry.stage_rows[stage] == 1:
                rows, context = rows + 1, context + entry.context
            else:
                total_ms += unit.pass_ms(entry.stage_rows[stage], entry.context)
        total_ms += shared_ms(unit, rows, context)
    for index in {entry.exit_index for entry in entries}:
        leaving = [entry for entry in entries if entry.exit_index == index]
        unit = costs.balconies[index]
        total_ms += shared_ms(unit, len(leaving), sum(entry.context for entry in leaving))
        for entry in leaving:
            if (kept := entry.balcony_rows[index]) > 1:
                total_ms += unit.pass_ms(kept, entry.context, 1) - unit.pass_ms(1, entry.context, 1)
    return total_ms


def steady_ms(costs: CostModel, streams: Iterable[tuple[int, int]]) -> float:
    """Price of a round of streams without pending rows: exit index and rows of context of each."""
    ones = (1,) * len(costs.exits)
    return round_ms(costs, [Entry(exit_index, ones, ones, context) for exit_index, context in streams])


def work_ms(costs: CostModel, stage_rows: Sequence[int], index: int, context: int) -> float:
    """Price of running the rows that are due at each stage on the way to exit ``index``, in one pass of each."""
    return sum(costs.stages[stage].pass_ms(stage_rows[stage], context) for stage in range(index + 1))


def chunk_ms(costs: CostModel, stages: Sequence[int], rows: int, context: int) -> float:
    """Price of running that many rows of one stream through each of some stages."""
    return sum(costs.stages[stage].pass_ms(rows, context) for stage in stages)


def chunk_rows(costs: CostModel, stages: Sequence[int], available_ms: float, limit: int, context: int) -> int:
    """Largest number of rows, at most ``limit``, that go through each of the stages within a time; 0 if not even one does."""
    fits, beyond = 0, limit + 1
    while beyond - fits > 1:
        rows = (fits + beyond) // 2
        if chunk_ms(costs, stages, rows, context) <= available_ms:
            fits = rows
        else:
            beyond = rows
    return fits
