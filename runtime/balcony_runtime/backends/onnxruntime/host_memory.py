"""Main memory: that of sequences is taken page by page, as rows are written, and that of weights in large pages.

Owns the allocation of a sequence's arrays. They are as long as the context, of which most replies use little, so they must
cost neither memory nor time before they are written. NumPy's zeros guarantee neither: NumPy asks for pages of 2 MB if the
system offers them (one touched row then takes 2 MB for each head of each layer), and the allocator clears reused memory by
writing to it. They lie in memory mappings of their own with small pages, which the system clears on first use.

Weights are read whole for every token, and pages of 2 MB spare the processor's address translation. ONNX Runtime allocates
them, so they are moved into such pages after loading (Linux 6.1).
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import itertools
import math
import mmap
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

#: Windows has no such flags. It also takes pages on first use, but counts all of them against its limit of memory at once.
_OPTIONS: dict[str, Any] = {}
if hasattr(mmap, "MAP_ANONYMOUS"):
    _OPTIONS["flags"] = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
#: Private anonymous pages are zeros again after this call on Linux; elsewhere that is not promised.
_MADVISE = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
#: Share of the small pages of a large one that must be in use, so that moving them takes hardly any more memory.
USED = 0.9
#: ``madvise``: make a large page of a range now, whatever its pages are at the moment.
_COLLAPSE = 25
#: The system's large pages: whether it offers them, and their size.
_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def zeros(*kinds: tuple[tuple[int, ...], npt.DTypeLike]) -> list[npt.NDArray[Any]]:
    """Arrays of zeros, one for each shape and type, on page boundaries; their pages take memory when they are first written.

    They share one mapping, since the system takes 15 to 40 µs to make one and as long to end it.

    Raises:
        MemoryError: the address space has no room for them.
    """
    counts = [math.prod(shape) for shape, _ in kinds]
    sizes = [count * np.dtype(dtype).itemsize for count, (_, dtype) in zip(counts, kinds, strict=True)]
    starts = [0, *itertools.accumulate(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes)]
    try:
        region = mmap.mmap(-1, max(starts[-1], 1), **_OPTIONS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"{starts[-1]} bytes") from error
    with contextlib.suppress(AttributeError, OSError):  # a system without large pages
        region.madvise(mmap.MADV_NOHUGEPAGE)
    parts = zip(kinds, counts, starts, strict=False)
    return [np.frombuffer(region, dtype, count, start).reshape(shape) for (shape, dtype), count, start in parts]


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
        address = array.__array_interface__["data"][0]  # array.ctypes would import, which the end of a process refuses
        begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (address + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            _MADVISE(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def mapped() -> list[tuple[int, int]]:
    """Private memory of this process without a file that can be written: begin and end of each range, ascending."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        span, flags, _, _, _, *name = line.split(maxsplit=5)
        if flags == "rw-p" and name in ([], ["[heap]"]):
            begin, end = (int(place, 16) for place in span.split("-"))
            found.append((begin, end))
    return found


def use_large_pages(before: Sequence[tuple[int, int]]) -> int:
    """Move memory that was not :func:`mapped` ``before`` into large pages; returns the bytes that were moved.

    Does nothing where the system offers no large pages, is older than this call, or has too little memory.
    """
    if _MADVISE is None:
        return 0
    moved = 0
    with contextlib.suppress(OSError, ValueError):
        if "[never]" in (_LARGE_PAGES / "enabled").read_text(encoding="ascii"):
            return 0
        size = int((_LARGE_PAGES / "hpage_pmd_size").read_text(encoding="ascii"))
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pages:
            for begin, end in mapped():
                for start in range(-(-begin // size) * size, end - size + 1, size):
                    known = any(first < start + size and start < last for first, last in before)
                    if known or _present(pages, start, size) < USED:
                        continue
                    where = ctypes.c_void_p(start), ctypes.c_size_t(size)
                    _MADVISE(*where, mmap.MADV_HUGEPAGE)
                    moved += size if _MADVISE(*where, _COLLAPSE) == 0 else 0
    return moved


def _present(pages: io.FileIO, start: int, size: int) -> float:
    """Share of a range's small pages that are in memory, from the process's table of pages (proc_pid_pagemap(5))."""
    pages.seek(8 * (start // mmap.PAGESIZE))
    entries = np.frombuffer(pages.read(8 * size // mmap.PAGESIZE), np.uint64)
    return float((entries >> np.uint64(63)).mean())  # the highest bit of an entry
