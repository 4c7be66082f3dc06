"""An engine set on an accelerator: its memory, who uses the device, and pools of sequences."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Iterator

from balcony_edge.bundle.manifest import DType, EngineSet, Manifest
from balcony_edge.closing import Closing
from balcony_edge.errors import DeviceError, InputError
from balcony_runtime.backends.accelerator.device import Device, Executor, Region
from balcony_runtime.backends.accelerator.pool import DevicePool
from balcony_runtime.backends.accelerator.state import DeviceState
from balcony_runtime.backends.accelerator.workspace import Regions, Workspace
from balcony_runtime.backends.base import closed


class DeviceBackend(Closing):
    """An engine set that runs on a device; implements :class:`balcony_runtime.backends.base.Backend`."""

    def __init__(self, manifest: Manifest, engines: EngineSet, device: Device, executor: Executor, name: str) -> None:
        self.manifest, self.engines = manifest, engines
        self.device, self.executor = device, executor
        self.name, self.graphs = name, f"engine set {engines.identity[:16]}"
        #: The device does the work; one thread of the host starts it.
        self.threads = 1
        self.max_length = engines.context_length
        self.most_members = executor.most_members
        self.picks_inside = True
        #: Type of a row at a boundary.
        self.row_dtype: DType = engines.graphs["embed"].outputs[0].dtype
        #: All sequences share one queue of work and its contexts, so only one thread at a time may use them.
        self.lock = threading.RLock()
        #: Memory of collected states and pools. The next state takes it, or frees it: a state may be collected in any thread,
        #: even during a capture.
        self.returned: deque[Regions] = deque()
        #: All memory in use and returned.
        self.memories: weakref.WeakSet[Regions] = weakref.WeakSet()
        self._closed, self._inside = False, 0  # how many contexts of :meth:`alone` are open, all in one thread

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A context in which the calling thread has the device to itself; an error once its memory is freed."""
        with self.lock:
            if self._closed:
                raise closed()
            self._inside += 1
            try:
                with self.device.current():
                    yield
            finally:
                self._inside -= 1
                if self._closed and not self._inside:
                    self._free()

    def new_state(self, batch_size: int, max_length: int) -> DeviceState:
        """Memory for one sequence. It has the length of the engines' caches, whatever ``max_length`` is.

        Raises:
            InputError: the engines were built for fewer members.
            DeviceError: there is not enough memory.
        """
        if self.most_members is not None and batch_size > self.most_members:
            raise InputError(
                f"batch_size = {batch_size}: these engines were built for at most {self.most_members}: "
                f"build others with --batch {batch_size}"
            )
        with self.alone():
            workspace = None
            for _ in range(len(self.returned)):
                old = self.returned.popleft()
                if not isinstance(old, Workspace) or old.batch_size != batch_size:
                    old.free()
                elif workspace is None:
                    workspace = old
                else:
                    self.returned.append(old)  # with its captures; :meth:`allocate` frees it where memory runs out
            if workspace is None:
                workspace = Workspace(self, batch_size)
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

    def new_pool(self, members: int, max_length: int) -> DevicePool | None:
        """Memory for sequences that share passes: as many as the engine set was built for.

        None for engines that write their caches to other memory: a pass takes some of the members, and the others would have
        to be at the same one.

        Raises:
            DeviceError: there is not enough memory.
        """
        if not self.executor.in_place:
            return None
        with self.alone():
            while self.returned:  # memory of the measured prices, which no member takes
                self.returned.pop().free()
            return DevicePool(self, min(members, self.engines.batch_size))

    def close(self) -> None:
        """Free engines and memory; may be called several times.

        In the handler of a signal in the middle of a pass of this thread, the pass frees them at its end: it still uses them.
        """
        with self.lock:
            free, self._closed = not (self._closed or self._inside), True
            if free:
                self._free()

    def _free(self) -> None:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(DeviceError):  # a lost GPU cannot be chosen, and has nothing left to free
                stack.enter_context(self.device.current())
            with contextlib.suppress(DeviceError):
                self.device.synchronize()  # passes may still run
            for memory in list(self.memories):
                memory.forget_programs()  # they hold contexts of the engines
            with contextlib.suppress(DeviceError):
                self.device.collect()
            self.executor.close()
            self.device.close()
