"""The assignment: the deepest exits of several streams whose round fits into a time.

Owns the search. All streams begin at their deepest exit. While the round takes too long, depth is taken where the least
agreement is lost per millisecond won: from one stream, or from all streams at the deepest exit at once, because only then its
stage is not read at all. A stream that shares no passes wins the time of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from balcony_edge.control.company.prices import RoundEntry, round_ms, shared_ms
from balcony_edge.device.costs import CostModel


class Claim(NamedTuple):
    """One stream of the assignment.

    Attributes:
        lowest, highest: indices of the shallowest and deepest exit allowed.
        weight: how much its agreement counts.
        context: rows of its context.
        tight: whether it needs a token in every round; otherwise it can wait for a later one.
        shares: whether its rows share passes with those of others.
    """

    lowest: int
    highest: int
    weight: float
    context: int
    tight: bool
    shares: bool = True


class _Counts:
    """Streams that pass each stage and leave at each exit, with the sums of their contexts; of other streams the price."""

    def __init__(self, costs: CostModel, claims: Sequence[Claim], exits: Sequence[int]) -> None:
        self._costs = costs
        count = len(costs.exits)
        self.passing, self.leaving = [0] * count, [0] * count
        self._passing_context, self._leaving_context = [0] * count, [0] * count
        self.rows, self._alone_ms = 0, 0.0
        for claim, index in zip(claims, exits, strict=True):
            if not claim.shares:
                self._alone_ms += self._step_ms(claim, index)
                continue
            self.rows += 1
            self.leaving[index] += 1
            self._leaving_context[index] += claim.context
            for stage in range(index + 1):
                self.passing[stage] += 1
                self._passing_context[stage] += claim.context

    def _step_ms(self, claim: Claim, index: int) -> float:
        """Price of a step of one stream by itself."""
        ones = (1,) * len(self._costs.exits)
        return round_ms(self._costs, [RoundEntry(index, ones, ones, claim.context)])

    def price_ms(self) -> float:
        costs = self._costs
        if not self.rows:
            return self._alone_ms
        total_ms = self._alone_ms + costs.overhead_ms + shared_ms(costs.head, self.rows, 0)
        for units, rows, contexts in (
            (costs.stages, self.passing, self._passing_context),
            (costs.balconies, self.leaving, self._leaving_context),
        ):
            for unit, count, context in zip(units, rows, contexts, strict=True):
                total_ms += shared_ms(unit, count, context)
        return total_ms

    def won_ms(self, index: int, claims: Sequence[Claim]) -> float:
        """Time that is won if streams leave at exit ``index - 1`` instead of ``index``: some that share passes, or another."""
        if not claims[0].shares:
            return self._step_ms(claims[0], index) - self._step_ms(claims[0], index - 1)
        count, context, costs = len(claims), sum(claim.context for claim in claims), self._costs
        before = after = 0.0
        for unit, rows, summed, change in (
            (costs.stages[index], self.passing[index], self._passing_context[index], -1),
            (costs.balconies[index], self.leaving[index], self._leaving_context[index], -1),
            (costs.balconies[index - 1], self.leaving[index - 1], self._leaving_context[index - 1], 1),
        ):
            before += shared_ms(unit, rows, summed)
            after += shared_ms(unit, rows + change * count, summed + change * context)
        return before - after

    def lower(self, index: int, claims: Sequence[Claim]) -> None:
        if not claims[0].shares:
            self._alone_ms -= self.won_ms(index, claims)
            return
        count, context = len(claims), sum(claim.context for claim in claims)
        self.passing[index] -= count
        self._passing_context[index] -= context
        self.leaving[index] -= count
        self._leaving_context[index] -= context
        self.leaving[index - 1] += count
        self._leaving_context[index - 1] += context


def assign(
    costs: CostModel,
    quality: Sequence[float],
    claims: Sequence[Claim],
    limit_ms: float,
    lax_rows: int,
) -> tuple[list[int], float]:
    """Choose an exit for every stream.

    Args:
        costs: prices of the device.
        quality: agreement of each exit with the full depth, ascending.
        claims: the streams.
        limit_ms: time for a round, at slowdown 1.
        lax_rows: number of streams that are not tight that a round must have room for; the deepest of them count.

    Returns:
        Exit index of every stream, and the price of the round. The price is above ``limit_ms`` if nothing fits.
    """
    exits = [claim.highest for claim in claims]
    while True:
        # The round to hold: all tight streams, and the deepest of the others.
        lax = sorted((i for i, claim in enumerate(claims) if not claim.tight), key=lambda i: -exits[i])
        members = [i for i, claim in enumerate(claims) if claim.tight] + lax[:lax_rows]
        counts = _Counts(costs, [claims[i] for i in members], [exits[i] for i in members])
        price_ms = counts.price_ms()
        while price_ms > limit_ms:
            step = _cheapest(quality, claims, exits, members, counts)
            if step is None:
                return exits, price_ms
            givers = [claims[i] for i in step]
            index = exits[step[0]]
            price_ms -= counts.won_ms(index, givers)
            counts.lower(index, givers)
            for i in step:
                exits[i] = index - 1
        deepest_lax = max((exits[i] for i in lax[lax_rows:]), default=-1)
        if not lax_rows or deepest_lax <= min((exits[i] for i in lax[:lax_rows]), default=deepest_lax):
            return exits, price_ms


def _cheaper(one: Claim, other: Claim) -> bool:
    """Whether depth is better taken from ``one`` of two streams at the same exit: at equal weight, the longer context."""
    return (one.weight, -one.context) < (other.weight, -other.context)


def _cheapest(
    quality: Sequence[float], claims: Sequence[Claim], exits: Sequence[int], members: Sequence[int], counts: _Counts
) -> list[int] | None:
    """The streams to take one exit of depth from, at the least loss per time won; None if none can give any."""
    best, least = None, float("inf")
    sharing = [i for i in members if claims[i].shares]
    deepest = max((exits[i] for i in sharing), default=0)
    together = [i for i in sharing if exits[i] == deepest]
    givers: dict[tuple[int, bool], int] = {}  # exit, and whether it shares passes → the stream there that loses least
    for i in members:
        place = exits[i], claims[i].shares
        if exits[i] > claims[i].lowest and (place not in givers or _cheaper(claims[i], claims[givers[place]])):
            givers[place] = i
    options = [[i] for i in givers.values()]
    if len(together) > 1 and all(exits[i] > claims[i].lowest for i in together):
        options.append(together)
    for option in options:
        index = exits[option[0]]
        won_ms = counts.won_ms(index, [claims[i] for i in option])
        loss = sum(claims[i].weight for i in option) * (quality[index] - quality[index - 1])
        # A step down may win no time by itself, because its balcony is the first of its exit.
        rate = loss / won_ms if won_ms > 0 else 1e9 * max(loss, 1e-9) + (1 if len(option) == 1 else 0)
        if rate < least:
            best, least = option, rate
    return best
