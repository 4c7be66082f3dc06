"""What a decision is made from and what it is: plain records, and the words for it.

Owns the types between runtime, controller and trace. It decides nothing. Named tuples, because one of each is made per
token between two calls that leave the caches cold; the reason is put together when somebody reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from balcony_edge.budget import Budget
from balcony_edge.control.governor import Governor
from balcony_edge.device.readings import Reading


class Measurement(NamedTuple):
    """The last step. ``predicted_ms`` is its price at slowdown 1 (``Decision.price_ms``), catch-up included; the time that
    was measured leaves waiting out.
    """

    exit_layer: int
    predicted_ms: float
    measured_ms: float


class Observation(NamedTuple):
    """What the runtime knows before a step; the rows are those of :meth:`CostModel.steps_ms`.

    Attributes:
        budget: what holds for this token.
        context_length: rows before the last new one.
        stage_rows, balcony_rows: rows due at each stage and balcony, the new ones included.
        last: the step before; None where it says nothing about the next (none, a prefill, no prices).
        made_tokens: tokens of this reply that are out; 0 before the prefill.
        started_s, now_s: when the reply was asked for, and now, on one clock.
        busy_s: time that all replies so far have spent in steps and on backlog.
        readings: the latest of every sensor.
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

    @property
    def deadline_runs(self) -> bool:
        """Whether there is a deadline that this token counts for: those after the expected ones are free."""
        return self.budget.deadline_s is not None and self.made_tokens < (self.budget.expected_tokens or 0)

    @property
    def left_s(self) -> float:
        """Until the deadline; below 0 behind it."""
        return (self.budget.deadline_s or 0.0) - (self.now_s - self.started_s)

    @property
    def remaining(self) -> int:
        """Tokens that the deadline still waits for."""
        return max((self.budget.expected_tokens or 0) - self.made_tokens, 1)


class CatchUp(NamedTuple):
    """Pending rows to run through one stage in the gap of this token, before the step: their input is there already.

    With ``balcony`` the rows go through the balcony of exit index ``stage`` instead.
    """

    stage: int
    rows: int
    balcony: bool = False


class Decision(NamedTuple):
    """The next step.

    Attributes:
        exit_layer: where the token is taken.
        predicted_ms: expected time of step and catch-up on the device as it is now; 0 without a target.
        price_ms: the same at slowdown 1; goes into the next :class:`Measurement`.
        probability: P(step and catch-up meet the latency targets); 1 without one.
        infeasible: no allowed exit can hold the targets, even without a backlog.
        catch_up: backlog to work off beside the step.
        period_ms: least gap to the token before; 0 where nothing asks for a pace.
        idle_ms: of the wait within that gap, so much may be spent on the backlog.
        words: the reason in parts; put together when it is read.
        drafted: of a token that was drafted and checked with others: how many drafts its round had. 0 otherwise.
        stops: whether the reply must end here, whatever ``on_infeasible`` says: the device is critically hot.
        unseen: whether a ceiling is not held, because nothing measures it at the moment.
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

    def ends(self, budget: Budget) -> bool:
        """Whether the reply ends with an error instead of this token."""
        return self.stops or (self.infeasible and budget.on_infeasible == "error")

    @property
    def reason(self) -> str:
        """One line of plain words."""
        return "; ".join(part.text(self) if isinstance(part, Because | Stayed) else str(part) for part in self.words)


class Outlook(NamedTuple):
    """What one decision weighs: prices and room per exit index; allowed are the indices ``lowest`` to ``highest``.

    The last entry of ``room_ms`` is that of a step with catch-up. ``may_enter`` says of each exit whether it leaves free
    what going there takes. ``first_ms`` is the room that the first token itself has, all rows of the prompt included (infinite
    where nothing asks for it); None behind the first.
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
        """Whether it would fit but for its backlog, with ``luck`` times the room. The prompt's rows are no backlog."""
        if self.first_ms is not None and self.now_ms[index] > self.first_ms[index] * luck:
            return False
        return self.steady_ms[index] <= self.room_ms[index] * luck

    def choose(self, current: int | None, otherwise: Literal["shallowest", "closest", "deepest"]) -> int:
        """The rules of :mod:`.controller`; ``otherwise`` says what is taken where nothing fits."""
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
    """The deepest exit that is allowed fits as before."""

    budget: Budget

    def text(self, decision: Decision) -> str:
        return f"deepest exit {_within(self.budget, 1, decision)} (p={decision.probability:.2f})"


class Because(NamedTuple):
    """Why a step without catch-up was chosen where the targets can be held."""

    outlook: Outlook
    exits: tuple[int, ...]
    chosen: int
    current: int | None
    seen: Observation

    def text(self, decision: Decision) -> str:
        outlook, budget, odds = self.outlook, self.seen.budget, f"(p={decision.probability:.2f})"
        if not outlook.fits(self.chosen):
            return f"no exit fits yet: predicted {decision.predicted_ms:.1f} ms {odds}"
        within = _within(budget, self.seen.made_tokens, decision)
        for index in range(outlook.highest, self.chosen, -1):
            if outlook.holds(index):
                if not outlook.may_enter[index]:
                    why = "leaves too little free"
                elif outlook.fits(index):
                    why = f"waits for its dwell of {budget.dwell_tokens} tokens"
                else:
                    why = "has a backlog for which there is no time"
                return f"{within} {odds}; {self.exits[index]} {why}"
        way = "down to " if self.current is not None and self.chosen < self.current else ""
        return f"{way}deepest exit {within} {odds}"


def _within(budget: Budget, made_tokens: int, decision: Decision) -> str:
    """What a token is held to, in words; ``tpot_ms`` is not among it where a ceiling makes the token wait for longer."""
    kept = budget.tpot_ms is not None and not _waits_longer(budget, decision.period_ms)
    targets = [f"{budget.tpot_ms:g} ms"] if kept else []
    if budget.ttft_ms is not None and made_tokens == 0:
        targets.append(f"a first token after {budget.ttft_ms:g} ms")
    if budget.deadline_s is not None and made_tokens < (budget.expected_tokens or 0):
        targets.append(f"{budget.expected_tokens} tokens in {budget.deadline_s:g} s")
    if targets:
        return f"within {' and '.join(targets)}"
    return "within its ceilings" if budget.needs_sensors else "without a target"


def _waits_longer(budget: Budget, period_ms: float) -> bool:
    return budget.tpot_ms is not None and period_ms > budget.tpot_ms


def expected_words(seen: Observation, now_ms: float, steady_ms: float) -> str:
    """Each latency target that holds for a token, as a key of a budget file, with what is expected of it at an exit.

    Args:
        seen: what the decision is made from.
        now_ms: the next step there, the prompt's rows included at the first token.
        steady_ms: a step after it.
    """
    budget, words = seen.budget, []
    if budget.tpot_ms is not None:
        words.append((steady_ms > budget.tpot_ms, f"tpot_ms = {budget.tpot_ms:g}: a step takes {steady_ms:.1f} ms"))
    if seen.deadline_runs and budget.deadline_s is not None:
        paced_ms = max(steady_ms, 1000 / budget.max_pace_tps if budget.max_pace_tps else 0.0)
        all_s = budget.deadline_s - seen.left_s + (now_ms + (seen.remaining - 1) * paced_ms) / 1000
        takes = f"{budget.expected_tokens} tokens take {all_s:.3g} s"
        words.append((all_s > budget.deadline_s, f"deadline_s = {budget.deadline_s:g}: {takes}"))
    if seen.made_tokens == 0 and budget.ttft_ms is not None:
        first_ms = now_ms + 1000 * (seen.now_s - seen.started_s)
        words.append(
            (first_ms > budget.ttft_ms, f"ttft_ms = {budget.ttft_ms:g}: the first token takes {first_ms:.1f} ms")
        )
    missed = [text for out_of_reach, text in words if out_of_reach]
    return " and ".join(missed or [text for _, text in words])


def device_words(governor: Governor, budget: Budget, period_ms: float) -> tuple[object, ...]:
    """What the slow loop has to say about a token."""
    words = []
    if governor.critical(budget):
        limit = f"critical_temperature_c = {budget.critical_temperature_c:g}"
        words.append(f"{limit}: the hottest sensor is at {governor.critical_c:.0f} °C")
    if governor.infeasible:
        words.append(f"infeasible: {', '.join(governor.infeasible)} out of reach")
    if governor.binding:
        pace = f", paced to {1000 / period_ms:.1f} tokens a second" if period_ms else ""
        if _waits_longer(budget, period_ms):
            pace += f", which gives up tpot_ms = {budget.tpot_ms:g}"
        words.append(f"limited by {', '.join(governor.binding)}{pace}")
    if lost := governor.unseen(budget):
        words.append(f"no reading for {', '.join(lost)}: latency only")
    return tuple(words)
