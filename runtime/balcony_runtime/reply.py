"""What a user sees of a generation: a token, a stream of tokens, a finished reply.

Owns these types and the ways in which a stream is consumed: iterated, iterated asynchronously, cancelled from any thread.
How tokens come about is :mod:`balcony_runtime.decoding.loop`.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from balcony_edge.control.decision import Decision
from balcony_edge.control.verdict import Verdict, Watch

FinishReason = Literal["stop", "length", "cancelled"]


class Token(NamedTuple):
    """One token of a stream.

    Attributes:
        id: of the token.
        text: that it completes; empty while a character or a stop string may be unfinished, and for the end of sequence.
        exit_layer: depth that it was computed at.
        latency_ms: gap to the token before; for the first one, time to first token.
        predicted_ms: what the controller expected; None without a target.
        target_ms: the budget's ``tpot_ms`` when it was made.
        caught_up_rows: rows of deeper stages that were worked off in the same gap, switches included.
        pending_rows: rows that the deepest stage has not seen yet.
        decision: the controller's: pace, probability, what was infeasible.
        logprob: its log-probability under the exit that made it, where it was asked for.
        top_logprobs: the most likely tokens at this place and their log-probabilities, where they were asked for.
        finish_reason: on the last token: ``stop`` (end of sequence or a stop string) or ``length``.
    """

    id: int
    text: str
    exit_layer: int
    latency_ms: float
    predicted_ms: float | None
    target_ms: float | None
    caught_up_rows: int
    pending_rows: int
    decision: Decision
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None

    @property
    def reason(self) -> str:
        """Why this exit, in one line."""
        return self.decision.reason

    @property
    def late(self) -> bool:
        """Whether a target was missed."""
        return self.target_ms is not None and self.latency_ms > self.target_ms

    def to_dict(self) -> dict[str, Any]:
        """Its fields and the reason as JSON-ready values; of the decision, the pace alone."""
        values = self._asdict()
        decision: Decision = values.pop("decision")
        return {**values, "reason": decision.reason, "period_ms": decision.period_ms, "infeasible": decision.infeasible}


@dataclass(frozen=True, slots=True)
class Reply:
    """A generation so far: its text, its tokens and what they cost; ``finish_reason`` is None while it goes on.

    ``verdicts`` says of each key of the budget whether it was held.
    """

    text: str
    tokens: tuple[Token, ...]
    prompt_tokens: int
    finish_reason: FinishReason | None
    verdicts: tuple[Verdict, ...] = ()

    @property
    def ttft_ms(self) -> float | None:
        """Time to first token; None before there is one."""
        return self.tokens[0].latency_ms if self.tokens else None

    @property
    def tokens_per_exit(self) -> dict[int, int]:
        """Exit layer → number of tokens, deepest first."""
        return dict(sorted(Counter(token.exit_layer for token in self.tokens).items(), reverse=True))

    @property
    def mean_tpot_ms(self) -> float | None:
        """Mean gap between tokens; None for a single token."""
        gaps = [token.latency_ms for token in self.tokens[1:]]
        return sum(gaps) / len(gaps) if gaps else None

    @property
    def unseen_tokens(self) -> int:
        """Tokens at which a ceiling of the budget was not held, because nothing measured it."""
        return sum(token.decision.unseen for token in self.tokens)

    @property
    def late_tokens(self) -> int:
        """Tokens after the first that missed the target which held for them."""
        return sum(token.late for token in self.tokens[1:])


class TokenStream(Iterator[Token]):
    """Tokens as they are made. Belongs to one thread at a time; :meth:`cancel` may be called from any.

    Args:
        tokens: where they come from; closed with the stream.
        prompt_tokens: of the prompt.
        cancelled: set by :meth:`cancel`; whoever makes the tokens ends when it is set.
        watch: told of each token by whoever makes them; says afterwards whether the budget was held.
    """

    def __init__(
        self, tokens: Iterator[Token], prompt_tokens: int, cancelled: threading.Event, watch: Watch | None = None
    ) -> None:
        self._source, self._prompt_tokens, self.cancelled = tokens, prompt_tokens, cancelled
        self.watch = watch or Watch()
        self._tokens: list[Token] = []
        self._finish_reason: FinishReason | None = None
        self._step = threading.RLock()  # held by whoever is inside of the source

    def __next__(self) -> Token:
        with self._step:
            try:
                token = next(self._source)
            except StopIteration:
                if self._finish_reason is None:
                    self._finish_reason = "cancelled"
                raise
            self._tokens.append(token)
            self._finish_reason = token.finish_reason
            return token

    async def __aiter__(self) -> AsyncIterator[Token]:
        """Iterate without blocking the event loop: each step runs in a worker thread."""
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, self, None))
            try:
                token = await asyncio.shield(step)
            except asyncio.CancelledError:
                self.cancel()
                await asyncio.wait([step])  # without blocking the loop; a second cancellation leaves it to close()
                raise
            if token is None:
                return
            yield token

    @property
    def reply(self) -> Reply:
        """What was generated so far."""
        text = "".join(token.text for token in self._tokens)
        return Reply(text, tuple(self._tokens), self._prompt_tokens, self._finish_reason, self.watch.verdicts())

    def cancel(self) -> None:
        """End the stream before its next token; from any thread."""
        self.cancelled.set()

    def close(self) -> None:
        """End the stream and free its sequence, after the step that another thread may be in."""
        self.cancel()
        with self._step:
            if self._finish_reason is None:
                self._finish_reason = "cancelled"
            if (close := getattr(self._source, "close", None)) is not None:
                close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
