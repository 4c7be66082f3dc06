"""Sequences that share passes: members of a KV pool, and the step of several of them at exits of their own.

Owns which members share a pass. All run stage 0; those at a shallow exit leave to their balcony, and the others go on in a
smaller batch. A member is a :class:`TokenSequence` like any other: its pending rows are the rebatching buffer, so nothing is
approximated, and what it does alone (prompts, backlog, speculation) it does as a sequence of its own.

A pass takes a contiguous range of members. A member inside the range that has no row of its own for this graph works off one of
its pending rows, or takes a dead row past its cursor. Up to ``MOST_DEAD`` dead rows in a gap cost less than a second pass.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from balcony_edge.errors import BalconyError, BusyError, InputError
from balcony_runtime.backends.base import FloatArray, IntArray, Pool, neighbours
from balcony_runtime.engine import Engine, TokenSequence
from balcony_runtime.sessions import file
from balcony_runtime.sessions.prefixes import PrefixFiles

_log = logging.getLogger(__name__)

#: Dead rows in one gap that cost less than another pass: a further row costs 4 % (float32) to 25 % (int4) of the first.
MOST_DEAD = 3
#: Bytes of ended sequences that are kept by default: about 4,500 rows of the demo model in float32.
KEPT_BYTES = 256_000_000
#: Rows from which a common prefix is worth looking for.
LEAST_SHARED = 32


class PoolMove(NamedTuple):
    """One token of one member.

    Attributes:
        sequence: sequence of the pool.
        exit_layer: exit whose logits are asked for.
        token: token to append.
    """

    sequence: TokenSequence
    exit_layer: int
    token: int


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
    """

    def __init__(self, engine: Engine, pool: Pool, files: PrefixFiles | None = None) -> None:
        self._files = files
        #: Rows that prompts did not have to compute.
        self.reused = Reused()
        self._engine, self._pool = engine, pool
        self._lock = threading.Lock()
        self._reading = threading.Lock()  # held while a file is read; the other lock is not
        self._members: list[TokenSequence | None] = [None] * pool.members
        self._places: dict[TokenSequence, int] = {}
        self._ended: list[TokenSequence] = []  # first the one that was not used for longest
        #: Most bytes of sequences that have ended; 0 keeps none.
        self.kept_bytes = KEPT_BYTES
        self._layers = engine.exit_layers
        self._indices = {layer: index for index, layer in enumerate(self._layers)}
        cached = engine.manifest.cached_exits
        self._cached = tuple(layer in cached for layer in self._layers)

    @classmethod
    def of(cls, engine: Engine, members: int, files: PrefixFiles | None = None) -> SequencePool | None:
        """A pool for sequences of an engine, or None if its graphs cannot share passes.

        Raises:
            MemoryError: the address space has no room for it.
        """
        pool = engine.backend.new_pool(members, engine.max_length)
        return None if pool is None else cls(engine, pool, files)

    @property
    def members(self) -> tuple[TokenSequence | None, ...]:
        """The sequence of every member; None where the member is free."""
        return tuple(self._members)

    @property
    def in_use(self) -> int:
        """Number of members whose sequence was taken and not given back."""
        return len(self._places) - len(self._ended)

    @property
    def busy_ns(self) -> int:
        """Nanoseconds spent inside the engine by shared passes."""
        return self._pool.busy_ns

    def take(self, tokens: Sequence[int] = ()) -> TokenSequence | None:
        """A sequence for a prompt, with the rows of the longest prefix that another one has; None if all members are in use.

        A sequence that has ended gives its member away if it would lose few rows by that, or if no other one is free.
        Otherwise the rows are copied.
        """
        wanted = np.array(tokens[: max(len(tokens) - 1, 0)], np.int64)  # the prompt's last token is always run
        self.recall(wanted)
        with self._lock:
            donor, shared = self._longest(wanted)
            if donor is None:
                return self._empty()
            if donor in self._ended:
                self._ended.remove(donor)
                fresh = None if donor.length - shared < LEAST_SHARED else self._empty()
                if fresh is None:
                    donor.rollback(shared)
                    return self._counted(donor)
                self._ended.append(donor)
            elif (fresh := self._empty()) is None:
                return None
            if donor.lock.acquire(blocking=False):
                try:
                    fresh.begin_like(donor, shared)
                except BaseException:
                    self._clear(fresh)
                    raise
                finally:
                    donor.lock.release()
            return self._counted(fresh)

    def _counted(self, sequence: TokenSequence) -> TokenSequence:
        if sequence.length:
            self.reused.prompts += 1
            self.reused.rows += sequence.length
        return sequence

    def recall(self, wanted: IntArray) -> None:
        """Read the file that shares the longest prefix with some tokens (n,), unless a member has as much of it."""
        if (files := self._files) is None or self._better(files, wanted) is None:
            return
        with self._reading:  # who asks for the same prompt meanwhile finds it in memory afterwards
            path = self._better(files, wanted)
            with self._lock:
                sequence = None if path is None else self._empty()
            if path is None or sequence is None:
                return
            try:
                files.load(path, sequence)
                self.reused.files += 1
            except BalconyError as error:
                _log.warning("%s", error)
            finally:
                self.give_back(sequence)

    def _better(self, files: PrefixFiles, wanted: IntArray) -> Path | None:
        """The file with the longest prefix of some tokens, if it has clearly more than every member and may be kept."""
        path, saved = files.longest(wanted, self.kept_bytes)
        with self._lock:
            return None if saved < self._longest(wanted)[1] + LEAST_SHARED else path

    def save(self, tokens: Sequence[int], path: Path) -> tuple[int, int]:
        """Write the rows of an ended sequence that begins with some tokens; returns their number and the file's bytes.

        The last token of a reply has no row.

        Raises:
            InputError: no ended sequence has them any more, or the file cannot be written.
        """
        wanted = np.array(tokens, np.int64)
        with self._lock:
            found = [one for one in self._ended if one.shared_prefix(wanted) >= max(len(wanted) - 1, 1)]
            if not found:
                raise InputError("the rows are not kept any more: save earlier, or keep more with prefix_mb")
            self._ended.remove(found[-1])  # in use, so that nobody changes or clears it
        try:
            rows = found[-1].shared_prefix(wanted)
            return rows, file.save(path, self._engine, found[-1], rows=rows)
        finally:
            self.give_back(found[-1])

    def load(self, path: Path) -> int:
        """Read a session file as a sequence that has ended; returns the number of its rows.

        Raises:
            InputError: the file cannot be read, is damaged, is of another bundle, or is larger than what may be kept.
            BusyError: all members are in use.
        """
        with self._lock:
            sequence = self._empty()
        if sequence is None:
            raise BusyError(f"all {self._pool.members} places are in use: try again later")
        try:
            rows = len(file.load(path, self._engine, sequence).tokens[0])
        finally:
            self.give_back(sequence)
        if not self.holds(sequence):
            least, most_mb = LEAST_SHARED, self.kept_bytes / 1e6
            raise InputError(
                f"{path}: {rows} tokens are not kept: prefix_mb = {most_mb:g} must have room for {least} or more"
            )
        return rows

    def _empty(self) -> TokenSequence | None:
        """An empty sequence in a free member, or in that of an ended sequence; the donor of a copy is not among these."""
        if None not in self._members and self._ended:
            self._clear(self._ended.pop(0))
        for member, holder in enumerate(self._members):
            if holder is None:
                state = self._pool.state(member)
                sequence = TokenSequence(self._engine, 1, self._engine.max_length, state)
                self._members[member], self._places[sequence] = sequence, member
                return sequence
        return None

    def _longest(self, wanted: IntArray) -> tuple[TokenSequence | None, int]:
        """The member that shares the longest prefix with some tokens, and its length; None, 0 below ``LEAST_SHARED`` rows."""
        best, longest = None, 0
        for sequence in self._places:
            shared = sequence.shared_prefix(wanted)
            if shared > longest and shared >= LEAST_SHARED:
                best, longest = sequence, shared
        return best, longest

    def give_back(self, sequence: TokenSequence) -> None:
        """End the use of a sequence, whose rows stay for prompts that begin alike; does nothing if it is not of this pool."""
        with self._lock, sequence.lock:
            if sequence not in self._places or sequence in self._ended:
                return
            if sequence.length < LEAST_SHARED or sequence.state.memory_bytes > self.kept_bytes:
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
        with self._lock:
            return self._ended_bytes()

    def forget(self, tokens: Sequence[int]) -> int:
        """Forget the ended sequence that has some tokens and no others; returns the number of its rows.

        The last token of a reply has no row.
        """
        wanted = np.array(tokens, np.int64)
        with self._lock:
            for sequence in self._ended:
                if len(wanted) - 1 <= sequence.shared_prefix(wanted) == sequence.length:
                    self._ended.remove(sequence)
                    rows = sequence.length
                    self._clear(sequence)
                    return rows
        return 0

    def close(self) -> None:
        """Write ended sequences to the files, the one that was used last first; no thread may take one meanwhile."""
        if (files := self._files) is None:
            return
        with self._lock:
            ended, self._ended = self._ended[::-1], []
        try:
            for age, sequence in enumerate(ended):
                files.keep(sequence, age)
        except BalconyError as error:
            _log.warning("%s", error)

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
        # A pass may write to members that lie between others, so nobody takes or frees one meanwhile.
        with self._lock, ExitStack() as held:
            ordered = sorted((self._places[move.sequence], place) for place, move in enumerate(moves))
            members = [member for member, _ in ordered]
            moves = [moves[place] for _, place in ordered]
            for move in moves:  # the same order in every thread
                held.enter_context(move.sequence.lock)
                if move.sequence.length >= move.sequence.max_length:
                    raise move.sequence.full()
            logits = self._step(members, moves)
        found: list[FloatArray] = [logits] * len(moves)
        for place, (_, asked) in enumerate(ordered):
            found[asked] = logits[place : place + 1]
        return found

    def _step(self, members: list[int], moves: Sequence[PoolMove]) -> FloatArray:
        """The step of members in ascending order; gives logits (n, V)."""
        exits = tuple([self._indices[move.exit_layer] for move in moves])
        tokens, rows = [move.token for move in moves], [move.sequence.length for move in moves]
        adjacent = members[-1] - members[0] < len(members) and neighbours(exits)
        if adjacent and all(move.sequence.up_to_date(move.exit_layer) for move in moves):
            logits = self._pool.decode(members[0], exits, tokens, rows)
            for move, exit_index in zip(moves, exits, strict=True):
                move.sequence.decoded(exit_index, move.token)
            return logits
        longest = max(sequence.length for sequence in self._places) + 1
        places = np.array(members)
        self._pool.begin(places, np.array(tokens), np.array(rows), min(longest, self._engine.max_length))
        for move in moves:
            move.sequence.note(move.token)
        self._run(dict(zip(members, exits, strict=True)))
        return self._pool.logits(places)

    def _run(self, at: Mapping[int, int]) -> None:
        """Run the last row of members up to their exits (member → exit index); results are remembered in the pool."""
        alone: set[int] = set()  # members whose earlier rows are pending: their passes take several rows
        joined: dict[int, int] = {}  # member → number of stages that its row went through in shared passes
        for stage in range(max(at.values()) + 1):
            together = []
            for member, index in at.items():
                sequence = self._of(member)
                if index < stage:
                    continue
                if member in alone or sequence.length - sequence.stage_cursor[stage] > 1:
                    if member not in alone:
                        self._keep({member: joined.pop(member, 0)})
                        alone.add(member)
                    sequence.run_stage(stage, sequence.length)
                else:
                    together.append(member)
            self._run_stage(stage, together)
            joined.update(dict.fromkeys(together, stage + 1))
            if leaving := [member for member, index in at.items() if index == stage]:
                self._keep({member: joined.pop(member) for member in leaving if member in joined})
                self._run_exit(stage, leaving, alone, set(joined))

    def _keep(self, joined: Mapping[int, int]) -> None:
        """Store the last rows of members that went through that many stages in shared passes, and move the cursors."""
        for stages in set(joined.values()) - {0}:
            members = [member for member, count in joined.items() if count == stages]
            rows = [self._of(member).length - 1 for member in members]
            self._pool.keep(np.array(members), np.array(rows), slice(0, stages))
            for member, row in zip(members, rows, strict=True):
                sequence = self._of(member)
                sequence.stage_cursor[:stages] = [row + 1] * stages
                sequence.rows_run += stages

    def _run_stage(self, stage: int, members: list[int]) -> None:
        for first, count, carried in self._ranges(members, stage, lambda it: self._stage_rows(it, stage), set()):
            self._pool.run_stage(stage, first, count)
            for member, row in carried.items():
                sequence = self._of(member)
                self._pool.keep(np.array([member]), np.array([row]), slice(stage, stage + 1))
                sequence.stage_cursor[stage] = row + 1
                sequence.rows_run += 1

    @staticmethod
    def _stage_rows(sequence: TokenSequence, stage: int) -> tuple[int, int]:
        """Rows that a stage has taken in, and rows that it could take in."""
        return sequence.stage_cursor[stage], sequence.stage_cursor[stage - 1] if stage else sequence.length

    def _balcony_rows(self, sequence: TokenSequence, index: int) -> tuple[int, int]:
        """The same of a balcony; a norm has none to take in."""
        return (sequence.balcony_cursor[index], sequence.stage_cursor[index]) if self._cached[index] else (0, 0)

    def _run_exit(self, index: int, members: list[int], alone: set[int], going_on: set[int]) -> None:
        """Run the last rows of members through an exit.

        Args:
            index: index of the exit.
            members: members that leave here.
            alone: members whose rows ran in passes of their own.
            going_on: members whose rows go on to deeper stages in shared passes.
        """
        cached = self._cached[index]
        if index == len(self._layers) - 1:  # the last stage includes the norm
            self._take_results(index, [member for member in members if member not in alone])
            members = [member for member in members if member in alone]
        for member in members:
            sequence = self._of(member)
            behind = cached and sequence.balcony_cursor[index] < sequence.length - 1
            if behind:
                sequence.run_balcony(self._layers[index], sequence.length - 1 - sequence.balcony_cursor[index])
            if behind or member in alone:  # passes of its own have left another row in place
                self._pool.place(index + 1, member, sequence.length - 1)
        for first, count, carried in self._ranges(
            members, index + 1, lambda it: self._balcony_rows(it, index), going_on
        ):
            self._pool.run_exit(index, first, count)
            for member, row in carried.items():
                self._of(member).balcony_cursor[index] = row + 1
        self._take_results(index, members)
        if cached:
            for member in members:
                self._of(member).balcony_cursor[index] = self._of(member).length

    def _take_results(self, index: int, members: list[int]) -> None:
        if members:
            self._pool.result(index, np.array(members), np.array([self._of(member).length - 1 for member in members]))

    def _ranges(
        self, members: list[int], boundary: int, rows: Callable[[TokenSequence], tuple[int, int]], going_on: set[int]
    ) -> Iterator[tuple[int, int, dict[int, int]]]:
        """Split members into contiguous ranges.

        Args:
            members: members with a row for this pass.
            boundary: boundary at which the rows of the pass lie.
            rows: rows that a sequence's consumer has taken in, and rows that it could take in.
            going_on: members whose chosen row must stay; it is the one that they take along.

        Yields:
            First member, number of members, and the pending rows that members in between work off (member → row).
        """
        asked = sorted(members)
        if asked and asked[-1] - asked[0] == len(asked) - 1:  # no gaps, as is usual
            yield asked[0], len(asked), {}
            return
        while asked:
            first = last = asked.pop(0)
            carried: dict[int, int] = {}
            with ExitStack() as held:
                while asked and (between := self._carried(range(last + 1, asked[0]), rows, held)) is not None:
                    for member, (done, ready) in between.items():
                        # A full sequence has no row after its cursor: its last row runs again and writes the same values.
                        free = min(done, self._engine.max_length - 1)
                        row = self._of(member).length - 1 if member in going_on else free
                        if member not in going_on:
                            self._pool.place(boundary, member, row)
                        if row == done < ready:
                            carried[member] = row
                    last = asked.pop(0)
                yield first, last - first + 1, carried

    def _carried(
        self, between: range, rows: Callable[[TokenSequence], tuple[int, int]], held: ExitStack
    ) -> dict[int, tuple[int, int]] | None:
        """``rows`` of the members between two others, which a range takes along; None: begin another range instead."""
        found, dead = {}, 0
        for member in between:
            sequence, done, ready = self._members[member], 0, 0
            if sequence is not None:
                if not sequence.lock.acquire(blocking=False):
                    return None  # another thread is using it
                held.callback(sequence.lock.release)
                done, ready = rows(sequence)
            dead += done >= ready
            if dead > MOST_DEAD:
                return None
            found[member] = (done, ready)
        return found

    def _of(self, member: int) -> TokenSequence:
        sequence = self._members[member]
        assert sequence is not None, member  # the members of a step are taken
        return sequence
