"""The deepest that replies could have been for a scheduler that knows the future: an upper bound, by linear programming.

The bound is for one run that was simulated. It is the largest mean depth of all ways to serve the same requests with no
later tokens than that run. It knows, from the start, every arrival, every length and every price. Nothing that is hard for
a real scheduler counts:

- pending rows are free, exits change at once, steps take exactly their prices, and a token may be split;
- within a bin of time the order is free, and the streams share all the passes that they could share at best;
- a prompt costs its rows on the way to the cheapest exit, once, without a pass of their own.

*No later* means: a reply's first token comes when it came in the run, or before. A later token may take its ``tpot_ms``
after the one before it, or as long as it took in the run, if that was longer. A reply with a deadline ends at the deadline,
or when it ended in the run; every other reply when it ended in the run. So the misses are at most the run's own, and no
reply is put off to make the others deep. From exits whose step alone takes longer than a stream's ``tpot_ms`` come its
first token and as many tokens as were late in the run, and no others.

The sum of the exits of all tokens is made as large as possible. The variables are, for each stream and bin, its tokens from
each exit and the share of its prompt; and for each bin and unit, its passes: no fewer than the tokens of any one stream.
Prices that bend, have buckets of keys or have experts are not supported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from balcony_edge.device.costs import CostModel
from balcony_edge.errors import InputError
from balcony_edge.simulation.company import SimulatedStream


class _Rows:
    """Rows of a sparse system ``A x <= b``."""

    def __init__(self) -> None:
        self.limits: list[float] = []
        self._at: list[tuple[int, int, float]] = []

    def add(self, terms: Sequence[tuple[int, float]], limit: float) -> None:
        self._at += [(len(self.limits), column, value) for column, value in terms]
        self.limits.append(limit)

    def matrix(self, columns: int) -> coo_array:
        rows, places, values = zip(*self._at, strict=True)
        return coo_array((values, (rows, places)), shape=(len(self.limits), columns))


def due_times_s(stream: SimulatedStream) -> list[float]:
    """Latest time of each token that is no worse than the run was."""
    arrival, budget = stream.arrival, stream.arrival.budget
    times = list(arrival.time_s + np.cumsum(stream.gaps_ms) / 1000)
    end_s = times[-1]
    if budget.deadline_s is not None:
        end_s = max(end_s, arrival.time_s + budget.deadline_s)
    due = [times[0]] + [end_s] * (len(times) - 1)
    if budget.tpot_ms is not None:
        for place, gap_ms in enumerate(stream.gaps_ms[1:], 1):
            due[place] = due[place - 1] + max(gap_ms, budget.tpot_ms) / 1000
    return due


def deepest(costs: CostModel, streams: Sequence[SimulatedStream], *, bin_s: float = 0.25) -> float:
    """Upper bound of the mean depth of a run, as a share of the full depth.

    Args:
        costs: prices of the device.
        streams: what the run came to.
        bin_s: length of a bin; a shorter one is a tighter bound, and slower.

    Raises:
        InputError: the run has no token, or its own schedule does not fit the prices.
    """
    streams = [stream for stream in streams if stream.exits]
    if not streams:
        raise InputError("the run has no token: give one that has")
    due = [due_times_s(stream) for stream in streams]
    bins = _bin(max(times[-1] for times in due), bin_s) + 1
    stages, balconies, exits = costs.stages, costs.balconies, range(len(costs.exits))
    # columns: the passes of each bin (stages, then balconies), then the tokens and prompts of each stream
    width = 2 * len(exits)
    columns, gains = bins * width, [0.0] * (bins * width)
    rows, times_ms = _Rows(), [_shared_ms(costs, first) for first in range(bins)]
    for stream, latest in zip(streams, due, strict=True):
        first, last = int(stream.arrival.time_s // bin_s), _bin(latest[-1], bin_s)
        context = stream.arrival.prompt_tokens
        allowed, slow = _allowed(costs, stream)
        made: list[int] = []
        prompt: list[int] = []
        deep: list[int] = []
        counts = np.bincount([_bin(time_s, bin_s) for time_s in latest], minlength=bins).cumsum()
        prompt_ms = min(_prompt_ms(costs, index, context) for index in allowed)
        so_far: list[tuple[int, float]] = []  # the column of the tokens until the bin before
        for at in range(first, last + 1):
            tokens = {index: columns + place for place, index in enumerate(allowed)}
            prompt.append(columns + len(tokens))
            until = columns + len(tokens) + 1
            columns = until + 1
            gains += [*(float(costs.exits[index]) for index in tokens), 0.0, 0.0]
            made += tokens.values()
            deep += [column for index, column in tokens.items() if index in slow]
            rows.add([(until, 1.0), *so_far, *((column, -1.0) for column in tokens.values())], 0.0)
            rows.add([(until, -1.0)], -float(counts[at]))
            so_far = [(until, -1.0)]
            if at == _bin(latest[0], bin_s):
                rows.add([(column, -1.0) for column in prompt], -1.0)
            times_ms[at].append((prompt[-1], prompt_ms))
            for unit in exits:
                through = [(column, 1.0) for index, column in tokens.items() if index >= unit]
                if through:
                    rows.add([*through, (at * width + unit, -1.0)], 0.0)
                if unit in tokens:
                    rows.add([(tokens[unit], 1.0), (at * width + len(exits) + unit, -1.0)], 0.0)
            for index, column in tokens.items():
                units = [*stages[: index + 1], balconies[index]]
                own_ms = sum(unit.marginal_row_ms + unit.context_ms_per_1k * context / 1000 for unit in units)
                times_ms[at].append((column, own_ms + costs.head.marginal_row_ms))
        rows.add([(column, 1.0) for column in made], float(len(latest)))
        if deep:
            rows.add([(column, 1.0) for column in deep], 1.0 + stream.late_tokens)
    for terms in times_ms:
        rows.add(terms, 1000 * bin_s)
    found = linprog(-np.array(gains), A_ub=rows.matrix(columns).tocsr(), b_ub=rows.limits, method="highs")
    if found.status != 0:
        raise InputError(f"no schedule is as early as the run's ({found.message}): give the prices that it ran with")
    return -float(found.fun) / sum(len(times) for times in due) / costs.exits[-1]


def _bin(time_s: float, bin_s: float) -> int:
    """The bin that ends at a time or after it."""
    return max(math.ceil(time_s / bin_s - 1e-9) - 1, 0)


def _shared_ms(costs: CostModel, at: int) -> list[tuple[int, float]]:
    """Columns of a bin's passes, each with what a pass costs beyond a further row."""
    units = [*costs.stages, *costs.balconies]
    prices = [unit.first_row_ms - unit.marginal_row_ms for unit in units]
    prices[0] += costs.overhead_ms + costs.head.first_row_ms - costs.head.marginal_row_ms
    return [(at * len(units) + place, price) for place, price in enumerate(prices)]


def _allowed(costs: CostModel, stream: SimulatedStream) -> tuple[list[int], set[int]]:
    """Exits that a stream's tokens may come from, and those of them at which a token is late."""
    budget, rows = stream.arrival.budget, stream.arrival.prompt_tokens
    layers = budget.allowed_exits(costs.exits)
    found = [index for index, layer in enumerate(costs.exits) if layer in layers]
    longest_ms = math.inf if budget.tpot_ms is None else budget.tpot_ms
    return found, {index for index in found if costs.steady_ms(costs.exits[index], rows) > longest_ms}


def _prompt_ms(costs: CostModel, index: int, rows: int) -> float:
    """Price of a prompt's rows before its last one, on the way to an exit."""
    found_ms = sum(unit.pass_ms(rows, rows) - unit.pass_ms(1, rows) for unit in costs.stages[: index + 1])
    if index < len(costs.balconies) - 1:
        unit = costs.balconies[index]
        found_ms += unit.pass_ms(rows, rows, 1) - unit.pass_ms(1, rows, 1)
    return found_ms
