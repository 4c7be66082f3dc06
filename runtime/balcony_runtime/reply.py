"""The result of a generation: a token, a stream of tokens, a reply.

Owns these types and the ways to consume a stream: iteration, asynchronous iteration, cancellation from any thread.
:mod:`balcony_runtime.decoding.loop` makes the tokens.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from balcony_edge.budget import Budget, parse_budget
from balcony_edge.closing import Closing
from balcony_edge.control.decision import Decision
from balcony_edge.control.verdict import Verdict
from balcony_edge.device.costs import CostModel
from balcony_runtime.structure.calls import CallReader, ToolCall, read

if TYPE_CHECKING:
    from balcony_runtime.requests import Request

FinishReason = Literal["stop", "length", "cancelled"]


class Token(NamedTuple):
    """One token of a stream.

    Example:
        late = [token for token in llm.stream("Hello") if token.late]

    Attributes:
        id: id of the token in the vocabulary.
        text: text that the token completes; empty while a character or a stop string may be unfinished, and for the end of
            sequence.
        exit_layer: exit that made the token.
        latency_ms: gap since the previous token, without its reader's time; for the first token, time to first token.
        predicted_ms: latency that the controller expected; None if ``target_ms`` is None, as under a deadline alone.
        target_ms: ``tpot_ms`` of the budget when the token was made; for the first token, ``ttft_ms``.
        caught_up_rows: number of pending rows that deeper stages ran in the same gap, including those of a switch.
        pending_rows: number of rows that the deepest stage has not taken in yet.
        decision: decision of the controller: pace, probability, infeasible targets.
        logprob: log-probability under the exit that made the token; None unless it was requested.
        top_logprobs: most likely tokens at this position with their log-probabilities; empty unless they were requested.
        finish_reason: only on the last token: ``stop`` (end of sequence or a stop string) or ``length``.
        forced: whether the reply's structure left no other token; the engine did not run for it, and its exit is that of
            the token before.
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
    forced: bool = False

    @property
    def reason(self) -> str:
        """Reason for this exit, in one line."""
        return self.decision.reason

    @property
    def late(self) -> bool:
        """Whether the token came after its target."""
        return self.target_ms is not None and self.latency_ms > self.target_ms

    def to_dict(self) -> dict[str, Any]:
        """Fields and reason as JSON-ready values; the decision contributes its pace and whether it was infeasible."""
        values = self._asdict()
        decision: Decision = values.pop("decision")
        return {**values, "reason": decision.reason, "period_ms": decision.period_ms, "infeasible": decision.infeasible}


@dataclass(frozen=True, slots=True)
class Reply:
    """A generation so far: its text and its tokens with their costs; ``finish_reason`` is None while it continues.

    ``verdicts`` says for each key of the budget whether it was held, ``cached_tokens`` how many tokens of the prompt had their
    rows already, from an earlier reply or a file. ``tool_calls`` are the functions that the model calls, which are not part of
    the text.

    Example:
        reply = llm.generate("Why is the sky blue?", max_new_tokens=60)
        print(reply.text, reply.ttft_ms, reply.tokens_per_exit)
    """

    text: str
    tokens: tuple[Token, ...] = field(repr=False)  # a kilobyte for each, with its decision
    prompt_tokens: int
    finish_reason: FinishReason | None
    verdicts: tuple[Verdict, ...] = ()
    cached_tokens: int = 0
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def ttft_ms(self) -> float | None:
        """Time to first token; None before the first token."""
        return self.tokens[0].latency_ms if self.tokens else None

    @property
    def tokens_per_exit(self) -> dict[int, int]:
        """Exit layer → number of tokens that it made, deepest first; without forced tokens."""
        made = Counter(token.exit_layer for token in self.tokens if not token.forced)
        return dict(sorted(made.items(), reverse=True))

    @property
    def forced_tokens(self) -> int:
        """Number of tokens about which the reply's structure left no choice, so that no exit had to make them."""
        return sum(token.forced for token in self.tokens)

    @property
    def mean_tpot_ms(self) -> float | None:
        """Mean gap between tokens; None for fewer than two tokens."""
        gaps = [token.latency_ms for token in self.tokens[1:]]
        return sum(gaps) / len(gaps) if gaps else None

    @property
    def unseen_tokens(self) -> int:
        """Number of tokens for which no sensor measured a ceiling of the budget, so that it could not be held."""
        return sum(token.decision.unseen for token in self.tokens)

    @property
    def late_tokens(self) -> int:
        """Number of tokens after the first that missed the target at their time."""
        return sum(token.late for token in self.tokens[1:])


@dataclass(slots=True)
class CommonSettings:
    """What all replies of an LLM follow at the moment.

    Attributes:
        budgets: budget of replies that have none of their own, as it was set and as it is for this bundle.
        costs: prices; None while no budget needs them.
    """

    budgets: tuple[Budget, Budget]
    costs: CostModel | None = None


class ReplyLimits:
    """The budget of one reply: its own, or the one that the LLM has at the moment.

    Args:
        settings: budget and prices of the LLM.
        resolve: checks a budget and gives it as it is for this bundle.
        own: budget of this reply; None for the LLM's.
    """

    def __init__(
        self,
        settings: CommonSettings,
        resolve: Callable[[Budget], Budget],
        own: Budget | str | os.PathLike[str] | None = None,
    ) -> None:
        self._settings, self._resolve = settings, resolve
        self._own: tuple[Budget, Budget] | None = None
        self.replace(own)

    @property
    def budget(self) -> Budget:
        """The budget as it was set."""
        return (self._own or self._settings.budgets)[0]

    @property
    def resolved(self) -> Budget:
        """The budget as it is for this bundle."""
        return (self._own or self._settings.budgets)[1]

    def now(self) -> tuple[Budget, CostModel | None]:
        """Budget of the next token as it is for this bundle, and prices: one call, because it comes between two passes."""
        settings = self._settings
        return (self._own or settings.budgets)[1], settings.costs

    def replace(self, value: Budget | str | os.PathLike[str] | None) -> None:
        """Set another one; errors as for :attr:`LLM.budget`."""
        if value is None:
            self._own = None
        else:
            budget = parse_budget(value)
            self._own = budget, self._resolve(budget)


class TokenStream(Closing, Iterator[Token]):
    """Tokens as they are made. One thread at a time may use it; any thread may call :meth:`cancel`.

    Example:
        stream = llm.stream("Count to ten.")
        for token in stream:
            print(token.text, end="")
        print(stream.reply.finish_reason)

    Args:
        tokens: source of the tokens; the stream closes it. It ends when the request is cancelled.
        request: what was asked for.
    """

    def __init__(self, tokens: Generator[Token], request: Request) -> None:
        self._source, self.request = tokens, request
        self._tokens: list[Token] = []
        self._ids: list[int] = []
        self._finish_reason: FinishReason | None = None
        self._step = threading.RLock()  # held while a thread runs the source

    def __next__(self) -> Token:
        with self._step:
            try:
                token = next(self._source)
            except BaseException:  # also the end of a source that was cancelled
                if self._finish_reason is None:
                    self._finish_reason = "cancelled"
                raise
            self._tokens.append(token)
            self._ids.append(token.id)
            if token.finish_reason is not None:
                self._finish_reason = token.finish_reason
            if self._finish_reason is not None:  # also of a stream that was closed in the middle of this step
                self._source.close()  # nobody need ask again for its place and its share of the time to be free
            return token

    async def __aiter__(self) -> AsyncIterator[Token]:
        """Iterate without blocking the event loop; the steps run in a thread of this stream.

        The loop's own threads are few, and streams that wait for others to end would take them all.
        """
        import asyncio  # noqa: PLC0415 - slow to import, and used here only
        from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - used here only

        thread = ThreadPoolExecutor(1, "balcony-stream")
        try:
            while True:
                try:  # the step has no name here: an error's traceback would hold the frame, and the step its error
                    token = await asyncio.shield(asyncio.get_running_loop().run_in_executor(thread, next, self, None))
                except asyncio.CancelledError:
                    self.cancel()
                    # After the step, in its thread. A second cancellation, which anyio brings at each wait, does not stop it.
                    await asyncio.shield(asyncio.get_running_loop().run_in_executor(thread, self.close))
                    raise
                if token is None:
                    return
                yield token
        finally:
            thread.shutdown(wait=False)

    @property
    def reply(self) -> Reply:
        """The generation so far."""
        tokens = tuple(self._tokens)
        calls: tuple[ToolCall, ...] = ()
        request = self.request
        if request.box is None:
            text = "".join(token.text for token in tokens)
        else:
            found = read(request.box, [(token.id, token.text) for token in tokens])
            text, calls = found.content, found.calls
        verdicts = request.watch.verdicts()
        return Reply(text, tokens, len(request.ids), self._finish_reason, verdicts, request.cached, calls)

    @property
    def ids(self) -> Sequence[int]:
        """Ids of the tokens so far; later ones join them."""
        return self._ids

    def call_reader(self) -> CallReader | None:
        """A reader that splits the tokens into text and calls as they come; None without tools."""
        return None if self.request.box is None else CallReader(self.request.box)

    @property
    def budget(self) -> Budget:
        """Limits of this reply; set it to a budget, the path of a budget file, or None for the budget of the LLM.

        A new one takes effect at the next token, and begins the verdicts anew.
        """
        return self.request.limits.budget

    @budget.setter
    def budget(self, value: Budget | str | os.PathLike[str] | None) -> None:
        self.request.limits.replace(value)

    def cancel(self) -> None:
        """End the stream before its next token; may be called from any thread."""
        self.request.cancelled.set()

    def close(self) -> None:
        """End the stream and free its sequence; waits for a step that another thread is running.

        In the middle of a step of this thread, as in the handler of a signal, the step ends the stream when it returns.
        """
        self.cancel()
        with self._step:
            if self._finish_reason is None:
                self._finish_reason = "cancelled"
            if inspect.getgeneratorstate(self._source) != inspect.GEN_RUNNING:
                self._source.close()
