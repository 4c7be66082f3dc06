"""From steps to tokens: text, stop strings, limits and log-probabilities of one reply.

Owns what ends a reply and what a :class:`~balcony_runtime.reply.Token` says. It does not know how steps are made.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from balcony_edge.control.trace import TraceWriter
from balcony_edge.control.verdict import Watch
from balcony_edge.device.readings import Reading
from balcony_edge.errors import InfeasibleError
from balcony_runtime.decoding.loop import Step
from balcony_runtime.decoding.sampling import Sampler, log_probabilities
from balcony_runtime.engine import TokenSequence
from balcony_runtime.reply import FinishReason, Limits, Token
from balcony_runtime.text import StopStrings, TextStream


class Request(NamedTuple):
    """Checked arguments of one reply.

    Attributes:
        ids: tokens of the prompt.
        limit: largest number of tokens to make.
        sampler: sampler that picks the tokens.
        stop: finder of the strings that end the reply.
        logprobs: number of likeliest tokens to report at each place; None without log-probabilities.
        ends: tokens that end the reply.
        trace: record of the run.
    """

    ids: list[int]
    limit: int
    sampler: Sampler
    stop: StopStrings
    logprobs: int | None
    ends: frozenset[int]
    trace: TraceWriter | None


def told(
    steps: Iterator[Step],
    sequence: TokenSequence,
    asked: Request,
    limits: Limits,
    cancelled: threading.Event,
    watch: Watch,
    text: TextStream,
    readings: Callable[[], tuple[Reading, ...]],
) -> Iterator[Token]:
    """The tokens of a reply, until it ends by itself, by a limit, or because it was cancelled.

    Args:
        steps: steps of the decoder.
        sequence: its sequence.
        asked: what was asked for.
        limits: budget of the reply.
        cancelled: event that ends the reply before its next token.
        watch: record of the budget.
        text: decoder of the text.
        readings: gives the latest reading of every sensor.
    """
    stop = asked.stop
    for count in range(1, asked.limit + 1):
        if cancelled.is_set():
            return
        try:
            step = next(steps)
        except InfeasibleError:
            watch.saw(time.monotonic(), readings() if limits.resolved.needs_sensors else ())
            raise
        watch.token(step.budget, step.read_s, step.latency_ms, step.readings, first=count == 1)
        token = int(step.ids[0])
        finish: FinishReason | None = "stop" if token in asked.ends else "length" if count == asked.limit else None
        piece = "" if finish == "stop" else text.push(token)
        piece, hit = stop.push(piece + (text.flush() if finish is not None else ""))
        if hit:
            finish = "stop"
        elif finish is not None:
            piece += stop.flush()
        log_p, best = None, ()  # type: float | None, tuple[tuple[int, float], ...]
        if asked.logprobs is not None and step.logits is not None:
            log_p, best = log_probabilities(step.logits[0], token, asked.logprobs)
        decision = step.decision
        yield Token(
            token,
            piece,
            decision.exit_layer,
            step.latency_ms,
            decision.predicted_ms if step.target_ms is not None else None,
            step.target_ms,
            step.caught_up_rows,
            sequence.pending_rows,
            decision,
            log_p,
            best,
            finish,
        )
        if finish is not None:
            return
