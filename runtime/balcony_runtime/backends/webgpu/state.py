"""One sequence on a WebGPU device: row buffers, KV caches and the passes over them.

Owns the values of a sequence. The graphs are those for CPUs (``manifest.cpu``), unchanged: ``GroupQueryAttention`` writes the
keys and values of new rows into the cache that it is given. The embedding of a token is looked up in main memory and is all
that a step takes to the device besides positions; the step brings back the logits, or the likeliest token. There are no
batches: a part of a buffer cannot be bound, so members could share no pass.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np

from balcony_edge.bundle.manifest import DType
from balcony_runtime.backends.base import Array, FloatArray, IntArray, RowsOnly, not_finite, part_of
from balcony_runtime.backends.webgpu.device import BoundPass, Value

if TYPE_CHECKING:
    from balcony_runtime.backends.webgpu.backend import WebGpuBackend

P = ParamSpec("P")
R = TypeVar("R")


class _Step(NamedTuple):
    """A decode step at one exit, bound.

    Attributes:
        placed: passes with an input ``last``, which changes with the row.
        first: pass of stage 0, which takes the embedding of the token.
        keep: pass that stores the rows of all boundaries on the way.
        inner: passes from stage 0 to the input of the head, in order, and ``keep``.
        logits, best: passes that end the step, by what they bring to main memory.
    """

    placed: list[BoundPass]
    first: BoundPass
    keep: BoundPass
    inner: list[BoundPass]
    logits: list[BoundPass]
    best: list[BoundPass]


def _exclusive(method: Callable[Concatenate[WebGpuState, P], R]) -> Callable[Concatenate[WebGpuState, P], R]:
    """Make a method exclusive: while it runs, no other sequence of any bundle uses WebGPU, and the device is not closed."""

    @functools.wraps(method)
    def locked(state: WebGpuState, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with state._device.lock:
            state._device.refuse_closed()
            return method(state, *args, **kwargs)

    return locked


class WebGpuState(RowsOnly):
    """One sequence's rows and caches on a WebGPU device; implements :class:`balcony_runtime.backends.base.State`."""

    def __init__(self, backend: WebGpuBackend, max_length: int) -> None:
        manifest, device = backend.manifest, backend.device
        memory = device.new_memory(self)
        self._backend, self._device, self._memory = backend, device, memory
        self._layers = (0, *manifest.exit_layers)  # layer of each boundary
        self._specs = manifest.runnable
        self._width = width = manifest.model.hidden_size
        vocabulary, count = manifest.model.vocab_size, len(manifest.exit_layers)
        self.busy_ns = 0
        # Boundary 0: embeddings are looked up when stage 0 takes the rows.
        self._ids = np.zeros(max_length, np.int64)

        def zeros(shape: tuple[int, ...], dtype: DType = device.dtype) -> Value:
            return device.zeros(memory, shape, dtype)

        # Rows at the boundaries after the stages, and the one row of a decode step there.
        self._rows = [zeros((1, max_length, width)) for _ in range(count)]
        self._row = [zeros((1, 1, width)) for _ in range(count)]
        self._hidden = zeros((1, 1, width))
        self._logits = zeros((1, 1, vocabulary), "float32")
        self._found = np.zeros((1, 1, vocabulary), np.float32)
        self._picked = np.zeros((1, 1, 2), np.float32)
        self._total = np.zeros((), np.int32)  # graphs read it in main memory, so it is bound once and written in place
        names = [f"stage_{stage}" for stage in range(count)]
        names += [manifest.exit_graph(layer) for layer in manifest.cached_exits]
        self._caches = {name: self._cache(name, zeros, max_length) for name in names}
        self._steps: dict[int, _Step] = {}
        self._asked: Value | None = None  # result of the last exit, the input of the head

    @property
    def memory_bytes(self) -> int:
        """Bytes of row buffers, caches and logits, which a device allocates whole."""
        cached = [value for cache in self._caches.values() for value in cache.values()]
        sizes = [math.prod(value.shape) for value in (*self._rows, *self._row, self._hidden, *cached)]
        return sum(sizes) * self._backend.dtype.itemsize + 2 * self._found.nbytes

    @_exclusive
    def decode(self, exit_index: int, ids: IntArray, row: int) -> FloatArray:
        """Run one row through all graphs on the way to an exit."""
        step = self._step(exit_index, ids.item(), row)
        self._run(*step.inner, *step.logits)
        logits: FloatArray = self._found[0]
        return logits

    @_exclusive
    def decode_best(self, exit_index: int, ids: IntArray, row: int) -> IntArray:
        """The same, but return only the likeliest token, (1,).

        Raises:
            InputError: a logit is NaN or infinite.
        """
        step = self._step(exit_index, ids.item(), row)
        self._run(*step.inner, *step.best)
        best, total = self._picked[0, 0].tolist()
        if not math.isfinite(total):
            raise not_finite()
        return np.array([int(best)])

    @_exclusive
    def embed(self, tokens: IntArray, start: int) -> None:
        """Write tokens (1, n) to boundary 0."""
        self._ids[start : start + tokens.shape[1]] = tokens[0]

    @_exclusive
    def run_stage(self, stage: int, start: int, stop: int) -> None:
        """Run rows of one boundary to the next."""
        layer, after = self._layers[stage : stage + 2]
        for first, last in self._passes(start, stop):
            with self._temporary():
                rows = {f"hidden_{layer}": self._rows_at(stage, first, last)}
                self._put(self._rows[stage], self._once(f"stage_{stage}", rows, last, f"hidden_{after}"), first)

    @_exclusive
    def run_exit(self, exit_index: int, start: int, stop: int, num_queries: int) -> None:
        """Run the balcony or the norm of an exit over rows of its boundary.

        A balcony's queries are all its rows here: its graph for keys alone has operators that WebGPU does not have.
        """
        name = self._backend.manifest.exit_graph(self._layers[exit_index + 1])
        port, output = self._ports(name)
        begin = stop - num_queries  # first row whose result is wanted
        self._memory.free([] if self._asked is None else [self._asked])
        self._asked = None
        if num_queries:
            self._asked = self._device.zeros(self._memory, (1, num_queries, self._width), self._device.dtype)
        for first, last in self._passes(start, stop) if name in self._caches else [(begin, stop)]:
            with self._temporary():
                made = self._once(name, {port: self._rows_at(exit_index + 1, first, last)}, last, output)
                if self._asked is not None and last > begin:
                    if first < begin:
                        made = self._take(made, np.arange(begin - first, last - first)).made(self._memory)
                    self._put(self._asked, made, max(first, begin) - begin)

    @_exclusive
    def logits(self, num_queries: int) -> FloatArray:
        """Run the head over the result of :meth:`run_exit`."""
        assert self._asked is not None
        found = np.empty((1, self._asked.shape[1], self._found.shape[2]), np.float32)
        with self._temporary():
            head = self._device.new_pass(self._memory, "lm_head")
            head.give("hidden", self._asked)
            head.take("logits", found)
            self._run(head)
        return found

    @_exclusive
    def parts(self, stage_rows: Sequence[int], balcony_rows: Sequence[int]) -> dict[str, Array]:
        """Copies of the rows at the boundaries after the stages, and of keys and values."""
        found = {}
        for name, value, first in self._reached(stage_rows, balcony_rows):
            whole = np.empty(value.shape, self._backend.dtype)
            with self._temporary():
                self._take(value, np.arange(value.shape[1]), whole)
            found[name] = whole[first].copy()
        return found

    @_exclusive
    def fill(self, stage_rows: Sequence[int], balcony_rows: Sequence[int], parts: Mapping[str, Array]) -> None:
        """Copy what another state has made to the device."""
        for name, value, first in self._reached(stage_rows, balcony_rows):
            whole = np.zeros(value.shape, self._backend.dtype)
            whole[first] = part_of(parts, name, whole[first].shape, whole.dtype)
            with self._temporary():
                self._put(value, whole, 0)

    def _reached(
        self, stage_rows: Sequence[int], balcony_rows: Sequence[int]
    ) -> Iterator[tuple[str, Value, tuple[slice, ...]]]:
        """Name and value of everything that has been made, and the index of its first rows."""
        layers = self._layers[1:]
        for layer, value, rows in zip(layers, self._rows, stage_rows, strict=True):
            yield f"hidden_{layer}", value, np.s_[:, :rows]
        names = [f"stage_{stage}" for stage in range(len(layers))]
        names += [self._backend.manifest.exit_graph(layer) for layer in layers]
        for name, rows in zip(names, (*stage_rows, *balcony_rows), strict=False):
            for past, value in self._caches.get(name, {}).items() if rows else ():
                yield f"{name}.{past}", value, np.s_[:, :, :rows]

    @_exclusive
    def wait(self) -> None:
        """Wait for all passes so far, by reading a row in a pass after them."""
        with self._temporary():
            self._take(self._row[0], np.zeros(1, np.int64), np.empty(self._row[0].shape, self._backend.dtype))

    def _cache(self, name: str, zeros: Callable[..., Value], max_length: int) -> dict[str, Value]:
        """A graph's KV tensors (1, H, S, d) by the name of their input."""
        pasts = [tensor for tensor in self._specs[name].inputs if tensor.name.startswith("past_")]
        return {past.name: zeros((1, past.shape[1], max_length, past.shape[3]), past.dtype) for past in pasts}

    def _ports(self, name: str) -> tuple[str, str]:
        """Input and output of an exit's graph."""
        return ("rows", "hidden") if name in self._caches else ("hidden", "normed")

    def _step(self, exit_index: int, token: int, row: int) -> _Step:
        """The decode step at an exit, set to a token and a row."""
        step = self._steps.get(exit_index)
        if step is None:
            step = self._steps[exit_index] = self._bound_step(exit_index)
        self._ids[row] = token
        self._total[()] = row + 1
        begin, last = time.perf_counter_ns(), np.array([row], np.int32)
        step.first.give("hidden_0", self._backend.table.row(token)[None, None])
        for one in step.placed:
            one.give("last", last)
        step.keep.give("at", np.array([[[0, row]]], np.int64))
        self.busy_ns += time.perf_counter_ns() - begin
        return step

    def _bound_step(self, exit_index: int) -> _Step:
        placed: list[BoundPass] = []
        inner: list[BoundPass] = []
        layers, manifest = self._layers, self._backend.manifest
        for stage in range(exit_index + 1):
            one = self._bound(f"stage_{stage}", placed)
            if stage:
                one.give(f"hidden_{layers[stage]}", self._row[stage - 1])
            one.take(f"hidden_{layers[stage + 1]}", self._row[stage])
            inner.append(one)
        exit_layer = layers[exit_index + 1]
        name = manifest.exit_graph(exit_layer)
        if name in manifest.path_graphs(exit_layer):
            port, output = self._ports(name)
            inner.append(self._bound(name, placed))
            inner[-1].give(port, self._row[exit_index])
            inner[-1].take(output, self._hidden)
        else:  # the last stage includes the norm
            inner[-1].take("normed", self._hidden)
        keep = self._device.new_pass(self._memory, f"put_{exit_index + 1}")
        for index, (row, rows) in enumerate(zip(self._row[: exit_index + 1], self._rows, strict=False)):
            keep.give(f"new_{index}", row)
            keep.give(f"rows_{index}", rows)
            keep.take(f"kept_{index}", rows)
        heads = [self._device.new_pass(self._memory, "lm_head") for _ in range(2)]
        for head in heads:
            head.give("hidden", self._hidden)
        heads[0].take("logits", self._found)
        heads[1].take("logits", self._logits)
        pick = self._device.new_pass(self._memory, "pick")
        pick.give("logits", self._logits)
        pick.take("picked", self._picked)
        return _Step(placed, inner[0], keep, [*inner, keep], [heads[0]], [heads[1], pick])

    def _bound(self, name: str, placed: list[BoundPass]) -> BoundPass:
        """A pass of a graph with its cache bound; it joins ``placed`` if it has an input for the position of its last row."""
        one = self._device.new_pass(self._memory, name)
        for past, value in self._caches.get(name, {}).items():
            one.give(past, value)
            one.take(past.replace("past_", "present_", 1), value)
        if any(tensor.name == "last" for tensor in self._specs[name].inputs):
            one.give("total", self._total)
            placed.append(one)
        return one

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[None]:
        """Free the values and passes that are made inside, also after an error or an interrupt."""
        values, passes = set(self._memory.values), set(self._memory.passes)
        try:
            yield
        finally:
            self._memory.free(self._memory.values - values, self._memory.passes - passes)

    def _passes(self, start: int, stop: int) -> list[tuple[int, int]]:
        """First row and end of each pass over a range of rows."""
        most = self._backend.most_rows or stop - start
        return [(first, min(first + most, stop)) for first in range(start, stop, most)]

    def _put(self, kept: Value, made: Value | Array, start: int) -> None:
        """Write rows (1, T, D) to a buffer, from a row on."""
        at = np.zeros((1, made.shape[1], 2), np.int64)
        at[0, :, 1] = np.arange(start, start + made.shape[1])
        put = self._device.new_pass(self._memory, "put_1")
        put.give("at", at)
        put.give("new_0", made)
        put.give("rows_0", kept)
        put.take("kept_0", kept)
        self._run(put)

    def _once(self, name: str, inputs: dict[str, Value | Array], stop: int, output: str) -> Value:
        """Run a graph over rows up to ``stop`` and return an output in new device memory."""
        self._total[()] = stop
        placed: list[BoundPass] = []
        one = self._bound(name, placed)
        for where in placed:
            where.give("last", np.array([stop - 1], np.int32))
        for port, value in inputs.items():
            one.give(port, value)
        one.take(output, None)
        self._run(one)
        return one.made(self._memory)

    def _rows_at(self, boundary: int, start: int, stop: int) -> Value | Array:
        """Rows of a boundary, (1, T, D): embeddings in main memory, or a copy on the device."""
        if boundary == 0:
            return self._backend.table[self._ids[None, start:stop]]
        return self._take(self._rows[boundary - 1], np.arange(start, stop)).made(self._memory)

    def _take(self, rows: Value, at: IntArray, into: Array | None = None) -> BoundPass:
        """Copy the rows at some places to main memory, or to new memory of the device."""
        one = self._device.new_pass(self._memory, "take")
        one.give("rows", rows)
        one.give("at", at)
        one.take("taken", into)
        self._run(one)
        return one

    def _run(self, *passes: BoundPass) -> None:
        begin = time.perf_counter_ns()
        for one in passes:
            one.run()
        self.busy_ns += time.perf_counter_ns() - begin
