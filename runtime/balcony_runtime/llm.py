"""Generation: a loaded bundle that turns prompts into text within a budget.

Owns :class:`LLM`. The decode loop is :mod:`balcony_runtime.decoding.loop`, the rounds of several replies are
:mod:`balcony_runtime.scheduling.scheduler`, batches without rounds are :mod:`.lockstep`, and :mod:`.telling` turns steps into
text. The types that a user sees are in :mod:`.reply`, conversations in :mod:`.chat`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self, Unpack

from balcony_edge.budget import Budget, parse_budget
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.closing import Closing
from balcony_edge.device.costs import CostModel
from balcony_edge.device.readings import Reading
from balcony_edge.errors import BudgetError, InputError
from balcony_edge.files import require_writable_file
from balcony_runtime.chat import Chat
from balcony_runtime.decoding.confident import Telemetry
from balcony_runtime.decoding.learned import Learned
from balcony_runtime.decoding.prices import measure_prices, profiled_prices
from balcony_runtime.decoding.sampling import SamplingParams
from balcony_runtime.engine import Engine, EngineOptions
from balcony_runtime.lockstep import Lockstep
from balcony_runtime.on_demand import SensorsOnDemand
from balcony_runtime.reply import CommonSettings, Reply, ReplyLimits, TokenStream
from balcony_runtime.requests import Prompt, ReplyOptions, Requests
from balcony_runtime.scheduling.admission import Bounds
from balcony_runtime.scheduling.pool import KEPT_BYTES, SequencePool
from balcony_runtime.scheduling.scheduler import Scheduler
from balcony_runtime.scheduling.sequences import MEMBERS, Sequences
from balcony_runtime.sessions import file
from balcony_runtime.sessions.prefixes import PrefixFiles
from balcony_runtime.text.codec import TextCodec
from balcony_runtime.together import Together
from balcony_runtime.token_sequence import TokenSequence
from balcony_runtime.tokens import checked

if TYPE_CHECKING:
    from balcony_edge.control.company.round_trace import RoundTraceWriter
    from balcony_edge.control.trace import TraceWriter

_log = logging.getLogger(__name__)


class _Settings(CommonSettings):
    """What replies follow at the moment, and what is measured for it."""

    def __init__(self, engine: Engine, sensors: SensorsOnDemand, costs: CostModel | None) -> None:
        super().__init__((Budget(), Budget()), costs)
        self._engine, self._sensors = engine, sensors
        #: Held to measure or set prices; the handler of a signal may set a budget while its own thread measures them.
        self.lock = threading.RLock()

    def kv_bytes(self) -> float | None:
        """Most bytes of the caches of all replies, or None."""
        bound_mb = self.budgets[0].kv_memory_mb
        return None if bound_mb is None else 1e6 * bound_mb

    def resolved(self, budget: Budget | str | os.PathLike[str] | None) -> Budget:
        """See :meth:`LLM.resolved`."""
        if budget is None:
            return self.budgets[1]
        budget, manifest = parse_budget(budget), self._engine.manifest
        resolved = budget.for_bundle(manifest.agreement, calibrated=manifest.confidence is not None)
        if budget.needs_costs:
            self.measured()  # now, not in the middle of a reply
        if budget.needs_sensors:
            self._sensors.check(budget)
        return resolved

    def measured(self) -> CostModel:
        """The prices, which the first call measures."""
        if self.costs is None:
            with self.lock:  # two measurements at once would disturb each other
                if self.costs is None:
                    self.costs = costs = measure_prices(self._engine)
                    steady = ", ".join(f"exit {e}: {costs.steady_ms(e, 0):.2f} ms" for e in costs.exits)
                    _log.info("measured what a token costs: %s", steady)
        return self.costs


class LLM(Closing):
    """A loaded bundle that generates within a budget. A context manager that frees the engine.

    The budget may be replaced at any time; it takes effect at the next token. Several threads may stream their own replies
    at once; they share the engine and the budget.

    Example:
        with balcony_edge.load("bundle/") as llm:
            print(llm.generate("Why is the sky blue?", max_new_tokens=60).text)
    """

    def __init__(
        self,
        engine: Engine,
        codec: TextCodec,
        budget: Budget,
        *,
        costs: CostModel | None = None,
        readings: Callable[[], tuple[Reading, ...]] | None = None,
        prefix_mb: float = KEPT_BYTES / 1e6,
        prefix_directory: str | os.PathLike[str] | None = None,
    ) -> None:
        """Create an LLM from the parts that :meth:`open` loads.

        Args:
            engine: engine that runs the bundle.
            codec: tokenizer of the bundle.
            budget: limits of replies.
            costs: prices of this device; None measures them when a budget needs them.
            readings: function that gives the latest reading of every sensor; None uses the device's own sensors, from the
                first budget that needs them.
            prefix_mb, prefix_directory: what is kept of replies that have ended, as for :func:`balcony_edge.load`.
        """
        self.engine, self.codec = engine, codec
        # What these hold must not hold the LLM: its weights would stay until Python looks for cycles, which know no bytes.
        self._sensors = sensors = SensorsOnDemand(readings)
        self._settings = settings = _Settings(engine, sensors, costs)
        self._learned = Learned(engine.manifest)
        sequences = Sequences(engine, Bounds.of(settings.kv_bytes, prefix_mb, prefix_directory))
        scheduler = Scheduler(engine, sequences, self._learned, lambda: settings.costs, sensors.latest)
        limits = partial(ReplyLimits, settings, settings.resolved)
        self._requests = Requests(engine, codec, scheduler, self._learned, limits, sensors.latest)
        self._lockstep = Lockstep(engine, self._requests, self._learned, sensors.latest)
        try:
            self.budget = budget
        except BaseException:
            self._sensors.close()
            raise

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        budget: Budget | str | os.PathLike[str] | None = None,
        profile: str | os.PathLike[str] | None = None,
        verify_hashes: bool = True,
        prefix_mb: float = KEPT_BYTES / 1e6,
        prefix_directory: str | os.PathLike[str] | None = None,
        **options: Unpack[EngineOptions],
    ) -> Self:
        """Load a bundle; see :func:`balcony_edge.load`."""
        begin, asked = time.perf_counter(), parse_budget(budget)
        engine: Engine | None = None
        if options.get("spin") is None:
            options["spin"] = not asked.may_wait
        try:
            with Bundle.opening(path, verify_hashes=verify_hashes) as bundle:
                manifest = bundle.manifest
                try:
                    asked.for_bundle(manifest.agreement, calibrated=manifest.confidence is not None)
                except BudgetError as error:
                    place = f"{os.fspath(budget)}: " if isinstance(budget, str | os.PathLike) else ""
                    raise BudgetError(f"{place}{error}") from None
                codec = TextCodec(bundle)
                prices = None if profile is None else profiled_prices(profile, manifest)  # refuses it before the load
                engine = Engine.of(bundle, verify_hashes=verify_hashes, **options)
            costs = None if prices is None else prices(engine)
            took_s = time.perf_counter() - begin
            _log.info("loaded %s (%s, exits %s) in %.2f s", path, manifest.precision, manifest.exit_layers, took_s)
            return cls(engine, codec, asked, costs=costs, prefix_mb=prefix_mb, prefix_directory=prefix_directory)
        except BaseException:
            if engine is not None:
                engine.close()  # Python does not free the memory of an accelerator
            raise

    @property
    def budget(self) -> Budget:
        """Limits of replies; set it to a budget, the path of a budget file, or None for full depth."""
        return self._settings.budgets[0]

    @budget.setter
    def budget(self, value: Budget | str | os.PathLike[str] | None) -> None:
        budget = parse_budget(value)
        self._settings.budgets = budget, self.resolved(budget)  # one assignment: other threads see both or neither

    def resolved(self, budget: Budget | str | os.PathLike[str] | None = None) -> Budget:
        """A budget as it is for this bundle, once the prices and sensors that it needs are there; None for the LLM's own.

        Raises:
            BudgetError: the budget does not fit the bundle.
            InfeasibleError: no sensor measures a ceiling, and the budget asks for an error in that case.
        """
        return self._settings.resolved(budget)

    def readings(self) -> tuple[Reading, ...]:
        """Latest reading of every sensor; the first call starts the device's sensors."""
        return self._sensors.latest()

    @property
    def costs(self) -> CostModel:
        """Cost model of the exits on this device; measured once, at the first use (about half a second), unless it was set.

        Set prices of the same exits to decide with those instead, e.g. those of a simulation. They take effect at the next
        token.

        Raises:
            InputError: the prices are for other exits, or are no cost model.
        """
        return self._settings.measured()

    @costs.setter
    def costs(self, value: CostModel) -> None:
        if not isinstance(value, CostModel):
            raise InputError(
                f"costs of type {type(value).__name__}: give a CostModel, e.g. DeviceProfile.load(path).costs"
            )
        if value.exits != self.exit_layers:
            raise InputError(
                f"costs: are for exits {', '.join(map(str, value.exits))}, but this bundle has "
                f"{', '.join(map(str, self.exit_layers))}: give prices of the same exits"
            )
        with self._settings.lock:  # a measurement in another thread would replace them at its end
            self._settings.costs = value

    @property
    def quality(self) -> dict[int, Telemetry]:
        """Exit → number of its tokens that the full depth checked while it caught up, and number of disagreements."""
        return dict(self._learned.confident.telemetry)

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Exits in ascending order; the last is the full depth."""
        return self.engine.exit_layers

    def encode(
        self,
        prompt: Prompt,
        *,
        chat: bool | None = None,
        control_tokens: bool | None = None,
        add_special_tokens: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        documents: Sequence[Mapping[str, Any]] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Tokens of a prompt; arguments and errors as for :meth:`stream`, ``add_special_tokens`` as for :class:`.TextCodec`."""
        shown = None if self._requests.box(tools, tool_choice) is None else tools
        return self._requests.prompt_ids(
            prompt, chat, control_tokens, shown or (), documents, chat_template_kwargs, add_special_tokens
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without control tokens.

        Raises:
            InputError: they are not token ids of this bundle.
        """
        return self.codec.decode(checked(tokens, 1, self.engine.manifest.model.vocab_size)[0].tolist())

    def compile_grammar(
        self,
        sampling: SamplingParams,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        only_look: bool = False,
    ) -> bool:
        """Compile the structure that a reply will have, if any, so that no reply waits for it (up to 3 s).

        The last 32 are kept, or fewer if they are long. Returns whether there was nothing to compile; with
        ``only_look`` nothing is compiled. Other arguments, and errors, are those of :meth:`stream`.
        """
        box = self._requests.box(tools, tool_choice, parallel_tool_calls)
        compiled = self._requests.is_compiled(sampling, box)
        if not compiled and not only_look:
            self._requests.structure(sampling, box)
        return compiled

    def stream(
        self,
        prompt: Prompt,
        *,
        sequence: TokenSequence | None = None,
        trace: TraceWriter | None = None,
        **options: Unpack[ReplyOptions],
    ) -> TokenStream:
        """Generate token by token.

        Args:
            prompt: text, chat messages, or token ids.
            sequence: sequence to continue; rows that its tokens share with the prompt are kept, the others rolled back.
            trace: writer that records the controller's input and decisions, a line each.
            options: any of the following.

        Options:
            budget: limits of this reply, or the path of a budget file; by default those of :attr:`budget`.
            max_new_tokens: largest number of tokens to make; by default as many as the context holds.
            sampling: parameters for picking tokens, and the structure of the reply; greedy by default.
            stop: strings that end the reply; they are not part of its text.
            logprobs: number of most likely tokens to report with their log-probabilities, next to the token's own.
            chat: whether to put a text into the chat template; by default if the bundle has one.
            control_tokens: whether the name of a control token in the prompt (such as ``<|im_end|>``) is that token; by
                default only where the prompt is not put into the chat template.
            ignore_eos: whether to go on after the end-of-sequence token; for measurements.
            tools: functions that the model may call, in OpenAI's shape.
            tool_choice: ``auto`` (the default), ``none``, ``required``, or the function that it must call, as
                ``{"type": "function", "function": {"name": ...}}``.
            parallel_tool_calls: whether a reply may have several calls.
            documents: documents for the chat template.
            chat_template_kwargs: further variables of the chat template.

        Raises:
            InputError: a prompt or parameter cannot be used.
            ContextLengthError: the prompt does not fit the context.
            BudgetError: the budget is refused, or it allows none of the bundle's exits.
            InfeasibleError: no exit meets the target, and the budget asks for an error; or the device is too hot.
            BusyError: the replies in progress leave no time for it, or too many wait.
            DeviceError: the device fails, or has too little memory.
            MissingDependencyError: a structure or tools need llguidance, which is not installed.
        """
        request = self._requests.of(prompt, sequence=sequence, trace=trace, **options)
        return TokenStream(self._requests.tokens(request, sequence), request)

    def generate(self, prompt: Prompt, **options: Unpack[ReplyOptions]) -> Reply:
        """Generate a whole reply; options and errors are those of :meth:`stream`."""
        with self.stream(prompt, **options) as stream:  # an interrupt between two tokens ends it as well
            for _ in stream:
                pass
        return stream.reply

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        budget: Budget | str | os.PathLike[str] | Sequence[Budget | None] | None = None,
        sampling: SamplingParams | None = None,
        chat: bool | None = None,
    ) -> list[str]:
        """Reply to several prompts at once; they share passes, and every reply is held to its own budget.

        Args:
            prompts: prompts of any lengths.
            max_new_tokens: largest number of tokens of each reply.
            budget: limits of each reply: one for all, or one for each prompt; by default those of :attr:`budget`.
            sampling: parameters for picking tokens; greedy by default.
            chat: whether to put texts into the chat template, as for :meth:`stream`.

        Raises:
            InputError: the prompts are one text, or there is not one budget for each; the others are those of :meth:`stream`.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            kind = "one text" if isinstance(prompts, str) else f"of type {type(prompts).__name__}"
            raise InputError(f"prompts: {kind}: give a list of prompts, or use generate()")
        budgets: list[Any] = list(budget) if isinstance(budget, list | tuple) else [budget] * len(prompts)
        if len(budgets) != len(prompts):
            raise InputError(f"budget: {len(budgets)} for {len(prompts)} prompts: give one for all, or one for each")
        requests = [
            self._requests.of(prompt, budget=own, max_new_tokens=max_new_tokens, sampling=sampling, chat=chat)
            for prompt, own in zip(prompts, budgets, strict=True)
        ]
        alike = self._lockstep.takes(requests, sampling)
        # Where they can share passes they do, each at its own length and exit.
        if alike and self.budget.kv_memory_mb is None and self._places < len(requests):
            return self._lockstep.texts(requests, sampling)
        # Of a reply that has ended only its text is kept: its tokens take half a kilobyte each.
        waiting, places, texts = deque(enumerate(requests)), dict[TokenStream, int](), [""] * len(requests)
        del requests
        with self.together() as replies:
            while waiting or replies.open:
                while waiting and len(replies.open) < (self._places or MEMBERS):
                    place, request = waiting.popleft()
                    places[replies.begin(request)] = place
                for stream, found in replies.step():
                    if isinstance(found, Exception):
                        try:
                            raise found
                        finally:
                            del found  # its traceback has this frame
                    if found.finish_reason is not None:
                        texts[places.pop(stream)] = stream.reply.text
        return texts

    def record_rounds(self, trace: RoundTraceWriter | None) -> None:
        """Record what the joint controller sees and decides about replies at once, or stop recording with None.

        Example:
            with RoundTraceWriter("rounds.jsonl") as trace:
                llm.record_rounds(trace)
                llm.generate_batch(prompts, max_new_tokens=50)
                llm.record_rounds(None)

        Raises:
            InputError: the trace is not a RoundTraceWriter.
        """
        if trace is not None:
            from balcony_edge.control.company import round_trace  # noqa: PLC0415 - few programs record

            if not isinstance(trace, round_trace.RoundTraceWriter):
                raise InputError(f"trace of type {type(trace).__name__}: give a RoundTraceWriter, or None to stop")
            self.costs  # noqa: B018 - measured now: a round without prices could not be decided again
        self._requests.scheduler.record(trace)

    def together(self) -> Together:
        """Several replies that one thread drives; see :class:`.together.Together`."""
        return Together(self._requests)

    @property
    def _places(self) -> int:
        """Number of replies that can share passes."""
        return 0 if self.pool is None else len(self.pool.members)

    def chat(self, *, system: str | None = None) -> Chat:
        """Begin a conversation that remembers its turns and reuses the rows that they have in common.

        Raises:
            InputError: the bundle has no chat template.
        """
        if not self.codec.has_chat_template:
            raise InputError("this bundle has no chat template: use stream() or generate() with a text")
        return Chat(self, self.engine.new_sequence(), system)

    def save_prefix(
        self,
        prompt: Prompt,
        path: str | os.PathLike[str],
        *,
        chat: bool | None = None,
        control_tokens: bool | None = None,
        int8: bool = False,
    ) -> int:
        """Compute a prompt at all exits and save its rows, for prompts that begin alike; returns their number.

        Args:
            prompt: text, chat messages, or token ids. Of the system's messages alone, the beginning that they give to every
                conversation is saved.
            path: file to write; a file of that name is replaced as a whole.
            chat, control_tokens: as for :meth:`stream`.
            int8: whether to store keys and values in 8 bits.

        Raises:
            InputError: the prompt cannot be used, or the file cannot be written.
            ContextLengthError: the prompt does not fit the context.
        """
        place = file.place(path)
        require_writable_file(place, str(path), InputError, "choose another place")  # before the prompt runs
        begin = self._requests.beginning(prompt, control_tokens)
        control_tokens = control_tokens if begin is prompt else None
        request = self._requests.of(begin, max_new_tokens=1, chat=chat, control_tokens=control_tokens)
        with self._requests.sequence(request.ids, request.rows) as sequence:
            sequence.keep_common(request.ids)
            sequence.append(request.ids[sequence.length :])
            sequence.catch_up()
            file.save(place, sequence, int8=int8)
            if (files := self.prefix_files) is not None and place.resolve().parent == files.directory.resolve():
                files.add(files.directory / place.name)
            return sequence.length

    def load_prefix(self, path: str | os.PathLike[str]) -> int:
        """Read the rows of a saved prefix or conversation, for prompts that begin alike; returns their number.

        They go when newer ones need the place, like those of replies that have ended.

        Raises:
            InputError: the file cannot be read, is damaged, or was saved with another bundle; or this engine shares no rows.
            BusyError: as many replies are in progress as there is place for.
        """
        if self.pool is None:
            raise InputError("load_prefix: this engine shares no rows between replies: use a conversation (Chat.load)")
        return self.pool.load(file.place(path))

    @property
    def pool(self) -> SequencePool | None:
        """Memory of replies, with the rows of those that have ended; None if this engine shares no rows."""
        return self._requests.scheduler.sequences.pool

    @property
    def prefix_files(self) -> PrefixFiles | None:
        """Files of rows in the directory that was given."""
        return self._requests.scheduler.sequences.files

    def close(self) -> None:
        """Free the engine, and stop the sensors if they were started; write what is kept, if there is a directory for it."""
        try:
            if not self.engine.is_forked:  # another thread of that process may have held the lock of the rows
                self._requests.scheduler.close()
        finally:
            self._sensors.close()
            self.engine.close()
