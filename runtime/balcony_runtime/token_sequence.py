"""Lazy stages: one frozen backbone, many exits, and only the work that an exit needs.

Owns the cursors: the number of rows of a sequence that each consumer (stage, balcony) has taken in. The hidden state of a token
at an exit does not depend on the exit that made the token. Rows that deeper stages have not taken in are therefore kept, and
run through them in one batch when a deeper exit is next used. It knows no clock, no policy and no engine's memory: those belong
to the decode loop, the controller and the backend.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import numpy as np

from balcony_edge.errors import ContextLengthError, InputError, shown
from balcony_runtime.backends.base import Array, FloatArray, IntArray, State, likeliest
from balcony_runtime.tokens import checked, common_length, whole

if TYPE_CHECKING:
    from balcony_edge.bundle.manifest import Manifest
    from balcony_runtime.engine import Engine

#: Most rows of one pass, so that a layer's working set stays in the second-level cache and the arena stays small.
#: Measured in int4: passes of 512 rows are 6 to 7 % slower and take 33 MB more, those of 128 are 2 to 4 % slower
#: (docs/LOG.md, "Passes of 256 rows instead of 512").
MAX_PASS_ROWS = 256
#: Most bytes of attention scores of one pass: every head has one for each of its rows and each row that the caches can hold.
#: Only the part for rows that are there takes memory.
MAX_SCORE_BYTES = 1 << 30
_P = ParamSpec("_P")
_R = TypeVar("_R")


def rows_of_a_pass(manifest: Manifest, batch_size: int, max_length: int) -> int:
    """Most rows of one pass of a sequence."""
    row_bytes = 4 * batch_size * max_length * max(manifest.model.num_attention_heads, 1)
    rows = max(1, min(MAX_PASS_ROWS, MAX_SCORE_BYTES // row_bytes))
    # Portions of a prompt are multiples of MAX_PASS_ROWS, 256: passes of fewer rows must end there too.
    return rows if rows == MAX_PASS_ROWS else 1 << rows.bit_length() - 1


def _exclusive(method: Callable[Concatenate[TokenSequence, _P], _R]) -> Callable[Concatenate[TokenSequence, _P], _R]:
    """Make a method of a sequence exclusive: one thread at a time runs it, and only while the engine is open."""

    @functools.wraps(method)
    def call(self: TokenSequence, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with self.lock:
            self.engine.refuse_closed()
            try:
                return method(self, *args, **kwargs)
            except KeyError:  # another thread closed the engine meanwhile, and its graphs are gone
                self.engine.refuse_closed()
                raise

    return call


class TokenSequence:
    """Tokens of one sequence (or of a batch of equal length) with their caches, row buffers and cursors.

    After any schedule of exits, chunk sizes and rollbacks, the logits at an exit equal those of a pass from scratch over
    the same tokens at that exit. An interrupted step leaves the sequence valid, because a cursor moves after its rows did.
    Threads take turns: one may work off backlog while another decodes (:meth:`.chat.Chat.catching_up`).

    Example:
        logits = engine.new_sequence().advance(engine.exit_layers[0], [1, 2, 3])  # (1, 1, V)
    """

    def __init__(self, engine: Engine, batch_size: int, max_length: int, state: State | None = None) -> None:
        #: Held by the thread that uses the sequence.
        self.lock = threading.RLock()
        #: The engine that runs it.
        self.engine = engine
        engine.sequences.add(self)
        #: The engine's exits, ascending.
        self.exits = engine.exit_layers
        self.batch_size, self.max_length = batch_size, max_length
        self._pass_rows = rows_of_a_pass(engine.manifest, batch_size, max_length)
        self.length = 0
        self.state = state or engine.backend.new_state(batch_size, max_length)
        self._tokens = np.empty((max_length, batch_size), np.int64)  # pages take memory when tokens are written
        self._indices = {layer: index for index, layer in enumerate(self.exits)}
        #: Number of rows that each stage has taken in; a shared step (:mod:`.scheduling.shared_step`) moves it, too.
        self.stage_cursor = [0] * len(self.exits)
        #: Number of rows that each balcony has taken in.
        self.balcony_cursor = [0] * (len(self.exits) - 1)
        #: Rows run by all stages together, including those rolled back later; its growth is the cost of a step in rows.
        self.rows_run = 0
        # Only balconies with attention have a KV cache and can have a backlog; the norm and other balconies keep no rows.
        cached = engine.manifest.cached_exits
        self._cached = tuple(layer in cached for layer in self.exits)

    @property
    def tokens(self) -> IntArray:
        """Tokens so far, (B, length); a view."""
        return self._tokens[: self.length].T

    @property
    def stage_rows(self) -> tuple[int, ...]:
        """Number of rows that each stage has not taken in yet."""
        return tuple(self.length - cursor for cursor in self.stage_cursor)

    @property
    def balcony_rows(self) -> tuple[int, ...]:
        """Number of rows that each exit's balcony has not taken in yet; 0 for exits without a cached balcony."""
        pairs = zip((*self.balcony_cursor, 0), self._cached, strict=True)
        return tuple(self.length - cursor if cached else 0 for cursor, cached in pairs)

    @_exclusive
    def advance(self, exit_layer: int, new_tokens: IntArray | Sequence[int], num_logits: int = 1) -> FloatArray:
        """Append tokens and return the logits of the last rows at an exit.

        Stages deeper than ``exit_layer`` do not run. The other stages first take in all their pending rows.

        Args:
            exit_layer: one of the engine's exits.
            new_tokens: tokens to append, (B, n), or (n,) of one member; may be empty, for logits of the rows at another exit.
            num_logits: number of last rows whose logits are returned.

        Returns:
            Logits (B, num_logits, V), float32.

        Raises:
            InputError: the exit is unknown, a token is outside the vocabulary, or there are fewer rows than ``num_logits``.
            ContextLengthError: the tokens do not fit; nothing is appended.
            DeviceError: the device fails, or has too little memory; what has not run is pending.
        """
        index = self._index(exit_layer)
        tokens = checked(new_tokens, self.batch_size, self.engine.manifest.model.vocab_size)
        total = self.length + tokens.shape[1]
        if not total:
            raise InputError("new_tokens: none for a sequence without rows, which has no logits: give a token or more")
        if not 1 <= (num_logits := whole("num_logits", num_logits)) <= total:
            raise InputError(f"num_logits = {num_logits}: the sequence has {total} rows: ask for 1 to {total}")
        self._append(tokens)
        for stage in range(index + 1):
            self.run_stage(stage, self.length)
        logits = []
        for first in range(self.length - num_logits, self.length, self._pass_rows):
            stop = min(first + self._pass_rows, self.length)
            self._run_exit(index, first, stop)
            logits.append(self.state.logits(stop - first))
        return logits[0] if len(logits) == 1 else np.concatenate(logits, axis=1)

    @_exclusive
    def append(self, tokens: IntArray | Sequence[int]) -> None:
        """Append tokens, (B, n), or (n,) of one member, without running them: all their rows are then pending.

        Raises:
            InputError: a token is outside the vocabulary.
            ContextLengthError: the tokens do not fit; nothing is appended.
        """
        self._append(checked(tokens, self.batch_size, self.engine.manifest.model.vocab_size))

    def parts(self, rows: int) -> tuple[list[int], list[int], dict[str, Array]]:
        """How many of the first ``rows`` rows each stage and each balcony has taken in, and what they made of these.

        Hold :attr:`lock` while the arrays are in use; see :meth:`.backends.base.State.parts`.
        """
        stages, balconies = self._cursors_at(rows)
        return stages, balconies, self.state.parts(stages, balconies)

    def _cursors_at(self, rows: int) -> tuple[list[int], list[int]]:
        """Cursors of stages and balconies after a rollback to ``rows`` rows."""
        stages: list[int] = []
        before = rows
        for stage, cursor in enumerate(self.stage_cursor):
            before = self.state.stage_resumes(stage, min(cursor, before))
            stages.append(before)
        balconies = [
            self.state.exit_resumes(index, min(cursor, stages[index]))
            for index, cursor in enumerate(self.balcony_cursor)
        ]
        return stages, balconies

    @_exclusive
    def checkpoint(self) -> None:
        """Keep what a rollback to the present rows needs, so that it has no rows to run again.

        Only recurrent layers need it. The number of such checkpoints is bounded; without one, a rollback by n rows runs about
        as many again (:mod:`.backends.onnxruntime.recurrent`).
        """
        self.state.checkpoint(self.stage_cursor, self.balcony_cursor)

    @_exclusive
    def fill(
        self,
        tokens: IntArray,
        stage_cursor: Sequence[int],
        balcony_cursor: Sequence[int],
        parts: Mapping[str, Array],
    ) -> None:
        """Give an empty sequence tokens (B, n) and the :meth:`parts` of one that began with them.

        Args:
            tokens: first tokens of that sequence.
            stage_cursor, balcony_cursor: number of rows that each stage and each balcony has taken in, at most n.
            parts: its parts for these cursors.

        Raises:
            ContextLengthError: the tokens do not fit.
            InputError: the parts are those of other graphs.
        """
        if tokens.shape[1] > self.max_length:
            raise self.too_long_error(tokens.shape[1])
        self.state.fill(stage_cursor, balcony_cursor, parts)
        self._append(tokens)
        self.stage_cursor, self.balcony_cursor = list(stage_cursor), list(balcony_cursor)

    def _append(self, tokens: IntArray) -> None:
        """:meth:`append` for tokens (B, n) that were checked."""
        if self.length + tokens.shape[1] > self.max_length:
            raise self.too_long_error(tokens.shape[1])
        if tokens.shape[1]:
            self.state.embed(tokens, self.length)
            self.record_tokens(tokens)

    def shared_prefix(self, tokens: IntArray) -> int:
        """Number of first tokens that the only member has in common with ``tokens`` (n,)."""
        return common_length(self.tokens[0], tokens)

    def keep_common(self, tokens: Sequence[int]) -> None:
        """Forget all rows of the only member but those of the first tokens that it has in common with ``tokens``."""
        self.rollback(self.shared_prefix(np.array(tokens, np.int64)))

    def too_long_error(self, more: int = 1) -> ContextLengthError:
        """The error for that many more tokens than the sequence can hold."""
        return ContextLengthError(
            f"{self.length + more} tokens: this sequence holds {self.max_length}: shorten the prompt or raise max_length"
        )

    def record_tokens(self, tokens: IntArray | int) -> None:
        """Count tokens (B, n), or the token of the only member, whose embeddings the state has."""
        total = self.length + (1 if isinstance(tokens, int) else tokens.shape[1])
        self._tokens.T[:, self.length : total] = tokens
        self.length = total

    @_exclusive
    def step(self, exit_layer: int, ids: IntArray) -> FloatArray:
        """The decode step: :meth:`advance` by one token of each member, without checks and without a copy.

        Args:
            exit_layer: one of the engine's exits.
            ids: tokens from logits of this engine, (B,).

        Returns:
            Logits (B, V), float32, in an array of the engine that the next step overwrites.

        Raises:
            ContextLengthError: the sequence is full.
        """
        if not self.up_to_date(exit_layer):
            return self.advance(exit_layer, ids[:, None])[:, 0]
        index = self._indices[exit_layer]
        logits = self.state.decode(index, ids, self.length)
        self.record_step(index, ids)
        return logits

    @_exclusive
    def step_best(self, exit_layer: int, ids: IntArray) -> IntArray:
        """:meth:`step` that returns only the most likely token of each member, (B,); a GPU then transfers no logits."""
        if not self.up_to_date(exit_layer):
            return likeliest(self.advance(exit_layer, ids[:, None])[:, 0])
        index = self._indices[exit_layer]
        best = self.state.decode_best(index, ids, self.length)
        self.record_step(index, ids)
        return best

    def up_to_date(self, exit_layer: int) -> bool:
        """Whether all graphs of an exit have taken in all rows and one more row fits, so that a step can use the fast path."""
        index, row = self._indices.get(exit_layer), self.length
        if index is None or self.stage_cursor[index] < row or row >= self.max_length:
            return False
        return not self._cached[index] or self.balcony_cursor[index] == row

    def record_step(self, index: int, ids: IntArray | int) -> None:
        """Count a token of each member, whose row all graphs on the way to exit ``index`` have taken in."""
        row = self.length
        self._tokens[row] = ids
        # The length moves before the cursors: an interrupt in between leaves pending rows, not rows that only seem done.
        self.length = row = row + 1
        self.stage_cursor[: index + 1] = [row] * (index + 1)
        if index < len(self.balcony_cursor):
            self.balcony_cursor[index] = row
        self.rows_run += index + 1

    def rows_due(self, new: int) -> tuple[list[int], list[int]]:
        """Number of rows that each stage and each balcony would run for ``new`` more rows; 1 for graphs that keep no rows."""
        total = self.length + new
        cached = enumerate(self._cached)
        balconies = [total - self.balcony_cursor[index] if keeps else 1 for index, keeps in cached]
        return [total - cursor for cursor in self.stage_cursor], balconies

    @property
    def replays(self) -> bool:
        """Whether rows before a rollback may be pending again, because the model has recurrent layers."""
        return self.engine.manifest.model.recurrent

    @property
    def pending_rows(self) -> int:
        """Number of rows that the deepest stage has not taken in yet."""
        return self.length - self.stage_cursor[-1]

    @_exclusive
    def run_stage(self, stage: int, max_rows: int) -> int:
        """Run at most ``max_rows`` pending rows of a stage, only rows that the previous stage has already run.

        Returns:
            Number of rows that were run.

        Raises:
            InputError: the stage does not exist.
        """
        stage, max_rows = whole("stage", stage, 0), whole("max_rows", max_rows, 0)
        if stage >= len(self.exits):
            raise InputError(f"stage = {stage}: this bundle has stages 0 to {len(self.exits) - 1}: give one of those")
        source = self.length if stage == 0 else self.stage_cursor[stage - 1]
        begin = self.stage_cursor[stage]
        end = min(source, begin + max_rows)
        for start in range(begin, end, self._pass_rows):
            stop = min(start + self._pass_rows, end)
            self.state.run_stage(stage, start, stop)
            self.stage_cursor[stage] = stop
            self.rows_run += stop - start
        return max(end - begin, 0)

    @_exclusive
    def run_balcony(self, exit_layer: int, max_rows: int) -> int:
        """Run at most ``max_rows`` pending rows of a balcony that its stage has already run; returns the number run."""
        index = self._index(exit_layer)
        if not self._cached[index]:
            return 0
        # An interrupted pass over keys alone has left an older state.
        begin = self.balcony_cursor[index] = self.state.exit_resumes(index, self.balcony_cursor[index])
        end = min(self.stage_cursor[index], begin + whole("max_rows", max_rows, 0))
        for start in range(begin, end, self._pass_rows):
            stop = min(start + self._pass_rows, end)
            self.state.run_exit(index, start, stop, 0)
            self.balcony_cursor[index] = stop
        return max(end - begin, 0)

    @_exclusive
    def catch_up(self, max_rows: int | None = None) -> int:
        """Run pending rows in idle time: all stages from the shallowest on, then the balconies.

        Call it in small portions between turns or while a user reads: a later switch then costs nothing extra.

        Args:
            max_rows: most rows to run, each row counted once per stage and balcony; by default the whole backlog.

        Returns:
            Number of rows that were run; 0 without a backlog.
        """
        left = sum(self.stage_rows) + sum(self.balcony_rows) if max_rows is None else whole("max_rows", max_rows, 0)
        before = left
        for stage in range(len(self.exits)):
            left -= self.run_stage(stage, left)
        for exit_layer in self.exits[:-1]:
            left -= self.run_balcony(exit_layer, left)
        self.state.wait()  # a device takes passes and goes on later; who calls counts on the time
        return before - left

    @_exclusive
    def rollback(self, length: int) -> None:
        """Forget all rows from ``length`` on. This is exact: cache contents past a cursor are never read.

        Stages with recurrent layers go back to the newest state that is kept; the rows after it are pending again.
        """
        length = whole("length", length)
        if not 0 <= length <= self.length:
            raise InputError(f"rollback to {length}: the sequence has {self.length} rows: give 0 to {self.length}")
        self.stage_cursor, self.balcony_cursor = self._cursors_at(length)
        self.length = length  # last, so that an interrupt leaves no cursor past the length

    def _run_exit(self, index: int, first: int, stop: int) -> None:
        """Run the balcony or norm of an exit with the rows from ``first`` to ``stop`` as queries, at most one pass."""
        if not self._cached[index]:
            self.state.run_exit(index, first, stop, stop - first)
            return
        # Run rows without queries in earlier passes, so that all query rows fit into the last pass.
        # Query rows that the balcony has already taken in run again; it writes the same keys and values.
        self.balcony_cursor[index] = self.state.exit_resumes(index, min(self.balcony_cursor[index], first))
        while (begin := self.balcony_cursor[index]) < first and stop - begin > self._pass_rows:
            self.run_balcony(self.exits[index], min(self._pass_rows, first - begin))
        self.state.run_exit(index, begin, stop, stop - first)
        self.balcony_cursor[index] = stop

    def _index(self, exit_layer: int) -> int:
        index = self._indices.get(exit_layer) if isinstance(exit_layer, int | np.integer) else None
        if index is None:
            exits = ", ".join(str(layer) for layer in self.exits)
            raise InputError(f"exit_layer = {shown(exit_layer)}: this bundle has exits {exits}: pick one of them")
        return index
