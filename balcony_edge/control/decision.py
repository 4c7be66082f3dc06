"""Records of a decision: its input, its result, and the text of its reason.

Owns the types that pass between runtime, controller and trace. It decides nothing. The types are named tuples because one
of each is made per token, between two calls that leave the caches cold. The text of the reason is built only when it is
read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from balcony_edge.budget import Budget
from balcony_edge.control.governor import Governor, needed_tps
from balcony_edge.device.readings import Reading


class Measurement(NamedTuple):
    """The last step.

    Attributes:
        exit_layer: exit layer of the step.
        predicted_ms: price of the step at slowdown 1 (``Decision.price_ms``), catch-up included.
        measured_ms: measured time of the step, without waiting.
    """

    exit_layer: int
    predicted_ms: float
    measured_ms: float

    @property
    def log_ratio(self) -> float | None:
        """Logarithm of measured over predicted time; None if a time is not above 0 and finite."""
        if not (0 < self.measured_ms < math.inf and 0 < self.predicted_ms < math.inf):
            return None
        return math.log(self.measured_ms) - math.log(self.predicted_ms)


class Observation(NamedTuple):
    """What the runtime knows before a step; the rows are those of :meth:`CostModel.steps_ms`.

    Attributes:
        budget: budget of this token.
        context_length: number of rows before the last new one.
        stage_rows, balcony_rows: rows due at each stage and balcony, the new ones included.
        last: measurement of the previous step; None if it says nothing about the next step (no previous step, a prefill,
            or no prices).
        made_tokens: number of tokens of this reply so far; 0 before the prefill.
        started_s, now_s: time of the request and present time, on one clock.
        busy_s: time that all replies so far have spent on steps and pending rows.
        readings: latest reading of every sensor.
        forced_tokens: number of ``made_tokens`` that no step made, because the structure of the reply left no other.
    """

    budget: Budget
    context_length: int
    stage_rows: Sequence[int]
    balcony_rows: Sequence[int]
    last: Measurement | None = None
    made_tokens: int = 1
    started_s: float = 0.0
    now_s: float = 0.0
    busy_s: float = 0.0
    readings: tuple[Reading, ...] = ()
    forced_tokens: int = 0

    @property
    def deadline_runs(self) -> bool:
        """Whether a deadline applies to this token; it does not apply to tokens after the expected ones."""
        return self.budget.deadline_s is not None and self.made_tokens < (self.budget.expected_tokens or 0)

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; negative after it."""
        return (self.budget.deadline_s or 0.0) - (self.now_s - self.started_s)

    @property
    def needed_tps(self) -> float:
        """Tokens a second that the latency targets need; 0 without a latency target."""
        return needed_tps(self.budget, self.made_tokens, self.now_s - self.started_s)

    @property
    def remaining(self) -> int:
        """Number of tokens that the deadline still needs."""
        return max((self.budget.expected_tokens or 0) - self.made_tokens, 1)


class CatchUp(NamedTuple):
    """Pending rows to run through one stage in the gap of this token, before the step. Their input already exists.

    With ``balcony`` the rows go through the balcony of exit index ``stage`` instead.
    """

    stage: int
    rows: int
    balcony: bool = False


class Decision(NamedTuple):
    """The next step.

    Attributes:
        exit_layer: exit layer at which the token is taken.
        predicted_ms: expected time of step and catch-up on the device as it is now; 0 without a target.
        price_ms: expected time at slowdown 1; goes into the next :class:`Measurement`.
        probability: P(step and catch-up meet the latency targets); 1 without a target.
        infeasible: whether no allowed exit can hold the targets, even without a backlog.
        catch_up: pending rows to run next to the step.
        period_ms: smallest gap to the previous token; 0 if no pace is asked for.
        idle_ms: part of the wait within that gap that may be spent on the backlog.
        words: parts of the reason, joined when it is read.
        drafted: number of drafts in the token's round, if the token was drafted and checked with others; 0 otherwise.
        stops: whether the reply must end here regardless of ``on_infeasible``, because the device is critically hot.
        unseen: whether a ceiling is not held because no sensor measures it at the moment.
    """

    exit_layer: int
    predicted_ms: float = 0.0
    price_ms: float = 0.0
    probability: float = 1.0
    infeasible: bool = False
    catch_up: CatchUp | None = None
    period_ms: float = 0.0
    idle_ms: float = 0.0
    words: tuple[object, ...] = ()
    drafted: int = 0
    stops: bool = False
    unseen: bool = False

    def refusal(self, budget: Budget) -> str | None:
        """Why the reply ends with an error instead of this token, and what to do; None if it goes on."""
        if self.stops:
            return f"{self.reason}: let the device cool down"
        if self.infeasible and budget.on_infeasible == "error":
            return f"{self.reason}: ask for less in that target, or allow less depth"
        return None

    @property
    def reason(self) -> str:
        """One line of plain words."""
        return "; ".join(part.text(self) if isinstance(part, Because | Stayed) else str(part) for part in self.words)


class Outlook(NamedTuple):
    """Prices and room per exit index that one decision weighs.

    Attributes:
        now_ms: price of the next step, pending rows included.
        steady_ms: price of a step without pending rows.
        room_ms: largest price that holds the targets; the last entry (``WITH_CATCH_UP``) is for a step with catch-up.
        may_enter: whether the exit leaves enough time free to be entered.
        lowest, highest: shallowest and deepest allowed index.
        may_rise: whether a deeper exit may be taken (the dwell is over).
        first_ms: room of the first token itself, all rows of the prompt included (infinite if no target limits it); None
            after the first token.
    """

    now_ms: list[float]
    steady_ms: list[float]
    room_ms: list[float]
    may_enter: list[bool]
    lowest: int
    highest: int
    may_rise: bool
    first_ms: list[float] | None = None

    def fits(self, index: int) -> bool:
        return self.now_ms[index] <= self.room_ms[index]

    def holds(self, index: int, luck: float = 1.0) -> bool:
        """Whether the exit would fit without its backlog, in ``luck`` times the room.

        The prompt's rows do not count as backlog.
        """
        if self.first_ms is not None and self.now_ms[index] > self.first_ms[index] * luck:
            return False
        return self.steady_ms[index] <= self.room_ms[index] * luck

    def choose(self, current: int | None, otherwise: Literal["shallowest", "closest", "deepest"]) -> int:
        """Choose an exit by the rules of :mod:`.controller`; ``otherwise`` names the choice if none fits."""
        now_ms, room_ms, top = self.now_ms, self.room_ms, self.highest
        if current is not None:
            if self.may_rise:
                for index in range(self.highest, current, -1):
                    if now_ms[index] <= room_ms[index] and self.may_enter[index]:
                        return index
            top = current
        for index in range(top, self.lowest - 1, -1):
            if now_ms[index] <= room_ms[index]:
                return index
        if otherwise != "closest":
            return self.lowest if otherwise == "shallowest" else top
        return max(range(self.lowest, self.highest + 1), key=lambda i: (room_ms[i] / max(now_ms[i], 1e-300), i))


class Stayed(NamedTuple):
    """Reason of a token at the exit of the one before, which still fits.

    ``beyond``: deepest of the deeper exits that would hold the target as well, but leave too little free to be entered.
    """

    budget: Budget
    beyond: int | None = None

    def text(self, decision: Decision) -> str:
        within = f"{_within(self.budget, 1, decision)} (p={decision.probability:.2f})"
        return f"deepest exit {within}" if self.beyond is None else f"{within}; {self.beyond} leaves too little free"


class Because(NamedTuple):
    """Reason of a step without catch-up, if the targets can be held."""

    outlook: Outlook
    exits: tuple[int, ...]
    chosen: int
    current: int | None
    seen: Observation

    def text(self, decision: Decision) -> str:
        outlook, budget, odds = self.outlook, self.seen.budget, f"(p={decision.probability:.2f})"
        if not outlook.fits(self.chosen):
            return f"no exit fits yet: predicted {decision.predicted_ms:.1f} ms {odds}"
        within = _within(budget, self.seen.made_tokens, decision, 1000 * self.seen.left_s / self.seen.remaining)
        for index in range(outlook.highest, self.chosen, -1):
            if outlook.holds(index):
                if not outlook.may_enter[index]:
                    why = "leaves too little free"
                elif outlook.fits(index):
                    why = "waits for its dwell"
                else:
                    why = "has a backlog for which there is no time"
                return f"{within} {odds}; {self.exits[index]} {why}"
        way = "down to " if self.current is not None and self.chosen < self.current else ""
        return f"{way}deepest exit {within} {odds}"


def _within(budget: Budget, made_tokens: int, decision: Decision, due_ms: float = math.inf) -> str:
    """Targets of a token, in words; without those for which a ceiling makes it wait too long.

    ``due_ms`` is the gap that a deadline leaves.
    """
    kept = budget.tpot_ms is not None and decision.period_ms <= budget.tpot_ms
    targets = [f"{budget.tpot_ms:g} ms"] if kept else []
    if budget.ttft_ms is not None and made_tokens == 0:
        targets.append(f"a first token after {budget.ttft_ms:g} ms")
    if budget.deadline_s is not None and made_tokens < (budget.expected_tokens or 0) and decision.period_ms <= due_ms:
        targets.append(f"{budget.expected_tokens} tokens in {budget.deadline_s:g} s")
    if targets:
        return f"within {' and '.join(targets)}"
    return "within its ceilings" if budget.needs_sensors else "without a target"


def expected_words(seen: Observation, now_ms: float, steady_ms: float, later_ms: float) -> str:
    """Name each latency target of a token, as a key of a budget file, with the value that is expected at an exit.

    Args:
        seen: observation that the decision is made from.
        now_ms: expected time of the next step at the exit; at the first token it includes the prompt's rows.
        steady_ms: expected time of the step after it.
        later_ms: expected time of a step in the middle of the rest that a deadline needs.
    """
    budget, words = seen.budget, []
    if budget.tpot_ms is not None:
        takes = f"a step takes {_shown(steady_ms, budget.tpot_ms)} ms"
        words.append((steady_ms > budget.tpot_ms, f"tpot_ms = {budget.tpot_ms:g}: {takes}"))
    if seen.deadline_runs and budget.deadline_s is not None:
        # without the waits of a pace, which are cut when the time runs out
        all_s = budget.deadline_s - seen.left_s + (now_ms + (seen.remaining - 1) * later_ms) / 1000
        takes = f"{budget.expected_tokens} tokens take {_shown(all_s, budget.deadline_s, '.3g', '.6g')} s"
        words.append((all_s > budget.deadline_s, f"deadline_s = {budget.deadline_s:g}: {takes}"))
    if seen.made_tokens == 0 and budget.ttft_ms is not None:
        first_ms = now_ms + 1000 * (seen.now_s - seen.started_s)
        takes = f"the first token takes {_shown(first_ms, budget.ttft_ms)} ms"
        words.append((first_ms > budget.ttft_ms, f"ttft_ms = {budget.ttft_ms:g}: {takes}"))
    missed = [text for out_of_reach, text in words if out_of_reach]
    return " and ".join(missed or [text for _, text in words])


def _shown(value: float, asked: float, usual: str = ".1f", exact: str = ".3f") -> str:
    """A time in its usual form, or in the exact one if that would hide a missed target, as 0.5 ms for 0.54 of 0.5."""
    shown = f"{value:{usual}}"
    return shown if (float(shown) > asked) == (value > asked) else f"{value:{exact}}"


def device_words(governor: Governor, budget: Budget, period_ms: float, needs_tps: float = 0.0) -> tuple[object, ...]:
    """The slow loop's part of the reason for a token."""
    words = []
    if governor.critical(budget):
        limit = f"critical_temperature_c = {budget.critical_temperature_c:g}"
        words.append(f"{limit}: the hottest sensor is at {governor.critical_c:.0f} °C")
    if missed := governor.out_of_reach(budget, needs_tps):
        words.append(f"infeasible: {', '.join(missed)} out of reach")
    if governor.binding:
        usual_ms = 0.0 if budget.max_pace_tps is None else 1000 / budget.max_pace_tps  # no ceiling asks for this wait
        pace = f", paced to {1000 / period_ms:.1f} tokens a second" if period_ms > usual_ms else ""
        if budget.tpot_ms is not None and period_ms > budget.tpot_ms:
            pace += f", which gives up tpot_ms = {budget.tpot_ms:g}"
        words.append(f"limited by {', '.join(governor.binding)}{pace}")
    if lost := governor.unseen(budget):
        words.append(f"no reading for {', '.join(lost)}: not held")
    return tuple(words)
