"""Memory on an accelerator, of a sequence or a pool's member, and the graphs of an engine set over it.

Owns the regions (row buffers, KV caches, small inputs of a pass) and a sequence's decode step as one captured program per
exit: token table, stages, balcony, head and the choice of the most likely token run without Python or the host in between.
Each graph is captured when the memory is made, and not in a decode step; the programs of the exits share these captures.
Where the caches have two sides that take turns, it is captured for each side, and every graph is launched for itself.
I/O tables: those of the set ``graphs`` in :mod:`balcony_edge.bundle.manifest`, but with caches (B, H, S, d) of fixed
S, a graph ``embed`` (``ids`` int64 (B, T) → ``hidden_0``), and a second output ``argmax`` int64 (B, Q) of ``lm_head``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, Self

from balcony_edge.bundle.manifest import DType, Manifest
from balcony_edge.errors import DeviceError
from balcony_runtime.backends.accelerator.device import ALIGNMENT, ITEM_BYTES, Launch, Region

if TYPE_CHECKING:
    from balcony_runtime.backends.accelerator.backend import DeviceBackend


#: Most rows of one pass: the end of the largest optimization profile.
MAX_ROWS = 512


class CacheRegions:
    """KV tensors of one graph.

    Args:
        names: names of the inputs.
        sides: one region for each input, once if the graph writes in place, otherwise twice: these take turns.
    """

    def __init__(self, names: list[str], sides: list[list[Region]]) -> None:
        self._names, self._sides = names, sides
        self.side = 0

    def of(self, first: int, count: int) -> CacheRegions:
        """The same memory for some neighbouring members."""
        parts = [[members_of(region, first, count) for region in side] for side in self._sides]
        return CacheRegions(self._names, parts)

    def tensors(self) -> dict[str, Region]:
        """Past and present tensors of the next pass."""
        names = [name.replace("past_", "present_", 1) for name in self._names]
        return self.past | dict(zip(names, self._sides[self.side - 1], strict=True))

    @property
    def past(self) -> dict[str, Region]:
        """Keys and values so far."""
        return dict(zip(self._names, self._sides[self.side], strict=True))

    def turn(self) -> None:
        """Make the tensors that the last pass wrote the past of the next one."""
        self.side = (self.side + 1) % len(self._sides)

    def regions(self) -> list[Region]:
        """All regions."""
        return [region for side in self._sides for region in side]


def members_of(region: Region, first: int, count: int) -> Region:
    """The part of some neighbouring members, of a region whose first axis is that of the members."""
    return region.part(first * math.prod(region.shape[1:]), (count, *region.shape[1:]))


class StepRegions(NamedTuple):
    """Regions of a decode step of B members, whose program reads and writes the same ones every time.

    Attributes:
        rows: the row at every boundary, (B, 1, D) each, at one distance from the next.
        hidden: input of the head, (B, 1, D).
        logits, best: logits (B, 1, V) and the likeliest token (B, 1).
        ids: tokens, (B, 1).
        start: number of the row, (B,).
    """

    rows: tuple[Region, ...]
    hidden: Region
    logits: Region
    best: Region
    ids: Region
    start: Region


class Graph(NamedTuple):
    """One graph as a sequence uses it.

    Attributes:
        name: name of the graph in its engine set.
        step: tensors of a decode step, without those of the cache.
        cache: its KV cache; None without attention.
    """

    name: str
    step: dict[str, Region]
    cache: CacheRegions | None = None

    @property
    def side(self) -> int:
        """Side of the cache that the next pass reads."""
        return 0 if self.cache is None else self.cache.side


class Graphs(NamedTuple):
    """The graphs of an engine set over the regions of a decode step."""

    embed: Graph
    stages: list[Graph]
    exits: list[Graph]
    head: Graph

    @classmethod
    def over(cls, manifest: Manifest, step: StepRegions, caches: Mapping[str, CacheRegions]) -> Self:
        """The graphs over a step's regions and these caches."""
        stages, exits, before = [], [], 0
        for stage, layer in enumerate(manifest.exit_layers):
            name, source, target = f"stage_{stage}", step.rows[stage], step.rows[stage + 1]
            stages.append(Graph(name, {f"hidden_{before}": source, f"hidden_{layer}": target}, caches[name]))
            name, before = manifest.exit_graph(layer), layer
            if layer in manifest.cached_exits:
                tensors = {"rows": target, "queries": target, "hidden": step.hidden}
                exits.append(Graph(name, tensors, caches[name]))
            else:
                exits.append(Graph(name, {"hidden": target, "normed": step.hidden}))
        embed = Graph("embed", {"ids": step.ids, "hidden_0": step.rows[0]})
        head = Graph("lm_head", {"hidden": step.hidden, "logits": step.logits, "argmax": step.best})
        return cls(embed, stages, exits, head)

    @property
    def all(self) -> list[Graph]:
        """Every graph once."""
        return [self.embed, *self.stages, *self.exits, self.head]

    @property
    def caches(self) -> list[CacheRegions]:
        """All caches."""
        return [graph.cache for graph in self.all if graph.cache is not None]

    def path(self, exit_index: int) -> list[Graph]:
        """The graphs of a decode step at an exit."""
        return [self.embed, *self.stages[: exit_index + 1], self.exits[exit_index], self.head]


class Regions:
    """Regions that are freed together; the device's programs over them go first."""

    def __init__(self, backend: DeviceBackend) -> None:
        self._backend, self._device = backend, backend.device
        self._regions: list[Region] = []
        backend.memories.add(self)

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Region:
        """A region of zeros; see :meth:`.backend.DeviceBackend.allocate`."""
        self._regions.append(self._backend.allocate(shape, dtype))
        return self._regions[-1]

    def new_row(self, batch_size: int) -> Region:
        """One row of each member, (B, 1, D)."""
        return self.allocate((batch_size, 1, self._backend.manifest.model.hidden_size), self._backend.row_dtype)

    def new_step(self, batch_size: int) -> StepRegions:
        """Regions of a decode step."""
        model, dtype = self._backend.manifest.model, self._backend.row_dtype
        boundaries, shape = 1 + len(self._backend.manifest.exit_layers), (batch_size, 1, model.hidden_size)
        size = ITEM_BYTES[dtype]
        distance = -(-math.prod(shape) * size // ALIGNMENT) * ALIGNMENT // size
        rows = self.allocate((boundaries, distance), dtype)
        return StepRegions(
            tuple(rows.part(boundary * distance, shape) for boundary in range(boundaries)),
            hidden=self.new_row(batch_size),
            logits=self.allocate((batch_size, 1, model.vocab_size), "float32"),
            best=self.allocate((batch_size, 1), "int64"),
            ids=self.allocate((batch_size, 1), "int64"),
            start=self.allocate((batch_size,), "int64"),
        )

    def new_scratch(self, batch_size: int) -> list[Region]:
        """Dense copies of rows that are not used in place: what a pass reads, and what it writes."""
        return [self.new_rows(batch_size) for _ in range(2)]

    def new_rows(self, batch_size: int) -> Region:
        """As many rows as a pass has at most."""
        rows = min(MAX_ROWS, self._backend.engines.context_length)
        return self.allocate((batch_size, rows, self._backend.manifest.model.hidden_size), self._backend.row_dtype)

    def new_caches(self, batch_size: int) -> dict[str, CacheRegions]:
        """Graph → its KV cache at full length."""
        made, sides = {}, 1 if self._backend.executor.in_place else 2
        for name, graph in self._backend.engines.graphs.items():
            pasts = [tensor for tensor in graph.inputs if tensor.name.startswith("past_")]
            shapes = [(batch_size, *(dim for dim in tensor.shape if isinstance(dim, int))) for tensor in pasts]
            if pasts and name != "backbone":
                made[name] = CacheRegions(
                    [tensor.name for tensor in pasts],
                    [[self.allocate(s, t.dtype) for s, t in zip(shapes, pasts, strict=True)] for _ in range(sides)],
                )
        return made

    @contextlib.contextmanager
    def freed_after_an_error(self) -> Iterator[None]:
        """A context that frees everything if it ends with an error."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(DeviceError):  # the first error is the one to show
                self.free()
            raise

    def forget_programs(self) -> None:
        """Give programs back; the memory must not be used any more."""

    def free(self) -> None:
        """Free the memory; it must not be used any more."""
        self._device.synchronize()  # its contexts go with the programs, and work of theirs may still run
        self.forget_programs()
        while self._regions:
            self._device.free(self._regions.pop())


class Shared(NamedTuple):
    """What a member of a pool has that is not its own. Nothing of it lasts from one call of the member to the next.

    Attributes:
        caches: the member's part of the pool's caches, (1, H, S, d).
        step, scratch: regions that one member uses at a time.
        captured: graph without a cache → its launch over the step, captured for the first member.
    """

    caches: dict[str, CacheRegions]
    step: StepRegions
    scratch: list[Region]
    captured: dict[str, Launch]


class Workspace(Regions):
    """Memory of one sequence at full length, and its decode step. Later sequences use it again.

    Args:
        backend: backend of the engines.
        batch_size: number of members.
        shared: memory of a pool that it uses.

    Raises:
        DeviceError: there is not enough memory.
    """

    def __init__(self, backend: DeviceBackend, batch_size: int, shared: Shared | None = None) -> None:
        super().__init__(backend)
        manifest, self.batch_size = backend.manifest, batch_size
        self.length, boundaries = backend.engines.context_length, 1 + len(manifest.exit_layers)
        self._programs: list[Callable[[], None]] = []
        self._singles: dict[tuple[str, int], Callable[[], None]] = {}
        with self.freed_after_an_error():
            # Each member's rows are contiguous, so with one member any range of rows is dense: see _rows_of.
            shape = (batch_size, self.length, manifest.model.hidden_size)
            rows = self.allocate((boundaries, *shape), backend.row_dtype)
            self.rows = [rows.part(boundary * math.prod(shape), shape) for boundary in range(boundaries)]
            self.step = shared.step if shared else self.new_step(batch_size)
            self.scratch = shared.scratch if shared else self.new_scratch(batch_size)
            #: Output of an exit for the head.
            self.result = self.new_rows(batch_size)
            caches = shared.caches if shared else self.new_caches(batch_size)
            self.graphs = Graphs.over(manifest, self.step, caches)
            self._capture(shared.captured if shared else {})

    def _capture(self, same: dict[str, Launch]) -> None:
        """Capture every graph of the decode step over a row that no sequence has; the first pass overwrites it."""
        in_place, graphs = self._backend.executor.in_place, self.graphs
        captured: dict[tuple[str, int], Launch] = {}
        for graph in graphs.all:
            for _ in range(1 if in_place or graph.cache is None else 2):
                launch = same.get(graph.name)
                if launch is None:
                    launch = self._device.captured(self.prepared(graph, graph.step, to_capture=True))
                captured[graph.name, graph.side] = launch
                if graph.cache is None:
                    same[graph.name] = launch
                else:
                    graph.cache.turn()
        # A graph is bound to one side of its cache. With sides that take turns there is no fixed program for an exit.
        self._programs = [
            self._device.joined([captured[graph.name, 0] for graph in graphs.path(e)])
            for e in range(len(graphs.exits))
            if in_place
        ]
        self._singles = {key: self._device.joined([launch]) for key, launch in captured.items() if not in_place}

    def run_step(self, exit_index: int) -> None:
        """Run the decode step of an exit over the regions of the step."""
        path = self.graphs.path(exit_index)
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
            tensors = {**tensors, "start": self.step.start, **graph.cache.tensors()}
        return self._backend.executor.prepare(graph.name, tensors, to_capture=to_capture)

    def keep(self, step: StepRegions, member: int, row: int, boundaries: slice) -> None:
        """Store a member's rows of a step at boundaries of this sequence, which has one member."""
        made, kept = self._ends(step, member, row, boundaries.start)
        distances = step.rows[1].pointer - step.rows[0].pointer, self.rows[0].nbytes
        count = boundaries.stop - boundaries.start
        self._device.copy(kept.pointer, distances[1], made.pointer, distances[0], made.nbytes, count)

    def place(self, step: StepRegions, member: int, row: int, boundary: int) -> None:
        """Make a row of this sequence that of a member in a step."""
        made, kept = self._ends(step, member, row, boundary)
        self._device.copy(made.pointer, made.nbytes, kept.pointer, kept.nbytes, made.nbytes, 1)

    def _ends(self, step: StepRegions, member: int, row: int, boundary: int) -> tuple[Region, Region]:
        """Where a row lies in a step, and where it is kept."""
        made = members_of(step.rows[boundary], member, 1)
        return made, self.rows[boundary].part(row * made.shape[2], made.shape)

    @property
    def memory_bytes(self) -> int:
        """Bytes of row buffers and KV caches."""
        return sum(region.nbytes for region in self._kept)

    @property
    def _kept(self) -> list[Region]:
        return [*self.rows, *(region for cache in self.graphs.caches for region in cache.regions())]

    def clear(self) -> None:
        """Set caches and rows to zeros: NaN in a row that attention ignores would still reach its result (0 × NaN)."""
        for region in self._kept:
            self._device.clear(region)

    def forget_programs(self) -> None:
        self._programs, self._singles = [], {}
