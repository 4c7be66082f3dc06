"""Prices of rounds: what one step of several streams costs, from the prices of passes.

Owns the arithmetic of sharing. A pass reads its weights once: the first row pays for them, and every further row, of the same
stream or of another one, costs what a further row costs. Attention is paid for each stream's own context. A stream that
shares no passes pays for a whole step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from balcony_edge.control.company.seen import StreamSeen
from balcony_edge.device.costs import CostModel, UnitCost


class RoundEntry(NamedTuple):
    """One stream's token in a round: exit index, rows due at each stage and balcony, rows of context, and whether it shares."""

    exit_index: int
    stage_rows: Sequence[int]
    balcony_rows: Sequence[int]
    context: int
    shares: bool = True


def shared_ms(unit: UnitCost, rows: int, context: int) -> float:
    """Price of a pass that takes one row of each of ``rows`` streams, whose contexts have ``context`` rows in all."""
    if not rows:
        return 0.0
    experts_ms = 0.0 if unit.experts is None else unit.experts.pass_ms(rows)
    return unit.first_row_ms + (rows - 1) * unit.marginal_row_ms + experts_ms + unit.context_ms_per_1k * context / 1000


def round_ms(costs: CostModel, entries: Sequence[RoundEntry]) -> float:
    """Price of a round at slowdown 1.

    A stream with one row due at a stage shares the stage's pass. One with more rows has a pass of its own there.
    """
    if not entries:
        return 0.0
    if (alone := [entry for entry in entries if not entry.shares]) and len(entries) > 1:
        total_ms = sum(round_ms(costs, [entry]) for entry in alone)
        return total_ms + round_ms(costs, [entry for entry in entries if entry.shares])
    stages, balconies = costs.stages, costs.balconies
    total_ms = costs.overhead_ms + shared_ms(costs.head, len(entries), 0)
    # Rows of shared passes and their contexts, by stage and by balcony. One loop: this runs some ten times for a decision.
    rows, contexts = [0] * len(stages), [0] * len(stages)
    leaving, left = [0] * len(balconies), [0] * len(balconies)
    for index, stage_rows, balcony_rows, context, _ in entries:
        leaving[index] += 1
        left[index] += context
        for stage in range(index + 1):
            if (due := stage_rows[stage]) == 1:
                rows[stage] += 1
                contexts[stage] += context
            else:
                total_ms += stages[stage].pass_ms(due, context)
        if (kept := balcony_rows[index]) > 1:
            unit = balconies[index]
            total_ms += unit.pass_ms(kept, context, 1) - unit.pass_ms(1, context, 1)
    for units, counts, sums in ((stages, rows, contexts), (balconies, leaving, left)):
        for unit, count, context in zip(units, counts, sums, strict=True):
            if count:
                total_ms += shared_ms(unit, count, context)
    return total_ms


def steady_ms(costs: CostModel, streams: Iterable[tuple[int, StreamSeen]]) -> float:
    """Price of a round of streams without pending rows, each with its exit index."""
    ones = (1,) * len(costs.exits)
    return round_ms(costs, [RoundEntry(index, ones, ones, one.context_length, one.shares) for index, one in streams])


def work_ms(costs: CostModel, stage_rows: Sequence[int], index: int, context: int) -> float:
    """Price of running the rows that are due at each stage on the way to exit ``index``, in one pass of each."""
    return sum(costs.stages[stage].pass_ms(stage_rows[stage], context) for stage in range(index + 1))


def chunk_ms(costs: CostModel, stages: Sequence[int], rows: int, context: int) -> float:
    """Price of running that many rows of one stream through each of some stages."""
    return sum(costs.stages[stage].pass_ms(rows, context) for stage in stages)
