"""NVML with a C stand-in for the driver's library, which nvidia-ml-py loads in separate processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_PROGRAM = """
import json, os, sys
from balcony_runtime.sensors.nvml import Nvml
nvml = Nvml()
def look(discover=True):
    if discover:
        nvml.discover()
    sample = nvml.read(1.0)
    return {"readings": [reading.to_dict() for reading in sample.readings],
            "missing": {absence.part: [absence.reason, absence.cure] for absence in sample.absences}}
"""
_WHOLE = {
    "source": "nvml:0", "scope": "gpu", "time_s": 1.0, "watts": 61.5, "joules": 1234.567, "celsius": 67.0,
    "utilization": 0.85, "memory_bytes": 3 << 30, "memory_total_bytes": 8 << 30, "throttled": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def library(nvml_library: Callable[..., Path]) -> Path:
    return nvml_library()


def ask(library: Path, program: str = "print(json.dumps(look()))", **environment: object) -> Any:
    """Output of the program, as JSON; it runs with ``NVML_<NAME>`` set."""
    settings = {f"NVML_{name.upper()}": str(value) for name, value in environment.items()}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM + program],
        env={**os.environ, "LD_LIBRARY_PATH": str(library), **settings},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def each(library: Path, variable: str, settings: list[Any]) -> list[Any]:
    """One read for each setting of ``NVML_<variable>``, in one process."""
    return list(ask(library, f"""
seen = []
for setting in {settings}:
    os.environ["NVML_{variable}"] = str(setting)
    seen.append(look())
print(json.dumps(seen))
"""))  # fmt: skip


def test_a_whole_gpu(library: Path) -> None:
    assert ask(library) == {"readings": [_WHOLE], "missing": {}}


def test_two_gpus_keep_their_numbers(library: Path) -> None:
    readings = ask(library, count=2)["readings"]
    assert [(reading["source"], reading["watts"]) for reading in readings] == [("nvml:0", 61.5), ("nvml:1", 123.0)]


def test_of_several_gpus_budgets_are_about_the_one_that_cuda_uses(library: Path) -> None:
    """CUDA's first GPU is NVML's second here. Without CUDA all GPUs count."""
    program = """
from balcony_runtime.backends.accelerator import cuda
cuda.pci_bus_id = lambda: "0000:65:00.0"
print(json.dumps(look()))
"""

    def scopes(found: Any) -> dict[str, str]:
        return {reading["source"]: reading["scope"] for reading in found["readings"]}

    assert scopes(ask(library, program, count=3)) == {"nvml:0": "other", "nvml:1": "gpu", "nvml:2": "other"}
    assert scopes(ask(library, program, count=3, unopened=2)) == {"nvml:0": "other", "nvml:1": "gpu"}
    for unknown in ({"unopened": 1}, {"unplaced": 1}):
        assert set(scopes(ask(library, program, count=3, **unknown)).values()) == {"gpu"}
    assert scopes(ask(library, program)) == {"nvml:0": "gpu"}  # the only one


def test_a_gpu_that_cannot_be_opened_hides_no_other(library: Path) -> None:
    seen = ask(library, count=3, unopened=1)
    assert [reading["source"] for reading in seen["readings"]] == ["nvml:0", "nvml:2"]
    assert seen["missing"] == {"nvml:1": ["GPU is lost", ""]}


def test_what_is_not_supported_is_absent_and_named(library: Path) -> None:
    refused = {
        "PowerUsage": ["watts"],
        "TotalEnergyConsumption": ["joules"],
        "UtilizationRates": ["utilization"],
        "Temperature": ["celsius"],
        "MemoryInfo": ["memory_bytes", "memory_total_bytes"],
        "ClocksEventReasons": ["throttled"],
        "PowerUsage,ClocksEventReasons": ["watts", "throttled"],
    }
    for (_, fields), found in zip(refused.items(), each(library, "UNSUPPORTED", list(refused)), strict=True):
        assert found["readings"] == [{name: value for name, value in _WHOLE.items() if name not in fields}]
        assert found["missing"] == {"nvml:0": [f"no {', '.join(fields)}: Not Supported", ""]}


def test_orin_initialises_and_supports_nothing(library: Path) -> None:
    found = ask(library, unsupported="all")
    assert found["readings"] == [] and "as on Jetson Orin" in found["missing"]["nvml:0"][0]


@pytest.mark.parametrize(
    ("environment", "own"),
    [
        ({"pid": "self"}, 0.6),  # samples of 70 % and 50 %
        ({"pid": "self", "quiet": 1}, 0.0),  # it uses the GPU, which was idle
        ({"pid": 4000000}, None),  # another process, or this one under another id: unknown
        ({}, None),
        ({"pid": "self", "unsupported": "ProcessUtilization"}, None),
    ],
)
def test_own_share(library: Path, environment: dict[str, object], own: float | None) -> None:
    (reading,) = ask(library, **environment)["readings"]
    assert reading["utilization"] == 0.85 and reading.get("own_utilization") == own


def test_own_share_is_that_of_the_last_second(library: Path) -> None:
    """The driver keeps the samples of a process that has become idle."""
    program = "found = [look(), look()]; os.environ['NVML_AGO_MS'] = '5000'; print(json.dumps([*found, look()]))"
    for count in (1, 2):
        shares = [
            [reading["own_utilization"] for reading in seen["readings"]]
            for seen in ask(library, program, pid="self", count=count)
        ]
        assert shares == [[0.6] * count, [0.6] * count, [0.0] * count]


def test_a_gpu_without_memory_of_its_own_or_one_that_is_lost_hides_none(library: Path) -> None:
    program = "from balcony_edge.device.machine import this_device as here\n"
    program += "print(json.dumps([gpu.model_dump() for gpu in here().gpus]))"
    plain = ask(library, program, count=2)
    assert len(plain) == 2 and plain[0]["memory_bytes"] == 8 << 30
    assert [gpu["memory_bytes"] for gpu in ask(library, program, count=2, unsupported="MemoryInfo")] == [0, 0]
    assert ask(library, program, count=3, unopened=1) == [plain[0]] * 2


def test_limits_throttle_and_idling_does_not(library: Path) -> None:
    limits = {0x0: False, 0x1: False, 0x2: False, 0x4: True, 0x8: True, 0x10: False, 0x20: True, 0x41: True, 0x80: True,
              0x100: False}  # fmt: skip
    found = each(library, "REASONS", list(limits))
    assert [look["readings"][0]["throttled"] for look in found] == list(limits.values())


def test_an_old_driver_gives_what_it_has(nvml_library: Callable[..., Path]) -> None:
    """Before 535 clock reasons have another name, and before 510 the processes of a GPU are not listed in this form."""
    found = ask(nvml_library("NVML_OLD_DRIVER"), reasons=0x40)
    missing = {"nvml:0": ["no own_utilization: Function Not Found", ""]}
    assert found == {"readings": [{**_WHOLE, "throttled": True}], "missing": missing}


def test_no_library_and_no_driver_name_their_cures(library: Path, tmp_path: Path) -> None:
    found = ask(tmp_path)
    assert found["readings"] == [] and "Not Found" in found["missing"]["nvml"][0]
    assert "--gpus all" in found["missing"]["nvml"][1]
    found = ask(library, init=9)
    assert found["missing"]["nvml"][0] == "Driver Not Loaded" and "modprobe nvidia" in found["missing"]["nvml"][1]
    assert ask(library, count=0)["missing"] == {"nvml": ["the driver runs but finds no GPU", ""]}


def test_a_gpu_that_falls_off_the_bus_is_found_again(library: Path) -> None:
    lost, still, back = ask(
        library,
        "look(); os.environ['NVML_LOST'] = '1'; seen = [look()]; os.environ['NVML_INIT'] = '9'; seen.append(look())\n"
        "del os.environ['NVML_LOST'], os.environ['NVML_INIT']; seen.append(look()); nvml.close(); nvml.close()\n"
        "print(json.dumps(seen))",
    )
    assert lost == {"readings": [], "missing": {"nvml:0": ["GPU is lost", ""]}}
    assert still["readings"] == [] and still["missing"]["nvml"][0] == "Driver Not Loaded"
    assert back == {"readings": [_WHOLE], "missing": {}}


def test_a_hung_driver_stops_nobody_else(library: Path) -> None:
    program = """
import threading, time
from pathlib import Path
from balcony_runtime.sensors import Sensors, device_sources
with Sensors(device_sources(Path(sys.argv[0] or "/nonexistent")), rate_hz=10, stale_s=2) as sensors:
    end = time.monotonic() + 20
    while len({reading.source for reading in sensors.latest()} & {"nvml:0", "psutil:cpu"}) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    before = {reading.source for reading in sensors.latest()}
    os.environ["NVML_HANG"] = "1"
    while any(health.state != "hung" for health in sensors.health() if health.source == "nvml"):
        time.sleep(0.05)
    began = time.perf_counter()
    after = {reading.source for reading in sensors.latest()}
    looked_s = time.perf_counter() - began
    began = time.perf_counter()
print(json.dumps([sorted(before), sorted(after), looked_s, time.perf_counter() - began]))
"""
    before, after, looked_s, closed_s = ask(library, program)
    assert "nvml:0" in before and "psutil:cpu" in before
    assert "nvml:0" not in after and "psutil:cpu" in after
    assert looked_s < 0.9, "a look must not wait for the hung thread, as close() does"
    assert 0.9 < closed_s < 10.0  # close() waits a second for the hung thread


def test_doctor_shows_the_gpu(library: Path) -> None:
    program = "from balcony_edge.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "doctor"],
        env={**os.environ, "LD_LIBRARY_PATH": str(library), "NVML_UNSUPPORTED": "TotalEnergyConsumption", "COLUMNS": "160"},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    for text in (
        "Stand-in GPU, driver 580.00",
        "61.5 W, 67.0 °C, 85% busy, 3.22 of 8.6 GB",
        "no joules: Not Supported",
    ):
        assert text in done.stdout, text
