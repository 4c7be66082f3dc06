"""A conversation over one sequence: what a turn has in common with the turns before is not computed again.

Owns the history and the idle time: between turns the backlog of deeper stages is worked off in portions.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from balcony_edge.errors import BalconyError, InputError
from balcony_runtime.decoding.loop import IDLE_ROWS
from balcony_runtime.engine import TokenSequence
from balcony_runtime.reply import Token, TokenStream
from balcony_runtime.text import Message

if TYPE_CHECKING:
    from balcony_runtime.llm import LLM


class Chat:
    """Messages so far and the sequence that holds their rows. Made by :meth:`LLM.chat`; belongs to one thread at a time."""

    def __init__(self, llm: LLM, sequence: TokenSequence, system: str | None) -> None:
        self._llm, self.sequence = llm, sequence
        if system is not None:
            _refuse_other_than_text("system", system)
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[Message] = list(self._system)
        self._speaking: TokenStream | None = None
        self._waiting_is_over = threading.Event()  # of the present :meth:`catching_up`

    def send(self, text: str, **options: Any) -> TokenStream:
        """Say something and stream the reply, which joins the history as far as it was consumed.

        A reply that was not consumed to its end ends here, and so does :meth:`catching_up`.

        Args:
            text: the user's message.
            options: those of :meth:`LLM.stream`.

        Raises:
            InputError: an empty message; otherwise as :meth:`LLM.stream`. The history is then as before, but for a
                reply that was left.
        """
        _refuse_other_than_text("message", text)
        self._llm.encode(text)  # refuses an empty text
        self._silence()
        user: Message = {"role": "user", "content": text}
        stream = self._llm.stream([*self.messages, user], sequence=self.sequence, **options)
        self._speaking = TokenStream(
            self._recorded(user, stream), stream.reply.prompt_tokens, stream.cancelled, stream.watch
        )
        return self._speaking

    def _recorded(self, user: Message, stream: TokenStream) -> Iterator[Token]:
        last = None
        try:
            for token in stream:
                if token.finish_reason is not None:
                    last = token  # recorded before it is given out: whoever has it may never ask for another one
                    break
                yield token
        finally:
            stream.close()
            if stream.reply.tokens:
                self.messages += [user, {"role": "assistant", "content": stream.reply.text}]
        if last is not None:
            yield last

    def reset(self) -> None:
        """Forget the conversation but for the system message."""
        self._silence()
        self.messages = list(self._system)

    def _silence(self) -> None:
        """End what is still open: a reply joins the history, catching up stops after the portion at hand."""
        self._waiting_is_over.set()
        if self._speaking is not None:
            self._speaking.close()
            self._speaking = None

    @contextmanager
    def catching_up(self) -> Iterator[None]:
        """Within, a thread works off the backlog until the next :meth:`send` or the end. For waiting on a user."""
        stop = self._waiting_is_over = threading.Event()

        def work() -> None:
            with suppress(BalconyError):  # a closed bundle, no memory: the reply that needs these rows will say so
                while not stop.is_set() and self.sequence.catch_up(IDLE_ROWS):
                    pass

        worker = threading.Thread(target=work, name="balcony-catch-up", daemon=True)
        worker.start()
        try:
            yield
        finally:
            stop.set()
            worker.join()


def _refuse_other_than_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InputError(f"{name} of type {type(value).__name__}: give a text")
