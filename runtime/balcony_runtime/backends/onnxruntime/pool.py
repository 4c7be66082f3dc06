"""A KV pool on ONNX Runtime: the members' memory, and passes that take one new row of several members at once.

Owns the arrays of the pool and the bindings over ranges of members. ``GroupQueryAttention`` takes one new row of each member at
a length of its own, over a contiguous range of the caches' first axis. Passes of several rows take one member at a time; they
run on the member's own :class:`.state.OnnxRuntimeState` over the same memory. Which members share a pass is decided
in :mod:`balcony_runtime.scheduling.shared_step`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from balcony_runtime.backends.base import FloatArray, IntArray, passes_of
from balcony_runtime.backends.onnxruntime.bindings import bound, bound_run, run_step
from balcony_runtime.backends.onnxruntime.host_memory import give_back, zeros
from balcony_runtime.backends.onnxruntime.memory import Cache, Memory, value_of
from balcony_runtime.backends.onnxruntime.state import OnnxRuntimeState

if TYPE_CHECKING:
    from balcony_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend

#: Bindings that are kept: one for each graph and range of members in use.
MOST_BINDINGS = 512


class _Program(NamedTuple):
    """A step of neighbouring members that have no pending rows.

    Attributes:
        runs: calls to make, graph by graph.
        entries: destination of each member's token row, (D,).
        start, last: where the members stand, (n,).
        ways: of each member its rows at all boundaries on its way, (boundaries, D), where they are kept, (S, boundaries, D),
            and its state.
        logits: logits of the step, (n, V).
    """

    runs: list[Callable[[], object]]
    entries: list[npt.NDArray[Any]]
    start: IntArray
    last: npt.NDArray[np.int32]
    ways: list[tuple[npt.NDArray[Any], npt.NDArray[Any], OnnxRuntimeState]]
    logits: FloatArray


def _kept(most: int, method: Any) -> Any:
    """The last results of a pool's method, by its arguments. A cache in the pool that held the pool would be a cycle."""
    pool, make = weakref.ref(method.__self__), method.__func__
    return lru_cache(most)(lambda *key: make(pool(), *key))


class OnnxRuntimePool:
    """Memory of several members; implements :class:`balcony_runtime.backends.base.Pool`."""

    #: A further row costs 4 to 16 % (float32) or 25 to 50 % (int4) of the first.
    most_dead = 3
    prepared = 0

    def __init__(self, backend: OnnxRuntimeBackend, members: int, max_length: int) -> None:
        manifest = backend.manifest
        self._backend, self.members = backend, members
        backend.users.add(self)
        self._memory = Memory.allocate(manifest, backend.dtype, members, max_length)
        self._layers = (0, *manifest.exit_layers)
        self._specs = manifest.runnable
        self._exit_names = [manifest.exit_graph(layer) for layer in manifest.exit_layers]
        self._states: list[OnnxRuntimeState | None] = [None] * members
        self._start = np.zeros(members, np.int64)
        self._last = np.zeros(members, np.int32)
        self._total = np.zeros((), np.int32)
        # Results of the members' exits: a later pass of the same step may carry a member along and overwrite its hidden state.
        self._found = np.zeros((members, 1, manifest.model.hidden_size), self._memory.hidden.dtype)
        self._asked = np.zeros_like(self._found)
        (self._logits,) = zeros(((members, 1, manifest.model.vocab_size), np.float32))
        self._stage_run = _kept(MOST_BINDINGS, self._bind_stage)
        self._exit_run = _kept(MOST_BINDINGS, self._bind_exit)
        self._head_run = _kept(members, self._bind_head)
        self._program = _kept(MOST_BINDINGS, self._bind_program)
        self.busy_ns = 0

    def forget_programs(self) -> None:
        """Drop all bindings, which hold sessions."""
        for kept in (self._stage_run, self._exit_run, self._head_run, self._program):
            kept.cache_clear()

    def state(self, member: int) -> OnnxRuntimeState:
        """The memory of one member, as a sequence uses it."""
        state = self._states[member]
        if state is None:
            state = self._states[member] = OnnxRuntimeState(self._backend, self._memory.member(member))
        return state

    def decode(self, first: int, exits: tuple[int, ...], tokens: Sequence[int], rows: Sequence[int]) -> FloatArray:
        """Run one new row of each of neighbouring members through all graphs on its way; see :class:`.base.Pool`."""
        # All fields at once, indices instead of zip() with a keyword, and rows by their row: the caches are cold here.
        program: _Program = self._program(first, exits)
        runs, entries, start, last, ways, logits = program
        for place, token in enumerate(tokens):
            entries[place][:] = self._backend.table.row(token)
        start[:] = last[:] = rows
        self._total[()] = max(rows) + 1
        self.busy_ns += run_step(runs)
        for place, (made, kept, state) in enumerate(ways):
            row = rows[place]
            kept[row] = made
            state.reached(exits[place], row + 1)
        return logits

    def begin(self, members: IntArray, tokens: IntArray, rows: IntArray, total: int) -> None:
        """Write one token of each member to boundary 0; see :class:`.base.Pool`."""
        embedded = self._backend.table[tokens]
        self._memory.rows[0][members, rows] = embedded
        self._memory.row[0][members, 0] = embedded
        self._start[members] = self._last[members] = rows
        self._total[()] = total

    def place(self, boundary: int, member: int, row: int) -> None:
        """Make an earlier row of a boundary the member's row of the next pass."""
        self._memory.row[boundary, member, 0] = self._memory.rows[boundary, member, row]
        self._start[member] = self._last[member] = row

    def run_stage(self, stage: int, first: int, count: int) -> None:
        """Run the rows of neighbouring members through a stage."""
        self._run(self._stage_run(stage, first, count), f"stage_{stage}")

    def run_exit(self, exit_index: int, first: int, count: int) -> None:
        """Run the rows of neighbouring members through a balcony or the norm."""
        self._run(self._exit_run(exit_index, first, count), self._exit_names[exit_index])

    def keep(self, members: IntArray, rows: IntArray, stages: slice) -> None:
        """Store what stages made of the members' rows, at the boundaries after them."""
        after = slice(stages.start + 1, stages.stop + 1)
        self._memory.rows[after][:, members, rows] = self._memory.row[after][:, members, 0]
        for member, row in zip(members.tolist(), rows.tolist(), strict=True):
            self.state(member).reached(stages.stop - 1, row + 1)

    def result(self, exit_index: int, members: IntArray, rows: IntArray) -> None:
        """Remember the results of the members' exits for :meth:`logits`."""
        self._found[members] = self._memory.hidden[members]
        for member, row in zip(members.tolist(), rows.tolist(), strict=True):
            self.state(member).reached(exit_index, row + 1)

    def logits(self, members: IntArray) -> FloatArray:
        """Logits of the remembered results, (n, V), in an array that the next call overwrites."""
        count = len(members)
        self._asked[:count] = self._found[members]
        self._run(self._head_run(count), "lm_head")
        return self._logits[:count, 0]

    def clear(self, member: int) -> None:
        """Give the member's memory back to the system; its rows are lost. Its bindings stay for the next sequence."""
        state, memory = self._states[member], self._memory
        if state is None:
            return
        state.clear()
        arrays = [array for cache in memory.caches.values() for array in cache.held.arrays]
        give_back([array[member] for array in arrays] + [rows[member] for rows in memory.rows])

    def _run(self, run: Callable[[], object], name: str) -> None:
        self.busy_ns += run_step([run], self._specs[name].file)

    def _bind_program(self, first: int, exits: tuple[int, ...]) -> _Program:
        members = range(first, first + len(exits))
        runs: list[Callable[[], object]] = []
        for exit_index, reaching, leaving in passes_of(first, exits):
            runs.append(self._stage_run(exit_index, reaching[0], len(reaching)))
            if leaving and exit_index < len(self._exit_names) - 1:  # the last stage includes the norm
                runs.append(self._exit_run(exit_index, leaving[0], len(leaving)))
        here = slice(first, members.stop)
        logits = self._logits[: len(exits)]
        runs.append(self._bind("lm_head", here, {"hidden": self._memory.hidden[here]}, {"logits": logits}))
        row, rows = self._memory.row, self._memory.rows
        ways = []
        for member, exit_index in zip(members, exits, strict=True):
            way = slice(0, exit_index + 2)
            ways.append((row[way, member, 0], rows[way, member].transpose(1, 0, 2), self.state(member)))
        entries = [row[0, member, 0] for member in members]
        return _Program(runs, entries, self._start[here], self._last[here], ways, logits[:, 0])

    def _bind_stage(self, stage: int, first: int, count: int) -> Callable[[], object]:
        members, row, layers = slice(first, first + count), self._memory.row, self._layers
        inputs = {f"hidden_{layers[stage]}": row[stage][members]}
        outputs = {f"hidden_{layers[stage + 1]}": row[stage + 1][members], "normed": self._memory.hidden[members]}
        return self._bind(f"stage_{stage}", members, inputs, outputs)

    def _bind_exit(self, exit_index: int, first: int, count: int) -> Callable[[], object]:
        members = slice(first, first + count)
        row, hidden = self._memory.row[exit_index + 1][members], self._memory.hidden[members]
        name = self._exit_names[exit_index]
        inputs = dict.fromkeys(("rows", "queries", "hidden"), row)
        return self._bind(name, members, inputs, dict.fromkeys(("hidden", "normed"), hidden))

    def _bind_head(self, count: int) -> Callable[[], object]:
        outputs = {"logits": self._logits[:count]}
        return self._bind("lm_head", slice(0, count), {"hidden": self._asked[:count]}, outputs)

    def _bind(
        self, name: str, members: slice, inputs: dict[str, npt.NDArray[Any]], outputs: dict[str, npt.NDArray[Any]]
    ) -> Callable[[], object]:
        """A call that runs a graph over a range of members."""
        session, spec = self._backend.sessions[name], self._specs[name]
        given = {**inputs, "start": self._start[members], "last": self._last[members], "total": self._total}
        values, results = ({key: value_of(array) for key, array in part.items()} for part in (given, outputs))
        binding = bound(session, spec.inputs, spec.outputs, values, results)
        cache: Cache | None = self._memory.caches.get(name)
        if cache is not None:
            cache.bind(binding, members)
        return bound_run(session, binding)
