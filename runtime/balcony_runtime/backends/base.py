"""The interface of engine backends: small protocols for graphs, for the memory of a sequence, and for that of several.

A backend owns weights and executable graphs; a :class:`State` owns one sequence's memory on the backend's device (row
buffers, KV caches). A :class:`Pool` holds several that share passes; a backend may have none. None of them knows cursors or
policies: :mod:`balcony_runtime.token_sequence` decides which rows go through which graph, and the backend runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from balcony_edge.bundle.manifest import Manifest
from balcony_edge.errors import InputError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
Array = npt.NDArray[Any]
_T = TypeVar("_T")
_R = TypeVar("_R")


class State(Protocol):
    """Memory of one sequence. Rows are written before they are read; ``start`` and ``stop`` are row indices."""

    @property
    def busy_ns(self) -> int:
        """Nanoseconds spent inside the engine since the state was made; the rest of a step is Python's time.

        A decode step counts from its first graph to the end of its last, with what Python does between two graphs.
        """
        ...

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that row buffers and KV caches currently take, and logits where a backend counts them."""
        ...

    @property
    def recurrent_bytes(self) -> int:
        """The part of them that states of recurrent layers take, with their copies: it does not grow with the rows."""
        ...

    def decode(self, exit_index: int, ids: IntArray, row: int) -> FloatArray:
        """The decode step: write one token of each member, (B,), to row ``row`` and return the logits of an exit, (B, V).

        All graphs of the exit must have taken in all earlier rows. The array belongs to the state; the next step overwrites it.
        """
        ...

    def decode_best(self, exit_index: int, ids: IntArray, row: int) -> IntArray:
        """The same step, but return only the most likely token of each member, (B,)."""
        ...

    def embed(self, tokens: IntArray, start: int) -> None:
        """Write the embeddings of ``tokens`` (B, n) to rows ``start : start + n`` of boundary 0."""
        ...

    def run_stage(self, stage: int, start: int, stop: int) -> None:
        """Run rows ``start : stop`` from boundary ``stage`` to boundary ``stage + 1`` and keep their keys and values."""
        ...

    def run_exit(self, exit_index: int, start: int, stop: int, num_queries: int) -> None:
        """Run rows ``start : stop`` through the exit's balcony (full depth: the norm), the last ``num_queries`` as queries.

        :meth:`logits` uses the result. A balcony keeps keys and values of all rows; a norm only takes the query rows. With
        ``num_queries`` 0 the balcony only takes in a backlog.
        """
        ...

    def wait(self) -> None:
        """Wait until the device has finished all passes so far; call it after each pass that is timed."""
        ...

    def logits(self, num_queries: int) -> FloatArray:
        """Logits (B, num_queries, V) of the last :meth:`run_exit`, as an array that the caller owns."""
        ...

    def stage_resumes(self, stage: int, rows: int) -> int:
        """Largest number of rows, at most ``rows``, after which a stage that has taken in more can go on.

        It is ``rows`` itself for a stage that only keeps rows. One with recurrent layers goes on from a state that is kept.
        """
        ...

    def exit_resumes(self, exit_index: int, rows: int) -> int:
        """The same for the balcony of an exit."""
        ...

    def checkpoint(self, stage_cursor: Sequence[int], balcony_cursor: Sequence[int]) -> None:
        """Keep the recurrent states at the cursors of stages and balconies, so that a rollback to here runs no row again."""
        ...

    def parts(self, stage_rows: Sequence[int], balcony_rows: Sequence[int]) -> dict[str, Array]:
        """What stages and balconies have made of that many first rows: the rows at the boundaries, and keys and values.

        With the tokens this is all that a sequence is. The arrays may be views, so they are good until the state is next used.
        """
        ...

    def fill(self, stage_rows: Sequence[int], balcony_rows: Sequence[int], parts: Mapping[str, Array]) -> None:
        """Take over :meth:`parts` of another state of the same graphs.

        Raises:
            InputError: a part is missing, or has another shape or type.
        """
        ...


class RowsOnly:
    """The part of a :class:`State` about rollbacks, for graphs that keep only rows: they go on from any of them."""

    #: See :class:`State`.
    recurrent_bytes = 0

    def stage_resumes(self, stage: int, rows: int) -> int:
        """See :class:`State`."""
        return rows

    def exit_resumes(self, exit_index: int, rows: int) -> int:
        """See :class:`State`."""
        return rows

    def checkpoint(self, stage_cursor: Sequence[int], balcony_cursor: Sequence[int]) -> None:
        """Do nothing: rows stay as they are."""


class Pool(Protocol):
    """Memory of several members, each of which is a :class:`State` of batch 1, and passes that neighbouring members share.

    A shared pass takes one row of each of ``count`` members from ``first`` on: the one that :meth:`begin` or :meth:`place`
    chose, as the passes of earlier stages have changed it. Nothing of it is stored before :meth:`keep`.
    """

    members: int
    #: Most dead rows in one gap that cost less than another pass.
    most_dead: int

    @property
    def prepared(self) -> int:
        """How often a pass or a member was made ready, which takes longer than to use it."""
        ...

    @property
    def busy_ns(self) -> int:
        """Nanoseconds spent inside the engine by shared passes."""
        ...

    def state(self, member: int) -> State:
        """The memory of one member."""
        ...

    def decode(self, first: int, exits: tuple[int, ...], tokens: Sequence[int], rows: Sequence[int]) -> FloatArray:
        """Run one new row of each of neighbouring members through all graphs on the way to its exit, and store it.

        Every graph has taken in the members' earlier rows. At every depth, the members that leave there are neighbours, and so
        are those that go on.

        Args:
            first: first member.
            exits: index of the exit of each member, (n,).
            tokens: token of each member, (n,).
            rows: number of the new row of each member, (n,).

        Returns:
            Logits (n, V), in an array that the next call overwrites.
        """
        ...

    def begin(self, members: IntArray, tokens: IntArray, rows: IntArray, total: int) -> None:
        """Begin a step in single passes: write one token of each member to a row of its boundary 0, and choose it for them.

        ``total`` is more than the number of any row that a pass of this step takes.
        """
        ...

    def place(self, boundary: int, member: int, row: int) -> None:
        """Choose an earlier row of one member, as it lies at a boundary, for the next passes."""
        ...

    def run_stage(self, stage: int, first: int, count: int) -> None:
        """Run the chosen rows through a stage and keep their keys and values."""
        ...

    def run_exit(self, exit_index: int, first: int, count: int) -> None:
        """Run the chosen rows through the exit's balcony or norm, each as its own query. The last stage includes the norm."""
        ...

    def keep(self, members: IntArray, rows: IntArray, stages: slice) -> None:
        """Store what some stages made of the chosen rows, at the boundaries after these stages."""
        ...

    def result(self, exit_index: int, members: IntArray, rows: IntArray) -> None:
        """Remember the results of an exit, before other passes take the members along."""
        ...

    def logits(self, members: IntArray) -> FloatArray:
        """Logits (n, V) of the remembered results, in an array that the next call overwrites."""
        ...

    def clear(self, member: int) -> None:
        """Give a member's memory back; its rows are lost, and its state must not be used any more."""
        ...


class Backend(Protocol):
    """An engine with its graphs loaded. A context manager that frees them."""

    manifest: Manifest
    #: The engine, and the device that it runs on.
    name: str
    #: Name of the graphs that run; rows and caches of other graphs mean something else, whatever their shapes.
    graphs: str
    threads: int
    #: Most rows of a sequence; at most the context length.
    max_length: int
    #: Most members of a sequence; None for any number.
    most_members: int | None
    #: Whether picking the most likely token inside the backend is cheaper than returning all logits.
    picks_inside: bool

    def new_state(self, batch_size: int, max_length: int) -> State:
        """Memory for one sequence of ``batch_size`` members and at most ``max_length`` tokens each."""
        ...

    def new_pool(self, members: int, max_length: int) -> Pool | None:
        """Memory for at most so many sequences that can share passes; None if this backend's graphs cannot share one."""
        ...

    def close(self) -> None:
        """Free the graphs. States of a closed backend must not be used."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def passes_of(first: int, exits: Sequence[int]) -> Iterator[tuple[int, range, range]]:
    """Every exit up to the deepest, the members that reach it and those that leave there, which are :func:`neighbours`.

    Args:
        first: first member.
        exits: index of the exit of each member.
    """
    for exit_index in range(max(exits) + 1):
        reaching = [first + place for place, deepest in enumerate(exits) if deepest >= exit_index]
        leaving = [first + place for place, deepest in enumerate(exits) if deepest == exit_index]
        yield (
            exit_index,
            range(reaching[0], reaching[-1] + 1),
            range(leaving[0], leaving[-1] + 1) if leaving else range(0),
        )


@lru_cache(maxsize=1024)
def neighbours(exits: tuple[int, ...]) -> bool:
    """Whether, at every depth, the members that leave there are neighbours, and so are those that go on."""

    def adjacent(chosen: Callable[[int], bool]) -> bool:
        places = [place for place, exit_index in enumerate(exits) if chosen(exit_index)]
        return not places or places[-1] - places[0] == len(places) - 1

    return all(adjacent(depth.__eq__) and adjacent(depth.__lt__) for depth in set(exits))


def part_of(parts: Mapping[str, Array], name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """One of :meth:`State.parts`, if it fits.

    Raises:
        InputError: it is missing, or has another shape or type.
    """
    part = parts.get(name)
    if part is None or part.shape != shape or part.dtype != dtype:
        found = "nothing" if part is None else f"{part.dtype} {part.shape}"
        raise InputError(
            f"{name}: {found}, but these graphs have {np.dtype(dtype)} {shape}: use the graphs that made it"
        )
    return part


def likeliest(logits: FloatArray) -> IntArray:
    """The likeliest token of each row of logits (B, V), (B,).

    Raises:
        InputError: a row has none: the first NaN or infinity of a row is the one that argmax finds.
    """
    best: IntArray = logits.argmax(-1)
    if not np.isfinite(np.take_along_axis(logits, best[:, None], 1)).all():
        raise not_finite()
    return best


def at_once(call: Callable[[_T], _R], items: Sequence[_T], threads: int) -> list[_R]:
    """Results of a call for each item, in their order, from so many threads; after an error or Ctrl-C none begins any more."""
    with ExitStack() as held:
        try:
            from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - fails as the calls below

            found: Iterator[_R] = held.enter_context(ThreadPoolExecutor(threads)).map(call, items)
        except (
            RuntimeError
        ):  # the main thread has ended: pools begin nothing any more, and the application's threads go on
            held.close()
            found = map(call, items)
        return list(found)  # in the pool's context: it is the iterator that cancels what has not begun


def closed() -> InputError:
    """The error for work on an engine that was closed."""
    return InputError("this bundle was closed: load it again")


def forked() -> InputError:
    """The error for work in a forked process, which has none of the threads of ONNX Runtime, of grammars and of sensors."""
    return InputError("this bundle was loaded before this process was forked: load bundles after a fork only, or spawn")


class NotFiniteError(InputError):
    """Logits are NaN or infinite, so rows of the sequence may be, too."""


def not_finite() -> NotFiniteError:
    """The error for NaN or infinite logits, for code that chooses tokens on the host or on the device."""
    return NotFiniteError("the logits hold NaN or infinity: run `balcony-edge verify` on this bundle")
