"""An engine set on an accelerator, and one sequence's passes over it.

Owns which rows go through which graph, and who uses the device. The memory is a :class:`.workspace.Workspace`; a
:class:`.device.Device` provides it, and a :class:`.device.Executor` the graphs.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from balcony_edge.bundle.manifest import DType, EngineSet, Manifest
from balcony_edge.closing import Closing
from balcony_edge.errors import DeviceError, InputError
from balcony_runtime.backends.accelerator.device import (
    ALIGNMENT,
    ITEM_BYTES,
    Device,
    Executor,
    Region,
    array_dtype,
)
from balcony_runtime.backends.accelerator.workspace import MAX_ROWS, Graph, Workspace
from balcony_runtime.backends.base import Array, FloatArray, IntArray, RowsOnly, closed, not_finite, part_of


class DeviceBackend(Closing):
    """An engine set that runs on a device; implements :class:`balcony_runtime.backends.base.Backend`."""

    def __init__(self, manifest: Manifest, engines: EngineSet, device: Device, executor: Executor, name: str) -> None:
        self.manifest, self.engines = manifest, engines
        self.device, self.executor = device, executor
        self.name, self.graphs = name, f"engine set {engines.identity[:16]}"
        #: The device does the work; one thread of the host starts it.
        self.threads = 1
        self.max_length = engines.context_length
        self.batch_size = executor.batch_size
        self.picks_inside = True
        #: All sequences share one queue of work and its contexts, so only one thread at a time may use them.
        self.lock = threading.RLock()
        #: Memory of collected states. The next state takes it, or frees it: a state may be collected in any thread, even during
        #: a capture.
        self.returned: deque[Workspace] = deque()
        self._workspaces: weakref.WeakSet[Workspace] = weakref.WeakSet()
        self._closed = False

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A context in which the calling thread has the device to itself; an error once its memory is freed."""
        with self.lock:
            if self._closed:
                raise closed()
            with self.device.current():
                yield

    def new_state(self, batch_size: int, max_length: int) -> DeviceState:
        """Memory for one sequence. It has the length of the engines' caches, whatever ``max_length`` is.

        Raises:
            InputError: the engines were built for another number of members.
            DeviceError: there is not enough memory.
        """
        if self.executor.batch_size not in (None, batch_size):
            raise InputError(
                f"batch_size = {batch_size}: these engines were built for {self.executor.batch_size}: "
                f"build others with --batch {batch_size}"
            )
        with self.alone():
            workspace = None
            for _ in range(len(self.returned)):
                old = self.returned.popleft()
                if old.batch_size != batch_size:
                    old.free()
                elif workspace is None:
                    workspace = old
                else:
                    self.returned.append(old)  # with its captures; :meth:`allocate` frees it where memory runs out
            if workspace is None:
                workspace = Workspace(self, batch_size)
                self._workspaces.add(workspace)
            else:
                workspace.clear()
            return DeviceState(self, workspace)

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Region:
        """Allocate a region of zeros, if need be in the place of memory of collected states.

        Raises:
            DeviceError: there is not enough memory.
        """
        while True:
            try:
                return self.device.allocate(shape, dtype)
            except DeviceError:
                if not self.returned:
                    raise
                self.returned.popleft().free()
                self.device.synchronize()  # memory goes back when the device comes to it

    def new_pool(self, members: int, max_length: int) -> None:
        """Nothing: the members of an engine's batch have the same length."""

    def close(self) -> None:
        """Free engines and memory; may be called several times."""
        with self.lock, contextlib.ExitStack() as stack:
            if self._closed:
                return
            with contextlib.suppress(DeviceError):  # a lost GPU cannot be chosen, and has nothing left to free
                stack.enter_context(self.device.current())
            with contextlib.suppress(DeviceError):
                self.device.synchronize()  # passes may still run
            for workspace in list(self._workspaces):
                workspace.forget_programs()  # they hold contexts of the engines
            with contextlib.suppress(DeviceError):
                self.device.collect()
            self._closed = True
            self.executor.close()
            self.device.close()


P = ParamSpec("P")
R = TypeVar("R")


def _exclusive(method: Callable[Concatenate[DeviceState, P], R]) -> Callable[Concatenate[DeviceState, P], R]:
    """Make a method exclusive: while it runs, no other sequence uses the device."""

    @functools.wraps(method)
    def locked(state: DeviceState, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with state._backend.alone():
            return method(state, *args, **kwargs)

    return locked


class DeviceState(RowsOnly):
    """One sequence's rows and caches on a device; implements :class:`balcony_runtime.backends.base.State`."""

    def __init__(self, backend: DeviceBackend, workspace: Workspace) -> None:
        self._backend, self._device, self._workspace = backend, backend.device, workspace
        self._layers = (0, *backend.manifest.exit_layers)  # layer of each boundary
        self._batch, self._width = workspace.batch_size, backend.manifest.model.hidden_size
        self.busy_ns = 0
        self._asked: Region | None = None
        # Python does not free device memory. Return it when the state is collected; the backend frees the rest when it closes.
        weakref.finalize(self, backend.returned.append, workspace)

    @property
    def memory_bytes(self) -> int:
        """Bytes of row buffers and KV caches at full length, since a device allocates them whole."""
        return self._workspace.memory_bytes

    @_exclusive
    def decode(self, exit_index: int, ids: IntArray, row: int) -> FloatArray:
        """Run one row through all graphs on the way to an exit."""
        self._step(exit_index, ids, row)
        logits: FloatArray = self._downloaded(self._workspace.logits)[:, 0]
        return logits

    @_exclusive
    def decode_best(self, exit_index: int, ids: IntArray, row: int) -> IntArray:
        """The same, but return only the most likely token of each member, (B,).

        Raises:
            InputError: the logit of such a token is NaN or infinite.
        """
        self._step(exit_index, ids, row)
        best: IntArray = self._downloaded(self._workspace.best)[:, 0]
        logits = self._workspace.logits
        for member, token in enumerate(best.tolist()):
            if not np.isfinite(self._downloaded(logits.part(member * logits.shape[2] + token, (1,)))[0]):
                raise not_finite()
        return best

    @_exclusive
    def embed(self, tokens: IntArray, start: int) -> None:
        """Write token embeddings to boundary 0."""
        for first in range(0, tokens.shape[1], MAX_ROWS):
            part = tokens[:, first : first + MAX_ROWS]
            rows = self._rows_of(0, start + first, start + first + part.shape[1], 0, fill=False)
            with self._for_a_pass(part.shape, "int64") as ids:
                self._device.upload(ids, part)
                self._run(self._workspace.embed, {"ids": ids, "hidden_0": rows})
            self._store(0, rows, start + first)

    @_exclusive
    def run_stage(self, stage: int, start: int, stop: int) -> None:
        """Run rows from boundary ``stage`` to boundary ``stage + 1``."""
        self._stand_at(start)
        source = self._rows_of(stage, start, stop, 0)
        target = self._rows_of(stage + 1, start, stop, 1, fill=False)
        names = [f"hidden_{layer}" for layer in self._layers[stage : stage + 2]]
        self._run(self._workspace.stages[stage], {names[0]: source, names[1]: target})
        self._store(stage + 1, target, start)

    @_exclusive
    def run_exit(self, exit_index: int, start: int, stop: int, num_queries: int) -> None:
        """Run the balcony or the norm of an exit over rows of its boundary."""
        boundary, count = exit_index + 1, max(num_queries, 1)
        graph = self._workspace.exits[exit_index]
        out = self._workspace.scratch[2].part(0, (self._batch, count, self._width))
        queries = self._rows_of(boundary, stop - count, stop, 0)
        if graph.cache is None:
            self._run(graph, {"hidden": queries, "normed": out})
        else:
            self._stand_at(start)
            rows = self._rows_of(boundary, start, stop, 1)
            self._run(graph, {"rows": rows, "queries": queries, "hidden": out})
        self._asked = out

    @_exclusive
    def wait(self) -> None:
        """Wait for all passes so far."""
        begin = time.perf_counter_ns()
        self._device.synchronize()
        self.busy_ns += time.perf_counter_ns() - begin

    @_exclusive
    def logits(self, num_queries: int) -> FloatArray:
        """Run the head over the result of :meth:`run_exit`."""
        assert self._asked is not None
        vocabulary = self._backend.manifest.model.vocab_size
        asked = (self._batch, num_queries)
        with self._for_a_pass((*asked, vocabulary), "float32") as logits, self._for_a_pass(asked, "int64") as best:
            self._run(self._workspace.head, {"hidden": self._asked, "logits": logits, "argmax": best})
            found: FloatArray = self._downloaded(logits)
        return found

    @_exclusive
    def parts(self, stage_rows: Sequence[int], balcony_rows: Sequence[int]) -> dict[str, Array]:
        """Copies of the rows at the boundaries after the stages, and of keys and values."""
        return {
            name: self._downloaded(region)[first] for name, region, first in self._reached(stage_rows, balcony_rows)
        }

    @_exclusive
    def fill(self, stage_rows: Sequence[int], balcony_rows: Sequence[int], parts: Mapping[str, Array]) -> None:
        """Copy what another state has made to the device."""
        for name, region, first in self._reached(stage_rows, balcony_rows):
            whole = np.zeros(region.shape, array_dtype(region.dtype))
            whole[first] = part_of(parts, name, whole[first].shape, whole.dtype)
            self._device.upload(region, whole)
            self._device.synchronize()  # only one copy at a time is in the host's memory

    def _reached(
        self, stage_rows: Sequence[int], balcony_rows: Sequence[int]
    ) -> Iterator[tuple[str, Region, tuple[slice, ...]]]:
        """Name and region of everything that has been made, and the index of its first rows."""
        workspace = self._workspace
        for stage, rows in enumerate(stage_rows):
            yield f"hidden_{self._layers[stage + 1]}", workspace.rows[stage + 1], np.s_[:, :rows]
        graphs = (*workspace.stages, *workspace.exits)
        for graph, rows in zip(graphs, (*stage_rows, *balcony_rows), strict=False):
            if graph.cache is not None and rows:
                for name, region in graph.cache.past.items():
                    yield f"{graph.name}.{name}", region, np.s_[:, :, :rows]

    @contextlib.contextmanager
    def _for_a_pass(self, shape: tuple[int, ...], dtype: DType) -> Iterator[Region]:
        region = self._backend.allocate(shape, dtype)
        try:
            yield region
        finally:
            self._device.free(region)

    def _step(self, exit_index: int, ids: IntArray, row: int) -> None:
        self._device.upload(self._workspace.ids, ids[:, None])
        self._stand_at(row)
        begin = time.perf_counter_ns()
        self._workspace.step(exit_index)
        self.busy_ns += time.perf_counter_ns() - begin
        for boundary in range(exit_index + 2):
            self._store(boundary, self._workspace.row[boundary], row)

    def _run(self, graph: Graph, tensors: dict[str, Region]) -> None:
        begin = time.perf_counter_ns()
        self._workspace.prepared(graph, tensors).run()
        self.busy_ns += time.perf_counter_ns() - begin
        if graph.cache is not None:
            graph.cache.turn()

    def _stand_at(self, start: int) -> None:
        self._device.upload(self._workspace.start, np.full(self._batch, start, np.int64))

    def _rows_of(self, boundary: int, start: int, stop: int, scratch: int, *, fill: bool = True) -> Region:
        """Rows of a boundary as a dense, aligned tensor (B, T, D): in place where they are one, else in a scratch region."""
        shape = (self._batch, stop - start, self._width)
        rows = self._workspace.rows[boundary]
        if self._batch == 1 and start * self._width * ITEM_BYTES[rows.dtype] % ALIGNMENT == 0:
            return rows.part(start * self._width, shape)
        region = self._workspace.scratch[scratch].part(0, shape)
        if fill:
            self._copy_rows(boundary, region, start, to_rows=False)
        return region

    def _store(self, boundary: int, rows: Region, start: int) -> None:
        """Copy rows of :meth:`_rows_of`, or the row of a step, to the buffer of their boundary."""
        if rows.pointer != self._workspace.rows[boundary].part(start * self._width, ()).pointer:
            self._copy_rows(boundary, rows, start, to_rows=True)

    def _copy_rows(self, boundary: int, dense: Region, start: int, *, to_rows: bool) -> None:
        item = ITEM_BYTES[dense.dtype] * self._width
        width, pitch = dense.shape[1] * item, self._workspace.length * item
        place = self._workspace.rows[boundary].pointer + start * item
        if to_rows:
            self._device.copy(place, pitch, dense.pointer, width, width, self._batch)
        else:
            self._device.copy(dense.pointer, width, place, pitch, width, self._batch)

    def _downloaded(self, region: Region) -> Any:
        begin = time.perf_counter_ns()
        array = self._device.download(region)  # waits for the device
        self.busy_ns += time.perf_counter_ns() - begin
        return array
