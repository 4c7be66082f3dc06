"""One sequence's passes over an engine set on an accelerator.

Owns which rows go through which graph. The memory is a :class:`.workspace.Workspace`; a :class:`.device.Device` provides it,
and a :class:`.device.Executor` runs the graphs.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

import numpy as np

from balcony_edge.bundle.manifest import DType
from balcony_runtime.backends.accelerator.device import ALIGNMENT, ITEM_BYTES, Region, array_dtype
from balcony_runtime.backends.accelerator.workspace import MAX_ROWS, Graph, Workspace
from balcony_runtime.backends.base import Array, FloatArray, IntArray, RowsOnly, not_finite, part_of

if TYPE_CHECKING:
    from balcony_runtime.backends.accelerator.backend import DeviceBackend

P = ParamSpec("P")
R = TypeVar("R")


class _OnBackend(Protocol):
    backend: DeviceBackend


S = TypeVar("S", bound=_OnBackend)


def exclusive(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Make a method exclusive: while it runs, nobody else uses the device."""

    @functools.wraps(method)
    def locked(user: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with user.backend.alone():
            return method(user, *args, **kwargs)

    return locked


class DeviceState(RowsOnly):
    """One sequence's rows and caches on a device; implements :class:`balcony_runtime.backends.base.State`.

    Args:
        backend: backend of the engines.
        workspace: memory of the sequence.
        pool: what keeps the memory of the pool that the sequence is a member of; None for a sequence by itself.
    """

    def __init__(self, backend: DeviceBackend, workspace: Workspace, pool: object = None) -> None:
        self.backend, self._device, self._workspace, self._pool = backend, backend.device, workspace, pool
        self._layers = (0, *backend.manifest.exit_layers)  # layer of each boundary
        self._batch, self._width = workspace.batch_size, backend.manifest.model.hidden_size
        self.busy_ns = 0
        self._asked: Region | None = None
        #: Rows that boundary 0 has had.
        self.reached = 0
        if pool is None:
            # Python does not free device memory. Return it when the state is collected; the backend frees the rest at its end.
            weakref.finalize(self, backend.returned.append, workspace)

    @property
    def memory_bytes(self) -> int:
        """Bytes of row buffers and KV caches: at full length, since a device allocates them whole; of a member, its rows'."""
        whole = self._workspace.memory_bytes
        return whole if self._pool is None else whole * self.reached // self._workspace.length

    @exclusive
    def decode(self, exit_index: int, ids: IntArray, row: int) -> FloatArray:
        """Run one row through all graphs on the way to an exit."""
        self._step(exit_index, ids, row)
        logits: FloatArray = self._downloaded(self._workspace.step.logits)[:, 0]
        return logits

    @exclusive
    def decode_best(self, exit_index: int, ids: IntArray, row: int) -> IntArray:
        """The same, but return only the most likely token of each member, (B,).

        Raises:
            InputError: the logit of such a token is NaN or infinite.
        """
        self._step(exit_index, ids, row)
        best: IntArray = self._downloaded(self._workspace.step.best)[:, 0]
        logits = self._workspace.step.logits
        for member, token in enumerate(best.tolist()):
            # What a GPU calls the largest of NaN may be no token: kernels that compare begin with the largest integer.
            there = 0 <= token < logits.shape[2]
            if not there or not np.isfinite(self._downloaded(logits.part(member * logits.shape[2] + token, (1,)))[0]):
                raise not_finite()
        return best

    @exclusive
    def embed(self, tokens: IntArray, start: int) -> None:
        """Write token embeddings to boundary 0."""
        self.reached = start + tokens.shape[1]
        for first in range(0, tokens.shape[1], MAX_ROWS):
            part = tokens[:, first : first + MAX_ROWS]
            rows = self._rows_of(0, start + first, start + first + part.shape[1], 0, fill=False)
            with self._for_a_pass(part.shape, "int64") as ids:
                self._device.upload(ids, part)
                self._run(self._workspace.graphs.embed, {"ids": ids, "hidden_0": rows})
            self._store(0, rows, start + first)

    @exclusive
    def run_stage(self, stage: int, start: int, stop: int) -> None:
        """Run rows from boundary ``stage`` to boundary ``stage + 1``."""
        self._stand_at(start)
        source = self._rows_of(stage, start, stop, 0)
        target = self._rows_of(stage + 1, start, stop, 1, fill=False)
        names = [f"hidden_{layer}" for layer in self._layers[stage : stage + 2]]
        self._run(self._workspace.graphs.stages[stage], {names[0]: source, names[1]: target})
        self._store(stage + 1, target, start)

    @exclusive
    def run_exit(self, exit_index: int, start: int, stop: int, num_queries: int) -> None:
        """Run the balcony or the norm of an exit over rows of its boundary."""
        boundary, count = exit_index + 1, max(num_queries, 1)
        graph = self._workspace.graphs.exits[exit_index]
        out = self._workspace.result.part(0, (self._batch, count, self._width))
        queries = self._rows_of(boundary, stop - count, stop, 0)
        if graph.cache is None:
            self._run(graph, {"hidden": queries, "normed": out})
        else:
            self._stand_at(start)
            rows = self._rows_of(boundary, start, stop, 1)
            self._run(graph, {"rows": rows, "queries": queries, "hidden": out})
        self._asked = out

    @exclusive
    def wait(self) -> None:
        """Wait for all passes so far."""
        begin = time.perf_counter_ns()
        self._device.synchronize()
        self.busy_ns += time.perf_counter_ns() - begin

    @exclusive
    def logits(self, num_queries: int) -> FloatArray:
        """Run the head over the result of :meth:`run_exit`."""
        assert self._asked is not None
        vocabulary = self.backend.manifest.model.vocab_size
        asked = (self._batch, num_queries)
        with self._for_a_pass((*asked, vocabulary), "float32") as logits, self._for_a_pass(asked, "int64") as best:
            self._run(self._workspace.graphs.head, {"hidden": self._asked, "logits": logits, "argmax": best})
            found: FloatArray = self._downloaded(logits)
        return found

    @exclusive
    def parts(self, stage_rows: Sequence[int], balcony_rows: Sequence[int]) -> dict[str, Array]:
        """Copies of the rows at the boundaries after the stages, and of keys and values."""
        found = {}
        for name, region, shape in self._reached(stage_rows, balcony_rows):
            with self._for_a_pass(shape, region.dtype) as dense:
                self._copy_first(region, dense, to_region=False)
                found[name] = self._downloaded(dense)
        return found

    @exclusive
    def fill(self, stage_rows: Sequence[int], balcony_rows: Sequence[int], parts: Mapping[str, Array]) -> None:
        """Copy what another state has made to the device."""
        self.reached = max(stage_rows)
        for name, region, shape in self._reached(stage_rows, balcony_rows):
            with self._for_a_pass(shape, region.dtype) as dense:
                self._device.upload(dense, part_of(parts, name, shape, array_dtype(region.dtype)))
                self._copy_first(region, dense, to_region=True)
                self._device.synchronize()  # only one copy at a time is in the host's memory

    def _reached(
        self, stage_rows: Sequence[int], balcony_rows: Sequence[int]
    ) -> Iterator[tuple[str, Region, tuple[int, ...]]]:
        """Name and region of everything that has been made, and the shape of its first rows."""
        workspace = self._workspace
        for stage, rows in enumerate(stage_rows):
            region = workspace.rows[stage + 1]
            yield f"hidden_{self._layers[stage + 1]}", region, (self._batch, rows, self._width)
        graphs = (*workspace.graphs.stages, *workspace.graphs.exits)
        for graph, rows in zip(graphs, (*stage_rows, *balcony_rows), strict=False):
            if graph.cache is not None and rows:
                for name, region in graph.cache.past.items():
                    yield f"{graph.name}.{name}", region, (*region.shape[:2], rows, *region.shape[3:])

    def _copy_first(self, region: Region, dense: Region, *, to_region: bool) -> None:
        """Copy the first rows of a region from or to a dense tensor; they differ in one dimension."""
        lines = math.prod(dense.shape[: 1 if len(dense.shape) == 3 else 2])
        self._copy_lines(region.pointer, region.nbytes // lines, dense, lines, to_place=to_region)

    def _copy_lines(self, place: int, pitch: int, dense: Region, lines: int, *, to_place: bool) -> None:
        """Copy a dense tensor in so many lines to or from a place where a line begins every ``pitch`` bytes."""
        width = dense.nbytes // lines
        if to_place:
            self._device.copy(place, pitch, dense.pointer, width, width, lines)
        else:
            self._device.copy(dense.pointer, width, place, pitch, width, lines)

    @contextlib.contextmanager
    def _for_a_pass(self, shape: tuple[int, ...], dtype: DType) -> Iterator[Region]:
        region = self.backend.allocate(shape, dtype)
        try:
            yield region
        finally:
            self._device.free(region)

    def _step(self, exit_index: int, ids: IntArray, row: int) -> None:
        step = self._workspace.step
        self._device.upload(step.ids, ids[:, None])
        self._stand_at(row)
        begin = time.perf_counter_ns()
        self._workspace.run_step(exit_index)
        self.busy_ns += time.perf_counter_ns() - begin
        self.reached = row + 1
        if self._batch == 1:
            self._workspace.keep(step, 0, row, slice(0, exit_index + 2))
            return
        for boundary in range(exit_index + 2):
            self._store(boundary, step.rows[boundary], row)

    def _run(self, graph: Graph, tensors: dict[str, Region]) -> None:
        begin = time.perf_counter_ns()
        self._workspace.prepared(graph, tensors).run()
        self.busy_ns += time.perf_counter_ns() - begin
        if graph.cache is not None:
            graph.cache.turn()

    def _stand_at(self, start: int) -> None:
        self._device.upload(self._workspace.step.start, np.full(self._batch, start, np.int64))

    def _rows_of(self, boundary: int, start: int, stop: int, scratch: int, *, fill: bool = True) -> Region:
        """Rows of a boundary as a dense, aligned tensor (B, T, D): in place where they are one, else in a scratch region."""
        shape = (self._batch, stop - start, self._width)
        here = self._workspace.rows[boundary].part(start * self._width, shape)
        if self._batch == 1 and here.pointer % ALIGNMENT == 0:
            return here
        region = self._workspace.scratch[scratch].part(0, shape)
        if fill:
            self._copy_rows(boundary, region, start, to_rows=False)
        return region

    def _store(self, boundary: int, rows: Region, start: int) -> None:
        """Copy rows of :meth:`_rows_of`, or the rows of a step, to the buffer of their boundary."""
        if rows.pointer != self._workspace.rows[boundary].part(start * self._width, ()).pointer:
            self._copy_rows(boundary, rows, start, to_rows=True)

    def _copy_rows(self, boundary: int, dense: Region, start: int, *, to_rows: bool) -> None:
        item = ITEM_BYTES[dense.dtype] * self._width
        place = self._workspace.rows[boundary].pointer + start * item
        self._copy_lines(place, self._workspace.length * item, dense, self._batch, to_place=to_rows)

    def _downloaded(self, region: Region) -> Any:
        begin = time.perf_counter_ns()
        array = self._device.download(region)  # waits for the device
        self.busy_ns += time.perf_counter_ns() - begin
        return array
