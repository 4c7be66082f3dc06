"""What every engine backend implements: one small protocol for graphs and memory.

A backend owns weights and executable graphs; a :class:`State` owns one sequence's memory on the backend's device (row
buffers, KV caches). Neither knows cursors or exits policies: :mod:`balcony_runtime.engine` decides which rows go through
which graph, and the backend moves them.
"""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from balcony_edge.bundle.manifest import Manifest
from balcony_edge.errors import InputError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


class State(Protocol):
    """Memory of one sequence. Rows are written before they are read; ``start`` and ``stop`` are row indices."""

    @property
    def busy_ns(self) -> int:
        """Nanoseconds spent inside the engine since the state was made: what is left of a step is Python."""
        ...

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that row buffers, KV caches and logits take now."""
        ...

    def decode(self, exit_index: int, ids: IntArray, row: int) -> FloatArray:
        """The decode step: one token of each member, (B,), to row ``row`` and on to the logits of an exit, (B, V).

        Every graph on the way has taken the rows before. The array belongs to the state; the next step writes over it.
        """
        ...

    def decode_best(self, exit_index: int, ids: IntArray, row: int) -> IntArray:
        """The same step, of which only the most likely token of each member is wanted, (B,)."""
        ...

    def embed(self, tokens: IntArray, start: int) -> None:
        """Write the embeddings of ``tokens`` (B, n) to rows ``start : start + n`` of boundary 0."""
        ...

    def run_stage(self, stage: int, start: int, stop: int) -> None:
        """Take rows ``start : stop`` of boundary ``stage`` to boundary ``stage + 1``; their keys and values are kept."""
        ...

    def run_exit(self, exit_index: int, start: int, stop: int, num_queries: int) -> None:
        """Feed rows ``start : stop`` to the exit's balcony (the full depth: its norm), asking with the last ones.

        The result waits for :meth:`logits`. A balcony keeps keys and values of all rows; a norm takes the last ones only.
        With ``num_queries`` 0 nothing is asked: a backlog is worked off.
        """
        ...

    def wait(self) -> None:
        """Wait until the device has made all passes so far: before and behind what is timed alone."""
        ...

    def logits(self, num_queries: int) -> FloatArray:
        """Logits (B, num_queries, V) of what :meth:`run_exit` left, as an array that the caller owns."""
        ...


class Backend(Protocol):
    """An engine with its graphs loaded: a context manager that frees them."""

    manifest: Manifest
    threads: int
    #: Most rows of a sequence; at most the context length.
    max_length: int
    #: Whether it is cheaper to have the most likely token picked inside than to get all logits.
    picks_inside: bool

    def new_state(self, batch_size: int, max_length: int) -> State:
        """Memory for one sequence of ``batch_size`` rows in parallel and at most ``max_length`` tokens."""
        ...

    def close(self) -> None:
        """Free the graphs. States of a closed backend must not be used."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def not_finite() -> InputError:
    """The error for logits that a model cannot produce, wherever a token is chosen: on the host or on the device."""
    return InputError("the logits hold NaN or infinity: run `balcony-edge verify` on this bundle")
