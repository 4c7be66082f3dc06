"""Records of a joint decision: its input, its state and its result.

Owns the types that pass between the scheduler, the joint controller and the trace. It decides nothing. A *round* is one shared
step: some streams get a token each, and their passes are shared where they can be.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from balcony_edge.budget import Budget
from balcony_edge.control.decision import Decision, Measurement
from balcony_edge.control.governor import Governor
from balcony_edge.control.slowdown import Slowdown
from balcony_edge.device.readings import Reading


class StreamSeen(NamedTuple):
    """A stream that asks for its next token.

    Attributes:
        key: number of the stream, which no other stream of the process has.
        budget: budget of its next token.
        context_length: number of rows before its last new one.
        stage_rows, balcony_rows: rows due at each stage and balcony for its next token, as in
            :class:`~balcony_edge.control.decision.Observation`; before its first token the rows of the prompt.
        made_tokens: number of tokens of this reply so far.
        started_s: time of the request.
        asked_s: time at which its next token was asked for; time that its reader takes does not count.
        shares: whether its rows share passes with those of others; else its steps run by themselves.
        late: number of its tokens that missed ``tpot_ms``.
        forced_tokens: number of ``made_tokens`` that no step made, because the structure of the reply left no other.
    """

    key: int
    budget: Budget
    context_length: int
    stage_rows: Sequence[int]
    balcony_rows: Sequence[int]
    made_tokens: int
    started_s: float
    asked_s: float
    shares: bool = True
    late: int = 0
    forced_tokens: int = 0


class LearnedAlone(NamedTuple):
    """What streams have learned of the device in steps by themselves, since the last round."""

    slowdown: Slowdown
    governor: Governor


class RoundSeen(NamedTuple):
    """What the scheduler knows before a round.

    Attributes:
        streams: streams that ask for a token.
        last: the last round: its deepest exit, its price, and its measured time; None if it says nothing about the next.
        now_s: present time, on the clock of the streams' times.
        busy_s: time that all replies so far have spent on steps and pending rows.
        readings: latest reading of every sensor.
        learned: what streams have learned by themselves since the last round; None if all steps were rounds.
        absent_ms: longest time for rows next to a round, for streams with tokens that do not ask yet and will in a moment.
    """

    streams: tuple[StreamSeen, ...]
    last: Measurement | None = None
    now_s: float = 0.0
    busy_s: float = 0.0
    readings: tuple[Reading, ...] = ()
    learned: LearnedAlone | None = None
    absent_ms: float = math.inf


class StreamState(NamedTuple):
    """What is kept of a stream from round to round.

    Attributes:
        at: exit index of its last token; None before the first.
        goal: exit index that the present assignment gives it.
        tokens: tokens since its exit last changed.
        met: whether the assignment holds its targets.
    """

    at: int | None
    goal: int
    tokens: int = 0
    met: bool = True


class CompanyState(NamedTuple):
    """State that one joint decision passes to the next.

    Attributes:
        slowdown: slowdown filter; its offsets are those of rounds, by their deepest exit.
        governor: state of the slow loop, which holds for the device as a whole.
        streams: key → state of each stream.
        assigned_for: what the present assignment was made for; another value makes a new one.
        caught_up: whether the last round ran pending rows next to its step.
        round: number of rounds so far.
        prompt_share: share of the time that prompts have taken lately, before the last round.
        prompted: whether the last round ran rows of a prompt.
        decided_s: time of the last decision.
    """

    slowdown: Slowdown = Slowdown()
    governor: Governor = Governor()
    streams: Mapping[int, StreamState] = {}
    assigned_for: tuple[object, ...] = ()
    caught_up: bool = False
    round: int = 0
    prompt_share: float = 0.0
    prompted: bool = False
    decided_s: float = 0.0

    def without(self, keys: Collection[int]) -> CompanyState:
        """The state after some streams have ended."""
        if not keys:
            return self
        return self._replace(streams={key: one for key, one in self.streams.items() if key not in keys})


class Chunk(NamedTuple):
    """Pending rows of one stream that run through one stage next to a round.

    With ``balcony`` they go through the balcony of exit index ``stage`` instead, as those of a
    :class:`~balcony_edge.control.decision.CatchUp`.
    """

    key: int
    stage: int
    rows: int
    balcony: bool = False


class Move(NamedTuple):
    """A token of one stream in a round."""

    key: int
    decision: Decision


class Round(NamedTuple):
    """The next round.

    Attributes:
        moves: streams that get a token; empty if the device works off rows only, or waits.
        refused: streams that end with an error, and why (:meth:`Decision.refusal`).
        chunk: rows that run first.
        price_ms: price at slowdown 1, chunk included.
        predicted_ms: expected time.
        wait_ms: time to wait after the round, or before anything is due.
        deepest: deepest exit index of the round.
    """

    moves: tuple[Move, ...] = ()
    refused: tuple[tuple[int, str], ...] = ()
    chunk: Chunk | None = None
    price_ms: float = 0.0
    predicted_ms: float = 0.0
    wait_ms: float = 0.0
    deepest: int = 0
