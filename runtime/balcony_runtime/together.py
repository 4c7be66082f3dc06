"""Several replies that one thread drives, round by round: batches and servers.

Owns the replies that are open and who asks for another token. The rounds are those of
:mod:`balcony_runtime.scheduling.scheduler`, which also serves the streams of other threads.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, Unpack

from balcony_edge.closing import Closing
from balcony_edge.errors import InputError
from balcony_runtime.decoding.loop import Decoder, Step
from balcony_runtime.reply import Token, TokenStream
from balcony_runtime.requests import Prompt, ReplyOptions, Request, Requests
from balcony_runtime.scheduling.stream import Stream
from balcony_runtime.token_sequence import TokenSequence


class _Open(NamedTuple):
    """A reply in progress: its tokens for the user, its stream in the scheduler, and steps that are not told yet."""

    tokens: TokenStream
    stream: Stream
    steps: deque[Step | Exception]
    held: ExitStack

    @property
    def waits(self) -> bool:
        """Whether a token is on the way, or has come in a round that another thread led."""
        return self.stream.asks or self.stream.answered


class Together(Closing):
    """Replies in progress that share rounds. A context manager that ends them. One thread may use it.

    Example:
        with llm.together() as replies:
            for question in questions:
                replies.add(question, max_new_tokens=60)
            while replies.open:
                for stream, token in replies.step():
                    ...  # a Token, or the exception that ended the reply
    """

    def __init__(self, requests: Requests) -> None:
        self._requests, self._scheduler = requests, requests.scheduler
        self._open: dict[TokenStream, _Open] = {}
        self._paused: set[TokenStream] = set()
        self._found: list[tuple[TokenStream, Token | Exception]] = []  # what an interrupted step had told

    @property
    def open(self) -> tuple[TokenStream, ...]:
        """Replies that have not ended."""
        return tuple(self._open)

    def add(self, prompt: Prompt, **options: Unpack[ReplyOptions]) -> TokenStream:
        """Begin a reply; arguments and errors are those of :meth:`LLM.stream`, except ``sequence`` and ``trace``.

        The stream that is returned gives the reply so far, takes another budget and can be cancelled; :meth:`step` iterates it.

        Raises:
            BusyError: too many replies wait already.
        """
        return self.begin(self.prepare(prompt, **options))

    def prepare(self, prompt: Prompt, **options: Any) -> Request:
        """A reply that :meth:`begin` begins later; arguments and errors as for :meth:`add`. Any thread may call it.

        Its times count from the option ``asked_s``, a time on ``time.monotonic``, if that is given.
        """
        if given := options.keys() & {"sequence", "trace"}:
            raise InputError(f"{', '.join(sorted(given))}: not for replies that run together: use LLM.stream")
        return self._requests.of(prompt, **options)

    def begin(self, request: Request, on_admitted: Callable[[], None] | None = None) -> TokenStream:
        """Begin a reply that was prepared.

        Args:
            request: the reply.
            on_admitted: called when the reply need not wait for others any more; it must be quick.

        Raises:
            BusyError: too many replies wait already.
        """
        steps, asked_s = deque[Step | Exception](), request.begun_s()
        with ExitStack() as held:
            decoder, stream = held.enter_context(_joined(self._requests, request, asked_s))
            stream.on_admitted = on_admitted
            tokens = TokenStream(self._requests.told(request, _taken(steps), decoder), request)
            self._open[tokens] = _Open(tokens, stream, steps, held.pop_all())
        self._scheduler.ask([stream], asked_s)
        return tokens

    def empty(self, rows: int) -> AbstractContextManager[TokenSequence]:
        """An empty sequence of so many rows. What it has at the end is there for the next prompt that begins alike.

        Raises:
            InputError: the rows would never fit into the memory that the budget leaves.
        """
        self._scheduler.sequences.most_rows(rows)
        return self._requests.sequence((), rows)

    def pause(self, stream: TokenStream) -> None:
        """Ask for no more tokens of a reply than those that are on the way, e.g. because its reader is slow."""
        if stream in self._open:
            self._paused.add(stream)

    def resume(self, stream: TokenStream) -> None:
        """Ask for tokens again."""
        if stream in self._paused:
            self._paused.discard(stream)
            if (one := self._open.get(stream)) is not None and not one.waits:
                self._scheduler.ask([one.stream], time.monotonic())

    def step(self) -> list[tuple[TokenStream, Token | Exception]]:
        """Wait for the next tokens, for one round at most; a reply that ends, is cancelled or fails is closed.

        Returns:
            Tokens with their replies, or the exception that ended a reply (a bug's, if it is not a :class:`BalconyError`).
            Empty if no reply asks, if those that do were cancelled, or if the round brought no token: it may run a part of a
            long prompt, or all may wait for replies that are paused.
        """
        asking: dict[Stream, _Open] = {}
        for tokens, one in tuple(self._open.items()):
            if tokens.request.cancelled.is_set():
                self._end(tokens)
            elif tokens not in self._paused or one.waits:
                asking[one.stream] = one
        found = self._found
        answered, again = self._scheduler.wait(list(asking)) if asking else [], list[Stream]()
        told_s = time.monotonic()  # to tell the tokens is a part of the next gap
        for stream in answered:
            tokens, _, steps, _ = asking[stream]
            try:
                try:
                    steps.extend(stream.steps())
                except Exception as error:
                    steps.append(error)  # it goes through the reply, which judges its budget by the last reading
                while steps and tokens in self._open:
                    found.append((tokens, token := next(tokens)))
                    if token.finish_reason is not None:
                        self._end(tokens)
            except StopIteration:  # another thread has cancelled it meanwhile
                self._end(tokens)
            except Exception as error:
                found.append((tokens, error))
                self._end(tokens)
            if tokens in self._open and tokens not in self._paused:
                again.append(stream)
        # After an interrupt the next call asks: wait() returns those that do not ask at once.
        self._scheduler.ask(again, told_s)
        self._found = []
        try:
            return found
        finally:
            del found  # the traceback of an error in it has this frame

    def _end(self, tokens: TokenStream) -> None:
        one = self._open.pop(tokens)
        self._paused.discard(tokens)
        with one.held:
            tokens.close()

    def close(self) -> None:
        """End all replies, also those after one whose end fails."""
        self._found = []  # also of a step that failed: a server begins other replies
        with ExitStack() as all_of_them:
            for tokens in self.open:
                all_of_them.callback(self._end, tokens)


@contextmanager
def _joined(requests: Requests, request: Request, asked_s: float) -> Iterator[tuple[Decoder, Stream]]:
    """A reply in the company; one generator, which unwinds in order also where a ``Together`` is dropped without close()."""
    scheduler = requests.scheduler
    with ExitStack() as held:  # of callbacks alone: the collector would end another generator by itself, out of order
        sequence = scheduler.sequences.new(request.ids, request.rows)
        held.callback(scheduler.sequences.free, sequence)
        decoder = requests.decoder(request, sequence, asked_s)
        stream = scheduler.join(decoder, request.rows, request.cancelled)
        held.callback(request.forget_untold, sequence)
        waits = True
        try:
            yield decoder, stream
        except GeneratorExit:
            waits = False  # it was dropped: the collector's thread may hold what another thread's round needs
            raise
        finally:
            scheduler.leave(stream, held, waits=waits)


def _taken(steps: deque[Step | Exception]) -> Iterator[Step]:
    while True:
        if not steps:
            raise InputError("this reply is one of several: Together.step() brings its tokens; do not iterate over it")
        if isinstance(found := steps.popleft(), Exception):
            try:
                raise found
            finally:
                del found  # its traceback has this frame
        yield found
