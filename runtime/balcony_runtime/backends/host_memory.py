"""Main memory that is taken page by page, as rows are written.

Owns the allocation of a sequence's arrays. They are as long as the context, of which most replies use little, so they must
cost neither memory nor time before they are written. NumPy's zeros guarantee neither: NumPy asks for pages of 2 MB if the
system offers them (one touched row then takes 2 MB for each head of each layer), and the allocator clears reused memory by
writing to it. Each array is therefore a memory mapping of its own with small pages, which the system clears on first use.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

#: Windows has no such flags; there, memory is taken on first use without them.
_OPTIONS: dict[str, Any] = {}
if hasattr(mmap, "MAP_ANONYMOUS"):
    _OPTIONS["flags"] = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
#: Private anonymous pages are zeros again after this call on Linux; elsewhere that is not promised.
_MADVISE = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array of zeros on a page boundary, whose pages take memory when they are first written.

    Raises:
        MemoryError: the address space has no room for it.
    """
    count, kind = math.prod(shape), np.dtype(dtype)
    try:
        region = mmap.mmap(-1, max(count * kind.itemsize, 1), **_OPTIONS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"{count * kind.itemsize} bytes") from error
    with contextlib.suppress(AttributeError, OSError):  # a system without large pages
        region.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(region, kind, count).reshape(shape)


def touched_bytes(array: npt.NDArray[Any], axis: int, rows: int) -> int:
    """Bytes of the pages that contain the first ``rows`` entries along an axis of an array from :func:`zeros`."""
    lead, row_bytes = math.prod(array.shape[:axis]), array.strides[axis]
    pages = -(-rows * row_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    return min(lead * pages, -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)


def give_back(arrays: Iterable[npt.NDArray[Any]]) -> None:
    """Return the whole pages of contiguous parts of arrays from :func:`zeros` to the system; they read as zeros again.

    Does nothing where the system has no such call.
    """
    if _MADVISE is None:
        return
    for array in arrays:
        begin = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            _MADVISE(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
