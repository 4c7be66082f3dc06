"""Clocks and degrees of a measurement, from files and readings that are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from balcony_edge.device.readings import Reading
from balcony_runtime.profiler import conditions
from balcony_runtime.profiler.conditions import ConditionWatch


def test_clocks_and_degrees_are_those_of_the_beginning_and_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files have kHz, every CPU counts, and so does the hottest sensor. As in an RK3588: four slow cores, two fast ones."""
    clocks = [tmp_path / f"sys/devices/system/cpu/cpu{number}/cpufreq/scaling_cur_freq" for number in range(6)]
    for number, clock in enumerate(clocks):
        clock.parent.mkdir(parents=True)
        clock.write_text("1800000\n" if number < 4 else "2400000\n")
    degrees = {"thermal:cpu": 40.0, "thermal:soc": 30.0}
    shown = [Reading(source, "cpu", 0.0, celsius=celsius) for source, celsius in degrees.items()]
    sensors: Any = SimpleNamespace(latest=lambda: shown)
    monkeypatch.setattr(conditions, "Path", lambda name: tmp_path / name.lstrip("/"))
    watch = ConditionWatch(sensors)
    for clock in clocks[4:]:
        clock.write_text("1200000\n")
    shown[0] = replace(shown[0], celsius=90.0)
    found = watch.report()
    assert found.cpu_mhz == (2000.0, 1600.0) and found.celsius == (40.0, 90.0)
