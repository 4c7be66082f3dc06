"""Generation: a loaded bundle that turns prompts into text within a budget.

Owns :class:`LLM` and turns ids into streamed text: end of sequence, stop strings, limits. The loop is
:mod:`balcony_runtime.decoding.loop`; the types that a user sees are in :mod:`.reply`, conversations in :mod:`.chat`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import NamedTuple, Self, Unpack

import numpy as np

from balcony_edge.budget import Budget, parse_budget
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.control.observed import unseen
from balcony_edge.control.trace import TraceWriter
from balcony_edge.control.verdict import Watch
from balcony_edge.device.costs import CostModel
from balcony_edge.device.machine import this_device
from balcony_edge.device.profile import DeviceProfile
from balcony_edge.device.readings import Reading
from balcony_edge.errors import BudgetError, ContextLengthError, InfeasibleError, InputError, ProfileError
from balcony_runtime.backends.base import IntArray
from balcony_runtime.chat import Chat
from balcony_runtime.decoding.confident import Telemetry
from balcony_runtime.decoding.loop import Decoder, Environment, Learned
from balcony_runtime.decoding.prices import measure_prices
from balcony_runtime.decoding.sampling import Sampler, SamplingParams, log_probabilities
from balcony_runtime.engine import Engine, EngineOptions, TokenSequence, refuse_foreign, whole
from balcony_runtime.reply import FinishReason, Reply, Token, TokenStream
from balcony_runtime.sensors import Sensors, device_sources
from balcony_runtime.text import Message, StopStrings, TextCodec

_log = logging.getLogger(__name__)
#: Longest wait for sensors that have just been started: energy counters and busy shares need two samples.
FIRST_READINGS_S = 1.0

Prompt = str | Sequence[Message] | Sequence[int]


class LLM:
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
    ) -> None:
        """Create an LLM from the parts that :meth:`open` loads.

        Args:
            engine: engine that runs the bundle.
            codec: tokenizer of the bundle.
            budget: limits of replies.
            costs: prices of this device; None measures them when a budget needs them.
            readings: function that gives the latest reading of every sensor; None uses the device's own sensors, from the
                first budget that needs them.
        """
        self.engine, self._codec = engine, codec
        self._costs, self._ask_sensors = costs, readings
        self._sensors: Sensors | None = None
        self._sensors_lock = threading.Lock()
        self._agreement = engine.manifest.agreement
        self._learned = Learned(engine.exit_layers, self._agreement, engine.manifest.confidence)
        try:
            self.budget = budget
        except BaseException:
            self._close_sensors()
            raise

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        budget: Budget | str | os.PathLike[str] | None = None,
        profile: str | os.PathLike[str] | None = None,
        verify_hashes: bool = True,
        **options: Unpack[EngineOptions],
    ) -> LLM:
        """Load a bundle; see :func:`balcony_edge.load`."""
        begin = time.perf_counter()
        asked = parse_budget(budget)
        bundle = Bundle.open(path, verify_hashes=verify_hashes)
        manifest = bundle.manifest
        try:
            asked.for_bundle(manifest.agreement)
        except BudgetError as error:
            if isinstance(budget, str | os.PathLike):
                raise BudgetError(f"{os.fspath(budget)}: {error}") from None
            raise
        codec = TextCodec(bundle)
        engine = Engine.of(bundle, verify_hashes=verify_hashes, **options)
        try:
            costs = None if profile is None else _profiled(profile, engine)
            seconds = time.perf_counter() - begin
            _log.info("loaded %s (%s, exits %s) in %.2f s", path, manifest.precision, manifest.exit_layers, seconds)
            return cls(engine, codec, asked, costs=costs)
        except BaseException:
            engine.close()  # Python does not free the memory of an accelerator
            raise

    @property
    def budget(self) -> Budget:
        """Limits of replies; set it to a budget, the path of a budget file, or None for full depth."""
        return self._budget

    @budget.setter
    def budget(self, value: Budget | str | os.PathLike[str] | None) -> None:
        budget = parse_budget(value)
        resolved = budget.for_bundle(self._agreement)
        if budget.policy == "confident" and self.engine.manifest.confidence is None:
            raise BudgetError(
                "policy = 'confident': this bundle has no thresholds: measure them with "
                "`balcony-edge calibrate BUNDLE --text TEXT`"
            )
        if budget.needs_costs:
            self.costs  # noqa: B018 - measured now, not in the middle of a reply
        if budget.needs_sensors:
            self._check_seen(budget)
        self._budget, self._resolved = budget, resolved

    def _check_seen(self, budget: Budget) -> None:
        """Warn of ceilings that no sensor of this device measures; raise if the budget asks for an error."""
        starts, until_s = self._ask_sensors is None, time.monotonic() + FIRST_READINGS_S
        while missing := unseen(budget, self.readings(), time.monotonic()):
            if not starts or time.monotonic() >= until_s:
                break
            time.sleep(0.05)
        if not missing:
            return
        asked = ", ".join(f"{key} = {getattr(budget, key):g}" for key in missing)
        text = f"{asked}: no sensor of this device measures it (`balcony-edge doctor` says what is missing)"
        if budget.on_infeasible == "error":
            raise InfeasibleError(f"{text}: leave it out, or choose another on_infeasible")
        _log.warning("%s: it is not held", text)

    def readings(self) -> tuple[Reading, ...]:
        """Latest reading of every sensor; the first call starts the device's sensors."""
        with self._sensors_lock:
            if self._ask_sensors is None:
                self._sensors = Sensors(device_sources()).start()
                self._ask_sensors = self._sensors.latest
        return self._ask_sensors()

    @property
    def costs(self) -> CostModel:
        """Cost model of the exits on this device; measured once, at the first use (about half a second), unless it was set.

        Set prices of the same exits to decide with those instead, e.g. those of a simulation. They take effect at the next
        token.

        Raises:
            InputError: the prices are for other exits.
        """
        if self._costs is None:
            self._costs = costs = measure_prices(self.engine)
            steady = ", ".join(f"exit {e}: {costs.steady_ms(e, 0):.2f} ms" for e in costs.exits)
            _log.info("measured what a token costs: %s", steady)
        return self._costs

    @costs.setter
    def costs(self, value: CostModel) -> None:
        if value.exits != self.exit_layers:
            raise InputError(
                f"costs: are for exits {', '.join(map(str, value.exits))}, but this bundle has "
                f"{', '.join(map(str, self.exit_layers))}: give prices of the same exits"
            )
        self._costs = value

    @property
    def quality(self) -> dict[int, Telemetry]:
        """Exit → number of its tokens that the full depth checked while it caught up, and number of disagreements."""
        return dict(self._learned.confident.telemetry)

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Exits in ascending order; the last is the full depth."""
        return self.engine.exit_layers

    def encode(
        self, prompt: str | Sequence[Message], *, chat: bool | None = None, control_tokens: bool = True
    ) -> list[int]:
        """Tokens of a prompt, as :meth:`stream` uses them."""
        return self._codec.encode(prompt, chat=chat, control_tokens=control_tokens)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        chat: bool | None = None,
        control_tokens: bool = True,
        ignore_eos: bool = False,
        sequence: TokenSequence | None = None,
        trace: TraceWriter | None = None,
    ) -> TokenStream:
        """Generate token by token.

        Args:
            prompt: text, chat messages, or token ids.
            max_new_tokens: largest number of tokens to make; by default as many as the context holds.
            sampling: parameters for picking tokens; greedy by default.
            stop: strings that end the reply; they are not part of its text.
            logprobs: number of most likely tokens to report with their log-probabilities, next to the token's own.
            chat: whether to put a text into the chat template; by default if the bundle has one.
            control_tokens: whether the name of a control token in the prompt (such as ``<|im_end|>``) is that token, as in
                transformers; False takes it as plain text.
            ignore_eos: whether to go on after the end-of-sequence token; for measurements.
            sequence: sequence to continue; rows that its tokens share with the prompt are kept, the others rolled back.
            trace: writer that records the controller's input and decision, one line per token.

        Raises:
            InputError: a prompt or parameter cannot be used.
            ContextLengthError: the prompt does not fit the context.
            InfeasibleError: no exit meets the target, and the budget asks for an error in that case.
        """
        ids = self._prompt_ids(prompt, chat, control_tokens)
        limit = self._new_tokens(len(ids), max_new_tokens, sequence)
        if logprobs is not None:
            whole("logprobs", logprobs, 0)
        if trace is not None:
            self.readings()  # start the sensors now, not during the first step
        if sequence is None:
            sequence = self.engine.new_sequence(max_length=len(ids) + limit)
        model = self.engine.manifest.model
        sampler = Sampler(_params(sampling), np.array([ids], np.int64), model.vocab_size)
        ends = frozenset() if ignore_eos else frozenset(model.eos_token_ids)
        cancelled = threading.Event()
        watch = Watch()
        asked = _Request(ids, limit, sampler, StopStrings(stop), logprobs, ends, trace)
        return TokenStream(self._tokens(sequence, asked, cancelled, watch), len(ids), cancelled, watch)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        chat: bool | None = None,
        control_tokens: bool = True,
        ignore_eos: bool = False,
    ) -> Reply:
        """Generate a whole reply; arguments and errors are those of :meth:`stream`."""
        stream = self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            logprobs=logprobs,
            chat=chat,
            control_tokens=control_tokens,
            ignore_eos=ignore_eos,
        )
        for _ in stream:
            pass
        return stream.reply

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        sampling: SamplingParams | None = None,
        chat: bool | None = None,
    ) -> list[str]:
        """Reply to several prompts of equal length in tokens, advanced together at the budget's exits.

        Raises:
            InputError: prompts differ in length; the other errors are those of :meth:`stream`.
        """
        if isinstance(prompts, str):
            raise InputError("prompts: one text: give a list of prompts, or use generate()")
        batch = [self._prompt_ids(prompt, chat) for prompt in prompts]
        lengths = {len(ids) for ids in batch}
        if len(lengths) != 1:
            raise InputError(
                f"prompts of {sorted(lengths)} tokens: a batch takes prompts of equal length: pad or split it"
            )
        limit = self._new_tokens(lengths.pop(), max_new_tokens)
        sequence = self.engine.new_sequence(batch_size=len(batch), max_length=len(batch[0]) + limit)
        rows = np.array(batch, np.int64)
        sampler = Sampler(_params(sampling), rows, self.engine.manifest.model.vocab_size)
        replies: list[list[int]] = [[] for _ in batch]
        ended = [False] * len(batch)
        ends = frozenset(self.engine.manifest.model.eos_token_ids)
        decoder = self._decoder(sequence, rows, sampler, threading.Event())
        for _, step in zip(range(limit), decoder.steps(), strict=False):
            for member, token in enumerate(step.ids.tolist()):
                ended[member] = ended[member] or token in ends
                if not ended[member]:
                    replies[member].append(token)
            if all(ended):
                break
        return [self._codec.decode(reply) for reply in replies]

    def chat(self, *, system: str | None = None) -> Chat:
        """Begin a conversation that remembers its turns and reuses the rows that they have in common.

        Raises:
            InputError: the bundle has no chat template.
        """
        if not self._codec.has_chat_template:
            raise InputError("this bundle has no chat template: use stream() or generate() with a text")
        return Chat(self, self.engine.new_sequence(), system)

    def close(self) -> None:
        """Free the engine, and stop the sensors if they were started."""
        self._close_sensors()
        self.engine.close()

    def _close_sensors(self) -> None:
        if self._sensors is not None:
            self._sensors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prompt_ids(self, prompt: Prompt, chat: bool | None, control_tokens: bool = True) -> list[int]:
        ids_given = isinstance(prompt, Sequence | np.ndarray) and not isinstance(prompt, str | bytes | bytearray)
        if ids_given and len(prompt) and isinstance(prompt[0], int | np.integer):
            try:
                ids = [int(token) for token in prompt]  # type: ignore[arg-type]
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"prompt: token ids and something else ({error}): give integers, a text, or messages"
                ) from error
            refuse_foreign(np.array(ids), self.engine.manifest.model.vocab_size)
            return ids
        return self._codec.encode(prompt, chat=chat, control_tokens=control_tokens)  # type: ignore[arg-type]

    def _new_tokens(self, prompt_tokens: int, max_new_tokens: int | None, sequence: TokenSequence | None = None) -> int:
        context = self.engine.max_length if sequence is None else sequence.max_length
        if max_new_tokens is not None:
            whole("max_new_tokens", max_new_tokens, 1, cure="give the largest number of tokens to make, e.g. 256")
        if prompt_tokens >= context:
            whose, cure = "bundle", "export with a larger --context-length"
            if context < self.engine.max_length:
                whose, cure = "sequence", "give it a larger max_length"
            raise ContextLengthError(
                f"the prompt has {prompt_tokens} tokens and this {whose}'s context holds {context}: "
                f"shorten the prompt, or {cure}"
            )
        room = context - prompt_tokens
        return room if max_new_tokens is None else min(max_new_tokens, room)

    def _tokens(
        self, sequence: TokenSequence, asked: _Request, cancelled: threading.Event, watch: Watch
    ) -> Iterator[Token]:
        text, stop = self._codec.stream(), asked.stop
        sequence.rollback(_shared_prefix(sequence, asked.ids))
        prompt = np.array([asked.ids[sequence.length :]], np.int64)
        decoder = self._decoder(sequence, prompt, asked.sampler, cancelled, asked.trace, asked.logprobs is not None)
        steps = decoder.steps()
        for count in range(1, asked.limit + 1):
            if cancelled.is_set():
                return
            try:
                step = next(steps)
            except InfeasibleError:
                watch.saw(time.monotonic(), self.readings() if self._resolved.needs_sensors else ())
                raise
            watch.token(step.budget, step.read_s, step.latency_ms, step.readings, first=count == 1)
            token = int(step.ids[0])
            finish: FinishReason | None = "stop" if token in asked.ends else "length" if count == asked.limit else None
            piece = "" if finish == "stop" else text.push(token)
            piece, hit = stop.push(piece + (text.flush() if finish is not None else ""))
            if hit:
                finish = "stop"
            elif finish is not None:
                piece += stop.flush()
            log_p, best = None, ()  # type: float | None, tuple[tuple[int, float], ...]
            if asked.logprobs is not None and step.logits is not None:
                log_p, best = log_probabilities(step.logits[0], token, asked.logprobs)
            decision = step.decision
            yield Token(
                token,
                piece,
                decision.exit_layer,
                step.latency_ms,
                decision.predicted_ms if step.target_ms is not None else None,
                step.target_ms,
                step.caught_up_rows,
                sequence.pending_rows,
                decision,
                log_p,
                best,
                finish,
            )
            if finish is not None:
                return

    def _decoder(
        self,
        sequence: TokenSequence,
        prompt: IntArray,
        sampler: Sampler,
        cancelled: threading.Event,
        trace: TraceWriter | None = None,
        keep_logits: bool = False,
    ) -> Decoder:
        def budget_and_costs() -> tuple[Budget, CostModel | None]:
            return self._resolved, self._costs

        environment = Environment(budget_and_costs, self.readings, cancelled.wait, trace, self._learned, keep_logits)
        return Decoder(sequence, prompt, sampler, environment)


class _Request(NamedTuple):
    """Checked arguments of one reply.

    Attributes:
        ids: tokens of the prompt.
        limit: largest number of tokens to make.
        sampler: sampler that picks the tokens.
        stop: finder of the strings that end the reply.
        logprobs: number of likeliest tokens to report at each place; None without log-probabilities.
        ends: tokens that end the reply.
        trace: record of the run.
    """

    ids: list[int]
    limit: int
    sampler: Sampler
    stop: StopStrings
    logprobs: int | None
    ends: frozenset[int]
    trace: TraceWriter | None


def _params(sampling: SamplingParams | None) -> SamplingParams:
    if sampling is not None and not isinstance(sampling, SamplingParams):
        raise InputError(f"sampling = {sampling!r}: must be SamplingParams, e.g. SamplingParams(temperature=0.8)")
    return sampling or SamplingParams()


def _profiled(path: str | os.PathLike[str], engine: Engine) -> CostModel:
    """Load the costs of a device profile; warn if it is for another device, bundle or engine.

    Raises:
        ProfileError: the file cannot be read, or is for other exits.
    """
    profile, manifest = DeviceProfile.load(path), engine.manifest
    if profile.costs.exits != manifest.exit_layers:
        raise ProfileError(
            f"{os.fspath(path)}: is for exits {', '.join(map(str, profile.costs.exits))}, but this bundle has "
            f"{', '.join(map(str, manifest.exit_layers))}: measure with `balcony-edge profile`"
        )
    mismatches = profile.mismatches(this_device(), manifest.fingerprint, engine.backend.threads)
    for doubt in (*profile.doubts, *mismatches):
        _log.warning("%s: %s: its prices may not hold here", os.fspath(path), doubt)
    return profile.costs


def _shared_prefix(sequence: TokenSequence, ids: list[int]) -> int:
    """Number of rows of ``sequence`` that a prompt can keep; the prompt's last token is always run."""
    known = sequence.tokens[0][: len(ids) - 1]
    differs = np.nonzero(known != np.array(ids[: len(known)], np.int64))[0]
    return int(differs[0]) if len(differs) else len(known)
