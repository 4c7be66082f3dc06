"""``balcony-edge doctor`` over trees of real devices: every source has a value, or is missing with a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from balcony_edge.cli.device.doctor import clock_note
from balcony_edge.device.machine import available_cpus
from tests.support.command import invoke_here

COMMAND = [sys.executable, "-W", "error", "-c", "from balcony_edge.cli import main; main()", "doctor"]


def invoke(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], env={**os.environ, "COLUMNS": "200", **environment}, capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip


def diagnose(*arguments: str | Path) -> Any:
    done = invoke(*arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def report() -> Any:
    """What it says of this machine."""
    return diagnose()


def test_orin_nano(sysfs_tree: Callable[[str], Path]) -> None:
    root = sysfs_tree("orin_nano")
    report = diagnose("--sysfs", root)
    assert report["device"]["cpus"] == available_cpus()
    readings = {reading["source"]: reading for reading in report["sensors"]["readings"]}
    assert (readings["ina3221:VDD_IN"]["scope"], readings["ina3221:VDD_IN"]["watts"]) == ("board", 6.16)
    assert 0 <= readings["psutil:cpu"]["utilization"] <= 1
    sources = {source["source"]: source for source in report["sensors"]["sources"]}
    assert list(sources) == [
        "jetson", "raspberrypi", "macsmc", "nvml", "gpu", "rapl", "battery", "thermal", "psutil"
    ]  # fmt: skip
    assert sources["thermal"]["last_dropped"] == "thermal:cv0-thermal: celsius = -256"
    assert [sources[name]["state"] for name in ("jetson", "rapl", "battery")] == ["present", "absent", "absent"]
    done = invoke("--sysfs", root)
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("ina3221:VDD_IN", "6.2 W", "44% busy", "49.5 °C", "not throttled", "modprobe intel_rapl"):
        assert text in done.stdout, text


def test_laptop_with_watts_by_a_counter(sysfs_tree: Callable[[str], Path]) -> None:
    root = sysfs_tree("laptop")
    counter = root / "class/powercap/intel-rapl:0/energy_uj"
    first_uj, began_s, stop = int(counter.read_text()), time.monotonic(), threading.Event()

    def draw_20_watts() -> None:
        while not stop.wait(0.01):
            fresh = counter.with_name("fresh")  # a sysfs file is never seen half-written
            fresh.write_text(str(first_uj + int(20e6 * (time.monotonic() - began_s))))
            fresh.replace(counter)

    thread = threading.Thread(target=draw_20_watts)
    thread.start()
    try:
        for _ in range(5):  # on a busy machine the writer may be late for both reads of a run
            report = diagnose("--sysfs", root)
            readings = {reading["source"]: reading for reading in report["sensors"]["readings"]}
            if readings["rapl:package-0"]["watts"]:
                break
    finally:
        stop.set()
        thread.join()
    assert 4 < readings["rapl:package-0"]["watts"] < 100  # over 0.2 s, and the writer may be late; not milliwatts
    assert readings["battery:BAT0+BAT1"]["charging"] is False and readings["battery:drain"]["watts"] == 9.25


def test_engines_are_those_of_this_environment(report: Any) -> None:
    ort, webgpu, cuda, *tensorrt = report["engines"]
    import onnxruntime

    assert ort["packages"] == {"onnxruntime": onnxruntime.__version__}
    assert ort["note"].startswith(f"{onnxruntime.__version__} (needs 1.25): bundles run on the CPU")
    assert ort["used"] == "CPUExecutionProvider" and ort["providers"] == onnxruntime.get_available_providers()
    assert ("--device cuda" in ort["note"]) == ("CUDAExecutionProvider" in ort["providers"])
    assert webgpu["engine"] == "webgpu" and webgpu["note"]
    assert [engine["engine"] for engine in tensorrt] == ["tensorrt", "tensorrt_rtx"]
    assert (
        cuda["engine"] == "cuda"
        and cuda["packages"].keys() == {"cuda-python"}
        and "--device auto takes" in cuda["note"]
    )
    assert tensorrt[1]["packages"] and "balcony-edge build" in tensorrt[1]["note"]


def test_a_missing_engine_names_its_cure() -> None:
    program = "import sys; sys.modules['onnxruntime'] = None; from balcony_edge.cli import main; main()"
    command = [sys.executable, "-c", program, "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    (ort,) = [engine for engine in json.loads(done.stdout)["engines"] if engine["engine"] == "onnxruntime"]
    assert ort["used"] is None and "pip install 'balcony-edge[cpu]'" in ort["note"]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("from .tensorrt import *\n", "No module named 'tensorrt.tensorrt'"),
        ("raise FileNotFoundError('Could not find: nvinfer_10.dll.\\nNote')\n", "Could not find: nvinfer_10.dll. Note"),
    ],
    ids=["JetPack", "Windows"],
)
def test_a_tensorrt_that_cannot_be_imported_builds_nothing(source: str, why: str, tmp_path: Path) -> None:
    """That of JetPack, seen by another Python (Debian's have one directory of packages), and one without its libraries."""
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.py").write_text(source)
    done = invoke("--json", PYTHONPATH=str(tmp_path))
    (found,) = [one["note"] for one in json.loads(done.stdout)["engines"] if one["engine"] == "tensorrt"]
    assert found.startswith(f"tensorrt cannot be used ({why}): it is part of JetPack")


def test_a_sensor_that_hangs_is_shown_and_not_waited_for(tmp_path: Path) -> None:
    zone = tmp_path / "class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    for name in ("type", "temp"):
        os.mkfifo(zone / name)
    done = invoke("--sysfs", tmp_path)
    assert done.returncode == 0 and "does not answer" in done.stdout and "psutil:memory" in done.stdout


@pytest.mark.parametrize("columns", ["40", "80"])
def test_no_cure_is_cut(report: Any, columns: str) -> None:
    """Every note and cure of the JSON document is on the screen in one piece, so that a user can copy it."""
    shown = invoke(COLUMNS=columns).stdout
    cures = [absence["cure"] for source in report["sensors"]["sources"] for absence in source["absences"]]
    wanted = [engine["note"] for engine in report["engines"]] + cures
    assert wanted
    for line in wanted:
        assert line in shown, (line, shown)


def test_a_root_that_is_not_a_directory(tmp_path: Path) -> None:
    done = invoke_here("doctor", "--sysfs", tmp_path / "none")
    assert (done.returncode, done.stdout) == (1, "")
    wanted = f"--sysfs {tmp_path / 'none'}: is not a directory: give the root of a sysfs tree, such as /sys"
    assert done.stderr == f"balcony-edge: {wanted}\n"


def test_a_coarse_clock_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows before Python 3.13."""
    assert not clock_note()
    monkeypatch.setattr(time, "get_clock_info", lambda _: SimpleNamespace(resolution=0.015625))
    assert clock_note() == "the clock moves in steps of 15.6 ms, and so do latencies: use Python 3.13 or newer"
