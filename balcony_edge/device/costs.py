"""The cost model: the price of a step on one device, which the controller compares with a target.

This module owns the arithmetic from rows and context to milliseconds. It does not know where the prices come from (a device
profile, or a short measurement when a budget first needs them), nor how slow the device is at the moment. Prices hold for a
device without other load; the controller multiplies them by the slowdown that it observes.

A step at an exit runs every stage up to it, the exit's balcony (at the full depth: the final norm) and the LM head. Stages
that earlier steps skipped have pending rows, and so has a balcony that was not used for a while. These rows run in the same
pass as the new one. The price of a switch is therefore that of a step with more rows, plus a constant: the caches hold another
exit's weights, and passes of several rows are bound when they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from pydantic import ConfigDict

from balcony_edge.errors import InputError, shown

#: Highest price, one hour: far above every useful pass, and low enough that sums and products of prices stay finite.
MAX_MS = 3.6e6
#: Largest number of rows of a sequence.
MAX_ROWS = 1 << 31


def _check_prices(prices: Any) -> None:
    """Refuse a price that is negative or not a number; None means that there is no price."""
    for field in fields(prices):
        value = getattr(prices, field.name)
        if "_ms" in field.name and value is not None and not 0 <= value <= MAX_MS:
            raise ValueError(f"{field.name} = {value}: a price is 0 to {MAX_MS:g} ms")


@dataclass(frozen=True, slots=True)
class Bend:
    """A number of rows at which the price of further rows changes: small passes read weights, large ones multiply matrices.

    Attributes:
        rows: last row at the earlier prices; later rows cost the two prices below.
        marginal_row_ms: price of every further row.
        marginal_context_ms_per_1k: price of a further row's attention over 1,000 keys.
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
class ExpertCost:
    """Price of reading the experts that further rows of a pass use, in a mixture of experts.

    A row uses ``k`` of ``E`` experts, so ``n`` rows with independent routers use E · (1 - (1 - k / E)ⁿ) of them. The price is
    that of the weights: nothing for the first row, whose experts ``first_row_ms`` includes, and ``all_ms`` once all are used.

    Attributes:
        share: share of the experts that one row uses, k / E.
        all_ms: price of reading all experts that the first row does not use.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    share: float
    all_ms: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share = {self.share}: one row uses more than none and at most all of the experts")
        _check_prices(self)

    def pass_ms(self, rows: int) -> float:
        """Price of the experts that ``rows`` rows use beyond those of the first."""
        return self.all_ms * further_experts(self.share, rows)


def further_experts(share: float, rows: int) -> float:
    """Share of the experts not used by the first row that ``rows`` rows use: the concave part of a pass's price."""
    return 1.0 - (1.0 - share) ** (rows - 1)


@dataclass(frozen=True, slots=True)
class UnitCost:
    """Price of one pass through one graph: a stage, a balcony, the final norm or the LM head.

    All prices are non-negative, so a pass never costs less with more rows or more context.

    Attributes:
        first_row_ms: price of a pass of one row without attention; it includes the reading of the weights.
        marginal_row_ms: price of every further row of the same pass (4 to 16 % of the first in float32, 18 to 50 % in int4).
        context_ms_per_1k: price of attention of one query row over 1,000 rows of context.
        marginal_context_ms_per_1k: the same for every further query row; keys are read once for all query rows. None: as for
            the first.
        key_bucket: unit in which keys are bound; attention pays for all bound keys. None: it pays for the context only.
        pass_rows: most rows of one pass; more rows run as several passes. None: no limit.
        bends: later values of ``marginal_row_ms`` and ``marginal_context_ms_per_1k``, in ascending order of rows.
        experts: price of further experts. None: the graph has no mixture of experts.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    first_row_ms: float
    marginal_row_ms: float = 0.0
    context_ms_per_1k: float = 0.0
    marginal_context_ms_per_1k: float | None = None
    key_bucket: int | None = None
    pass_rows: int | None = None
    bends: tuple[Bend, ...] = ()
    experts: ExpertCost | None = None

    def __post_init__(self) -> None:
        _check_prices(self)
        for name in ("key_bucket", "pass_rows"):
            if (value := getattr(self, name)) is not None and not 1 <= value <= MAX_ROWS:
                raise ValueError(f"{name} = {str(value)[:20]}: must be 1 to {MAX_ROWS}, or None")
        rows = [bend.rows for bend in self.bends]
        if rows != sorted(set(rows)):
            raise ValueError(f"bends after {rows} rows: must ascend")

    def pass_ms(self, rows: int, context_length: int, query_rows: int | None = None) -> float:
        """Price of a pass of ``rows`` rows; 0 without rows.

        Args:
            rows: number of pending and new rows that go through the graph.
            context_length: number of rows of the sequence before the last one of the pass.
            query_rows: number of rows that attend, each to every key; by default all. In a stage every row is a query; in a
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
        if rows == 1:  # fast path: the controller prices all passes at every token, and most have one row
            return row_ms + query_ms * keys / 1000
        if self.experts is not None:
            row_ms += self.experts.pass_ms(rows)
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
        """Number of rows, at most ``limit``, whose pass costs no more than ``available_ms``; 0 if even one costs more.

        Within one pass this is the largest such number. Over several passes, whose keys are bound in buckets, one more row can
        cost less; then the number fits and one more row would not, but a larger number may.
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

    Example:
        llm.costs = DeviceProfile.load("device.json").costs

    Attributes:
        exits: exit layers in ascending order; the last is the full depth.
        stages: prices of the stages. Stage ``i`` is the layers ``(exits[i - 1], exits[i]]``; exit ``i`` runs stages 0 to ``i``.
        balconies: prices of the balconies by exit; the last entry is the final norm of the full depth.
        head: price of the LM head, which takes one row a step.
        overhead_ms: price of everything outside the graphs: decision, sampling, text.
        switch_ms: extra price of a step that also runs pending rows.
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
            stage_rows: number of rows, pending and new, that stage ``i`` would run if the next token used it.
            balcony_rows: the same for balcony ``i``; 1 for the full depth's norm, which keeps no rows.
            context_length: number of rows before the new one.
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
        """Price of the next step at one exit, pending rows included: see :meth:`steps_ms`.

        Raises:
            InputError: there are no prices of this exit.
        """
        if exit_layer not in self.exits:
            raise InputError(
                f"exit_layer = {shown(exit_layer)}: these prices are for exits {', '.join(map(str, self.exits))}: "
                "pick one of them"
            )
        return self.steps_ms(stage_rows, balcony_rows, context_length)[self.exits.index(exit_layer)]

    def steady_ms(self, exit_layer: int, context_length: int) -> float:
        """Price of a step at an exit that also made the previous token: one row in every graph."""
        ones = (1,) * len(self.exits)
        return self.step_ms(exit_layer, ones, ones, context_length)

    def prefill_ms(self, exit_layer: int, prompt_tokens: int, context_length: int = 0) -> float:
        """Time to first token: ``prompt_tokens`` new rows after ``context_length`` rows that the exit has already taken in."""
        rows = (prompt_tokens,) * len(self.exits)
        return self.step_ms(exit_layer, rows, (*rows[:-1], 1), context_length + prompt_tokens - 1)
