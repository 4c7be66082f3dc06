"""Catching up: how the controller returns to a deeper exit whose stages have pending rows (a backlog).

Owns three answers: at which exit the tokens are made meanwhile (the *base*), which rows run next to a token (the *chunk*),
and when the deeper exit (the *goal*) is entered. Pure arithmetic over prices and room. The other rules of switching are
in :mod:`.controller`.

A goal is an exit that would hold the target if it had no backlog. Each token at the base adds one row to each of the m
consumers (stages, and the goal's balcony) on the way to the goal. The slack of a token at the base has time for r_i rows
of consumer i. A row needs 1 / r_i tokens at each consumer, so the backlog shrinks if the sum of 1 / r_i is below 1.

    base    The present exit, if its slack shrinks the backlog. A shallower exit if that costs less depth in all (a
            *sprint*): the first row of a pass reads the stage's weights, and in int4 a full step may leave no time for
            two such reads. A sprint must pay within as many tokens as the sequence has rows, or within ``HORIZON``.
            The length of a reply is unknown, so the estimate is that it goes on for as long as it has lasted
    chunk   Rows of the shallowest consumer whose rows fill the slack, so that first rows are paid for as rarely as
            possible. A consumer gets no chunk until it has more than m rows
    entry   When no consumer needs a chunk. The goal's step then has a few rows more than its own. If it fits, it is
            within the target; otherwise one token may take up to ``OVERDRAFT`` targets, if there is credit for it

A sprint lasts until its goal is entered, would no longer hold the target, or comes no closer. After each sprint the next
one must wait, twice as long every time, until the deepest exit has been held for a while. Without the wait, exits would
alternate if the goal's price is too low, or if the target is within the noise of its price.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from balcony_edge.control.decision import CatchUp, Measurement, Observation, Outlook
from balcony_edge.control.governor import unhurried_ms
from balcony_edge.control.slowdown import WITH_CATCH_UP, Slowdown
from balcony_edge.device.costs import CostModel, UnitCost

#: Rows of one portion of the work in a wait. A wait can end after each portion.
IDLE_ROWS = 8
#: Waits in which a portion's time counts for a third of what it took. A long one ends the work in waits that are shorter; no
#: other would be timed if it counted for ever.
PORTION_MEMORY = 256
#: Largest cost of a late token at the entry, in rooms of its exit. A backlog that was worked off from the shallowest of
#: four exits leaves up to nine rows at the deepest stage. In int4, where a further row costs a quarter of the first,
#: these take 1.9 targets.
OVERDRAFT = 2.0
#: Largest share of the tokens' slack for new rows. The rest drains the backlog, at a tenth of its full speed or more.
BUSY = 0.9
#: Rows of a chunk per missing consumer that drain the backlog well enough: no other base is considered then.
DRAINS_WELL = 3
#: Factor by which another base must lose less depth on the way, because prices of further rows are the least certain.
ADVANTAGE = 1.5
#: Smallest number of tokens within which a sprint must pay.
HORIZON = 512
#: Rows beyond which the slack of a token counts as plenty.
PLENTY = 64


#: Share of the late tokens allowed by the probability that may be used to enter a deeper exit. Noise takes the others.
CREDIT_SHARE = 0.5
#: Wait before the second sprint, in tokens, and how often that wait may double.
FIRST_WAIT, MOST_DOUBLINGS = 64, 4
#: Tokens in a row at the deepest exit after which earlier sprints, and the wait for the next one, are forgotten.
HELD = 64


class Recovery(NamedTuple):
    """State of catching up that is kept from token to token.

    Attributes:
        credit: late tokens that the asked probability has left over, at most one. Each token adds a fraction, and a
            late token subtracts one. From 1 on, one late token may be used to enter a deeper exit.
        goal: exit layer at which the present sprint ends; None without a sprint.
        wait: tokens until another sprint may begin.
        sprints: sprints since the deepest exit was last held.
    """

    credit: float = 1.0
    goal: int | None = None
    wait: int = 0
    sprints: int = 0

    def counted(self, last: Measurement | None, tpot_ms: float, probability: float, held: int) -> Recovery:
        """Return the state after a token with measurement ``last``.

        ``held`` is the number of tokens in a row at the deepest exit.
        """
        credit, sprints = self.credit, self.sprints
        wait = self.wait if self.goal is not None else max(self.wait - 1, 0)
        if held >= HELD:  # a load that comes now is another one
            sprints = wait = 0
        if last is not None and tpot_ms < math.inf:
            late = 1.0 if last.measured_ms > tpot_ms else 0.0
            credit = min(max(credit + CREDIT_SHARE * (1 - probability) - late, -1.0), 1.0)
        if (credit, wait, sprints) == (self.credit, self.wait, self.sprints):
            return self
        return Recovery(credit, self.goal, wait, sprints)

    def towards(self, goal: int | None) -> Recovery:
        """Return the state with the goal of the next token's sprint, or with None if that token is not part of one."""
        if goal == self.goal:
            return self
        if self.goal is not None or goal is None:
            return self._replace(goal=goal)
        doublings = min(self.sprints, MOST_DOUBLINGS)
        return self._replace(goal=goal, wait=FIRST_WAIT << doublings, sprints=doublings + 1)


class Way(NamedTuple):
    """The next token on the way to a goal; exits are given as indices.

    Attributes:
        exit: exit at which the token is made.
        goal: exit to be reached; the same as ``exit`` when the goal is entered.
        sprint: whether the token is part of a sprint.
        chunk: rows to run next to the token.
        chunk_ms: price of the chunk.
    """

    exit: int
    goal: int
    sprint: bool = False
    chunk: CatchUp | None = None
    chunk_ms: float = 0.0

    def words(self, exits: tuple[int, ...]) -> str:
        """Explanation for the reason of a decision."""
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
    ready: int  # pending rows whose input is available
    cost: UnitCost

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
    """Return the next token on the way to the deepest exit that would hold the target, or None if there is no way.

    Args:
        costs: cost model.
        outlook: prices and room that the decision weighs.
        seen: observation that the decision is made from.
        chosen: exit index of the token without catching up.
        present: exit index of the previous token if that was part of a sprint, else None.
        credit: whether one token may be late.
        may_sprint: whether a sprint may begin.
    """
    if present is not None and outlook.lowest <= present <= chosen and outlook.fits(present):
        way = _onward(costs, outlook, seen, chosen, present, credit)
        if way is not None:
            return way
        may_sprint = False  # the sprint was given up because the load has changed
    way = _towards(costs, outlook, seen, chosen, False, may_sprint)
    if way is None and credit:  # use a late token only if there is no other way
        way = _towards(costs, outlook, seen, chosen, True, may_sprint)
    return way


def _onward(costs: CostModel, outlook: Outlook, seen: Observation, chosen: int, base: int, credit: bool) -> Way | None:
    """Return the next token of a sprint at ``base``, or None if the sprint reaches no goal any more."""
    for goal in range(outlook.highest, chosen, -1):
        # To begin, a sprint also needs the hysteresis free; to go on, it needs only the target.
        if not outlook.holds(goal):
            continue
        if outlook.fits(goal):
            return None
        consumers = _consumers(costs, seen, goal)
        missing = _missing(consumers, base)
        entry_ms, room_ms = _entry_ms(costs, outlook, seen, missing, goal), outlook.room_ms[goal]
        if _worked_off(missing):
            if credit and outlook.may_rise and outlook.now_ms[goal] <= room_ms * OVERDRAFT:
                return Way(goal, goal)
            continue
        if entry_ms <= room_ms * OVERDRAFT and _tokens(outlook, seen, consumers, base) < math.inf:
            # There is no chunk if a slow token left no slack.
            return _with_chunk(costs, seen, base, goal, True, _chunk(outlook, seen, missing, base))
    return None


def _towards(
    costs: CostModel, outlook: Outlook, seen: Observation, chosen: int, credit: bool, may_sprint: bool
) -> Way | None:
    """Return the next token on the way to the deepest goal that can be reached.

    ``credit`` says whether the token that enters the goal may be late.
    """
    for goal in range(outlook.highest, chosen, -1):
        if not outlook.may_enter[goal]:
            continue
        if outlook.fits(goal):  # the exit waits only for the dwell
            return None
        consumers, room_ms = _consumers(costs, seen, goal), outlook.room_ms[goal]
        late_ms = room_ms * OVERDRAFT if credit else room_ms
        missing = _missing(consumers, chosen)
        entry_ms = _entry_ms(costs, outlook, seen, missing, goal)
        if _worked_off(missing):
            if outlook.may_rise and room_ms < entry_ms and outlook.now_ms[goal] <= late_ms:
                return Way(goal, goal)
            continue
        chunk = _chunk(outlook, seen, missing, chosen)
        if not may_sprint or (chunk is not None and chunk.rows >= DRAINS_WELL * len(missing)):
            if chunk is not None and entry_ms <= late_ms:
                return _with_chunk(costs, seen, chosen, goal, False, chunk)
            continue
        base = _base(costs, outlook, seen, consumers, goal, chosen)
        if base is None:
            continue
        missing = _missing(consumers, base)
        if _entry_ms(costs, outlook, seen, missing, goal) > late_ms:
            continue
        # If the base's own balcony has a backlog, work that off first, from the present exit.
        if base < chosen and not outlook.fits(base):
            behind = seen.balcony_rows[base] - seen.stage_rows[base]
            base, missing = chosen, [_Consumer(base, True, behind, behind, costs.balconies[base])]
        chunk = _chunk(outlook, seen, missing, base)
        if chunk is not None or base < chosen:  # the first step of a sprint pays for its balcony's rows
            return _with_chunk(costs, seen, base, goal, base < chosen, chunk)
    return None


def _worked_off(missing: list[_Consumer]) -> bool:
    """Whether no consumer has more rows than the price of an entry allows for."""
    return all(consumer.pending <= order * len(missing) for order, consumer in enumerate(missing, start=1))


def _with_chunk(costs: CostModel, seen: Observation, base: int, goal: int, sprint: bool, chunk: CatchUp | None) -> Way:
    if chunk is None:
        return Way(base, goal, sprint)
    unit = (costs.balconies if chunk.balcony else costs.stages)[chunk.stage]
    return Way(base, goal, sprint, chunk, unit.pass_ms(chunk.rows, seen.context_length, 1 if chunk.balcony else None))


def _missing(consumers: list[_Consumer], base: int) -> list[_Consumer]:
    """Consumers to which a token at ``base`` adds a row."""
    return [consumer for consumer in consumers if consumer.unit > base or consumer.balcony]


def _entry_ms(costs: CostModel, outlook: Outlook, seen: Observation, missing: list[_Consumer], goal: int) -> float:
    """Price of the goal's step with the rows that are still pending at the consumers on the way."""
    entry_ms = outlook.steady_ms[goal] + costs.switch_ms
    for order, consumer in enumerate(missing, start=1):
        unit, queries = consumer.cost, consumer.queries
        entry_ms += unit.pass_ms(1 + order * len(missing), seen.context_length, queries)
        entry_ms -= unit.pass_ms(1, seen.context_length, queries)
    return entry_ms


def _consumers(costs: CostModel, seen: Observation, goal: int) -> list[_Consumer]:
    rows, kept = seen.stage_rows, seen.balcony_rows
    found = [_Consumer(i, False, rows[i] - 1, rows[i] - rows[i - 1], costs.stages[i]) for i in range(1, goal + 1)]
    if kept[goal] > rows[goal]:
        found.append(_Consumer(goal, True, kept[goal] - 1, kept[goal] - rows[goal], costs.balconies[goal]))
    return found


def _chunk(outlook: Outlook, seen: Observation, missing: list[_Consumer], base: int) -> CatchUp | None:
    """Return the rows that fill the slack of a token at ``base``, or None if no row fits.

    They belong to the shallowest consumer with enough rows, or to the consumer whose rows fill most of the slack.
    """
    slack_ms, best, fullest = _room_ms(outlook, base) - outlook.now_ms[base], None, 0.0
    for consumer in missing:
        if consumer.ready <= len(missing):
            continue
        most = consumer.cost.rows_within(slack_ms, max(consumer.ready, PLENTY), seen.context_length, consumer.queries)
        filled = min(consumer.ready / most, 1.0) if most else 0.0
        if filled > fullest:
            fullest, best = filled, CatchUp(consumer.unit, min(consumer.ready, most), consumer.balcony)
            if filled == 1:
                break
    return best


def _room_ms(outlook: Outlook, base: int) -> float:
    """Room of a step with a chunk next to it."""
    return min(outlook.room_ms[base], outlook.room_ms[WITH_CATCH_UP])


def _base(
    costs: CostModel, outlook: Outlook, seen: Observation, consumers: list[_Consumer], goal: int, chosen: int
) -> int | None:
    """Return the exit from which the backlog before ``goal`` is worked off at the least loss of depth, or None."""
    best, least = None, math.inf
    for base in range(chosen, outlook.lowest - 1, -1):
        tokens = _tokens(outlook, seen, consumers, base)
        won = (costs.exits[goal] - costs.exits[chosen]) * (max(seen.context_length, HORIZON) - tokens)
        if base < chosen and not won > (costs.exits[chosen] - costs.exits[base]) * tokens:
            continue
        loss = (costs.exits[goal] - costs.exits[base]) * tokens
        if loss * ADVANTAGE < least:
            best, least = base, loss
    return best


def _tokens(outlook: Outlook, seen: Observation, consumers: list[_Consumer], base: int) -> float:
    """Tokens at a base until the backlog is worked off; infinite if that never happens."""
    # The pending rows of the base's first step are paid once and are left out.
    slack_ms, busy, work = _room_ms(outlook, base) - outlook.steady_ms[base], 0.0, 0.0
    for consumer in _missing(consumers, base):
        rows = consumer.cost.rows_within(slack_ms, PLENTY, seen.context_length, consumer.queries)
        if not rows:
            return math.inf
        busy, work = busy + 1 / rows, work + consumer.pending / rows
    return work / (1 - busy) if busy <= BUSY else math.inf


def paused_rooms(
    seen: Observation, slowdown: Slowdown, steady_ms: Sequence[float], room_ms: Sequence[float], share: float
) -> list[float]:
    """The rooms of a step, of which rows that only a deeper exit has pending leave time for the pause after it.

    Args:
        seen: observation.
        slowdown: slowdown filter.
        steady_ms: price of each exit without pending rows, which fits as before.
        room_ms: room of each exit, and of a step with catch-up.
        share: share of the time in which steps run, as the ceilings allow.
    """
    longest_ms = unhurried_ms(seen.budget, share, seen.needed_tps) / slowdown.factor
    prices = zip((*seen.stage_rows, math.inf), room_ms, (*steady_ms, 0.0), slowdown.offsets, strict=True)
    return [
        room if rows == seen.stage_rows[0] else min(room, max(longest_ms * math.exp(-offset), price))
        for rows, room, price, offset in prices
    ]
