"""Sampling in the background: readings that are shown or not, and a bad sensor that does not affect the others."""

from __future__ import annotations

import gc
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from balcony_edge.device.readings import Reading
from balcony_edge.errors import InputError
from balcony_runtime.sensors import Absence, Sensors, SourceHealth, SourceSample, device_sources
from balcony_runtime.sensors.base import NothingOpen
from balcony_runtime.sensors.battery import Battery
from balcony_runtime.sensors.jetson import Jetson
from balcony_runtime.sensors.system import System, busy_share
from balcony_runtime.sensors.thermal import Thermal

Tree = Callable[[str], Path]


def eventually(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    """Wait for a condition, for a long time because the machine may be busy."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def health(sensors: Sensors, source: str) -> SourceHealth:
    (found,) = [health for health in sensors.health() if health.source == source]
    return found


def shown(sensors: Sensors) -> dict[str, Reading]:
    readings = sensors.latest()
    found = {reading.source: reading for reading in readings}
    assert len(found) == len(readings)
    return found


def test_a_device_is_sampled_and_nonsense_is_dropped(sysfs_tree: Tree, tmp_path: Path) -> None:
    root, before = sysfs_tree("thor"), set(threading.enumerate())
    before_s = time.monotonic()
    with Sensors([Jetson(root), Thermal(root)], rate_hz=10) as sensors:
        first = shown(sensors)
        assert first["ina238:VIN"].watts == 23.5 and first["thermal:tj-thermal"].celsius == 55.093
        assert "ina3221:VDD_GPU" not in first  # −0.392 W
        assert "thermal:gpu-thermal" not in first
        assert before_s <= first["ina238:VIN"].time_s <= time.monotonic()
        jetson, thermal = health(sensors, "jetson"), health(sensors, "thermal")
        assert jetson.state == thermal.state == "present"
        assert jetson.dropped >= 1 and jetson.last_dropped == "ina3221:VDD_GPU: watts = -0.392"
        assert [absence.part for absence in thermal.absences] == ["thermal:gpu-thermal"]
        file = root / "class/hwmon/hwmon2/power1_input"
        (tmp_path / "next").write_text("31000000\n")
        (tmp_path / "next").replace(file)  # nobody reads a half-written file
        eventually(lambda: shown(sensors)["ina238:VIN"].watts == 31.0)
        assert shown(sensors)["ina238:VIN"].time_s > first["ina238:VIN"].time_s
    assert not [one for one in set(threading.enumerate()) - before if one.name.startswith("sensors-")]


def test_sensors_that_were_started_or_closed_do_not_start_again(tmp_path: Path) -> None:
    """Threads start once; after close() they would end at once, and nothing would be read."""
    used, closed = Sensors([Thermal(tmp_path)]), Sensors([Thermal(tmp_path)])
    with used, pytest.raises(InputError, match="started or closed before: make others with Sensors"):
        used.start()
    closed.close()
    for sensors in (used, closed):
        with pytest.raises(InputError, match="started or closed before: make others with Sensors"):
            sensors.start()


def test_sensors_that_nobody_has_any_more_end(tmp_path: Path) -> None:
    """A notebook that loads a bundle again, without closing it, would read the device with more threads each time."""
    sensors = Sensors([Thermal(tmp_path)], rate_hz=10).start()
    (thread,) = [channel.thread for channel in sensors._channels]
    del sensors
    gc.collect()
    eventually(lambda: not thread.is_alive())


def test_a_sensor_that_hangs_ages_and_is_dropped_while_the_others_go_on(sysfs_tree: Tree, tmp_path: Path) -> None:
    root = sysfs_tree("thor")
    meter = root / "class/hwmon/hwmon2/power1_input"
    with Sensors([Jetson(root), Thermal(root)], rate_hz=10, stale_s=1.0) as sensors:
        assert "ina238:VIN" in shown(sensors)
        meter.unlink()
        os.mkfifo(meter)  # opening it blocks in the kernel until a writer opens it
        eventually(lambda: health(sensors, "jetson").state == "hung")
        took_s = []
        for _ in range(5):  # a busy machine may hold up a call, and a call that waits would wait every time
            began = time.perf_counter()
            readings = shown(sensors)
            took_s.append(time.perf_counter() - began)
        assert min(took_s) < 0.2  # the read hangs until a writer opens the file
        assert not [source for source in readings if source.startswith("ina")]
        samples = health(sensors, "thermal").samples
        eventually(lambda: health(sensors, "thermal").samples >= samples + 3)
        assert health(sensors, "thermal").state == "present"
        pipe = meter.rename(tmp_path / "pipe")
        meter.write_text("32000000\n")
        with pipe.open("w") as writer:  # lets the hung read go
            writer.write("31000000\n")
        eventually(lambda: "ina238:VIN" in shown(sensors))
        eventually(lambda: shown(sensors)["ina238:VIN"].watts == 32.0)
        assert health(sensors, "jetson").state == "present"


def test_sensors_that_cannot_all_start_leave_no_thread(sysfs_tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may have a limit of processes, and no `with` block ends those that run already."""
    root = sysfs_tree("thor")
    sensors = Sensors([Jetson(root), Thermal(root)])
    first, second = (channel.thread for channel in sensors._channels)

    def refuse() -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(second, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"), sensors:
        pass
    eventually(lambda: not first.is_alive(), 5.0)


def test_a_thermal_zone_that_hangs_takes_no_other_temperature_with_it(sysfs_tree: Tree, tmp_path: Path) -> None:
    root, before = sysfs_tree("orin_nano"), set(threading.enumerate())
    zone = root / "devices/virtual/thermal/thermal_zone0/temp"
    with Sensors([Thermal(root)], rate_hz=10, stale_s=1.0) as sensors:
        others = shown(sensors).keys() - {"thermal:cpu-thermal"}
        zone.unlink()
        os.mkfifo(zone)
        eventually(lambda: any("does not answer" in a.reason for a in health(sensors, "thermal").absences))
        samples = health(sensors, "thermal").samples
        eventually(lambda: health(sensors, "thermal").samples >= samples + 3)
        assert others and shown(sensors).keys() == others and health(sensors, "thermal").state == "present"
        assert len(set(threading.enumerate()) - before) < 6  # the hung read keeps one thread, and no other is started
        pipe = zone.rename(tmp_path / "pipe")
        zone.write_text("52000\n")
        with pipe.open("w") as writer:  # lets the hung read go
            writer.write("51000\n")
        eventually(lambda: "thermal:cpu-thermal" in shown(sensors))
        assert shown(sensors)["thermal:cpu-thermal"].celsius == 52.0


def test_a_sensor_that_hangs_from_the_start_delays_nothing_but_the_probe(tmp_path: Path) -> None:
    supply = tmp_path / "class/power_supply/BAT0"
    supply.mkdir(parents=True)
    os.mkfifo(supply / "type")
    sensors = Sensors([Battery(tmp_path), System()], rate_hz=10)
    began = time.monotonic()
    sensors.start(probe_s=0.3)
    assert 0.3 <= time.monotonic() - began < 5
    eventually(lambda: "psutil:cpu" in shown(sensors))
    assert health(sensors, "battery").state in ("starting", "hung") and health(sensors, "battery").age_s is None
    began = time.monotonic()
    sensors.close(timeout_s=0.2)
    assert time.monotonic() - began < 5
    with (supply / "type").open("w"):  # lets the thread go
        pass


def test_a_sensor_that_vanishes_is_absent_and_comes_back(tmp_path: Path) -> None:
    battery = tmp_path / "class/power_supply/BAT0"
    battery.mkdir(parents=True)
    for name, value in {"type": "Battery", "status": "Discharging", "capacity": "55"}.items():
        (battery / name).write_text(value)
    with Sensors([Battery(tmp_path)], rate_hz=10) as sensors:
        assert shown(sensors)["battery:BAT0"].charge == 0.55
        battery.rename(tmp_path / "away")
        eventually(lambda: shown(sensors) == {})
        eventually(lambda: health(sensors, "battery").absences[0].reason.startswith("this device has no battery"))
        assert health(sensors, "battery").state == "absent"
        (tmp_path / "away").rename(battery)
        eventually(lambda: "battery:BAT0" in shown(sensors))
        assert health(sensors, "battery").state == "present"


class _Raises:
    """A source with a bug, or with a binding that raises an unexpected exception: it raises what it is given, or gives it."""

    name = "raises"
    closed = False

    def __init__(self, given: Any) -> None:
        self._given = given

    def discover(self) -> None:
        pass

    def read(self, now_s: float) -> Any:
        if isinstance(self._given, Exception):
            raise self._given
        return self._given

    def close(self) -> None:
        self.closed = True


def test_a_source_that_raises_is_absent_with_what_it_raised() -> None:
    source = _Raises(ZeroDivisionError("by zero"))
    with Sensors([source, System()]) as sensors:
        assert health(sensors, "raises").absences == (Absence("raises", "ZeroDivisionError: by zero"),)
        assert health(sensors, "raises").state == "absent" and "psutil:memory" in shown(sensors)
    assert source.closed


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (None, "AttributeError: 'NoneType' object has no attribute 'readings'"),
        (SourceSample((Reading("a", "board", 0.0, celsius="41"),)), "TypeError: "),  # type: ignore[arg-type]
    ],
)
def test_a_source_that_gives_no_readings_is_absent_with_the_reason(given: Any, why: str) -> None:
    """Its thread must not end: the source would be called hung for ever, and nothing would say why."""
    with Sensors([_Raises(given)], rate_hz=10) as sensors:
        eventually(lambda: health(sensors, "raises").samples > 1)
        found = health(sensors, "raises")
        assert found.state == "absent" and found.absences[0].reason.startswith(why)


class Forgetful:
    """A GPU of 10 W whose energy query sometimes fails."""

    name = "forgetful"

    def __init__(self) -> None:
        self.asked = 0

    def discover(self) -> None:
        pass

    def read(self, now_s: float) -> SourceSample:
        self.asked += 1
        joules = None if self.asked % 4 == 3 else 500_000 + 10 * now_s
        return SourceSample((Reading("nvml:0", "gpu", now_s, watts=10.0, joules=joules),))

    def close(self) -> None:
        pass


def test_a_counter_that_fails_for_a_moment_is_not_replaced_by_a_sum() -> None:
    source, seen = Forgetful(), []
    with Sensors([source], rate_hz=10) as sensors:
        while source.asked < 12 or (None not in seen and source.asked < 200):
            seen.append(shown(sensors)["nvml:0"].joules)
            time.sleep(0.002)
    counted = [joules for joules in seen if joules is not None]
    assert None in seen and min(counted) >= 500_000
    assert counted == sorted(counted)


class Stepped:
    """A source that reads when the test lets it; only its reads move the clock."""

    name = "stepped"

    def __init__(self) -> None:
        self.now_s = 100.0
        self.discoveries = [0]  # how many there had been, at each read
        self._samples: queue.Queue[tuple[SourceSample, float]] = queue.Queue()

    def discover(self) -> None:
        self.discoveries[-1] += 1

    def read(self, now_s: float) -> SourceSample:
        sample, takes_s = self._samples.get()
        self.now_s += takes_s
        self.discoveries.append(self.discoveries[-1])
        return sample

    def close(self) -> None:
        pass

    def let(self, *readings: Reading, takes_s: float = 0.05) -> None:
        self._samples.put((SourceSample(readings), takes_s))

    def give(self, sensors: Sensors, *readings: Reading, takes_s: float = 0.05) -> tuple[Reading, ...]:
        """Let the source read once more, and return what is shown then."""
        before = health(sensors, "stepped").samples
        self.let(*readings, takes_s=takes_s)
        eventually(lambda: health(sensors, "stepped").samples > before)
        return sensors.latest()


def test_watts_without_a_counter_are_summed_up_over_time() -> None:
    source = Stepped()
    sensors = Sensors([source], rate_hz=10, stale_s=50, clock=lambda: source.now_s).start(probe_s=0.0)
    joules = []
    # 4 W; after half a second 8 W; again; after the longest pause; after a longer one; after a moment
    for time_s, watts in ((100.0, 4.0), (100.5, 8.0), (101.0, 8.0), (103.0, 6.0), (105.1, 6.0), (105.2, 6.0)):
        (reading,) = source.give(sensors, Reading("a", "cpu", time_s, watts=watts))
        joules.append(reading.joules)
    assert joules == [0.0, pytest.approx(3.0), pytest.approx(7.0), pytest.approx(21.0), None, pytest.approx(34.2)]
    (counted,) = source.give(sensors, Reading("b", "cpu", 105.2, watts=6.0, joules=77.0))
    assert counted.joules == 77.0
    (hot,) = source.give(sensors, Reading("c", "cpu", 105.2, celsius=50.0))
    assert hot.joules is None
    source.let()
    sensors.close()


def test_health_says_how_a_source_is() -> None:
    source = Stepped()
    sensors = Sensors([source], rate_hz=10, stale_s=2.0, clock=lambda: source.now_s)
    fresh = health(sensors, "stepped")
    assert (fresh.state, fresh.age_s, fresh.read_ms, fresh.samples) == ("starting", None, None, 0)
    assert sensors.start(probe_s=0.0) is sensors
    source.give(sensors, Reading("a", "cpu", 100.0, watts=-3.0), Reading("b", "cpu", 100.0, celsius=40.0))
    present = health(sensors, "stepped")
    assert (present.state, present.samples, present.dropped) == ("present", 1, 1)
    assert present.last_dropped == "a: watts = -3"
    assert (present.age_s, present.read_ms) == (0.0, pytest.approx(50.0))
    source.now_s += 1.0
    assert health(sensors, "stepped").age_s == pytest.approx(1.0)
    source.give(sensors)
    assert health(sensors, "stepped").state == "absent"
    source.let()
    sensors.close()


def test_a_present_source_is_discovered_every_ten_seconds_and_an_absent_one_at_each_read() -> None:
    source = Stepped()
    sensors = Sensors([source], rate_hz=10, stale_s=50, clock=lambda: source.now_s).start(probe_s=0.0)
    hot = Reading("a", "cpu", 100.0, celsius=40.0)
    for readings, takes_s in (
        ((hot,), 5.0),
        ((hot,), 5.0),
        ((hot,), 0.0),
        ((), 0.0),
        ((), 0.0),
        ((hot,), 0.0),
        ((hot,), 0.0),
    ):
        source.give(sensors, *readings, takes_s=takes_s)
    source.let()
    sensors.close()
    # at seconds 0, 5 and 10, and then at once; the fourth read gives nothing, the sixth something again
    assert source.discoveries[:7] == [1, 1, 2, 2, 3, 4, 4]


class _Silent:
    """A source that has nothing, and remembers when it was asked."""

    name = "silent"

    def __init__(self) -> None:
        self.asked_s: list[float] = []

    def discover(self) -> None:
        self.asked_s.append(time.monotonic())

    def read(self, now_s: float) -> SourceSample:
        return SourceSample()

    def close(self) -> None:
        pass


def test_an_absent_source_is_asked_less_and_less_often() -> None:
    source = _Silent()
    with Sensors([source], rate_hz=10):
        eventually(lambda: len(source.asked_s) >= 4)
    pauses = [late - early for early, late in pairwise(source.asked_s)]
    # 2, 4 and 8 periods of 0.1 s; a thread that is stopped just before it asks seems to have asked later
    assert pauses[0] > 0.1 and pauses[1] > 0.3 and pauses[2] > 0.6


def test_closing_waits_for_all_hung_sources_together() -> None:
    sources = [Stepped() for _ in range(40)]
    sensors = Sensors(sources, rate_hz=10).start(probe_s=0.0)
    eventually(lambda: all(source.discoveries[0] for source in sources))
    began = time.monotonic()
    sensors.close(timeout_s=0.2)
    assert 0.2 <= time.monotonic() - began < 6  # one after another they would take 8 s
    left = [thread for thread in threading.enumerate() if thread.name == "sensors-stepped"]
    assert len(left) == 40 and all(thread.daemon for thread in left)  # they end with the process
    for source in sources:
        source.let()


def test_old_readings_are_not_shown_and_order_is_that_of_the_sources() -> None:
    now_s = [100.0]

    class Measured(NothingOpen):
        def __init__(self, *readings: Reading) -> None:
            self.name, self.readings = readings[0].source, readings

        def discover(self) -> None:
            """It knows what it has."""

        def read(self, now_s: float) -> SourceSample:
            once, self.readings = self.readings, ()
            return SourceSample(tuple(replace(one, time_s=now_s) for one in once))

    sources = [
        Measured(Reading("b", "cpu", 0.0, watts=1.0), Reading("a", "gpu", 0.0, watts=2.0)),
        Measured(Reading("0", "cpu", 0.0, watts=3.0)),
    ]
    with Sensors(sources, clock=lambda: now_s[0]) as sensors:
        assert [reading.source for reading in sensors.latest()] == ["b", "a", "0"]
        now_s[0] = 102.0
        assert len(sensors.latest()) == 3
        now_s[0] = 102.001
        assert sensors.latest() == ()


@pytest.mark.parametrize(
    ("rate_hz", "stale_s", "message"),
    [(0, 2, "rate_hz = 0"), (10.5, 2, "at most 10"), (float("nan"), 2, "rate_hz = nan"), (-1, 2, "rate_hz = -1"),
     (1, 1, "stale_s = 1: must be above one period, 1 s at 1 Hz"), (5, float("inf"), "stale_s = inf")],
)  # fmt: skip
def test_rates_out_of_range(rate_hz: float, stale_s: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sensors([], rate_hz=rate_hz, stale_s=stale_s)


@pytest.mark.parametrize(("rate_hz", "stale_s"), [(10, 0.11), (2, 0.51), (0.1, 11.0)])
def test_rates_at_the_ends_of_the_range(rate_hz: float, stale_s: float) -> None:
    assert Sensors([], rate_hz=rate_hz, stale_s=stale_s).latest() == ()


@pytest.mark.parametrize(
    ("after", "share"),
    [
        ((10.5, 5.5), 0.5),
        ((10.3, 5.2), 0.4),
        ((9.9, 5.4), 1.0),  # the kernel decreased the idle seconds, as on a machine under full load
        ((10.2, 4.9), 0.0),
        ((10.0, 5.0), None),
    ],
)
def test_a_share_of_cpus_stays_a_share(after: tuple[float, ...], share: float | None) -> None:
    assert busy_share((10.0, 5.0), after) == pytest.approx(share)


def test_this_machine_by_a_second_opinion(tmp_path: Path) -> None:
    """psutil's figures against /proc, while this process keeps one CPU busy."""
    with Sensors(device_sources(tmp_path), rate_hz=5) as sensors:
        begin = time.monotonic()
        while True:  # the process may not have run in the span of the latest reading
            readings = shown(sensors)
            cpu = readings.get("psutil:cpu")
            spent_s = time.monotonic() - begin
            if spent_s > 20 or (spent_s > 1.5 and cpu is not None and cpu.own_utilization):
                break
        shutil.rmtree(tmp_path)
    cpu, cpus = readings["psutil:cpu"], os.cpu_count() or 1
    assert cpu.utilization is not None and cpu.own_utilization is not None
    assert 0 < cpu.own_utilization <= 1 / cpus + 0.15
    assert cpu.utilization >= cpu.own_utilization - 0.15  # of ticks of 10 ms in 200 ms
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    memory, process = readings["psutil:memory"], readings["psutil:process"]
    assert memory.memory_total_bytes == kib["MemTotal"] * 1024
    assert memory.memory_bytes == pytest.approx((kib["MemTotal"] - kib["MemAvailable"]) * 1024, rel=0.5)
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    private = sum(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Private_"))
    assert process.memory_bytes == pytest.approx(private, rel=0.1)


def test_a_large_process_is_measured_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its private memory takes the kernel long to count: at most one per cent of the time goes into it."""
    source, reads = System(), []

    def slow() -> Any:
        reads.append(1)
        time.sleep(0.03)
        return SimpleNamespace(uss=7)

    monkeypatch.setattr(source, "_memory", slow)
    counts = []
    for now_s in (0.0, 1.0, 2.0, 2.9, 60_000.0):
        (process,) = [reading for reading in source.read(now_s).readings if reading.source == "psutil:process"]
        assert process.memory_bytes == 7
        counts.append(len(reads))
    assert counts == [1, 1, 1, 1, 2]


def test_shares_of_the_processor_are_summed_up_over_time() -> None:
    source = Stepped()
    sensors = Sensors([source], rate_hz=10, stale_s=50, clock=lambda: source.now_s).start(probe_s=0.0)
    sums = []
    for time_s, used, own in ((100.0, 0.2, 0.0), (101.0, 0.6, 0.4), (102.0, 0.6, 0.4), (105.0, 0.6, 0.4)):
        (reading,) = source.give(sensors, Reading("a", "cpu", time_s, utilization=used, own_utilization=own))
        sums.append((reading.busy_s, reading.own_busy_s))
    assert sums == [(0.0, 0.0), pytest.approx((0.4, 0.2)), pytest.approx((1.0, 0.6)), (None, None)]
    source.let()
    sensors.close()
