"""Temperatures from the kernel's thermal zones, and those of CPU packages from hwmon.

Every zone becomes one reading, and a zone that hangs does not hide the others. hwmon adds the chips that measure a CPU package,
because on many servers Intel's and AMD's drivers register no zone. Single cores and other chips are left out: a temperature
limit is about the hottest part, which the sensor of a package already reports.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from balcony_edge.device.readings import Reading, Scope
from balcony_runtime.sensors.base import Absence, NothingOpen, SourceSample
from balcony_runtime.sensors.sysfs import (
    ATTRIBUTE_ERRORS,
    TimedReader,
    absence,
    numbered,
    read_number,
    text_or_none,
    unique,
)

#: hwmon chips of CPU packages → the labels of whole packages (kernel, Documentation/hwmon/{coretemp,k10temp}.rst). AMD's Tctl
#: is Tdie with an offset of up to 27 degrees on some CPUs, which then have both; on the others it is the temperature.
_CPU_CHIPS = {
    "coretemp": re.compile(r"Package id \d+"),
    "k10temp": re.compile("T(die|ctl)"),
    "zenpower": re.compile("Tdie"),
}
#: Zone of the PMIC of a Jetson Nano, TX2 or Xavier. It does not measure: below its alarm at 120 °C the driver gives 100 °C
#: (kernel, drivers/thermal/max77620_thermal.c).
_NOT_MEASURED = "PMIC-Die"
_SCOPES: tuple[tuple[Scope, re.Pattern[str]], ...] = (
    ("cpu", re.compile("cpu|x86_pkg_temp", re.IGNORECASE)),
    ("gpu", re.compile("gpu", re.IGNORECASE)),
    ("battery", re.compile("batt", re.IGNORECASE)),
    # tj is the hottest of all zones of a Tegra; acpitz is a PC's main board
    ("board", re.compile("tj|tboard|acpitz|board|skin", re.IGNORECASE)),
)


@dataclass(frozen=True, slots=True)
class _Probe:
    source: str
    scope: Scope
    path: Path


class Thermal(NothingOpen):
    """Thermal zones (``thermal:<type>``) and CPU packages (``hwmon:<chip>:<label>``) below a sysfs root."""

    name = "thermal"

    def __init__(self, sysfs: Path) -> None:
        self._root = sysfs
        self._probes: tuple[_Probe, ...] = ()
        self._reader = TimedReader()

    def discover(self) -> None:
        taken: set[str] = set()
        probes = []
        zones = numbered(self._root / "class/thermal", "thermal_zone")
        kinds = self._reader.read(lambda zone: text_or_none(zone / "type"), zones)
        for zone in zones:
            kind = kinds[zone] if isinstance(kinds[zone], str) else zone.name
            if kind != _NOT_MEASURED:
                probes.append(_Probe(unique(f"thermal:{kind}", taken), _scope(kind), zone / "temp"))
        for chip in numbered(self._root / "class/hwmon", "hwmon"):
            name = text_or_none(chip / "name") or ""
            packages = _CPU_CHIPS.get(name)
            labels = {file: text_or_none(file) or "" for file in sorted(chip.glob("temp*_label")) if packages}
            if "Tdie" in labels.values():
                labels = {file: label for file, label in labels.items() if label == "Tdie"}
            for file, label in labels.items():
                if packages and packages.fullmatch(label):
                    source = unique(f"hwmon:{name}:{label}", taken)
                    probes.append(_Probe(source, "cpu", file.with_name(file.name.replace("_label", "_input"))))
        self._probes = tuple(probes)

    def read(self, now_s: float) -> SourceSample:
        readings, absences = [], []
        for probe, found in self._reader.read(lambda probe: read_number(probe.path), self._probes).items():
            if isinstance(found, ATTRIBUTE_ERRORS):
                absences.append(absence(probe.source, found))
            else:
                readings.append(Reading(probe.source, probe.scope, now_s, celsius=found / 1000))  # m°C
        if not self._probes:
            absences.append(
                Absence(self.name, "the kernel shows no thermal zone and no CPU package, as in most virtual machines")
            )
        return SourceSample(tuple(readings), tuple(absences))


def _scope(kind: str) -> Scope:
    return next((scope for scope, pattern in _SCOPES if pattern.search(kind)), "other")
