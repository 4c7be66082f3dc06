"""CUDA as a device: memory, one stream, and captured graphs, through NVIDIA's own bindings (``cuda-python``).

Owns every call of the CUDA runtime. It needs no torch, only malloc, memcpy, a stream and graph capture.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from balcony_edge.bundle.manifest import DType
from balcony_edge.errors import DeviceError, MissingDependencyError
from balcony_runtime.backends.device import Region

try:
    from cuda.bindings import runtime as cudart
except ImportError as missing:
    raise MissingDependencyError(
        "cuda-python is not installed: pip install 'balcony-edge[tensorrt]' for engines, or '[gpu]' for ONNX Runtime"
    ) from missing


def check(result: tuple[Any, ...]) -> Any:
    """Check the error code of a call of the CUDA runtime and return its other results.

    Raises:
        DeviceError: the call failed; one line with CUDA's message and a cure.
    """
    code, *values = result
    if code != cudart.cudaError_t.cudaSuccess:
        words = cudart.cudaGetErrorString(code)[1].decode()
        raise DeviceError(f"CUDA: {words} ({code.name}): {_cure(code)}")
    return values[0] if len(values) == 1 else tuple(values)


def _cure(code: Any) -> str:
    errors = cudart.cudaError_t
    if code in (errors.cudaErrorInsufficientDriver, errors.cudaErrorNoDevice):
        return "install NVIDIA's driver, or run on the CPU with --device cpu"
    if code == errors.cudaErrorMemoryAllocation:
        return "ask for a shorter context or a smaller batch, or free memory of the GPU"
    return "look at `nvidia-smi` and dmesg; the GPU may need a reset"


def compute_capability() -> str:
    """Compute capability of the first GPU, such as ``87``.

    Raises:
        DeviceError: there is no driver or no GPU.
    """
    check(cudart.cudaGetDeviceCount())
    attributes = cudart.cudaDeviceAttr
    major, minor = (
        check(cudart.cudaDeviceGetAttribute(attribute, 0))
        for attribute in (attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor)
    )
    return f"{major}{minor}"


class _Captured:
    """A captured graph. It is destroyed with this object; CUDA still finishes launches that are running."""

    def __init__(self, executable: Any, stream: int) -> None:
        self._executable, self._stream = executable, stream
        weakref.finalize(self, cudart.cudaGraphExecDestroy, executable)

    def __call__(self) -> None:
        check(cudart.cudaGraphLaunch(self._executable, self._stream))


class CudaDevice:
    """The first GPU; implements :class:`.device.Device`.

    Args:
        capture: whether decode steps become CUDA graphs; otherwise their launches run one after another.

    Raises:
        DeviceError: there is no driver or no GPU.
    """

    def __init__(self, *, capture: bool = True) -> None:
        self.capability = compute_capability()
        self._capture = capture
        stream = check(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        #: The stream of all work.
        self.stream = int(stream)
        self._regions: set[int] = set()
        # Page-locked memory, so that a step's few bytes need no intermediate copy.
        self._pinned_bytes = 1 << 16
        self._pinned = int(check(cudart.cudaMallocHost(self._pinned_bytes)))

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Region:
        region = Region(0, shape, dtype)
        pointer = int(check(cudart.cudaMallocAsync(max(region.nbytes, 1), self.stream)))
        self._regions.add(pointer)
        check(cudart.cudaMemsetAsync(pointer, 0, max(region.nbytes, 1), self.stream))
        return Region(pointer, shape, dtype)

    def free(self, region: Region) -> None:
        if region.pointer in self._regions:
            self._regions.remove(region.pointer)
            check(cudart.cudaFreeAsync(region.pointer, self.stream))

    def upload(self, region: Region, array: npt.NDArray[Any]) -> None:
        array = np.ascontiguousarray(array, region.dtype)
        assert array.shape == region.shape, (array.shape, region.shape)
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        # The array is pageable memory, so CUDA has read it when the call returns.
        check(cudart.cudaMemcpyAsync(region.pointer, array.ctypes.data, region.nbytes, kind, self.stream))

    def download(self, region: Region) -> npt.NDArray[Any]:
        array = np.empty(region.shape, region.dtype)
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        small = region.nbytes <= self._pinned_bytes
        target = self._pinned if small else array.ctypes.data
        check(cudart.cudaMemcpyAsync(target, region.pointer, region.nbytes, kind, self.stream))
        self.synchronize()
        if small:
            kind = cudart.cudaMemcpyKind.cudaMemcpyHostToHost
            check(cudart.cudaMemcpy(array.ctypes.data, self._pinned, region.nbytes, kind))
        return array

    def copy(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        check(cudart.cudaMemcpy2DAsync(target, target_pitch, source, source_pitch, width, height, kind, self.stream))

    def captured(self, launches: Sequence[Callable[[], None]]) -> Callable[[], None]:
        def all_of_them() -> None:
            for launch in launches:
                launch()

        if not self._capture:
            return all_of_them
        all_of_them()  # engines initialise themselves at the first launch, which a capture cannot record
        self.synchronize()
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check(cudart.cudaStreamBeginCapture(self.stream, mode))
        try:
            all_of_them()
        finally:
            graph = check(cudart.cudaStreamEndCapture(self.stream))
        executable = check(cudart.cudaGraphInstantiate(graph, 0))
        check(cudart.cudaGraphDestroy(graph))
        return _Captured(executable, self.stream)

    def synchronize(self) -> None:
        """Wait for all work on the stream."""
        check(cudart.cudaStreamSynchronize(self.stream))

    def close(self) -> None:
        self.synchronize()
        for pointer in self._regions:
            check(cudart.cudaFreeAsync(pointer, self.stream))
        self.synchronize()
        check(cudart.cudaFreeHost(self._pinned))
        check(cudart.cudaStreamDestroy(self.stream))
        self._regions = set()
