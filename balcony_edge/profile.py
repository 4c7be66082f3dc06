"""What a step costs on one device: the prices that the controller weighs against a target.

This module owns the arithmetic from rows and context to milliseconds. It does not know where the numbers come from
(a short calibration at load, or a measured profile), nor how slow the device is at the moment: prices hold for a device
that nobody else uses, and the controller multiplies them by the slowdown that it sees.

A step at an exit runs every stage up to it, the exit's balcony (at the full depth: the final norm) and the LM head.
Stages that were skipped before have pending rows, and so has a balcony that was not used for a while; they run in the
same pass as the new row (DESIGN 3). So the price of switching is no separate number: it is the price of a step with
more rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class UnitCost:
    """Price of one pass through one graph: a stage, a balcony, the final norm or the LM head.

    Attributes:
        first_row_ms: a pass of one row over an empty context; reading the weights is in here.
        marginal_row_ms: every further row of the same pass (DESIGN 9: about 4 % of the first in fp32, 18 % in int4).
        context_ms_per_1k: attention of one query row over 1,000 rows of context.
    """

    first_row_ms: float
    marginal_row_ms: float = 0.0
    context_ms_per_1k: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field.name} = {value}: a cost is finite and not negative")

    def pass_ms(self, rows: int, context_length: int, query_rows: int | None = None) -> float:
        """Price of a pass of ``rows`` rows after ``context_length`` rows; no rows, no pass.

        Attention is charged per query row: each one meets every key. In a stage every row is a query; in a balcony
        all but the last only leave keys and values, hence ``query_rows`` (default: all rows).
        """
        if rows <= 0:
            return 0.0
        queries = rows if query_rows is None else query_rows
        return (
            self.first_row_ms
            + (rows - 1) * self.marginal_row_ms
            + queries * self.context_ms_per_1k * context_length / 1000
        )

    def rows_within(self, available_ms: float, limit: int, context_length: int, query_rows: int | None = None) -> int:
        """Most rows, at most ``limit``, whose pass costs no more than ``available_ms``; 0 if not even one does."""
        one_row_ms = self.pass_ms(1, context_length, query_rows)
        if limit < 1 or one_row_ms > available_ms:
            return 0
        further_row_ms = self.pass_ms(2, context_length, query_rows) - one_row_ms
        spare_ms = available_ms - one_row_ms
        rows = limit if spare_ms >= further_row_ms * (limit - 1) else 1 + int(spare_ms / further_row_ms)
        while rows > 1 and self.pass_ms(rows, context_length, query_rows) > available_ms:
            rows -= 1  # the division above may round up by one
        return rows


@dataclass(frozen=True, slots=True)
class CostModel:
    """Prices of every part of a step.

    Attributes:
        exits: exit layers in ascending order; the last is the full depth.
        stages: stage ``i`` is the layers ``(exits[i - 1], exits[i]]``; exit ``i`` runs the stages 0 to ``i``.
        balconies: what follows at exit ``i``; the last entry is the final norm of the full depth.
        head: the LM head, one row a step.
        overhead_ms: everything that is no graph: the decision, sampling, text.
    """

    exits: tuple[int, ...]
    stages: tuple[UnitCost, ...]
    balconies: tuple[UnitCost, ...]
    head: UnitCost
    overhead_ms: float = 0.0

    def __post_init__(self) -> None:
        if not self.exits or list(self.exits) != sorted(set(self.exits)) or self.exits[0] < 1:
            raise ValueError(f"exits = {self.exits}: a cost model needs one or more ascending exit layers")
        if not len(self.exits) == len(self.stages) == len(self.balconies):
            raise ValueError(
                f"{len(self.exits)} exits, {len(self.stages)} stages and {len(self.balconies)} balconies: "
                "every exit has one of each"
            )
        if not (math.isfinite(self.overhead_ms) and self.overhead_ms >= 0):
            raise ValueError(f"overhead_ms = {self.overhead_ms}: a cost is finite and not negative")

    def steps_ms(self, stage_rows: Sequence[int], balcony_rows: Sequence[int], context_length: int) -> list[float]:
        """Price of the next step at every exit, in the order of ``exits``.

        Args:
            stage_rows: rows that stage ``i`` would run if it were used for the next token: pending and new.
            balcony_rows: the same for balcony ``i``; the full depth's norm keeps no rows, so there it is 1.
            context_length: rows before the new one.
        """
        shared_ms = self.overhead_ms + self.head.pass_ms(1, context_length)
        prices_ms = []
        for stage, balcony, rows, kept_rows in zip(self.stages, self.balconies, stage_rows, balcony_rows, strict=True):
            shared_ms += stage.pass_ms(rows, context_length)
            prices_ms.append(shared_ms + balcony.pass_ms(kept_rows, context_length, query_rows=1))
        return prices_ms

    def step_ms(
        self, exit_layer: int, stage_rows: Sequence[int], balcony_rows: Sequence[int], context_length: int
    ) -> float:
        """Price of the next step at one exit, pending rows included: see :meth:`steps_ms`."""
        return self.steps_ms(stage_rows, balcony_rows, context_length)[self.exits.index(exit_layer)]

    def steady_ms(self, exit_layer: int, context_length: int) -> float:
        """Price of a step at an exit that was used for the token before, too: one row everywhere."""
        ones = (1,) * len(self.exits)
        return self.step_ms(exit_layer, ones, ones, context_length)
