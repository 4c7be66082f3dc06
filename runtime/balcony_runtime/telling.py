"""From steps to tokens: text, stop strings, limits and log-probabilities of one reply.

Owns what ends a reply and what a :class:`~balcony_runtime.reply.Token` says. It does not know how steps are made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from balcony_edge.device.readings import Reading
from balcony_edge.errors import InfeasibleError, InputError, shown
from balcony_runtime.decoding.loop import Decoder, Step
from balcony_runtime.decoding.sampling import log_probabilities
from balcony_runtime.reply import FinishReason, Token
from balcony_runtime.structure.marks import overlap

if TYPE_CHECKING:
    from balcony_runtime.requests import Request


class StopStrings:
    """Finds stop strings in streamed text and holds back text that may become one.

    Args:
        stops: strings that end the text; may be empty.

    Raises:
        InputError: a stop string is empty; it would end every text at once; or it is not valid Unicode, which no text has.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        listed = isinstance(stops, Iterable) and not isinstance(stops, str)
        self._stops = tuple(stops) if listed else ()
        if not listed or any(not isinstance(stop, str) or not stop for stop in self._stops):
            raise InputError(f"stop = {shown(stops)}: must be a list of non-empty strings: give e.g. ['\\n']")
        try:
            "".join(self._stops).encode()
        except UnicodeEncodeError:  # invalid bytes of an argument, or half of a pair in JSON
            raise InputError("stop: is not valid UTF-8, and no reply has such a text: give it as UTF-8") from None
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """``(text that is safe to show, whether a stop string was met)``; text after a stop string is dropped."""
        if not self._stops:
            return text, False
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        cut = len(self._held) - max(overlap(self._held, stop) for stop in self._stops)
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """Text that was held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held


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
    # A field costs cold cache lines at each token, so fields are read once, or all together.
    text, stop, watch, cancelled = asked.text, asked.stop, asked.watch, asked.cancelled
    most, ends, logprobs = asked.max_new_tokens, asked.ends, asked.logprobs
    marks: frozenset[int] = frozenset() if asked.box is None else asked.box.marks
    known, timed = None, False
    for count in range(1, most + 1):
        if cancelled.is_set():
            return
        try:
            step = next(steps, None)
        except InfeasibleError:
            watch.saw(time.monotonic(), readings() if asked.limits.resolved.needs_sensors else ())
            raise
        if step is None or cancelled.is_set():  # also while it waited for its turn or its pace
            return
        ids, logits, decision, target_ms, latency_ms, caught_up_rows, budget, read, read_s, forced = step
        if count == 1:
            asked.cached = decoder.kept_rows
        asked.told = count
        if budget is not known:
            # A deadline, the wait for a pace and energy run while the reader is at a token; the gaps do not have that time.
            timed_keys = (budget.deadline_s, budget.max_pace_tps, budget.energy_j_per_token)
            known, timed = budget, any(value is not None for value in timed_keys)
        elapsed_s = time.monotonic() - decoder.started_s if timed else None
        watch.token(budget, read_s, latency_ms, read, first=count == 1, elapsed_s=elapsed_s)
        token = ids.item()
        finish: FinishReason | None = "stop" if token in ends else "length" if count == most else None
        piece = "" if finish == "stop" else text.push(token)
        piece, hit = stop.push(piece + (text.flush() if finish is not None else ""))
        if hit:
            finish = "stop"
        elif finish is not None or token in marks:  # no stop string goes over the mark of a call
            piece += stop.flush()
        if finish is not None and budget.needs_sensors:  # the step's readings are of the time before it
            watch.saw(time.monotonic(), readings())
        log_p: float | None = None
        best: tuple[tuple[int, float], ...] = ()
        if logprobs is not None and logits is not None:
            (log_p,), (best,) = log_probabilities(logits, ids, logprobs)
        yield Token(
            token,
            piece,
            decision.exit_layer,
            latency_ms,
            decision.predicted_ms if target_ms is not None else None,
            target_ms,
            caught_up_rows,
            decoder.sequence.pending_rows,
            decision,
            log_p,
            best,
            finish,
            forced,
        )
        if finish is not None:
            return
