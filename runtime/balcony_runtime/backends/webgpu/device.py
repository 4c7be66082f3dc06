"""Sessions and memory on one WebGPU device, and the order in which they are freed.

A value in device memory must be freed before the session that made it; otherwise the process dies with a segmentation fault
(ONNX Runtime 1.27; docs/LOG.md, "Device memory from Python"). Python promises no such order, not even at its exit. So a value
and a binding are each held in one place, a :class:`DeviceMemory`, which the device can empty at any time. Everything else
refers to them through a :class:`Value` or a :class:`BoundPass`. Nothing here knows stages or exits.
"""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from balcony_edge.bundle.manifest import DType
from balcony_edge.errors import BundleError, DeviceError
from balcony_runtime.backends.base import Array, closed
from balcony_runtime.backends.onnxruntime.backend import open_session
from balcony_runtime.backends.onnxruntime.bindings import bound_run
from balcony_runtime.backends.onnxruntime.memory import value_of
from balcony_runtime.backends.webgpu import small_graphs
from balcony_runtime.backends.webgpu.provider import NAME, Provider, failure

#: Type of logits.
_FLOAT: DType = "float32"
_P = ParamSpec("_P")
_R = TypeVar("_R")


class Value:
    """A tensor in device memory.

    Attributes:
        shape: its shape.
        ort: ONNX Runtime's value; None once it is freed.
    """

    __slots__ = ("ort", "shape")

    def __init__(self, ort: Any, shape: tuple[int, ...]) -> None:
        self.ort, self.shape = ort, shape


def _failing(call: Callable[Concatenate[BoundPass, _P], _R]) -> Callable[Concatenate[BoundPass, _P], _R]:
    """Let a call of a pass raise DeviceError where ONNX Runtime's error says that the device failed."""

    @functools.wraps(call)
    def told(self: BoundPass, /, *arguments: _P.args, **named: _P.kwargs) -> _R:
        if self._binding is None:  # a signal's handler closed the bundle in the middle of this thread's pass
            raise closed()
        try:
            return call(self, *arguments, **named)
        except RuntimeError as error:
            raise failure(self._graph, error) from error

    return told


class BoundPass:
    """A graph with its inputs and outputs bound, to be run many times. Each call of a method may move bytes to the device.

    All of them raise DeviceError if the device fails, and InputError after :meth:`drop`.
    """

    __slots__ = ("_arrays", "_binding", "_graph", "_run")

    def __init__(self, graph: str, session: Any) -> None:
        self._graph = graph
        self._binding: Any = session.io_binding()
        self._run: Any = bound_run(session, self._binding)
        self._arrays: dict[str, Array] = {}  # ONNX Runtime refers to their memory

    @_failing
    def give(self, name: str, value: Value | Array) -> None:
        """Bind an input. An array is copied to the device now, unless the graph reads the input on the host."""
        if isinstance(value, Value):
            self._binding.bind_ortvalue_input(name, value.ort)
        else:
            self._arrays[name] = value
            self._binding.bind_ortvalue_input(name, value_of(value))

    @_failing
    def take(self, name: str, value: Value | Array | None) -> None:
        """Bind an output to a value, to an array (the bytes of every run are copied to it), or to new device memory (None)."""
        if value is None:
            self._binding.bind_output(name, "webgpu")
        elif isinstance(value, Value):
            self._binding.bind_ortvalue_output(name, value.ort)
        else:
            self._arrays[name] = value
            self._binding.bind_ortvalue_output(name, value_of(value))

    @_failing
    def run(self) -> None:
        """Run the graph; with an array among its outputs, wait for it."""
        self._run()  # not by a local name: a traceback would keep it

    @_failing
    def made(self, memory: DeviceMemory) -> Value:
        """The output that was bound last, to new device memory, as a value of a memory."""
        value = Value(None, ())
        memory.values.add(value)
        value.ort = self._binding.get_outputs()[-1]
        value.shape = tuple(value.ort.shape())
        return value

    def drop(self) -> None:
        """Free the binding; the pass must not be used any more."""
        self._run = self._binding = None


class DeviceMemory:
    """All values and passes of one owner, the only place that keeps them alive."""

    def __init__(self) -> None:
        self.values: set[Value] = set()
        self.passes: set[BoundPass] = set()

    def free(self, values: Iterable[Value], passes: Iterable[BoundPass] = ()) -> None:
        """Free some values and passes."""
        for one in list(passes):
            self.passes.discard(one)
            one.drop()
        for value in list(values):
            self.values.discard(value)
            value.ort = None

    def clear(self) -> None:
        """Free everything."""
        self.free(self.values, self.passes)


class WebGpuDevice:
    """The sessions of one bundle and the memory of its sequences.

    Args:
        provider: the provider of the sessions.
        dtype: type of hidden states.
        boundaries: most row buffers that one pass of the graph ``put`` writes.
        threads: size of ONNX Runtime's shared pool, if this is its first session.
    """

    #: The provider's context belongs to the process, not to a device: one thread at a time opens, runs or frees anything there.
    lock = threading.RLock()

    def __init__(self, provider: Provider, dtype: DType, boundaries: int, threads: int | None = None) -> None:
        self._provider, self.dtype, self._threads = provider, dtype, threads
        self.sessions: dict[str, Any] = {}
        self._memories: set[DeviceMemory] = set()
        #: Memory of collected states, freed later: a state may be collected in any thread, even during a pass.
        self._returned: deque[DeviceMemory] = deque()
        # Runs when the device is collected, and at the exit of Python while ONNX Runtime is still usable.
        self._end = weakref.finalize(self, _close, self._memories, self.sessions)
        for name, graph in {
            **{f"zeros_{kind}": small_graphs.zeros(kind) for kind in {dtype, _FLOAT}},
            "take": small_graphs.take(dtype),
            "pick": small_graphs.pick(),
            **{f"put_{count}": small_graphs.put(dtype, count) for count in range(1, boundaries + 1)},
        }.items():
            self.open(name, graph)

    def open(self, name: str, graph: Path | bytes) -> Any:
        """Open a session on a graph and return it.

        Raises:
            DeviceError: the device cannot run it, or has too little memory for its weights.
        """
        try:
            session = open_session(
                graph, threads=self._threads, providers=self._provider.names, devices=self._provider.devices
            )
        except BundleError as error:
            raise failure(name, error.__cause__ or error) from error
        if session.get_providers()[0] != NAME:  # ONNX Runtime only warns and uses the CPU
            raise DeviceError(f"{name}: ONNX Runtime could not start {NAME}: see `balcony-edge doctor`")
        self.sessions[name] = session
        return session

    def new_memory(self, owner: object = None) -> DeviceMemory:
        """An empty memory, freed some time after its owner is collected; without an owner by :meth:`release`."""
        memory = DeviceMemory()
        self._memories.add(memory)
        if owner is not None:
            weakref.finalize(owner, self._returned.append, memory).atexit = False
        return memory

    def release(self, memory: DeviceMemory) -> None:
        """Free a memory; it must not be used any more."""
        memory.clear()
        self._memories.discard(memory)

    def new_pass(self, memory: DeviceMemory, graph: str) -> BoundPass:
        """A pass of a graph, without inputs and outputs."""
        made = BoundPass(graph, self.sessions[graph])
        memory.passes.add(made)
        return made

    def zeros(self, memory: DeviceMemory, shape: tuple[int, ...], dtype: DType) -> Value:
        """A value of zeros.

        Raises:
            DeviceError: there is not enough memory.
        """
        self._free_returned()
        allocation = self.new_pass(memory, f"zeros_{dtype}")
        try:
            allocation.give("zero", np.zeros((), dtype))
            allocation.give("shape", np.array(shape, np.int64))
            allocation.take("new", None)
            allocation.run()
            return allocation.made(memory)
        except DeviceError as error:
            size_mb = math.prod(shape) * np.dtype(dtype).itemsize / 1e6
            raise DeviceError(f"{size_mb:.0f} MB of device memory in one piece: {error}") from error
        finally:
            memory.free((), [allocation])

    def refuse_closed(self) -> None:
        """Raise InputError after :meth:`close`."""
        if not self._end.alive:
            raise closed()

    def close(self) -> None:
        """Free all memory, then the sessions; waits for a pass that is running."""
        self._end()

    def _free_returned(self) -> None:
        while self._returned:
            self.release(self._returned.popleft())


def _close(memories: set[DeviceMemory], sessions: dict[str, Any]) -> None:
    with WebGpuDevice.lock:
        for memory in memories:
            memory.clear()
        memories.clear()
        sessions.clear()
