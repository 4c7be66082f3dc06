"""One sequence on ONNX Runtime: the bindings of graphs to its rows and caches, and the passes over them.

Owns the binding of arrays. The arrays themselves are in :mod:`.memory`, calls that run bound graphs in :mod:`.bindings`,
sessions and weights in :mod:`.backend`, passes that several sequences share in :mod:`.pool`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from balcony_edge.bundle.manifest import GraphSpec
from balcony_runtime.backends.base import Array, FloatArray, IntArray, likeliest, part_of
from balcony_runtime.backends.onnxruntime.bindings import bind_ports, bound, bound_run, run_step
from balcony_runtime.backends.onnxruntime.host_memory import touched_bytes, zeros
from balcony_runtime.backends.onnxruntime.memory import Cache, Memory, value_of
from balcony_runtime.backends.onnxruntime.recurrent import RecurrentStates

if TYPE_CHECKING:
    from balcony_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend

#: Tokens whose rows are unpacked at once, so that what lies in between stays in the second-level cache.
EMBEDDED = 128


class _Program(NamedTuple):
    """A decode step at one exit.

    Attributes:
        good_for: number of rows up to which its bindings are valid.
        runs: calls to make, graph by graph.
        first: destination of the token's row, (D,).
        made: rows at all boundaries on the way, (boundaries, B, D).
        kept: where they go, (rows, boundaries, B, D).
        logits: logits of the step, (B, V).
    """

    good_for: int
    runs: list[Callable[[], object]]
    first: npt.NDArray[Any]
    made: npt.NDArray[Any]
    kept: npt.NDArray[Any]
    logits: FloatArray


class _Graph:
    """One graph as a sequence uses it.

    Attributes:
        name: name of the graph, which is also the name of its session.
        spec: its tables in the manifest.
        cache: its KV cache; a balcony's graph for keys shares the balcony's. None for graphs that keep nothing.
        states: what its recurrent layers keep; None without such layers.
        inputs, outputs: values of its one-row pass, by port.
        side: side of ``states`` that the next pass reads.
        one_row, many_rows: bindings of its passes of one row and of several, by side.
    """

    def __init__(
        self,
        name: str,
        spec: GraphSpec,
        cache: Cache | None,
        states: RecurrentStates | None,
        inputs: dict[str, Any],
        outputs: dict[str, Any],
    ) -> None:
        self.name, self.spec, self.cache, self.states = name, spec, cache, states
        self.inputs, self.outputs = inputs, outputs
        self.norms = any(tensor.name == "normed" for tensor in spec.outputs)  # the last stage of the lowered set
        self.side = 0
        self.one_row: dict[int, Any] = {}
        self.many_rows: dict[int, Any] = {}

    def begin(self, rows: int) -> None:
        """Begin a pass over the rows after the first ``rows``."""
        if self.states is not None:
            self.side = self.states.begin(rows)

    def end(self, rows: int) -> None:
        """End the pass, after which the graph has taken in ``rows`` rows."""
        if self.states is not None:
            self.states.end(self.side, rows)

    def bind(self, binding: Any, members: slice | None = None) -> None:
        """Bind what the graph keeps of all members of a batch, or of some."""
        if self.cache is not None:
            self.cache.bind(binding, members)
        if self.states is not None:
            for name, past, present in zip(
                self.states.names, self.states.sides[self.side], self.states.sides[1 - self.side], strict=True
            ):
                chosen = slice(None) if members is None else members
                binding.bind_ortvalue_input(name, value_of(past[chosen]))
                binding.bind_ortvalue_output(name.replace("past_", "present_", 1), value_of(present[chosen]))

    @property
    def fused(self) -> bool:
        """Whether the graph uses ``GroupQueryAttention``."""
        return any(tensor.name == "last" for tensor in self.spec.inputs)


class _Exit(NamedTuple):
    """The graphs of an exit: its balcony or norm, and the balcony's graph for keys, if it has one."""

    graph: _Graph
    keys: _Graph | None


class OnnxRuntimeState:
    """One sequence's rows and caches in main memory; implements :class:`balcony_runtime.backends.base.State`.

    Passes of one row run over bindings made once: the output array of stage i is the input array of stage i + 1 and of the
    balcony between them. A decode step runs a list of such bindings one after another. Every pass sweeps the weights through
    the CPU's caches and leaves them cold for Python, so Python makes only a few calls in between. Passes of more rows bind
    arrays of their own.
    """

    def __init__(self, backend: OnnxRuntimeBackend, memory: Memory) -> None:
        manifest = backend.manifest
        self._backend, self._memory = backend, memory
        backend.users.add(self)
        self._rows, self._row = memory.rows, memory.row
        self._batch = batch_size = len(memory.hidden)
        self.busy_ns = 0
        layers = manifest.exit_layers
        self._layers = (0, *layers)  # layer of each boundary
        self._row_values = [value_of(row) for row in self._row]
        self._hidden = value_of(memory.hidden)
        (self._logits,) = zeros(((batch_size, 1, manifest.model.vocab_size), np.float32))
        # Position of a pass, as inputs of its graph: start and last of each member, and the total, in one buffer.
        self._place = Struct(f"={batch_size}q{batch_size + 1}i")
        self._standing = bytearray(self._place.size)
        start = np.frombuffer(self._standing, np.int64, batch_size)
        self._last = np.frombuffer(self._standing, np.int32, batch_size, start.nbytes)
        total = np.frombuffer(self._standing, np.int32, 1, start.nbytes + self._last.nbytes).reshape(())
        self._where = {"start": value_of(start), "last": value_of(self._last), "total": value_of(total)}
        specs = manifest.runnable
        self._graphs: dict[str, _Graph] = {}

        def graph(name: str, inputs: dict[str, Any], outputs: dict[str, Any], keeper: str = "") -> _Graph:
            cache, states = memory.caches.get(keeper), memory.states.get(keeper)
            self._graphs[name] = _Graph(name, specs[name], cache, states, inputs, outputs)
            return self._graphs[name]

        self._stages = []
        for stage, (first, last) in enumerate(zip(self._layers, layers, strict=False)):
            name = f"stage_{stage}"
            inputs = {f"hidden_{first}": self._row_values[stage]}
            outputs = {f"hidden_{last}": self._row_values[stage + 1], "normed": self._hidden}
            self._stages.append(graph(name, inputs, outputs, name))
        self._exits = []
        for layer, row in zip(layers, self._row_values[1:], strict=True):
            name = manifest.exit_graph(layer)
            inputs, outputs = (
                {"rows": row, "queries": row, "hidden": row},
                dict.fromkeys(("hidden", "normed"), self._hidden),
            )
            keys = graph(f"{name}_keys", {}, {}, name) if f"{name}_keys" in specs else None
            self._exits.append(_Exit(graph(name, inputs, outputs, name), keys))
        #: The graphs that keep rows or states: stages, and balconies; the last one, the norm, keeps nothing.
        self._keepers = [*self._stages, *(one.graph for one in self._exits)]
        self._head = graph("lm_head", {"hidden": self._hidden}, {"logits": value_of(self._logits)})
        #: Graphs of a decode step at each exit, in order.
        self._paths = [[self._graphs[name] for name in manifest.path_graphs(layer)] for layer in layers]
        self._decoded = [0] * len(layers)  # number of rows that the decode steps at each exit have reached
        # Decode steps at each exit, by the sides of recurrent states that the graphs read, one bit each.
        self._programs: list[dict[int, _Program]] = [{} for _ in layers]
        self._recurrent = [[graph for graph in path if graph.states is not None] for path in self._paths]
        self._queries: npt.NDArray[Any] | None = None

    @property
    def memory_bytes(self) -> int:
        """Bytes of the logits' array, and of row buffers and KV caches as far as rows have reached them."""
        self._reserve_decoded()
        caches = [graph.cache for graph in self._keepers if graph.cache is not None]
        # A stage writes the boundary after it, and stage 0 takes all rows of boundary 0.
        written = [caches[stage].rows for stage in range(len(self._stages))]
        reached = [written[0], *written]
        rows = sum(touched_bytes(part, 1, count) for part, count in zip(self._rows, reached, strict=True))
        return self._logits.nbytes + rows + self.recurrent_bytes + sum(cache.touched_bytes() for cache in caches)

    @property
    def recurrent_bytes(self) -> int:
        """Bytes of the states of recurrent layers and of their copies."""
        return sum(states.nbytes for states in self._memory.states.values())

    def largest_cached(self, turned: int) -> dict[str, dict[str, npt.NDArray[np.float32]]]:
        """Graph → input → :meth:`.Cache.largest` of its cache, over members and rows, (H, d)."""
        self._reserve_decoded()
        return {graph.name: graph.cache.largest(turned) for graph in self._graphs.values() if graph.cache is not None}

    def reached(self, exit_index: int, rows: int) -> None:
        """Count the rows that shared passes have written on the way to an exit."""
        self._decoded[exit_index] = max(rows, self._decoded[exit_index])

    def _reserve_decoded(self) -> None:
        """Count the rows of decode steps in the caches; the steps themselves do not, to save time."""
        for path, rows in zip(self._paths, self._decoded, strict=True):
            for graph in path:
                self._reserve(graph, rows)

    def decode(self, exit_index: int, ids: IntArray, row: int) -> FloatArray:
        """Run one row through all graphs on the way to an exit."""
        recurrent, sides = self._recurrent[exit_index], 0
        for graph in recurrent:
            graph.begin(row)
            sides = 2 * sides + graph.side
        program = self._programs[exit_index].get(sides)
        if program is None or row >= program.good_for:
            program = self._programs[exit_index][sides] = self._program(exit_index, row)
        _, runs, first, made, kept, logits = program  # at once: each by its name costs two cold cache lines
        if len(ids) == 1:
            first[:] = self._backend.table.row(ids.item())
        else:
            self._row[0, :, 0] = self._backend.table[ids]
        self._stand_at(row, row + 1)
        self.busy_ns += run_step(runs)
        for graph in recurrent:
            graph.end(row + 1)
        if row >= self._decoded[exit_index]:  # rows from before a rollback have their memory still
            self._decoded[exit_index] = row + 1
        kept[row] = made
        return logits

    def decode_best(self, exit_index: int, ids: IntArray, row: int) -> IntArray:
        """Run one row through all graphs on the way to an exit and return the likeliest next token."""
        return likeliest(self.decode(exit_index, ids, row))

    def embed(self, tokens: IntArray, start: int) -> None:
        """Write token embeddings to boundary 0."""
        for first in range(0, tokens.shape[1], EMBEDDED):
            part = tokens[:, first : first + EMBEDDED]
            self._rows[0, :, start + first : start + first + part.shape[1]] = self._backend.table[part]  # (B, n, D)

    def run_stage(self, stage: int, start: int, stop: int) -> None:
        """Run rows from boundary ``stage`` to boundary ``stage + 1``."""
        graph = self._stages[stage]
        self._reserve(graph, stop)
        self._stand_at(start, stop)
        graph.begin(start)
        if stop - start == 1:
            self._row[stage, :, 0] = self._rows[stage, :, start]
            self._run(graph, self._one_row(graph))
            self._rows[stage + 1, :, start] = self._row[stage + 1, :, 0]
            graph.end(stop)
            return
        rows = np.ascontiguousarray(self._rows[stage, :, start:stop])
        there = self._rows[stage + 1, :, start:stop]
        out = there if self._batch == 1 else np.empty_like(rows)  # rows of several members are not contiguous
        outputs = {f"hidden_{self._layers[stage + 1]}": out} | ({"normed": np.empty_like(rows)} if graph.norms else {})
        self._run_rows(graph, {f"hidden_{self._layers[stage]}": rows}, outputs)
        if out is not there:
            there[:] = out
        graph.end(stop)

    def run_exit(self, exit_index: int, start: int, stop: int, num_queries: int) -> None:
        """Run the balcony or the norm of an exit over rows of its boundary."""
        (graph, keys), boundary = self._exits[exit_index], exit_index + 1
        keeps_no_rows = graph.cache is None
        self._reserve(graph, stop)
        if keys is not None:  # this balcony uses all its rows as queries, so the others go through the graph for keys
            asked = stop - num_queries
            if start < asked:
                self._stand_at(start, asked)
                rows = np.ascontiguousarray(self._rows[boundary, :, start:asked])
                keys.begin(start)
                self._run_rows(keys, {"rows": rows}, {})
                keys.end(asked)
            start = asked
        elif keeps_no_rows:
            start = stop - num_queries
        num_queries = max(num_queries, 1) if keys is None else num_queries
        if start == stop:
            return
        self._stand_at(start, stop)
        graph.begin(start)
        if stop - start == 1:
            self._row[boundary, :, 0] = self._rows[boundary, :, start]
            self._run(graph, self._one_row(graph))
            self._queries = None
            graph.end(stop)
            return
        rows = np.ascontiguousarray(self._rows[boundary, :, start:stop])
        queries = np.ascontiguousarray(rows[:, rows.shape[1] - num_queries :])
        out = np.empty_like(queries)
        inputs = {"hidden": queries} if keeps_no_rows else {"rows": rows, "queries": queries}
        self._run_rows(graph, inputs, {"normed" if keeps_no_rows else "hidden": out})
        self._queries = out
        graph.end(stop)

    def wait(self) -> None:
        """Do nothing: a pass ends when its call returns."""

    def logits(self, num_queries: int) -> FloatArray:
        """Run the head over the result of :meth:`run_exit`."""
        if self._queries is None:
            self._run(self._head, self._one_row(self._head))
            return self._logits.copy()
        logits = np.empty((self._batch, num_queries, self._logits.shape[2]), np.float32)
        self._run_rows(self._head, {"hidden": self._queries}, {"logits": logits})
        return logits

    def stage_resumes(self, stage: int, rows: int) -> int:
        """The newest state of a stage that is kept; see :class:`.base.State`."""
        states = self._stages[stage].states
        return rows if states is None else states.newest(rows)

    def exit_resumes(self, exit_index: int, rows: int) -> int:
        """The same for a balcony."""
        states = self._exits[exit_index].graph.states
        return rows if states is None else states.newest(rows)

    def checkpoint(self, stage_cursor: Sequence[int], balcony_cursor: Sequence[int]) -> None:
        """Copy the states at the cursors; those of rows that were rolled back may be newer."""
        for graph, rows in zip(self._keepers, (*stage_cursor, *balcony_cursor), strict=False):
            if graph.states is not None:
                graph.states.copy(rows)

    def parts(self, stage_rows: Sequence[int], balcony_rows: Sequence[int]) -> dict[str, Array]:
        """Views of the rows at the boundaries after the stages, of keys and values, and recurrent states."""
        return self._parts(stage_rows, balcony_rows, lambda states, rows: states.after(rows))

    def _parts(
        self,
        stage_rows: Sequence[int],
        balcony_rows: Sequence[int],
        state: Callable[[RecurrentStates, int], dict[str, Array]],
    ) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for stage, rows in enumerate(stage_rows):
            found[f"hidden_{self._layers[stage + 1]}"] = self._rows[stage + 1, :, :rows]
        for graph, rows in zip(self._keepers, (*stage_rows, *balcony_rows), strict=False):
            if graph.cache is not None and rows:
                self._reserve(graph, rows)
                kept = graph.cache.first(rows)
                if graph.states is not None:
                    kept |= state(graph.states, rows)
                found |= {f"{graph.name}.{name}": array for name, array in kept.items()}
        return found

    def fill(self, stage_rows: Sequence[int], balcony_rows: Sequence[int], parts: Mapping[str, Array]) -> None:
        """Copy what another state has made."""
        for name, rows in self._parts(stage_rows, balcony_rows, lambda states, rows: states.fill(rows)).items():
            rows[:] = part_of(parts, name, rows.shape, rows.dtype)

    def clear(self) -> None:
        """Begin anew over the same memory, for another sequence of a pool, where no graph has recurrent states."""
        self._decoded, self._queries = [0] * len(self._decoded), None
        for graph in self._graphs.values():
            graph.many_rows.clear()  # holds arrays of the last pass
            if graph.cache is not None:
                graph.cache.rows = 0

    def forget_programs(self) -> None:
        """Drop all bindings, which hold sessions."""
        for graph in self._graphs.values():
            graph.one_row.clear()
            graph.many_rows.clear()
        for programs in self._programs:
            programs.clear()

    def _stand_at(self, start: int, stop: int) -> None:
        """Tell the graphs which rows the next pass takes."""
        batch = self._batch
        if batch == 1:
            self._place.pack_into(self._standing, 0, start, stop - 1, stop)
        else:
            self._place.pack_into(self._standing, 0, *(start,) * batch, *(stop - 1,) * batch, stop)

    def _program(self, exit_index: int, row: int) -> _Program:
        """The decode step at an exit, bound."""
        graphs = self._paths[exit_index]
        for graph in graphs:
            self._reserve(graph, row + 1)
        caches = [graph.cache for graph in graphs if graph.cache is not None]
        good_for = min((cache.held.capacity for cache in caches), default=self._rows.shape[2])
        if (path := self._backend.paths.get(self._layers[exit_index + 1])) is not None:
            runs = [bound_run(path, self._path_binding(path, graphs))]
        else:
            runs = [bound_run(self._backend.sessions[graph.name], self._one_row(graph)) for graph in graphs]
        made, kept = self._row[: exit_index + 2, :, 0], self._rows[: exit_index + 2].transpose(2, 0, 1, 3)
        return _Program(good_for, runs, self._row[0, 0, 0], made, kept, self._logits[:, 0])

    def _path_binding(self, session: ort.InferenceSession, graphs: list[_Graph]) -> Any:
        """The binding of a whole decode step, from the token's row to the logits; it also writes every boundary on the way."""
        values = {f"hidden_{layer}": value for layer, value in zip(self._layers, self._row_values, strict=True)}
        values |= {**self._where, "logits": value_of(self._logits)}
        binding = bound(session, session.get_inputs(), session.get_outputs(), values, values)
        for graph in graphs:
            graph.bind(binding)
        return binding

    def _reserve(self, graph: _Graph, rows: int) -> None:
        """Make room in a graph's cache. Bindings to the smaller one are dropped first, since an interrupt may come between."""
        cache = graph.cache
        if cache is None:
            return
        if rows > cache.held.capacity:
            self.forget_programs()
            cache.grow(rows)
        cache.rows = max(cache.rows, rows)

    def _one_row(self, graph: _Graph) -> Any:
        """The binding of a graph's one-row pass."""
        if graph.side not in graph.one_row:
            graph.one_row[graph.side] = self._bind(graph, graph.inputs, graph.outputs)
        return graph.one_row[graph.side]

    def _run_rows(
        self, graph: _Graph, inputs: dict[str, npt.NDArray[Any]], outputs: dict[str, npt.NDArray[Any]]
    ) -> None:
        """Run one pass over arrays that are bound only for it, each (B, rows, width)."""
        if not graph.fused or self._batch == 1 or int(self._last[0]) + 1 == next(iter(inputs.values())).shape[1]:
            values, results = ({key: value_of(array) for key, array in part.items()} for part in (inputs, outputs))
            many_rows = graph.many_rows.get(graph.side)
            if many_rows is None:
                many_rows = graph.many_rows[graph.side] = self._bind(graph, values, results)
            else:  # the cache stays bound, which saves most of the work
                bind_ports(many_rows, graph.spec.inputs, graph.spec.outputs, values, results)
            self._run(graph, many_rows)
            return
        # GroupQueryAttention accepts several new rows after earlier ones only for one sequence at a time.
        for member in range(self._batch):
            one = slice(member, member + 1)
            values, results = ({key: value_of(array[one]) for key, array in part.items()} for part in (inputs, outputs))
            self._run(graph, self._bind(graph, {**values, "last": value_of(self._last[one])}, results, one))

    def _bind(
        self, graph: _Graph, inputs: dict[str, Any], outputs: dict[str, Any], members: slice | None = None
    ) -> Any:
        """Bind those of ``inputs``, ``outputs`` and the inputs of position that the graph has, and its cache."""
        session, spec = self._backend.sessions[graph.name], graph.spec
        binding = bound(session, spec.inputs, spec.outputs, {**self._where, **inputs}, outputs)
        graph.bind(binding, members)
        return binding

    def _run(self, graph: _Graph, binding: Any) -> None:
        self.busy_ns += run_step([bound_run(self._backend.sessions[graph.name], binding)], graph.spec.file)
