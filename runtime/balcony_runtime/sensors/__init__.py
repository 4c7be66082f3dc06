"""Sensors of the device: watts, joules, °C, utilization, memory and battery charge, sampled while the engine decodes.

    with Sensors(device_sources()) as sensors:
        readings = sensors.latest()      # never blocks; a tuple of balcony_edge.device.readings.Reading

A quantity that a device does not measure is absent, never 0, and :meth:`Sensors.health` gives the reason.
"""

from __future__ import annotations

from pathlib import Path

from balcony_runtime.sensors.apple import AppleSmc
from balcony_runtime.sensors.base import Absence, Source, SourceSample
from balcony_runtime.sensors.battery import Battery
from balcony_runtime.sensors.gpus import Gpus
from balcony_runtime.sensors.jetson import Jetson
from balcony_runtime.sensors.nvml import Nvml
from balcony_runtime.sensors.rapl import Rapl
from balcony_runtime.sensors.raspberrypi import RaspberryPi
from balcony_runtime.sensors.sampler import Sensors, SourceHealth
from balcony_runtime.sensors.system import System
from balcony_runtime.sensors.thermal import Thermal

__all__ = [
    "Absence",
    "Sensors",
    "Source",
    "SourceHealth",
    "SourceSample",
    "device_sources",
]


def device_sources(sysfs: Path = Path("/sys")) -> tuple[Source, ...]:
    """Every source of this device, most trusted first: if two measure the same quantity, the first counts.

    Example:
        names = [source.name for source in device_sources()]

    Args:
        sysfs: root of the sysfs tree. NVML, psutil and the mailbox of a Raspberry Pi's firmware do not use it.
    """
    boards = (Jetson(sysfs), RaspberryPi(sysfs), AppleSmc(sysfs))
    return (*boards, Nvml(), Gpus(sysfs), Rapl(sysfs), Battery(sysfs), Thermal(sysfs), System())
