"""Generation: the loop that asks the controller for an exit, advances the sequence and hands out tokens.

Owns the clock (``perf_counter``) and what a user sees: :class:`LLM`, :class:`Token`, :class:`Reply`. The controller
behind it is pure and the sequence knows no time. A token's latency is the gap that its receiver sees, less the time
that the receiver itself kept the stream waiting.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import numpy as np

from balcony_edge.budget import Budget, parse_budget
from balcony_edge.bundle import Bundle
from balcony_edge.controller import CatchUp, Controller, ControllerState, Decision, Measurement, Observation
from balcony_edge.errors import ContextLengthError, InfeasibleError, InputError
from balcony_edge.profile import CostModel, UnitCost
from balcony_runtime.backends.base import IntArray
from balcony_runtime.calibrate import calibrate
from balcony_runtime.engine import Engine
from balcony_runtime.engine import Sequence as TokenSequence
from balcony_runtime.sampling import Sampler, SamplingParams
from balcony_runtime.text import Message, TextCodec

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a stream.

    Attributes:
        id: of the token.
        text: that it completes; empty while a character is unfinished and for the end-of-sequence token.
        exit_layer: depth that it was computed at.
        latency_ms: gap to the token before; for the first one, time to first token.
        predicted_ms: what the controller expected; None without a target.
        target_ms: the budget's ``tpot_ms`` when it was made.
        caught_up_rows: rows of deeper stages that were worked off in the same gap, switches included.
        pending_rows: rows that the deepest stage has not seen yet.
        reason: why this exit.
        finish_reason: on the last token: ``stop`` (end of sequence) or ``length``.
    """

    id: int
    text: str
    exit_layer: int
    latency_ms: float
    predicted_ms: float | None
    target_ms: float | None
    caught_up_rows: int
    pending_rows: int
    reason: str
    finish_reason: FinishReason | None = None

    @property
    def late(self) -> bool:
        """Whether a target was missed."""
        return self.target_ms is not None and self.latency_ms > self.target_ms


@dataclass(frozen=True, slots=True)
class Reply:
    """A finished generation: its text, its tokens and what they cost."""

    text: str
    tokens: tuple[Token, ...]
    prompt_tokens: int

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended."""
        return self.tokens[-1].finish_reason if self.tokens else None

    @property
    def ttft_ms(self) -> float:
        """Time to first token."""
        return self.tokens[0].latency_ms

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
    def late_tokens(self) -> int:
        """Tokens after the first that missed the target which held for them."""
        return sum(token.late for token in self.tokens[1:])


@dataclass(frozen=True, slots=True)
class _Step:
    ids: IntArray  # (B,)
    decision: Decision
    target_ms: float | None
    latency_ms: float
    caught_up_rows: int


class LLM:
    """A loaded bundle that generates within a budget. A context manager that frees the engine.

    The budget may be replaced at any time; it takes effect at the next token.
    """

    def __init__(self, engine: Engine, codec: TextCodec, budget: Budget) -> None:
        self.engine, self._codec = engine, codec
        self._costs: CostModel | None = None
        self.budget = budget

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        budget: Budget | str | os.PathLike[str] | None = None,
        threads: int | None = None,
        verify_hashes: bool = True,
    ) -> LLM:
        """Load a bundle; see :func:`balcony_edge.load`."""
        asked = parse_budget(budget)
        bundle = Bundle.open(path, verify_hashes=verify_hashes)
        asked.check_exits(bundle.manifest.exit_layers)
        codec = TextCodec(bundle)
        return cls(Engine.of(bundle, threads=threads), codec, asked)

    @property
    def budget(self) -> Budget:
        """What replies may cost."""
        return self._budget

    @budget.setter
    def budget(self, budget: Budget) -> None:
        budget.check_exits(self.engine.exit_layers)
        if budget.tpot_ms is not None:
            self.costs  # noqa: B018 - measured now, not in the middle of a reply
        self._budget = budget

    @property
    def costs(self) -> CostModel:
        """What each exit costs on this device; measured once, at the first use (about half a second)."""
        if self._costs is None:
            self._costs = calibrate(self.engine)
        return self._costs

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Exits in ascending order; the last is the full depth."""
        return self.engine.exit_layers

    def encode(self, prompt: str | Sequence[Message], *, chat: bool | None = None) -> list[int]:
        """Tokens of a prompt, as :meth:`stream` would see them."""
        return self._codec.encode(prompt, chat=chat)

    def stream(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        chat: bool | None = None,
        ignore_eos: bool = False,
    ) -> Iterator[Token]:
        """Generate token by token.

        Args:
            prompt: a text, chat messages, or token ids.
            max_new_tokens: most tokens to make; by default as many as the context holds.
            sampling: how to pick tokens; greedy by default.
            chat: put a text into the chat template; by default where the bundle has one.
            ignore_eos: go on after the end-of-sequence token; for measurements.

        Raises:
            InputError: a prompt or parameter that cannot be used.
            ContextLengthError: the prompt does not fit the context.
            InfeasibleError: nothing meets the target and the budget asks for an error then.
        """
        ids = self._prompt_ids(prompt, chat)
        limit = self._new_tokens(len(ids), max_new_tokens)
        sequence = self.engine.new_sequence(max_length=len(ids) + limit)
        return self._stream(sequence, ids, limit, sampling or SamplingParams(), ignore_eos)

    def generate(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        chat: bool | None = None,
        ignore_eos: bool = False,
    ) -> Reply:
        """Generate a whole reply; arguments and errors as for :meth:`stream`."""
        ids = self._prompt_ids(prompt, chat)
        tokens = tuple(self.stream(ids, max_new_tokens=max_new_tokens, sampling=sampling, ignore_eos=ignore_eos))
        return Reply("".join(token.text for token in tokens), tokens, len(ids))

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[Message] | Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: SamplingParams | None = None,
        chat: bool | None = None,
    ) -> list[str]:
        """Replies to several prompts of equal length in tokens, advanced together at the budget's exits.

        Raises:
            InputError: prompts that differ in length; otherwise as :meth:`stream`.
        """
        batch = [self._prompt_ids(prompt, chat) for prompt in prompts]
        lengths = {len(ids) for ids in batch}
        if len(lengths) != 1:
            raise InputError(
                f"prompts of {sorted(lengths)} tokens: a batch takes prompts of equal length: pad or split it"
            )
        limit = self._new_tokens(lengths.pop(), max_new_tokens)
        sequence = self.engine.new_sequence(batch_size=len(batch), max_length=len(batch[0]) + limit)
        replies: list[list[int]] = [[] for _ in batch]
        ended = [False] * len(batch)
        ends = frozenset(self.engine.manifest.model.eos_token_ids)
        for step in self._steps(sequence, np.array(batch, np.int64), limit, sampling or SamplingParams()):
            for member, token in enumerate(step.ids.tolist()):
                ended[member] = ended[member] or token in ends
                if not ended[member]:
                    replies[member].append(token)
            if all(ended):
                break
        return [self._codec.decode(reply) for reply in replies]

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prompt_ids(self, prompt: str | Sequence[Message] | Sequence[int], chat: bool | None) -> list[int]:
        if not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], int | np.integer):
            return [int(token) for token in prompt]  # type: ignore[arg-type]
        return self._codec.encode(prompt, chat=chat)  # type: ignore[arg-type]

    def _new_tokens(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        context = self.engine.manifest.model.context_length
        if max_new_tokens is not None and max_new_tokens < 1:
            raise InputError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
        if prompt_tokens >= context:
            raise ContextLengthError(
                f"the prompt has {prompt_tokens} tokens and this bundle's context holds {context}: shorten the prompt, "
                "or export with a larger --context-length"
            )
        room = context - prompt_tokens
        return room if max_new_tokens is None else min(max_new_tokens, room)

    def _stream(
        self, sequence: TokenSequence, ids: list[int], limit: int, sampling: SamplingParams, ignore_eos: bool
    ) -> Iterator[Token]:
        ends = frozenset() if ignore_eos else frozenset(self.engine.manifest.model.eos_token_ids)
        text = self._codec.stream()
        for count, step in enumerate(self._steps(sequence, np.array([ids], np.int64), limit, sampling), 1):
            token = int(step.ids[0])
            finish: FinishReason | None = "stop" if token in ends else "length" if count == limit else None
            piece = "" if finish == "stop" else text.push(token)
            if finish is not None:
                piece += text.flush()
            decision = step.decision
            yield Token(
                id=token,
                text=piece,
                exit_layer=decision.exit_layer,
                latency_ms=step.latency_ms,
                predicted_ms=decision.predicted_ms if step.target_ms is not None else None,
                target_ms=step.target_ms,
                caught_up_rows=step.caught_up_rows,
                pending_rows=sequence.stage_rows[-1],
                reason=decision.reason,
                finish_reason=finish,
            )
            if finish is not None:
                return

    def _steps(
        self, sequence: TokenSequence, prompt: IntArray, limit: int, sampling: SamplingParams
    ) -> Iterator[_Step]:
        """Up to ``limit`` steps; each decides, advances, samples, and works off a chunk of backlog if it was told to."""
        sampler = Sampler(sampling)
        state = ControllerState.initial()
        new, last = prompt, None
        for _ in range(limit):
            begin = time.perf_counter_ns()
            budget, costs = self._budget, self._costs
            controller = Controller(costs or _unmeasured(self.exit_layers))
            prefill = new is prompt
            # the prompt's rows are due at any exit: the first exit is chosen by what the steps after it will cost
            stage_rows, balcony_rows = (
                ((1,) * len(self.exit_layers),) * 2 if prefill else _rows_due(sequence, new.shape[1])
            )
            observation = Observation(budget, sequence.length, stage_rows, balcony_rows, last)
            state, decision = controller.decide(state, observation)
            if decision.infeasible and budget.on_infeasible == "error":
                raise InfeasibleError(
                    f"tpot_ms = {budget.tpot_ms}: {decision.reason}: raise the target or allow less depth"
                )
            pending = sum(sequence.stage_rows)
            if decision.catch_up is not None:
                _catch_up(sequence, decision.catch_up, self.exit_layers)
            ids = sampler.pick(sequence.advance(decision.exit_layer, new)[:, -1])
            used = self.exit_layers.index(decision.exit_layer) + 1
            skipped = len(self.exit_layers) - used
            caught_up = pending + skipped * new.shape[1] - sum(sequence.stage_rows)
            latency_ms = (time.perf_counter_ns() - begin) / 1e6
            # prefill is priced by other numbers than decoding: it says nothing about the slowdown of the next step
            last = None if prefill or costs is None else Measurement(decision.exit_layer, decision.price_ms, latency_ms)
            new = ids[:, None]
            yield _Step(ids, decision, budget.tpot_ms, latency_ms, caught_up)


def _rows_due(sequence: TokenSequence, new: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows that each stage and each balcony would run for the next step: pending ones and ``new``."""
    stages = tuple(rows + new for rows in sequence.stage_rows)
    return stages, (*(rows + new for rows in sequence.balcony_rows[:-1]), new)


def _catch_up(sequence: TokenSequence, chunk: CatchUp, exits: tuple[int, ...]) -> None:
    if chunk.balcony:
        sequence.run_balcony(exits[chunk.stage], chunk.rows)
    else:
        sequence.run_stage(chunk.stage, chunk.rows)


def _unmeasured(exits: tuple[int, ...]) -> CostModel:
    """Stands in while no budget has a target: then nothing is weighed against a price."""
    nothing = (UnitCost(0.0),) * len(exits)
    return CostModel(exits, nothing, nothing, nothing[0])
