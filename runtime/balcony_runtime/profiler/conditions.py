"""Conditions of a measurement: clocks, heat, load of other processes, memory, power.

A quantity that the system does not report is None. Nothing here slows a step down: sensors have threads of their own, and
files are read between cells.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import get_args

from balcony_edge.budget import Rail
from balcony_edge.device.machine import text_of
from balcony_edge.device.profile import Conditions
from balcony_edge.device.readings import Reading, adding_up
from balcony_runtime.sensors import Sensors
from balcony_runtime.sensors.system import System, cpu_seconds

#: Sources that never measure power, so their absences do not explain a lack of it.
_NO_POWER = ("thermal", "psutil")
#: Share of all CPU time used by other processes above which a profile gets a note; at this load two cores decode 5 % slower.
BUSY_NEIGHBOURS = 0.05


class ConditionWatch:
    """Observes the device from its construction to :meth:`report`."""

    def __init__(self, sensors: Sensors) -> None:
        """Begin, with sensors that are started."""
        self._sensors = sensors
        self._begin_s, self._cpu = time.perf_counter(), _cpu_seconds()
        self._mhz, self._celsius = self.cpu_mhz(), self.celsius()
        #: Whether clocks were held down when somebody looked.
        self.throttled = False

    def look(self) -> None:
        """Record whether clocks are held down now."""
        self.throttled |= any(reading.throttled for reading in self._sensors.latest())

    def report(self, notes: tuple[str, ...] = ()) -> Conditions:
        """Conditions since the construction."""
        share = self._others_share()
        mhz, celsius = self.cpu_mhz(), self.celsius()
        known = any(reading.throttled is not None for reading in self._sensors.latest())
        if share is not None and share > BUSY_NEIGHBOURS:
            notes = (*notes, f"other processes used {share:.0%} of the CPU: measure again on a quiet device")
        return Conditions(
            seconds=time.perf_counter() - self._begin_s,
            others_cpu_share=share,
            load_1m=_load_1m(),
            governor=text_of(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
            cpu_mhz=None if self._mhz is None or mhz is None else (self._mhz, mhz),
            celsius=None if self._celsius is None or celsius is None else (self._celsius, celsius),
            throttled=self.throttled or (False if known else None),
            notes=notes,
        )

    def cpu_mhz(self) -> float | None:
        """Mean clock of the CPUs now."""
        # Of each CPU, not of each policy: policies have different numbers of CPUs, as on an RK3588 with 4, 2 and 2.
        paths = sorted(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
        khz = [int(text) for path in paths if (text := text_of(path)) and text.isdigit()]
        if khz:
            return fmean(khz) / 1000
        mhz = re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", text_of(Path("/proc/cpuinfo")) or "", re.MULTILINE)
        return fmean(map(float, mhz)) if mhz else None

    def celsius(self) -> float | None:
        """Temperature of the hottest sensor now."""
        return max((r.celsius for r in self._sensors.latest() if r.celsius is not None), default=None)

    def watts(self) -> float | None:
        """Power now, of the board if something measures it, else of the CPU, else of the GPU."""
        now = {r.source: r.watts for r in self._sensors.latest() if r.watts is not None}
        rails = measured_rails(self._sensors).values()
        return next((sum(now[s] for s in sources) for sources in rails if all(s in now for s in sources)), None)

    def _others_share(self) -> float | None:
        early, late = self._cpu, _cpu_seconds()
        if early is None or late is None:
            return None
        total, busy, own = (after - before for before, after in zip(early, late, strict=True))
        return max(busy - own, 0.0) / total if total > 0 else None


def _cpu_seconds() -> tuple[float, float, float] | None:
    """``(all, busy, own)`` CPU seconds since boot; time that the host took counts as busy. None: they are hidden."""
    try:
        idle, *busy = cpu_seconds()
    except OSError:  # no /proc/stat, as with systemd's ProcSubset=pid
        return None
    return idle + sum(busy), sum(busy), sum(os.times()[:4])


def _load_1m() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has none; systemd's ProcSubset=pid hides /proc/loadavg
        return None


def private_bytes() -> int | None:
    """Private memory of this process, which ``memory_mb`` is a ceiling of; None if the system does not report it."""
    readings = System().read(time.monotonic()).readings
    return next((one.memory_bytes for one in readings if one.scope == "process"), None)


def peak_bytes() -> int | None:
    """Peak of the resident memory of this process; None if the system does not report it."""
    # Linux hands `ru_maxrss` of the program that started this one down to it: a notebook of 8 GB would be its peak.
    found = re.search(r"^VmHWM:\s*(\d+) kB$", text_of(Path("/proc/self/status")) or "", re.MULTILINE)
    if found is not None:
        return int(found[1]) * 1024
    try:
        import resource  # noqa: PLC0415 - Windows has none
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measured_rails(sensors: Sensors) -> dict[Rail, tuple[str, ...]]:
    """Rail → sources whose power adds up to that of the rail, as for the controller."""
    powered = [r for r in sensors.latest() if r.watts is not None or r.joules is not None]
    found = {rail: adding_up([r for r in powered if r.scope == rail], rail) for rail in get_args(Rail)}
    return {rail: tuple(part.source for part in parts) for rail, parts in found.items() if parts}


def why_no_power(sensors: Sensors) -> str:
    """One line with the reasons why no sensor measures power, and cures."""
    absences = [absence for health in sensors.health() if health.source not in _NO_POWER for absence in health.absences]
    reasons = [
        f"{absence.part}: {absence.reason}" + (f" ({absence.cure})" if absence.cure else "") for absence in absences
    ]
    return "no sensor measures power" + (": " + "; ".join(reasons) if reasons else "")


class Meter:
    """Average power of some rails while a function runs; it uses energy counters if there are any."""

    def __init__(self, sensors: Sensors, rails: dict[Rail, tuple[str, ...]]) -> None:
        self._sensors, self._rails = sensors, rails
        #: Whether clocks were held down meanwhile.
        self.throttled = False

    def run(self, seconds: float, work: Callable[[], object] = lambda: time.sleep(0.1)) -> dict[Rail, float]:
        """Repeat ``work`` for ``seconds``; returns the watts of every rail that gave two readings meanwhile."""
        seen: dict[str, list[Reading]] = {source: [] for sources in self._rails.values() for source in sources}
        begin_s, works = time.monotonic(), 0
        while (spent_s := time.monotonic() - begin_s) < seconds or min(map(len, seen.values()), default=2) < 2:
            # A sensor has stopped answering. Two works give two readings, however long a block takes on a slow device.
            if works >= 2 and spent_s > 4 * seconds + 5:
                break
            work()
            works += 1
            for reading in self._sensors.latest():
                self.throttled |= bool(reading.throttled)
                own = seen.get(reading.source)
                if own is not None and reading.time_s >= begin_s and (not own or reading.time_s > own[-1].time_s):
                    own.append(reading)
        found = {rail: [_watts(seen[source]) for source in sources] for rail, sources in self._rails.items()}
        known = {rail: [watts for watts in parts if watts is not None] for rail, parts in found.items()}
        return {rail: sum(parts) for rail, parts in known.items() if len(parts) == len(found[rail])}


def _watts(readings: list[Reading]) -> float | None:
    if len(readings) < 2:
        return None
    first, last = readings[0], readings[-1]
    if first.joules is not None and last.joules is not None:
        return max(last.joules - first.joules, 0.0) / (last.time_s - first.time_s)
    watts = [reading.watts for reading in readings if reading.watts is not None]
    return fmean(watts) if watts else None
