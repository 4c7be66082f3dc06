"""The joint controller: which streams get a token in the next round, at which exits, and which pending rows run next to it.

Pure, like :mod:`balcony_edge.control.controller`: ``decide(state, seen) -> (state, round)`` has no clock, sensor or engine.
One stream alone is decided by that controller; this one decides as soon as several ask.

**Targets.** A stream with ``tpot_ms`` is due that long after its last token, one with a deadline after its share of the time
left. A round must end before the first stream in it is due, and leave the streams that wait enough time for the round after it,
each with the probability that its budget asks for. The slowdown is that of the device: streams do not see one another as load.

**Assignment.** From time to time, and when streams or budgets change, every stream gets the deepest exit that the shortest
target leaves time for (:mod:`.assignment`). Streams that can wait for a whole round share the places that their rates need.
If no depth holds all targets, the newest of the streams with the least weight gives its target up (one that cannot be met at
all goes first). It then gets its tokens where the others leave time, or an error if its budget asks for one.

**Round.** All streams step together as long as the round is in time. Otherwise those that can wait are left out, and after that
depth is taken for one round. What is left of the time goes to the prompt of a new stream, and then to the pending rows of a
stream that was assigned a deeper exit. A stream without a target gets at least a token every ``ELASTIC`` rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from balcony_edge.budget import Budget
from balcony_edge.control.company.assignment import Claim, assign
from balcony_edge.control.company.ceilings import merged_ceilings
from balcony_edge.control.company.prices import Entry, chunk_rows, round_ms
from balcony_edge.control.company.seen import Chunk, CompanyState, Move, Round, RoundSeen, StreamSeen, StreamState
from balcony_edge.control.controller import KNOWN_VARIANCE, probability_of, quantile_of
from balcony_edge.control.decision import Decision, Measurement, device_words
from balcony_edge.control.governor import TICK_S, Demand, Governor, govern
from balcony_edge.control.slowdown import NOISE_FLOOR, Slowdown
from balcony_edge.device.costs import CostModel

#: Rounds after which the assignment is made again, because contexts have grown.
REASSIGN = 32
#: Change of the slowdown's logarithm after which it is made again.
DRIFT = 0.02
#: A stream without a target gets a token at least in every fourth round.
ELASTIC = 4
#: Share of a round that a prompt without ``ttft_ms`` gets.
PROMPT_SHARE = 0.3
#: Longest round in milliseconds when nobody has a target but somebody waits for a prompt of somebody else.
CALM_MS = 250.0
#: Rounds like this one for which a stream must be able to wait, to be left out for the sake of pending rows.
BEHIND_ROUNDS = 3.0
#: Rows beyond which the time for a chunk counts as plenty.
PLENTY = 64
#: Share of the time left that a deadline keeps for a load that has not begun, per deviation of its probability.
UNSEEN_LOAD = 0.06


class _View(NamedTuple):
    """A stream and what follows from its budget, in milliseconds at slowdown 1.

    Attributes:
        stream: the stream.
        lowest, highest: indices of the exits allowed.
        period_ms: longest gap between its tokens; infinite without a target.
        room_ms: time until it is due.
        waited_ms: time since it asked for its token.
        at: exit of its last token; None before the first.
        goal: exit that it is assigned.
        met: whether the assignment holds its targets.
        tokens: tokens since its exit changed.
    """

    stream: StreamSeen
    lowest: int
    highest: int
    period_ms: float
    room_ms: float
    waited_ms: float
    at: int | None
    goal: int
    met: bool
    tokens: int

    @property
    def first(self) -> bool:
        """Whether its prompt is still to be run."""
        return self.stream.made_tokens == 0

    @property
    def bound_ms(self) -> float:
        """Time until it is due, if anything can be promised."""
        return self.room_ms if self.met else math.inf

    def entry(self, index: int) -> Entry:
        seen = self.stream
        return Entry(index, seen.stage_rows, seen.balcony_rows, seen.context_length)

    def rising(self) -> bool:
        return self.at is not None and self.goal > self.at


class JointController:
    """Decides over one cost model. It holds no state: the scheduler carries the :class:`CompanyState`.

    Args:
        costs: prices of the device.
        quality: agreement of each exit with the full depth, ascending.
    """

    def __init__(self, costs: CostModel, quality: Sequence[float]) -> None:
        self._costs, self._quality = costs, tuple(quality)
        self._index = {exit_layer: index for index, exit_layer in enumerate(costs.exits)}
        self._bounds: dict[int, tuple[Budget, int, int]] = {}  # id of a budget → the budget and its exits

    def decide(self, state: CompanyState, seen: RoundSeen) -> tuple[CompanyState, Round]:
        """Choose the next round.

        Raises:
            BudgetError: a budget allows none of the exits.
        """
        slowdown = self._learn(state, seen.last)
        ceilings = merged_ceilings([stream.budget for stream in seen.streams])
        governor = self._tick(state.governor, ceilings, slowdown, seen)
        views = [self._view(stream, state, slowdown, seen.now_s, governor.ceiling) for stream in seen.streams]
        made_for, views = self._assigned(state, views, slowdown)
        paced = {view.stream.key: self._early_ms(view, seen.now_s) for view in views}
        ready = [view for view in views if paced[view.stream.key] <= 0]
        chosen, chunk, price_ms = self._compose(ready, views, slowdown)
        factor = math.exp(slowdown.mean + self._offset(slowdown, chosen, chunk is not None))
        found = Round(
            moves=tuple(
                Move(
                    view.stream.key,
                    self._decision(view, index, price_ms, factor, slowdown, len(chosen), governor, ceilings),
                )
                for view, index in chosen
            ),
            refused=self._refused(views, slowdown, governor, ceilings, price_ms * factor),
            chunk=chunk,
            price_ms=price_ms,
            predicted_ms=price_ms * factor,
            wait_ms=self._wait_ms(chosen, chunk, paced, price_ms * factor, governor),
            deepest=max((index for _, index in chosen), default=0),
        )
        return self._after(state, seen, views, chosen, chunk, slowdown, governor, made_for), found

    def _view(self, stream: StreamSeen, state: CompanyState, slowdown: Slowdown, now_s: float, ceiling: int) -> _View:
        budget, known = stream.budget, state.streams.get(stream.key)
        lowest, highest = self._allowed(budget)
        highest = max(min(highest, ceiling), lowest)
        scale = _scale(slowdown, budget.probability)
        period_ms = budget.tpot_ms or math.inf
        if budget.deadline_s is not None and stream.made_tokens < (budget.expected_tokens or 0):
            left_ms = 1000 * (budget.deadline_s - (now_s - stream.started_s))
            left_ms *= 1 - UNSEEN_LOAD * max(quantile_of(budget.probability), 0.0)
            period_ms = min(period_ms, max(left_ms, 0.0) / max((budget.expected_tokens or 0) - stream.made_tokens, 1))
        room_ms = period_ms - 1000 * (now_s - stream.emitted_s)
        if not stream.made_tokens:
            room_ms = math.inf if budget.ttft_ms is None else budget.ttft_ms - 1000 * (now_s - stream.started_s)
        index = None if known is None or known.at is None else min(known.at, highest)
        return _View(
            stream,
            lowest,
            highest,
            period_ms * scale,
            max(room_ms, 0.0) * scale,
            1000 * (now_s - stream.emitted_s) * scale,
            index,
            highest if known is None else max(min(known.goal, highest), lowest),
            known.met if known is not None else True,
            known.tokens if known is not None else 1 << 30,
        )

    def _allowed(self, budget: Budget) -> tuple[int, int]:
        known = self._bounds.get(id(budget))
        if known is None or known[0] is not budget:
            if len(self._bounds) > 256:
                self._bounds.clear()
            allowed = budget.allowed_exits(self._costs.exits)
            known = self._bounds[id(budget)] = budget, self._index[allowed[0]], self._index[allowed[-1]]
        return known[1], known[2]

    def _assigned(
        self, state: CompanyState, views: list[_View], slowdown: Slowdown
    ) -> tuple[tuple[object, ...], list[_View]]:
        """Give every stream its goal; a new assignment only if something has changed."""
        drift = round(math.log(_scale(slowdown, 0.9)) / DRIFT)
        who = tuple((view.stream.key, id(view.stream.budget), view.first, view.highest) for view in views)
        due = state.round // REASSIGN
        before = state.assigned_for
        if before[:1] == (who,) and before[2:] == (due,) and abs(before[1] - drift) <= 1:  # type: ignore[operator]
            return before, views
        met = dict.fromkeys((view.stream.key for view in views), True)
        while True:
            holding = [view for view in views if met[view.stream.key]]
            exits, free, fits = self._goals(views, met, slowdown)
            if fits or not holding:
                break
            met[self._gives_up(holding).stream.key] = False
        found = [
            view._replace(goal=self._goal(view, now, up, state), met=met[view.stream.key])
            for view, now, up in zip(views, exits, free, strict=True)
        ]
        return (who, drift, due), found

    def _goal(self, view: _View, now: int, up: int, state: CompanyState) -> int:
        """The goal after an assignment to exit ``now``, and to ``up`` with the hysteresis free."""
        if view.stream.key not in state.streams:
            return up
        if now < view.goal:
            return now
        may_rise = view.tokens >= view.stream.budget.dwell_tokens
        return max(up, view.goal) if may_rise else view.goal

    def _goals(
        self, views: list[_View], met: Mapping[int, bool], slowdown: Slowdown
    ) -> tuple[list[int], list[int], bool]:
        """Exits within the shortest target, the same with the hysteresis free, and whether they hold it."""
        limit_ms = min((view.period_ms for view in views if met[view.stream.key]), default=math.inf)
        if limit_ms == math.inf:
            return [view.highest for view in views], [view.highest for view in views], True
        claims, places = [], 0.0
        for view in views:
            period_ms = view.period_ms if met[view.stream.key] else math.inf
            tight = period_ms < 2 * limit_ms
            places += 0.0 if tight else max(limit_ms / period_ms, 1 / ELASTIC if period_ms == math.inf else 0.0)
            budget = view.stream.budget
            claims.append(Claim(view.lowest, view.highest, budget.weight, view.stream.context_length, tight))
        lax_rows = min(math.ceil(places - 1e-9), sum(not claim.tight for claim in claims))
        luck = 1.0
        if slowdown.variance > KNOWN_VARIANCE:  # a target is out of reach only if no luck could meet it
            luck = math.exp(max(math.sqrt(slowdown.variance + slowdown.noise_variance) - math.sqrt(NOISE_FLOOR), 0.0))
        prompt = self._prompt([view for view in views if view.first])
        tops = [0] if prompt is None else range(prompt.highest, prompt.lowest - 1, -1)
        exits, price_ms, spare_ms = [view.lowest for view in views], math.inf, limit_ms
        for top in tops:
            spare_ms = limit_ms - (0.0 if prompt is None else self._reserve_ms(prompt, top, limit_ms))
            if spare_ms <= 0:
                continue
            capped = [
                claim._replace(highest=min(claim.highest, top)) if view is prompt else claim
                for view, claim in zip(views, claims, strict=True)
            ]
            exits, price_ms = assign(self._costs, self._quality, capped, spare_ms, lax_rows)
            if price_ms <= spare_ms:
                break
        hysteresis = min((view.stream.budget.hysteresis for view in views), default=0.0)
        free, _ = assign(self._costs, self._quality, claims, max(spare_ms, 1e-9) * (1 - hysteresis), lax_rows)
        return exits, [min(a, b) for a, b in zip(exits, free, strict=True)], price_ms <= spare_ms * luck

    def _reserve_ms(self, prompt: _View, index: int, limit_ms: float) -> float:
        """Time of a round that the rows of a prompt need at an exit."""
        budget = prompt.stream.budget
        if budget.ttft_ms is None or not prompt.met:
            return PROMPT_SHARE * limit_ms
        rounds = max(prompt.room_ms // limit_ms, 1)
        rows = math.ceil(prompt.stream.stage_rows[0] / rounds)
        return sum(self._costs.stages[stage].pass_ms(rows, prompt.stream.context_length) for stage in range(index + 1))

    @staticmethod
    def _prompt(views: Sequence[_View]) -> _View | None:
        """The prompt to work on: the one that is due first, then the oldest."""
        if not views:
            return None
        return min(views, key=lambda view: (view.bound_ms, view.stream.started_s, view.stream.key))

    def _gives_up(self, holding: Sequence[_View]) -> _View:
        """The stream whose target is given up: one that could not be held alone, else the newest of the least weight."""

        def alone(view: _View) -> bool:
            ones = (1,) * len(self._costs.exits)
            return round_ms(self._costs, [Entry(view.lowest, ones, ones, view.stream.context_length)]) <= view.period_ms

        with_target = [view for view in holding if view.period_ms < math.inf] or list(holding)
        return min(with_target, key=lambda view: (alone(view), view.stream.budget.weight, -view.stream.key))

    def _compose(
        self, ready: list[_View], views: list[_View], slowdown: Slowdown
    ) -> tuple[list[tuple[_View, int]], Chunk | None, float]:
        """Streams of the round with their exits, the rows next to it, and the price."""
        waiting = [view for view in views if view not in ready]
        prompts = [view for view in ready if view.first]
        steps = [view for view in ready if not view.first]
        chosen = [(view, view.goal if view.at is None else min(view.goal, view.at)) for view in steps]
        price_ms = self._price(chosen)
        chosen, price_ms, left = self._leave_out(chosen, price_ms, any(view.rising() for view in steps))
        waiting += left
        limit_ms = min((view.bound_ms for view, _ in chosen), default=math.inf)
        # Who waits must still get its token in a round like this one.
        waits_ms = [view.bound_ms - price_ms for view in waiting if not view.first and view.bound_ms < math.inf]
        limit_ms = min([limit_ms, *waits_ms])
        if price_ms > limit_ms:
            chosen, price_ms = self._lowered(chosen, price_ms, limit_ms)
        calm_ms = CALM_MS / slowdown.factor
        slack_ms = min(limit_ms - price_ms, calm_ms if chosen else math.inf)
        prompt = self._prompt(prompts)
        if prompt is not None:
            chosen, chunk, price_ms = self._with_prompt(prompt, chosen, price_ms, slack_ms)
            if chunk is not None or not chosen or chosen[-1][0] is prompt:
                return chosen, chunk, price_ms
        return self._with_backlog(chosen, price_ms, slack_ms)

    def _leave_out(
        self, chosen: list[tuple[_View, int]], price_ms: float, behind: bool
    ) -> tuple[list[tuple[_View, int]], float, list[_View]]:
        """Leave out streams that can wait for the next round, while this one takes too long.

        If somebody is ``behind``, all of them are left out: their targets are kept anyway, and the time goes to pending rows.
        """
        left: list[_View] = []
        while len(chosen) > 1 and (behind or price_ms > min(view.bound_ms for view, _ in chosen)):
            laxest = max(chosen, key=lambda one: (self._patience_ms(one[0]), one[0].stream.key))
            if self._patience_ms(laxest[0]) < (BEHIND_ROUNDS if behind else 2) * price_ms:
                break
            chosen = [one for one in chosen if one is not laxest]
            left.append(laxest[0])
            price_ms = self._price(chosen)
        return chosen, price_ms, left

    def _patience_ms(self, view: _View) -> float:
        """Time until the stream must have its token; a stream without a target waits for some rounds at most."""
        if view.bound_ms < math.inf:
            return view.bound_ms
        ones = (1,) * len(self._costs.exits)
        round_of_one = round_ms(self._costs, [Entry(view.goal, ones, ones, view.stream.context_length)])
        return max(ELASTIC * round_of_one - view.waited_ms, 0.0)

    def _lowered(
        self, chosen: list[tuple[_View, int]], price_ms: float, limit_ms: float
    ) -> tuple[list[tuple[_View, int]], float]:
        """Take depth for this round, where the least agreement is lost."""
        if not chosen:
            return chosen, price_ms
        ones = (1,) * len(self._costs.exits)
        steady_ms = round_ms(
            self._costs, [Entry(index, ones, ones, view.stream.context_length) for view, index in chosen]
        )
        claims = [
            Claim(view.lowest, index, view.stream.budget.weight, view.stream.context_length, True)
            for view, index in chosen
        ]
        exits, _ = assign(self._costs, self._quality, claims, limit_ms - max(price_ms - steady_ms, 0.0), 0)
        lowered = [(view, index) for (view, _), index in zip(chosen, exits, strict=True)]
        lowered_ms = self._price(lowered)
        return (lowered, lowered_ms) if lowered_ms < price_ms else (chosen, price_ms)

    def _with_prompt(
        self, prompt: _View, chosen: list[tuple[_View, int]], price_ms: float, slack_ms: float
    ) -> tuple[list[tuple[_View, int]], Chunk | None, float]:
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
        extra_ms = sum(self._costs.stages[stage].pass_ms(rows, context) for stage in stages)
        return chosen, Chunk(prompt.stream.key, stages, rows), price_ms + extra_ms

    def _with_backlog(
        self, chosen: list[tuple[_View, int]], price_ms: float, slack_ms: float
    ) -> tuple[list[tuple[_View, int]], Chunk | None, float]:
        """Let a stream enter the deeper exit that it is assigned, or work off rows on the way to it."""
        rising = [(view, index) for view, index in chosen if view.rising() and index == view.at]
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
    def _rows_left(view: _View) -> int:
        return sum(view.stream.stage_rows[: view.goal + 1])

    def _backlog(self, view: _View, index: int, slack_ms: float) -> Chunk | None:
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

    def _chunk_ms(self, view: _View, chunk: Chunk) -> float:
        context = view.stream.context_length
        total_ms = sum(self._costs.stages[stage].pass_ms(chunk.rows, context) for stage in chunk.stages)
        if chunk.balcony is not None:
            total_ms += self._costs.balconies[chunk.balcony].pass_ms(chunk.rows, context, 1)
        return total_ms

    def _price(self, chosen: Sequence[tuple[_View, int]]) -> float:
        return round_ms(self._costs, [view.entry(index) for view, index in chosen])

    @staticmethod
    def _early_ms(view: _View, now_s: float) -> float:
        """Time before which the budget wants no token."""
        fastest = view.stream.budget.max_pace_tps
        if fastest is None or view.first:
            return 0.0
        return 1000 / fastest - 1000 * (now_s - view.stream.emitted_s)

    def _wait_ms(
        self,
        chosen: Sequence[tuple[_View, int]],
        chunk: Chunk | None,
        paced: Mapping[int, float],
        predicted_ms: float,
        governor: Governor,
    ) -> float:
        if not chosen and chunk is None:
            return max(min(paced.values(), default=0.0), 0.0)
        return predicted_ms * (1 / governor.share - 1) if governor.share < 1 else 0.0

    def _decision(
        self,
        view: _View,
        index: int,
        price_ms: float,
        factor: float,
        slowdown: Slowdown,
        streams: int,
        governor: Governor,
        ceilings: Budget,
    ) -> Decision:
        budget = view.stream.budget
        deviation = math.sqrt(slowdown.variance + slowdown.noise_variance)
        limit_ms = view.room_ms * math.exp(quantile_of(budget.probability) * deviation)
        names, exits = f"{streams} streams" if streams > 1 else "1 stream", self._costs.exits
        why = f"a round of {names} takes {price_ms * factor:.1f} ms"
        if not view.met:
            why = f"infeasible in this company: {_targets(budget)}; {why}"
        elif index < view.goal:
            why += f"; {exits[view.goal]} fits, with a backlog"
        governed = ceilings.needs_sensors
        return Decision(
            exit_layer=exits[index],
            predicted_ms=price_ms * factor,
            price_ms=price_ms,
            probability=probability_of(limit_ms, price_ms, deviation),
            infeasible=not view.met or (governed and bool(governor.infeasible)),
            words=(why, *(device_words(governor, ceilings, 0.0) if governed else ())),
            stops=governed and governor.critical(ceilings),
            unseen=governed and bool(governor.unseen(ceilings)),
        )

    def _refused(
        self, views: Sequence[_View], slowdown: Slowdown, governor: Governor, ceilings: Budget, predicted_ms: float
    ) -> tuple[tuple[int, Decision], ...]:
        """Streams that end here: their targets are out of reach and they ask for an error, or the device is too hot."""
        found = []
        for view in views:
            decision = self._decision(
                view,
                view.lowest,
                predicted_ms / slowdown.factor,
                slowdown.factor,
                slowdown,
                len(views),
                governor,
                ceilings,
            )
            if decision.ends(view.stream.budget):
                found.append((view.stream.key, decision))
        return tuple(found)

    def _offset(self, slowdown: Slowdown, chosen: Sequence[tuple[_View, int]], chunk: bool) -> float:
        return slowdown.offsets[-1 if chunk or not chosen else max(index for _, index in chosen)]

    def _learn(self, state: CompanyState, last: Measurement | None) -> Slowdown:
        slowdown = state.slowdown.for_exits(len(self._costs.exits))
        if last is None or last.exit_layer not in self._index:
            return slowdown
        if not (0 < last.measured_ms < math.inf and 0 < last.predicted_ms < math.inf):
            return slowdown
        log_ratio = math.log(last.measured_ms) - math.log(last.predicted_ms)
        return slowdown.update(-1 if state.caught_up else self._index[last.exit_layer], log_ratio, 1.0)

    def _tick(self, governor: Governor, ceilings: Budget, slowdown: Slowdown, seen: RoundSeen) -> Governor:
        if not ceilings.needs_sensors:
            return Governor()
        if 0 <= seen.now_s - governor.ticked_s < TICK_S:
            return governor
        ones, costs = (1,) * len(self._costs.exits), self._costs
        contexts = [stream.context_length for stream in seen.streams]
        step_s = [
            round_ms(costs, [Entry(index, ones, ones, context) for context in contexts]) * slowdown.factor / 1000
            for index in range(len(costs.exits))
        ]
        needed = [1000 / stream.budget.tpot_ms for stream in seen.streams if stream.budget.tpot_ms is not None]
        begins = any(stream.made_tokens == 0 for stream in seen.streams)
        return govern(
            governor,
            Demand(
                budget=ceilings,
                now_s=seen.now_s,
                busy_s=seen.busy_s,
                readings=seen.readings,
                step_s=step_s,
                lowest=min(self._allowed(stream.budget)[0] for stream in seen.streams),
                highest=max(self._allowed(stream.budget)[1] for stream in seen.streams),
                pace_tps=max(needed, default=0.0),
                begins=begins,
            ),
        )

    def _after(
        self,
        state: CompanyState,
        seen: RoundSeen,
        views: Sequence[_View],
        chosen: Sequence[tuple[_View, int]],
        chunk: Chunk | None,
        slowdown: Slowdown,
        governor: Governor,
        made_for: tuple[object, ...],
    ) -> CompanyState:
        taken = {view.stream.key: index for view, index in chosen}
        streams = dict(state.streams)
        for view in views:
            index = taken.get(view.stream.key, view.at)
            stays = index == view.at or view.at is None
            tokens = view.tokens + (view.stream.key in taken) if stays else 1
            streams[view.stream.key] = StreamState(index, view.goal, tokens, view.met)
        return CompanyState(slowdown, governor, streams, made_for, chunk is not None, state.round + 1)


def _scale(slowdown: Slowdown, probability: float) -> float:
    """Factor from milliseconds to milliseconds at slowdown 1 that hold with a probability."""
    deviation = math.sqrt(slowdown.variance + slowdown.noise_variance)
    return math.exp(-slowdown.mean - quantile_of(probability) * deviation)


def _targets(budget: Budget) -> str:
    keys = [key for key in ("tpot_ms", "ttft_ms", "deadline_s") if getattr(budget, key) is not None]
    return " and ".join(f"{key} = {getattr(budget, key):g}" for key in keys) or "its ceilings"
