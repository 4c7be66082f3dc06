"""Apple Silicon under Linux: power of the whole machine, by its system management controller.

Kernel: Documentation/hwmon/macsmc-hwmon.rst; labels: arch/arm64/boot/dts/apple/hwmon-common.dtsi. The driver of Apple's GPU
reports neither load nor power. macOS gives such figures only to root (powermetrics), so nothing is read there.
"""

from __future__ import annotations

from pathlib import Path

from balcony_edge.device.readings import Reading
from balcony_runtime.sensors.base import Absence, NothingOpen, SourceSample
from balcony_runtime.sensors.sysfs import ATTRIBUTE_ERRORS, absence, numbered, read_number, text_or_none

_SYSTEM = "Total System Power"


class AppleSmc(NothingOpen):
    """``macsmc:system``: watts of the machine, on its battery or its charger."""

    name = "macsmc"

    def __init__(self, sysfs: Path) -> None:
        self._chips = sysfs / "class/hwmon"
        self._power: Path | None = None

    def discover(self) -> None:
        chips = (chip for chip in numbered(self._chips, "hwmon") if text_or_none(chip / "name") == "macsmc_hwmon")
        labels = [label for chip in chips for label in sorted(chip.glob("power*_label"))]
        label = next((label for label in labels if text_or_none(label) == _SYSTEM), None)
        self._power = label and label.with_name(label.name.replace("_label", "_input"))

    def read(self, now_s: float) -> SourceSample:
        if self._power is None:
            return SourceSample(
                absences=(Absence(self.name, "no Apple SMC that measures power: not an Apple Silicon Mac"),)
            )
        try:
            watts = read_number(self._power) / 1e6
        except ATTRIBUTE_ERRORS as error:
            return SourceSample(absences=(absence("macsmc:system", error),))
        return SourceSample((Reading("macsmc:system", "board", now_s, watts=watts),))
