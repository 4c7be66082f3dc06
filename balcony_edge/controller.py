"""The controller: which exit the next token takes, and what backlog is worked off beside it.

Pure: ``decide(state, observation) -> (state, decision)`` has no clock, sensor or engine in it, so that a recorded run
replays exactly. This module owns the estimate of how slow the device is and the rules of switching. It does not know
where the costs come from, who measures, or how rows are run.

The estimate. measured / predicted of a step is the slowdown, filtered as in ALERT (Wan et al., USENIX ATC'20): a
Kalman filter whose process noise follows its own corrections. Differences from it: the filter runs on the logarithm (a
slowdown is a factor: its noise is the same share at every load, and it is never negative); one surprising sample is
taken for an outlier and two in a row on the same side for a change of load; the measurement noise is estimated too; and
every exit, and catching up, has a learned offset, so that a profile that flatters one does not make it come and go.

The choice. The room at an exit is the price, at slowdown 1, that holds the target with the asked probability. An exit
*fits* when its next step, pending rows included, costs no more than the room. Then, in this order:

    up     after the dwell: the deepest exit that fits and whose steady price leaves the hysteresis free
    stay   while the present exit fits
    down   at once: the deepest shallower exit that fits
    else   the shallowest allowed exit; ``infeasible`` if no allowed exit's steady price is within its room either

An exit that would hold the target but for its backlog gets chunks of catch-up beside the steps at a shallower exit, as
large as the room left. A target that was raised by more than the hysteresis since the last decision does not wait for
the dwell. For one state and observation, a looser ``tpot_ms`` with all other keys the same never gives a shallower
exit: every set above only grows with the target. Without a target the deepest allowed exit is taken at once, with
whatever it has pending.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

from balcony_edge.budget import Budget
from balcony_edge.profile import CostModel

#: Weight of the past in the process noise, as in ALERT.
ADAPTATION = 0.3
#: Variance that the slowdown gains per token at rest: 1 % a token lets a slow ramp through.
PROCESS_VARIANCE = 0.01**2
#: Share of a new sample in the noise estimate: about 20 tokens, short against a reply and long against a burst.
NOISE_RATE = 0.05
#: Least noise: timer and scheduler jitter of a decode step, 2 %; keeps a silent stretch from trusting itself blindly.
NOISE_FLOOR = 0.02**2
#: A sample further than this many deviations from the prediction is surprising (1.2 % of normal samples).
SURPRISE = 2.5
#: What a profile may get wrong between two exits: additive costs miss cache effects (DESIGN 9), 8 % at first sight.
EXIT_VARIANCE = 0.08**2
#: The same between steps with and without catch-up: the marginal row is what varies most (DESIGN 3: 4 % to 18 %).
CATCH_UP_VARIANCE = 0.25**2
#: Share of its offset that an unused exit forgets per token: after some 250 tokens it is tried again.
OFFSET_DECAY = 1 / 256
#: The first step at a new exit runs its backlog, whose price per row is the least certain: it weighs a quarter.
SWITCH_NOISE = 4.0
#: A factor of a thousand either way is a broken clock or a suspended process: log samples are clipped there.
LOG_SLOWDOWN_LIMIT = math.log(1000)


@dataclass(frozen=True, slots=True)
class Measurement:
    """The last step. ``predicted_ms`` is its price at slowdown 1 (``Decision.price_ms``), catch-up included."""

    exit_layer: int
    predicted_ms: float
    measured_ms: float


@dataclass(frozen=True, slots=True)
class Observation:
    """What the runtime knows before a step; the rows are those of :meth:`CostModel.steps_ms`."""

    budget: Budget
    context_length: int
    stage_rows: Sequence[int]
    balcony_rows: Sequence[int]
    last: Measurement | None = None


@dataclass(frozen=True, slots=True)
class CatchUp:
    """Pending rows to run through one stage in the gap of this token, before the step: their input is there already.

    With ``balcony`` the rows go through the balcony of exit index ``stage`` instead.
    """

    stage: int
    rows: int
    balcony: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """The next step.

    Attributes:
        exit_layer: where the token is taken.
        reason: one line of plain words.
        predicted_ms: expected time of step and catch-up on the device as it is now.
        price_ms: the same at slowdown 1; goes into the next :class:`Measurement`.
        probability: P(gap <= target) of step and catch-up; 1 without a target.
        infeasible: no allowed exit can hold the target, even without a backlog.
        catch_up: backlog to work off beside the step.
    """

    exit_layer: int
    reason: str
    predicted_ms: float
    price_ms: float
    probability: float
    infeasible: bool
    catch_up: CatchUp | None


@dataclass(frozen=True, slots=True)
class Slowdown:
    """The filter: log(measured / predicted) of a step at exit ``i`` is about ``mean + offsets[i]``.

    Attributes:
        mean, variance: of the device's log slowdown.
        process_variance: what it gains per token.
        noise_variance: of one measurement.
        offsets, offset_variances: what the profile gets wrong: one entry per exit, and the last for steps with
            catch-up, whatever their exit; empty until the first decision.
        surprise: side (-1, 1) of the last measurement if that was surprising, else 0.
    """

    # At first the profile is trusted to 20 % (another power mode, another clock) and a sample to 10 %.
    mean: float = 0.0
    variance: float = 0.2**2
    process_variance: float = PROCESS_VARIANCE
    noise_variance: float = 0.1**2
    offsets: tuple[float, ...] = ()
    offset_variances: tuple[float, ...] = ()
    surprise: int = 0

    @property
    def factor(self) -> float:
        """How many times slower than its profile the device is."""
        return math.exp(self.mean)

    def for_exits(self, count: int) -> Slowdown:
        """With offsets for this many exits; what was learned for another number is dropped."""
        if len(self.offsets) == count + 1:
            return self
        variances = (*(EXIT_VARIANCE,) * count, CATCH_UP_VARIANCE)
        return replace(self, offsets=(0.0,) * (count + 1), offset_variances=variances)

    def update(self, index: int, log_ratio: float, noise_scale: float) -> Slowdown:
        """After a step with the offset ``index``; ``noise_scale`` is how much noisier than usual the sample is."""
        offset_variance = self.offset_variances[index]
        innovation = log_ratio - self.mean - self.offsets[index]
        prior = self.variance + self.process_variance
        noise = self.noise_variance * noise_scale
        limit = SURPRISE**2 * (prior + offset_variance + noise)
        side = 0 if innovation * innovation <= limit else 1 if innovation > 0 else -1
        if side and side != self.surprise:  # an outlier until the next sample says the same
            sample = (limit - prior - offset_variance) / noise_scale
            noise_variance = self.noise_variance + NOISE_RATE * (sample - self.noise_variance)
            return replace(self, variance=prior, noise_variance=noise_variance, surprise=side)
        if side:  # the load has changed: what was known before counts for nothing
            prior = innovation * innovation
        total = prior + offset_variance + noise
        gain, offset_gain = prior / total, offset_variance / total
        correction = gain * innovation
        residual = (1 - gain - offset_gain) * innovation
        # With K the sum of the gains, E[residual²] = (1 - K) noise: K noise more is unbiased and not negative.
        sample = (residual * residual + (gain + offset_gain) * noise) / noise_scale
        noise_variance = max(self.noise_variance + NOISE_RATE * (sample - self.noise_variance), NOISE_FLOOR)
        process_variance = PROCESS_VARIANCE
        if not side:
            adapted = ADAPTATION * self.process_variance + (1 - ADAPTATION) * correction * correction
            process_variance = max(PROCESS_VARIANCE, adapted)
        kept = 1 - OFFSET_DECAY
        offsets = [offset * kept for offset in self.offsets]
        offsets[index] = self.offsets[index] + offset_gain * innovation
        variances = [EXIT_VARIANCE + (variance - EXIT_VARIANCE) * kept for variance in self.offset_variances]
        variances[-1] += (CATCH_UP_VARIANCE - EXIT_VARIANCE) * OFFSET_DECAY
        variances[index] = (1 - offset_gain) * offset_variance
        return Slowdown(
            mean=self.mean + correction,
            variance=(1 - gain) * prior,
            process_variance=process_variance,
            noise_variance=noise_variance,
            offsets=tuple(offsets),
            offset_variances=tuple(variances),
            surprise=side,
        )


@dataclass(frozen=True, slots=True)
class ControllerState:
    """What one decision leaves for the next.

    Attributes:
        exit_layer: where it took the token; None before the first.
        tokens_since_switch: tokens taken there in a row, that one included.
        catching_up: whether its step had a catch-up beside it.
        tpot_ms: the target that it saw; infinite without one.
        slowdown: the filter.
    """

    exit_layer: int | None
    tokens_since_switch: int
    catching_up: bool
    tpot_ms: float
    slowdown: Slowdown

    @classmethod
    def initial(cls) -> ControllerState:
        """Before the first token: nothing chosen, the profile taken at its word."""
        return cls(None, tokens_since_switch=0, catching_up=False, tpot_ms=math.inf, slowdown=Slowdown())


@dataclass(frozen=True, slots=True)
class _Outlook:
    """What one decision weighs: prices and room per exit index; allowed are the indices ``lowest`` to ``highest``.

    The last entry of ``room_ms`` is that of a step with catch-up.
    """

    now_ms: list[float]
    steady_ms: list[float]
    room_ms: list[float]
    lowest: int
    highest: int
    hysteresis: float
    may_rise: bool

    def fits(self, index: int) -> bool:
        return self.now_ms[index] <= self.room_ms[index]

    def leaves_hysteresis(self, index: int) -> bool:
        return self.steady_ms[index] <= self.room_ms[index] * (1 - self.hysteresis)

    def choose(self, current: int | None) -> int:
        """The rules of the module's docstring."""
        top = self.highest
        if current is not None:
            if self.may_rise:
                for index in range(self.highest, current, -1):
                    if self.fits(index) and self.leaves_hysteresis(index):
                        return index
            top = current
        for index in range(top, self.lowest - 1, -1):
            if self.fits(index):
                return index
        return self.lowest


class Controller:
    """Decides over one cost model. It holds no state: every sequence carries its own :class:`ControllerState`."""

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs
        self._index = {exit_layer: index for index, exit_layer in enumerate(costs.exits)}
        self._ones = (1,) * len(costs.exits)

    def decide(self, state: ControllerState, observation: Observation) -> tuple[ControllerState, Decision]:
        """Choose the exit of the next token.

        Raises:
            BudgetError: the budget allows none of the exits (``Budget.check_exits`` says so beforehand).
        """
        costs, budget = self._costs, observation.budget
        allowed = budget.allowed_exits(costs.exits)
        lowest, highest = self._index[allowed[0]], self._index[allowed[-1]]
        current = None if state.exit_layer is None else self._index.get(state.exit_layer)
        slowdown, note = self._learn(state, observation.last)
        now_ms = costs.steps_ms(observation.stage_rows, observation.balcony_rows, observation.context_length)
        if budget.tpot_ms is None:
            chosen, probability, infeasible, catch_up = highest, 1.0, False, None
            price_ms = now_ms[chosen]
            predicted_ms = price_ms * math.exp(slowdown.mean + slowdown.offsets[chosen])
            reason = "fixed exit" if budget.exit_layer is not None else "deepest allowed exit, no target"
        else:
            deviation = math.sqrt(slowdown.variance + slowdown.noise_variance)
            log_room = math.log(budget.tpot_ms) - slowdown.mean - _quantile(budget.probability) * deviation
            outlook = _Outlook(
                now_ms=now_ms,
                steady_ms=costs.steps_ms(self._ones, self._ones, observation.context_length),
                room_ms=[math.exp(log_room - offset) for offset in slowdown.offsets],
                lowest=lowest,
                highest=highest,
                hysteresis=budget.hysteresis,
                may_rise=state.tokens_since_switch >= budget.dwell_tokens
                or budget.tpot_ms * (1 - budget.hysteresis) > state.tpot_ms,
            )
            held = current if current is not None and lowest <= current <= highest else None
            chosen = outlook.choose(held)
            infeasible = not outlook.fits(chosen) and not any(
                outlook.steady_ms[index] <= outlook.room_ms[index] for index in range(lowest, highest + 1)
            )
            price_ms = now_ms[chosen]
            catch_up, goal, chunk_ms = self._catch_up(chosen, outlook, observation)
            price_ms += chunk_ms
            log_slowdown = slowdown.mean + slowdown.offsets[chosen if catch_up is None else -1]
            predicted_ms = price_ms * math.exp(log_slowdown)
            probability = _probability(budget.tpot_ms, price_ms, log_slowdown, deviation)
            if catch_up is not None:
                part = f"balcony {costs.exits[goal]}" if catch_up.balcony else f"stage {catch_up.stage}"
                reason = f"{costs.exits[goal]} fits, catching up {catch_up.rows} rows of {part}"
            elif infeasible:
                reason = f"infeasible: shallowest exit predicted {predicted_ms:.1f} ms"
            else:
                reason = self._reason(
                    outlook, chosen, current=current, budget=budget, predicted_ms=predicted_ms, probability=probability
                )
        exit_layer = costs.exits[chosen]
        stays = chosen == current
        after = ControllerState(
            exit_layer=exit_layer,
            tokens_since_switch=state.tokens_since_switch + 1 if stays else 1,
            catching_up=catch_up is not None,
            tpot_ms=math.inf if budget.tpot_ms is None else budget.tpot_ms,
            slowdown=slowdown,
        )
        return after, Decision(exit_layer, reason + note, predicted_ms, price_ms, probability, infeasible, catch_up)

    def _learn(self, state: ControllerState, last: Measurement | None) -> tuple[Slowdown, str]:
        """The filter after the last step, and a remark for the reason where its measurement is no use."""
        slowdown = state.slowdown.for_exits(len(self._index))
        if last is None:
            return slowdown, ""
        index = self._index.get(last.exit_layer)
        usable = 0 < last.measured_ms < math.inf and 0 < last.predicted_ms < math.inf
        if index is None or not usable:
            return slowdown, f"; measurement of {last.measured_ms:g} ms at exit {last.exit_layer} ignored"
        log_ratio = math.log(last.measured_ms) - math.log(last.predicted_ms)
        log_ratio = min(max(log_ratio, -LOG_SLOWDOWN_LIMIT), LOG_SLOWDOWN_LIMIT)
        noise_scale = SWITCH_NOISE if state.tokens_since_switch == 1 else 1.0
        return slowdown.update(-1 if state.catching_up else index, log_ratio, noise_scale), ""

    def _catch_up(self, chosen: int, outlook: _Outlook, observation: Observation) -> tuple[CatchUp | None, int, float]:
        """The largest useful chunk toward the deepest exit that would hold the target but for its backlog.

        Consumers on the way to it are served shallowest first. Every token adds one row to each of the m missing ones,
        so a consumer is left alone until it has more than m rows, and a chunk that cannot take more than m gains
        nothing. For the same reason an exit is a goal only if it could be entered with m rows pending at each.

        Returns:
            The chunk, the exit index that it leads to, and its price; (None, chosen, 0) if nothing moves.
        """
        costs, context = self._costs, observation.context_length
        stage_rows, balcony_rows = observation.stage_rows, observation.balcony_rows
        slack_ms = min(outlook.room_ms[chosen], outlook.room_ms[-1]) - outlook.now_ms[chosen]
        for goal in range(outlook.highest, chosen, -1):
            if not outlook.leaves_hysteresis(goal):
                continue
            if outlook.fits(goal):  # only the dwell is in the way
                break
            # (index, is a balcony, rows whose input is there): a stage's input is what the stage before it has run.
            consumers = [(i, False, stage_rows[i] - stage_rows[i - 1]) for i in range(chosen + 1, goal + 1)]
            if balcony_rows[goal] > stage_rows[goal]:
                consumers.append((goal, True, balcony_rows[goal] - stage_rows[goal]))
            least = len(consumers)
            entry_ms = outlook.steady_ms[goal]
            for order, (i, is_balcony, _) in enumerate(consumers, start=1):
                unit = costs.balconies[i] if is_balcony else costs.stages[i]
                queries = 1 if is_balcony else None
                entry_ms += unit.pass_ms(1 + order * least, context, queries) - unit.pass_ms(1, context, queries)
            if entry_ms > outlook.room_ms[goal]:
                continue
            for i, is_balcony, ready in consumers:
                if ready > least:
                    unit = costs.balconies[i] if is_balcony else costs.stages[i]
                    queries = 1 if is_balcony else None
                    rows = unit.rows_within(slack_ms, ready, context, queries)
                    if rows > least:
                        return CatchUp(i, rows, is_balcony), goal, unit.pass_ms(rows, context, queries)
                    break
        return None, chosen, 0.0

    def _reason(
        self,
        outlook: _Outlook,
        chosen: int,
        *,
        current: int | None,
        budget: Budget,
        predicted_ms: float,
        probability: float,
    ) -> str:
        """Plain words for a step without catch-up, where the target can be held."""
        exits = self._costs.exits
        if not outlook.fits(chosen):
            return f"no exit fits yet: shallowest predicted {predicted_ms:.1f} ms (p={probability:.2f})"
        for index in range(outlook.highest, chosen, -1):
            if outlook.steady_ms[index] <= outlook.room_ms[index]:
                if not outlook.leaves_hysteresis(index):
                    why = "leaves too little free"
                elif outlook.fits(index):
                    why = f"waits for its dwell of {budget.dwell_tokens} tokens"
                else:
                    why = "has a backlog for which there is no time"
                return f"within {budget.tpot_ms:g} ms (p={probability:.2f}); {exits[index]} {why}"
        way = "down to " if current is not None and chosen < current else ""
        return f"{way}deepest exit within {budget.tpot_ms:g} ms (p={probability:.2f})"


@lru_cache(maxsize=64)
def _quantile(probability: float) -> float:
    return NormalDist().inv_cdf(probability)


def _probability(target_ms: float, price_ms: float, log_slowdown: float, deviation: float) -> float:
    """P(price × slowdown <= target)."""
    if price_ms <= 0:
        return 1.0
    distance = (math.log(target_ms) - math.log(price_ms) - log_slowdown) / deviation
    return 0.5 * math.erfc(-distance / math.sqrt(2))
