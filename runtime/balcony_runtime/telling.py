"""From steps to tokens: text, stop strings, limits and log-probabilities of one reply.

Owns what ends a reply and what a :class:`~balcony_runtime.reply.Token` says. It does not know how steps are made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

from balcony_edge.device.readings import Reading
from balcony_edge.errors import InfeasibleError
from balcony_runtime.decoding.loop import Decoder, Step
from balcony_runtime.decoding.sampling import log_probabilities
from balcony_runtime.reply import FinishReason, Token

if TYPE_CHECKING:
    from balcony_runtime.requests import Request


def told(
    steps: Iterator[Step], decoder: Decoder, asked: Request, readings: Callable[[], tuple[Reading, ...]]
) -> Generator[Token]:
    """The tokens of a reply, until it ends by itself, by a limit, or because it was cancelled.

    Args:
        steps: steps of the decoder.
        decoder: the decoder.
        asked: what was asked for.
        readings: gives the latest reading of every sensor.
    """
    text, stop, marker = asked.text, asked.stop, None if asked.box is None else asked.box.marker_id
    for count in range(1, asked.max_new_tokens + 1):
        if asked.cancelled.is_set():
            return
        try:
            step = next(steps, None)
        except InfeasibleError:
            asked.watch.saw(time.monotonic(), readings() if asked.limits.resolved.needs_sensors else ())
            raise
        if step is None or asked.cancelled.is_set():  # also while it waited for its turn or its pace
            return
        if count == 1:
            asked.prompted.cached = decoder.kept_rows
        asked.prompted.told = count
        asked.watch.token(step.budget, step.read_s, step.latency_ms, step.readings, first=count == 1)
        token = step.ids.item()
        finish: FinishReason | None = (
            "stop" if token in asked.ends else "length" if count == asked.max_new_tokens else None
        )
        piece = "" if finish == "stop" else text.push(token)
        piece, hit = stop.push(piece + (text.flush() if finish is not None else ""))
        if hit:
            finish = "stop"
        elif finish is not None or token == marker:  # no stop string goes over a marker
            piece += stop.flush()
        if finish is not None and step.budget.needs_sensors:  # the step's readings are of the time before it
            asked.watch.saw(time.monotonic(), readings())
        log_p: float | None = None
        best: tuple[tuple[int, float], ...] = ()
        if asked.logprobs is not None and step.logits is not None:
            (log_p,), (best,) = log_probabilities(step.logits, step.ids, asked.logprobs)
        decision = step.decision
        yield Token(
            token,
            piece,
            decision.exit_layer,
            step.latency_ms,
            decision.predicted_ms if step.target_ms is not None else None,
            step.target_ms,
            step.caught_up_rows,
            decoder.pending_rows,
            decision,
            log_p,
            best,
            finish,
            step.forced,
        )
        if finish is not None:
            return
