"""The assignment: the deepest exits of several streams whose round fits into a time.

Owns the search. All streams begin at their deepest exit. While the round takes too long, depth is taken where the least
agreement is lost per millisecond won: from one stream, or from all streams at the deepest exit at once, because only then its
stage is not read at all. A stream that shares no passes wins the time of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from balcony_edge.control.company.prices import RoundPrices

#: Exits, and members of a round → the members to take depth from (:func:`assign`).
Steps = MutableMapping[tuple[tuple[int, ...], tuple[int, ...]], list[int] | None]


def qualities(agreement: Mapping[int, float | None]) -> list[float]:
    """What depth is worth: the agreement of each exit with the full depth, or its share of the layers; ascending.

    Args:
        agreement: exit layer → agreement; None where it was not evaluated.
    """
    depth = max(agreement)
    worth = (layer / depth if (share := agreement[layer]) is None else share for layer in sorted(agreement))
    return list(accumulate(worth, max))


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


class _Round:
    """The members of a round at their exits, and what it costs. Members are given by their places in ``claims``."""

    def __init__(self, prices: RoundPrices, claims: Sequence[Claim], exits: list[int], members: Sequence[int]) -> None:
        self._prices, self._claims, self.exits, self.members = prices, claims, exits, members
        tokens = [prices.steady(exits[i], claims[i].context, claims[i].shares) for i in members]
        self.price_ms, self._passes = prices.sum_ms(tokens), sum(passes for _, passes in tokens)

    def _lowered(self, givers: Sequence[int]) -> tuple[float, int]:
        """Price, and tokens of every pass, if some members leave one exit earlier."""
        steady, claims, exits = self._prices.steady, self._claims, self.exits
        price_ms, passes = self.price_ms - self._prices.passes_ms(self._passes), self._passes
        for i in givers:
            index, (_, _, _, context, _, shares) = exits[i], claims[i]
            own_ms, shared = steady(index, context, shares)
            less_ms, fewer = steady(index - 1, context, shares)
            price_ms += less_ms - own_ms
            passes += fewer - shared
        return price_ms + self._prices.passes_ms(passes), passes

    def won_ms(self, givers: Sequence[int]) -> float:
        """Time that is won if some members leave one exit earlier."""
        return self.price_ms - self._lowered(givers)[0]

    def lower(self, givers: Sequence[int]) -> None:
        self.price_ms, self._passes = self._lowered(givers)
        for i in givers:
            self.exits[i] -= 1


def assign(
    prices: RoundPrices,
    quality: Sequence[float],
    claims: Sequence[Claim],
    limit_ms: float,
    lax_rows: int,
    known: Steps | None = None,
) -> tuple[list[int], float]:
    """Choose an exit for every stream.

    Args:
        prices: prices of rounds.
        quality: agreement of each exit with the full depth, ascending.
        claims: the streams.
        limit_ms: time for a round, at slowdown 1.
        lax_rows: number of streams that are not tight that a round must have room for; the deepest of them count.
        known: steps of the search so far. The limit only says where it ends, so searches that differ in limit and deepest exits
            share them.

    Returns:
        Exit index of every stream, and the price of the round. The price is above ``limit_ms`` if nothing fits.
    """
    exits, known = [claim.highest for claim in claims], {} if known is None else known
    while True:
        # The round to hold: all tight streams, and the deepest of the others.
        lax = sorted((i for i, claim in enumerate(claims) if not claim.tight), key=lambda i: -exits[i])
        members = [i for i, claim in enumerate(claims) if claim.tight] + lax[:lax_rows]
        shallowest = [claim.lowest for claim in claims]
        if _Round(prices.of_stages, claims, shallowest, members).price_ms > limit_ms:  # nothing fits
            nearest = [shallowest[i] if i in members else index for i, index in enumerate(exits)]
            return nearest, _Round(prices, claims, nearest, members).price_ms
        found = _Round(prices, claims, exits, members)
        while found.price_ms > limit_ms:
            place = tuple(exits), tuple(members)
            if place not in known:
                known[place] = _cheapest(quality, claims, found)
            if (givers := known[place]) is None:
                return exits, found.price_ms
            found.lower(givers)
        deepest_lax = max((exits[i] for i in lax[lax_rows:]), default=-1)
        if not lax_rows or deepest_lax <= min((exits[i] for i in lax[:lax_rows]), default=deepest_lax):
            return exits, found.price_ms


def _cheaper(one: Claim, other: Claim) -> bool:
    """Whether depth is better taken from ``one`` of two streams at the same exit: at equal weight, the longer context."""
    return (one.weight, -one.context) < (other.weight, -other.context)


def _cheapest(quality: Sequence[float], claims: Sequence[Claim], found: _Round) -> list[int] | None:
    """The members to take one exit of depth from, at the least loss per time won; None if none can give any."""
    exits, members = found.exits, found.members
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
        won_ms = found.won_ms(option)
        loss = sum(claims[i].weight for i in option) * (quality[index] - quality[index - 1])
        # A step down may win no time by itself, because its balcony is the first of its exit.
        rate = loss / won_ms if won_ms > 0 else 1e9 * max(loss, 1e-9) + (1 if len(option) == 1 else 0)
        if rate < least:
            best, least = option, rate
    return best
