"""Arrays of sequences in one mapping; weights in large pages: which memory is moved, and that its content stays."""

from __future__ import annotations

import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from balcony_runtime.backends.onnxruntime import host_memory
from balcony_runtime.backends.onnxruntime.host_memory import give_back, mapped, use_large_pages, zeros

MB = 1 << 20


def test_arrays_of_one_mapping_share_no_page() -> None:
    kinds: tuple[tuple[tuple[int, ...], type], ...] = (
        ((2, 700, 3), np.float32),
        ((1, 5), np.int64),
        ((4097,), np.int8),
    )
    arrays = zeros(*kinds)
    assert [(array.shape, array.dtype) for array in arrays] == [(shape, np.dtype(kind)) for shape, kind in kinds]
    assert all(array.ctypes.data % mmap.PAGESIZE == 0 and not array.any() for array in arrays)
    for number, array in enumerate(arrays, 1):
        array[...] = number
    assert [(array.min(), array.max()) for array in arrays] == [(1, 1), (2, 2), (3, 3)]
    give_back([arrays[0]])  # whole pages only: of 4 kB, 16,800 bytes have four and a little more
    assert [array.max() for array in arrays] == [1, 2, 3]
    whole = arrays[0].nbytes // mmap.PAGESIZE * mmap.PAGESIZE
    assert not arrays[0].reshape(-1)[: whole // 4].any() or sys.platform != "linux"


@pytest.fixture
def large() -> int:
    """Size of the system's large pages."""
    try:
        enabled, size = ((host_memory._LARGE_PAGES / name).read_text() for name in ("enabled", "hpage_pmd_size"))
    except OSError:
        pytest.skip("this system has no large pages")
    if "[never]" in enabled or int(size) > 4 * MB:
        pytest.skip("this system offers no large pages of a few megabytes")
    return int(size)


@pytest.fixture
def region() -> Iterator[mmap.mmap]:
    """Memory of 32 MB that nothing has used; closed after the test."""
    with mmap.mmap(-1, 32 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as region:
        yield region


def large_bytes(address: int) -> int:
    """Bytes in large pages of the mappings of a region, of which an advice about a part makes several."""
    inside, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) < address + 32 * MB and address < int(span[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            found += int(line.split()[1]) * 1024
    return found


def place(region: mmap.mmap) -> int:
    return np.frombuffer(region, np.uint8).ctypes.data


def test_memory_in_use_is_moved_with_its_content(large: int, region: mmap.mmap) -> None:
    before = [span for span in mapped() if not span[0] <= place(region) < span[1]]
    half = np.frombuffer(region, np.uint8)[: 16 * MB]
    half[:] = np.random.default_rng(0).integers(0, 256, half.size, np.uint8)
    copy = half.copy()
    moved = use_large_pages(before)
    if moved < 12 * MB:
        pytest.skip("the system is older than this call, or has too few large pages free")
    assert moved % large == 0 and np.array_equal(half, copy)
    assert 12 * MB <= large_bytes(place(region)) <= 16 * MB  # the unused half takes none
    del half


def test_memory_that_was_there_before_stays(large: int, region: mmap.mmap) -> None:
    np.frombuffer(region, np.uint8)[:] = 1
    everything, had = mapped(), large_bytes(place(region))
    assert any(begin <= place(region) < end for begin, end in everything)
    assert use_large_pages([(0, 1 << 62)]) == 0
    assert use_large_pages(everything) <= 4 * large  # what other threads took meanwhile
    assert large_bytes(place(region)) == had


@pytest.mark.parametrize("files", [{}, {"enabled": "always madvise [never]", "hpage_pmd_size": "2097152"}])
def test_systems_without_large_pages_are_left_alone(
    files: dict[str, str], region: mmap.mmap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(host_memory, "_LARGE_PAGES", tmp_path)
    np.frombuffer(region, np.uint8)[:] = 1
    had = large_bytes(place(region))
    assert use_large_pages([]) == 0 and large_bytes(place(region)) == had
