"""GPUs of AMD, Intel, Qualcomm and Raspberry Pi over trees after their drivers' documents, and over faults of these drivers."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from balcony_edge.budget import Budget
from balcony_edge.control.governor import Demand, Governor, govern
from balcony_edge.control.observed import hottest_c, unseen, utilization, watts
from balcony_edge.device.readings import Reading
from balcony_runtime.sensors import Sensors, SourceSample
from balcony_runtime.sensors import sysfs as attributes
from balcony_runtime.sensors.gpus import Gpus
from balcony_runtime.sensors.plausible import Plausibility
from tests.runtime.sensors.test_sysfs import look, put

Tree = Callable[[str], Path]
RADEON = "devices/pci0000:00/0000:00:01.1/0000:03:00.0"
ARC = "devices/pci0000:00/0000:00:01.0/0000:03:00.0"
STATS = "devices/platform/axi/1002000000.v3d/gpu_stats"


def missing(sample: SourceSample) -> list[tuple[str, str]]:
    return [(absence.part, absence.reason) for absence in sample.absences]


def by_source(sample: SourceSample) -> dict[str, Reading]:
    return {reading.source: reading for reading in sample.readings}


def queues(root: Path, time_ns: int, **runtime_ns: int) -> None:
    lines = [f"{name}\t{time_ns}\t7\t{runtime}" for name, runtime in runtime_ns.items()]
    put(root / STATS, "\n".join(["queue\ttimestamp\tjobs\truntime", *lines]))


def later(reading: Reading, now_s: float) -> Reading:
    """The same values at another time; a counter of energy has gone on."""
    joules = reading.joules
    if joules is not None and reading.watts is not None:
        joules += reading.watts * (now_s - reading.time_s)
    return replace(reading, time_s=now_s, joules=joules)


def test_radeon_and_the_graphics_of_a_ryzen(sysfs_tree: Tree) -> None:
    sample = look(Gpus(sysfs_tree("radeon")))
    assert sample.readings == (  # the card with most memory first, whatever its number
        Reading("amdgpu:card1", "gpu", 1.0, watts=187.0, celsius=74.0, utilization=0.87, memory_bytes=6 << 30,
                memory_total_bytes=17163091968),
        Reading("amdgpu:card0", "gpu", 1.0, celsius=41.0, utilization=0.03, memory_bytes=32 << 20,
                memory_total_bytes=512 << 20),
        Reading("amdgpu:card0:chip", "other", 1.0, watts=31.09),  # CPU cores are in it
    )  # fmt: skip
    assert sample.absences == ()


def test_a_discrete_card_comes_before_the_graphics_of_a_cpu(sysfs_tree: Tree) -> None:
    """Intel's drivers do not tell the memory of a card; graphics inside an AMD CPU do."""
    root = sysfs_tree("radeon")
    card = root / RADEON
    (card / "mem_info_vram_total").unlink()
    (card / "driver").unlink()
    (card / "driver").symlink_to("../../../../bus/pci/drivers/xe")
    gpus = Gpus(root)
    gpus.discover()
    assert [gpu.source for gpu in gpus._gpus.values()] == ["xe:card1", "amdgpu:card0"]


def test_arc_and_integrated_graphics(sysfs_tree: Tree) -> None:
    root = sysfs_tree("intel_gpus")
    gpus = Gpus(root)
    first = look(gpus)
    assert first.readings == (  # watts and load need a second read
        Reading("xe:card1", "gpu", 1.0, joules=5000.0, celsius=62.0, throttled=True),
        Reading("i915:card0", "gpu", 1.0, throttled=False),
    )
    put(root / ARC / "hwmon/hwmon4/energy1_input", 5_030_000_000)
    put(root / ARC / "tile0/gt0/gtidle/idle_residency_ms", 100_050)
    put(root / ARC / "tile0/gt1/gtidle/idle_residency_ms", 200_200)
    put(root / "class/drm/card0/gt/gt0/rc6_residency_ms", 500_150)
    second = look(gpus, 1.2)
    assert second.readings == (
        Reading("xe:card1", "gpu", 1.2, watts=pytest.approx(150), joules=5030.0, celsius=62.0,
                utilization=pytest.approx(0.75), throttled=True),  # of its render GT; the media GT sleeps
        Reading("i915:card0", "gpu", 1.2, utilization=pytest.approx(0.25), throttled=False),
    )  # fmt: skip
    unknown = "its driver in this kernel does not report it"
    assert missing(second) == [("i915:card0", f"no watts, joules, celsius: {unknown}")]


def test_a_card_of_i915_counts_its_parts_once_and_old_kernels_have_one_counter(sysfs_tree: Tree) -> None:
    root = sysfs_tree("arc_i915")
    (reading,) = look(Gpus(root)).readings
    assert reading.joules == 2.0  # of the hwmon chip "i915", not of "i915_gt0"
    shutil.rmtree(root / "class/drm/card0/gt")
    put(root / "class/drm/card0/power/rc6_residency_ms", 1000)
    gpus = Gpus(root)
    look(gpus)
    put(root / "class/drm/card0/power/rc6_residency_ms", 1500)
    (reading,) = gpus.read(2.0).readings
    assert reading.utilization == pytest.approx(0.5) and reading.throttled is None


def test_package_energy_where_the_card_has_none(sysfs_tree: Tree) -> None:
    root = sysfs_tree("intel_gpus")
    (root / ARC / "hwmon/hwmon4/energy1_input").unlink()
    assert by_source(look(Gpus(root)))["xe:card1"].joules == 3000.0


def test_raspberry_pi_takes_the_busiest_queue(sysfs_tree: Tree) -> None:
    root = sysfs_tree("raspberrypi5")
    gpus = Gpus(root)
    queues(root, 1_000_000_000, bin=5_000_000, render=6_000_000, csd=7_000_000, cpu=0)
    assert look(gpus) == SourceSample()  # a share needs two reads
    queues(root, 1_200_000_000, bin=5_000_000, render=46_000_000, csd=127_000_000, cpu=190_000_000)
    assert look(gpus, 1.2).readings == (Reading("v3d:card0", "gpu", 1.2, utilization=pytest.approx(0.6)),)
    put(root / STATS, "queue\ttimestamp\tjobs\truntime\ncsd\t17")
    ((part, reason),) = missing(gpus.read(1.4))
    assert part == "v3d:card0" and "'csd 17' is not a queue, a time, jobs and a run time" in reason


def test_adreno(sysfs_tree: Tree) -> None:
    (reading,) = look(Gpus(sysfs_tree("phone"))).readings
    assert reading == Reading("kgsl:kgsl-3d0", "gpu", 1.0, celsius=51.0, utilization=0.42, throttled=True)


@pytest.mark.parametrize("tree", ["orin_nano", "laptop", "server", "macbook"])
def test_a_device_without_such_a_gpu_says_so(tree: str, sysfs_tree: Tree) -> None:
    assert missing(look(Gpus(sysfs_tree(tree)))) == [
        ("gpu", "no GPU of AMD, Intel, Qualcomm or Raspberry Pi whose driver reports in sysfs")
    ]


def test_a_suspended_card_is_not_woken(sysfs_tree: Tree) -> None:
    root = sysfs_tree("intel_gpus")
    gpus = Gpus(root)
    look(gpus)
    for file in (root / ARC).rglob("*_input"):
        file.unlink()  # a read would now be an absence with another reason
    put(root / ARC / "power/runtime_status", "suspended")
    sample = gpus.read(1.2)
    assert sample.readings[0] == Reading("xe:card1", "gpu", 1.2, utilization=0.0)
    reason = "the kernel has suspended it, and reading would wake it"
    assert missing(sample)[0] == ("xe:card1", f"no watts, joules, celsius, throttled: {reason}")
    put(root / ARC / "power/runtime_status", "active")
    assert (
        gpus.read(9.0).readings[0].utilization is None
    )  # its counter stood still: 7.8 s of sleep are not 7.8 s of load
    put(root / ARC / "tile0/gt0/gtidle/idle_residency_ms", 100_100)
    put(root / ARC / "tile0/gt1/gtidle/idle_residency_ms", 200_200)
    assert gpus.read(9.2).readings[0].utilization == pytest.approx(0.5)


@pytest.mark.parametrize("after_ms", [200, 4_294_967_400, 5_000_000_000])
def test_idle_time_that_wraps_or_jumps_is_no_load(after_ms: int, sysfs_tree: Tree) -> None:
    """A counter of 32 bits wraps to 200; the other two jump by 400 ms and by days within 200 ms."""
    root = sysfs_tree("arc_i915")
    idle = root / "class/drm/card0/gt/gt0/rc6_residency_ms"
    gpus = Gpus(root)
    look(gpus)
    put(idle, after_ms)
    assert gpus.read(1.2).readings[0].utilization is None
    put(idle, after_ms + 150)
    assert gpus.read(1.4).readings[0].utilization == pytest.approx(0.25)


def test_energy_that_restarts_counts_on(sysfs_tree: Tree) -> None:
    root = sysfs_tree("intel_gpus")
    energy, gpus, plausibility = root / ARC / "hwmon/hwmon4/energy1_input", Gpus(root), Plausibility()
    found = []
    for now_s, counted in ((1.0, 5_000_000_000), (1.5, 5_050_000_000), (2.0, 1_000_000), (2.5, 31_000_000)):
        put(energy, counted)
        clean = plausibility.clean(look(gpus, now_s).readings[0])
        assert clean is not None
        found.append((clean.watts, clean.joules))
    assert found == [(None, 5000.0), (100.0, 5050.0), (None, 5050.0), (60.0, 5080.0)]
    assert plausibility.dropped == 0


def test_counters_that_stand_still_measure_nothing(sysfs_tree: Tree) -> None:
    root = sysfs_tree("intel_gpus")
    put(root / "class/drm/card0/gt/gt0/rc6_residency_ms", 0)  # as with i915.enable_rc6=0 and in virtual machines
    gpus = Gpus(root)
    look(gpus)
    sample = gpus.read(1.2)
    assert by_source(sample)["xe:card1"].watts is None
    reasons = "\n".join(reason for _, reason in missing(sample))
    assert "no watts, joules: its counter does not move: the firmware does not update it" in reasons
    assert "no utilization: it has never been in RC6, so its idle time is unknown" in reasons


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EBUSY, "Device or resource busy"),
        (errno.EIO, "Input/output error"),
        (errno.EPERM, "permission denied"),
        (errno.EACCES, "permission denied"),
        (errno.ENODEV, "the device is gone"),
    ],
)
def test_a_read_that_fails_costs_only_its_own_value(
    number: int, reason: str, sysfs_tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = sysfs_tree("radeon")
    busy = root / RADEON / "gpu_busy_percent"
    opened = os.open

    def refuse(path: Path, flags: int) -> int:
        if Path(path).resolve() == busy.resolve():
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, flags)

    gpus = Gpus(root)
    gpus.discover()
    monkeypatch.setattr(attributes.os, "open", refuse)
    sample = gpus.read(1.0)
    assert (sample.readings[0].utilization, sample.readings[0].watts) == (None, 187.0)
    ((part, why),) = missing(sample)
    assert part == "amdgpu:card1" and why.startswith(f"no utilization: {reason} (") and why.endswith("busy_percent)")


def test_an_input_output_error_of_the_kernel_itself(sysfs_tree: Tree) -> None:
    root = sysfs_tree("radeon")
    busy = root / RADEON / "gpu_busy_percent"
    busy.unlink()
    busy.symlink_to("/proc/self/mem")  # address 0 is not mapped: EIO
    assert missing(look(Gpus(root))) == [("amdgpu:card1", "no utilization: Input/output error")]


@pytest.mark.parametrize("text", ["", "N/A", "87 percent", "9" * 30])
def test_nonsense_is_absent_with_a_reason(text: str, sysfs_tree: Tree) -> None:
    root = sysfs_tree("radeon")
    put(root / RADEON / "gpu_busy_percent", text)
    sample = look(Gpus(root))
    assert sample.readings[0].utilization is None
    assert "no utilization: its file does not contain a number" in missing(sample)[0][1]


def test_impossible_values_are_dropped_and_do_not_hide_a_cards_other_sensors(sysfs_tree: Tree) -> None:
    root = sysfs_tree("radeon")
    put(root / RADEON / "gpu_busy_percent", 6500)
    put(root / RADEON / "hwmon/hwmon2/temp3_input", 65_535_000)
    (root / RADEON / "hwmon/hwmon2/temp1_input").unlink()
    plausibility = Plausibility()
    clean = plausibility.clean(look(Gpus(root)).readings[0])
    assert clean is not None and (clean.celsius, clean.utilization, clean.watts) == (74.0, None, 187.0)
    assert plausibility.last_dropped == "amdgpu:card1: utilization = 65"
    put(root / RADEON / "hwmon/hwmon2/temp2_input", "x")
    clean = plausibility.clean(look(Gpus(root)).readings[0])
    assert clean is not None and clean.celsius is None
    assert plausibility.last_dropped == "amdgpu:card1: utilization = 65" and plausibility.dropped == 3


def test_a_card_that_vanishes_is_named_and_then_forgotten(sysfs_tree: Tree) -> None:
    root = sysfs_tree("radeon")
    gpus = Gpus(root)
    look(gpus)
    shutil.rmtree(root / RADEON)
    sample = gpus.read(1.2)
    assert [reading.source for reading in sample.readings] == ["amdgpu:card0", "amdgpu:card0:chip"]
    assert [part for part, _ in missing(sample)] == ["amdgpu:card1"]
    assert missing(look(gpus, 1.4)) == []


def test_a_card_that_hangs_does_not_hide_the_other(sysfs_tree: Tree) -> None:
    root = sysfs_tree("radeon")
    busy = root / RADEON / "gpu_busy_percent"
    gpus = Gpus(root)
    gpus.discover()
    busy.unlink()
    os.mkfifo(busy)  # opening it blocks in the kernel until a writer opens it
    sample = gpus.read(1.0)
    assert [reading.source for reading in sample.readings] == ["amdgpu:card0", "amdgpu:card0:chip"]
    assert missing(sample) == [("amdgpu:card1", "it does not answer")]
    with busy.open("w") as writer:  # lets the thread go
        writer.write("1\n")


def test_a_new_driver_begins_new_counters(sysfs_tree: Tree) -> None:
    root = sysfs_tree("intel_gpus")
    gpus = Gpus(root)
    look(gpus)
    (root / ARC / "hwmon/hwmon4").rename(root / ARC / "hwmon/hwmon7")  # the driver was loaded again
    put(root / ARC / "hwmon/hwmon7/energy1_input", 1_000_000)
    reading = look(gpus, 1.2).readings[0]
    assert (reading.joules, reading.watts, reading.celsius) == (1.0, None, 62.0)


def test_powers_of_one_drivers_cards_add_up_and_the_first_cards_load_counts(sysfs_tree: Tree) -> None:
    root = sysfs_tree("radeon")
    (root / "devices/pci0000:00/0000:00:08.1/0000:12:00.0/hwmon/hwmon3/in1_label").unlink()  # now a second card
    readings = look(Gpus(root)).readings
    power, load = watts(readings, "gpu", 1.0), utilization(readings, "gpu", 1.0)
    assert power is not None and power.value == pytest.approx(187 + 31.09)
    assert load is not None and load.value == 0.87


@pytest.mark.parametrize(
    ("tree", "keys"),
    [
        ("radeon", {"power_w", "gpu_utilization", "temperature_c"}),
        ("intel_gpus", {"power_w", "gpu_utilization", "temperature_c"}),
        ("raspberrypi5", {"gpu_utilization"}),
        ("phone", {"gpu_utilization", "temperature_c"}),
    ],
)
def test_readings_reach_the_governor_under_the_keys_of_an_nvidia_gpu(
    tree: str, keys: set[str], sysfs_tree: Tree
) -> None:
    """Two reads through the sampler's checks; the ceilings are below what is measured, so each of them must bind."""
    root = sysfs_tree(tree)
    gpus, plausibility = Gpus(root), Plausibility()
    if tree == "raspberrypi5":
        queues(root, 1_000_000_000, csd=0)
    look(gpus, 10.0)
    if tree == "raspberrypi5":
        queues(root, 2_000_000_000, csd=900_000_000)
    if tree == "intel_gpus":
        put(root / ARC / "hwmon/hwmon4/energy1_input", 5_150_000_000)
        put(root / ARC / "tile0/gt0/gtidle/idle_residency_ms", 100_100)
    readings = tuple(clean for reading in look(gpus, 11.0).readings if (clean := plausibility.clean(reading)))
    limits = {"power_w": 20.0, "gpu_utilization": 0.2, "temperature_c": 40.0}
    budget = Budget(power_rail="gpu", **limits)
    assert set(limits) - set(unseen(budget, readings, 11.0)) == keys
    for key in keys:
        one = Budget(**{key: limits[key]}, **({"power_rail": "gpu"} if key == "power_w" else {}))
        governor = Governor()
        for tick in range(30):  # the gauge stands above the ceiling whatever we do
            now_s = 11.0 + tick / 10
            moved = [later(reading, now_s) for reading in readings]
            governor = govern(governor, Demand(one, now_s, now_s, moved, (0.01, 0.02), 0, 1, 0.0))
        assert governor.binding == (key,) and governor.share < 0.5, key
    assert (hottest_c(readings, 11.0) is not None) == ("temperature_c" in keys)


def test_through_the_sampler(sysfs_tree: Tree) -> None:
    with Sensors([Gpus(sysfs_tree("radeon"))], rate_hz=10) as sensors:
        (card, *_) = sensors.latest()
        (health,) = sensors.health()
    assert (card.source, card.watts) == ("amdgpu:card1", 187.0) and card.joules is not None  # summed up over time
    assert (health.source, health.state) == ("gpu", "present")
