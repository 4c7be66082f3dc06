"""NVIDIA GPUs through the driver's management library (nvidia-ml-py loads ``libnvidia-ml.so.1``).

Each quantity of a GPU is read separately: consumer cards lack the energy counter, Jetson's and other integrated GPUs lack
nearly everything. A quantity that is "Not Supported" is absent from the reading. If no GPU answers any more (it fell off the
bus, or the driver was reloaded), the next discovery opens the library again.

NVML counts all GPUs in the order of the PCI bus; CUDA counts those of CUDA_VISIBLE_DEVICES, the fastest first. The runtime uses
CUDA's first GPU. If a machine has several, that one has the scope ``gpu``, which budgets are about, and the others ``other``.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

import pynvml

from balcony_edge.device.readings import Reading
from balcony_edge.errors import BalconyError
from balcony_runtime.sensors.base import Absence, SourceSample

#: Reasons for lower clocks that are limits (nvml.h, nvmlClocksEventReasons); idling and a user's setting are not limits.
_LIMITS = (
    0x04  # software power cap
    | 0x08  # hardware slowdown
    | 0x20  # software thermal slowdown
    | 0x40  # hardware thermal slowdown
    | 0x80  # hardware power brake
)
#: A process's utilization is averaged over this many µs before its newest sample; NVML takes 1 to 6 samples a second.
_PROCESS_WINDOW_US = 1_000_000

_CURES = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: (
        "with an NVIDIA GPU: install its driver; in a container: start it with the NVIDIA Container Toolkit (--gpus all)"
    ),
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "load the driver: sudo modprobe nvidia, then look at nvidia-smi",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "library and kernel module have different driver versions: reboot",
    pynvml.NVML_ERROR_NO_PERMISSION: "let this user open /dev/nvidia*",
}
_ORIN = "NVML opens but answers nothing, as on Jetson Orin: power, load and temperature come from sysfs there"


class Nvml:
    """``nvml:0``, ``nvml:1``, ...: watts, joules, °C, utilization, memory and throttling of each NVIDIA GPU."""

    name = "nvml"

    def __init__(self) -> None:
        self._open = False
        self._gpus: tuple[Any, ...] = ()  # for each GPU a handle, or the reason why there is none
        self._used: int | None = None  # the GPU that CUDA uses, if that is known and matters
        self._problem: Absence | None = None

    def discover(self) -> None:
        if self._open:
            return
        try:
            pynvml.nvmlInit()
            self._open = True
            self._gpus = tuple(_handle(index) for index in range(pynvml.nvmlDeviceGetCount()))
            self._used = _used_by_cuda(self._gpus) if len(self._gpus) > 1 else None
            self._problem = None if self._gpus else Absence(self.name, "the driver runs but finds no GPU")
        except pynvml.NVMLError as error:
            self.close()
            self._problem = Absence(self.name, str(error), _CURES.get(error.value, ""))

    def read(self, now_s: float) -> SourceSample:
        readings, absences = [], [self._problem] if self._problem else []
        for index, gpu in enumerate(self._gpus):
            if isinstance(gpu, Absence):  # a lost or forbidden GPU must not hide the others
                absences.append(gpu)
                continue
            values, missing = self._ask(gpu)
            part = f"nvml:{index}"
            if values:
                readings.append(Reading(part, "gpu" if self._used in (None, index) else "other", now_s, **values))
                absences += [Absence(part, f"no {', '.join(fields)}: {why}") for why, fields in missing.items()]
            elif set(missing) == {"Not Supported"}:
                absences.append(Absence(part, _ORIN))
            else:
                absences.append(Absence(part, "; ".join(missing)))
        if self._gpus and not readings:
            self.close()
        return SourceSample(tuple(readings), tuple(absences))

    def _ask(self, gpu: Any) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """Fields of one GPU's reading, and for each reason the fields that are missing because of it."""
        questions: tuple[tuple[tuple[str, ...], Callable[[], tuple[Any, ...]]], ...] = (
            (("watts",), lambda: (pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,)),
            (("joules",), lambda: (pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000,)),
            (("celsius",), lambda: (float(pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU)),)),
            (("utilization",), lambda: (pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,)),
            (("own_utilization",), lambda: (self._own_utilization(gpu),)),
            (("memory_bytes", "memory_total_bytes"), lambda: _memory(gpu)),
            (("throttled",), lambda: (bool(_clock_reasons(gpu) & _LIMITS),)),
        )
        values: dict[str, Any] = {}
        missing: dict[str, list[str]] = {}
        for fields, question in questions:
            try:
                answers = zip(fields, question(), strict=True)
                values |= {name: value for name, value in answers if value is not None}
            except pynvml.NVMLError as error:
                missing.setdefault(str(error), []).extend(fields)
        return values, missing

    def _own_utilization(self, gpu: Any) -> float | None:
        """This process's share, or None if NVML does not know it, as in a container with its own process ids."""
        own = os.getpid()
        since_us = time.time_ns() // 1000 - 2 * _PROCESS_WINDOW_US  # samples are stamped with the time of day
        try:
            samples = pynvml.nvmlDeviceGetProcessUtilization(gpu, since_us)
        except pynvml.NVMLError_NotFound:  # no process used the GPU
            samples = []
        ours = [sample for sample in samples if sample.pid == own]
        newest_us = max((sample.timeStamp for sample in ours), default=0)
        shares: list[float] = [one.smUtil / 100 for one in ours if one.timeStamp > newest_us - _PROCESS_WINDOW_US]
        if shares:
            return sum(shares) / len(shares)
        # Drivers before 510 lack it. Under its name without a version, pynvml then raises an error of another tree.
        known: set[int] = {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses_v3(gpu)}
        return 0.0 if own in known else None

    def close(self) -> None:
        """Shut the library down if it was opened."""
        if self._open:
            with contextlib.suppress(pynvml.NVMLError):  # a lost driver also fails here
                pynvml.nvmlShutdown()
        self._open = False
        self._gpus = ()


def _handle(index: int) -> Any:
    """A GPU's handle, or the reason why it cannot be opened."""
    try:
        return pynvml.nvmlDeviceGetHandleByIndex(index)
    except pynvml.NVMLError as error:
        return Absence(f"nvml:{index}", str(error), _CURES.get(error.value, ""))


def _used_by_cuda(gpus: tuple[Any, ...]) -> int | None:
    """Index of the GPU that the runtime uses; None if CUDA does not say."""
    try:
        from balcony_runtime.backends.accelerator.cuda import pci_bus_id  # noqa: PLC0415 - an extra

        wanted = _pci(pci_bus_id())
    except BalconyError:
        return None
    for index, gpu in enumerate(gpus):
        with contextlib.suppress(pynvml.NVMLError):
            if not isinstance(gpu, Absence) and _pci(pynvml.nvmlDeviceGetPciInfo(gpu).busId) == wanted:
                return index
    return None


def _pci(address: str | bytes) -> tuple[int, ...]:
    """Domain, bus and device of an address: NVML writes a domain with eight digits, CUDA one with four."""
    text = address.decode() if isinstance(address, bytes) else address
    return tuple(int(number, 16) for number in text.partition(".")[0].split(":"))


def _memory(gpu: Any) -> tuple[int, int]:
    memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
    return memory.used, memory.total


def _clock_reasons(gpu: Any) -> int:
    try:
        return int(pynvml.nvmlDeviceGetCurrentClocksEventReasons(gpu))
    except pynvml.NVMLError_FunctionNotFound:  # drivers before 535 have another name for it
        return int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu))
