"""Memory and graphs of an accelerator, as :mod:`.device_state` needs them, and main memory as one more of them.

Two protocols: a :class:`Device` owns memory and the order of work on it, an :class:`Executor` runs graphs over it. CUDA's are
:mod:`.cuda`, TensorRT's and ONNX Runtime's are :mod:`.tensorrt` and :mod:`.onnxruntime_device`. :class:`HostDevice` is the
main memory: over it the same state and the same graph files run on a CPU.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from balcony_edge.bundle.manifest import DType

ITEM_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1}


@dataclass(frozen=True, slots=True)
class Region:
    """A tensor in device memory: where it begins, its shape and type; dense."""

    pointer: int
    shape: tuple[int, ...]
    dtype: DType

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def part(self, index: int, shape: tuple[int, ...]) -> Region:
        """The dense tensor of ``shape`` that begins ``index`` values behind the start."""
        return Region(self.pointer + index * ITEM_BYTES[self.dtype], shape, self.dtype)


class Device(Protocol):
    """Memory, and one queue of work over it: calls take effect in order, not necessarily at once."""

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Region:
        """A region of zeros.

        Raises:
            DeviceError: there is not enough memory.
        """
        ...

    def free(self, region: Region) -> None:
        """Give a region back; nothing happens where the device is closed."""
        ...

    def upload(self, region: Region, array: npt.NDArray[Any]) -> None:
        """Copy an array of the region's type and shape to it."""
        ...

    def download(self, region: Region) -> npt.NDArray[Any]:
        """A copy in main memory, as an array that the caller owns; waits for all work before it."""
        ...

    def copy(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        """Copy ``height`` runs of ``width`` bytes, which begin a pitch apart."""
        ...

    def captured(self, launches: Sequence[Callable[[], None]]) -> Callable[[], None]:
        """The launches as one; they are run once or twice for it, over the regions that they are bound to."""
        ...

    def synchronize(self) -> None:
        """Wait for all work so far."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Executor(Protocol):
    """Loaded graphs of one engine set."""

    #: Whether a present cache may be the region of the past one.
    in_place: bool
    #: Members of every pass; None: any number.
    batch_size: int | None

    def prepare(self, graph: str, tensors: Mapping[str, Region]) -> Callable[[], None]:
        """A launch of a graph over these inputs and outputs.

        Raises:
            DeviceError: the engine refuses the shapes.
        """
        ...

    def close(self) -> None:
        """Free the graphs."""
        ...


class HostDevice:
    """Main memory as a device: what runs here at once."""

    def __init__(self) -> None:
        self._arrays: dict[int, npt.NDArray[np.uint8]] = {}

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Region:
        array = np.zeros(max(math.prod(shape) * ITEM_BYTES[dtype], 1), np.uint8)
        self._arrays[array.ctypes.data] = array
        return Region(array.ctypes.data, shape, dtype)

    def free(self, region: Region) -> None:
        self._arrays.pop(region.pointer, None)

    def upload(self, region: Region, array: npt.NDArray[Any]) -> None:
        array = np.ascontiguousarray(array, region.dtype)
        assert array.shape == region.shape, (array.shape, region.shape)
        ctypes.memmove(region.pointer, array.ctypes.data, region.nbytes)

    def download(self, region: Region) -> npt.NDArray[Any]:
        array = np.empty(region.shape, region.dtype)
        ctypes.memmove(array.ctypes.data, region.pointer, region.nbytes)
        return array

    def copy(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        for run in range(height):
            ctypes.memmove(target + run * target_pitch, source + run * source_pitch, width)

    def captured(self, launches: Sequence[Callable[[], None]]) -> Callable[[], None]:
        def all_of_them() -> None:
            for launch in launches:
                launch()

        return all_of_them

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        self._arrays.clear()
