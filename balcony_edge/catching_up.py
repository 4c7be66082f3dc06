"""Catching up: the way back to a deeper exit whose stages have a backlog.

Owns three answers: at which exit the tokens are made meanwhile (the *base*), which rows run next to a token (the *chunk*),
and when the deeper exit (the *goal*) is entered. Pure arithmetic over prices and room; the rules of switching, of which
this is the part for backlogs, are :mod:`.controller`'s.

A goal is an exit that would hold the target but for its backlog. Each token at the base adds one row to each of the m
consumers (stages, and the goal's balcony) on the way to the goal; the slack of a token at the base takes r_i rows of
consumer i. A row needs 1 / r_i tokens at each consumer, so the backlog shrinks where the sum of 1 / r_i is below 1.

    base    the exit at hand, where its slack shrinks the backlog. A shallower exit where that costs less depth in all (a
            *sprint*): a pass's first row reads the stage's weights, and in int4 a full step may leave no time for two.
            A sprint must pay within as many tokens as the sequence has rows, or within ``HORIZON``: nobody knows how long
            a reply becomes, and as long again as it is so far is the usual guess
    chunk   of the shallowest consumer whose rows fill the slack, so that first rows are paid for as rarely as can be; a
            consumer is left alone until it has more than m rows
    entry   when all of them are left alone. The goal's step then has a few rows more than its own. Where it fits it is
            within the target; otherwise one token may take up to ``OVERDRAFT`` targets, if the credit is there

A sprint lasts until its goal is entered or would no longer hold the target. After each one the next must wait, twice as
long every time, until the deepest exit has been held for a while: where prices flatter the goal, or the target is within
the noise of its price, exits would come and go.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from balcony_edge.costs import CostModel, UnitCost
from balcony_edge.decision import CatchUp, Measurement, Observation, Outlook

#: Most that a late token on entry may cost, in rooms of its exit. From the shallowest of four exits a backlog that is
#: worked off leaves up to nine rows at the deepest stage: 1.9 targets in int4, whose further rows are a quarter of the first.
OVERDRAFT = 2.0
#: Share of the tokens' slack that new rows may take: what is left drains the backlog, at a tenth of its full speed or more.
BUSY = 0.9
#: A chunk of so many rows for every missing consumer drains the backlog well enough that no other base is looked at.
DRAINS_WELL = 3
#: Least advantage of another base, in depth lost on the way: prices of further rows are the least certain.
ADVANTAGE = 1.5
#: Least tokens within which a sprint must pay.
HORIZON = 512
#: Rows beyond which the slack of a token counts as plenty.
PLENTY = 64


#: Share of the late tokens that a probability allows which may be spent on entering a deeper exit: noise takes the others.
CREDIT_SHARE = 0.5
#: Tokens that the second sprint must wait for, and how often that may double.
FIRST_WAIT, MOST_DOUBLINGS = 64, 4
#: Tokens in a row at the deepest exit after which earlier sprints are forgotten.
HELD = 64


class Recovery(NamedTuple):
    """What the way back keeps from token to token.

    Attributes:
        credit: late tokens that the asked probability has left over, at most one. Each token adds a part of its own, a late
            one takes itself off; from 1 on a deeper exit may be entered by one late token.
        goal: exit layer that a sprint leads to; None without a sprint.
        wait: tokens until another sprint may begin.
        sprints: those since the deepest exit was held.
    """

    credit: float = 1.0
    goal: int | None = None
    wait: int = 0
    sprints: int = 0

    def counted(self, last: Measurement | None, tpot_ms: float, probability: float, held: int) -> Recovery:
        """After a token that took ``last``; ``held`` is how many there were in a row at the deepest exit."""
        credit, wait, sprints = self.credit, max(self.wait - 1, 0), 0 if held >= HELD else self.sprints
        if last is not None and tpot_ms < math.inf:
            late = 1.0 if last.measured_ms > tpot_ms else 0.0
            credit = min(max(credit + CREDIT_SHARE * (1 - probability) - late, -1.0), 1.0)
        if (credit, wait, sprints) == (self.credit, self.wait, self.sprints):
            return self
        return Recovery(credit, self.goal, wait, sprints)

    def towards(self, goal: int | None) -> Recovery:
        """With the goal of the sprint that the next token is part of; None where it is part of none."""
        if goal == self.goal:
            return self
        if self.goal is not None or goal is None:
            return self._replace(goal=goal)
        doublings = min(self.sprints, MOST_DOUBLINGS)
        return self._replace(goal=goal, wait=FIRST_WAIT << doublings, sprints=min(self.sprints, MOST_DOUBLINGS) + 1)


class Way(NamedTuple):
    """The next token on the way to a goal; exits as indices.

    Attributes:
        exit: where it is made.
        goal: the exit that it leads to; the same as ``exit`` where the goal is entered.
        sprint: whether the token is part of a sprint.
        chunk: rows to run next to it.
        chunk_ms: their price.
    """

    exit: int
    goal: int
    sprint: bool = False
    chunk: CatchUp | None = None
    chunk_ms: float = 0.0

    def words(self, exits: tuple[int, ...]) -> str:
        """Why, for the reason of a decision."""
        if self.exit == self.goal:
            return f"up to {exits[self.goal]} with its last pending rows: one token may be late"
        where = f" at {exits[self.exit]}: deeper exits leave no time for it" if self.sprint else ""
        if self.chunk is None:
            return f"{exits[self.goal]} fits, catching up{where}"
        part = f"balcony {exits[self.chunk.stage]}" if self.chunk.balcony else f"stage {self.chunk.stage}"
        return f"{exits[self.goal]} fits, catching up {self.chunk.rows} rows of {part}{where}"


class _Consumer(NamedTuple):
    """A stage or balcony on the way to the goal."""

    unit: int
    balcony: bool
    pending: int  # rows without the new one
    ready: int  # of these, rows whose input is there

    def cost(self, costs: CostModel) -> UnitCost:
        return (costs.balconies if self.balcony else costs.stages)[self.unit]

    @property
    def queries(self) -> int | None:
        return 1 if self.balcony else None


def way_back(
    costs: CostModel,
    outlook: Outlook,
    seen: Observation,
    chosen: int,
    present: int | None,
    credit: bool,
    may_sprint: bool,
) -> Way | None:
    """How the deepest exit that would hold the target is reached; None where nothing moves.

    Args:
        costs: prices.
        outlook: what the decision weighs.
        seen: what it was made from.
        chosen: exit index that the token would take otherwise.
        present: that of the token before, if that was part of a sprint.
        credit: whether one token may be late.
        may_sprint: whether a sprint may begin.
    """
    sprinting = present is not None and outlook.lowest <= present <= chosen and outlook.fits(present)
    if present is not None and sprinting:
        return _towards(costs, outlook, seen, chosen, present, credit, may_sprint=False, sprinting=True)
    way = _towards(costs, outlook, seen, chosen, chosen, False, may_sprint, sprinting=False)
    if way is None and credit:  # a late token is for what cannot be had without
        way = _towards(costs, outlook, seen, chosen, chosen, True, may_sprint, sprinting=False)
    return way


def _towards(
    costs: CostModel,
    outlook: Outlook,
    seen: Observation,
    chosen: int,
    preferred: int,
    credit: bool,
    may_sprint: bool,
    sprinting: bool,
) -> Way | None:
    for goal in range(outlook.highest, chosen, -1):
        # a sprint goes on within the hysteresis that it began above
        if not (outlook.holds(goal) if sprinting else outlook.may_enter[goal]):
            continue
        if outlook.fits(goal):  # only the dwell is in the way
            return None
        consumers, base = _consumers(seen, goal), preferred
        missing = _missing(consumers, base)
        room_ms = outlook.room_ms[goal]
        entry_ms, late_ms = _entry_ms(costs, outlook, seen, missing, goal), room_ms * OVERDRAFT if credit else room_ms
        # as many rows as the entry's price allows for
        if all(consumer.pending <= order * len(missing) for order, consumer in enumerate(missing, start=1)):
            if outlook.may_rise and room_ms < entry_ms and outlook.now_ms[goal] <= late_ms:
                return Way(goal, goal)
            continue
        chunk = _chunk(costs, outlook, seen, missing, base)
        if may_sprint and (chunk is None or chunk.rows < DRAINS_WELL * len(missing)):
            found = _base(costs, outlook, seen, consumers, goal, chosen)
            if found is None:
                continue
            if found != base:
                base, missing = found, _missing(consumers, found)
                if not outlook.fits(base):  # its own balcony lags behind: first that, from the exit at hand
                    behind = seen.balcony_rows[base] - seen.stage_rows[base]
                    base, missing = preferred, [_Consumer(base, True, behind, behind)]
                chunk = _chunk(costs, outlook, seen, missing, base)
                entry_ms = _entry_ms(costs, outlook, seen, missing, goal)
        sprint = sprinting or base < chosen
        if entry_ms <= late_ms and (sprint or chunk is not None):
            if chunk is None:  # its first step pays for its balcony's rows, or a slow token left no slack
                return Way(base, goal, sprint)
            unit = (costs.balconies if chunk.balcony else costs.stages)[chunk.stage]
            price_ms = unit.pass_ms(chunk.rows, seen.context_length, 1 if chunk.balcony else None)
            return Way(base, goal, sprint, chunk, price_ms)
    return None


def _missing(consumers: list[_Consumer], base: int) -> list[_Consumer]:
    """Those that a token at ``base`` adds a row to."""
    return [consumer for consumer in consumers if consumer.unit > base or consumer.balcony]


def _entry_ms(costs: CostModel, outlook: Outlook, seen: Observation, missing: list[_Consumer], goal: int) -> float:
    """Price of the goal's step with what the consumers on the way are left with."""
    entry_ms = outlook.steady_ms[goal] + costs.switch_ms
    for order, consumer in enumerate(missing, start=1):
        unit, queries = consumer.cost(costs), consumer.queries
        entry_ms += unit.pass_ms(1 + order * len(missing), seen.context_length, queries)
        entry_ms -= unit.pass_ms(1, seen.context_length, queries)
    return entry_ms


def _consumers(seen: Observation, goal: int) -> list[_Consumer]:
    rows, kept = seen.stage_rows, seen.balcony_rows
    found = [_Consumer(i, False, rows[i] - 1, rows[i] - rows[i - 1]) for i in range(1, goal + 1)]
    if kept[goal] > rows[goal]:
        found.append(_Consumer(goal, True, kept[goal] - 1, kept[goal] - rows[goal]))
    return found


def _chunk(
    costs: CostModel, outlook: Outlook, seen: Observation, missing: list[_Consumer], base: int
) -> CatchUp | None:
    """Rows for the slack of a token at ``base``: those of the shallowest consumer that fill it, or of the one that comes
    closest; None where none fits.
    """
    slack_ms, best, fullest = _room_ms(outlook, base) - outlook.now_ms[base], None, 0.0
    for consumer in missing:
        if consumer.ready <= len(missing):
            continue
        most = consumer.cost(costs).rows_within(
            slack_ms, max(consumer.ready, PLENTY), seen.context_length, consumer.queries
        )
        filled = min(consumer.ready / most, 1.0) if most else 0.0
        if filled > fullest:
            fullest, best = filled, CatchUp(consumer.unit, min(consumer.ready, most), consumer.balcony)
            if filled == 1:
                break
    return best


def _room_ms(outlook: Outlook, base: int) -> float:
    """Of a step with a chunk next to it."""
    return min(outlook.room_ms[base], outlook.room_ms[-1])


def _base(
    costs: CostModel, outlook: Outlook, seen: Observation, consumers: list[_Consumer], goal: int, chosen: int
) -> int | None:
    """The exit from which the backlog on the way to ``goal`` is worked off at the least loss of depth; None: from none."""
    best, least = None, math.inf
    for base in range(chosen, outlook.lowest - 1, -1):
        tokens = _tokens(costs, outlook, seen, consumers, base)
        won = (costs.exits[goal] - costs.exits[chosen]) * (max(seen.context_length, HORIZON) - tokens)
        if base < chosen and not won > (costs.exits[chosen] - costs.exits[base]) * tokens:
            continue
        loss = (costs.exits[goal] - costs.exits[base]) * tokens
        if loss * (1.0 if best is None else ADVANTAGE) < least:
            best, least = base, loss
    return best


def _tokens(costs: CostModel, outlook: Outlook, seen: Observation, consumers: list[_Consumer], base: int) -> float:
    """Tokens at a base until the backlog is worked off; infinite where that never happens."""
    # what its first step has pending is paid once, and is left out
    slack_ms, busy, work = _room_ms(outlook, base) - outlook.steady_ms[base], 0.0, 0.0
    for consumer in _missing(consumers, base):
        rows = consumer.cost(costs).rows_within(slack_ms, PLENTY, seen.context_length, consumer.queries)
        if not rows:
            return math.inf
        busy, work = busy + 1 / rows, work + consumer.pending / rows
    return work / (1 - busy) if busy <= BUSY else math.inf
