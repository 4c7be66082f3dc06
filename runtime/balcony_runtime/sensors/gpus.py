"""GPUs of AMD, Intel, Qualcomm and Raspberry Pi, as far as their drivers report in sysfs. NVIDIA's are read by ``nvml.py``.

    driver   load                         power                 °C        memory  clocks held down
    amdgpu   gpu_busy_percent             power1_average/input  temp*     VRAM    (only in the binary gpu_metrics)
    i915     rc6_residency_ms             energy1_input         temp*             throttle_reason_status
    xe       gtidle/idle_residency_ms     energy1/2_input       temp*             freq0/throttle/status
    v3d      gpu_stats                    (PMIC: raspberrypi.py, thermal zones: thermal.py)
    kgsl     gpu_busy_percentage                                temp              thermal_pwrlevel

Sources, in the kernel: Documentation/gpu/amdgpu/thermal.rst, Documentation/ABI/testing/sysfs-driver-intel-{i915,xe}-hwmon, and
the descriptions in drivers/gpu/drm/{i915/gt/intel_gt_sysfs_pm,xe/xe_gt_idle,xe/xe_gt_throttle,v3d/v3d_sysfs}.c; in Qualcomm's
Android kernels: kgsl_pwrctrl.c. Intel's discrete cards measure power, its integrated GPUs do not.

Intel's load is the share of time outside the sleep state RC6, which is at least the share of time with work. A PCI GPU that the
kernel has suspended (Documentation/ABI/testing/sysfs-devices-power) is not read, because many reads would wake it. It does no
work, so its load is a real 0.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from balcony_edge.device.readings import Reading
from balcony_runtime.sensors.base import Absence, NothingOpen, SourceSample
from balcony_runtime.sensors.plausible import LIMITS
from balcony_runtime.sensors.sysfs import (
    ATTRIBUTE_ERRORS,
    EnergyCounter,
    TimedReader,
    absence,
    entries,
    number_or_none,
    numbered,
    read_number,
    read_text,
    text_or_none,
)

#: Names of fields of a reading, and what asks the driver for them at a time; None for a value that is not known yet.
Question = tuple[tuple[str, ...], Callable[[float], tuple[Any, ...]]]
#: Largest share that is taken for a full one: the clock and the counter are read one after the other, some ms apart.
_MOST_SHARE = 1.5
_SLEEPS = "the kernel has suspended it, and reading would wake it"
_UNKNOWN = "its driver in this kernel does not report it"


@dataclass(slots=True)
class _Shares:
    """Shares of time, from counters of seconds that grow by at most one second a second."""

    last: dict[str, tuple[float, float]] = field(default_factory=dict)

    def advance(self, name: str, counter_s: float, clock_s: float) -> float | None:
        """Share since the previous call for ``name``; None at the first, and where the counter wrapped or restarted."""
        before, self.last[name] = self.last.get(name), (counter_s, clock_s)
        if before is None or clock_s <= before[1]:
            return None
        share = (counter_s - before[0]) / (clock_s - before[1])
        return min(share, 1.0) if 0 <= share <= _MOST_SHARE else None


@dataclass(frozen=True, slots=True, eq=False)
class _Gpu:
    """One GPU: the source of its readings and its driver's questions.

    Attributes:
        status: attribute with the state of runtime power management; None if reads do not wake the GPU.
        whole_chip: whether the power includes that of CPU cores on the same chip.
    """

    source: str
    questions: tuple[Question, ...]
    shares: _Shares
    status: Path | None = None
    whole_chip: bool = False

    def read(self, now_s: float) -> SourceSample:
        values, missing = self._ask(now_s)
        readings = []
        if self.whole_chip and "watts" in values:
            readings.append(Reading(f"{self.source}:chip", "other", now_s, watts=values.pop("watts")))
        if values:
            readings.insert(0, Reading(self.source, "gpu", now_s, **values))
        absences = (Absence(self.source, f"no {', '.join(fields)}: {why}") for why, fields in missing.items())
        return SourceSample(tuple(readings), tuple(absences))

    def _ask(self, now_s: float) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """Fields of the reading, and for each reason the fields that are missing because of it."""
        if self.status is not None and text_or_none(self.status) == "suspended":
            self.shares.last.clear()  # a counter of idle time may stand still meanwhile
            asleep = [name for fields, _ in self.questions for name in fields if name != "utilization"]
            return {"utilization": 0.0}, {_SLEEPS: asleep}
        values: dict[str, Any] = {}
        missing: dict[str, list[str]] = {}
        for fields, question in self.questions:
            try:
                answers = zip(fields, question(now_s), strict=True)
                values |= {name: value for name, value in answers if value is not None}
            except FileNotFoundError:
                missing.setdefault(_UNKNOWN, []).extend(fields)
            except ATTRIBUTE_ERRORS as error:
                missing.setdefault(absence(self.source, error).reason, []).extend(fields)
        return values, missing


class Gpus(NothingOpen):
    """``amdgpu:card0``, ``i915:card0``, ``xe:card0``, ``v3d:card0``, ``kgsl:kgsl-3d0`` below a sysfs root.

    AMD's graphics inside a CPU come last, whose chip measures a rail ``vddnb``. Of the others the card with most memory comes
    first, then cards that have an hwmon chip, then the order of their numbers. The load that counts for a budget is that of the
    first, which is a discrete card if there is one.
    """

    name = "gpu"

    def __init__(self, sysfs: Path) -> None:
        self._root = sysfs
        self._gpus: dict[tuple[Path, str, Path | None], _Gpu] = {}  # a GPU that stays continues its counters
        self._reader = TimedReader()

    def discover(self) -> None:
        ranked = []
        for index, card in enumerate(numbered(self._root / "class/drm", "card")):
            driver = _driver(card / "device")
            if driver in _DRIVERS:
                chip = _chip(card / "device", driver)
                memory_bytes = number_or_none(card / "device/mem_info_vram_total") or 0
                inside = chip is not None and _is_inside_a_cpu(chip)
                ranked.append(((inside, -memory_bytes, chip is None, index), (card, driver, chip)))
        found = [key for _, key in sorted(ranked, key=lambda entry: entry[0])]
        found += [(adreno, "kgsl", None) for adreno in numbered(self._root / "class/kgsl", "kgsl-3d")]
        self._gpus = {key: self._gpus.get(key) or _DRIVERS[key[1]](*key) for key in found}

    def read(self, now_s: float) -> SourceSample:
        if not self._gpus:
            reason = "no GPU of AMD, Intel, Qualcomm or Raspberry Pi whose driver reports in sysfs"
            return SourceSample(absences=(Absence(self.name, reason),))
        readings: list[Reading] = []
        absences: list[Absence] = []
        answers = self._reader.read(lambda gpu: gpu.read(now_s), tuple(self._gpus.values()))
        for gpu, found in answers.items():
            if isinstance(found, ATTRIBUTE_ERRORS):  # it hangs
                absences.append(absence(gpu.source, found))
            else:
                readings += found.readings
                absences += found.absences
        return SourceSample(tuple(readings), tuple(absences))


def _driver(device: Path) -> str:
    """Name of a device's driver; empty if it has none."""
    try:
        return (device / "driver").readlink().name
    except OSError:
        return ""


def _is_inside_a_cpu(chip: Path) -> bool:
    """Whether an AMD GPU has CPU cores next to it: only such chips measure the voltage of the northbridge."""
    return text_or_none(chip / "in1_label") == "vddnb"


def _chip(device: Path, name: str) -> Path | None:
    """The card's hwmon directory. i915 adds others for its parts (``i915_gt0``), which are counted in the card's."""
    chips = numbered(device / "hwmon", "hwmon")
    return next((chip for chip in chips if text_or_none(chip / "name") == name), None)


def _amdgpu(card: Path, driver: str, chip: Path | None) -> _Gpu:
    device, hwmon = card / "device", chip or card / "device/hwmon"

    def watts(_: float) -> tuple[float]:
        try:
            return (read_number(hwmon / "power1_average") / 1e6,)
        except FileNotFoundError:  # newer chips report only the present power
            return (read_number(hwmon / "power1_input") / 1e6,)

    used, total = device / "mem_info_vram_used", device / "mem_info_vram_total"
    questions: tuple[Question, ...] = (
        (("watts",), watts),
        (("celsius",), _hottest(hwmon)),
        (("utilization",), lambda _: (read_number(device / "gpu_busy_percent") / 100,)),
        (("memory_bytes", "memory_total_bytes"), lambda _: (read_number(used), read_number(total))),
    )
    # The power of a chip with CPU cores includes the cores'.
    return _Gpu(f"{driver}:{card.name}", questions, _Shares(), device / "power/runtime_status", _is_inside_a_cpu(hwmon))


def _intel(card: Path, driver: str, chip: Path | None) -> _Gpu:
    device, hwmon = card / "device", chip or card / "device/hwmon"
    if driver == "xe":
        parts = [part for tile in numbered(device, "tile") for part in numbered(tile, "gt")]
        idle = [part / "gtidle/idle_residency_ms" for part in parts]
        limits = [part / "freq0/throttle/status" for part in parts]
    else:
        parts = numbered(card / "gt", "gt")
        idle = [part / "rc6_residency_ms" for part in parts] or [card / "power/rc6_residency_ms"]  # older kernels
        limits = [part / "throttle_reason_status" for part in parts]
    card_uj, package_uj = hwmon / "energy1_input", hwmon / "energy2_input"
    counter = EnergyCounter(package_uj if package_uj in (files := entries(hwmon)) and card_uj not in files else card_uj)
    shares = _Shares()

    def energy(now_s: float) -> tuple[float | None, float]:
        joules, watts = counter.advance(now_s)
        return watts, joules

    def load(now_s: float) -> tuple[float | None]:
        """Load of the busiest part, as i915 itself sums up its parts."""
        least = []
        for file in idle:
            idle_ms = read_number(file)
            if idle_ms == 0:
                raise OSError("it has never been in RC6, so its idle time is unknown")
            least.append(shares.advance(str(file), idle_ms / 1000, now_s))
        known = [share for share in least if share is not None]
        return (1 - min(known) if known and len(known) == len(least) else None,)

    questions: tuple[Question, ...] = (
        (("watts", "joules"), energy),
        (("celsius",), _hottest(hwmon)),
        (("utilization",), load),
        (("throttled",), lambda _: (any(read_number(file) for file in _some(limits, device)),)),
    )
    return _Gpu(f"{driver}:{card.name}", questions, shares, device / "power/runtime_status")


def _v3d(card: Path, driver: str, _chip: Path | None) -> _Gpu:
    """The GPU of a Raspberry Pi: a line for each queue, with its name, the time in ns, its jobs and its run time in ns."""
    shares = _Shares()

    def load(_: float) -> tuple[float | None]:
        """Load of the busiest queue. The kernel runs the jobs of the queue ``cpu`` on a CPU."""
        lines = [line.split() for line in read_text(card / "device/gpu_stats").splitlines()[1:]]
        known = []
        for line in lines:
            if len(line) != 4:
                raise ValueError(f"{' '.join(line)!r} is not a queue, a time, jobs and a run time")
            if line[0] != "cpu":
                known.append(shares.advance(line[0], int(line[3]) / 1e9, int(line[1]) / 1e9))
        return (max((share for share in known if share is not None), default=None),)

    return _Gpu(f"{driver}:{card.name}", ((("utilization",), load),), shares)


def _kgsl(directory: Path, driver: str, _chip: Path | None) -> _Gpu:
    def load(_: float) -> tuple[float]:
        return (int(read_text(directory / "gpu_busy_percentage").removesuffix("%")) / 100,)

    questions: tuple[Question, ...] = (
        (("celsius",), lambda _: (read_number(directory / "temp") / 1000,)),
        (("utilization",), load),
        (("throttled",), lambda _: (read_number(directory / "thermal_pwrlevel") > 0,)),  # 0 is the highest clock
    )
    return _Gpu(f"{driver}:{directory.name}", questions, _Shares())


_DRIVERS: dict[str, Callable[[Path, str, Path | None], _Gpu]] = {
    "amdgpu": _amdgpu,
    "i915": _intel,
    "xe": _intel,
    "v3d": _v3d,
    "kgsl": _kgsl,
}


def _some(files: Sequence[Path], directory: Path) -> Sequence[Path]:
    """The files.

    Raises:
        FileNotFoundError: there is none.
    """
    if not files:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory))
    return files


def _hottest(hwmon: Path) -> Callable[[float], tuple[float]]:
    """Asks for °C of the hottest of a card's sensors (AMD: edge, junction, mem; Intel: package, memory).

    A sensor that fails or shows an impossible value does not hide the others.
    """
    files = sorted(hwmon.glob("temp*_input"))
    least_c, most_c = LIMITS["celsius"]

    def ask(_: float) -> tuple[float]:
        found, failed = [], None
        for file in _some(files, hwmon):
            try:
                found.append(read_number(file) / 1000)  # m°C
            except ATTRIBUTE_ERRORS as error:
                failed = error
        if not found and failed is not None:
            raise failed
        return (max((value for value in found if least_c <= value <= most_c), default=found[0]),)

    return ask
