"""A stream as the joint decision sees it: its exits, and its targets in milliseconds at slowdown 1.

Owns what follows from a budget and the slowdown. It decides nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from balcony_edge.budget import Budget
from balcony_edge.control.company.seen import StreamSeen, StreamState
from balcony_edge.control.controller import quantile_of
from balcony_edge.control.deadline import UNSEEN_LOAD
from balcony_edge.control.slowdown import Slowdown

#: Tokens that a reply is taken to have at least, when the share that may be late is reckoned.
LEAST_MADE = 10
#: State of a stream that has none yet: the deepest exit, which it may leave at once.
_NEW = StreamState(at=None, goal=1 << 30, tokens=1 << 30)


class View(NamedTuple):
    """A stream and what follows from its budget, in milliseconds at slowdown 1.

    Attributes:
        stream: the stream.
        lowest, highest: indices of the exits allowed.
        period_ms: longest gap between its tokens; infinite without a target.
        room_ms: time until it is due.
        waited_ms: time since it asked for its token.
        at: exit of its last token, or the deepest without pending rows; None before the first token.
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
    def may_be_late(self) -> bool:
        """Whether its next token may miss ``tpot_ms``: the probability asked for leaves a share of tokens that do."""
        if self.stream.budget.tpot_ms is None:
            return True
        share = (1 - self.stream.budget.probability) * max(self.stream.made_tokens, LEAST_MADE)
        return self.room_ms > 0 and self.stream.late + 1 <= round(share, 6)

    @property
    def gives_way(self) -> bool:
        """Whether a prompt that nothing hurries may take a round in its place: a deadline has no tokens that may be late."""
        return self.may_be_late and (self.bound_ms == math.inf or self.stream.budget.tpot_ms is not None)

    @property
    def first(self) -> bool:
        """Whether its prompt is still to be run."""
        return self.stream.made_tokens == 0

    @property
    def bound_ms(self) -> float:
        """Time until it is due, if anything can be promised."""
        return self.room_ms if self.met else math.inf

    @property
    def present(self) -> int:
        """Exit of its next token, unless there is time for a deeper one or too little for this one."""
        return self.goal if self.at is None else min(self.goal, max(self.at, self.lowest))


def view_of(
    stream: StreamSeen,
    known: StreamState | None,
    bounds: tuple[int, int],
    scale: float,
    now_s: float,
    *,
    alone: bool = False,
) -> View:
    """The view of a stream.

    Args:
        stream: what was seen of it.
        known: its state; None for a new one.
        bounds: indices of the shallowest and deepest exit that it may use now.
        scale: :func:`scale_of` for the probability of its budget.
        now_s: present time.
        alone: whether it may have stepped by itself since the last round.
    """
    _, budget, _, stage_rows, _, made_tokens, started_s, asked_s, _, _, _ = stream
    lowest, highest = bounds
    waited_ms = 1000 * (now_s - asked_s)
    period_ms = budget.tpot_ms or math.inf
    if budget.deadline_s is not None and made_tokens < (budget.expected_tokens or 0):
        left_ms = 1000 * (budget.deadline_s - (now_s - started_s))
        left_ms *= 1 - UNSEEN_LOAD * max(quantile_of(budget.probability), 0.0)
        period_ms = min(period_ms, max(left_ms, 0.0) / ((budget.expected_tokens or 0) - made_tokens))
    room_ms = period_ms - waited_ms
    if not made_tokens:
        room_ms = math.inf if budget.ttft_ms is None else budget.ttft_ms - 1000 * (now_s - started_s)
    at, goal, tokens, met = _NEW if known is None else known
    # The exit of a token that it made by itself has no more rows due than stage 0. After a round forced tokens may have more:
    # their rows come in portions.
    if made_tokens and (at is None or alone):
        up_to_date = sum(due == stage_rows[0] for due in stage_rows) - 1
        at = up_to_date if at is None else min(at, up_to_date)
    return View(
        stream,
        lowest,
        highest,
        period_ms * scale,
        max(room_ms, 0.0) * scale,
        waited_ms * scale,
        None if at is None else min(at, highest),
        max(min(goal, highest), lowest),
        met,
        tokens,
    )


def scale_of(slowdown: Slowdown, probability: float) -> float:
    """Factor from milliseconds to milliseconds at slowdown 1 that hold with a probability."""
    return math.exp(-slowdown.mean - quantile_of(probability) * slowdown.deviation)


def targets_of(budget: Budget, first: bool = True) -> str:
    """The latency targets of a budget, in words; for a token that is not the first, without ``ttft_ms``."""
    asked = ("tpot_ms", "ttft_ms", "deadline_s") if first else ("tpot_ms", "deadline_s")
    keys = [key for key in asked if getattr(budget, key) is not None]
    return " and ".join(f"{key} = {getattr(budget, key):g}" for key in keys) or "its ceilings"
