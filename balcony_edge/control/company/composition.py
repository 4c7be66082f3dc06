"""The composition of a round: who steps, at which exits, and which rows run next to the step.

Owns the rules of one round; what the streams should come to is in :mod:`.goals`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from balcony_edge.control.catching_up import PLENTY
from balcony_edge.control.company.assignment import Claim, assign
from balcony_edge.control.company.goals import ELASTIC, STALL_MS, first_due
from balcony_edge.control.company.prices import RoundPrices
from balcony_edge.control.company.seen import Chunk
from balcony_edge.control.company.view import View
from balcony_edge.control.slowdown import WITH_CATCH_UP, Slowdown
from balcony_edge.device.costs import UnitCost

#: Longest round in milliseconds with rows of a prompt next to it, or of a prompt alone: who comes meanwhile waits so long.
CALM_MS = 250.0
#: Rounds like this one for which a stream must be able to wait, to be left out for the sake of pending rows.
BEHIND_ROUNDS = 3.0

#: Streams of a round, with the indices of their exits.
Chosen = list[tuple[View, int]]


class Composer:
    """Composes rounds over one cost model.

    Args:
        prices: prices of rounds.
        quality: agreement of each exit with the full depth, ascending.
    """

    def __init__(self, prices: RoundPrices, quality: Sequence[float]) -> None:
        self._prices, self._costs, self._quality = prices, prices.costs, quality
        self._busy = 1.0  # of this round, as for compose()
        self._tokens: dict[tuple[int, int], tuple[float, int]] = {}  # stream and exit → its part of this round's price

    def compose(
        self, ready: list[View], waiting: list[View], slowdown: Slowdown, absent_ms: float, busy: float
    ) -> tuple[Chosen, Chunk | None, float]:
        """Streams of the round with their exits, the rows next to it, and the price.

        Args:
            ready: streams that can step.
            waiting: streams that wait for their pace.
            slowdown: slowdown filter.
            absent_ms: as in :class:`~balcony_edge.control.company.seen.RoundSeen`.
            busy: share of the time in which rounds run, with the pauses of the ceilings after them.
        """
        self._tokens.clear()
        self._busy = busy
        calm_ms = min(CALM_MS, absent_ms) / slowdown.factor  # longest time of the rows of this round
        prompts, steps = [view for view in ready if view.first], [view for view in ready if not view.first]
        aims = absent_ms < math.inf or any(view.stream.budget.has_target for view in (*ready, *waiting))
        # Without any target, ceiling or pace, that of a reader at its token included, a deeper exit is taken at once, with all
        # pending rows.
        chosen = [(view, view.present if aims else view.goal) for view in steps]
        behind = any(view.present < view.goal for view in steps) or any(view.room_ms < math.inf for view in prompts)
        found = self._composed(chosen, prompts, waiting, slowdown, calm_ms, behind)
        if behind and found[1] is None and len(found[0]) < len(steps):  # who was left out made no room for anything
            found = self._composed(chosen, prompts, waiting, slowdown, calm_ms, False)
        return found

    def _composed(
        self, chosen: Chosen, prompts: list[View], waiting: list[View], slowdown: Slowdown, calm_ms: float, behind: bool
    ) -> tuple[Chosen, Chunk | None, float]:
        """The round, if streams that can wait are left out for somebody who is ``behind``, or are not."""
        price_ms = self._price(chosen)
        chosen, price_ms, left = self._leave_out(chosen, price_ms, behind)
        waiting = [*waiting, *left]
        limit_ms = min([view.bound_ms for view, _ in chosen], default=math.inf)
        # Who waits must still get its token in a round like this one, after the pause that this one asks for.
        waits_ms = [view.bound_ms - price_ms for view in waiting if not view.first and view.bound_ms < math.inf]
        limit_ms = min([limit_ms, *(left_ms * self._busy for left_ms in waits_ms)])
        # Rounds with more rows next to them may be slower than their price, compared with the others.
        share, portion = math.exp(-max(slowdown.offsets[WITH_CATCH_UP], 0.0)), None
        if price_ms > limit_ms:
            portion = self._in_portions(chosen, limit_ms, share)
            if portion is None:
                chosen, price_ms = self._lowered(chosen, price_ms, limit_ms)
        # A target that was given up still says how long a gap may not be, unless the step alone takes longer: then rows take
        # as long again. A deadline that has passed does not.
        periods_ms = [view.period_ms or view.stream.budget.tpot_ms or math.inf for view, _ in chosen]
        calm_ms = min([calm_ms, *(max(period_ms, price_ms) for period_ms in periods_ms)])
        slack_ms = min(share * limit_ms - price_ms, calm_ms)
        prompt = first_due(prompts)
        others = [] if prompt is None else [view for view, _ in chosen] + [view for view in waiting if not view.first]
        if prompt is not None and prompt.bound_ms < math.inf:
            gap_ms = min((view.period_ms for view in others if view.met), default=math.inf)
            if self._must_run(prompt, others, price_ms, min(share * gap_ms - price_ms, calm_ms)):
                return self._with_prompt(prompt, [], 0.0, math.inf)
        if portion is not None:
            return portion
        if prompt is not None:
            chosen, chunk, price_ms = self._with_prompt(prompt, chosen, price_ms, slack_ms)
            if chunk is not None or not chosen or chosen[-1][0] is prompt:
                return chosen, chunk, price_ms
            if prompt.bound_ms == math.inf and all(view.gives_way for view in others):  # or it might never begin
                return self._with_prompt(prompt, [], 0.0, calm_ms)
        return self._with_backlog(chosen, price_ms, slack_ms)

    def _leave_out(self, chosen: Chosen, price_ms: float, behind: bool) -> tuple[Chosen, float, list[View]]:
        """Leave out streams that can wait for the next round, while this one takes too long.

        If somebody is ``behind``, all of them are left out: their targets are kept anyway, and the time goes to pending rows,
        or to the prompt of a stream with ``ttft_ms``.
        """
        if len(chosen) < 2 or not (behind or price_ms > min(view.bound_ms for view, _ in chosen)):
            return chosen, price_ms, []
        left: list[View] = []
        # Streams with like targets stay together: they share a pass, and one more row costs little.
        shortest_ms = min((view.period_ms for view, _ in chosen if view.met), default=0.0)
        patience_ms = [(self._patience_ms(view), view.stream.key, view) for view, _ in chosen]
        for patient_ms, _, laxest in sorted(patience_ms, key=lambda one: one[:2], reverse=True)[:-1]:
            if patient_ms < (BEHIND_ROUNDS if behind else 2) * price_ms / self._busy:
                break
            if behind and laxest.bound_ms < math.inf and laxest.period_ms <= 2 * shortest_ms:
                break
            chosen = [one for one in chosen if one[0] is not laxest]
            left.append(laxest)
            price_ms = self._price(chosen)
            if not behind and price_ms <= min(view.bound_ms for view, _ in chosen):
                break
        return chosen, price_ms, left

    def _in_portions(self, chosen: Chosen, limit_ms: float, share: float) -> tuple[Chosen, Chunk, float] | None:
        """The round in which streams with many rows at their own stages (forced tokens) get no token, and one runs some.

        None if there is too little time: a portion is worth its first row if few of them are enough.
        """
        many = [(view, at) for view, at in chosen if view.stream.stage_rows[at] > 2 and view.bound_ms > limit_ms]
        others = [one for one in chosen if all(one[0] is not view for view, _ in many)]
        if not others:
            return None
        others_ms = self._price(others)
        for view, at in sorted(many, key=lambda one: -one[0].stream.stage_rows[one[1]]):
            chunk = self._portion(view, range(at + 1), share * limit_ms - others_ms)
            if chunk is not None and ELASTIC * chunk.rows >= view.stream.stage_rows[at]:
                return others, chunk, others_ms + self._chunk_ms(view, chunk)
        return None

    def _patience_ms(self, view: View) -> float:
        """Time until the stream must have its token; a stream without a target waits for some rounds at most."""
        if view.bound_ms < math.inf:
            return view.bound_ms
        round_of_one = self._prices.steady_ms([(view.goal, view.stream)])
        return max(ELASTIC * round_of_one - view.waited_ms, 0.0)

    def _lowered(self, chosen: Chosen, price_ms: float, limit_ms: float) -> tuple[Chosen, float]:
        """Take depth for this round, where the least agreement is lost."""
        caught_up_ms = self._prices.steady_ms([(index, view.stream) for view, index in chosen])
        claims = [
            Claim(view.lowest, index, view.stream.budget.weight, view.stream.context_length, True, view.stream.shares)
            for view, index in chosen
        ]
        exits, _ = assign(self._prices, self._quality, claims, limit_ms - max(price_ms - caught_up_ms, 0.0), 0)
        lowered = [(view, index) for (view, _), index in zip(chosen, exits, strict=True)]
        lowered_ms = self._price(lowered)
        return (lowered, lowered_ms) if lowered_ms < price_ms else (chosen, price_ms)

    def _must_run(self, prompt: View, others: Sequence[View], price_ms: float, slack_ms: float) -> bool:
        """Whether a prompt must run at once and whole, because rounds leave it too little time for ``ttft_ms``.

        It may if every other stream has tokens left that may be late.

        Args:
            prompt: the prompt.
            others: streams that have begun.
            price_ms: price of a round without it.
            slack_ms: time that a usual round leaves for its rows.
        """
        seen, costs = prompt.stream, self._costs
        whole_ms = self._prices.work_ms(seen.stage_rows, prompt.goal, seen.context_length)
        if not slack_ms < whole_ms <= min(prompt.bound_ms, STALL_MS):
            return False
        rounds = 0.0
        for stage, due in enumerate(seen.stage_rows[: prompt.goal + 1]):
            if due:  # a stage that has run all its rows needs no round
                rows = costs.stages[stage].rows_within(slack_ms, due, seen.context_length)
                rounds += due / rows if rows else math.inf
        if rounds * (price_ms + slack_ms) <= prompt.bound_ms:
            return False
        return all(view.may_be_late or view.bound_ms > whole_ms for view in others)

    def _with_prompt(
        self, prompt: View, chosen: Chosen, price_ms: float, slack_ms: float
    ) -> tuple[Chosen, Chunk | None, float]:
        """Add a prompt's first token to the round if its rows fit, or as many of its rows as do."""
        whole = [*chosen, (prompt, prompt.goal)]
        whole_ms = self._price(whole)
        if whole_ms - price_ms <= slack_ms:
            return whole, None, whole_ms
        chunk = self._portion(prompt, range(prompt.goal + 1), slack_ms) or self._kept(prompt, slack_ms)
        if chunk is None and not chosen:  # there is no time, and nobody else to give it to
            chunk = self._portion(prompt, range(prompt.goal + 1), math.inf)
            if chunk is None:
                return whole, None, whole_ms
            chunk = chunk._replace(rows=1)
        if chunk is None:
            return chosen, None, price_ms
        return chosen, chunk, price_ms + self._chunk_ms(prompt, chunk)

    def catch_up(self, views: Sequence[View], slack_ms: float) -> tuple[Chunk | None, float]:
        """Pending rows on the way to a stream's deeper exit that fit into some time, and their price."""
        behind = [view for view in views if not view.first and view.present < view.goal]
        # One after another: a stream that has caught up leaves no more rows.
        for view in sorted(behind, key=lambda one: (self._rows_left(one), one.stream.key)):
            if (chunk := self._backlog(view, slack_ms)) is not None:
                return chunk, self._chunk_ms(view, chunk)
        return None, 0.0

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
        chunk, chunk_ms = self.catch_up([view for view, _ in rising], slack_ms)
        return chosen, chunk, price_ms + chunk_ms

    @staticmethod
    def _rows_left(view: View) -> int:
        return sum(view.stream.stage_rows[: view.goal + 1])

    def _portion(self, view: View, stages: range, slack_ms: float, least: int = 1) -> Chunk | None:
        """Rows of one stage: the shallowest whose rows fill the time, or fill most of it.

        One stage at a time, because the first row of a pass is the dearest.

        Args:
            view: stream of the rows.
            stages: stages on the way to its exit.
            slack_ms: time for them.
            least: number of rows for which a pass is worth while.
        """
        seen, best, fullest = view.stream, None, 0.0
        patient = view.first and view.bound_ms == math.inf  # who is in a hurry or has a backlog fills the time
        for stage in stages:
            unit, ready = self._costs.stages[stage], _ready(view, stage)
            before = _before(seen.context_length, seen.stage_rows[stage])
            most = _rows_within(unit, slack_ms, max(ready, PLENTY), before)
            if ready >= least and most and min(ready / most, 1.0) > fullest:
                rows = _in_passes(unit, seen.stage_rows[stage], most) if patient else most
                fullest, best = min(ready / most, 1.0), Chunk(seen.key, stage, min(ready, rows))
        return best

    def _backlog(self, view: View, slack_ms: float) -> Chunk | None:
        """Pending rows of a graph on the way to the goal: the shallowest whose rows fill the time, or fill most of it.

        A graph waits for more rows than the stream's tokens add while the others have their turns, because the first row of a
        pass is the dearest.
        """
        seen, stages = view.stream, range(view.present + 1, view.goal + 1)
        best = self._portion(view, stages, slack_ms, least=len(stages) + 1)
        if best is None and seen.balcony_rows[view.goal] - seen.stage_rows[view.goal] > len(stages):
            return self._kept(view, slack_ms)
        return best

    def _kept(self, view: View, slack_ms: float) -> Chunk | None:
        """Rows that wait in front of the balcony of its goal, as many as fit."""
        seen, index = view.stream, view.goal
        kept = seen.balcony_rows[index] - max(seen.stage_rows[index], 1)
        before = _before(seen.context_length, seen.balcony_rows[index])
        rows = _rows_within(self._costs.balconies[index], slack_ms, kept, before, 1)
        return Chunk(seen.key, index, rows, balcony=True) if rows else None

    def _chunk_ms(self, view: View, chunk: Chunk) -> float:
        seen, costs = view.stream, self._costs
        units, due = (costs.balconies, seen.balcony_rows) if chunk.balcony else (costs.stages, seen.stage_rows)
        before = _before(seen.context_length, due[chunk.stage])
        return units[chunk.stage].pass_ms(chunk.rows, before + chunk.rows - 1, 1 if chunk.balcony else None)

    def _price(self, chosen: Sequence[tuple[View, int]]) -> float:
        return self._prices.sum_ms([self._token(view, index) for view, index in chosen])

    def _token(self, view: View, index: int) -> tuple[float, int]:
        """Own price and passes of a stream's token; one decision asks for the same ones several times."""
        place = view.stream.key, index
        found = self._tokens.get(place)
        if found is None:
            seen = view.stream
            price = self._prices.token(index, seen.stage_rows, seen.balcony_rows, seen.context_length, seen.shares)
            found = self._tokens[place] = price
        return found


def _before(context: int, due: int) -> int:
    """Number of rows that a graph has taken in: the first rows of a long prompt do not pay for the keys of its last."""
    return max(context + 1 - due, 0)


def _ready(view: View, stage: int) -> int:
    """Rows that a stage can run before the stream's next token: those that the stage above has run, or of the first one all.

    A token needs a row that runs with it: a row of its own, and of a prompt one at the last stage.
    """
    rows = view.stream.stage_rows
    runs_all = view.first and stage < len(rows) - 1
    return rows[stage] - max(rows[stage - 1] if stage else 0, 0 if runs_all else 1)


def _in_passes(unit: UnitCost, due: int, most: int) -> int:
    """As many of the rows that are due as fit; whole passes if not all do.

    The rows of a prompt then share passes as they do if it runs at once, and so have the same last bits.
    """
    if due <= most or unit.pass_rows is None or most < unit.pass_rows:
        return most
    return most - most % unit.pass_rows


def _rows_within(unit: UnitCost, slack_ms: float, most: int, before: int, queries: int | None = None) -> int:
    """Number of rows after ``before`` others, at most ``most``, that fit into some time.

    They are counted without their own keys, and then with those of as many rows: at most a little fewer than would fit.
    """
    rows = unit.rows_within(slack_ms, most, before, queries)
    return unit.rows_within(slack_ms, rows, before + rows - 1, queries)
