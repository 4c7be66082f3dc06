"""Main memory of sequences for ONNX Runtime: row buffers and KV caches, as arrays and as values for bindings.

Owns the arrays. Standard ``Attention`` computes over the whole key length that is bound, so its caches are bound as prefixes of
bucketed length. The lowered set's ``GroupQueryAttention`` reads only live rows, so its caches are bound once, at full length;
only these can be shared out to the members of a pool. Which rows go through which graph is decided in
:mod:`balcony_runtime.token_sequence`.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from balcony_edge.bundle.manifest import GraphSpec, Manifest
from balcony_runtime.backends.onnxruntime.host_memory import touched_bytes, zeros
from balcony_runtime.backends.onnxruntime.recurrent import RecurrentStates, copies_for, state_tensors

#: Step of the bound KV capacity, in rows: ``Attention`` computes over at most this many rows more than the live ones.
BUCKET = 128


class _Held(NamedTuple):
    """Storage of a cache: capacity in rows, the arrays, and the same arrays as values for bindings."""

    capacity: int
    arrays: list[npt.NDArray[Any]]
    values: list[Any]


class Cache:
    """Tensors with a row per position of one graph, or of a balcony's two graphs: keys and values, inputs of convolutions.

    Rows lie along the axis ``capacity``: (B, S, F), or (B, H, S, d) for the keys and values of the lowered set. It is bound
    whole and once; pages that no row has reached take no memory.
    """

    def __init__(self, graph: GraphSpec, batch_size: int, max_length: int) -> None:
        pasts = [tensor for tensor in graph.inputs if tensor.name.startswith("past_") and "capacity" in tensor.shape]
        self.names = [tensor.name for tensor in pasts]
        self.dtypes = [tensor.dtype for tensor in pasts]
        self.batch_size = batch_size
        #: Axis of each tensor along which rows lie, and its shape without batch and rows.
        self.axes = [tensor.shape.index("capacity") for tensor in pasts]
        self.sizes = [[dim for dim in tensor.shape if isinstance(dim, int)] for tensor in pasts]
        self.max_capacity = bucketed(max_length)
        self.rows = 0  # number of rows written so far
        self._allocate()

    def _allocate(self) -> None:
        self._hold(self.max_capacity, self._empty(self.max_capacity))

    def _hold(self, capacity: int, arrays: list[npt.NDArray[Any]]) -> None:
        self.held = _Held(capacity, arrays, [value_of(array) for array in arrays])
        self._touched = -1, 0  # number of rows, and their bytes

    def grow(self, rows: int) -> None:
        """Make room for ``rows`` rows, more than the present capacity; earlier bindings must be made again.

        ``held`` is replaced as a whole and last, so after an interrupt it is still the old one.
        """
        raise NotImplementedError  # one that is bound whole has room for all

    def first(self, rows: int) -> dict[str, npt.NDArray[Any]]:
        """Input → its first rows, a view."""
        indices = [(*(slice(None),) * axis, slice(rows)) for axis in self.axes]
        tensors = zip(self.names, self.held.arrays, indices, strict=True)
        return {name: array[index] for name, array, index in tensors}

    def touched_bytes(self) -> int:
        """Bytes of memory that the rows so far take; before the first there may be no arrays."""
        rows, (known, touched) = self.rows, self._touched  # once: another thread may run a pass
        if rows != known:  # each reply asks at its end, of all ended sequences
            arrays = zip(self.held.arrays, self.axes, strict=False)
            touched = sum(touched_bytes(array, axis, rows) for array, axis in arrays)
            self._touched = rows, touched
        return touched

    def _empty(self, capacity: int) -> list[npt.NDArray[Any]]:
        shapes = [
            (self.batch_size, *sizes[: axis - 1], capacity, *sizes[axis - 1 :])
            for axis, sizes in zip(self.axes, self.sizes, strict=True)
        ]
        return zeros(*zip(shapes, self.dtypes, strict=True))

    def bind(self, binding: Any, members: slice | None = None) -> None:
        """Bind the tensors of all members of a batch, or of some."""
        values = self.held.values
        if members is not None:
            values = [value_of(array[members]) for array in self.held.arrays]
        for name, value in zip(self.names, values, strict=True):
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_", "present_", 1), value)

    def member(self, index: int) -> Cache:
        """The part of one member, over the same memory."""
        one = copy.copy(self)
        one.batch_size = 1
        one._hold(self.max_capacity, [array[index : index + 1] for array in self.held.arrays])
        return one

    def largest(self, turned: int) -> dict[str, npt.NDArray[np.float32]]:
        """Keys and values that have an axis of heads → largest absolute value of each channel at any position.

        The rotary embedding turns pairs of a key's first ``turned`` channels, the slow ones over far more rows than are there:
        what is in one channel here is in the other one at later positions. The length of a pair stays, so that is what counts.
        """
        found = {}
        for name, array, axis in zip(self.names, self.held.arrays, self.axes, strict=True):
            if axis != 2:  # (B, H, S, d)
                continue
            sizes = np.abs(array[:, :, : self.rows]).astype(np.float32)
            if "past_key" in name:
                first, second = sizes[..., : turned // 2], sizes[..., turned // 2 : turned]
                first[:] = second[:] = np.hypot(first, second)
            found[name] = sizes.max(axis=(0, 2))
        return found


class _PrefixCache(Cache):
    """Cache (B, S, F). With one member, growing binds a longer prefix and moves nothing; a larger batch is copied."""

    def _allocate(self) -> None:
        self._whole = self._empty(self.max_capacity) if self.batch_size == 1 else []
        self._hold(0, [])

    def grow(self, rows: int) -> None:
        capacity, old = min(bucketed(rows), self.max_capacity), self.held
        arrays = [whole[:, :capacity] for whole in self._whole]
        if not arrays:
            arrays = self._empty(capacity)
            for new, array in zip(arrays, old.arrays, strict=False):  # at first there are no old arrays
                new[:, : old.capacity] = array
            self.rows = max(self.rows, old.capacity)
        self._hold(capacity, arrays)


def bucketed(rows: int) -> int:
    """The next whole number of buckets."""
    return -(-rows // BUCKET) * BUCKET


class Memory(NamedTuple):
    """Rows and caches of the members of a batch or of a pool.

    Attributes:
        rows: rows at every boundary, (boundaries, B, S, D).
        row: the one row of a bound pass, at every boundary, (boundaries, B, 1, D).
        hidden: input of the head in a bound pass, (B, 1, D).
        caches: graph → its KV cache.
        states: graph → what its recurrent layers keep; only graphs that have such layers.
    """

    rows: npt.NDArray[Any]
    row: npt.NDArray[Any]
    hidden: npt.NDArray[Any]
    caches: dict[str, Cache]
    states: dict[str, RecurrentStates]

    @classmethod
    def allocate(cls, manifest: Manifest, dtype: npt.DTypeLike, batch_size: int, max_length: int) -> Self:
        """Memory for a bundle's graphs, whose pages are taken when rows are written.

        Raises:
            MemoryError: the address space has no room for it.
        """
        boundaries, dim = len(manifest.exit_layers) + 1, manifest.model.hidden_size
        make = Cache if manifest.cpu else _PrefixCache
        names = [f"stage_{stage}" for stage in range(boundaries - 1)]
        names += [manifest.exit_graph(layer) for layer in manifest.cached_exits]
        specs = {name: manifest.runnable[name] for name in names}
        copies = copies_for(specs.values(), batch_size)
        return cls(
            zeros(((boundaries, batch_size, bucketed(max_length), dim), dtype))[0],
            np.zeros((boundaries, batch_size, 1, dim), dtype),
            np.zeros((batch_size, 1, dim), dtype),
            {name: make(spec, batch_size, max_length) for name, spec in specs.items()},
            {name: RecurrentStates(spec, batch_size, copies) for name, spec in specs.items() if state_tensors(spec)},
        )

    def member(self, index: int) -> Memory:
        """The part of one member, over the same memory; recurrent states cannot be shared out."""
        one = slice(index, index + 1)
        caches = {name: cache.member(index) for name, cache in self.caches.items()}
        return Memory(self.rows[:, one], self.row[:, one], self.hidden[one], caches, {})


def value_of(array: npt.NDArray[Any]) -> Any:
    """The array as a value of ONNX Runtime, without a copy."""
    return ort.OrtValue.ortvalue_from_numpy(array)
