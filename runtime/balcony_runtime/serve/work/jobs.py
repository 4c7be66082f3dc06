"""Replies in progress as the event loop sees them: items that the decode thread has sent, and the cost so far.

Owns the bounded buffer between the two threads, and the sums that answers, slots and metrics show. A reply whose reader is slow
is paused; nothing here waits for a reader.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from balcony_edge.budget import Budget
from balcony_runtime.reply import Token, TokenStream
from balcony_runtime.requests import Request

#: Tokens in the buffer of a reply from which it is paused, and below which it goes on.
MOST_BUFFERED, FEW_BUFFERED = 64, 16


class Scores(NamedTuple):
    """Log-probabilities of a prompt's tokens.

    Attributes:
        logprobs: of each token after those before it; None for the first.
        best: likeliest tokens at each place with their log-probabilities; empty for the first.
    """

    logprobs: Sequence[float | None]
    best: Sequence[Sequence[tuple[int, float]]]


class Ended(NamedTuple):
    """The end of a reply that makes no tokens."""


Item = Token | Scores | Ended | BaseException


class Channel:
    """Items of one or several replies on their way to an answer. The event loop alone uses it."""

    def __init__(self) -> None:
        self._items: deque[tuple[Job, Item]] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_s = 0.0

    def put(self, job: Job, item: Item) -> None:
        """Add an item."""
        self._items.append((job, item))
        self.wake()

    def wake(self) -> None:
        """Let the reader look around although there is no item."""
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def take(self) -> tuple[Job, Item] | None:
        """The next item, or None."""
        return self._items.popleft() if self._items else None

    async def wait(self, until_s: float) -> None:
        """Wait for an item or :meth:`wake`, or until a time on ``time.monotonic``; may return earlier without any of them."""
        loop = asyncio.get_running_loop()
        # An earlier alarm is left to ring: a new timer for every token is expensive.
        if self._alarm is None or self._alarm_s > until_s:
            self.silence()
            self._alarm, self._alarm_s = loop.call_later(until_s - time.monotonic(), self._ring), until_s
        self._reader = loop.create_future()
        await self._reader

    def silence(self) -> None:
        """Let no alarm ring any more."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _ring(self) -> None:
        self._alarm = None
        self.wake()


class Cost:
    """What a reply has cost so far; of several replies, the sum."""

    def __init__(self, asked_s: float | None = None) -> None:
        self.asked_s = time.monotonic() if asked_s is None else asked_s
        #: Time at which the first of the replies began.
        self.begun_s: float | None = None
        #: Times of the earliest first token and of the latest; of one reply they are equal.
        self.earliest_first_s: float | None = None
        self.latest_first_s: float | None = None
        self.last_s = self.asked_s
        self.tokens, self.gaps, self.gaps_ms, self.late, self.targets = 0, 0, 0.0, 0, 0
        self.per_exit: Counter[int] = Counter()
        self.forced = 0
        self.last: Token | None = None

    def count(self, token: Token) -> None:
        """Count a token that has just arrived."""
        self.last_s = time.monotonic()
        if self.latest_first_s is None:
            self.earliest_first_s = self.latest_first_s = self.last_s
        else:
            self.gaps += 1
            self.gaps_ms += token.latency_ms
            self.late += token.late
            self.targets += token.target_ms is not None
        self.tokens += 1
        self.forced += token.forced
        self.per_exit[token.exit_layer] += not token.forced
        self.last = token

    @property
    def ttft_ms(self) -> float | None:
        """Milliseconds from the request to the first token, waiting included."""
        return None if self.latest_first_s is None else 1000 * (self.latest_first_s - self.asked_s)

    @classmethod
    def of(cls, costs: Sequence[Cost]) -> Cost:
        """The sum of several replies: the time to the slowest first token, and the reason of the last token."""
        if len(costs) == 1:
            return costs[0]
        total = cls(min(cost.asked_s for cost in costs))
        total.begun_s = min((cost.begun_s for cost in costs if cost.begun_s is not None), default=None)
        firsts = [cost.latest_first_s for cost in costs if cost.latest_first_s is not None]
        total.earliest_first_s, total.latest_first_s = min(firsts, default=None), max(firsts, default=None)
        total.last_s = max(cost.last_s for cost in costs)
        for name in ("tokens", "gaps", "gaps_ms", "late", "targets", "forced"):
            setattr(total, name, sum(getattr(cost, name) for cost in costs))
        for cost in costs:
            total.per_exit += cost.per_exit
        total.last = max(costs, key=lambda cost: cost.last_s).last
        return total

    def timings(self, prompt_tokens: int, cached: int) -> dict[str, Any]:
        """llama.cpp's object ``timings``. Its prompt's time has no wait in it: that is in ``ttft_ms``.

        Args:
            prompt_tokens: tokens of the prompts.
            cached: number of these whose rows were there already.
        """
        prompt_tokens -= cached
        first_s = self.last_s if self.earliest_first_s is None else self.earliest_first_s
        begun_s = self.begun_s if self.begun_s is not None and self.earliest_first_s is not None else first_s
        prompt_ms, predicted_ms = 1000 * (first_s - begun_s), 1000 * (self.last_s - first_s)
        return {
            "cache_n": cached,
            "prompt_n": prompt_tokens,
            "prompt_ms": prompt_ms,
            "prompt_per_token_ms": prompt_ms / prompt_tokens if prompt_tokens else None,
            "prompt_per_second": 1000 * prompt_tokens / prompt_ms if prompt_ms else None,
            "predicted_n": self.tokens,
            "predicted_ms": predicted_ms,
            "predicted_per_token_ms": predicted_ms / self.gaps if self.gaps else None,
            "predicted_per_second": 1000 * self.gaps / predicted_ms if predicted_ms else None,
        }

    def facts(self) -> dict[str, Any]:
        """The object ``balcony``, without the verdicts."""
        depth = sum(layer * count for layer, count in self.per_exit.items())
        last = self.last
        return {
            "tokens_per_exit": {str(layer): count for layer, count in sorted(self.per_exit.items(), reverse=True)},
            "mean_depth": depth / self.per_exit.total() if self.tokens else None,
            "forced_tokens": self.forced,
            "late_tokens": self.late if self.targets else None,
            "ttft_ms": self.ttft_ms,
            "mean_tpot_ms": self.gaps_ms / self.gaps if self.gaps else None,
            "exit": None if last is None else last.exit_layer,
            "latency_ms": None if last is None else last.latency_ms,
            "target_ms": None if last is None else last.target_ms,
            "pending_rows": None if last is None else last.pending_rows,
            "reason": None if last is None else last.reason,
        }


@dataclass(eq=False, repr=False)
class Job:
    """One reply of an answer.

    Attributes:
        key: its number, that of its slot.
        index: number of the choice in the answer.
        ids: tokens of the prompt.
        request: the reply to begin; None to score the prompt only.
        budget: its own budget; None for the server's.
        score: number of likeliest tokens to report at each place of the prompt; None not to score it.
        model: name under which it was asked for.
        most_tokens: ``max_tokens`` of the request; None if it has none.
        channel: way of its items, which all replies of the answer share.
        cost, shown: cost of the tokens that were made, and of those that pieces have shown if each tells it.
        stream: its tokens; the decode thread sets it when the reply begins.
        buffered: number of its items in the channel.
        overtaken: number of later requests that began while it waited.
    """

    key: int
    index: int
    ids: Sequence[int]
    request: Request | None
    budget: Budget | None = None
    score: int | None = None
    model: str = ""
    most_tokens: int | None = None
    channel: Channel = field(default_factory=Channel)
    cost: Cost = field(default_factory=Cost)
    shown: Cost = field(default_factory=Cost)
    stream: TokenStream | None = None
    buffered: int = 0
    paused: bool = False
    ended: bool = False
    overtaken: int = 0

    @property
    def begun_s(self) -> float | None:
        """Time at which its work began, be it to score the prompt; None while it waits for others."""
        return self.cost.begun_s

    def begin(self) -> None:
        """Note that its work begins, unless it has begun."""
        if self.cost.begun_s is None:
            self.cost.begun_s = self.shown.begun_s = time.monotonic()
