"""A conversation over one sequence: a turn does not recompute the rows that it shares with earlier turns.

Owns the history and the idle time: between turns, deeper stages catch up in portions. A conversation can be saved to a file and
go on in another process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Unpack

from balcony_edge.control.catching_up import IDLE_ROWS
from balcony_edge.errors import BalconyError, InputError
from balcony_runtime.reply import ReplyLimits, Token, TokenStream
from balcony_runtime.sessions import file
from balcony_runtime.text.codec import Message, no_message
from balcony_runtime.token_sequence import TokenSequence

if TYPE_CHECKING:
    from balcony_edge.control.trace import TraceWriter
    from balcony_runtime.llm import LLM
    from balcony_runtime.requests import ReplyOptions


class Chat:
    """The messages so far and the sequence with their rows. :meth:`LLM.chat` makes it; one thread at a time may use it.

    Example:
        chat = llm.chat(system="Answer in one sentence.")
        for token in chat.send("Why is the sky blue?"):
            print(token.text, end="")
    """

    def __init__(self, llm: LLM, sequence: TokenSequence, system: str | None) -> None:
        self._llm, self.sequence = llm, sequence
        if system is not None and not isinstance(system, str):
            raise InputError(f"system of type {type(system).__name__}: give a text")
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[Message] = list(self._system)
        self._open_reply: TokenStream | None = None
        self._limits: ReplyLimits | None = None
        self._stop_catching_up = threading.Event()  # ends the current :meth:`catching_up`

    def send(
        self,
        message: str | Message | Sequence[Message],
        *,
        trace: TraceWriter | None = None,
        **options: Unpack[ReplyOptions],
    ) -> TokenStream:
        """Send a message and stream the reply; the history gets the part of the reply that was consumed.

        The call ends an earlier reply that was not consumed to its end, and also :meth:`catching_up`.

        Args:
            message: text of the user; or a message with ``role`` and ``content``, or several of them, such as the results of
                the tools that the last reply called.
            trace, options: as for :meth:`LLM.stream`; without ``sequence``, because a conversation has its own.

        Raises:
            InputError: the text is empty; otherwise as :meth:`LLM.stream`. The history then does not change, except that
                an unfinished earlier reply joins it.
        """
        new = _messages(message)
        if "sequence" in options:
            raise InputError("sequence: a conversation has its own: leave it out, or use LLM.stream")
        if isinstance(message, str) and not message.strip():
            raise InputError("the prompt is empty: give a text")
        self._end_open_work()
        stream = self._llm.stream([*self.messages, *new], sequence=self.sequence, trace=trace, **options)
        self._limits = stream.request.limits
        self._open_reply = TokenStream(self._recorded(_own(new), stream), stream.request)
        return self._open_reply

    def _recorded(self, new: list[Message], stream: TokenStream) -> Generator[Token]:
        last = None
        try:
            for token in stream:
                if token.finish_reason is not None:
                    last = token  # record first: the consumer of the last token may never ask for another one
                    break
                yield token
        finally:
            stream.close()
            if (reply := stream.reply).tokens:
                said: dict[str, Any] = {"role": "assistant", "content": reply.text}
                # A call that was cut cannot be run, and templates refuse it.
                if calls := [call for call in reply.tool_calls if call.whole]:
                    said["tool_calls"] = [call.to_dict() for call in calls]
                self.messages += [*new, said]
        if last is not None:
            yield last

    def save(self, path: str | os.PathLike[str], *, int8: bool = False) -> int:
        """Save the conversation with all that was computed for it; a file of that name is replaced as a whole.

        An earlier reply that was not consumed to its end is ended.

        Args:
            path: file to write.
            int8: whether to store keys and values in 8 bits: 0.4 of the bytes, but replies may then differ.

        Returns:
            Bytes of the file.

        Raises:
            InputError: the file cannot be written.
        """
        self._end_open_work()
        return file.save(
            file.place(path),
            self.sequence,
            messages=[dict(one) for one in self.messages],
            system=len(self._system),
            int8=int8,
        )

    @classmethod
    def load(cls, llm: LLM, path: str | os.PathLike[str]) -> Chat:
        """Go on with a conversation that :meth:`save` wrote, where it was.

        Raises:
            InputError: the file cannot be read, is damaged, or was saved with another bundle; or the bundle has no chat
                template.
            ContextLengthError: this engine's context is too short for it.

        Example:
            chat = balcony_edge.Chat.load(llm, "talk.session")
        """
        chat = llm.chat()
        notes = file.load(file.place(path), chat.sequence).notes
        if notes.messages is None:
            raise InputError(f"{path}: has no messages: load it with LLM.load_prefix")
        chat.messages = list(notes.messages)
        chat._system = chat.messages[: notes.system]
        return chat

    def reset(self) -> None:
        """Forget the conversation, except for the system message."""
        self._end_open_work()
        self.messages = list(self._system)
        # What was said goes from the sequence, too: it could be saved.
        try:
            system = self._llm.encode(self._system) if self._system else []
        except InputError:  # a template that wants a user's message
            system = []
        self.sequence.keep_common(system)

    def _end_open_work(self) -> None:
        """End open work: an unfinished reply joins the history, and catching up stops after the current portion."""
        self._stop_catching_up.set()
        if self._open_reply is not None:
            self._open_reply.close()
            self._open_reply = None

    @contextmanager
    def catching_up(self) -> Iterator[None]:
        """Let a thread work off the backlog until the next :meth:`send` or the end of the block, while a user types.

        Under a budget with ceilings nothing runs, because nobody reads the sensors meanwhile.
        """
        stop = self._stop_catching_up = threading.Event()

        def work() -> None:
            # If the bundle is closed or memory runs out, the next reply, which needs these rows, reports it.
            with suppress(BalconyError):
                while not (stop.is_set() or self._ceilings()) and self.sequence.catch_up(IDLE_ROWS):
                    pass

        worker = threading.Thread(target=work, name="balcony-catch-up", daemon=True)
        worker.start()
        try:
            yield
        finally:
            stop.set()
            worker.join()

    def _ceilings(self) -> bool:
        """Whether the budget of the last reply, or that of the bundle before the first, has ceilings."""
        budget = self._llm.budget if self._limits is None else self._limits.resolved
        return budget.needs_sensors


def _messages(given: str | Message | Sequence[Message]) -> list[Message]:
    """What is sent, as messages."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if isinstance(given, Mapping):
        return [given]
    if not isinstance(given, list | tuple):
        raise InputError(f"message of type {type(given).__name__}: give a text, a message or a list of messages")
    if not given:
        raise InputError("no messages were given: give a text, a message or a list of messages")
    for one in given:
        if not isinstance(one, Mapping):  # a first message of token ids would be a prompt, and no history
            raise no_message(one)
    return list(given)


def _own(value: Any) -> Any:
    """A copy of messages that were encoded, with their parts: the sender may fill them again for the next turn."""
    if isinstance(value, Mapping):
        return {key: _own(one) for key, one in value.items()}
    return [_own(one) for one in value] if isinstance(value, list | tuple) else value
