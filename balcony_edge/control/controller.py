"""The controller: chooses the exit of the next token, its wait, and the pending rows to work off next to it.

Pure: ``decide(state, observation) -> (state, decision)`` has no clock, sensor or engine in it, so that a recorded run
replays exactly. This module owns the rules of switching. :mod:`.slowdown` estimates how slow the device is, and the slow
loop in :mod:`.governor` says how much the ceilings on watts, degrees and utilization allow. This module does not know
where the costs come from, how times are measured, or how rows are run.

The choice. The room at an exit is the largest price, at slowdown 1, that holds every latency target with the asked
probability. An exit *fits* when its next step, pending rows included, costs no more than the room. The rules, in order:

    up     after the dwell: the deepest exit that fits and whose steady price leaves the hysteresis free
    stay   while the present exit fits
    down   at once: the deepest shallower exit that fits
    else   the shallowest allowed exit (``best_effort``: the one whose gap comes closest, backlog included);
           ``infeasible`` if no allowed exit's steady price is within its room even at the noise of a calm device

An exit that would hold the target without its backlog gets chunks of catch-up next to the steps at a shallower exit
(:mod:`.catching_up`). The step that enters this exit may be late if the asked probability has left a late token over
(``Recovery.credit``). A target that was raised by more than the hysteresis since the last decision does not wait
for the dwell. The hysteresis shrinks with the uncertainty of the slowdown.

The first token. ``ttft_ms`` limits the price of the prompt's rows at an exit; ``tpot_ms`` limits the steps after them.

No target for the gap. A step still costs at most ``SPIKE`` steady steps of the deepest exit, or as much as
``min_pace_tps`` allows. So the backlog is also worked off in chunks when a ceiling is lifted.

Deadline. It is held by mixing an exit and the next shallower one over the remaining tokens, deep tokens first, because
that order needs no catch-up. The reserve lies in the exits further down, and in a margin for the case that the rest takes
longer than expected. Exit i fits when, after its step, the rest would be done in time one exit shallower.

For one state and observation, a looser target with all other keys the same never gives a shallower exit, unless the
controller catches up from there to a deeper one: every set above only grows with the target. Without a target the deepest
allowed exit is taken at once, with all its pending rows.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist
from typing import Literal, NamedTuple

from balcony_edge.budget import Budget
from balcony_edge.control.catching_up import Recovery, Way, paused_rooms, way_back
from balcony_edge.control.deadline import deadline_rooms
from balcony_edge.control.decision import (
    Because,
    Decision,
    Measurement,
    Observation,
    Outlook,
    Stayed,
    device_words,
    expected_words,
)
from balcony_edge.control.governor import (
    CEILING_DWELL_S,
    EVEN_MARGIN,
    PACE_MARGIN,
    TICK_S,
    Demand,
    Governor,
    govern,
    paced_ms,
)
from balcony_edge.control.slowdown import WITH_CATCH_UP, Slowdown
from balcony_edge.control.step_prices import StepPrices
from balcony_edge.device.costs import CostModel

#: Noise factor of the first step at a new exit. It runs the backlog, whose price per row is the least certain, so its
#: measurement weighs a quarter.
SWITCH_NOISE = 4.0
#: Largest cost of a step if no gap is asked for, in full steps of the deepest allowed exit. More rows go in chunks.
SPIKE = 2.0
#: Deviation of the slowdown from which the whole hysteresis is kept free, and the smallest share of it that is kept.
#: A settled filter is at 0.012 (noise of 2 %). With a target of 1.10 times the full depth's own time, the full depth would
#: otherwise never leave 5 % free (docs/LOG.md, "The way back in int4").
UNSURE, LEAST_HYSTERESIS = 0.02, 0.4
#: Tokens of a reply, without forced ones, until two of its steps were measured: the time of the prompt says nothing, and one
#: step may be an outlier.
UNMEASURED = 3


#: Tokens since the last switch if there was none; more than any dwell in use.
NEVER = 10**9
#: State of catching up that no token in time changes: all credit, and neither a sprint nor a wait for one.
_RECOVERED = Recovery()


class ControllerState(NamedTuple):
    """State that one decision passes to the next.

    Attributes:
        exit_layer: exit layer of the last token; None before the first.
        tokens_since_switch: tokens since the exit changed, and ``NEVER`` more if it never has; counted while there is a target.
        catching_up: whether the last step had a catch-up next to it.
        tpot_ms: target of the last decision; infinite without one.
        slowdown: slowdown filter.
        governor: state of the slow loop.
        switched_s: time of the last change of exit.
        recovery: state of catching up.
    """

    exit_layer: int | None
    tokens_since_switch: int
    catching_up: bool
    tpot_ms: float
    slowdown: Slowdown
    governor: Governor = Governor()
    switched_s: float = -math.inf
    recovery: Recovery = Recovery()

    @property
    def tokens_at_exit(self) -> int:
        """Tokens in a row at the exit of the last token."""
        return self.tokens_since_switch % NEVER

    @classmethod
    def initial(cls) -> ControllerState:
        """State before the first token: no exit is chosen, and the device profile counts as correct."""
        return cls(None, tokens_since_switch=NEVER, catching_up=False, tpot_ms=math.inf, slowdown=Slowdown())

    def for_next_reply(self) -> ControllerState:
        """State at the start of the next reply: no exit is chosen, but what was learned about the device is kept."""
        fresh = ControllerState.initial()
        recovery = self.recovery._replace(goal=None)
        governor = self.governor._replace(infeasible=())  # the next tick says it again, if it is so for the next budget
        return fresh._replace(slowdown=self.slowdown.rested(), governor=governor, recovery=recovery)


class _Plan(NamedTuple):
    """Values that follow from a budget alone.

    Attributes:
        budget: budget of these values.
        lowest, highest: indices of the shallowest and deepest exit that the budget allows.
        quantile: deviations above the mean that hold the asked probability.
        tpot_ms: target for the gap; infinite without one.
        log_tpot: logarithm of ``tpot_ms``.
        governed: whether there are ceilings that need sensors.
        gap_only: whether ``tpot_ms`` is the only target.
        stayed: reason for staying at the deepest exit, in words.
        fixed: decision for a budget without targets (the same object on every call), or None if there are targets.
    """

    budget: Budget
    lowest: int
    highest: int
    quantile: float
    tpot_ms: float
    log_tpot: float
    governed: bool
    gap_only: bool
    stayed: tuple[object, ...]
    fixed: Decision | None


class _Scene(NamedTuple):
    """Input of one decision: prices per exit index, and the deepest index that the slow loop allows (``highest``)."""

    plan: _Plan
    state: ControllerState
    seen: Observation
    slowdown: Slowdown
    now_ms: list[float]
    steady_ms: list[float]
    highest: int


class Controller:
    """Decides over one cost model. It holds no state: every sequence carries its own :class:`ControllerState`."""

    def __init__(self, costs: CostModel) -> None:
        self._costs, self._prices = costs, StepPrices(costs)
        self._index = {exit_layer: index for index, exit_layer in enumerate(costs.exits)}
        self._last_plan = self._planned(Budget())

    def decide(self, state: ControllerState, observation: Observation) -> tuple[ControllerState, Decision]:
        """Choose the exit of the next token.

        Raises:
            BudgetError: the budget allows none of the exits (``Budget.for_bundle`` checks this earlier).
        """
        seen, plan = observation, self._plan(observation.budget)
        current = None if state.exit_layer is None else self._index.get(state.exit_layer)
        up_to_date = current is not None and seen.stage_rows[current] == seen.balcony_rows[current] == 1
        if plan.fixed is not None or (up_to_date and seen.made_tokens):
            found = self.shortcut(seen.budget, state, seen.context_length, seen.last)
            if found is not None:
                return found
        return self._weighed(plan, state, seen, current)

    def shortcut(
        self, budget: Budget, state: ControllerState, context_length: int, last: Measurement | None
    ) -> tuple[ControllerState, Decision] | None:
        """Return what :meth:`decide` would return if there is nothing to weigh, or None if there is.

        There is nothing to weigh in two cases: the budget has no target, or ``tpot_ms`` is its only target, the exit of the
        previous token still fits, and no deeper one may be entered. The caller must check that this exit has no backlog.
        """
        plan = self._plan(budget)
        if plan.fixed is None:
            return self._stayed(plan, state, context_length, last)
        if state[:4] == (plan.fixed.exit_layer, 1, False, math.inf) and state.recovery.goal is None:
            return state, plan.fixed  # the state did not change since the previous token
        after = state._replace(
            exit_layer=plan.fixed.exit_layer,
            tokens_since_switch=1,
            catching_up=False,
            tpot_ms=math.inf,
            recovery=state.recovery.towards(None),
        )
        return after, plan.fixed

    def _stayed(
        self, plan: _Plan, state: ControllerState, context_length: int, last: Measurement | None
    ) -> tuple[ControllerState, Decision] | None:
        """The second case of :meth:`shortcut`."""
        # All fields at once, and records without keywords: with cold caches each name costs a microsecond (docs/LOG.md,
        # "Python's share of a step, once more").
        budget, lowest, highest, quantile, tpot_ms, log_tpot, _, gap_only, why, _ = plan
        exit_layer, tokens, _, last_tpot_ms, _, governor, switched_s, recovery = state
        if exit_layer is None or not gap_only:
            return None
        chosen = self._index.get(exit_layer)
        if chosen is None or not lowest <= chosen <= highest or (chosen < highest and recovery.goal is not None):
            return None
        slowdown, words = self._learn(state, last)
        mean, variance, _, noise_variance, offsets, *_ = slowdown
        prices_ms, deviation = self._prices.steady_ms(context_length), math.sqrt(variance + noise_variance)
        price_ms, log_room = prices_ms[chosen], log_tpot - mean - quantile * deviation
        if price_ms > math.exp(log_room - offsets[chosen]):
            return None
        if chosen < highest:  # no deeper exit may be entered: there is neither a way up nor anything to catch up for
            free, beyond = free_share(budget, variance), None
            for index in range(chosen + 1, highest + 1):
                room_ms = math.exp(log_room - offsets[index])
                if prices_ms[index] <= room_ms * free:
                    return None
                if prices_ms[index] <= room_ms:
                    beyond = self._costs.exits[index]
            if beyond is not None:
                why = (Stayed(budget, beyond),)
        predicted_ms = price_ms * math.exp(mean + offsets[chosen])
        if recovery != _RECOVERED or (last is not None and last.measured_ms > last_tpot_ms):
            held = state.tokens_at_exit if chosen == highest else 0
            recovery = recovery.counted(last, last_tpot_ms, budget.probability, held).towards(None)
        probability = probability_of(tpot_ms, predicted_ms, deviation)
        return (
            ControllerState(exit_layer, tokens + 1, False, tpot_ms, slowdown, governor, switched_s, recovery),
            Decision(exit_layer, predicted_ms, price_ms, probability, False, None, 0.0, 0.0, why + words),
        )

    def _plan(self, budget: Budget) -> _Plan:
        if self._last_plan.budget is not budget:
            self._last_plan = self._planned(budget)
        return self._last_plan

    def _planned(self, budget: Budget) -> _Plan:
        exits = self._costs.exits
        allowed = budget.allowed_exits(exits)
        lowest, highest = self._index[allowed[0]], self._index[allowed[-1]]
        fixed = None
        if not budget.has_target:
            why = "fixed exit" if budget.exit_layer is not None else "deepest allowed exit, no target"
            fixed = Decision(exit_layer=exits[highest], words=(why,))
        tpot_ms, governed = budget.tpot_ms or math.inf, budget.needs_sensors
        others = governed or budget.max_pace_tps is not None or budget.deadline_s is not None
        return _Plan(
            budget=budget,
            lowest=lowest,
            highest=highest,
            quantile=quantile_of(budget.probability),
            tpot_ms=tpot_ms,
            log_tpot=math.log(tpot_ms),
            governed=governed,
            gap_only=budget.tpot_ms is not None and not others,
            stayed=(Stayed(budget),),
            fixed=fixed,
        )

    def _weighed(
        self, plan: _Plan, state: ControllerState, seen: Observation, current: int | None
    ) -> tuple[ControllerState, Decision]:
        budget, exits = plan.budget, self._costs.exits
        slowdown, remarks = self._learn(state, seen.last)
        steady_ms = self._prices.steady_ms(seen.context_length)
        now_ms = self._prices.now_ms(seen.context_length, seen.stage_rows, seen.balcony_rows)
        governor, highest = state.governor, plan.highest
        if plan.governed:
            if seen.now_s - governor.ticked_s >= TICK_S or seen.now_s < governor.ticked_s:
                governor = self._tick(plan, governor, slowdown, steady_ms, seen)
            highest, state = max(min(highest, governor.ceiling), plan.lowest), state._replace(governor=governor)
        scene = _Scene(plan, state, seen, slowdown, now_ms, steady_ms, highest)
        outlook, deviation = self._outlook(scene), slowdown.deviation
        held = current if current is not None and plan.lowest <= current <= highest else None
        chosen = outlook.choose(held, _otherwise(seen))
        infeasible = not outlook.fits(chosen) and not self._within_reach(scene, outlook)
        at_the_deepest = state.tokens_at_exit if current == plan.highest else 0
        recovery = state.recovery.counted(seen.last, state.tpot_ms, budget.probability, at_the_deepest)
        way = None
        if chosen < highest and seen.made_tokens:
            credit = plan.tpot_ms < math.inf and recovery.credit >= 1
            present = None if recovery.goal is None else current
            way = way_back(self._costs, outlook, seen, chosen, present, credit, may_sprint=not recovery.wait)
        chosen, goal, sprint, catch_up, chunk_ms = way or Way(chosen, chosen)
        offset_index = chosen if catch_up is None else WITH_CATCH_UP
        price_ms = now_ms[chosen] + chunk_ms
        factor = math.exp(slowdown.mean + slowdown.offsets[offset_index])
        timed = plan.tpot_ms < math.inf or seen.deadline_runs or (budget.ttft_ms is not None and not seen.made_tokens)
        limit_ms = outlook.room_ms[offset_index] * math.exp(plan.quantile * deviation) if timed else math.inf
        if way is not None:
            why: object = way.words(exits)
        elif infeasible:
            which = "shallowest" if chosen == plan.lowest else "closest"
            later_ms = self._later_ms(seen)[chosen] * factor
            expected = expected_words(seen, now_ms[chosen] * factor, steady_ms[chosen] * factor, later_ms)
            why = f"infeasible: {expected} at the {which} exit"
        else:
            why = Because(outlook, exits, chosen, current, seen)
        period_ms, idle_ms = self._pace(plan, governor, seen, price_ms * factor)
        needs_tps = seen.needed_tps if plan.governed else 0.0
        device = device_words(governor, budget, period_ms, needs_tps) if plan.governed else ()
        stays = chosen == current or current is None  # the first choice is not a switch and starts no dwell
        after = ControllerState(
            exit_layer=exits[chosen],
            tokens_since_switch=state.tokens_since_switch + 1 if stays else 1,
            catching_up=catch_up is not None,
            tpot_ms=plan.tpot_ms,
            slowdown=slowdown,
            governor=governor,
            switched_s=state.switched_s if stays else seen.now_s,
            recovery=recovery.towards(exits[goal] if sprint else None),
        )
        return after, Decision(
            exit_layer=exits[chosen],
            predicted_ms=price_ms * factor,
            price_ms=price_ms,
            probability=probability_of(limit_ms, price_ms, deviation),
            infeasible=infeasible or (plan.governed and bool(governor.out_of_reach(budget, needs_tps))),
            catch_up=catch_up,
            period_ms=period_ms,
            idle_ms=idle_ms,
            words=(why, *remarks, *device),
            stops=plan.governed and governor.critical(budget),
            unseen=plan.governed and bool(governor.unseen(budget)),
        )

    def _within_reach(self, scene: _Scene, outlook: Outlook) -> bool:
        """Whether some exit would hold the targets without its backlog, with luck: with no more noise than any device has.

        The estimate of the noise begins at 10 %, and every pause leaves doubt about the slowdown: neither may end a reply
        whose tokens are all in time. A deadline is out of reach only if the mean time is: chance may still help the tokens to
        come.
        """
        slowdown = scene.slowdown
        if scene.seen.made_tokens - scene.seen.forced_tokens < UNMEASURED and slowdown.mean > 0:
            # The load of earlier replies may have ended, and replies that are refused at once would never see that.
            unloaded = slowdown._replace(mean=0.0, ratio_mean=min(slowdown.ratio_mean, 1.0))
            scene = scene._replace(slowdown=unloaded)
            outlook = self._outlook(scene)
        luck = scene.slowdown.luck(scene.plan.quantile)
        if scene.seen.deadline_runs:  # neither bad luck nor a load that has not begun nor a pace makes it infeasible
            outlook = self._outlook(scene, luck)
        return any(outlook.holds(index, luck) for index in range(scene.plan.lowest, outlook.highest + 1))

    def _outlook(self, scene: _Scene, luck: float | None = None) -> Outlook:
        """Compute the room at every exit; ``luck`` is for that of a deadline."""
        plan, state, seen, slowdown, now_ms, steady_ms, highest = scene
        deviation = slowdown.deviation
        budget, first = plan.budget, seen.made_tokens == 0
        free = free_share(budget, slowdown.variance)
        may_rise = state.tokens_since_switch >= budget.dwell_tokens
        if plan.governed and budget.tpot_ms is None:  # depth that the slow loop allows must not change twice a second
            may_rise = may_rise and seen.now_s - state.switched_s >= CEILING_DWELL_S
        if budget.tpot_ms is None:
            # Even without a target for the gap, no single token should pay for the whole backlog.
            spike_ms, pace = SPIKE * steady_ms[highest], budget.min_pace_tps
            log_pace = math.log(1000 / pace) - slowdown.mean - plan.quantile * deviation if pace else -math.inf
            room_ms = [math.inf if first else max(spike_ms, math.exp(log_pace - one)) for one in slowdown.offsets]
            may_enter = [True] * len(now_ms)
        else:
            log_room = plan.log_tpot - slowdown.mean - plan.quantile * deviation
            room_ms = [math.exp(log_room - offset) for offset in slowdown.offsets]
            may_enter = [price <= room_ms[index] * free for index, price in enumerate(steady_ms)]
            may_rise = may_rise or budget.tpot_ms * (1 - budget.hysteresis) > state.tpot_ms
            if first:  # every exit has to run the prompt's rows, so only the steps after it count
                room_ms = [
                    math.inf if price <= room else room for price, room in zip([*steady_ms, 0.0], room_ms, strict=True)
                ]
        limits_ms: list[float] | None = [math.inf] * len(room_ms) if first else None  # limits of the token itself
        if first and budget.ttft_ms is not None:
            left_ms = max(budget.ttft_ms - (seen.now_s - seen.started_s) * 1000, 0.0)
            left_ms *= math.exp(-slowdown.mean - plan.quantile * deviation)
            limits_ms = [left_ms * math.exp(-offset) for offset in slowdown.offsets]
        if seen.deadline_runs:
            rooms_ms, spare_ms = deadline_rooms(seen, slowdown, self._later_ms(seen), plan.lowest, plan.quantile, luck)
            limits_ms = rooms_ms if limits_ms is None else list(map(min, limits_ms, rooms_ms))
            pairs = zip(may_enter, spare_ms, now_ms, steady_ms, strict=True)
            may_enter = [both and now - steady <= spare for both, spare, now, steady in pairs]
        if budget.energy_j_per_token is not None:  # rows next to a step: no more joules than a token may take
            most_ms = max(state.governor.affordable_ms(budget) / slowdown.factor, steady_ms[highest])
            room_ms[WITH_CATCH_UP] = min(room_ms[WITH_CATCH_UP], most_ms)
        if limits_ms is not None:
            room_ms = list(map(min, room_ms, limits_ms))
        if plan.governed and not first:  # no pause follows the first token
            room_ms = paused_rooms(seen, slowdown, steady_ms, room_ms, state.governor.share)
        first_ms = limits_ms if first else None
        return Outlook(now_ms, steady_ms, room_ms, may_enter, plan.lowest, highest, may_rise, first_ms)

    def _later_ms(self, seen: Observation) -> list[float]:
        """Prices of a step at each exit in the middle of the rest that a deadline needs."""
        return self._prices.exact_ms(seen.context_length + seen.remaining // 2)

    def _tick(
        self, plan: _Plan, governor: Governor, slowdown: Slowdown, steady_ms: list[float], seen: Observation
    ) -> Governor:
        step_s = [
            price * math.exp(slowdown.mean + offset) / 1000
            for price, offset in zip(steady_ms, slowdown.offsets, strict=False)
        ]
        return govern(
            governor,
            Demand(
                plan.budget,
                seen.now_s,
                seen.busy_s,
                seen.readings,
                step_s,
                plan.lowest,
                plan.highest,
                seen.needed_tps,
                seen.made_tokens == 0,
            ),
        )

    def _pace(self, plan: _Plan, governor: Governor, seen: Observation, predicted_ms: float) -> tuple[float, float]:
        """Return the smallest gap to the previous token, and the part of its wait that may be used for the backlog."""
        budget = plan.budget
        if not budget.pacing or seen.made_tokens == 0:
            return 0.0, 0.0
        share = governor.share if plan.governed else 1.0
        period_ms = paced_ms(budget, share, predicted_ms, seen.needed_tps) if share < 1 else 0.0
        if budget.max_pace_tps is not None:
            slow_ms = min(1000 / budget.max_pace_tps, (1 - EVEN_MARGIN) * (budget.tpot_ms or math.inf))
            if seen.deadline_runs:  # a deadline is more important than a pace
                slow_ms = min(slow_ms, (1 - PACE_MARGIN) * 1000 * max(seen.left_s, 0.0) / seen.remaining)
            period_ms = max(period_ms, slow_ms)
        # Rows in a wait take joules. The slow loop has allowed a depth for those of the step and of an idle wait.
        idle_ms = 0.0 if not period_ms or governor.saves(budget) else max(share * period_ms - predicted_ms, 0.0)
        return period_ms, idle_ms

    def _learn(self, state: ControllerState, last: Measurement | None) -> tuple[Slowdown, tuple[object, ...]]:
        """Return the filter after the last step, and a remark for the reason if its measurement cannot be used."""
        _, tokens, caught_up, _, slowdown, *_ = state
        if len(slowdown.offsets) != len(self._index) + 1:
            slowdown = slowdown.for_exits(len(self._index))
        if last is None:
            return slowdown, ()
        exit_layer, predicted_ms, measured_ms = last
        index = self._index.get(exit_layer)
        if index is None or not (0 < measured_ms < math.inf and 0 < predicted_ms < math.inf):
            return slowdown, (f"measurement of {measured_ms:g} ms at exit {exit_layer} ignored",)
        log_ratio = math.log(measured_ms) - math.log(predicted_ms)
        return slowdown.update(
            WITH_CATCH_UP if caught_up else index, log_ratio, SWITCH_NOISE if tokens == 1 else 1.0
        ), ()


@lru_cache(maxsize=64)
def quantile_of(probability: float) -> float:
    """Deviations above the mean that hold a probability."""
    return NormalDist().inv_cdf(probability)


def probability_of(limit_ms: float, price_ms: float, deviation: float) -> float:
    """P(price × slowdown <= limit); the limit is also a price."""
    if price_ms <= 0 or limit_ms == math.inf:
        return 1.0
    if limit_ms <= 0:
        return 0.0
    return 0.5 * math.erfc((math.log(price_ms) - math.log(limit_ms)) / deviation / math.sqrt(2))


def free_share(budget: Budget, variance: float) -> float:
    """Share of its room that an exit may take to be entered; ``variance`` is that of the slowdown."""
    return 1 - budget.hysteresis * min(max(math.sqrt(variance) / UNSURE, LEAST_HYSTERESIS), 1.0)


def _otherwise(seen: Observation) -> Literal["shallowest", "closest", "deepest"]:
    """Which exit is taken if none fits."""
    if seen.deadline_runs or seen.made_tokens == 0:
        return "shallowest"  # the rest, or the prompt, takes the least time there
    if seen.budget.tpot_ms is None:
        return "deepest"  # a ceiling has reduced the depth, and every balcony has the same backlog
    return "closest" if seen.budget.on_infeasible == "best_effort" else "shallowest"
