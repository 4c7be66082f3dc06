"""CPU and memory of the machine and of this process, from psutil."""

from __future__ import annotations

import math

import psutil

from balcony_edge.telemetry import Reading
from balcony_runtime.sensors.base import Sample

#: The process's private memory is read so seldom: the kernel walks its page tables for it (measured: 1.1 ms at 250 MB and
#: 6 to 11 ms at 1 GB in pages of 4 KiB, 0.2 ms at 2 GB in huge pages; Python's lock is free meanwhile).
_PRIVATE_EVERY_S = 1.0


class System:
    """``psutil:cpu``, ``psutil:memory`` and ``psutil:process``.

    CPU shares are of all logical CPUs together, over the time between two reads; so the first read has none.
    """

    name = "psutil"

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._cpus = psutil.cpu_count() or 1
        self._last: tuple[float, float, float, float] | None = None
        self._private_s = -math.inf
        self._private_bytes = 0

    def discover(self) -> None:
        """There is nothing to look for."""

    def read(self, now_s: float) -> Sample:
        readings = []
        busy_s, all_s = _cpu_seconds()
        own_s = sum(self._process.cpu_times()[:2])
        last, self._last = self._last, (now_s, busy_s, all_s, own_s)
        if last is not None and all_s > last[2] and now_s > last[0]:
            utilization = (busy_s - last[1]) / (all_s - last[2])
            # two clocks with ticks of 10 ms: a single-threaded process on one CPU reads up to a tick above 1
            own = min(1.0, (own_s - last[3]) / ((now_s - last[0]) * self._cpus))
            readings.append(Reading("psutil:cpu", "cpu", now_s, utilization=utilization, own_utilization=own))
        memory = psutil.virtual_memory()
        used, total = memory.total - memory.available, memory.total
        readings.append(Reading("psutil:memory", "memory", now_s, memory_bytes=used, memory_total_bytes=total))
        if now_s - self._private_s >= _PRIVATE_EVERY_S:
            self._private_s, self._private_bytes = now_s, self._process.memory_full_info().uss
        readings.append(Reading("psutil:process", "process", now_s, memory_bytes=self._private_bytes))
        return Sample(tuple(readings))

    def close(self) -> None:
        """Nothing is held open."""


def _cpu_seconds() -> tuple[float, float]:
    """Busy and all CPU seconds since boot. Guests are counted in user time already; waiting for a disk is idle."""
    times = psutil.cpu_times()
    everything = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return everything - times.idle - getattr(times, "iowait", 0.0), everything
