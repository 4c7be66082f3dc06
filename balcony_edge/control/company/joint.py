"""The joint controller: which streams get a token in the next round, at which exits, and which pending rows run next to it.

Pure, like :mod:`balcony_edge.control.controller`: ``decide(state, seen) -> (state, round)`` has no clock, sensor or engine.
One stream alone is decided by that controller; this one decides as soon as several ask, or one has a long step (a long
prompt, a slow pace).

**Targets.** A stream with ``tpot_ms`` is due that long after its last token, one with a deadline after its share of the time
left. A round must end before the first stream in it is due, and leave the streams that wait enough time for the round after it,
each with the probability that its budget asks for. The slowdown is that of the device: streams do not see one another as load.

**Assignment.** From time to time, and when streams or budgets change, every stream gets the deepest exit that the shortest
target leaves time for (:mod:`.assignment`). Streams that can wait for a whole round get only the places that their rates need.
If no depth holds all targets, the newest of the streams with the least weight gives its target up (one that cannot be met at
all goes first). It then gets its tokens where the others leave time, or an error if its budget asks for one. Depth leaves the
share of the time that prompts have taken lately; no target is given up for that.

**Round.** All streams step together as long as the round is in time. Otherwise those that can wait are left out, and after that
depth is taken for one round. What is left of the time goes to the prompt of a new stream, and then to the pending rows of a
stream that was assigned a deeper exit. A stream without a target gets at least a token every ``ELASTIC`` rounds. A prompt that
would miss ``ttft_ms`` in this way runs at once and whole, if the probability of each other stream still allows it a late token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from balcony_edge.budget import Budget
from balcony_edge.control.company.ceilings import left_out, merged_ceilings
from balcony_edge.control.company.composition import Chosen, Composer
from balcony_edge.control.company.goals import Goals
from balcony_edge.control.company.prices import RoundEntry, RoundPrices
from balcony_edge.control.company.seen import Chunk, CompanyState, Move, Round, RoundSeen, StreamSeen, StreamState
from balcony_edge.control.company.view import View, scale_of, targets_of, view_of
from balcony_edge.control.controller import UNMEASURED, probability_of, quantile_of
from balcony_edge.control.decision import Decision, Measurement, device_words
from balcony_edge.control.governor import TICK_S, Demand, Governor, govern, needed_tps, paced_ms
from balcony_edge.control.slowdown import WITH_CATCH_UP, Slowdown
from balcony_edge.device.costs import CostModel

#: Time over which the share of prompts is averaged.
PROMPT_S = 10.0
#: Time between two decisions above which the device was idle in between.
LONGEST_ROUND_S = 1.0


class _BudgetFacts(NamedTuple):
    """What follows from a budget alone.

    Attributes:
        budget: the budget.
        lowest, highest: indices of the shallowest and deepest exit that it allows.
        senses: whether it has ceilings.
        quantile: deviations that hold its probability.
        gap_only: whether a token after the first has no other target than ``tpot_ms``.
    """

    budget: Budget
    lowest: int
    highest: int
    senses: bool
    quantile: float
    gap_only: bool


class _Outcome(NamedTuple):
    """What the decisions about single streams have in common.

    Attributes:
        price_ms, predicted_ms: price of the round at slowdown 1, and its expected time.
        streams: number of streams that it serves.
        slower: factor by which rounds like this one were slower than their price, compared with the others.
        deviation: deviation of the logarithm of a step's time.
        governor: state of the slow loop.
        ceilings: ceilings of all budgets, which hold for the device; None without any.
        usual: reason of a token whose target is held at its goal.
        now_s: present time.
    """

    price_ms: float
    predicted_ms: float
    streams: int
    slower: float
    deviation: float
    governor: Governor
    ceilings: Budget | None
    usual: tuple[object, ...]
    now_s: float


class _Why(NamedTuple):
    """Reason of a token in company, in words that are put together when it is read."""

    predicted_ms: float
    streams: int
    unmet: str | None
    fits: int | None

    def __str__(self) -> str:
        count = f"{self.streams} {'stream' if self.streams == 1 else 'streams'}"
        why = f"a round of {count} takes {self.predicted_ms:.1f} ms"
        if self.unmet is not None:
            return f"infeasible in this company: {self.unmet}; {why}"
        return why if self.fits is None else f"{why}; {self.fits} fits, with a backlog"


class JointController:
    """Decides over one cost model. It holds no state: the scheduler carries the :class:`CompanyState`.

    Args:
        costs: prices of the device.
        quality: agreement of each exit with the full depth, ascending.
    """

    def __init__(self, costs: CostModel, quality: Sequence[float]) -> None:
        self._costs = costs
        self._prices = RoundPrices(costs)
        self._goals, self._composer = Goals(self._prices, quality), Composer(self._prices, quality)
        self._index = {exit_layer: index for index, exit_layer in enumerate(costs.exits)}
        self._facts_of: dict[int, _BudgetFacts] = {}  # by the ids of their budgets, which they keep alive

    def decide(self, state: CompanyState, seen: RoundSeen) -> tuple[CompanyState, Round]:
        """Choose the next round.

        Raises:
            BudgetError: a budget allows none of the exits.
        """
        state = _with_learned_alone(state, seen)
        slowdown = self._learn(state, None if _has_rested(state, seen) else seen.last)
        if (unchanged := self._unchanged(state, seen, slowdown)) is not None:
            return unchanged
        facts = [self._facts(stream.budget) for stream in seen.streams]
        senses = any(one.senses for one in facts)
        ceilings = merged_ceilings([stream.budget for stream in seen.streams]) if senses else None
        governor = self._tick(state, ceilings, slowdown, seen)
        share = _prompt_share(state, seen.now_s)
        ceiling = len(self._costs.exits) if ceilings is None else governor.ceiling
        views = self._views(seen.streams, facts, state, slowdown, seen.now_s, ceiling, seen.learned is not None)
        assigned_for, views = self._goals.assigned(state, views, slowdown, share)
        early_ms = self._early_ms(views, slowdown, seen.now_s)
        ready, waiting = views, []
        if early_ms:
            ready = [view for view in views if view.stream.key not in early_ms]
            waiting = [view for view in views if view.stream.key in early_ms]
        busy = 1.0 if ceilings is None else self._busy(views, ceilings, governor, slowdown, _needed_tps(state, seen))
        if ready and waiting and busy < 1:
            ready, waiting = self._in_step(ready, waiting, early_ms, slowdown, busy)
        idle_ms = 0.0 if ready else min(early_ms.values(), default=0.0)
        if ready:
            chosen, chunk, price_ms = self._composer.compose(ready, waiting, slowdown, seen.absent_ms, busy)
        elif ceilings is None or ceilings.energy_j_per_token is None:  # everybody waits for a pace
            left_ms = min(idle_ms, seen.absent_ms)
            chosen, (chunk, price_ms) = [], self._composer.catch_up(views, left_ms * busy / slowdown.factor)
        else:  # rows in a wait take joules: the slow loop has allowed a depth for idle waits
            chosen, chunk, price_ms = [], None, 0.0
        deepest = max((index for _, index in chosen), default=0)
        offset = slowdown.offsets[WITH_CATCH_UP if chunk is not None or not chosen else deepest]
        predicted_ms = price_ms * math.exp(slowdown.mean + offset)
        usual, slower = (_Why(predicted_ms, len(chosen), None, None),), math.exp(offset)
        deviation, now_s = slowdown.deviation, seen.now_s
        outcome = _Outcome(price_ms, predicted_ms, len(chosen), slower, deviation, governor, ceilings, usual, now_s)
        found = Round(
            moves=tuple(Move(view.stream.key, self._decision(view, index, outcome)) for view, index in chosen),
            refused=tuple(
                (view.stream.key, why)
                for view in views
                if (ceilings is not None or not view.met)
                and view.stream.budget.may_end
                and (why := self._refusal(view, views, slowdown, outcome)) is not None
            ),
            chunk=chunk,
            price_ms=price_ms,
            predicted_ms=predicted_ms,
            wait_ms=idle_ms if not chosen and chunk is None else _wait_ms(outcome, state, seen),
            deepest=deepest,
        )
        streams = _streams_after(state.streams, views, chosen)
        after = CompanyState(
            slowdown=slowdown,
            governor=governor,
            streams=streams,
            assigned_for=assigned_for,
            caught_up=chunk is not None,
            round=state.round + 1,
            prompt_share=share,
            prompted=_runs_prompt(ready, chosen, chunk),
            decided_s=seen.now_s,
        )
        return after, found

    def _unchanged(self, state: CompanyState, seen: RoundSeen, slowdown: Slowdown) -> tuple[CompanyState, Round] | None:
        """What :meth:`decide` finds if there is nothing to weigh, in one loop; None if there is.

        There is nothing to weigh if the assignment stands, every stream steps at its goal again, without pending rows and no
        other target than ``tpot_ms``, and the round is in time for all of them.
        """
        # All fields at once, no views and few calls: with cold caches each name costs a microsecond (docs/LOG.md, "Python's
        # share of a step, once more").
        mean, deviation, prices, exits = slowdown.mean, slowdown.deviation, self._prices, self._costs.exits
        streams, who, found, now_s = dict(state.streams), [], [], seen.now_s
        price_ms, passes, deepest, limit_ms = 0.0, 0, 0, math.inf
        for key, budget, context, stage_rows, balcony_rows, made, _, asked_s, shares, _, _ in seen.streams:
            _, lowest, highest, _, quantile, gap_only = self._facts(budget)
            known = streams.get(key)
            if known is None or not made or not gap_only:
                return None
            at, goal, tokens, met = known
            if at != goal or not met or not lowest <= goal <= highest:
                return None
            if stage_rows[goal] != 1 or balcony_rows[goal] > 1:
                return None
            own_ms, shared = prices.steady(goal, context, shares)
            price_ms += own_ms
            passes += shared
            deepest = max(deepest, goal)
            room_ms = max((budget.tpot_ms or math.inf) - 1000 * (now_s - asked_s), 0.0)
            room_ms *= math.exp(-mean - quantile * deviation)
            limit_ms = min(limit_ms, room_ms)
            who.append((key, id(budget), False, highest))
            found.append((key, exits[goal], room_ms * math.exp(quantile * deviation)))
            streams[key] = StreamState(at, goal, tokens + 1, met)
        price_ms += prices.passes_ms(passes)
        assigned_for = self._goals.made_for(state, tuple(who), slowdown)
        if not found or price_ms > limit_ms or assigned_for is not state.assigned_for:
            return None
        offset = slowdown.offsets[deepest]
        predicted_ms, slower_ms = price_ms * math.exp(mean + offset), price_ms * math.exp(offset)
        why, share = (_Why(predicted_ms, len(found), None, None),), _prompt_share(state, now_s)
        moves = []
        for key, exit_layer, most_ms in found:
            probability = probability_of(most_ms, slower_ms, deviation)
            decision = Decision(exit_layer, predicted_ms, price_ms, probability, False, None, 0.0, 0.0, why)
            moves.append(Move(key, decision))
        rounds, governor = state.round + 1, state.governor
        after = CompanyState(slowdown, governor, streams, assigned_for, False, rounds, share, False, now_s)
        return after, Round(tuple(moves), (), None, price_ms, predicted_ms, 0.0, deepest)

    def refusal(self, state: CompanyState, seen: RoundSeen, newcomer: StreamSeen) -> str | None:
        """Why another stream cannot join those of a round now, in one line; None if it can."""
        slowdown = self._learn(_with_learned_alone(state, seen), None)
        streams = (*seen.streams, newcomer)
        facts = [self._facts(stream.budget) for stream in streams]
        views = self._views(streams, facts, state, slowdown, seen.now_s, len(self._costs.exits))
        return self._goals.refusal(views, slowdown.factor)

    def _early_ms(self, views: Sequence[View], slowdown: Slowdown, now_s: float) -> dict[int, float]:
        """Streams that must wait, because a round now would bring their token too early for their pace, and how long.

        A target comes before a pace: a round with all streams must still fit, also if they enter a deeper exit.
        """
        early_ms: dict[int, float] = {}
        paced = [view for view in views if view.stream.budget.max_pace_tps is not None and not view.first]
        if not paced:
            return early_ms
        all_ms = self._prices.round_ms(_entering(view) for view in views if not view.first)
        for view in paced:
            own_ms = self._prices.steady_ms([(view.goal, view.stream)]) * slowdown.factor
            pace_ms = 1000 / (view.stream.budget.max_pace_tps or math.inf) - own_ms
            left_ms = pace_ms - 1000 * (now_s - view.stream.asked_s)
            if view.bound_ms < math.inf:
                spare_ms = (view.bound_ms - all_ms) / scale_of(slowdown, view.stream.budget.probability)
                left_ms = min(left_ms, spare_ms)
            if left_ms > 0:
                early_ms[view.stream.key] = left_ms
        return early_ms

    def _busy(
        self, views: Sequence[View], ceilings: Budget, governor: Governor, slowdown: Slowdown, needed: float
    ) -> float:
        """Share of the time in which usual rounds run, with the pauses after them that the ceilings ask for."""
        usual = ((view.goal, view.stream) for view in views if not view.first)
        usual_ms = self._prices.steady_ms(usual) * slowdown.factor
        return usual_ms / max(usual_ms, paced_ms(ceilings, governor.share, usual_ms, needed)) if usual_ms else 1.0

    def _in_step(
        self, ready: list[View], waiting: list[View], early_ms: Mapping[int, float], slowdown: Slowdown, busy: float
    ) -> tuple[list[View], list[View]]:
        """Streams that step, and that wait, where a pause follows: who is due before it ends would be late.

        All step together then: as soon as its pace allows if the others can wait so long, or else at once.
        """
        all_ms = self._prices.round_ms(_entering(view) for view in (*ready, *waiting) if not view.first)
        hurried = [view for view in waiting if view.bound_ms - all_ms < all_ms / busy]
        if not hurried:
            return ready, waiting
        wait_ms = min(early_ms[view.stream.key] for view in hurried) / slowdown.factor
        due = any(view.first and view.bound_ms < math.inf for view in ready)  # its rows need the time
        if not due and all(view.bound_ms - all_ms >= wait_ms for view in ready):
            return [], [*ready, *waiting]
        return [*ready, *hurried], [view for view in waiting if view not in hurried]

    @staticmethod
    def _views(
        streams: Sequence[StreamSeen],
        facts: Sequence[_BudgetFacts],
        state: CompanyState,
        slowdown: Slowdown,
        now_s: float,
        ceiling: int,
        alone: bool = False,
    ) -> list[View]:
        views: list[View] = []
        scales: dict[float, float] = {}
        for stream, (budget, lowest, highest, *_) in zip(streams, facts, strict=True):
            if (scale := scales.get(budget.probability)) is None:
                scale = scales[budget.probability] = scale_of(slowdown, budget.probability)
            bounds = lowest, max(min(highest, ceiling), lowest)
            views.append(view_of(stream, state.streams.get(stream.key), bounds, scale, now_s, alone=alone))
        return views

    def _facts(self, budget: Budget) -> _BudgetFacts:
        """What follows from a budget alone."""
        known = self._facts_of.get(id(budget))
        if known is None:
            if len(self._facts_of) > 256:
                self._facts_of.clear()
            allowed = budget.allowed_exits(self._costs.exits)
            lowest, highest, senses = self._index[allowed[0]], self._index[allowed[-1]], budget.needs_sensors
            gap_only = not senses and budget.max_pace_tps is None and budget.deadline_s is None
            known = _BudgetFacts(budget, lowest, highest, senses, quantile_of(budget.probability), gap_only)
            self._facts_of[id(budget)] = known
        return known

    def _decision(self, view: View, index: int, outcome: _Outcome) -> Decision:
        price_ms, predicted_ms, streams, slower, deviation, governor, ceilings, usual, now_s = outcome
        budget, exits = view.stream.budget, self._costs.exits
        limit_ms = view.room_ms * math.exp(quantile_of(budget.probability) * deviation)
        probability = probability_of(limit_ms, price_ms * slower, deviation)
        if view.met and index >= view.goal and ceilings is None:  # most tokens, with as few calls as possible
            return Decision(exits[index], predicted_ms, price_ms, probability, False, None, 0.0, 0.0, usual)
        fits = exits[view.goal] if index < view.goal else None
        why = _Why(predicted_ms, streams, None if view.met else targets_of(budget, view.first), fits)
        made = exits[index], predicted_ms, price_ms, probability
        if ceilings is None:
            return Decision(*made, infeasible=not view.met, words=(why,))
        other_rail, one = left_out(budget, ceilings), view.stream
        needs_tps = needed_tps(budget, one.made_tokens, now_s - one.started_s)
        device = device_words(governor, budget, 0.0, needs_tps)
        return Decision(
            *made,
            infeasible=not view.met or bool(governor.out_of_reach(budget, needs_tps)),
            words=(why, *device, *([] if other_rail is None else [other_rail])),
            stops=governor.critical(budget),
            unseen=bool(other_rail or governor.unseen(budget)),
        )

    def _refusal(self, view: View, views: Sequence[View], slowdown: Slowdown, outcome: _Outcome) -> str | None:
        """Why a stream is refused, or None; a target that misses only a load of the past is none of the reasons."""
        judged = view if view.met or not self._only_feared(views, slowdown) else view._replace(met=True)
        return self._decision(judged, view.lowest, outcome).refusal(view.stream.budget)

    def _only_feared(self, views: Sequence[View], slowdown: Slowdown) -> bool:
        """Whether it is the load of earlier replies that the only stream cannot meet, and no step of its own was measured."""
        view = views[0]
        if len(views) > 1 or view.stream.made_tokens - view.stream.forced_tokens >= UNMEASURED:
            return False
        eased = math.exp(max(slowdown.mean, 0.0))
        eased_view = view._replace(period_ms=view.period_ms * eased, room_ms=view.room_ms * eased)
        return not self._goals.is_hopeless(eased_view)

    def _learn(self, state: CompanyState, last: Measurement | None) -> Slowdown:
        """The filter after the last round."""
        slowdown = state.slowdown.for_exits(len(self._costs.exits))
        if last is None or last.exit_layer not in self._index or (log_ratio := last.log_ratio) is None:
            return slowdown
        return slowdown.update(WITH_CATCH_UP if state.caught_up else self._index[last.exit_layer], log_ratio, 1.0)

    def _tick(self, state: CompanyState, ceilings: Budget | None, slowdown: Slowdown, seen: RoundSeen) -> Governor:
        """The slow loop, for the ceilings of all streams together."""
        governor = state.governor
        if ceilings is None:
            return governor  # what it has learned is for the next stream with ceilings
        if 0 <= seen.now_s - governor.ticked_s < TICK_S:
            return governor
        known = [self._facts(stream.budget) for stream in seen.streams]
        return govern(
            governor,
            Demand(
                budget=ceilings,
                now_s=seen.now_s,
                busy_s=seen.busy_s,
                readings=seen.readings,
                step_s=[
                    self._prices.steady_ms((index, stream) for stream in seen.streams) * slowdown.factor / 1000
                    for index in range(len(self._costs.exits))
                ],
                lowest=min(one.lowest for one in known),
                highest=max(one.highest for one in known),
                pace_tps=_needed_tps(state, seen),
                begins=any(stream.made_tokens == 0 for stream in seen.streams),
            ),
        )


def _has_rested(state: CompanyState, seen: RoundSeen) -> bool:
    """Whether streams have stepped by themselves only for a while: the last round then says little about the next."""
    return seen.learned is not None and seen.now_s - state.decided_s > LONGEST_ROUND_S


def _with_learned_alone(state: CompanyState, seen: RoundSeen) -> CompanyState:
    """The state with what streams have learned by themselves since the last round.

    Rounds are slower than their prices by other factors than single steps, so their slowdown gives way only after a while
    without rounds.
    """
    if (learned := seen.learned) is None:
        return state
    slowdown = state.slowdown.moved(learned.slowdown) if _has_rested(state, seen) else state.slowdown
    return state._replace(slowdown=slowdown, governor=learned.governor)


def _prompt_share(state: CompanyState, now_s: float) -> float:
    """Share of the time that prompts took, averaged over ``PROMPT_S``."""
    passed_s = max(now_s - state.decided_s, 0.0)
    weight = math.exp(-passed_s / PROMPT_S)
    return weight * state.prompt_share + (1 - weight) * (state.prompted and passed_s < LONGEST_ROUND_S)


def _runs_prompt(ready: Sequence[View], chosen: Chosen, chunk: Chunk | None) -> bool:
    """Whether a round runs rows of a prompt."""
    if chunk is not None and any(view.first for view in ready if view.stream.key == chunk.key):
        return True
    return any(view.first for view, _ in chosen)


def _entering(view: View) -> RoundEntry:
    """The stream's token at its goal, with the row that another exit's last token has left there; of a backlog no more."""
    seen = view.stream
    rows, balcony_rows = (tuple(min(due, 2) for due in rows) for rows in (seen.stage_rows, seen.balcony_rows))
    return RoundEntry(view.goal, rows, balcony_rows, seen.context_length, seen.shares)


def _needed_tps(state: CompanyState, seen: RoundSeen) -> float:
    """Tokens a second that the stream with the shortest target needs; 0 without any.

    A target that was given up takes neither depth nor time from the others.
    """
    given_up, now_s = {key for key, one in state.streams.items() if not one.met}, seen.now_s
    held = [one for one in seen.streams if one.key not in given_up]
    needs = (needed_tps(one.budget, one.made_tokens, now_s - one.started_s) for one in held or seen.streams)
    return max(needs, default=0.0)


def _wait_ms(outcome: _Outcome, state: CompanyState, seen: RoundSeen) -> float:
    """Time to wait after the round, for the pace that the ceilings leave."""
    if (ceilings := outcome.ceilings) is None:
        return 0.0
    period_ms = paced_ms(ceilings, outcome.governor.share, outcome.predicted_ms, _needed_tps(state, seen))
    return max(period_ms - outcome.predicted_ms, 0.0)


def _streams_after(before: Mapping[int, StreamState], views: Sequence[View], chosen: Chosen) -> dict[int, StreamState]:
    taken, streams = {view.stream.key: index for view, index in chosen}, dict(before)
    for view in views:
        at = taken.get(view.stream.key, view.at)
        stays = at == view.at or view.at is None
        tokens = view.tokens + (view.stream.key in taken) if stays else 1
        streams[view.stream.key] = StreamState(at, view.goal, tokens, view.met)
    return streams
