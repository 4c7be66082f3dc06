"""CPU package and DRAM energy from RAPL through powercap (Intel since Sandy Bridge, AMD since Zen).

It reads only whole packages, the platform domain and DRAM: a package's figure contains those of its cores and its graphics. The
``intel-rapl-mmio`` zones show a package a second time and are left out. Counters wrap at ``max_energy_range_uj`` (262 kJ on
many parts: 44 minutes at 100 W), which is undone here. A zone whose counter never moves (``psys`` on firmware that does not
update it) measures nothing and is absent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from balcony_edge.device.readings import Reading, Scope
from balcony_runtime.sensors.base import Absence, NothingOpen, SourceSample
from balcony_runtime.sensors.sysfs import (
    ATTRIBUTE_ERRORS,
    EnergyCounter,
    absence,
    entries,
    number_or_none,
    text_or_none,
)

_ZONE = re.compile(r"intel-rapl:\d+(:\d+)?")
_CURE = (
    "since CVE-2020-8694 only root may read it: sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj until the "
    "next boot, or install the udev rule of docs/sensors.md"
)


@dataclass(frozen=True, slots=True)
class _Zone:
    source: str
    scope: Scope
    counter: EnergyCounter


class Rapl(NothingOpen):
    """Energy counters ``rapl:package-0`` and ``rapl:package-0/dram`` below a sysfs root."""

    name = "rapl"

    def __init__(self, sysfs: Path) -> None:
        self._directory = sysfs / "class/powercap"
        self._zones: dict[str, _Zone] = {}  # by directory name; a zone that returns continues its count

    def discover(self) -> None:
        # Docker covers the zones with an empty directory, and the links to them stay.
        names = [path.name for path in entries(self._directory) if _ZONE.fullmatch(path.name) and path.exists()]
        self._zones = {name: zone for name in names if (zone := self._zones.get(name) or self._zone(name))}

    def _zone(self, name: str) -> _Zone | None:
        directory = self._directory / name
        label = text_or_none(directory / "name") or name
        parent, _, sub = name.removeprefix("intel-rapl:").partition(":")
        if sub:
            if label != "dram":
                return None
            label = f"{text_or_none(self._directory / f'intel-rapl:{parent}' / 'name') or parent}/{label}"
        # psys-1, psys-2: the platform once more, as another package sees it
        psys: Scope = "board" if label == "psys" else "other"
        scope: Scope = "memory" if sub else psys if label.startswith("psys") else "cpu"
        range_uj = number_or_none(directory / "max_energy_range_uj")
        return _Zone(f"rapl:{label}", scope, EnergyCounter(directory / "energy_uj", range_uj))

    def read(self, now_s: float) -> SourceSample:
        readings, absences = [], []
        for zone in self._zones.values():
            try:
                joules, watts = zone.counter.advance(now_s)
            except ATTRIBUTE_ERRORS as error:
                absences.append(absence(zone.source, error, _CURE if isinstance(error, PermissionError) else ""))
            else:
                readings.append(Reading(zone.source, zone.scope, now_s, watts=watts, joules=joules))
        if not self._zones:
            reason = "no powercap zone: not an x86 CPU with RAPL, a virtual machine, or a container that masks it"
            cure = "on such a CPU: sudo modprobe intel_rapl_msr; Docker: run with --security-opt systempaths=unconfined"
            absences.append(Absence(self.name, reason, cure))
        return SourceSample(tuple(readings), tuple(absences))
