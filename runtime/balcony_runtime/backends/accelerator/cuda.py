"""CUDA as a device: memory, one stream, and captured graphs, through NVIDIA's own bindings (``cuda-python``).

Owns every call of the CUDA runtime. It needs no torch, only malloc, memcpy, a stream and graph capture. All of it uses one
GPU, :data:`DEVICE`; CUDA_VISIBLE_DEVICES says which of a machine's GPUs that is.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from balcony_edge.bundle.manifest import DType
from balcony_edge.errors import DeviceError, MissingDependencyError
from balcony_runtime.backends.accelerator.device import Launch, Region, array_dtype, in_turn, stored_copy

try:
    from cuda.bindings import runtime as cudart
except ImportError as missing:
    if sys.platform == "darwin":  # no extra brings it there
        raise MissingDependencyError("macOS has no CUDA: run with --device cpu") from missing
    raise MissingDependencyError(
        "cuda-python is not installed: pip install 'balcony-edge[tensorrt]' for engines, or '[gpu]' for ONNX Runtime"
    ) from missing

#: Number of the GPU among those that CUDA shows this process.
DEVICE = 0
#: Most bytes from one run of a copy to the next: `cudaDevAttrMaxPitch` of every card so far.
MAX_PITCH = 2**31 - 1
#: Errors after which every call of the process fails: NVIDIA's documentation asks to end the process and start it again.
_LOST = (
    "cudaErrorIllegalAddress",
    "cudaErrorLaunchTimeout",
    "cudaErrorAssert",
    "cudaErrorHardwareStackError",
    "cudaErrorIllegalInstruction",
    "cudaErrorMisalignedAddress",
    "cudaErrorInvalidAddressSpace",
    "cudaErrorInvalidPc",
    "cudaErrorLaunchFailure",
    "cudaErrorECCUncorrectable",
    "cudaErrorContained",
    "cudaErrorTensorMemoryLeak",
)
_log = logging.getLogger(__name__)


def check(result: tuple[Any, ...]) -> Any:
    """Check the error code of a call of the CUDA runtime and return its other results.

    Raises:
        DeviceError: the call failed; one line with CUDA's message and a cure.
    """
    code, *values = result
    if code != cudart.cudaError_t.cudaSuccess:
        # CUDA also keeps the error for the thread's next cudaGetLastError, with which other libraries check their launches.
        cudart.cudaGetLastError()
        words = cudart.cudaGetErrorString(code)[1].decode()
        raise DeviceError(f"CUDA: {words} ({code.name}): {_cure(code)}")
    return values[0] if len(values) == 1 else tuple(values)


def _cure(code: Any) -> str:
    errors = cudart.cudaError_t
    driver = cudart.cudaDriverGetVersion()[1] if code == errors.cudaErrorInsufficientDriver else 0
    if driver:
        runtime = cudart.cudaRuntimeGetVersion()[1]
        return (
            f"the driver supports CUDA {_version(driver)}, and cuda-python is for CUDA {_version(runtime)}: update the driver, "
            f"or pip install 'cuda-python=={driver // 1000}.*'"
        )
    if code in (errors.cudaErrorInsufficientDriver, errors.cudaErrorNoDevice):
        board = (
            " (on a Jetson: put this user into the groups video and render)" if code == errors.cudaErrorNoDevice else ""
        )
        return f"install NVIDIA's driver{board}, or run on the CPU with --device cpu"
    if code == errors.cudaErrorMemoryAllocation:
        return (
            "free memory of the GPU, ask for a smaller batch, or build the engine set with a smaller --context-length"
        )
    if code.name in _LOST:
        return "this process can no longer use the GPU: start it again, and look at dmesg if that does not help"
    return "look at `nvidia-smi` and dmesg; the GPU may need a reset"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def compute_capability() -> str:
    """Compute capability of the GPU, such as ``87``.

    Raises:
        DeviceError: there is no driver or no GPU.
    """
    check(cudart.cudaGetDeviceCount())
    attributes = cudart.cudaDeviceAttr
    major, minor = (
        check(cudart.cudaDeviceGetAttribute(attribute, DEVICE))
        for attribute in (attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor)
    )
    return f"{major}{minor}"


def pci_bus_id() -> str:
    """Address of the GPU on the PCI bus, such as ``0000:65:00.0``: NVML and CUDA number GPUs differently.

    Raises:
        DeviceError: there is no driver or no GPU.
    """
    address: bytes = check(cudart.cudaDeviceGetPCIBusId(32, DEVICE))
    return address.split(b"\0")[0].decode()


class _Graph:
    """A CUDA graph as a call that launches it.

    Args:
        device: device that runs it, and destroys its parts when this object is gone.
        graph: handle of the graph.
        keeps: what must live as long: an engine's context owns memory that a captured graph uses.
    """

    def __init__(self, device: CudaDevice, graph: Any, keeps: object) -> None:
        self.handle, self._device, self._keeps = graph, device, keeps
        self._executable: Any = None
        device.own(self, cudart.cudaGraphDestroy, graph, keeps)

    def instantiate(self) -> None:
        """Make the graph ready to launch."""
        if self._executable is None:
            self._executable = check(cudart.cudaGraphInstantiate(self.handle, 0))
            self._device.own(self, cudart.cudaGraphExecDestroy, self._executable, self._keeps)

    def __call__(self) -> None:
        check(cudart.cudaGraphLaunch(self._executable, self._device.stream))


class CudaDevice:
    """The GPU; implements :class:`.device.Device`.

    Args:
        capture: whether launches that allow it become CUDA graphs; otherwise they run one after another.

    Raises:
        DeviceError: there is no driver or no GPU.
    """

    def __init__(self, *, capture: bool = True) -> None:
        self.capability = compute_capability()
        self._capture = capture
        # Graphs and executables with the call that destroys them and what must outlive them, and those that nobody uses any
        # more. Python may collect an object in any thread at any time, even during a capture, so they are destroyed later.
        self._owned: dict[object, tuple[Callable[[Any], tuple[Any, ...]], Any, object]] = {}
        self._dropped: deque[object] = deque()
        self._regions: set[int] = set()
        self._uploads: list[npt.NDArray[Any]] = []
        self._warned: set[str] = set()
        self._open = True
        #: Integrated GPUs and old drivers may have no memory pools.
        attribute = cudart.cudaDeviceAttr.cudaDevAttrMemoryPoolsSupported
        self._pools = bool(check(cudart.cudaDeviceGetAttribute(attribute, DEVICE)))
        # Page-locked memory, so that a step's few bytes need no intermediate copy.
        self._pinned_bytes = 1 << 16
        with self.current():
            #: The stream of all work.
            self.stream = int(check(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking)))
            try:
                self._pinned = int(check(cudart.cudaMallocHost(self._pinned_bytes)))
            except DeviceError:
                cudart.cudaStreamDestroy(self.stream)
                raise

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """A context in which the calling thread uses this GPU; afterwards it uses the one that the application chose."""
        before = check(cudart.cudaGetDevice())
        check(cudart.cudaSetDevice(DEVICE))
        try:
            yield
        finally:
            if before != DEVICE:
                cudart.cudaSetDevice(before)

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Region:
        self.collect()
        size = max(Region(0, shape, dtype).nbytes, 1)
        allocated = cudart.cudaMallocAsync(size, self.stream) if self._pools else cudart.cudaMalloc(size)
        region = Region(int(check(allocated)), shape, dtype)
        self._regions.add(region.pointer)
        self.clear(region)
        return region

    def free(self, region: Region) -> None:
        if region.pointer in self._regions:
            self._regions.remove(region.pointer)
            check(self._freed(region.pointer))

    def _freed(self, pointer: int) -> Any:
        if self._pools:
            return cudart.cudaFreeAsync(pointer, self.stream)
        cudart.cudaStreamSynchronize(self.stream)  # work in the stream may still use the memory
        return cudart.cudaFree(pointer)

    def upload(self, region: Region, array: npt.NDArray[Any]) -> None:
        # A copy from pageable memory may, but need not, be over when the call returns (CUDA, "API synchronization behavior").
        array = stored_copy(region, array)
        self._uploads.append(array)
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(cudart.cudaMemcpyAsync(region.pointer, array.ctypes.data, region.nbytes, kind, self.stream))

    def download(self, region: Region) -> npt.NDArray[Any]:
        array = np.empty(region.shape, array_dtype(region.dtype))
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        small = region.nbytes <= self._pinned_bytes
        target = self._pinned if small else array.ctypes.data
        check(cudart.cudaMemcpyAsync(target, region.pointer, region.nbytes, kind, self.stream))
        self.synchronize()
        if small:
            ctypes.memmove(array.ctypes.data, self._pinned, region.nbytes)
        return array

    def copy(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        if max(target_pitch, source_pitch) <= MAX_PITCH:
            check(
                cudart.cudaMemcpy2DAsync(target, target_pitch, source, source_pitch, width, height, kind, self.stream)
            )
            return
        for run in range(height):  # boundaries of 131,072 rows of 8,192 values in float16 are 2 GiB apart
            ends = target + run * target_pitch, source + run * source_pitch
            check(cudart.cudaMemcpyAsync(*ends, width, kind, self.stream))

    def clear(self, region: Region) -> None:
        check(cudart.cudaMemsetAsync(region.pointer, 0, max(region.nbytes, 1), self.stream))

    def captured(self, launch: Launch) -> Launch:
        if not self._capture:
            return launch
        self.collect()
        launch.run()  # engines initialise themselves at the first launch, which a capture cannot record
        self.synchronize()
        if not launch.may_capture():
            return launch
        try:
            graph = _Graph(self, self._recorded(launch), launch)
        except DeviceError as error:
            self._warn(error, "this part of a decode step runs without a CUDA graph")
            return launch
        return Launch(graph)

    def _warn(self, error: DeviceError, what: str) -> None:
        """Say once, and not for every sequence, that a step is slower than it could be; raises if the GPU is lost."""
        self.synchronize()
        if str(error) not in self._warned:
            self._warned.add(str(error))
            _log.warning("%s; %s, which is slower", error, what)

    def _recorded(self, launch: Launch) -> Any:
        """Capture a launch and return the graph's handle."""
        check(cudart.cudaStreamBeginCapture(self.stream, cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
        try:
            launch.run()
        except BaseException:  # a capture must end; its own error would hide the first
            code, graph = cudart.cudaStreamEndCapture(self.stream)
            if code == cudart.cudaError_t.cudaSuccess:
                cudart.cudaGraphDestroy(graph)
            cudart.cudaGetLastError()
            raise
        return check(cudart.cudaStreamEndCapture(self.stream))

    def joined(self, launches: Sequence[Launch]) -> Callable[[], None]:
        graphs = [launch.run for launch in launches if isinstance(launch.run, _Graph)]
        if len(graphs) == len(launches):
            try:
                return self._one(graphs, launches)
            except DeviceError as error:  # a graph with nodes of memory cannot be a part of another one
                self._warn(error, "a decode step runs as several CUDA graphs")
        for graph in graphs:
            graph.instantiate()
        return in_turn(launches)

    def _one(self, graphs: Sequence[_Graph], launches: Sequence[Launch]) -> Callable[[], None]:
        """One graph of several."""
        whole = _Graph(self, check(cudart.cudaGraphCreate(0)), launches)
        last: list[Any] = []
        for graph in graphs:  # each after the one before
            last = [check(cudart.cudaGraphAddChildGraphNode(whole.handle, last or None, len(last), graph.handle))]
        whole.instantiate()
        return whole

    def own(self, user: object, destroy: Callable[[Any], tuple[Any, ...]], handle: Any, keeps: object) -> None:
        """Destroy a part of CUDA after its user is gone, or when the device closes; ``keeps`` lives until then."""
        key = object()
        self._owned[key] = (destroy, handle, keeps)
        weakref.finalize(user, self._dropped.append, key)

    def collect(self) -> None:
        """Destroy the graphs that nobody uses any more; not during a capture."""
        while self._dropped:
            if (owned := self._owned.pop(self._dropped.popleft(), None)) is not None:
                check(owned[0](owned[1]))
            del owned  # what it kept may now be dropped, too

    def synchronize(self) -> None:
        """Wait for all work on the stream."""
        check(cudart.cudaStreamSynchronize(self.stream))
        self._uploads.clear()

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        # After an error that lost the GPU each of these fails, and the caller has the first error already.
        with _logged(), self.current():
            for call, argument in (
                (cudart.cudaStreamSynchronize, self.stream),
                *((destroy, handle) for destroy, handle, _ in self._owned.values()),
                *((self._freed, pointer) for pointer in self._regions),
                (cudart.cudaStreamSynchronize, self.stream),
                (cudart.cudaFreeHost, self._pinned),
                (cudart.cudaStreamDestroy, self.stream),
            ):
                with _logged():
                    check(call(argument))
        self._owned.clear()
        self._regions.clear()


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """A context that writes an error of the device to the log instead of raising it."""
    try:
        yield
    except DeviceError as error:
        _log.debug("while closing: %s", error)
