"""Sequences that share passes: who has which member of a KV pool, and whose first rows a new prompt can have.

Owns the members and the sequences that have ended, whose rows stay for prompts that begin alike. Steps are
:mod:`.shared_step`'s.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from balcony_edge.errors import BalconyError, BusyError, DeviceError, InputError
from balcony_runtime.backends.base import FloatArray, IntArray, Pool
from balcony_runtime.engine import LONGEST_PASS_S, Engine
from balcony_runtime.scheduling.shared_step import PoolMove, SharedStep
from balcony_runtime.sessions import file
from balcony_runtime.sessions.prefixes import PrefixFiles
from balcony_runtime.token_sequence import TokenSequence

_log = logging.getLogger(__name__)

#: Bytes of ended sequences that are kept by default: about 4,100 rows of the demo model in float32.
KEPT_BYTES = 256_000_000
#: Rows from which a common prefix is worth looking for.
LEAST_SHARED = 32


@dataclass(slots=True)
class Reused:
    """Rows that prompts did not have to compute.

    Attributes:
        prompts: prompts that began with rows of another sequence.
        rows: rows of all of them.
        files: sequences that were read from files for that.
    """

    prompts: int = 0
    rows: int = 0
    files: int = 0


class SequencePool:
    """Sequences over one KV pool. Threads may take and give back members at once; one thread at a time steps.

    Args:
        engine: engine of the sequences; its backend must offer a pool.
        pool: memory of the members.
        files: prefixes on disk; None for none.
        kept_bytes: most memory of the rows of ended sequences.
    """

    def __init__(
        self, engine: Engine, pool: Pool, files: PrefixFiles | None = None, kept_bytes: int = KEPT_BYTES
    ) -> None:
        self._files = files
        #: Rows that prompts did not have to compute.
        self.reused = Reused()
        self._engine, self._pool = engine, pool
        self._lock = threading.RLock()
        # Whether the thread that has the lock is at work; to itself it says so in a signal's handler and in the collector only.
        self._busy = False
        self._returned: deque[TokenSequence] = deque()  # taken back by who holds the lock
        self._reading = threading.Lock()  # held while a file is read; the other lock is not
        self._members: list[TokenSequence | None] = [None] * pool.members
        self._places: dict[TokenSequence, int] = {}
        self._ended: list[TokenSequence] = []  # first the one that was not used for longest
        #: Most bytes of sequences that have ended; 0 keeps none.
        self.kept_bytes = kept_bytes
        self._shared = SharedStep(engine, pool, self._members)

    @classmethod
    def of(
        cls, engine: Engine, members: int, files: PrefixFiles | None = None, kept_bytes: int = KEPT_BYTES
    ) -> SequencePool | None:
        """A pool for sequences of an engine; None if its graphs cannot share passes, or memory has no room for it."""
        try:
            pool = engine.backend.new_pool(members, engine.max_length)
        except (MemoryError, DeviceError) as error:
            why = f" ({error})" if str(error) else ""
            _log.warning("no memory for replies that share passes%s: each runs by itself", why)
            return None
        return None if pool is None else cls(engine, pool, files, kept_bytes)

    @property
    def members(self) -> tuple[TokenSequence | None, ...]:
        """The sequence of every member; None where the member is free."""
        return tuple(self._members)

    @property
    def in_use(self) -> int:
        """Number of members whose sequence was taken and not given back."""
        return len(self._places) - len(self._ended)

    @property
    def room(self) -> int:
        """Number of sequences that can become members now."""
        return self._pool.members - self.in_use

    @property
    def busy_ns(self) -> int:
        """Nanoseconds spent inside the engine by shared passes."""
        return self._pool.busy_ns

    @property
    def prepared(self) -> int:
        """How often the engine made a pass or a place ready, which takes longer than to use it."""
        return self._pool.prepared

    def take(self, tokens: Sequence[int] = ()) -> TokenSequence | None:
        """A sequence for a prompt, with the rows of the longest prefix that another one has; None if all members are in use.

        A sequence that has ended gives its member away if it would lose few rows by that, or if no other one is free.
        Otherwise the rows are copied.
        """
        wanted = np.array(tokens[: max(len(tokens) - 1, 0)], np.int64)  # the prompt's last token is always run
        self.recall(wanted)
        with self._locked():
            donor, shared = self._longest(wanted)
            if donor is None:
                return self._empty()
            if donor in self._ended:
                fresh = None if donor.length - shared < LEAST_SHARED else self._empty(donor)
                if fresh is None:
                    donor.rollback(shared)
                    self._ended.remove(donor)
                    return self._counted(donor)
                self._ended.remove(donor)
                self._ended.append(donor)
            elif (fresh := self._empty()) is None:
                return None
            if donor.lock.acquire(blocking=False):
                try:
                    fresh.fill(donor.tokens[:, :shared], *donor.parts(shared))
                except BaseException:
                    self._clear(fresh)
                    raise
                finally:
                    donor.lock.release()
            return self._counted(fresh)

    def look_again(self, sequence: TokenSequence, but: Collection[TokenSequence]) -> int:
        """Give a sequence whose prompt has not run what there is for it by now: a member, and the rows of a longer prefix.

        Args:
            sequence: sequence with the tokens of its prompt.
            but: sequences whose rows are not copied, because they will have more of them soon.

        Returns:
            Number of rows that it has now and had not before.
        """
        wanted = sequence.tokens[0].copy()
        with self._locked(), sequence.lock, ExitStack() as held:
            donor, rows = self._longest(wanted[:-1], {sequence, *but})
            if donor is not None and donor.lock.acquire(blocking=False):
                held.callback(donor.lock.release)
                rows = _rows(donor, wanted[:-1])  # it may have been rolled back before
            else:
                donor = None
            has = sequence.stage_cursor[0]
            if donor is None or rows < has + LEAST_SHARED:
                donor, rows = None, has
            is_member = sequence in self._places
            member = None if is_member else self._free_member(donor)
            if member is None and donor is None:
                return 0
            try:
                if not is_member and member is None and donor in self._ended:
                    self._take_over(sequence, donor, rows)
                else:
                    # Views of the donor's memory, or of what the sequence has had so far.
                    filled = (wanted[None, :rows], *(donor or sequence).parts(rows)) if rows else ()
                    sequence.rollback(0)
                    if member is not None:
                        state = self._pool.state(member)  # may fail for want of memory: nothing has changed yet
                        self._members[member] = sequence  # an interrupt before the end leaves it nobody else's
                        sequence.state, self._places[sequence] = state, member
                    if filled:
                        sequence.fill(*filled)
            finally:
                sequence.append(wanted[sequence.length :])
            if donor is None:
                return 0
            self._count(has, rows)
            return rows - has

    def _take_over(self, sequence: TokenSequence, ended: TokenSequence, rows: int) -> None:
        """Give a sequence the member of one that has ended, with its first rows."""
        ended.rollback(rows)
        self._ended.remove(ended)
        member = self._places.pop(ended)
        sequence.rollback(0)
        # The place comes last: with it, others use the member's memory as the sequence's.
        sequence.state, sequence.length = ended.state, ended.length
        sequence.stage_cursor, sequence.balcony_cursor = ended.stage_cursor, ended.balcony_cursor
        self._place(sequence, member)

    def _counted(self, sequence: TokenSequence) -> TokenSequence:
        self._count(0, sequence.length)
        return sequence

    def _count(self, before: int, after: int) -> None:
        """Count the rows that a prompt got, which had some before."""
        self.reused.prompts += before == 0 and after > 0
        self.reused.rows += after - before

    def recall(self, wanted: IntArray) -> None:
        """Read the file that shares the longest prefix with some tokens (n,), unless a member has as much of it."""
        if (files := self._files) is None or self._better(files, wanted) is None:
            return
        with self._reading:  # who asks for the same prompt meanwhile finds it in memory afterwards
            path = self._better(files, wanted)
            with self._locked():
                sequence = None if path is None else self._empty()
            if path is None or sequence is None:
                return
            try:
                files.load(path, sequence)
                self.reused.files += 1
                if sequence.state.memory_bytes > self.kept_bytes:
                    files.forget(path)
            except BalconyError as error:
                _log.warning("%s", error)
            finally:
                self.give_back(sequence)

    def _better(self, files: PrefixFiles, wanted: IntArray) -> Path | None:
        """The file with the longest prefix of some tokens, if it has clearly more than every member and may be kept."""
        path, saved = files.longest(wanted, self.kept_bytes)
        with self._locked():
            return None if saved < self._longest(wanted)[1] + LEAST_SHARED else path

    def save(self, tokens: Sequence[int], path: Path) -> tuple[int, int]:
        """Write the rows of an ended sequence that begins with some tokens; returns their number and the file's bytes.

        The last token of a reply has no row.

        Raises:
            InputError: no ended sequence has them any more, or the file cannot be written.
        """
        wanted = np.array(tokens, np.int64)
        with self._locked():
            found = [one for one in self._ended if one.shared_prefix(wanted) >= max(len(wanted) - 1, 1)]
            if not found and len(wanted) <= LEAST_SHARED:
                raise InputError(f"fewer than {LEAST_SHARED} rows are not kept: save a longer conversation")
            if not found:
                raise InputError("the rows are not kept any more: save earlier, or keep more with prefix_mb")
            self._ended.remove(found[-1])  # in use, so that nobody changes or clears it
        try:
            rows = found[-1].shared_prefix(wanted)
            return rows, file.save(path, found[-1], rows=rows)
        finally:
            self.give_back(found[-1])

    def load(self, path: Path) -> int:
        """Read a session file as a sequence that has ended; returns the number of its rows.

        Raises:
            InputError: the file cannot be read, is damaged, is of another bundle, or is shorter or larger than what
                may be kept.
            BusyError: all members are in use.
        """
        # Neither rows that are there already nor a file that cannot be used take an ended sequence's place.
        if self.room:
            session = file.look(path, self._engine, whole=True)
            if (rows := session.notes.stage_rows[0]) < LEAST_SHARED:
                raise InputError(
                    f"{path}: {rows} rows are too few to be kept: save a prefix of {LEAST_SHARED} tokens or more"
                )
            if self._is_kept(session):
                return len(session.tokens[0])
        with self._locked():
            sequence = self._empty()
        if sequence is None:
            raise BusyError(f"all {self._pool.members} places are in use: try again later")
        try:
            rows = len(file.load(path, sequence).tokens[0])
        finally:
            self.give_back(sequence)
        with self._locked():
            kept = self.holds(sequence)
        if not kept:
            least, most_mb = LEAST_SHARED, self.kept_bytes / 1e6
            raise InputError(
                f"{path}: {rows} tokens are not kept: prefix_mb = {most_mb:g} must have room for {least} or more"
            )
        return rows

    def _is_kept(self, session: file.Session) -> bool:
        """Whether an ended sequence has the tokens and all rows of a file; it is then the one that was used last."""
        wanted = (*session.notes.stage_rows, *session.notes.balcony_rows)
        with self._locked():
            for one in self._ended:
                pairs = zip((*one.stage_cursor, *one.balcony_cursor), wanted, strict=True)
                if np.array_equal(one.tokens, session.tokens) and all(rows >= least for rows, least in pairs):
                    self._ended.remove(one)
                    self._ended.append(one)
                    return True
        return False

    def _empty(self, but: TokenSequence | None = None) -> TokenSequence | None:
        """An empty sequence in a free member, or in that of an ended sequence other than ``but``; None if there is neither."""
        if (member := self._free_member(but)) is None:
            return None
        sequence = TokenSequence(self._engine, 1, self._engine.max_length, self._pool.state(member))
        self._place(sequence, member)
        return sequence

    def _place(self, sequence: TokenSequence, member: int) -> None:
        self._members[member], self._places[sequence] = sequence, member

    def _free_member(self, but: TokenSequence | None = None) -> int | None:
        """A free member, or that of the ended sequence that was not used for longest, if it is another one than ``but``."""
        if None not in self._members and (others := [one for one in self._ended if one is not but]):
            self._ended.remove(others[0])
            self._clear(others[0])
        return self._members.index(None) if None in self._members else None

    def _longest(self, wanted: IntArray, but: Collection[TokenSequence] = ()) -> tuple[TokenSequence | None, int]:
        """The member with the most rows of some tokens, and their number; None, 0 below ``LEAST_SHARED`` rows.

        Of several, the one whose stages and balconies have taken in the most of them.
        """
        best, most = None, (LEAST_SHARED, -1)
        for sequence in self._places:
            if sequence in but:
                continue
            shared = _rows(sequence, wanted)
            found = shared, sum(min(rows, shared) for rows in (*sequence.stage_cursor, *sequence.balcony_cursor))
            if found > most:
                best, most = sequence, found
        return best, 0 if best is None else most[0]

    def give_back(self, sequence: TokenSequence) -> None:
        """End the use of a sequence, whose rows stay for prompts that begin alike; does nothing if it is not of this pool.

        It does not wait for a step: Python's collector may call it in any thread, also in one that is at work here.
        """
        self._returned.append(sequence)
        self._settle()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock, and take back what was given back before and meanwhile."""
        try:
            with self._lock, self._at_work():
                yield
        finally:
            self._settle()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        self._busy = True
        try:
            self._take_back_returned()
            try:
                yield
            finally:
                self._take_back_returned()
        finally:
            self._busy = False

    def _settle(self) -> None:
        """Take back what was given back, unless somebody is at work here, who does it then."""
        while self._returned and self._lock.acquire(blocking=False):
            try:
                if self._busy:
                    return
                with self._at_work():
                    pass
            finally:
                self._lock.release()

    def _take_back_returned(self) -> None:
        while self._returned:
            self._take_back(self._returned[0])
            self._returned.popleft()

    def _take_back(self, sequence: TokenSequence) -> None:
        if sequence not in self._places or sequence in self._ended:
            return
        with sequence.lock:
            if sequence.stage_cursor[0] < LEAST_SHARED or sequence.state.memory_bytes > self.kept_bytes:
                self._clear(sequence)
                return
            self._ended.append(sequence)
            while self._ended_bytes() > self.kept_bytes:
                self._clear(self._ended.pop(0))

    def _ended_bytes(self) -> int:
        return sum(one.state.memory_bytes for one in self._ended)

    @property
    def bytes(self) -> int:
        """Bytes of the sequences that have ended."""
        with self._locked():
            return self._ended_bytes()

    def forget(self, tokens: Sequence[int]) -> int:
        """Forget the ended sequence that has some tokens and no others; returns the number of its rows.

        The last token of a reply has no row.
        """
        wanted = np.array(tokens, np.int64)
        with self._locked():
            for sequence in self._ended:
                if len(wanted) - 1 <= sequence.shared_prefix(wanted) == sequence.length:
                    self._ended.remove(sequence)
                    rows = sequence.length
                    self._clear(sequence)
                    return rows
        return 0

    def close(self) -> None:
        """Free ended sequences, after writing them to the files, the one that was used last first.

        Other threads wait. The handler of a signal does nothing in the middle of this thread's own work here: a step, or the
        beginning or end of a reply. Another thread at work here may wait for a pass that the handler has interrupted.
        """
        if not self._lock.acquire(timeout=LONGEST_PASS_S):
            return
        try:
            if self._busy:
                return
            with self._locked():
                ended, self._ended = self._ended[::-1], []
                if (files := self._files) is not None:
                    try:
                        used_s = files.moment()
                        for age, sequence in enumerate(ended):  # all are newer than what was not used
                            files.keep(sequence, used_s - age / 1000)
                    except (BalconyError, OSError) as error:  # the directory may not be entered any more
                        _log.warning("%s", error)
                for sequence in ended:
                    self._clear(sequence)
        finally:
            self._lock.release()

    def _clear(self, sequence: TokenSequence) -> None:
        member = self._places.pop(sequence)
        self._members[member] = None
        self._pool.clear(member)

    def holds(self, sequence: TokenSequence) -> bool:
        """Whether the sequence is a member of this pool."""
        return sequence in self._places

    def step(self, moves: Sequence[PoolMove]) -> list[FloatArray]:
        """Append one token to each of some members and return the logits at the exits asked for.

        Args:
            moves: at most one move for each sequence.

        Returns:
            Logits (1, V) of each, in the order of ``moves``, in an array that the next step overwrites.

        Raises:
            ContextLengthError: a sequence is full; nothing is appended to any.
        """
        self._engine.refuse_closed()
        held: list[TokenSequence] = []
        try:
            # A pass may write to members that lie between others, so nobody takes or frees one meanwhile.
            with self._lock:
                self._busy = True
                try:  # a stack of contexts makes four calls for each lock, between two passes that leave the caches cold
                    members = [self._places[move.sequence] for move in moves]
                    order = sorted(range(len(members)), key=members.__getitem__)
                    in_order = list(map(moves.__getitem__, order))
                    for sequence, _, _ in in_order:  # the same order in every thread
                        sequence.lock.acquire()
                        held.append(sequence)
                        if sequence.length >= sequence.max_length:
                            raise sequence.too_long_error()
                    logits = self._shared.run(sorted(members), in_order)
                except KeyError:
                    self._engine.refuse_closed()  # another thread has closed it meanwhile
                    raise
                finally:
                    for sequence in held:
                        sequence.lock.release()
                    self._busy = False
        finally:
            self._settle()
        found = [logits] * len(order)
        for place, index in enumerate(order):
            found[index] = logits[place : place + 1]
        return found


def _rows(sequence: TokenSequence, wanted: IntArray) -> int:
    """Number of first rows of some tokens (n,) that a sequence has; tokens that never ran have no rows."""
    return min(sequence.shared_prefix(wanted), sequence.stage_cursor[0])
