"""CPU and memory from psutil, with its figures made up: shares of the time between two reads."""

from __future__ import annotations

import errno
import os
from typing import Any, NamedTuple

import psutil
import pytest

from balcony_edge.device.readings import Reading
from balcony_runtime.sensors.system import System


class _Times(NamedTuple):
    user: float
    nice: float
    system: float
    idle: float
    iowait: float
    guest: float
    guest_nice: float


class _Memory(NamedTuple):
    total: int
    available: int


class _Own(NamedTuple):
    user: float
    system: float
    children_user: float


class _Private(NamedTuple):
    rss: int
    uss: int


class Machine:
    """Four CPUs, and a process; a test sets its clocks."""

    def __init__(self) -> None:
        self.times = _Times(user=100.0, nice=10.0, system=50.0, idle=1000.0, iowait=20.0, guest=5.0, guest_nice=1.0)
        self.own = _Own(user=7.0, system=3.0, children_user=99.0)
        self.private_bytes: int | None = 1000

    def cpu_times(self) -> _Own:
        return self.own

    def memory_full_info(self) -> _Private | _Own:
        if self.private_bytes is None:
            return self.own  # as psutil without /proc/PID/smaps: a record that lacks uss
        return _Private(rss=10**9, uss=self.private_bytes)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(psutil, "Process", lambda: made)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(psutil, "cpu_times", lambda: made.times)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: _Memory(total=8000, available=3000))
    return made


def read(system: System, now_s: float) -> dict[str, Reading]:
    sample = system.read(now_s)
    assert sample.absences == () and all(reading.time_s == now_s for reading in sample.readings)
    return {reading.source: reading for reading in sample.readings}


def test_shares_are_those_of_the_time_since_the_last_read(machine: Machine) -> None:
    system = System()
    first = read(system, 10.0)
    assert list(first) == ["psutil:memory", "psutil:process"]  # one read has no share
    machine.own = _Own(user=7.75, system=3.25, children_user=199.0)
    # 8 seconds of the four CPUs: 3 busy, 4 idle and 1 waiting for a disk; time of guests is in that of users already
    machine.times = _Times(user=102.0, nice=10.25, system=50.75, idle=1004.0, iowait=21.0, guest=7.0, guest_nice=2.0)
    cpu = read(system, 12.0)["psutil:cpu"]
    assert (cpu.scope, cpu.utilization, cpu.own_utilization) == ("cpu", 3 / 8, 1 / 8)
    # each read begins a new span
    machine.times = machine.times._replace(idle=1006.0)
    cpu = read(system, 12.5)["psutil:cpu"]
    assert (cpu.utilization, cpu.own_utilization) == (0.0, 0.0)
    assert "psutil:cpu" not in read(system, 12.5)  # no time has passed


def test_a_system_that_does_not_tell_waits_from_idling_has_shares(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Times(NamedTuple):  # as on macOS
        user: float
        nice: float
        system: float
        idle: float

    times = iter((Times(100.0, 0.0, 50.0, 1000.0), Times(101.0, 0.0, 51.0, 1002.0)))
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(times))
    system = System()
    read(system, 10.0)
    assert read(system, 11.0)["psutil:cpu"].utilization == 0.5


def test_a_tick_too_many_does_not_make_a_share_above_one(machine: Machine) -> None:
    system = System()
    read(system, 10.0)
    machine.own = machine.own._replace(user=8.01)
    machine.times = machine.times._replace(user=101.0)
    assert read(system, 10.25)["psutil:cpu"].own_utilization == 1.0


def test_a_machine_that_does_not_count_its_cpus_has_one(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda: None)
    system = System()
    read(system, 10.0)
    machine.own = machine.own._replace(user=7.5)
    machine.times = machine.times._replace(user=100.5, idle=1000.5)
    assert read(system, 11.0)["psutil:cpu"].own_utilization == 0.5


def test_memory_is_what_is_not_available_and_our_own_is_read_once_a_second(machine: Machine) -> None:
    system: Any = System()
    memory = read(system, 10.0)["psutil:memory"]
    assert (memory.scope, memory.memory_bytes, memory.memory_total_bytes) == ("memory", 5000, 8000)
    found = []
    for now_s in (10.0, 10.5, 10.99, 11.0, 11.5, 12.0):
        machine.private_bytes = int(100 * now_s)
        process = read(system, now_s)["psutil:process"]
        assert process.scope == "process"
        found.append(process.memory_bytes)
    assert found == [1000, 1000, 1000, 1100, 1100, 1200]


def test_a_kernel_that_does_not_tell_private_memory_takes_nothing_else_away(machine: Machine) -> None:
    system = System()
    machine.private_bytes = None
    for now_s, expected in ((10.0, ["psutil:memory"]), (10.5, ["psutil:cpu", "psutil:memory"])):
        machine.times = machine.times._replace(idle=1000.0 + now_s)
        sample = system.read(now_s)
        assert [reading.source for reading in sample.readings] == expected
        assert [absence.part for absence in sample.absences] == ["psutil:process"]
    machine.private_bytes = 3000  # asked again a second later
    assert read(system, 11.0)["psutil:process"].memory_bytes == 3000


def test_shares_follow_a_number_of_cpus_that_changes(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Jetson's power mode brings four more; the time before and after is not mixed."""
    system = System()
    read(system, 10.0)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 8)
    system.discover()
    assert "psutil:cpu" not in read(system, 11.0)
    machine.own = machine.own._replace(user=machine.own.user + 4.0)
    machine.times = machine.times._replace(user=104.0, idle=1004.0)
    assert read(system, 12.0)["psutil:cpu"].own_utilization == 0.5


def test_a_system_that_hides_proc_tells_the_rest(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd's ProcSubset=pid leaves the processes only; a bare chroot has no /proc at all."""

    def hidden() -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/proc/stat")

    def refused() -> None:
        raise psutil.NoSuchProcess(1)

    monkeypatch.setattr(psutil, "cpu_times", hidden)
    monkeypatch.setattr(psutil, "virtual_memory", hidden)
    sample = System().read(10.0)
    assert [reading.source for reading in sample.readings] == ["psutil:process"]
    assert [absence.part for absence in sample.absences] == ["psutil:cpu", "psutil:memory"]
    assert "/proc/stat" in sample.absences[0].reason
    monkeypatch.setattr(psutil, "Process", refused)
    sample = System().read(10.0)
    assert sample.readings == () and len(sample.absences) == 3
