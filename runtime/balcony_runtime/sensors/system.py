"""CPU and memory of the machine and of this process, from psutil."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import psutil

from balcony_edge.device.readings import Reading
from balcony_runtime.sensors.base import Absence, NothingOpen, SourceSample

#: Time between two reads of the process's private memory, and the largest share of time that they may take: the kernel walks
#: the page tables (measured: 1.1 ms at 250 MB and 6 to 11 ms at 1 GB in pages of 4 KiB, 0.2 ms at 2 GB in huge pages; Python's
#: lock is free meanwhile).
_PRIVATE_EVERY_S, _PRIVATE_SHARE = 1.0, 0.01


class System(NothingOpen):
    """``psutil:cpu``, ``psutil:memory`` and ``psutil:process``.

    CPU shares are shares of all logical CPUs together, over the time between two reads; the first read has none.
    """

    name = "psutil"

    def __init__(self) -> None:
        self._cpus = psutil.cpu_count() or 1
        self._last: tuple[float, float, tuple[float, ...]] | None = None
        self._private_next_s = -math.inf
        self._private_bytes: int | None = None

    @cached_property
    def _process(self) -> Any:
        """This process. It is made by the first read, because psutil refuses without /proc."""
        return psutil.Process()

    def discover(self) -> None:
        """Count the CPUs: a power mode may take some away, or bring them."""
        if (cpus := psutil.cpu_count() or 1) != self._cpus:
            self._cpus, self._last = cpus, None

    def read(self, now_s: float) -> SourceSample:
        readings: list[Reading] = []
        absences: list[Absence] = []
        for part, ask in (("psutil:cpu", self._shares), ("psutil:memory", _whole_memory)):
            try:
                readings += ask(now_s)
            except (psutil.Error, OSError) as error:  # no /proc, or only a part of it (systemd's ProcSubset=pid)
                absences.append(Absence(part, f"the system does not tell: {error}"))
        if now_s >= self._private_next_s:
            begin_s = time.perf_counter()
            try:
                self._private_bytes = self._memory().uss
            except (psutil.Error, OSError, AttributeError):  # without /proc/PID/smaps psutil's answer has no uss
                self._private_bytes = None
            took_s = time.perf_counter() - begin_s
            self._private_next_s = now_s + max(_PRIVATE_EVERY_S, took_s / _PRIVATE_SHARE)
        if self._private_bytes is None:
            absences.append(Absence("psutil:process", "the kernel does not tell the private memory of a process"))
        else:
            readings.append(Reading("psutil:process", "process", now_s, memory_bytes=self._private_bytes))
        return SourceSample(tuple(readings), tuple(absences))

    def _memory(self) -> Any:
        """Memory of this process, with its private part, which psutil 8 tells under another name."""
        return (getattr(self._process, "memory_footprint", None) or self._process.memory_full_info)()

    def _shares(self, now_s: float) -> list[Reading]:
        own_s, cpu_s = sum(self._process.cpu_times()[:2]), cpu_seconds()
        last, self._last = self._last, (now_s, own_s, cpu_s)
        if last is None or now_s <= last[0]:
            return []
        # The two clocks have ticks of 10 ms, so a single-threaded process on one CPU can read up to a tick above 1.
        own = min(1.0, (own_s - last[1]) / ((now_s - last[0]) * self._cpus))
        busy = busy_share(last[2], cpu_s)
        return [Reading("psutil:cpu", "cpu", now_s, utilization=busy, own_utilization=own)]


def _whole_memory(now_s: float) -> list[Reading]:
    memory = psutil.virtual_memory()
    used, total = memory.total - memory.available, memory.total
    return [Reading("psutil:memory", "memory", now_s, memory_bytes=used, memory_total_bytes=total)]


def busy_share(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Busy share of the time between two reads, 0 to 1; None if the clocks did not move.

    Args:
        before: seconds since boot by kind: idle first, then any number of other kinds.
        after: the same, later. The kernel sometimes decreases the seconds of a kind, even of idle CPUs (proc(5) on iowait).
            Such a kind counts as unchanged, otherwise the share would leave its range.
    """
    passed = [max(0.0, late - early) for early, late in zip(before, after, strict=True)]
    return sum(passed[1:]) / sum(passed) if any(passed) else None


def cpu_seconds() -> tuple[float, ...]:
    """Seconds since boot by kind, idle first. User time already includes guests; waiting for a disk counts as idle."""
    times = psutil.cpu_times()._asdict()
    idle = (times.pop("idle"), times.pop("iowait", 0.0))
    return sum(idle), *(seconds for kind, seconds in times.items() if kind not in ("guest", "guest_nice"))
