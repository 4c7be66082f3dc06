"""The composition of a round: who steps, at which exits, and which rows run next to the step.

Owns the rules of one round; what the streams should come to is in :mod:`.goals`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from balcony_edge.control.company.assignment import Claim, assign
from balcony_edge.control.company.goals import ELASTIC, first_due
from balcony_edge.control.company.prices import chunk_ms, chunk_rows, round_ms, steady_ms
from balcony_edge.control.company.seen import Chunk
from balcony_edge.control.company.view import View
from balcony_edge.device.costs import CostModel

#: Longest round in milliseconds with rows of a prompt next to it, or of a prompt alone: who comes meanwhile waits so long.
CALM_MS = 250.0
#: Longest time of rows next to a round, in targets of a stream that has given its target up.
GIVEN_UP = 1.0
#: Rounds like this one for which a stream must be able to wait, to be left out for the sake of pending rows.
BEHIND_ROUNDS = 3.0
#: Rows beyond which the time for a chunk counts as plenty.
PLENTY = 64

#: Streams of a round, with the indices of their exits.
Chosen = list[tuple[View, int]]


class Composer:
    """Composes rounds over one cost model.

    Args:
        costs: prices of the device.
        quality: agreement of each exit with the full depth, ascending.
    """

    def __init__(self, costs: CostModel, quality: Sequence[float]) -> None:
        self._costs, self._quality = costs, quality

    def compose(self, ready: list[View], views: list[View], factor: float) -> tuple[Chosen, Chunk | None, float]:
        """Streams of the round with their exits, the rows next to it, and the price."""
        waiting = [view for view in views if view not in ready]
        prompts = [view for view in ready if view.first]
        steps = [view for view in ready if not view.first]
        aims = any(view.period_ms < math.inf or (view.first and view.room_ms < math.inf) for view in views)
        # Without any target there is nothing to wait for: a deeper exit is taken at once, with all its pending rows.
        chosen = [(view, view.present if aims else view.goal) for view in steps]
        price_ms = self._price(chosen)
        behind = any(view.present < view.goal for view in steps) or any(view.room_ms < math.inf for view in prompts)
        chosen, price_ms, left = self._leave_out(chosen, price_ms, behind)
        waiting += left
        limit_ms = min((view.bound_ms for view, _ in chosen), default=math.inf)
        # Who waits must still get its token in a round like this one.
        waits_ms = [view.bound_ms - price_ms for view in waiting if not view.first and view.bound_ms < math.inf]
        limit_ms = min([limit_ms, *waits_ms])
        if price_ms > limit_ms:
            chosen, price_ms = self._lowered(chosen, price_ms, limit_ms)
        # A target that was given up still says how long a gap may not be.
        calm_ms = min([CALM_MS / factor, *(GIVEN_UP * view.period_ms for view, _ in chosen)])
        slack_ms = min(limit_ms - price_ms, calm_ms)
        prompt = first_due(prompts)
        if prompt is not None:
            chosen, chunk, price_ms = self._with_prompt(prompt, chosen, price_ms, slack_ms)
            if chunk is not None or not chosen or chosen[-1][0] is prompt:
                return chosen, chunk, price_ms
        return self._with_backlog(chosen, price_ms, slack_ms)

    def _leave_out(self, chosen: Chosen, price_ms: float, behind: bool) -> tuple[Chosen, float, list[View]]:
        """Leave out streams that can wait for the next round, while this one takes too long.

        If somebody is ``behind``, all of them are left out: their targets are kept anyway, and the time goes to pending rows,
        or to the prompt of a stream with ``ttft_ms``.
        """
        left: list[View] = []
        while len(chosen) > 1 and (behind or price_ms > min(view.bound_ms for view, _ in chosen)):
            laxest = max(chosen, key=lambda one: (self._patience_ms(one[0]), one[0].stream.key))
            if self._patience_ms(laxest[0]) < (BEHIND_ROUNDS if behind else 2) * price_ms:
                break
            chosen = [one for one in chosen if one is not laxest]
            left.append(laxest[0])
            price_ms = self._price(chosen)
        return chosen, price_ms, left

    def _patience_ms(self, view: View) -> float:
        """Time until the stream must have its token; a stream without a target waits for some rounds at most."""
        if view.bound_ms < math.inf:
            return view.bound_ms
        round_of_one = steady_ms(self._costs, [(view.goal, view.stream.context_length)])
        return max(ELASTIC * round_of_one - view.waited_ms, 0.0)

    def _lowered(self, chosen: Chosen, price_ms: float, limit_ms: float) -> tuple[Chosen, float]:
        """Take depth for this round, where the least agreement is lost."""
        if not chosen:
            return chosen, price_ms
        caught_up_ms = steady_ms(self._costs, [(index, view.stream.context_length) for view, index in chosen])
        claims = [
            Claim(view.lowest, index, view.stream.budget.weight, view.stream.context_length, True)
            for view, index in chosen
        ]
        exits, _ = assign(self._costs, self._quality, claims, limit_ms - max(price_ms - caught_up_ms, 0.0), 0)
        lowered = [(view, index) for (view, _), index in zip(chosen, exits, strict=True)]
        lowered_ms = self._price(lowered)
        return (lowered, lowered_ms) if lowered_ms < price_ms else (chosen, price_ms)

    def _with_prompt(
        self, prompt: View, chosen: Chosen, price_ms: float, slack_ms: float
    ) -> tuple[Chosen, Chunk | None, float]:
        """Add a prompt's first token to the round if its rows fit, or as many of its rows as do."""
        rest, stages = prompt.stream.stage_rows[0], tuple(range(prompt.goal + 1))
        whole = [*chosen, (prompt, prompt.goal)]
        whole_ms = self._price(whole)
        if whole_ms - price_ms <= slack_ms or (not chosen and rest == 1):
            return whole, None, whole_ms
        context = prompt.stream.context_length
        rows = chunk_rows(self._costs, stages, slack_ms, rest - 1, context)
        if not rows and not chosen and rest > 1:
            rows = 1
        if not rows:
            return chosen, None, price_ms
        extra_ms = chunk_ms(self._costs, stages, rows, context)
        return chosen, Chunk(prompt.stream.key, stages, rows), price_ms + extra_ms

    def _with_backlog(self, chosen: Chosen, price_ms: float, slack_ms: float) -> tuple[Chosen, Chunk | None, float]:
        """Let a stream enter the deeper exit that it is assigned, or work off rows on the way to it."""
        rising = [(view, index) for view, index in chosen if index < view.goal and index == view.present]
        for view, index in rising:
            if view.tokens < view.stream.budget.dwell_tokens:
                continue
            for entered in range(view.goal, index, -1):
                risen = [(one, entered if one is view else at) for one, at in chosen]
                risen_ms = self._price(risen)
                if risen_ms - price_ms <= slack_ms:
                    return risen, None, risen_ms
        # One after another: a stream that has caught up leaves no more rows.
        for view, index in sorted(rising, key=lambda one: (self._rows_left(one[0]), one[0].stream.key)):
            if (chunk := self._backlog(view, index, slack_ms)) is not None:
                return chosen, chunk, price_ms + self._chunk_ms(view, chunk)
        return chosen, None, price_ms

    @staticmethod
    def _rows_left(view: View) -> int:
        return sum(view.stream.stage_rows[: view.goal + 1])

    def _backlog(self, view: View, index: int, slack_ms: float) -> Chunk | None:
        """Pending rows of a graph on the way to the goal: the shallowest whose rows fill the time, or fill most of it.

        A graph waits for more rows than the stream's tokens add while the others have their turns, because the first row of a
        pass is the dearest.
        """
        seen, best, fullest = view.stream, None, 0.0
        stages = range(index + 1, view.goal + 1)
        for stage in stages:
            ready = seen.stage_rows[stage] - seen.stage_rows[stage - 1]
            most = chunk_rows(self._costs, (stage,), slack_ms, max(ready, PLENTY), seen.context_length)
            if ready > len(stages) and most and min(ready / most, 1.0) > fullest:
                fullest, best = min(ready / most, 1.0), Chunk(seen.key, (stage,), min(ready, most))
        kept = seen.balcony_rows[view.goal] - seen.stage_rows[view.goal]
        if best is None and kept > len(stages):
            rows = self._costs.balconies[view.goal].rows_within(slack_ms, kept, seen.context_length, 1)
            return Chunk(seen.key, (), rows, view.goal) if rows else None
        return best

    def _chunk_ms(self, view: View, chunk: Chunk) -> float:
        context = view.stream.context_length
        total_ms = chunk_ms(self._costs, chunk.stages, chunk.rows, context)
        if chunk.balcony is not None:
            total_ms += self._costs.balconies[chunk.balcony].pass_ms(chunk.rows, context, 1)
        return total_ms

    def _price(self, chosen: Sequence[tuple[View, int]]) -> float:
        return round_ms(self._costs, [view.entry(index) for view, index in chosen])
