"""One sequence's memory on an accelerator, and the graphs of an engine set over it.

Owns the regions (row buffers, KV caches, small inputs of a pass) and the decode step as one captured program per exit: token
table, stages, balcony, head and the choice of the most likely token run without Python or the host in between. Each graph is
captured once, when the memory is made, so that no reply waits for it; the programs of the exits share these captures. I/O
tables: those of the set ``graphs`` in :mod:`balcony_edge.bundle.manifest`, but with caches (B, H, S, d) of fixed S, a graph
``embed`` (``ids`` int64 (B, T) → ``hidden_0``), and a second output ``argmax`` int64 (B, Q) of ``lm_head``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from balcony_edge.bundle.manifest import DType, EngineSet, Manifest
from balcony_edge.errors import DeviceError
from balcony_runtime.backends.accelerator.device import Launch, Region

if TYPE_CHECKING:
    from balcony_runtime.backends.accelerator.state import DeviceBackend


#: Most rows of one pass: the end of the largest optimization profile.
MAX_ROWS = 512


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

    def regions(self) -> list[Region]:
        """All regions, each once."""
        return list({region.pointer: region for side in self.sides for region in side}.values())


class Graph(NamedTuple):
    """One graph as a sequence uses it.

    Attributes:
        name: name of the graph in its engine set.
        step: tensors of a decode step, without those of the cache.
        cache: its KV cache; None without attention.
    """

    name: str
    step: dict[str, Region]
    cache: _Cache | None = None

    @property
    def side(self) -> int:
        """Side of the cache that the next pass reads."""
        return 0 if self.cache is None else self.cache.side


class Workspace:
    """Memory of one sequence at full length, and its decode step. Later sequences use it again.

    Raises:
        DeviceError: there is not enough memory.
    """

    def __init__(self, backend: DeviceBackend, batch_size: int) -> None:
        manifest, engines = backend.manifest, backend.engines
        self._backend, self._device, self.batch_size = backend, backend.device, batch_size
        self.length = engines.context_length
        width, vocabulary = manifest.model.hidden_size, manifest.model.vocab_size
        dtype = engines.graphs["embed"].outputs[0].dtype
        self._regions: list[Region] = []
        try:
            # Each member's rows are contiguous, so with one member any range of rows is dense: see _rows_of.
            self.rows = [self._allocate((batch_size, self.length, width), dtype) for _ in (0, *manifest.exit_layers)]
            # Regions of the decode step, whose program reads and writes the same ones every time.
            self.row = [self._allocate((batch_size, 1, width), dtype) for _ in self.rows]
            self.hidden = self._allocate((batch_size, 1, width), dtype)
            self.logits = self._allocate((batch_size, 1, vocabulary), "float32")
            self.best = self._allocate((batch_size, 1), "int64")
            self.ids = self._allocate((batch_size, 1), "int64")
            self.start = self._allocate((batch_size,), "int64")
            # Dense copies of rows that are not used in place (two regions), and the output of an exit for the head.
            many = (batch_size, min(MAX_ROWS, self.length), width)
            self.scratch = [self._allocate(many, dtype) for _ in range(3)]
            self._make_graphs(manifest)
            self._capture()
        except BaseException:
            with contextlib.suppress(DeviceError):  # the first error is the one to show
                self.free()
            raise

    def _allocate(self, shape: tuple[int, ...], dtype: DType) -> Region:
        self._regions.append(self._backend.allocate(shape, dtype))
        return self._regions[-1]

    def _make_graphs(self, manifest: Manifest) -> None:
        in_place = self._backend.executor.in_place

        def cache(name: str) -> _Cache:
            return _Cache(self._backend.engines, name, self._allocate, self.batch_size, in_place)

        self.embed = Graph("embed", {"ids": self.ids, "hidden_0": self.row[0]})
        self.stages, self.exits = [], []
        before = 0
        for stage, layer in enumerate(manifest.exit_layers):
            name, source, target = f"stage_{stage}", self.row[stage], self.row[stage + 1]
            self.stages.append(Graph(name, {f"hidden_{before}": source, f"hidden_{layer}": target}, cache(name)))
            name, before = manifest.exit_graph(layer), layer
            if layer in manifest.cached_exits:
                step = {"rows": target, "queries": target, "hidden": self.hidden}
                self.exits.append(Graph(name, step, cache(name)))
            else:
                self.exits.append(Graph(name, {"hidden": target, "normed": self.hidden}))
        self.head = Graph("lm_head", {"hidden": self.hidden, "logits": self.logits, "argmax": self.best})
        self.caches = [graph.cache for graph in (*self.stages, *self.exits) if graph.cache is not None]

    def _capture(self) -> None:
        """Capture every graph of the decode step over a row that no sequence has; the first pass overwrites it."""
        in_place, captured = self._backend.executor.in_place, {}
        for graph in (self.embed, *self.stages, *self.exits, self.head):
            for _ in range(1 if in_place or graph.cache is None else 2):
                captured[graph.name, graph.side] = self._device.captured(
                    self.prepared(graph, graph.step, to_capture=True)
                )
                if graph.cache is not None:
                    graph.cache.turn()
        # A graph is bound to one side of its cache. With sides that take turns there is no fixed program for an exit.
        self._programs = [
            self._device.joined([captured[graph.name, 0] for graph in self.path(e)])
            for e in range(len(self.exits))
            if in_place
        ]
        self._singles = {key: self._device.joined([launch]) for key, launch in captured.items() if not in_place}

    def path(self, exit_index: int) -> list[Graph]:
        """The graphs of a decode step at an exit."""
        return [self.embed, *self.stages[: exit_index + 1], self.exits[exit_index], self.head]

    def step(self, exit_index: int) -> None:
        """Run the decode step of an exit over the regions of the step."""
        path = self.path(exit_index)
        if self._programs:
            self._programs[exit_index]()
        else:
            for graph in path:
                self._singles[graph.name, graph.side]()
        for graph in path:
            if graph.cache is not None:
                graph.cache.turn()

    def prepared(self, graph: Graph, tensors: dict[str, Region], *, to_capture: bool = False) -> Launch:
        """A launch of a graph over these tensors and those of its cache."""
        if graph.cache is not None:
            tensors = {**tensors, "start": self.start, **graph.cache.tensors()}
        return self._backend.executor.prepare(graph.name, tensors, to_capture=to_capture)

    @property
    def memory_bytes(self) -> int:
        """Bytes of row buffers and KV caches."""
        cached = [region for cache in self.caches for region in cache.regions()]
        return sum(region.nbytes for region in (*self.rows, *self.scratch, *cached))

    def clear(self) -> None:
        """Set the caches to zeros: NaN in a row that attention ignores would still reach its result (0 × NaN)."""
        for cache in self.caches:
            for region in cache.regions():
                self._device.clear(region)

    def forget_programs(self) -> None:
        """Give the decode step back; the workspace must not be used any more."""
        self._programs, self._singles = [], {}

    def free(self) -> None:
        """Free the memory; the workspace must not be used any more."""
        self._device.synchronize()  # its contexts go with the programs, and work of theirs may still run
        self.forget_programs()
        while self._regions:
            self._device.free(self._regions.pop())
