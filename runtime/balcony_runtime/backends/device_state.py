"""One sequence's memory on an accelerator, and the graphs of an engine set over it.

Owns the regions (row buffers, KV caches, small inputs of a pass) and the decode step as one captured program per exit: token
table, stages, balcony, head and the choice of the most likely token run without Python or the host in between. A
:class:`.device.Device` provides the memory, a :class:`.device.Executor` the graphs. I/O tables: those of the set ``graphs`` in
:mod:`balcony_edge.bundle.manifest`, but with caches (B, H, S, d) of fixed S, a graph ``embed`` (``ids`` int64 (B, T) →
``hidden_0``), and a second output ``argmax`` int64 (B, Q) of ``lm_head``.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Concatenate, NamedTuple, ParamSpec, Self, TypeVar

import numpy as np

from balcony_edge.bundle.manifest import DType, EngineSet, Manifest
from balcony_edge.errors import InputError
from balcony_runtime.backends.base import Array, FloatArray, IntArray, not_finite, part_of
from balcony_runtime.backends.device import ITEM_BYTES, Device, Executor, Region

#: Most rows of one pass: the end of the largest optimization profile.
MAX_ROWS = 512


class DeviceBackend:
    """An engine set that runs on a device; implements :class:`balcony_runtime.backends.base.Backend`."""

    def __init__(self, manifest: Manifest, engines: EngineSet, device: Device, executor: Executor, name: str) -> None:
        self.manifest, self.engines = manifest, engines
        self.device, self.executor = device, executor
        #: The engine and the device, for people.
        self.name = name
        #: The device does the work; one thread of the host starts it.
        self.threads = 1
        self.max_length = engines.context_length
        self.picks_inside = True
        #: All sequences share one queue of work and its contexts, so only one thread at a time may use them.
        self.lock = threading.RLock()
        #: Memory of collected states, freed later: a state may be collected in any thread, even during a capture.
        self.returned: deque[Region] = deque()

    def new_state(self, batch_size: int, max_length: int) -> DeviceState:
        """Memory for one sequence.

        Raises:
            InputError: the engines were built for another number of members.
            DeviceError: there is not enough memory.
        """
        if self.executor.batch_size not in (None, batch_size):
            raise InputError(
                f"batch_size = {batch_size}: these engines were built for {self.executor.batch_size}: "
                f"build others with --batch {batch_size}"
            )
        with self.lock:
            return DeviceState(self, batch_size, max_length)

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Region:
        """Free the memory of collected states, then allocate a region of zeros.

        Raises:
            DeviceError: there is not enough memory.
        """
        while self.returned:
            self.device.free(self.returned.popleft())
        return self.device.allocate(shape, dtype)

    def new_pool(self, members: int, max_length: int) -> None:
        """Nothing: the members of an engine's batch have the same length."""

    def close(self) -> None:
        """Free engines and memory."""
        self.executor.close()
        self.device.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Cache:
    """KV tensors of one graph: one region each if the graph writes in place, otherwise two that take turns."""

    def __init__(
        self, engines: EngineSet, graph: str, allocate: Callable[..., Region], batch_size: int, in_place: bool
    ) -> None:
        pasts = [tensor for tensor in engines.graphs[graph].inputs if tensor.name.startswith("past_")]
        self._names = [tensor.name for tensor in pasts]
        shapes = [(batch_size, *(dim for dim in tensor.shape if isinstance(dim, int))) for tensor in pasts]

        def regions() -> list[Region]:
            return [allocate(shape, tensor.dtype) for shape, tensor in zip(shapes, pasts, strict=True)]

        first = regions()
        self.sides = [first, first if in_place else regions()]
        self.side = 0

    def tensors(self) -> dict[str, Region]:
        """Past and present tensors of the next pass."""
        names = [name.replace("past_", "present_", 1) for name in self._names]
        return self.past | dict(zip(names, self.sides[1 - self.side], strict=True))

    @property
    def past(self) -> dict[str, Region]:
        """Keys and values so far."""
        return dict(zip(self._names, self.sides[self.side], strict=True))

    def turn(self) -> None:
        """Make the tensors that the last pass wrote the past of the next one."""
        self.side = 1 - self.side

    @property
    def regions(self) -> list[Region]:
        """All regions, each once."""
        return list({region.pointer: region for side in self.sides for region in side}.values())


class _Graph(NamedTuple):
    """One graph as a sequence uses it.

    Attributes:
        name: name of the graph in its engine set.
        step: tensors of a decode step, without those of the cache.
        cache: its KV cache; None without attention.
    """

    name: str
    step: dict[str, Region]
    cache: _Cache | None = None


P = ParamSpec("P")
R = TypeVar("R")


def _alone(method: Callable[Concatenate[DeviceState, P], R]) -> Callable[Concatenate[DeviceState, P], R]:
    """Make a method exclusive: while it runs, no other sequence uses the device."""

    @functools.wraps(method)
    def locked(state: DeviceState, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with state._backend.lock:
            return method(state, *args, **kwargs)

    return locked


class DeviceState:
    """One sequence's rows and caches on a device; implements :class:`balcony_runtime.backends.base.State`."""

    def __init__(self, backend: DeviceBackend, batch_size: int, max_length: int) -> None:
        manifest, engines = backend.manifest, backend.engines
        self._backend, self._device, self._batch, self._length = backend, backend.device, batch_size, max_length
        self._layers = (0, *manifest.exit_layers)  # layer of each boundary
        self._width = manifest.model.hidden_size
        self.busy_ns = 0
        dtype = engines.graphs["embed"].outputs[0].dtype
        # Python does not free device memory. Return it when the state is collected or the backend closes, and also when
        # allocation fails half-way through `__init__`.
        regions: list[Region] = []
        weakref.finalize(self, backend.returned.extend, regions)

        def allocate(shape: tuple[int, ...], dtype: DType) -> Region:
            regions.append(backend.allocate(shape, dtype))
            return regions[-1]

        width, vocabulary = self._width, manifest.model.vocab_size
        # Each member's rows are contiguous, so with one member any range of rows is dense.
        self._rows = [allocate((batch_size, max_length, width), dtype) for _ in self._layers]
        # Regions of the decode step, whose program reads and writes the same ones every time.
        self._row = [allocate((batch_size, 1, width), dtype) for _ in self._layers]
        self._hidden = allocate((batch_size, 1, width), dtype)
        self._logits = allocate((batch_size, 1, vocabulary), "float32")
        self._best = allocate((batch_size, 1), "int64")
        self._ids = allocate((batch_size, 1), "int64")
        self._start = allocate((batch_size,), "int64")
        # Dense copies of rows for passes with several members (two regions), and the output of an exit for the head.
        self._scratch = [allocate((batch_size, min(MAX_ROWS, max_length), width), dtype) for _ in range(3)]
        self._asked: Region | None = None

        def cache(name: str) -> _Cache:
            return _Cache(engines, name, allocate, batch_size, backend.executor.in_place)

        self._embed = _Graph("embed", {"ids": self._ids, "hidden_0": self._row[0]})
        self._stages, self._exits = [], []
        for stage, layer in enumerate(manifest.exit_layers):
            name, source, target = f"stage_{stage}", self._row[stage], self._row[stage + 1]
            step = {f"hidden_{self._layers[stage]}": source, f"hidden_{layer}": target}
            self._stages.append(_Graph(name, step, cache(name)))
            name = manifest.exit_graph(layer)
            if layer in manifest.cached_exits:
                step = {"rows": target, "queries": target, "hidden": self._hidden}
                self._exits.append(_Graph(name, step, cache(name)))
            else:
                self._exits.append(_Graph(name, {"hidden": target, "normed": self._hidden}))
        head = {"hidden": self._hidden, "logits": self._logits, "argmax": self._best}
        self._head = _Graph("lm_head", head)
        self._programs: dict[tuple[int, ...], Callable[[], None]] = {}

    @property
    def memory_bytes(self) -> int:
        """Bytes of row buffers and KV caches at full length, since a device allocates them whole."""
        graphs = (*self._stages, *self._exits)
        cached = [region for graph in graphs if graph.cache is not None for region in graph.cache.regions]
        return sum(region.nbytes for region in (*self._rows, *self._scratch, *cached))

    @_alone
    def decode(self, exit_index: int, ids: IntArray, row: int) -> FloatArray:
        """Run one row through all graphs on the way to an exit."""
        self._step(exit_index, ids, row)
        logits: FloatArray = self._downloaded(self._logits)[:, 0]
        return logits

    @_alone
    def decode_best(self, exit_index: int, ids: IntArray, row: int) -> IntArray:
        """The same, but return only the most likely token of each member, (B,).

        Raises:
            InputError: the logit of such a token is NaN or infinite.
        """
        self._step(exit_index, ids, row)
        best: IntArray = self._downloaded(self._best)[:, 0]
        vocabulary = self._logits.shape[2]
        for member, token in enumerate(best.tolist()):
            if not np.isfinite(self._downloaded(self._logits.part(member * vocabulary + token, (1,)))[0]):
                raise not_finite()
        return best

    @_alone
    def embed(self, tokens: IntArray, start: int) -> None:
        """Write token embeddings to boundary 0."""
        for first in range(0, tokens.shape[1], MAX_ROWS):
            part = tokens[:, first : first + MAX_ROWS]
            rows = self._rows_of(0, start + first, start + first + part.shape[1], 0, fill=False)
            with self._for_a_pass(part.shape, "int64") as ids:
                self._device.upload(ids, part)
                self._run(self._embed, {"ids": ids, "hidden_0": rows})
            self._store(0, rows, start + first)

    @_alone
    def run_stage(self, stage: int, start: int, stop: int) -> None:
        """Run rows from boundary ``stage`` to boundary ``stage + 1``."""
        self._stand_at(start)
        source = self._rows_of(stage, start, stop, 0)
        target = self._rows_of(stage + 1, start, stop, 1, fill=False)
        names = [f"hidden_{layer}" for layer in self._layers[stage : stage + 2]]
        self._run(self._stages[stage], {names[0]: source, names[1]: target})
        self._store(stage + 1, target, start)

    @_alone
    def run_exit(self, exit_index: int, start: int, stop: int, num_queries: int) -> None:
        """Run the balcony or the norm of an exit over rows of its boundary."""
        boundary, count = exit_index + 1, max(num_queries, 1)
        graph = self._exits[exit_index]
        out = self._scratch[2].part(0, (self._batch, count, self._width))
        queries = self._rows_of(boundary, stop - count, stop, 0)
        if graph.cache is None:
            self._run(graph, {"hidden": queries, "normed": out})
        else:
            self._stand_at(start)
            rows = self._rows_of(boundary, start, stop, 1)
            self._run(graph, {"rows": rows, "queries": queries, "hidden": out})
        self._asked = out

    @_alone
    def wait(self) -> None:
        """Wait for all passes so far."""
        begin = time.perf_counter_ns()
        self._device.synchronize()
        self.busy_ns += time.perf_counter_ns() - begin

    @_alone
    def logits(self, num_queries: int) -> FloatArray:
        """Run the head over the result of :meth:`run_exit`."""
        assert self._asked is not None
        vocabulary = self._backend.manifest.model.vocab_size
        asked = (self._batch, num_queries)
        with self._for_a_pass((*asked, vocabulary), "float32") as logits, self._for_a_pass(asked, "int64") as best:
            self._run(self._head, {"hidden": self._asked, "logits": logits, "argmax": best})
            found: FloatArray = self._downloaded(logits)
        return found

    @_alone
    def parts(self, stage_rows: Sequence[int], balcony_rows: Sequence[int]) -> dict[str, Array]:
        """Copies of the rows at the boundaries after the stages, and of keys and values."""
        return {
            name: self._downloaded(region)[first] for name, region, first in self._reached(stage_rows, balcony_rows)
        }

    @_alone
    def fill(self, stage_rows: Sequence[int], balcony_rows: Sequence[int], parts: Mapping[str, Array]) -> None:
        """Copy what another state has made to the device."""
        for name, region, first in self._reached(stage_rows, balcony_rows):
            whole = np.zeros(region.shape, region.dtype)
            whole[first] = part_of(parts, name, whole[first].shape, whole.dtype)
            self._device.upload(region, whole)

    def _reached(
        self, stage_rows: Sequence[int], balcony_rows: Sequence[int]
    ) -> Iterator[tuple[str, Region, tuple[slice, ...]]]:
        """Name and region of everything that has been made, and the index of its first rows."""
        for stage, rows in enumerate(stage_rows):
            yield f"hidden_{self._layers[stage + 1]}", self._rows[stage + 1], np.s_[:, :rows]
        graphs = (*self._stages, *self._exits)
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
        path = (self._embed, *self._stages[: exit_index + 1], self._exits[exit_index], self._head)
        caches = [graph.cache for graph in path if graph.cache is not None]
        self._device.upload(self._ids, ids[:, None])
        self._stand_at(row)
        # A captured program is bound to one side of each cache.
        key = (exit_index, *(cache.side for cache in caches))
        begin = time.perf_counter_ns()
        if key not in self._programs:
            launches = [self._prepared(graph, graph.step) for graph in path]
            self._programs[key] = self._device.captured(launches)
        self._programs[key]()
        self.busy_ns += time.perf_counter_ns() - begin
        for cache in caches:
            cache.turn()
        for boundary in range(exit_index + 2):
            self._store(boundary, self._row[boundary], row)

    def _prepared(self, graph: _Graph, tensors: dict[str, Region]) -> Callable[[], None]:
        """A call that launches a graph over these tensors and those of its cache."""
        if graph.cache is not None:
            tensors = {**tensors, "start": self._start, **graph.cache.tensors()}
        return self._backend.executor.prepare(graph.name, tensors)

    def _run(self, graph: _Graph, tensors: dict[str, Region]) -> None:
        begin = time.perf_counter_ns()
        self._prepared(graph, tensors)()
        self.busy_ns += time.perf_counter_ns() - begin
        if graph.cache is not None:
            graph.cache.turn()

    def _stand_at(self, start: int) -> None:
        self._device.upload(self._start, np.full(self._batch, start, np.int64))

    def _rows_of(self, boundary: int, start: int, stop: int, scratch: int, *, fill: bool = True) -> Region:
        """Rows of a boundary as one dense tensor (B, T, D): in place for one member, otherwise in a scratch region."""
        shape = (self._batch, stop - start, self._width)
        if self._batch == 1:
            return self._rows[boundary].part(start * self._width, shape)
        region = self._scratch[scratch].part(0, shape)
        if fill:
            self._copy_rows(boundary, region, start, to_rows=False)
        return region

    def _store(self, boundary: int, rows: Region, start: int) -> None:
        """Copy rows of :meth:`_rows_of`, or the row of a step, to the buffer of their boundary."""
        if self._batch > 1 or rows is self._row[boundary]:
            self._copy_rows(boundary, rows, start, to_rows=True)

    def _copy_rows(self, boundary: int, dense: Region, start: int, *, to_rows: bool) -> None:
        item = ITEM_BYTES[dense.dtype] * self._width
        width, pitch = dense.shape[1] * item, self._length * item
        place = self._rows[boundary].pointer + start * item
        if to_rows:
            self._device.copy(place, pitch, dense.pointer, width, width, self._batch)
        else:
            self._device.copy(dense.pointer, width, place, pitch, width, self._batch)

    def _downloaded(self, region: Region) -> Any:
        begin = time.perf_counter_ns()
        array = self._device.download(region)  # waits for the device
        self.busy_ns += time.perf_counter_ns() - begin
        return array
