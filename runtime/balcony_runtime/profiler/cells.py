"""The measurement of each quantity.

A cell is a quantity that one call measures once: a block of decode steps, a prefill, a switch, or a sweep of passes through all
graphs. Quantities that a user sees (time to first token, time between tokens, switches) are measured through ``LLM.stream``, as
a user's program calls it. Single passes are measured on the sequence's state in the order of a full-depth step, so that every
graph finds the CPU's caches as the earlier graphs leave them: measured alone, a small balcony would stay in the cache.

A pass always ends at the last row of a sequence of that length. Bindings grow with a sequence and never shrink, so each length
has a sequence of its own. All rows are filled first, because untouched memory reads as one cached page of zeros. On an
accelerator every sequence has the length of the engines' caches, so only one is kept: a dozen may not fit its memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from balcony_edge.budget import Budget
from balcony_edge.device.profile import Kind
from balcony_runtime.backends.accelerator.backend import DeviceBackend
from balcony_runtime.decoding.prices import stand_at
from balcony_runtime.llm import LLM
from balcony_runtime.profiler.grid import SHORT_END, Grid
from balcony_runtime.token_sequence import TokenSequence

#: Tokens of a block that do not count: the first runs the prompt, the second binds the decode step.
WARM_TOKENS = 2
#: A target that is never missed: the controller checks it and does not change the exit.
EASY_MS = 1e5
#: Rows before a switch, if the context has room for them.
SWITCH_CONTEXT = 192


@dataclass(frozen=True, slots=True)
class Key:
    """Identity of a quantity; fields as in :class:`balcony_edge.device.profile.Entry`."""

    kind: Kind
    exit_layer: int
    from_exit: int | None = None
    rows: int = 1
    context: int = 0


#: Result of one call of a cell: a block of samples, in milliseconds, for each quantity that it measures.
Blocks = dict[Key, list[float]]


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement with its title; ``run`` makes it once."""

    title: str
    run: Callable[[], Blocks]


def prompt(length: int, vocab_size: int) -> list[int]:
    """Fixed tokens; their values do not affect the cost."""
    return [(100 + 7 * i % 1000) % vocab_size for i in range(length)]


@dataclass(frozen=True, slots=True)
class Switch:
    """A token at another exit than the tokens before it: the rows that ran for it, its position, and its latency."""

    stage_rows: tuple[int, ...]
    balcony_rows: tuple[int, ...]
    position: int
    latency_ms: float


def switched(llm: LLM, sequence: TokenSequence, before: int, after: int, tokens: list[int], pending: int) -> Switch:
    """Run ``pending`` rows after the end of ``sequence`` at one exit, make one token at the other, and roll back.

    The stream that switches also makes the last of these rows, as in a reply, so its decode step is already bound.

    Args:
        llm: the loaded bundle.
        sequence: sequence to switch on.
        before, after: exit of the pending rows, and exit of the token.
        tokens: tokens of the sequence and ``pending`` more.
        pending: number of rows at the first exit.
    """
    context = sequence.length
    sequence.checkpoint()
    bulk = pending - min(pending, WARM_TOKENS)
    if bulk:
        sequence.advance(before, tokens[context : context + bulk])
    llm.budget = Budget(exit_layer=before)
    prompt = tokens[: context + bulk + 1]
    stream = llm.stream(prompt, max_new_tokens=pending - bulk + 1, ignore_eos=True, sequence=sequence)
    for _ in range(pending - bulk):
        next(stream)
    stage_rows, balcony_rows = sequence.rows_due(1)
    position = sequence.length
    llm.budget = Budget(exit_layer=after)
    latency_ms = next(stream).latency_ms
    sequence.rollback(context)
    return Switch(tuple(stage_rows), tuple(balcony_rows), position, latency_ms)


class Bench:
    """The sequences for measuring, and the cells over them."""

    def __init__(self, llm: LLM, grid: Grid) -> None:
        self.llm, self.grid = llm, grid
        self.exits = llm.exit_layers
        self._filled: dict[tuple[str, int], TokenSequence] = {}
        #: Whether every sequence has the length of the engines' caches.
        self._whole = isinstance(llm.engine.backend, DeviceBackend)
        #: Bytes of such a sequence. While the next one is filled, none is kept, and Ctrl-C or an error may come then.
        self._whole_bytes = 0

    def cells(self) -> tuple[Cell, ...]:
        """The cells of the whole grid."""
        grid, exits = self.grid, self.exits
        shallow, full = exits[:-1], exits[-1]
        found = [Cell(f"{rows} rows of {end}", partial(self._sweep, rows, end)) for rows, end in grid.passes()]
        found += [
            Cell(f"decode at {exit_layer}, {depth} tokens", partial(self.decode, exit_layer, depth))
            for depth in grid.depths
            for exit_layer in exits
        ]
        found += [
            Cell(f"controller at {exit_layer}", partial(self._controlled, exit_layer, min(grid.depths)))
            for exit_layer in exits
        ]
        found += [
            Cell(f"prompt of {length} at {exit_layer}", partial(self._prefill, exit_layer, length))
            for length in grid.prompts
            for exit_layer in exits
        ]
        found += [
            Cell(f"{way}, {rows} rows", partial(self._switch, before, after, rows))
            for exit_layer in shallow
            for rows in grid.pending
            for way, before, after in (
                (f"{exit_layer} → {full}", exit_layer, full),
                (f"{full} → {exit_layer}", full, exit_layer),
            )
        ]
        return tuple(found)

    def decode(self, exit_layer: int, depth: int) -> Blocks:
        """Measure the time between tokens, and Python's share of it, in a block of the grid's tokens at a fixed exit."""
        gaps, python = self._block(Budget(exit_layer=exit_layer), depth)
        return {
            Key("decode", exit_layer, context=depth): gaps,
            Key("python", exit_layer, context=depth): python,
        }

    def _controlled(self, exit_layer: int, depth: int) -> Blocks:
        """Measure Python's share when the controller checks a target at every token and does not change the exit."""
        budget = Budget(tpot_ms=EASY_MS, min_exit=exit_layer, max_exit=exit_layer)
        return {Key("controller", exit_layer, context=depth): self._block(budget, depth)[1]}

    def _block(self, budget: Budget, depth: int) -> tuple[list[float], list[float]]:
        """``(gap, Python's share of it)`` of each token, milliseconds."""
        sequence = self._sequence("decode", depth, room=self.grid.tokens + 1)
        self.llm.budget = budget
        sequence.checkpoint()
        stream = self.llm.stream(
            self._tokens(depth + 1), max_new_tokens=self.grid.tokens, ignore_eos=True, sequence=sequence
        )
        gaps, python = [], []
        busy_ns = sequence.state.busy_ns
        for token in stream:
            now_ns = sequence.state.busy_ns
            gaps.append(token.latency_ms)
            python.append(max(token.latency_ms - (now_ns - busy_ns) / 1e6, 0.0))
            busy_ns = now_ns
        sequence.rollback(depth)
        return gaps[WARM_TOKENS:], python[WARM_TOKENS:]

    def state_bytes(self) -> tuple[int, int]:
        """``(tokens, bytes)`` of the longest sequence; the bytes are those of caches and row buffers.

        An accelerator allocates them for as many tokens as its engines take, however long the sequence is.
        """
        if self._whole:
            return self.llm.engine.max_length, self._whole_bytes
        sequence = self._longest()
        return sequence.length, sequence.state.memory_bytes

    def recurrent_bytes(self) -> int:
        """The part of these bytes that is of recurrent layers' states, which are not the price of a token."""
        return 0 if self._whole else self._longest().state.recurrent_bytes

    def _longest(self) -> TokenSequence:
        return max(self._filled.values(), key=lambda s: s.length)

    def _prefill(self, exit_layer: int, length: int) -> Blocks:
        self.llm.budget = Budget(exit_layer=exit_layer)
        # A sequence of its own: the pool would give back the rows of the last round's prompt.
        sequence = self.llm.engine.new_sequence(max_length=length + 1)
        token = next(self.llm.stream(self._tokens(length), max_new_tokens=1, ignore_eos=True, sequence=sequence))
        return {Key("prefill", exit_layer, rows=length, context=0): [token.latency_ms]}

    def _switch(self, before: int, after: int, pending: int) -> Blocks:
        """Make ``pending`` tokens at one exit, then one at the other; deeper stages or the balcony take in pending rows."""
        context = min(max(min(self.grid.depths), SWITCH_CONTEXT), max(self.grid.depths))
        context = min(context, self.llm.engine.max_length - pending - 2)
        sequence = self._sequence("switch", context, room=max(self.grid.pending) + 2)
        found = switched(self.llm, sequence, before, after, self._tokens(context + pending), pending)
        kind: Kind = "switch_up" if after > before else "switch_down"
        return {Key(kind, after, before, rows=pending + 1, context=found.position): [found.latency_ms]}

    def _sweep(self, rows: int, end: int) -> Blocks:
        """Measure one pass through every graph, in the order of a step; its last row is the sequence's last."""
        state = self._sequence("pass", end, room=0).state
        start, context, exits = end - rows, end - 1, self.exits
        stand_at(state, start, self.llm.engine.manifest)
        found: Blocks = {}

        def timed(key: Key, call: Callable[[], object]) -> None:
            busy_ns, begin_ns = state.busy_ns, time.perf_counter_ns()
            call()
            state.wait()  # a call to a GPU returns before the pass has run
            # A pass of one row is bound in advance, and a decode step does not include the Python of this call. More rows are
            # copied and bound when they run, so there the Python counts.
            spent_ns = state.busy_ns - busy_ns if rows == 1 else time.perf_counter_ns() - begin_ns
            found[key] = [spent_ns / 1e6]

        for stage, exit_layer in enumerate(exits):
            timed(Key("catch_up", exit_layer, rows=rows, context=context), partial(state.run_stage, stage, start, end))
        for index, exit_layer in enumerate(exits[:-1]):
            timed(Key("balcony", exit_layer, rows=rows, context=context), partial(state.run_exit, index, start, end, 1))
        if rows == 1:
            timed(Key("norm", exits[-1], context=context), lambda: state.run_exit(len(exits) - 1, start, end, 1))
            timed(Key("lm_head", exits[-1], context=context), lambda: state.logits(1))
        elif end == SHORT_END:  # several replies at once; the context does not matter
            state.run_exit(len(exits) - 1, start, end, rows)
            state.wait()
            timed(Key("lm_head", exits[-1], rows=rows, context=context), lambda: state.logits(rows))
        return found

    def _tokens(self, length: int) -> list[int]:
        return prompt(length, self.llm.engine.manifest.model.vocab_size)

    def _sequence(self, use: str, length: int, room: int) -> TokenSequence:
        """A sequence of ``length`` rows, all of which every stage and balcony has taken in."""
        key = (use, length)
        if key not in self._filled:
            if self._whole:
                self._filled.clear()
            sequence = self.llm.engine.new_sequence(max_length=min(length + room, self.llm.engine.max_length))
            if length:
                sequence.advance(self.exits[-1], self._tokens(length))
                sequence.catch_up()
            self._filled[key] = sequence
            if self._whole:
                self._whole_bytes = sequence.state.memory_bytes
        return self._filled[key]
