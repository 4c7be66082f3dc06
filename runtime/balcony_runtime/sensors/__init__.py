"""Sensors of the device: watts, joules, °C, utilization, memory and battery charge, sampled beside decoding.

    with Sensors(device_sources()) as sensors:
        readings = sensors.latest()      # never blocks; a tuple of balcony_edge.device.readings.Reading

What a device does not have is absent, never 0, and :meth:`Sensors.health` says why.
"""

from __future__ import annotations

from pathlib import Path

from balcony_runtime.sensors.base import Absence, Sample, Source
from balcony_runtime.sensors.battery import Battery
from balcony_runtime.sensors.jetson import Jetson
from balcony_runtime.sensors.nvml import Nvml
from balcony_runtime.sensors.rapl import Rapl
from balcony_runtime.sensors.recorded import Recorded, load_readings
from balcony_runtime.sensors.sampler import Sensors, SourceHealth
from balcony_runtime.sensors.system import System
from balcony_runtime.sensors.thermal import Thermal

__all__ = [
    "Absence",
    "Recorded",
    "Sample",
    "Sensors",
    "Source",
    "SourceHealth",
    "device_sources",
    "load_readings",
]


def device_sources(sysfs: Path = Path("/sys")) -> tuple[Source, ...]:
    """Every source of this device, most trusted first: of two that measure one thing, take the first.

    Args:
        sysfs: root of the sysfs tree that Jetson, RAPL, battery and thermal sources read; NVML and psutil have their own.
    """
    return (Jetson(sysfs), Nvml(), Rapl(sysfs), Battery(sysfs), Thermal(sysfs), System())
