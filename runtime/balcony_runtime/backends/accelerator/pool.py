"""A KV pool on an accelerator: the members' memory, and passes that take one new row of several members at once.

Owns the caches of all members and the programs over ranges of them. In the graphs of an engine set every member has a ``start``
of its own, so a pass takes a row of each of some neighbouring members at lengths of their own, where their caches lie. A member
by itself is a :class:`.state.DeviceState` over the same memory. Which members share a pass is decided in
:mod:`balcony_runtime.scheduling.shared_step`.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from balcony_edge.errors import DeviceError
from balcony_runtime.backends.accelerator.device import ALIGNMENT, Launch, Region
from balcony_runtime.backends.accelerator.state import DeviceState, exclusive
from balcony_runtime.backends.accelerator.workspace import Graphs, Regions, Shared, Workspace, members_of
from balcony_runtime.backends.base import FloatArray, IntArray, passes_of

if TYPE_CHECKING:
    from balcony_runtime.backends.accelerator.backend import DeviceBackend

#: Passes that are kept, each of one graph over one range of members.
MOST_PASSES = 256
#: Runs of a pass after which it is captured, since a capture takes as long as several runs.
RUNS_BEFORE_CAPTURE = 3


class _Pass:
    """One graph over neighbouring members, ready to run. It is captured when it was of use before.

    Args:
        backend: backend of the graph.
        memory: memory of the members, which counts captures.
        name: name of the graph.
        tensors: its inputs and outputs.
        before, after: copies before and after it, as targets and sources.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        memory: PoolMemory,
        name: str,
        tensors: dict[str, Region],
        before: list[tuple[Region, Region]],
        after: list[tuple[Region, Region]],
    ) -> None:
        self._backend, self._memory, self._name, self._tensors = backend, memory, name, tensors
        self.before, self.after = before, after
        self.attends = "start" in tensors
        self._run = backend.executor.prepare(name, tensors).run
        self._runs = 0

    def run(self) -> None:
        """Put the graph's work into the device's queue."""
        self._run()
        self._runs += 1
        if self._runs == RUNS_BEFORE_CAPTURE:
            self._memory.captures += 1
            with contextlib.suppress(DeviceError):  # no memory for a context of its own: it goes on without
                launch = self._backend.executor.prepare(self._name, self._tensors, to_capture=True)
                self._run = self._backend.device.joined([self._backend.device.captured(launch)])


class PoolMemory(Regions):
    """Memory of all members, and the programs of shared passes.

    Raises:
        DeviceError: there is not enough memory.
    """

    def __init__(self, backend: DeviceBackend, count: int) -> None:
        super().__init__(backend)
        self._workspaces: list[Workspace | None] = [None] * count
        self._captured: dict[str, Launch] = {}
        self.captures = 0
        self.bound = lru_cache(MOST_PASSES)(self._bind)
        with self.freed_after_an_error():
            #: The members' rows in a shared step.
            self.step = self.new_step(count)
            #: Dense copies of what goes into a pass and comes out of it: an engine takes only addresses that 256 divides.
            self.given, self.taken = self.new_row(count), self.new_row(count)
            #: Results of the members' exits, since a later pass of the same step may carry a member along; those asked for.
            self.found, self.asked = self.new_row(count), self.new_row(count)
            self._caches = self.new_caches(count)
            #: Where members make passes of their own, one member at a time.
            self._own = self.new_step(1), self.new_scratch(1)
        graphs = Graphs.over(backend.manifest, self.step, self._caches)
        embed = graphs.embed._replace(step={"ids": self.step.ids, "hidden_0": self.taken})
        head = graphs.head._replace(step=graphs.head.step | {"hidden": self.asked})
        self._graphs = {graph.name: graph for graph in graphs._replace(embed=embed, head=head).all}

    def workspace(self, member: int) -> Workspace:
        """Memory of one member, as a sequence uses it; made when it is needed."""
        made = self._workspaces[member]
        if made is None:
            caches = {name: cache.of(member, 1) for name, cache in self._caches.items()}
            shared = Shared(caches, *self._own, self._captured)
            made = self._workspaces[member] = Workspace(self._backend, 1, shared)
        return made

    @property
    def prepared(self) -> int:
        """Number of captures so far; each member has its own."""
        return self.captures + sum(workspace is not None for workspace in self._workspaces)

    def _bind(self, name: str, first: int, count: int) -> _Pass:
        """A pass of a graph over a range of members."""
        graph, before, after, tensors = self._graphs[name], {}, [], {}
        outputs = {spec.name for spec in self._backend.engines.graphs[name].outputs}
        for port, region in graph.step.items():
            part = tensors[port] = members_of(region, first, count)
            if part.pointer % ALIGNMENT and port in outputs:
                tensors[port] = members_of(self.taken, 0, count)
                after.append((part, tensors[port]))
            elif part.pointer % ALIGNMENT:
                tensors[port] = members_of(self.given, 0, count)
                before[part] = tensors[port]  # rows and queries of a balcony are one input here
        if graph.cache is not None:
            start = members_of(self.step.start, 0, count)
            tensors |= {"start": start, **graph.cache.of(first, count).tensors()}
        return _Pass(self._backend, self, name, tensors, [(dense, part) for part, dense in before.items()], after)

    def forget_programs(self) -> None:
        self.bound.cache_clear()
        self._captured.clear()

    def free(self) -> None:
        for workspace in self._workspaces:
            if workspace is not None:
                workspace.free()
        super().free()


class _Use:
    """Held by a pool and its members' states: the memory goes back when the last of them is gone."""


class DevicePool:
    """Memory of several members on a device; implements :class:`balcony_runtime.backends.base.Pool`.

    Raises:
        DeviceError: there is not enough memory.
    """

    def __init__(self, backend: DeviceBackend, count: int) -> None:
        self.backend, self.members = backend, count
        # Attention reads a member's whole cache, also for a dead row: up to as many bytes as a stage's weights in int4.
        self.most_dead = 1
        self.busy_ns = 0
        self._device, self._memory, self._use = backend.device, PoolMemory(backend, count), _Use()
        weakref.finalize(self._use, backend.returned.append, self._memory)
        self._states: list[DeviceState | None] = [None] * count
        self._start = np.zeros(count, np.int64)
        self._stand_at: bytes | None = None  # what lies in the step's ``start``
        self._exit_names = [backend.manifest.exit_graph(layer) for layer in backend.manifest.exit_layers]

    @property
    def prepared(self) -> int:
        """See :class:`.base.Pool`."""
        return self._memory.prepared

    @exclusive
    def state(self, member: int) -> DeviceState:
        """The memory of one member, as a sequence uses it.

        Raises:
            DeviceError: there is not enough memory.
        """
        state = self._states[member]
        if state is None:
            workspace = self._memory.workspace(member)
            workspace.clear()
            state = self._states[member] = DeviceState(self.backend, workspace, self._use)
        return state

    @exclusive
    def decode(self, first: int, exits: tuple[int, ...], tokens: Sequence[int], rows: Sequence[int]) -> FloatArray:
        """Run one new row of each of neighbouring members through all graphs on its way; see :class:`.base.Pool`."""
        if len(exits) == 1:
            return self.state(first).decode(exits[0], np.array(tokens), rows[0])
        members = range(first, first + len(exits))
        self._embed(members, tokens, rows)
        for exit_index, reaching, leaving in passes_of(first, exits):
            self._run_stage(exit_index, reaching[0], len(reaching))
            if leaving and exit_index < len(self._exit_names) - 1:
                self._run(self._exit_names[exit_index], leaving[0], len(leaving))
        for member, exit_index, row in zip(members, exits, rows, strict=True):
            self._keep(member, row, slice(0, exit_index + 2))
        self._gather(self._memory.step.hidden, members)
        return self._head(len(exits))

    @exclusive
    def begin(self, members: IntArray, tokens: IntArray, rows: IntArray, total: int) -> None:
        """Write one token of each member to boundary 0; see :class:`.base.Pool`."""
        self._embed(members.tolist(), tokens.tolist(), rows.tolist())
        for member, row in zip(members.tolist(), rows.tolist(), strict=True):
            self._keep(member, row, slice(0, 1))

    @exclusive
    def place(self, boundary: int, member: int, row: int) -> None:
        """Make an earlier row of a boundary the member's row of the next pass."""
        self._start[member] = row
        if self._states[member] is not None:
            self._memory.workspace(member).place(self._memory.step, member, row, boundary)

    @exclusive
    def run_stage(self, stage: int, first: int, count: int) -> None:
        """Run the rows of neighbouring members through a stage; the last one's result also goes through the norm."""
        self._run_stage(stage, first, count)

    @exclusive
    def run_exit(self, exit_index: int, first: int, count: int) -> None:
        """Run the rows of neighbouring members through a balcony or the norm."""
        self._run(self._exit_names[exit_index], first, count)

    @exclusive
    def keep(self, members: IntArray, rows: IntArray, stages: slice) -> None:
        """Store what stages made of the members' rows, at the boundaries after them."""
        for member, row in zip(members.tolist(), rows.tolist(), strict=True):
            self._keep(member, row, slice(stages.start + 1, stages.stop + 1))

    @exclusive
    def result(self, exit_index: int, members: IntArray, rows: IntArray) -> None:
        """Remember the results of the members' exits for :meth:`logits`."""
        for first, count, _ in _runs(members.tolist()):
            self._move(members_of(self._memory.found, first, count), members_of(self._memory.step.hidden, first, count))

    @exclusive
    def logits(self, members: IntArray) -> FloatArray:
        """Logits of the remembered results, (n, V), in an array that the caller owns."""
        self._gather(self._memory.found, members.tolist())
        return self._head(len(members))

    def clear(self, member: int) -> None:
        """Forget a member's state; its memory stays the pool's, and the next state clears it.

        The collector may call it in any thread, even in one that captures, so it gives the device nothing to do.
        """
        self._states[member] = None

    def _embed(self, members: Sequence[int], tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Write tokens to boundary 0 of the step."""
        self._start[members] = rows
        count, step = len(members), self._memory.step
        self._device.upload(members_of(step.ids, 0, count), np.array(tokens, np.int64)[:, None])
        self._run("embed", 0, count)
        for first, length, place in _runs(members):
            self._move(members_of(step.rows[0], first, length), members_of(self._memory.taken, place, length))
        for member, row in zip(members, rows, strict=True):
            if (state := self._states[member]) is not None:
                state.reached = row + 1

    def _run_stage(self, stage: int, first: int, count: int) -> None:
        self._run(f"stage_{stage}", first, count)
        if stage == len(self._exit_names) - 1:
            self._run(self._exit_names[-1], first, count)

    def _head(self, count: int) -> FloatArray:
        """Logits of the first rows of ``asked``."""
        self._run("lm_head", 0, count)
        begin = time.perf_counter_ns()
        logits: FloatArray = self._device.download(members_of(self._memory.step.logits, 0, count))[:, 0]
        self.busy_ns += time.perf_counter_ns() - begin
        return logits

    def _keep(self, member: int, row: int, boundaries: slice) -> None:
        """Store a member's row of the step at some boundaries."""
        self._memory.workspace(member).keep(self._memory.step, member, row, boundaries)

    def _run(self, name: str, first: int, count: int) -> None:
        one = self._memory.bound(name, first, count)
        start = self._start[first : first + count]
        if one.attends and (standing := start.tobytes()) != self._stand_at:
            self._stand_at = None  # an interrupt may come before it is known again
            self._device.upload(members_of(self._memory.step.start, 0, count), start)
            self._stand_at = standing
        begin = time.perf_counter_ns()
        for target, source in one.before:
            self._move(target, source)
        one.run()
        for target, source in one.after:
            self._move(target, source)
        self.busy_ns += time.perf_counter_ns() - begin

    def _gather(self, rows: Region, members: Sequence[int]) -> None:
        """Copy members' rows to the first places of ``asked``."""
        for first, count, place in _runs(members):
            self._move(members_of(self._memory.asked, place, count), members_of(rows, first, count))

    def _move(self, target: Region, source: Region) -> None:
        self._device.copy(target.pointer, target.nbytes, source.pointer, source.nbytes, source.nbytes, 1)


def _runs(members: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """First member and length of every run of neighbours, and the place of the first in the list."""
    for _, run in groupby(enumerate(members), lambda one: one[1] - one[0]):  # the same for neighbours
        (place, first), *others = run
        yield first, 1 + len(others), place
