"""Requests: from a prompt and its options to the reply that is decoded.

Owns the checks of these arguments, and puts together sequence, sampler, decoder and text of a reply. Who steps it is decided in
:mod:`balcony_runtime.scheduling.scheduler`; :mod:`.telling` turns steps into tokens.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from balcony_edge.budget import Budget
from balcony_edge.control.verdict import Watch
from balcony_edge.device.readings import Reading
from balcony_edge.errors import BalconyError, ContextLengthError, InputError, shown
from balcony_runtime.backends.base import IntArray, NotFiniteError
from balcony_runtime.decoding.learned import Learned
from balcony_runtime.decoding.loop import Decoder, Environment, Step
from balcony_runtime.decoding.sampling import Sampler, SamplingParams
from balcony_runtime.engine import Engine
from balcony_runtime.reply import ReplyLimits, Token
from balcony_runtime.scheduling.scheduler import Scheduler
from balcony_runtime.scheduling.stream import Cancellation
from balcony_runtime.structure.asked import Structure, structure_of
from balcony_runtime.structure.formats import CallFormat
from balcony_runtime.structure.grammar import Grammars, Guide
from balcony_runtime.structure.marks import THOUGHT
from balcony_runtime.structure.tools import Toolbox, toolbox
from balcony_runtime.telling import StopStrings, told
from balcony_runtime.text.codec import Message, TextCodec
from balcony_runtime.text.stream import TextStream
from balcony_runtime.token_sequence import TokenSequence
from balcony_runtime.tokens import common_length, refuse_foreign, whole

if TYPE_CHECKING:
    from balcony_edge.control.trace import TraceWriter

Prompt = str | Sequence[Message] | Sequence[int]
#: Roles of messages that come before a conversation.
_SYSTEM = ("system", "developer")


class ReplyOptions(TypedDict, total=False):
    """Options of a reply, as for :meth:`LLM.stream`."""

    budget: Budget | str | os.PathLike[str] | None
    max_new_tokens: int | None
    sampling: SamplingParams | None
    stop: Sequence[str]
    logprobs: int | None
    chat: bool | None
    control_tokens: bool | None
    ignore_eos: bool
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool
    documents: Sequence[Mapping[str, Any]]
    chat_template_kwargs: Mapping[str, Any] | None


@dataclass(slots=True)
class Request:
    """Checked arguments of one reply, and how far it is.

    Attributes:
        ids: tokens of the prompt.
        max_new_tokens: largest number of tokens to make.
        sampler: sampler that picks the tokens.
        stop: finder of the strings that end the reply.
        logprobs: number of likeliest tokens to report at each place; None without log-probabilities.
        ends: tokens that end the reply.
        trace: record of the run.
        limits: budget of the reply.
        cancelled: event that ends the reply before its next token.
        watch: record of the budget.
        box: tools that the reply may call; None for none.
        asked_s: time of the request on ``time.monotonic``, from which its times count; None for the reply's beginning.
        text: makes its text, which may go on with the prompt's, as that of a plain text does.
        cached: number of tokens of the prompt whose rows were there already; known when the reply begins.
        told: number of tokens of the reply that have been told.
    """

    ids: list[int]
    max_new_tokens: int
    sampler: Sampler
    stop: StopStrings
    logprobs: int | None
    ends: frozenset[int]
    trace: TraceWriter | None
    limits: ReplyLimits
    cancelled: threading.Event
    watch: Watch
    text: TextStream
    box: Toolbox | None = None
    asked_s: float | None = None
    cached: int = 0
    told: int = 0

    def begun_s(self) -> float:
        """Time of the request; that of the call if none was given."""
        return time.monotonic() if self.asked_s is None else self.asked_s

    @property
    def rows(self) -> int:
        """Most rows that its sequence will have."""
        return len(self.ids) + self.max_new_tokens

    def forget_untold(self, sequence: TokenSequence) -> None:
        """Take the rows of tokens that were made and not told out of the sequence of a reply that has ended."""
        rows = len(self.ids) + max(self.told - 1, 0)  # the last token of a reply has no row
        if sequence.length > rows:
            with contextlib.suppress(InputError):  # the engine was closed meanwhile
                sequence.rollback(rows)


class Requests:
    """Makes replies over one engine.

    Args:
        engine: engine of the replies.
        codec: tokenizer of the bundle.
        scheduler: runs replies that are in progress at once.
        learned: what replies learn about the device.
        limits: gives the limits of a reply; called with its own budget, or None.
        readings: gives the latest reading of every sensor.
    """

    def __init__(
        self,
        engine: Engine,
        codec: TextCodec,
        scheduler: Scheduler,
        learned: Learned,
        limits: Callable[[Budget | str | os.PathLike[str] | None], ReplyLimits],
        readings: Callable[[], tuple[Reading, ...]],
    ) -> None:
        self._engine, self._codec, self.scheduler, self._learned = engine, codec, scheduler, learned
        self._limits, self._readings, model = limits, readings, engine.manifest.model
        self._grammars = Grammars(codec.to_json, model.vocab_size, model.eos_token_ids)
        self._continuing: weakref.WeakSet[TokenSequence] = weakref.WeakSet()  # callers' sequences in use by a reply
        self._lock = threading.Lock()  # held to look whether a sequence is one of them, and to add it

    def of(
        self,
        prompt: Prompt,
        *,
        budget: Budget | str | os.PathLike[str] | None = None,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        chat: bool | None = None,
        control_tokens: bool | None = None,
        ignore_eos: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        documents: Sequence[Mapping[str, Any]] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        sequence: TokenSequence | None = None,
        trace: TraceWriter | None = None,
        asked_s: float | None = None,
    ) -> Request:
        """Check the arguments of :meth:`LLM.stream`; errors are those."""
        if sequence is not None and not (isinstance(sequence, TokenSequence) and sequence.batch_size == 1):
            raise InputError(
                "sequence: must be a TokenSequence with one member: make it with llm.engine.new_sequence()"
            )
        box = self.box(tools, tool_choice, parallel_tool_calls)
        if box is not None and isinstance(sampling, SamplingParams) and sampling.structured:
            box = box._replace(document=True)
        seen = () if box is None or tools is None else tools
        ids = self.prompt_ids(prompt, chat, control_tokens, seen, documents, chat_template_kwargs)
        most = self._new_tokens(len(ids), max_new_tokens, sequence)
        if logprobs is not None:
            logprobs = whole("logprobs", logprobs, 0)  # as Python's integer: NumPy's small ones overflow in sums
        if trace is not None:
            from balcony_edge.control import trace as traces  # noqa: PLC0415 - few replies are recorded

            if not isinstance(trace, traces.TraceWriter):
                raise InputError(f"trace of type {type(trace).__name__}: give a TraceWriter, or leave it out")
            self._readings()  # start the sensors now, not during the first step
        self._engine.refuse_closed()
        model = self._engine.manifest.model
        return Request(
            ids=ids,
            max_new_tokens=most,
            sampler=self.sampler(sampling, np.array([ids], np.int64), box, ignore_eos=ignore_eos),
            stop=StopStrings(stop),
            logprobs=logprobs,
            ends=frozenset() if ignore_eos else frozenset(model.eos_token_ids),
            trace=trace,
            limits=self._limits(budget),
            cancelled=Cancellation(self.scheduler.wake),
            watch=Watch(),
            text=self._codec.stream(
                ids if self._continues(prompt, chat) else (),
                literal=bool(sampling and sampling.structured),  # a structure may begin with a space
            ),
            box=box,
            asked_s=asked_s,
        )

    def box(self, tools: Any, choice: Any, parallel: bool = True) -> Toolbox | None:
        """The tools that a reply may call, or None; arguments as for :meth:`LLM.stream`.

        Raises:
            InputError: they cannot be used.
        """
        return toolbox(tools, choice, parallel, self._written)

    def _written(self) -> tuple[CallFormat, dict[str, int]]:
        """How the model writes calls, and the marks of calls and thoughts that are tokens."""
        form, added = self._codec.call_format, self._codec.added
        marks = (*re.findall("<[^<>]+>", form.marker + form.tail + form.last), *THOUGHT)
        tags = {name: added[name][0] for name in marks if name in added}
        marker = self._codec.control_token(form.marker)  # of any form, such as [TOOL_CALLS]
        return form, tags if marker is None else tags | {form.marker: marker}

    def structure(self, params: SamplingParams, box: Toolbox | None = None) -> Guide | None:
        """State of a reply with the structure that the parameters and the tools ask for; None if they ask for none.

        Raises:
            InputError: ``params`` is not a SamplingParams, or its structure or a tool's is not supported.
            MissingDependencyError: llguidance is not installed.
        """
        structure = _structure(params, box)  # within its bounds: nothing is compiled that is too large
        if structure is None:
            return None
        try:
            return self._grammars.guide(structure)
        except InputError:
            for tool in () if box is None else box.tools:  # the error of one tool by itself names it
                try:
                    self._grammars.guide(Structure("json_schema", tool.schema), keep=False)
                except InputError as error:
                    raise InputError(f"tools: {tool.name}: {error}") from None
            raise

    def is_compiled(self, params: SamplingParams, box: Toolbox | None) -> bool:
        """Whether :meth:`structure` need not compile anything; errors are those, except the compiler's."""
        structure = _structure(params, box)
        return structure is None or self._grammars.holds(structure)

    def sampler(
        self,
        sampling: SamplingParams | None,
        prompts: IntArray,
        box: Toolbox | None = None,
        *,
        ignore_eos: bool = False,
    ) -> Sampler:
        """The sampler of replies to prompts of equal length, (B, n); errors as for :meth:`structure`."""
        params = SamplingParams() if sampling is None else sampling
        first = self.structure(params, box)
        guides = [] if first is None else [first, *(first.fork() for _ in prompts[1:])]
        if guides and ignore_eos:
            raise InputError("ignore_eos: the structure of a reply decides where it ends: leave one of the two out")
        for guide in guides:
            guide.prepare()  # while the prompt runs
        return Sampler(params, prompts, self._engine.manifest.model.vocab_size, guides)

    @contextlib.contextmanager
    def sequence(self, tokens: Sequence[int], rows: int) -> Iterator[TokenSequence]:
        """A sequence of so many rows for a prompt; it shares passes and prefixes with others if there is room for it."""
        sequence = self.scheduler.sequences.new(tokens, rows)
        try:
            with _emptied_after_nan(sequence):
                yield sequence
        finally:
            self.scheduler.sequences.free(sequence)

    def decoder(self, request: Request, sequence: TokenSequence, asked_s: float) -> Decoder:
        """A decoder of a reply that was asked for at a time; the sequence keeps the rows that it shares with the prompt."""
        sequence.keep_common(request.ids[:-1])  # the last token is always run
        prompt = np.array([request.ids[sequence.length :]], np.int64)
        environment = Environment(
            request.limits.now,
            self._readings,
            self._learned,
            request.max_new_tokens,
            sleep=request.cancelled.wait,
            trace=request.trace,
            keep_logits=request.logprobs is not None,
            asked_s=asked_s,
        )
        return Decoder(sequence, prompt, request.sampler, environment)

    def told(self, request: Request, steps: Iterator[Step], decoder: Decoder) -> Generator[Token]:
        """The tokens of a reply from its steps."""
        return told(steps, decoder, request, self._readings)

    def tokens(self, request: Request, sequence: TokenSequence | None) -> Generator[Token]:
        """The tokens of a reply that is stepped by whoever asks for them; ``sequence`` is one to continue."""
        asked_s = request.begun_s()  # before a prefix is read from a file
        with contextlib.ExitStack() as held:
            if sequence is None:
                sequence = held.enter_context(self.sequence(request.ids, request.rows))
            else:
                held.enter_context(self._continued(sequence))
            decoder = self.decoder(request, sequence, asked_s)
            # A trace records the decisions about one stream, so a stream that is recorded shares no rounds.
            steps = (
                decoder.steps()
                if request.trace is not None
                else self.scheduler.steps(decoder, request.rows, request.cancelled)
            )
            held.callback(request.forget_untold, sequence)
            held.enter_context(contextlib.closing(steps))
            yield from self.told(request, steps, decoder)

    @contextlib.contextmanager
    def _continued(self, sequence: TokenSequence) -> Iterator[None]:
        """Have a sequence of the caller's for one reply at a time; after NaN it begins anew, as its next reply would fail."""
        if sequence.engine is not self._engine:
            raise InputError("sequence: is one of another bundle or engine: make it with llm.engine.new_sequence()")
        with self._lock:
            if sequence in self._continuing:
                raise InputError("sequence: another reply still uses it: close that stream, or read it to its end")
            self._continuing.add(sequence)
        try:
            with _emptied_after_nan(sequence):
                yield
        except NotFiniteError:
            # Some graphs read rows after the end, under a mask, and 0 × NaN is NaN.
            with contextlib.suppress(BalconyError):  # without memory for both states it keeps the old one
                sequence.state = self._engine.new_sequence(max_length=sequence.max_length).state
            raise
        finally:
            self._continuing.discard(sequence)

    def prompt_ids(
        self,
        prompt: Prompt,
        chat: bool | None,
        control_tokens: bool | None,
        tools: Sequence[Mapping[str, Any]],
        documents: Sequence[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any] | None,
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Tokens of a prompt; arguments and errors as for :meth:`LLM.encode`."""
        ids_given = isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes | bytearray)
        ids_given = ids_given or (isinstance(prompt, np.ndarray) and prompt.ndim == 1)  # one of no axis has no length
        if ids_given and len(prompt) and isinstance(prompt[0], int | np.integer):
            try:
                ids = [index(token) for token in prompt]  # type: ignore[arg-type]
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"prompt: token ids and something else ({error}): give integers, a text, or messages"
                ) from error
            refuse_foreign(np.array(ids), self._engine.manifest.model.vocab_size)
            if documents or template_kwargs or control_tokens is not None:
                raise InputError(
                    "documents, chat_template_kwargs, control_tokens: the prompt is token ids: give a text or messages, or "
                    "leave them out"
                )
            return ids
        return self._codec.encode(
            prompt,  # type: ignore[arg-type]
            chat=chat,
            control_tokens=control_tokens,
            add_special_tokens=add_special_tokens,
            tools=tools,
            documents=documents,
            template_kwargs=template_kwargs,
        )

    def beginning(self, prompt: Prompt, control_tokens: bool | None) -> Prompt:
        """What conversations with the system's messages have in common, as tokens; any other prompt as it is.

        Templates refuse these messages alone (Qwen 3.5, whose system would become a user), or write them into the turn of the
        user who follows (Mistral).
        """
        messages = [one for one in prompt if isinstance(one, Mapping)] if isinstance(prompt, list | tuple) else []
        if not messages or len(messages) < len(prompt) or any(one.get("role") not in _SYSTEM for one in messages):
            return prompt
        users = ({"role": "user", "content": text} for text in "ab")
        one, other = (np.array(self._codec.encode([*messages, user], control_tokens=control_tokens)) for user in users)
        begin: list[int] = one[: common_length(one, other)].tolist()
        return begin

    def _continues(self, prompt: Prompt, chat: bool | None) -> bool:
        """Whether the reply's text goes on with the prompt's; that of a conversation is a text of its own."""
        if chat or isinstance(prompt[0], Mapping):
            return False
        return not isinstance(prompt, str) or chat is not None or not self._codec.has_chat_template

    def _new_tokens(self, prompt_tokens: int, max_new_tokens: int | None, sequence: TokenSequence | None) -> int:
        context = self._engine.max_length if sequence is None else sequence.max_length
        if max_new_tokens is not None:
            cure = "give the largest number of tokens to make, e.g. 256"
            max_new_tokens = whole("max_new_tokens", max_new_tokens, 1, cure=cure)
        if prompt_tokens >= context:
            whose, cure = longest(self._engine)
            if context < self._engine.max_length:
                whose, cure = "sequence", "give it a larger max_length"
            raise ContextLengthError(
                # LiteLLM knows this error by llama.cpp's words for it.
                f"the prompt has {prompt_tokens} tokens and a reply needs one more: this exceeds the available context size "
                f"({context} in this {whose}): shorten the prompt, or {cure}"
            )
        room = context - prompt_tokens
        return room if max_new_tokens is None else min(max_new_tokens, room)


def longest(engine: Engine) -> tuple[str, str]:
    """What bounds the length of an engine's sequences, and the cure: `build` decides how long the caches of a set are."""
    if engine.max_length < engine.manifest.model.context_length:
        return "engine set", "build its engine set with a larger --context-length"
    return "bundle", "export with a larger --context-length"


def refuse_longer(engine: Engine, what: str, tokens: int) -> None:
    """Refuse more tokens than the context has, before a text is made of them, which may be forty times as long.

    Raises:
        ContextLengthError: there are more.
    """
    if tokens > (most := engine.max_length):
        whose, cure = longest(engine)
        raise ContextLengthError(
            f"{what} has {tokens} tokens: this exceeds the available context size ({most} in this {whose}): "
            f"shorten {what}, or {cure}"
        )


def _structure(params: SamplingParams, box: Toolbox | None) -> Structure | None:
    """The structure that sampling parameters and tools ask for."""
    if not isinstance(params, SamplingParams):
        raise InputError(f"sampling = {shown(params)}: must be SamplingParams, e.g. SamplingParams(temperature=0.8)")
    asked = structure_of(json_schema=params.json_schema, regex=params.regex, grammar=params.grammar)
    return asked if box is None else box.structure(asked)


@contextlib.contextmanager
def _emptied_after_nan(sequence: TokenSequence) -> Iterator[None]:
    """Leave a sequence without rows after NaN: no prompt begins with them, and its place in a pool is cleared."""
    try:
        yield
    except NotFiniteError:
        sequence.rollback(0)
        raise
