"""The machine as its files describe it: names of Arm cores, and the number of threads on cores of several speeds."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from balcony_edge.device import machine
from balcony_edge.device.machine import (
    Gpu,
    Machine,
    best_threads,
    checked_threads,
    cpu_features,
    machine_id,
    this_device,
)
from balcony_edge.errors import InputError

#: What Linux 6.12 prints for a core, with the tabs that it prints; there is no model name.
_CORE = (
    "processor\t: {number}\nBogoMIPS\t: 48.00\nFeatures\t: fp asimd evtstrm aes asimddp\nCPU implementer\t: {maker}\n"
    "CPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: {part}\nCPU revision\t: 1\n\n"
)
#: What qemu's emulation of user programs and kernels for 32-bit programs print before the numbers.
_NAMED = "model name\t: ARMv8 Processor rev 1 (v8l)\n"
_BOARD = "Hardware\t: BCM2835\nRevision\t: d04170\nSerial\t\t: 0123\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n"


def write_all(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


def cores(*parts: str, maker: str = "0x41") -> str:
    return "".join(_CORE.format(number=number, maker=maker, part=part) for number, part in enumerate(parts))


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (cores(*["0xd0b"] * 4) + _BOARD, "Cortex-A76"),
        (cores(*["0xd05"] * 4, *["0xd0b"] * 4), "Cortex-A55 + Cortex-A76"),
        (cores("0xd0b").replace("BogoMIPS", f"{_NAMED}BogoMIPS"), "Cortex-A76"),
        (cores("0x004", maker="0x4e"), "Carmel"),
        (cores("0xd0b", "0xfff"), "Cortex-A76 + Arm CPU part 0xfff of implementer 0x41"),
        (cores("0x051", maker="0x00"), "Arm CPU part 0x51 of implementer 0x0"),
        ("processor\t: 0\nmodel name\t: Some  CPU @ 2 GHz\nflags\t: fpu\n", "Some CPU @ 2 GHz"),
        (f"processor\t: 0\n\n{_BOARD}", "BCM2835"),
    ],
)
def test_cores_are_named(cpuinfo: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(cpuinfo)
    assert this_device(tmp_path).cpu == name


@pytest.mark.parametrize(
    ("tree", "cpus", "threads"),
    [
        ("rk3588", range(8), 4),  # 4 · 1024 is more than 8 · 397
        ("rk3588", range(6), 6),  # 6 · 397 is more than 2 · 1024
        ("rk3588", range(7), 3),
        ("rk3588", range(4), 4),  # the process may use slow cores only
        ("phone", range(8), 4),
        ("phone", (0, 7), 1),
        ("phone", (4, 7), 2),
        ("server", range(8), 8),  # no capacities
        ("rk3588", range(9), 9),  # a core of which the kernel says nothing
    ],
)
def test_slow_cores_get_no_threads(
    sysfs_tree: Callable[[str], Path],
    tree: str,
    cpus: range | tuple[int, ...],
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cpus))
    assert best_threads(sysfs_tree(tree)) == threads


def test_a_mac_names_its_chip_and_gives_slow_cores_no_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {b"machdep.cpu.brand_string": b"Apple M2\0", b"hw.perflevel0.physicalcpu": b"\x04\0\0\0"}

    class Library:
        """The C library's function, as sysctl(3) describes it."""

        def __init__(self, _: None) -> None: ...

        def sysctlbyname(self, name: bytes, value: Any, size: Any, *_: object) -> int:
            if name not in told:
                return -1
            size._obj.value = len(told[name])
            ctypes.memmove(value, told[name], len(told[name]))
            return 0

    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(machine, "available_cpus", lambda: 8)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert (machine.cpu_name(tmp_path), best_threads()) == ("Apple M2", 4)
    told.clear()  # with an Intel CPU: one kind of cores
    assert best_threads() == 8


#: Six cores with two hyper-threads each; and four of those beside eight efficient cores.
TWELVE = {f"cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 6},{cpu % 6 + 6}" for cpu in range(12)}
HYBRID = {f"cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu - cpu % 2}-{cpu - cpu % 2 + 1}" for cpu in range(8)} | {
    f"cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu}" for cpu in range(8, 16)
}
#: What Linux 6.16 gives next to hyper-threads, whose capacity it does not know.
ALIKE = {f"cpu/cpu{cpu}/cpu_capacity": "1024" for cpu in range(16)}


@pytest.mark.parametrize(
    ("files", "atom", "cpus", "threads"),
    [
        (TWELVE, None, range(12), 6),
        (TWELVE, None, (0, 6, 7), 2),
        (HYBRID, "8-15", range(16), 4),
        (HYBRID, None, range(16), 12),
        (HYBRID, "8-15", (8, 9, 12), 3),  # the process may use efficient cores only
        (HYBRID, "8-11,12,13-15", (0, 1, 12), 1),
        (HYBRID, "eight", range(16), 12),
        (HYBRID | ALIKE, "8-15", range(16), 4),
        (TWELVE | ALIKE, None, range(12), 6),
    ],
)
def test_hyper_threads_and_efficient_cores_get_no_threads(
    files: dict[str, str],
    atom: str | None,
    cpus: Any,
    threads: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_all(tmp_path / "devices/system", files)
    if atom is not None:
        (tmp_path / "devices/cpu_atom").mkdir(parents=True)
        (tmp_path / "devices/cpu_atom/cpus").write_text(f"{atom}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cpus))
    assert best_threads(tmp_path) == threads


def test_slowest_cores_with_a_name_of_their_own_get_no_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An Arrow Lake-H under Linux 6.13: six fast cores, eight efficient ones, and two for a low power."""
    for kind, cpus in (("cpu_atom", "6-13"), ("cpu_lowpower", "14-15")):
        (tmp_path / "devices" / kind).mkdir(parents=True)
        (tmp_path / "devices" / kind / "cpus").write_text(f"{cpus}\n")
    monkeypatch.setattr(machine, "available_cpus", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert best_threads(tmp_path) == 6


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 2),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/x\n2:memory:/y",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000",
            },
            4,
        ),
    ],
)
def test_a_quota_of_the_container_bounds_the_threads(
    files: dict[str, str], cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    write_all(tmp_path, files)
    assert machine.available_cpus(tmp_path) == cpus


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max"}, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "2147483648"}, 1 << 31),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/memory.max": "3000000000",
                "sys/fs/cgroup/a/b/memory.max": "4000000000",
            },
            3_000_000_000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/docker/x\n2:cpu:/y",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": "536870912",
            },
            1 << 29,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",  # none
            },
            None,
        ),
    ],
)
def test_a_container_limits_the_memory(files: dict[str, str], limit: int | None, tmp_path: Path) -> None:
    write_all(tmp_path, files)
    assert machine.memory_limit(tmp_path) == limit


@pytest.mark.parametrize(
    ("cpuinfo", "features"),
    [
        ("processor\t: 0\nflags\t\t: fpu sse2 avx2\nvmx flags\t: vnmi\n\n" * 2, {"fpu", "sse2", "avx2"}),
        (cores("0xd0b", "0xd0b"), {"fp", "asimd", "evtstrm", "aes", "asimddp"}),
        ("model name\t: unknown\n", set()),
    ],
)
def test_instruction_sets_are_those_of_the_kernels_list(cpuinfo: str, features: set[str], tmp_path: Path) -> None:
    """`flags` on x86, `Features` on Arm: without them nobody hears that weights are unpacked at every token."""
    assert cpu_features(tmp_path) == frozenset()  # no procfs
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(cpuinfo)
    assert cpu_features(tmp_path) == features


def test_another_gpu_is_a_difference() -> None:
    bare = Machine(board=None, cpu="Fast", cpus=2, architecture="x86_64", memory_bytes=8 * 10**9, system="Linux 6")
    one = bare.model_copy(update={"gpus": (Gpu(name="H100", driver="570", memory_bytes=1),)})
    two = bare.model_copy(update={"gpus": (Gpu(name="H100", driver="580", memory_bytes=1),) * 2})
    assert one.differences(one) == ()
    assert bare.differences(one) == ("GPUs: none there, H100 (driver 570) here",)
    assert two.differences(one) == ("GPUs: H100 (driver 580), H100 (driver 580) there, H100 (driver 570) here",)


def test_what_a_container_hides_is_no_difference() -> None:
    bare = Machine(board=None, cpu="Cortex-A78AE", cpus=6, architecture="aarch64", memory_bytes=None, system="Linux 5")
    board = bare.model_copy(update={"board": "Orin Nano", "power_mode": "15W", "memory_bytes": 8 * 10**9})
    assert board.differences(bare) == bare.differences(board) == ()
    unnamed = board.model_copy(update={"cpu": "aarch64"})  # without /proc/cpuinfo
    assert board.differences(unnamed) == unnamed.differences(board) == ()
    other = board.model_copy(update={"power_mode": "MAXN", "memory_bytes": 16 * 10**9})
    assert board.differences(other) == ("power_mode: 15W there, MAXN here", "memory: 8.0 GB there, 16.0 GB here")


def test_an_engine_takes_the_best_number_and_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_cpus", lambda: 8)
    monkeypatch.setattr(machine, "best_threads", lambda: 4)
    assert (checked_threads(None), checked_threads(8)) == (4, 8)
    other: Any = np.int64(2)
    assert type(checked_threads(other)) is int
    with pytest.raises(InputError, match=r"this process may use 8 CPUs: give a whole number from 1 to 32; 4 is best"):
        checked_threads(33)
    with pytest.raises(InputError, match="threads = True: "):
        checked_threads(True)


def test_macos_and_windows_tell_the_size_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine._memory_bytes("") is None  # Linux without procfs
    monkeypatch.setattr(sys, "platform", "win32")
    assert machine._memory_bytes("") == psutil.virtual_memory().total


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has its identifier in the registry")
@pytest.mark.parametrize(
    ("text", "found"), [("0f" * 16 + "\n", "0f" * 16), ("", None), ("uninitialized\n", None), (None, None)]
)
def test_a_machine_is_identified_by_its_own_file(tmp_path: Path, text: str | None, found: str | None) -> None:
    """Containers have an empty file or none, and images say that theirs is not made yet."""
    if text is not None:
        (tmp_path / "etc").mkdir()
        (tmp_path / "etc/machine-id").write_text(text)
    assert machine_id(tmp_path) == found
