"""States of recurrent layers: the one that a pass goes on from, the one that it makes, and checkpoints for rollbacks.

A recurrent state stands for all rows that a graph has taken in and cannot forget one of them. A rollback therefore goes to the
newest state that is kept at or before the wanted row, and the rows in between are pending again. Owns the arrays, and which
states are kept: two that take turns, so that an interrupted pass leaves the old one, and a bounded number of copies whose
distances from the present grow by a factor, so that a rollback by d rows runs at most about d rows again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from balcony_edge.bundle.manifest import GraphSpec, is_state

#: Rows between two copies that decode steps make; passes of as many rows or more end with a copy.
SPACING = 64
#: Most rows of a round of drafts: 8 that the round before has left, the token before the drafts, and 8 drafts.
ROUND = 17
#: Most copies of one graph, and most bytes that the copies of all graphs of a sequence may take.
MOST_COPIES, COPY_BYTES = 8, 256 << 20

_Arrays = list[npt.NDArray[Any]]


class RecurrentStates:
    """What the recurrent layers of one graph keep, for one sequence or a batch of equal length."""

    def __init__(self, graph: GraphSpec, batch_size: int, most_copies: int = MOST_COPIES) -> None:
        tensors = state_tensors(graph)
        self.names = [tensor.name for tensor in tensors]
        shapes = [(batch_size, *(dim for dim in tensor.shape if isinstance(dim, int))) for tensor in tensors]
        kinds = list(zip(shapes, (tensor.dtype for tensor in tensors), strict=True))
        #: Two sets of arrays, which take turns.
        self.sides: tuple[_Arrays, _Arrays] = ([np.zeros(*kind) for kind in kinds], [np.zeros(*kind) for kind in kinds])
        # Number of rows that each side stands for; -1 while a pass may be writing it.
        self._rows = [0, -1]
        self._copies: dict[int, _Arrays] = {}  # rows → a copy of the state after them, oldest first
        self._most_copies = most_copies

    def newest(self, rows: int) -> int:
        """Largest number of rows, at most ``rows``, whose state is kept; before the first row there is always one."""
        return max((there for there in (0, *self._rows, *self._copies) if there <= rows), default=0)

    def begin(self, rows: int) -> int:
        """Begin a pass over the rows after the first ``rows``, whose state is kept: returns the side to read from.

        The pass writes the other side. States of later rows are forgotten: the sequence went back before them.
        """
        for late in [there for there in self._copies if there > rows]:
            del self._copies[late]
        if rows in self._rows:
            side = self._rows.index(rows)
        else:
            if rows and rows not in self._copies:
                raise RuntimeError(f"the state after {rows} rows is not kept")
            side = 0
            self._rows[:] = -1, -1
            for array, kept in zip(self.sides[side], self._copies.get(rows, [0] * len(self.names)), strict=True):
                array[...] = kept
            self._rows[side] = rows
        self._rows[1 - side] = -1
        return side

    def end(self, side: int, rows: int) -> None:
        """End the pass that read ``side``: the other side stands for ``rows`` rows now."""
        self._rows[1 - side] = rows
        # Copies of all stages lie on one grid, or a rollback would go back a little further at every stage. A spaced copy right
        # after a requested one could push that one out, and a round of drafts goes back to it.
        newest = max(self._copies, default=0)
        if rows // SPACING > newest // SPACING and rows - newest > ROUND:
            self.copy(rows)

    def copy(self, rows: int) -> None:
        """Keep a copy of the state after ``rows`` rows, if a side stands for them."""
        if not rows or rows not in self._rows or rows in self._copies:
            return
        self._copies[rows] = [array.copy() for array in self.sides[self._rows.index(rows)]]
        if len(self._copies) > self._most_copies:
            del self._copies[self._least_missed(rows)]

    def _least_missed(self, now: int) -> int:
        """The copy without which the gaps between copies, relative to their distance from ``now``, stay smallest."""
        rows = sorted(self._copies)
        bounds = zip((0, *rows), rows, rows[1:], strict=False)
        return min(bounds, key=lambda three: (three[2] - three[0]) / (now - three[0] + 1))[1]

    def after(self, rows: int) -> dict[str, npt.NDArray[Any]]:
        """Input → the kept state after ``rows`` rows; zeros before the first."""
        if rows in self._rows:
            arrays = self.sides[self._rows.index(rows)]
        else:
            arrays = self._copies.get(rows) or [np.zeros_like(array) for array in self.sides[0]]
        return dict(zip(self.names, arrays, strict=True))

    def fill(self, rows: int) -> dict[str, npt.NDArray[Any]]:
        """Input → the array to write the state after ``rows`` rows into; nothing else is kept."""
        self._copies.clear()
        self._rows[:] = rows, -1
        return dict(zip(self.names, self.sides[0], strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of all states that are kept."""
        return sum(array.nbytes for arrays in (*self.sides, *self._copies.values()) for array in arrays)


def state_tensors(graph: GraphSpec) -> list[Any]:
    """The inputs of a graph that are recurrent states."""
    return [tensor for tensor in graph.inputs if is_state(tensor.name)]


def copies_for(graphs: Iterable[GraphSpec], batch_size: int) -> int:
    """Number of copies of each graph's states that fit into ``COPY_BYTES`` together."""
    sizes = [
        np.dtype(tensor.dtype).itemsize * np.prod([dim for dim in tensor.shape if isinstance(dim, int)])
        for graph in graphs
        for tensor in state_tensors(graph)
    ]
    return int(np.clip(COPY_BYTES // max(int(sum(sizes)) * batch_size, 1), 1, MOST_COPIES))
