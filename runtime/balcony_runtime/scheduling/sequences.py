"""The sequences of replies: the memory that they may take, and which of them share passes.

Owns the sequences that are out. Each has a place in the KV pool (:mod:`.pool`) or memory of its own; one without a place may
get one later, as long as its prompt has not run. It does not know whose turn it is: that is :mod:`.scheduler`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from balcony_runtime.backends.base import FloatArray
from balcony_runtime.engine import Engine
from balcony_runtime.scheduling.admission import Bounds, row_bytes
from balcony_runtime.scheduling.pool import SequencePool
from balcony_runtime.scheduling.shared_step import PoolMove
from balcony_runtime.scheduling.stream import Stream
from balcony_runtime.sessions.prefixes import PrefixFiles
from balcony_runtime.token_sequence import TokenSequence

_log = logging.getLogger(__name__)
#: Members of the KV pool; streams for which there is none when they begin have memory of their own and share no passes.
MEMBERS = 16


class Sequences:
    """The sequences of one engine's replies, inside the KV pool and outside of it.

    Args:
        engine: engine of all sequences.
        bounds: what sequences may take.

    Raises:
        InputError: the directory of the bounds cannot be written.
    """

    def __init__(self, engine: Engine, bounds: Bounds) -> None:
        self._engine, self._bounds, self._row_bytes = engine, bounds, row_bytes(engine.manifest)
        #: The prefixes on disk.
        self.files = PrefixFiles(bounds.directory, engine, bounds.kept_bytes) if bounds.directory is not None else None
        self._pool: SequencePool | None = None
        self._pool_lock, self._pool_made = threading.Lock(), False
        # A new object each time that a stream has begun or a sequence has been given back. It needs no lock: the collector may
        # give a sequence back in any thread, also in one that holds the scheduler's lock.
        self._change = object()
        # Sequences that are out → change at the last look for rows, or None.
        self._lent: dict[TokenSequence, object] = {}

    @property
    def pool(self) -> SequencePool | None:
        """The sequences that share passes; None if the engine cannot share passes."""
        with self._pool_lock:
            if not self._pool_made:
                self._pool = SequencePool.of(self._engine, MEMBERS, self.files, self._bounds.kept_bytes)
                self._pool_made = True  # last: after an interrupt the next reply tries again
                if self._pool is None and self.files is not None:
                    _log.warning("prefix_directory: replies of this engine share no rows, so nothing is kept there")
        return self._pool

    def most_rows(self, rows: int) -> int | None:
        """Rows that all sequences together may have, or None; errors as for :meth:`.Bounds.most_rows`."""
        return self._bounds.most_rows(rows, self._row_bytes)

    def new(self, tokens: Sequence[int], rows: int) -> TokenSequence:
        """A sequence for a prompt and its reply, of which the first rows may be there already.

        It shares passes with others if the engine can do that and there is room for it, now or when its prompt begins to run.
        """
        self._engine.refuse_closed()  # after a fork the locks of the pool may stay held
        if (pool := self.pool) is None or (sequence := pool.take(tokens)) is None:
            sequence = self._engine.new_sequence(max_length=rows if pool is None else None)
        self._lent[sequence] = None
        return sequence

    def free(self, sequence: TokenSequence) -> None:
        """Give a sequence of :meth:`new` back."""
        if self._engine.is_forked:  # another thread of the other process may have held the lock
            return
        del self._lent[sequence]
        if self._pool is not None:
            self._pool.give_back(sequence)
        self._change = object()

    def have_run(self, begins: Sequence[Stream]) -> None:
        """Note after a round whether prompts that had not run before it have run: others may begin with their rows."""
        if any(one.decoder.made for one in begins):
            self._change = object()

    def look_again(self, begins: Sequence[Stream]) -> None:
        """Give prompts that have not run the places and rows that have come since; those that wait find what others leave."""
        for stream in begins:
            sequence, decoder, change = stream.sequence, stream.decoder, self._change  # once: it may change at any time
            if self._pool is None or not stream.asks or self._lent.get(sequence, change) is change:
                continue
            self._lent[sequence] = change
            # Outside the pool, rows that were run by itself stay where they are.
            if self._pool.holds(sequence) or sequence.stage_cursor[0] <= decoder.kept_rows:
                with stream.isolated():
                    decoder.kept_rows += self._pool.look_again(sequence, {one.sequence for one in begins})

    def shares(self, stream: Stream) -> bool:
        """Whether a stream shares passes."""
        return self._pool is not None and self._pool.holds(stream.sequence)

    def will_share(self, stream: Stream, streams: Sequence[Stream]) -> bool:
        """Whether a stream outside the pool shares passes once its prompt begins to run, because there is a place for it.

        ``streams`` are all that there are: places that others of them will take are not free.
        """
        if self._pool is None or not self._may_move(stream):
            return False
        others = (one for one in streams if one is not stream)
        promised = sum(one.admitted and self._may_move(one) and not self.shares(one) for one in others)
        return self._pool.room > promised

    def _may_move(self, stream: Stream) -> bool:
        """Whether the stream takes a place in the pool if there is one when its prompt begins to run."""
        return stream.sequence in self._lent and not stream.decoder.made

    @property
    def prepared(self) -> int | None:
        """How often the engine made a shared pass or a place ready: see :attr:`.SequencePool.prepared`."""
        return None if self._pool is None else self._pool.prepared

    def step(self, moves: Sequence[PoolMove]) -> list[FloatArray]:
        """One token of each of some sequences that share passes: see :meth:`.SequencePool.step`."""
        assert self._pool is not None  # it holds them
        return self._pool.step(moves)

    def close(self) -> None:
        """Write what ended sequences have to the files."""
        if self._pool is not None:
            self._pool.close()
