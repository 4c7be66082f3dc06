"""Memory and graphs of an accelerator, as :mod:`.state` needs them; main memory is one such device.

Two protocols: a :class:`Device` owns memory and the order of work on it, an :class:`Executor` runs graphs over it. The device
of CUDA is in :mod:`.cuda`; the executors of TensorRT and ONNX Runtime are in :mod:`.tensorrt` and :mod:`.onnxruntime`.
:class:`HostDevice` is main memory, with which the same state and the same graph files run on a CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from balcony_edge.bundle.manifest import DType

#: Bytes that divide the address of every tensor of an engine: NVIDIA asks for it at ``IExecutionContext.set_tensor_address``.
ALIGNMENT = 256
ITEM_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1}


def array_dtype(dtype: DType) -> np.dtype[Any]:
    """The type of an array that holds a region's values. NumPy has no bfloat16, so its bits are unsigned integers."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


def stored_copy(region: Region, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A dense copy of an array in a region's type."""
    assert array.shape == region.shape, (array.shape, region.shape)
    return np.array(array, array_dtype(region.dtype), order="C")


@dataclass(frozen=True, slots=True)
class Region:
    """A dense tensor in device memory: its address, shape and type."""

    pointer: int
    shape: tuple[int, ...]
    dtype: DType

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def part(self, index: int, shape: tuple[int, ...]) -> Region:
        """The dense tensor of ``shape`` that begins ``index`` values after the start."""
        return Region(self.pointer + index * ITEM_BYTES[self.dtype], shape, self.dtype)


class Launch(NamedTuple):
    """One graph over the regions that it is bound to.

    Attributes:
        run: puts the graph's work into the device's queue.
        may_capture: whether that work can be captured; it is asked after the first run.
    """

    run: Callable[[], None]
    may_capture: Callable[[], bool] = lambda: False


class Device(Protocol):
    """Memory, and one queue of work on it: calls take effect in order, not necessarily at once."""

    def current(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the calling thread uses this device; every other call needs it."""
        ...

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Region:
        """Allocate a region of zeros; its address is a multiple of :data:`ALIGNMENT`.

        Raises:
            DeviceError: there is not enough memory.
        """
        ...

    def free(self, region: Region) -> None:
        """Free a region; does nothing if the device is closed."""
        ...

    def upload(self, region: Region, array: npt.NDArray[Any]) -> None:
        """Copy an array to a region of the same type and shape."""
        ...

    def download(self, region: Region) -> npt.NDArray[Any]:
        """Copy a region to main memory, into an array that the caller owns; waits for all earlier work."""
        ...

    def copy(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        """Copy ``height`` runs of ``width`` bytes; consecutive runs begin one pitch apart."""
        ...

    def clear(self, region: Region) -> None:
        """Set a region to zeros."""
        ...

    def captured(self, launch: Launch) -> Launch:
        """Run a launch once and capture it, over the regions that it is bound to; return it unchanged if that is impossible."""
        ...

    def joined(self, launches: Sequence[Launch]) -> Callable[[], None]:
        """One call for launches of :meth:`captured`, in this order."""
        ...

    def collect(self) -> None:
        """Destroy the programs that nobody uses any more, and let go of what they used."""
        ...

    def synchronize(self) -> None:
        """Wait for all work so far."""
        ...

    def close(self) -> None:
        """Free all memory. It does not raise: after an error of the device, the caller's own error is the one to show."""
        ...


class Executor(Protocol):
    """Loaded graphs of one engine set."""

    #: Whether a present cache may be the same region as the past one.
    in_place: bool
    #: Most members of a pass; None: any number.
    most_members: int | None

    def prepare(self, graph: str, tensors: Mapping[str, Region], *, to_capture: bool = False) -> Launch:
        """Make a launch of a graph with these inputs and outputs.

        Args:
            graph: name of the graph.
            tensors: its inputs and outputs by name.
            to_capture: whether :meth:`Device.captured` gets the launch. Such a launch shares nothing that later ones change.

        Raises:
            DeviceError: the engine refuses the shapes.
        """
        ...

    def close(self) -> None:
        """Free the graphs."""
        ...


def in_turn(launches: Sequence[Launch]) -> Callable[[], None]:
    """A call that runs launches one after another."""

    def run() -> None:
        for launch in launches:
            launch.run()

    return run


class HostDevice:
    """Main memory as a device; every call takes effect at once."""

    def __init__(self) -> None:
        self._arrays: dict[int, npt.NDArray[np.uint8]] = {}

    def current(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Region:
        array = np.zeros(math.prod(shape) * ITEM_BYTES[dtype] + ALIGNMENT, np.uint8)
        pointer = -(-array.ctypes.data // ALIGNMENT) * ALIGNMENT
        self._arrays[pointer] = array
        return Region(pointer, shape, dtype)

    def free(self, region: Region) -> None:
        self._arrays.pop(region.pointer, None)

    def upload(self, region: Region, array: npt.NDArray[Any]) -> None:
        array = stored_copy(region, array)
        ctypes.memmove(region.pointer, array.ctypes.data, region.nbytes)

    def download(self, region: Region) -> npt.NDArray[Any]:
        array = np.empty(region.shape, array_dtype(region.dtype))
        ctypes.memmove(array.ctypes.data, region.pointer, region.nbytes)
        return array

    def copy(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        for run in range(height):
            ctypes.memmove(target + run * target_pitch, source + run * source_pitch, width)

    def clear(self, region: Region) -> None:
        ctypes.memset(region.pointer, 0, region.nbytes)

    def captured(self, launch: Launch) -> Launch:
        return launch

    def joined(self, launches: Sequence[Launch]) -> Callable[[], None]:
        return in_turn(launches)

    def collect(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        self._arrays.clear()
