"""What a step costs on one device: the prices that the controller weighs against a target.

This module owns the arithmetic from rows and context to milliseconds. It does not know where the numbers come from
(a short calibration at load, or a measured profile), nor how slow the device is at the moment: prices hold for a device
that nobody else uses, and the controller multiplies them by the slowdown that it sees.

A step at an exit runs every stage up to it, the exit's balcony (at the full depth: the final norm) and the LM head.
Stages that were skipped before have pending rows, and so has a balcony that was not used for a while; they run in the
same pass as the new row. So the price of switching is that of a step with more rows, and a constant: the caches
hold another exit's weights, and passes of several rows are bound when they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from pydantic import ConfigDict

#: An hour: no pass of a model that is worth running takes longer, and sums and products of such prices stay numbers.
MAX_MS = 3.6e6
#: Rows beyond which no sequence goes.
MAX_ROWS = 1 << 31


def _check_prices(prices: Any) -> None:
    """Refuse a price that is negative or no number; None is the absence of one."""
    for field in fields(prices):
        value = getattr(prices, field.name)
        if isinstance(value, float) and not 0 <= value <= MAX_MS:
            raise ValueError(f"{field.name} = {value}: a cost is 0 to {MAX_MS:g} ms")


@dataclass(frozen=True, slots=True)
class Bend:
    """Where further rows change their price: small passes read weights, large ones multiply matrices.

    Attributes:
        rows: the last row at the price before; the rows after it cost the two prices below.
        marginal_row_ms: every further row.
        marginal_context_ms_per_1k: its attention over 1,000 keys.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    rows: int
    marginal_row_ms: float
    marginal_context_ms_per_1k: float = 0.0

    def __post_init__(self) -> None:
        _check_prices(self)
        if not 2 <= self.rows <= MAX_ROWS:
            raise ValueError(f"rows = {self.rows}: prices bend after 2 to {MAX_ROWS} rows")


@dataclass(frozen=True, slots=True)
class UnitCost:
    """Price of one pass through one graph: a stage, a balcony, the final norm or the LM head.

    All prices are non-negative, so a pass never costs less with more rows or more context.

    Attributes:
        first_row_ms: a pass of one row, attention aside; reading the weights is in here.
        marginal_row_ms: every further row of the same pass (about 4 % of the first in fp32, 18 % in int4).
        context_ms_per_1k: attention of one query row over 1,000 rows of context.
        marginal_context_ms_per_1k: the same of every further query row; the keys are read once for all of them. None: as
            the first.
        key_bucket: attention pays for the keys that are bound, a multiple of this. None: for the context alone.
        pass_rows: most rows of one pass; more are run as several. None: there is no such limit.
        bends: where ``marginal_row_ms`` and ``marginal_context_ms_per_1k`` end, in ascending order of rows.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    first_row_ms: float
    marginal_row_ms: float = 0.0
    context_ms_per_1k: float = 0.0
    marginal_context_ms_per_1k: float | None = None
    key_bucket: int | None = None
    pass_rows: int | None = None
    bends: tuple[Bend, ...] = ()

    def __post_init__(self) -> None:
        _check_prices(self)
        for name in ("key_bucket", "pass_rows"):
            if (value := getattr(self, name)) is not None and not 1 <= value <= MAX_ROWS:
                raise ValueError(f"{name} = {str(value)[:20]}: must be 1 to {MAX_ROWS}, or None")
        rows = [bend.rows for bend in self.bends]
        if rows != sorted(set(rows)):
            raise ValueError(f"bends after {rows} rows: must ascend")

    def pass_ms(self, rows: int, context_length: int, query_rows: int | None = None) -> float:
        """Price of a pass of ``rows`` rows; no rows, no pass.

        Args:
            rows: pending and new rows that go through the graph.
            context_length: rows of the sequence before the last of them.
            query_rows: rows that attend; default: all. Each one meets every key. In a stage every row is a query; in a
                balcony all but the last only leave keys and values.
        """
        if rows <= 0:
            return 0.0
        total_ms = 0.0
        if self.pass_rows is not None and rows > self.pass_rows:
            end = max(context_length + 1, rows) - rows
            while rows > self.pass_rows:
                end += self.pass_rows
                rows -= self.pass_rows
                total_ms += self._pass_ms(self.pass_rows, end - 1, query_rows)
        return total_ms + self._pass_ms(rows, context_length, query_rows)

    def _pass_ms(self, rows: int, context_length: int, query_rows: int | None) -> float:
        queries = rows if query_rows is None else query_rows
        keys = context_length
        if self.key_bucket is not None:
            keys = -(-max(context_length + 1, rows) // self.key_bucket) * self.key_bucket
        row_ms, query_ms = self.first_row_ms, self.context_ms_per_1k
        if rows == 1:  # most passes of a decode step: the controller prices them all at every token
            return row_ms + query_ms * keys / 1000
        row_price, query_price = self.marginal_row_ms, self.marginal_context_ms_per_1k
        if query_price is None:
            query_price = query_ms
        done = 1
        for bend in self.bends:
            if rows <= bend.rows:
                break
            row_ms += (bend.rows - done) * row_price
            query_ms += max(min(bend.rows, queries) - done, 0) * query_price
            done, row_price, query_price = bend.rows, bend.marginal_row_ms, bend.marginal_context_ms_per_1k
        row_ms += (rows - done) * row_price
        query_ms += max(queries - done, 0) * query_price
        return row_ms + query_ms * keys / 1000

    def rows_within(self, available_ms: float, limit: int, context_length: int, query_rows: int | None = None) -> int:
        """Rows, at most ``limit``, whose pass costs no more than ``available_ms``; 0 if not even one does.

        The most there are in one pass. Over several, whose keys come in buckets, one row more can cost less, and a
        number that fits is given, of which one more would not.
        """
        if limit < 1 or self.pass_ms(1, context_length, query_rows) > available_ms:
            return 0
        fits, beyond = 1, limit + 1
        while beyond - fits > 1:
            rows = (fits + beyond) // 2
            if self.pass_ms(rows, context_length, query_rows) <= available_ms:
                fits = rows
            else:
                beyond = rows
        return fits


@dataclass(frozen=True, slots=True)
class CostModel:
    """Prices of every part of a step.

    Attributes:
        exits: exit layers in ascending order; the last is the full depth.
        stages: stage ``i`` is the layers ``(exits[i - 1], exits[i]]``; exit ``i`` runs the stages 0 to ``i``.
        balconies: what follows at exit ``i``; the last entry is the final norm of the full depth.
        head: the LM head, one row a step.
        overhead_ms: everything that is no graph: the decision, sampling, text.
        switch_ms: what a step with more rows than its own pays on top of them.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    exits: tuple[int, ...]
    stages: tuple[UnitCost, ...]
    balconies: tuple[UnitCost, ...]
    head: UnitCost
    overhead_ms: float = 0.0
    switch_ms: float = 0.0

    def __post_init__(self) -> None:
        if not self.exits or list(self.exits) != sorted(set(self.exits)) or self.exits[0] < 1:
            raise ValueError(f"exits = {self.exits}: a cost model needs one or more ascending exit layers")
        if not len(self.exits) == len(self.stages) == len(self.balconies):
            raise ValueError(
                f"{len(self.exits)} exits, {len(self.stages)} stages and {len(self.balconies)} balconies: "
                "every exit has one of each"
            )
        _check_prices(self)

    def steps_ms(self, stage_rows: Sequence[int], balcony_rows: Sequence[int], context_length: int) -> list[float]:
        """Price of the next step at every exit, in the order of ``exits``.

        Args:
            stage_rows: rows that stage ``i`` would run if it were used for the next token: pending and new.
            balcony_rows: the same for balcony ``i``; the full depth's norm keeps no rows, so there it is 1.
            context_length: rows before the new one.
        """
        shared_ms = self.overhead_ms + self.head.pass_ms(1, context_length)
        prices_ms, bound = [], True
        for stage, balcony, rows, kept_rows in zip(self.stages, self.balconies, stage_rows, balcony_rows, strict=True):
            bound = bound and rows == 1
            shared_ms += stage.pass_ms(rows, context_length)
            price_ms = shared_ms + balcony.pass_ms(kept_rows, context_length, query_rows=1)
            prices_ms.append(price_ms if bound and kept_rows == 1 else price_ms + self.switch_ms)
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

    def prefill_ms(self, exit_layer: int, prompt_tokens: int, context_length: int = 0) -> float:
        """Time to first token: ``prompt_tokens`` new rows after ``context_length`` rows that an exit has seen before."""
        rows = (prompt_tokens,) * len(self.exits)
        return self.step_ms(exit_layer, rows, (*rows[:-1], 1), context_length + prompt_tokens - 1)
