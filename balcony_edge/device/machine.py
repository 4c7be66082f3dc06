"""The identity of a machine, as far as it decides what a token costs there: a device profile carries it.

Owns reading it (procfs, sysfs, NVML) and naming the differences of two. It measures nothing; what changes by the minute
(clock, load, heat) is not part of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
import re
import sys
import threading
from collections.abc import Collection, Iterator
from numbers import Integral
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from balcony_edge.device.arm import core_names
from balcony_edge.errors import InputError

_log = logging.getLogger(__name__)
#: Longest wait for NVML's list of GPUs, in seconds.
NVML_S = 3.0
#: Most threads of an engine per CPU: 64 threads on 2 CPUs make 2 tokens a second, 5,000 threads none at all.
MOST_THREADS_PER_CPU = 4
#: Files with a cgroup's limit of memory, of version 2 and of version 1.
_MEMORY_LIMITS = ("memory.max", "memory.limit_in_bytes")
#: Bytes from which a limit is none.
_NO_LIMIT = 1 << 60


class Gpu(BaseModel):
    """A GPU as its driver names it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    driver: str
    memory_bytes: int = Field(ge=0)


class Machine(BaseModel):
    """Identity of a machine. None: the system does not tell.

    Attributes:
        board: product name of a board or computer (Jetson Orin Nano, a laptop's model).
        cpu: model name of the CPU; on Arm the names of its kinds of cores.
        cpus: number of CPUs that the process may run on.
        architecture: name of the architecture, as ``platform.machine()`` gives it.
        memory_bytes: size of main memory.
        gpus: NVIDIA GPUs.
        power_mode: Jetson's nvpmodel mode, or the platform profile of a laptop.
        system: operating system and kernel.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    board: str | None
    cpu: str
    cpus: int = Field(ge=1)
    architecture: str
    memory_bytes: int | None
    gpus: tuple[Gpu, ...] = ()
    power_mode: str | None = None
    system: str

    @property
    def title(self) -> str:
        """One line for people."""
        parts = [f"{self.cpus} × {self.cpu}", *(gpu.name for gpu in self.gpus)]
        return f"{self.board}: {', '.join(parts)}" if self.board else ", ".join(parts)

    def differences(self, other: Machine, names: tuple[str, str] = ("there", "here")) -> tuple[str, ...]:
        """Differences that make a device profile of this machine doubtful on ``other``: ``cpus: 2 there, 4 here``.

        ``names``: what the two are called.

        The kernel may differ, and memory by one gigabyte, because firmware and kernels reserve different amounts. What
        one does not tell is no difference: Docker hides an Arm board's name and power modes (it masks /sys/firmware), systemd's
        ProcSubset=pid the name of the CPU, which is then that of the architecture.
        """
        first, second = names
        found = [
            f"{key}: {mine} {first}, {theirs} {second}"
            for key in ("board", "cpu", "cpus", "architecture", "power_mode")
            if None not in (mine := getattr(self, key), theirs := getattr(other, key)) and mine != theirs
            if key != "cpu" or not {mine, theirs} & {self.architecture, other.architecture}
        ]
        sizes = self.memory_bytes, other.memory_bytes
        if sizes[0] is not None and sizes[1] is not None and abs(sizes[0] - sizes[1]) > 2**30:
            found.append(f"memory: {sizes[0] / 1e9:.1f} GB {first}, {sizes[1] / 1e9:.1f} GB {second}")
        if self.gpus != other.gpus:
            gpus = [", ".join(f"{gpu.name} (driver {gpu.driver})" for gpu in it.gpus) or "none" for it in (self, other)]
            found.append(f"GPUs: {gpus[0]} {first}, {gpus[1]} {second}")
        return tuple(found)


def this_device(root: Path = Path("/")) -> Machine:
    """Identity of the machine that this process runs on.

    Args:
        root: directory that contains ``etc``, ``proc``, ``sys`` and ``var``.
    """
    return Machine(
        board=text_of(root / "proc/device-tree/model") or text_of(root / "sys/class/dmi/id/product_name"),
        cpu=cpu_name(root),
        cpus=available_cpus(),
        architecture=platform.machine(),
        memory_bytes=_memory_bytes(text_of(root / "proc/meminfo") or ""),
        gpus=_nvidia_gpus(),
        power_mode=_nvpmodel_mode(root) or text_of(root / "sys/firmware/acpi/platform_profile"),
        system=f"{platform.system()} {platform.release()}",
    )


def _nvpmodel_mode(root: Path) -> str | None:
    """A Jetson's power mode by its name.

    `status` has only its number, which means another mode in another nvpmodel.conf: on an Orin Nano 1 is 7 W, in its Super form
    25 W.
    """
    status = text_of(root / "var/lib/nvpmodel/status")
    number = re.search(r"pmode:(\d+)", status or "")
    if number is None:
        return status
    line = rf"^<\s*POWER_MODEL\s+ID=0*{int(number[1])}\s+NAME=(\S+)\s*>"
    name = re.search(line, text_of(root / "etc/nvpmodel.conf") or "", re.MULTILINE)
    return status if name is None else name[1]


def cpu_name(root: Path = Path("/")) -> str:
    """Names of an Arm CPU's cores, or the model name of another CPU."""
    cpuinfo = text_of(root / "proc/cpuinfo") or ""
    if names := core_names(cpuinfo):
        return names
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    if found is not None:
        return " ".join(found.group(1).split())
    # On a Mac, `platform` returns only the architecture, which is the same for many processors.
    brand = _sysctl("machdep.cpu.brand_string").decode(errors="replace").strip("\0 ")
    return brand or platform.processor() or platform.machine()


def available_cpus(root: Path = Path("/")) -> int:
    """Number of CPUs that this process may use: those that it may run on, and no more than the quota of its cgroups."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min(cpus, _cpu_quota(root)), 1)


def _cpu_quota(root: Path) -> int:
    """Whole CPUs that the process's cgroup and those above it allow, as containers set it; very many without a quota.

    cgroup v2: ``cpu.max`` is "quota period" or "max period"; v1: ``cpu.cfs_quota_us`` is -1 without one. A part of a CPU does
    not count, since a thread that is stopped for the rest of each period holds up all others.
    """
    quota = 1 << 20
    for group in _groups(root, "cpu"):
        given, _, period = (text_of(group / "cpu.max") or "max").partition(" ")
        given = text_of(group / "cpu.cfs_quota_us") or given
        period = text_of(group / "cpu.cfs_period_us") or period
        if given.isdigit() and period.isdigit() and int(period):
            quota = min(quota, int(given) // int(period))
    return quota


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes of memory that the process's cgroup and those above it allow, as containers set it; None without a limit.

    cgroup v2: ``memory.max`` is bytes or "max"; v1: ``memory.limit_in_bytes`` is more than any machine has without one.
    """
    texts = [text_of(group / name) or "" for group in _groups(root, "memory") for name in _MEMORY_LIMITS]
    limits = [int(text) for text in texts if text.isdigit() and int(text) < _NO_LIMIT]
    return min(limits, default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Directories of the cgroups that limit this process: its own and those above it, of version 2 and of version 1."""
    tree = root / "sys/fs/cgroup"
    for line in (text_of(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        home, place = tree / controller if controllers else tree, Path(path.strip("/"))
        for group in (place, *place.parents):  # a container sees its own group at the top
            yield home / group


def best_threads(sysfs: Path = Path("/sys")) -> int:
    """Number of threads with which a pass is fastest: one for each core of this process that is not too slow.

    A pass is divided into equal parts, so it takes as long as the slowest core needs for its part: the n fastest cores, the
    slowest of which has capacity c, do n · c. Four slow cores beside four that are twice and a half as fast make a pass longer.
    Intel's efficient cores, whose capacity the kernel often does not tell, are left out, as llama.cpp does. Since Linux 6.16 it
    then gives 1024 for every core: always next to cores with hyper-threads (drivers/cpufreq/intel_pstate.c). The hyper-threads
    of a core count once: they share its units.
    """
    most = available_cpus()
    if not hasattr(os, "sched_getaffinity"):
        import psutil  # noqa: PLC0415 - Linux does not need it

        # On a Mac with several kinds of cores, level 0 is the fastest kind.
        fast = int.from_bytes(_sysctl("hw.perflevel0.physicalcpu"), "little")
        return min(fast or psutil.cpu_count(logical=False) or most, most)
    cpus = _one_of_each_core(os.sched_getaffinity(0), sysfs)
    most = min(most, len(cpus))
    texts = [text_of(sysfs / f"devices/system/cpu/cpu{cpu}/cpu_capacity") or "" for cpu in cpus]
    if not all(text.isdigit() for text in texts) or len(set(texts)) == 1:  # the kernel knows no capacities
        kinds = ("cpu_atom", "cpu_lowpower")  # the second since Linux 6.13: the slowest cores of Arrow Lake-H
        slow = {cpu for kind in kinds for cpu in _cpu_list(text_of(sysfs / f"devices/{kind}/cpus") or "")}
        return min(len([cpu for cpu in cpus if cpu not in slow]) or most, most)
    capacities = sorted(map(int, texts), reverse=True)[:most]
    return max(range(1, len(capacities) + 1), key=lambda count: count * capacities[count - 1])


def _one_of_each_core(cpus: Collection[int], sysfs: Path) -> list[int]:
    """Of the CPUs that are hyper-threads of one core, the first; all others, and those of which the kernel says nothing."""
    first: dict[str, int] = {}
    for cpu in sorted(cpus):
        first.setdefault(text_of(sysfs / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu), cpu)
    return list(first.values())


def _cpu_list(text: str) -> set[int]:
    """Numbers of a kernel's list of CPUs, such as ``0-3,8``; none if it is not one."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        return set()
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    return {cpu for pair in ends for cpu in range(pair[0], pair[-1] + 1)}


def cpu_features(root: Path = Path("/")) -> frozenset[str]:
    """Instruction sets of the first CPU, by the kernel's names; none if procfs does not say."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text_of(root / "proc/cpuinfo") or "", re.MULTILINE)
    return frozenset(found.group(1).split() if found else ())


def checked_threads(threads: int | None) -> int:
    """Number of threads for an engine: ``threads``, by default :func:`best_threads`.

    More threads than CPUs give a warning, because they wait for one another in every pass.

    Raises:
        InputError: less than one, or so many that a token takes seconds.
    """
    cpus, best = available_cpus(), best_threads()
    if threads is None:
        return best
    most = MOST_THREADS_PER_CPU * cpus
    if isinstance(threads, bool) or not isinstance(threads, Integral) or not 1 <= threads <= most:
        raise InputError(
            f"threads = {threads!r}: this process may use {cpus} CPUs: give a whole number from 1 to {most}; {best} is best"
        )
    if threads > cpus:
        _log.warning("threads = %d, but this process may use %d CPUs: fewer threads are faster", threads, cpus)
    return int(threads)  # NumPy has integers of its own


def _sysctl(name: str) -> bytes:
    """Value of a ``sysctl`` name of macOS; empty if the kernel does not know the name, and on other systems."""
    if sys.platform != "darwin":
        return b""
    value, size = ctypes.create_string_buffer(256), ctypes.c_size_t(256)
    failed = ctypes.CDLL(None).sysctlbyname(name.encode(), value, ctypes.byref(size), None, ctypes.c_size_t(0))
    return b"" if failed else value.raw[: size.value]


def text_of(path: Path) -> str | None:
    """Text of a small file of the system; None if it is empty or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n\t") or None
    except OSError:
        return None


def machine_id(root: Path = Path("/")) -> str | None:
    """The random identifier that a system gives itself at its installation, a secret; None if it has none (containers)."""
    if sys.platform == "win32":
        import winreg  # noqa: PLC0415 - Windows has it

        with (
            contextlib.suppress(OSError),
            winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"SOFTWARE\Microsoft\Cryptography") as key,
        ):
            return str(winreg.QueryValueEx(key, "MachineGuid")[0])
        return None
    found = text_of(root / "etc/machine-id")
    return found if re.fullmatch("[0-9a-f]{32}", found or "") else None


def _memory_bytes(meminfo: str) -> int | None:
    """Size of main memory; systems without procfs tell it to psutil."""
    found = re.search(r"^MemTotal:\s*(\d+) kB$", meminfo, re.MULTILINE)
    if found is not None:
        return int(found.group(1)) * 1024
    if sys.platform == "linux":
        return None
    import psutil  # noqa: PLC0415 - Linux does not need it

    return int(psutil.virtual_memory().total)


def _nvidia_gpus() -> tuple[Gpu, ...]:
    """NVIDIA's GPUs; none if the driver does not answer in time, since a call that hangs in it cannot be interrupted."""
    found: list[tuple[Gpu, ...]] = []
    asking = threading.Thread(target=lambda: found.append(_ask_nvml()), daemon=True)
    asking.start()
    asking.join(NVML_S)
    return found[0] if found else ()


def _ask_nvml() -> tuple[Gpu, ...]:
    try:
        import pynvml  # noqa: PLC0415 - a device without an NVIDIA driver does not need it
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    gpus = []
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        for index in range(pynvml.nvmlDeviceGetCount()):
            with contextlib.suppress(pynvml.NVMLError):  # one that is lost or forbidden hides no other
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                name = str(pynvml.nvmlDeviceGetName(handle))
                gpus.append(Gpu(name=name, driver=driver, memory_bytes=_gpu_memory(pynvml, handle)))
    except pynvml.NVMLError:  # Orin's NVML answers some of these and refuses others
        pass
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlShutdown()
    return tuple(gpus)


def _gpu_memory(pynvml: Any, handle: Any) -> int:
    """Bytes of a GPU's own memory; 0 if it has none, as a GB10."""
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except pynvml.NVMLError_NotSupported:
        return 0
