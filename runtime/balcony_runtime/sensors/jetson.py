"""NVIDIA Jetson: supply rails, GPU load and throttling, from sysfs.

It comes before NVML, which initialises on Orin and then supports nothing. INA3221 chips (three channels: mV and mA) measure the
rails and, on Thor's carrier, an INA238 (µW). Temperatures come from thermal zones, as on other devices (``thermal.py``).

    module              rails (developer guides of Jetson Linux, "Power Monitor")           board
    Orin Nano, Orin NX  VDD_IN, VDD_CPU_GPU_CV, VDD_SOC                                      VDD_IN
    AGX Orin            VDD_GPU_SOC, VDD_CPU_CV, VIN_SYS_5V0; second chip: VDDQ_VDD2_1V8AO   sum of the first chip's
    Thor                VDD_GPU, VDD_CPU_SOC_MSS, VIN_SYS_5V0; INA238: VIN                   VIN
    Nano                POM_5V_IN, POM_5V_GPU, POM_5V_CPU                                    POM_5V_IN
    TX2                 VDD_IN, VDD_SYS_CPU, VDD_SYS_GPU and others                          VDD_IN

VIN_SYS_5V0 feeds I/O and memory; VDDQ_VDD2_1V8AO is a part of it. The sum is the power of the module, which is less than that
of module and carrier. In JetPack 4, the last of Nano and TX2, the driver of INA3221 belongs to IIO instead of hwmon.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from balcony_edge.device.readings import Reading, Scope
from balcony_runtime.sensors.base import Absence, NothingOpen, SourceSample
from balcony_runtime.sensors.sysfs import (
    ATTRIBUTE_ERRORS,
    absence,
    entries,
    number_or_none,
    numbered,
    read_number,
    text_or_none,
    unique,
)

_INPUTS = ("VDD_IN", "VIN", "POM_5V_IN")
_SYSTEM_RAIL = "VIN_SYS_5V0"
_GPU_DEVICE = re.compile(r"gpu|ga10b|gv11b|gp10b|gm20b", re.IGNORECASE)  # Orin, Orin (JetPack 5), Xavier, TX2, Nano


@dataclass(frozen=True, slots=True)
class _Rail:
    chip: str
    label: str
    source: str
    power: Path | None  # µW; otherwise the two below
    millivolts: Path
    milliamperes: Path

    def watts(self) -> float:
        if self.power is not None:
            return read_number(self.power) / 1e6
        return read_number(self.millivolts) * read_number(self.milliamperes) / 1e6


class Jetson(NothingOpen):
    """``ina3221:VDD_IN`` and other rails, ``devfreq:17000000.gpu``, ``jetson:throttle-alert``."""

    name = "jetson"

    def __init__(self, sysfs: Path) -> None:
        self._root = sysfs
        self._rails: tuple[_Rail, ...] = ()
        self._summed: tuple[_Rail, ...] = ()
        self._load: Path | None = None
        self._alerts: tuple[Path, ...] = ()

    def discover(self) -> None:
        taken: set[str] = set()
        rails = []
        for directory in numbered(self._root / "class/hwmon", "hwmon"):
            chip = text_or_none(directory / "name") or ""
            if chip == "ina3221":
                rails += _ina3221(directory, taken)
            elif chip == "ina238":
                label = text_or_none(directory / "label") or text_or_none(directory / "in1_label") or "VIN"
                rails.append(_rail(directory, chip, label, 1, taken))
        for directory in sorted(self._root.glob("bus/i2c/drivers/ina3221x/*/iio:device*")):
            rails += _iio(directory, taken)
        self._rails = tuple(rails)
        self._summed = _parts_of_the_module(self._rails)
        self._load = self._find_load()
        devices = numbered(self._root / "class/thermal", "cooling_device")
        self._alerts = tuple(path for path in devices if (text_or_none(path / "type") or "").endswith("throttle-alert"))

    def _find_load(self) -> Path | None:
        devices = entries(self._root / "class/devfreq")
        files = [device / "device/load" for device in devices if _GPU_DEVICE.search(device.name)]
        files += [self._root / "devices" / place / "load" for place in ("gpu.0", "platform/gpu.0")]  # of older kernels
        return next((file for file in files if file.exists()), None)

    def read(self, now_s: float) -> SourceSample:
        readings: list[Reading] = []
        absences: list[Absence] = []
        watts: dict[_Rail, float] = {}
        for rail in self._rails:
            try:
                watts[rail] = rail.watts()
            except ATTRIBUTE_ERRORS as error:
                absences.append(absence(rail.source, error))
            else:
                readings.append(Reading(rail.source, _scope(rail.label), now_s, watts=watts[rail]))
        if self._summed and all(rail in watts for rail in self._summed):
            total = sum(watts[rail] for rail in self._summed)
            readings.append(Reading("ina3221:total", "board", now_s, watts=total))
        if self._load is not None:
            part = f"devfreq:{self._load.parent.resolve().name}"
            try:
                busy = read_number(self._load) / 1000  # in thousandths
            except ATTRIBUTE_ERRORS as error:
                absences.append(absence(part, error))
            else:
                readings.append(Reading(part, "gpu", now_s, utilization=busy))
        states = [state for path in self._alerts if (state := number_or_none(path / "cur_state")) is not None]
        if states:
            readings.append(Reading("jetson:throttle-alert", "board", now_s, throttled=any(states)))
        if not readings and not absences:
            absences.append(Absence(self.name, "no INA3221 or INA238 power monitor and no Tegra GPU: not a Jetson"))
        return SourceSample(tuple(readings), tuple(absences))


def _ina3221(directory: Path, taken: set[str]) -> list[_Rail]:
    """The chip's connected channels. Its other files (in4 to in7) are shunt voltages and their sum, not rails."""
    labels = {channel: text_or_none(directory / f"in{channel}_label") for channel in (1, 2, 3)}
    return [
        _rail(directory, "ina3221", label, channel, taken)
        for channel, label in labels.items()
        if label and label != "NC" and text_or_none(directory / f"in{channel}_enable") != "0"
    ]


def _iio(directory: Path, taken: set[str]) -> list[_Rail]:
    """Channels of an INA3221 under the driver of NVIDIA's kernel 4.9: mV and mA, as in hwmon."""
    rails = []
    for channel in (0, 1, 2):
        label = text_or_none(directory / f"rail_name_{channel}")
        if label and label != "NC":
            volts, amperes = directory / f"in_voltage{channel}_input", directory / f"in_current{channel}_input"
            rails.append(_Rail(directory.name, label, unique(f"ina3221:{label}", taken), None, volts, amperes))
    return rails


def _rail(directory: Path, chip: str, label: str, channel: int, taken: set[str]) -> _Rail:
    power = directory / f"power{channel}_input"
    return _Rail(
        chip=directory.name,
        label=label,
        source=unique(f"{chip}:{label}", taken),
        power=power if power.exists() else None,
        millivolts=directory / f"in{channel}_input",
        milliamperes=directory / f"curr{channel}_input",
    )


def _parts_of_the_module(rails: tuple[_Rail, ...]) -> tuple[_Rail, ...]:
    """Rails that add up to the module's power if none measures it: those on the chip of the 5 V system rail."""
    if any(rail.label in _INPUTS for rail in rails):
        return ()
    chips = {rail.chip for rail in rails if rail.label == _SYSTEM_RAIL}
    return tuple(rail for rail in rails if rail.chip in chips)


def _scope(label: str) -> Scope:
    """Scope of a rail; a rail that feeds both GPU and CPU, or neither, is ``other``."""
    if label in _INPUTS:
        return "board"
    cpu, gpu = "CPU" in label, "GPU" in label
    if label.startswith("VDDQ"):
        return "memory"
    return "other" if cpu == gpu else "cpu" if cpu else "gpu"
