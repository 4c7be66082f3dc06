"""Goals: the exit that each stream of a company is assigned, until streams, budgets or the device change.

Owns when an assignment is made again, what it must leave room for, and which target is given up if not all can be held. The
search for exits is :mod:`.assignment`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from balcony_edge.control.company.assignment import Claim, Steps, assign
from balcony_edge.control.company.prices import RoundPrices
from balcony_edge.control.company.seen import CompanyState
from balcony_edge.control.company.view import View, scale_of, targets_of
from balcony_edge.control.controller import quantile_of
from balcony_edge.control.slowdown import Slowdown

#: Rounds after which the assignment is made again, because contexts have grown.
REASSIGN = 32
#: Change of the slowdown's logarithm after which it is made again.
DRIFT = 0.02
#: A stream without a target gets a token at least in every fourth round.
ELASTIC = 4
#: Factor of the weight of a stream that has given its target up.
UNMET = 0.1
#: Shortest time of a round that is reckoned with, in milliseconds: no round is as short.
LEAST_MS = 1e-3
#: Longest time at slowdown 1 for which all others wait while a prompt runs.
STALL_MS = 250.0
#: Share of a round that a prompt without ``ttft_ms`` gets.
PROMPT_SHARE = 0.3
#: Variance of the slowdown above which it counts as unknown: a gap is then out of reach only if no luck could meet it.
KNOWN_VARIANCE = 0.05**2


class Goals:
    """Assignments over one cost model.

    Args:
        prices: prices of rounds.
        quality: agreement of each exit with the full depth, ascending.
    """

    def __init__(self, prices: RoundPrices, quality: Sequence[float]) -> None:
        self._prices, self._quality = prices, quality

    def assigned(
        self, state: CompanyState, views: list[View], slowdown: Slowdown, share: float
    ) -> tuple[tuple[object, ...], list[View]]:
        """Give every stream its goal; a new assignment only if something has changed."""
        who = tuple([(view.stream.key, id(view.stream.budget), view.first, view.highest) for view in views])
        assigned_for = self.made_for(state, who, slowdown)
        if assigned_for is state.assigned_for:
            return assigned_for, views
        views = [view._replace(met=True) for view in views]  # a target that was given up may fit now
        exits, free, fits = self._goals(views, slowdown, share)
        while not fits and any(view.met for view in views):
            views, (exits, free, fits) = self._given_up(views, slowdown, share)
        found = [
            view._replace(goal=self._goal(view, now, up, state))
            for view, now, up in zip(views, exits, free, strict=True)
        ]
        return assigned_for, found

    @staticmethod
    def made_for(state: CompanyState, who: tuple[object, ...], slowdown: Slowdown) -> tuple[object, ...]:
        """What an assignment would be made for now; the same object as in the state as long as the present one stands.

        ``who`` are the streams: key and identity of the budget, whether the prompt is to be run, index of the deepest exit.
        """
        drift = round(math.log(scale_of(slowdown, 0.9)) / DRIFT)
        due = state.round // REASSIGN
        before = state.assigned_for
        if before[:1] == (who,) and before[2:] == (due,) and abs(before[1] - drift) <= 1:  # type: ignore[operator]
            return before
        return who, drift, due

    def _goal(self, view: View, now: int, up: int, state: CompanyState) -> int:
        """The goal after an assignment to exit ``now``, and to ``up`` with the hysteresis free."""
        if view.stream.key not in state.streams:
            return up
        if now < view.goal:
            return now
        may_rise = view.tokens >= view.stream.budget.dwell_tokens
        return max(up, view.goal) if may_rise else view.goal

    def _goals(self, views: list[View], slowdown: Slowdown, share: float) -> tuple[list[int], list[int], bool]:
        """Exits within the shortest target, the same with the hysteresis free, and whether they hold it."""
        claims, limit_ms, lax_rows = self._claims(views)
        luck = _luck(views, slowdown)
        if limit_ms == math.inf:
            # Where every target was given up, the shallowest exits come closest to them.
            exits = [view.lowest if view.period_ms < math.inf else self._soon_enough(view) for view in views]
            return exits, exits, all(self._first_ms(view) <= view.bound_ms * luck for view in views if view.first)
        if slowdown.variance <= KNOWN_VARIANCE:
            luck = 1.0
        prompt = first_due([view for view in views if view.first])
        due = prompt is not None and prompt.bound_ms < math.inf
        tops = [0] if prompt is None else range(prompt.highest, prompt.lowest - 1, -1)
        # Time for prompts without ttft_ms and for those that will come is a wish: no target is given up for it.
        wish_ms = max(share, PROMPT_SHARE if prompt is not None and not due else 0.0) * limit_ms
        price_ms, spare_ms = math.inf, limit_ms
        known: Steps = {}
        exits = [view.lowest for view in views]
        for top in tops:
            spare_ms = limit_ms - (self._reserve_ms(prompt, top, limit_ms) if prompt is not None and due else 0.0)
            if spare_ms <= 0:
                continue
            capped = [
                claim._replace(highest=min(claim.highest, top)) if view is prompt else claim
                for view, claim in zip(views, claims, strict=True)
            ]
            within_ms = min(spare_ms, limit_ms - wish_ms)
            exits, price_ms = assign(self._prices, self._quality, capped, within_ms, lax_rows, known)
            if price_ms <= spare_ms:
                break
        fits = price_ms <= spare_ms * luck
        if not fits and prompt is not None and self._may_jump(prompt, views):
            spare_ms = limit_ms
            lowest = [claim._replace(highest=claim.lowest) for claim in claims]
            exits, price_ms = assign(self._prices, self._quality, lowest, spare_ms, lax_rows)
            fits = price_ms <= spare_ms * luck
        if not fits:  # another target is given up
            return exits, exits, False
        hysteresis = min((view.stream.budget.hysteresis for view in views), default=0.0)
        free, _ = assign(self._prices, self._quality, claims, max(spare_ms, 1e-9) * (1 - hysteresis), lax_rows, known)
        return exits, [min(a, b) for a, b in zip(exits, free, strict=True)], True

    def _claims(self, views: Sequence[View]) -> tuple[list[Claim], float, int]:
        """Claims on a round, its longest time, and the number of streams that are not tight for which it must have room."""
        # A deadline that has passed leaves no time at all.
        limit_ms = max(min((view.period_ms for view in views if view.met), default=math.inf), LEAST_MS)
        claims, places = [], 0.0
        for view in views:
            period_ms = view.period_ms if view.met else math.inf
            tight = period_ms <= 2 * limit_ms  # also without any target, or after a deadline
            places += 0.0 if tight else max(limit_ms / period_ms, 1 / ELASTIC if period_ms == math.inf else 0.0)
            weight = view.stream.budget.weight * (1.0 if view.met else UNMET)
            # The shallowest exit comes closest to a target that was given up, if it comes close at all.
            near = not view.met and self._alone_ms(view) <= view.period_ms < math.inf
            highest = view.lowest if near else view.highest
            claims.append(Claim(view.lowest, highest, weight, view.stream.context_length, tight, view.stream.shares))
        return claims, limit_ms, min(math.ceil(places - 1e-9), sum(not claim.tight for claim in claims))

    def _alone_ms(self, view: View) -> float:
        """Price of a round of this stream alone, at its shallowest exit."""
        return self._prices.steady_ms([(view.lowest, view.stream)])

    def _soon_enough(self, view: View) -> int:
        """The deepest exit of a stream without a target for its gaps at which a first token is in time, or the shallowest."""
        seen, prices = view.stream, self._prices
        for index in range(view.highest, view.lowest, -1):
            if not view.first:
                return index
            token = prices.token(index, seen.stage_rows, seen.balcony_rows, seen.context_length, seen.shares)
            if prices.sum_ms([token]) <= view.room_ms:
                return index
        return view.lowest

    def _first_ms(self, view: View) -> float:
        """Price of a prompt's rows on the way to its shallowest exit."""
        return self._prices.work_ms(view.stream.stage_rows, view.lowest, view.stream.context_length)

    def _may_jump(self, prompt: View, views: Sequence[View]) -> bool:
        """Whether a prompt can run at once and whole, because all others have tokens left that may be late."""
        if prompt.bound_ms == math.inf or self._first_ms(prompt) > min(prompt.bound_ms, STALL_MS):
            return False
        return all(view.may_be_late for view in views if not view.first)

    def _reserve_ms(self, prompt: View, index: int, limit_ms: float) -> float:
        """Time of a round that the rows of a prompt need at an exit."""
        rounds = max(prompt.room_ms // limit_ms, 1)
        rows = [math.ceil(due / rounds) for due in prompt.stream.stage_rows]  # stage 0 may be done, and others not
        return self._prices.work_ms(rows, index, prompt.stream.context_length)

    def _given_up(
        self, views: list[View], slowdown: Slowdown, share: float
    ) -> tuple[list[View], tuple[list[int], list[int], bool]]:
        """Give one more target up: one that could not be held alone, or the one without which the others can be held.

        Of several such streams it is the newest of the least weight. If no single one is enough, it is the shortest target.
        """
        holding = [view for view in views if view.met]
        with_target = [view for view in holding if min(view.period_ms, view.room_ms) < math.inf] or holding
        with_target.sort(key=lambda view: (view.stream.budget.weight, -view.stream.key))
        hopeless = [view for view in with_target if self.is_hopeless(view)]
        for view in hopeless or (with_target if self._one_may_do(views, slowdown) else ()):
            fewer = [one._replace(met=False) if one is view else one for one in views]
            found = self._goals(fewer, slowdown, share)
            if found[2] or hopeless:
                return fewer, found
        shortest = min(with_target, key=lambda view: view.period_ms)
        fewer = [one._replace(met=False) if one is shortest else one for one in views]
        return fewer, self._goals(fewer, slowdown, share)

    def _one_may_do(self, views: Sequence[View], slowdown: Slowdown) -> bool:
        """Whether the others might be held if one target that is not the shortest is given up.

        To search for each takes 16 ms of 16 streams, and 1 s of 64. So this is a bound: the price of the tight streams without
        the dearest, the deepest and all prompts, and as many places for the others as now, for the cheapest of all.
        """
        claims, limit_ms, lax_rows = self._claims(views)
        prices = self._prices.of_stages
        rows = [(prices.steady(one.lowest, one.context, one.shares), one.lowest) for one in claims]
        found = zip(rows, claims, views, strict=True)
        tight = [row for row, claim, view in found if claim.tight and not view.first]
        dearest, deepest = max(tight, default=None), max(tight, key=lambda row: row[::-1], default=None)
        kept = [row for row in tight if row is not dearest and row is not deepest]
        price_ms = prices.sum_ms(price for price, _ in (*kept, *sorted(rows)[:lax_rows]))
        return price_ms <= limit_ms * _luck(views, slowdown)

    def is_hopeless(self, view: View) -> bool:
        """Whether a target could not be held even alone, at the shallowest exit."""
        return self._alone_ms(view) > view.period_ms or (view.first and self._first_ms(view) > view.room_ms)

    def refusal(self, views: Sequence[View], factor: float) -> str | None:
        """Why the last of some streams cannot join the others now; None if it can.

        It can if the shallowest exits hold the targets of all, itself included. A gap that could not be held even alone, be it
        that of a reply in progress, is no reason: nobody's wait would help. ``factor`` is the slowdown.
        """
        own = views[-1]
        if self._alone_ms(own) > own.period_ms:
            return None
        held = [view for view in views if view.met and self._alone_ms(view) <= view.period_ms]
        claims, limit_ms, lax_rows = self._claims(held)
        shallow = [claim._replace(highest=claim.lowest) for claim in claims]
        _, price_ms = assign(self._prices, self._quality, shallow, limit_ms, lax_rows)
        if price_ms <= limit_ms:
            return None
        takes = f"a round of {len(held)} streams takes {price_ms * factor:.3g} ms at their shallowest exits"
        tightest = min((view for view in held if view is not own), key=lambda view: view.period_ms, default=own)
        if tightest is not own and price_ms > tightest.period_ms:  # whatever its own target is
            return f"{takes}, and another one asked for {targets_of(tightest.stream.budget)}: wait until it ends"
        budget, more = own.stream.budget, "more time"
        if budget.tpot_ms is not None and budget.deadline_s is None:
            more = f"tpot_ms = {math.ceil(budget.tpot_ms * price_ms / own.period_ms)} or more"
        return f"{targets_of(budget)}: {takes}: wait, or ask for {more}"


def _luck(views: Sequence[View], slowdown: Slowdown) -> float:
    """Factor of a time that better luck could add to it."""
    return slowdown.luck(max((quantile_of(view.stream.budget.probability) for view in views), default=0.0))


def first_due(prompts: Sequence[View]) -> View | None:
    """The prompt to work on: the one that is due first; then one whose time has passed, then the oldest."""
    if not prompts:
        return None
    return min(prompts, key=lambda view: (view.bound_ms, view.room_ms, view.stream.started_s, view.stream.key))
