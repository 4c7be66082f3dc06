"""Sensors that start with the first budget that needs them."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from balcony_edge.budget import Budget
from balcony_edge.device.readings import Reading
from balcony_edge.errors import InfeasibleError, InputError
from balcony_runtime import on_demand
from balcony_runtime.on_demand import SensorsOnDemand
from balcony_runtime.sensors import Sensors

WATTS = Budget(power_w=20.0, power_rail="cpu", on_infeasible="error")


class Late:
    """Sensors whose energy counter has no power before its second sample, 0.2 s later."""

    started = closed = 0

    def __init__(self, sources: Any) -> None:
        self.begin_s = time.monotonic()

    def start(self) -> Late:
        Late.started += 1
        return self

    def latest(self) -> tuple[Reading, ...]:
        now_s = time.monotonic()
        watts = 9.0 if now_s > self.begin_s + 0.2 else None
        return (Reading("rapl:package-0", "cpu", now_s, watts=watts, joules=now_s),)

    def close(self) -> None:
        Late.closed += 1


def test_sensors_that_have_just_started_get_the_time_for_a_second_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if something else has started them, such as a trace."""
    monkeypatch.setattr("balcony_runtime.sensors.Sensors", Late)
    Late.started = Late.closed = 0
    sensors = SensorsOnDemand(None)
    sensors.latest()
    sensors.check(WATTS)
    sensors.check(WATTS)
    with pytest.raises(InfeasibleError, match=r"gpu_utilization = 0\.5: no sensor of this device measures it"):
        sensors.check(Budget(gpu_utilization=0.5, on_infeasible="error"))
    sensors.close()
    assert (Late.started, Late.closed) == (1, 1)


def test_sensors_do_not_start_once_they_were_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their threads would read the device until the process ends."""
    monkeypatch.setattr("balcony_runtime.sensors.Sensors", Late)
    Late.started = Late.closed = 0
    sensors = SensorsOnDemand(None)
    sensors.close()
    for call in (sensors.latest, lambda: sensors.check(WATTS)):
        with pytest.raises(InputError, match="this bundle was closed: load it again"):
            call()
    assert (Late.started, Late.closed) == (0, 0)


def test_sensors_that_are_closed_while_they_start_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another thread closes the LLM: the first answers of all sources may take a second."""

    class Slow(Late):
        def start(self) -> Late:
            sensors.close()
            return super().start()

    monkeypatch.setattr("balcony_runtime.sensors.Sensors", Slow)
    Late.started = Late.closed = 0
    sensors = SensorsOnDemand(None)
    sensors.latest()
    assert (Late.started, Late.closed) == (1, 1)


def test_sensors_that_are_closed_just_before_they_start_say_that_the_bundle_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real ones refuse to start then, and name a cure for those who made them themselves."""

    class Slow(Sensors):
        def start(self, **options: Any) -> Slow:
            sensors.close()
            return super().start(**options)

    monkeypatch.setattr("balcony_runtime.sensors.Sensors", Slow)
    monkeypatch.setattr("balcony_runtime.sensors.device_sources", tuple)
    sensors = SensorsOnDemand(None)
    with pytest.raises(InputError, match="this bundle was closed: load it again"):
        sensors.latest()


def test_what_is_not_measured_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """A server asks for each of its replies."""
    sensors = SensorsOnDemand(tuple)
    begin = time.perf_counter()
    asked = [Budget(power_w=5), Budget(power_w=5), Budget(power_w=9), Budget(power_w=5, temperature_c=70)]
    for budget in (*asked, *[Budget(power_w=6, power_rail="gpu")] * 2):
        sensors.check(budget)
    assert time.perf_counter() - begin < on_demand.FIRST_READINGS_S, "these sensors run already"
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "power_w = 5",
        "power_w = 5, temperature_c = 70",
        "power_w = 6",  # of another rail
    ]


def test_one_read_that_failed_refuses_no_reply() -> None:
    """Some drivers give EIO or ENODATA now and then; the source is asked again 0.4 s later."""
    begin_s = time.monotonic()

    def zone() -> tuple[Reading, ...]:
        now_s = time.monotonic()
        return (Reading("thermal:cpu", "cpu", now_s, celsius=45.0),) if now_s > begin_s + 0.3 else ()

    SensorsOnDemand(zone).check(Budget(temperature_c=70, on_infeasible="error"))
    with pytest.raises(InfeasibleError, match="temperature_c = 70: no sensor of this device measures it"):
        SensorsOnDemand(tuple).check(Budget(temperature_c=70, on_infeasible="error"))


def test_a_rail_that_is_not_measured_names_those_that_are(caplog: pytest.LogCaptureFixture) -> None:
    """A mini PC measures its CPU (RAPL) and not its board, which is the default; `doctor` shows nothing missing."""

    def package() -> tuple[Reading, ...]:
        return (Reading("rapl:package-0", "cpu", time.monotonic(), watts=6.0),)

    sensors = SensorsOnDemand(package)
    for budget in (Budget(power_w=10), Budget(energy_j_per_token=1), Budget(gpu_utilization=0.5)):
        sensors.check(budget)
    named = 'says what is missing; power_rail = "cpu" is measured): it is not held'
    assert [record.getMessage().endswith(named) for record in caplog.records] == [True, True, False]


def test_the_handler_of_a_signal_may_set_a_budget_while_sensors_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in the thread that starts them, which would wait for itself for ever; others would never be closed."""

    class Handled(Late):
        def start(self) -> Late:
            if Late.started == 0:
                Late.started += 1
                sensors.check(WATTS)
            return self

    monkeypatch.setattr("balcony_runtime.sensors.Sensors", Handled)
    Late.started = Late.closed = 0
    sensors = SensorsOnDemand(None)
    starting = threading.Thread(target=sensors.latest, daemon=True)
    starting.start()
    starting.join(10)
    assert not starting.is_alive()
    sensors.close()
    assert (Late.started, Late.closed) == (1, 1)


def test_sensors_whose_start_is_interrupted_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their threads would read the device until the process ends, and the next budget would start others."""

    class Interrupted(Late):
        def start(self) -> Late:
            raise KeyboardInterrupt

    monkeypatch.setattr("balcony_runtime.sensors.Sensors", Interrupted)
    Late.closed = 0
    sensors = SensorsOnDemand(None)
    with pytest.raises(KeyboardInterrupt):
        sensors.latest()
    sensors.close()
    assert Late.closed == 1
