"""The step of several members of a KV pool, each at an exit of its own.

Owns which members share a pass. All run stage 0; those at a shallow exit leave to their balcony, and the others go on in a
smaller batch. A member is a :class:`TokenSequence` like any other: its pending rows are the rebatching buffer, so nothing is
approximated, and what it does alone (prompts, backlog, speculation) it does as a sequence of its own.

A pass takes a contiguous range of members. A member inside the range that has no row of its own for this graph works off one of
its pending rows, or takes a dead row past its cursor. Up to ``most_dead`` dead rows in a gap cost less than a second pass.

An example: members 0, 1 and 2 step to the first, second and second exit, and member 2 has two rows pending at stage 1.

    begin(0, 1, 2)          one token of each at boundary 0
    run_stage(0, 0 to 2)    one pass; member 0 leaves, and its row is kept
    run_exit(0, 0)          its balcony, alone; result(0) remembers what came out
    member 2 runs stage 1 in a pass of its own, three rows
    run_stage(1, 1)         member 1 is what is left; its rows of both stages are kept
    run_exit(1, 1 to 2)     one pass again, after place() has put member 2's last row there; result(1, 2)
    logits(0, 1, 2)         the head, once for all

Usually no rows are pending, and members that share a pass are next to each other. Then the step is one call, ``decode``, with
the same passes bound in advance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from balcony_runtime.backends.base import FloatArray, Pool, neighbours
from balcony_runtime.engine import Engine
from balcony_runtime.token_sequence import TokenSequence


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


class SharedStep:
    """Steps members of one pool together. One thread at a time, which holds the locks of their sequences.

    Args:
        engine: engine of the sequences.
        pool: memory of the members.
        members: the sequence of every member, None where it is free; not to be changed during a step.
    """

    def __init__(self, engine: Engine, pool: Pool, members: Sequence[TokenSequence | None]) -> None:
        self._engine, self._pool, self._members = engine, pool, members
        self._layers = engine.exit_layers
        self._indices = {layer: index for index, layer in enumerate(self._layers)}
        cached = engine.manifest.cached_exits
        self._cached = tuple(layer in cached for layer in self._layers)

    def run(self, members: list[int], moves: Sequence[PoolMove]) -> FloatArray:
        """The step of members in ascending order, with the move of each; gives logits (n, V)."""
        indices, tokens, rows, ready = [], [], [], members[-1] - members[0] < len(members)
        for sequence, exit_layer, token in moves:
            indices.append(self._indices[exit_layer])
            tokens.append(token)
            rows.append(sequence.length)
            ready = ready and sequence.up_to_date(exit_layer)
        if ready and neighbours(exits := tuple(indices)):
            logits = self._pool.decode(members[0], exits, tokens, rows)
            for place, (sequence, _, token) in enumerate(moves):
                sequence.record_step(exits[place], token)
            return logits
        longest = max(sequence.length for sequence in self._members if sequence is not None) + 1
        places = np.array(members)
        self._pool.begin(places, np.array(tokens), np.array(rows), min(longest, self._engine.max_length))
        for move in moves:
            move.sequence.record_tokens(move.token)
        self._run(dict(zip(members, indices, strict=True)))
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
            if dead > self._pool.most_dead:
                return None
            found[member] = (done, ready)
        return found

    def _of(self, member: int) -> TokenSequence:
        sequence = self._members[member]
        assert sequence is not None, member  # the members of a step are taken
        return sequence
