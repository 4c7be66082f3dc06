"""Sources that read sysfs, over copies of the trees of real devices and over faults of their drivers."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from balcony_runtime.sensors import Absence, Source, SourceSample, device_sources
from balcony_runtime.sensors.battery import Battery
from balcony_runtime.sensors.jetson import Jetson
from balcony_runtime.sensors.rapl import Rapl
from balcony_runtime.sensors.sysfs import absence, number_or_none, numbered, read_number, text_or_none
from balcony_runtime.sensors.thermal import Thermal

Tree = Callable[[str], Path]


def look(source: Source, now_s: float = 1.0) -> SourceSample:
    source.discover()
    return source.read(now_s)


def values(sample: SourceSample) -> dict[str, tuple[Any, ...]]:
    """Source → scope, then the values that are not None."""
    found = {}
    for reading in sample.readings:
        assert reading.time_s == 1.0
        source, scope, _, *rest = reading.to_dict().values()
        found[source] = (scope, *rest)
    assert len(found) == len(sample.readings), "two readings of one name"
    return found


def missing(sample: SourceSample) -> dict[str, str]:
    return {absence.part: absence.reason for absence in sample.absences}


def put(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n")


def test_orin_nano(sysfs_tree: Tree) -> None:
    root = sysfs_tree("orin_nano")
    sample = look(Jetson(root))
    assert values(sample) == {
        "ina3221:VDD_IN": ("board", 6.16),  # 4.928 V × 1.25 A
        "ina3221:VDD_CPU_GPU_CV": ("other", 1.23),
        "ina3221:VDD_SOC": ("other", 1.476),
        "devfreq:17000000.gpu": ("gpu", 0.437),
        "jetson:throttle-alert": ("board", False),
    }
    assert sample.absences == ()
    assert values(look(Thermal(root))) == {
        "thermal:cpu-thermal": ("cpu", 49.531),
        "thermal:gpu-thermal": ("gpu", 48.25),
        "thermal:cv0-thermal": ("other", -256.0),  # the sampler drops it
        "thermal:tj-thermal": ("board", 49.531),
    }


def test_agx_orin_adds_up_what_no_rail_measures(sysfs_tree: Tree) -> None:
    root = sysfs_tree("agx_orin")
    assert values(look(Jetson(root))) == {
        "ina3221:VDD_GPU_SOC": ("gpu", 3.2),
        "ina3221:VDD_CPU_CV": ("cpu", 0.8),
        "ina3221:VIN_SYS_5V0": ("other", 4.5),
        "ina3221:VDDQ_VDD2_1V8AO": ("memory", 0.4),  # a part of VIN_SYS_5V0, so not in the sum
        "ina3221:total": ("board", 8.5),
        "devfreq:17000000.ga10b": ("gpu", 0.0),  # measured and idle, so a real 0
        "jetson:throttle-alert": ("board", True),
    }
    assert values(look(Thermal(root)))["thermal:Tboard_tegra"] == ("board", 35.0)
    put(root / "class/hwmon/hwmon3/curr2_input", "")
    sample = look(Jetson(root))
    assert "ina3221:total" not in values(sample)  # a sum without one of its parts is not a total
    assert "does not contain a number" in missing(sample)["ina3221:VDD_CPU_CV"]


def test_a_nano_under_jetpack_4_has_its_rails_in_iio(tmp_path: Path) -> None:
    chip = tmp_path / "bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    rails = (("POM_5V_IN", 5000, 400), ("POM_5V_GPU", 5000, 8), ("POM_5V_CPU", 5000, 60))
    for channel, (label, millivolts, milliamperes) in enumerate(rails):
        put(chip / f"rail_name_{channel}", label)
        put(chip / f"in_voltage{channel}_input", millivolts)
        put(chip / f"in_current{channel}_input", milliamperes)
    assert values(look(Jetson(tmp_path))) == {
        "ina3221:POM_5V_IN": ("board", 2.0),
        "ina3221:POM_5V_GPU": ("gpu", 0.04),
        "ina3221:POM_5V_CPU": ("cpu", 0.3),
    }


def test_thor(sysfs_tree: Tree) -> None:
    root = sysfs_tree("thor")
    assert list(values(look(Jetson(root)))) == [
        "ina238:VIN", "ina3221:VDD_GPU", "ina3221:VDD_CPU_SOC_MSS", "ina3221:VIN_SYS_5V0"
    ]  # fmt: skip
    assert values(look(Jetson(root))) == {
        "ina238:VIN": ("board", 23.5),
        "ina3221:VDD_GPU": ("gpu", -0.392),  # the sampler drops it
        "ina3221:VDD_CPU_SOC_MSS": ("cpu", 6.5),
        "ina3221:VIN_SYS_5V0": ("other", 6.5),
    }
    sample = look(Thermal(root))
    assert values(sample)["thermal:cpu-thermal"] == ("cpu", 53.687)
    assert list(missing(sample)) == ["thermal:gpu-thermal"]


def test_laptop(sysfs_tree: Tree) -> None:
    root = sysfs_tree("laptop")
    assert values(look(Rapl(root))) == {"rapl:package-0": ("cpu", 81500.0), "rapl:psys": ("board", 190250.0)}
    assert values(look(Battery(root))) == {
        "battery:BAT0+BAT1": ("battery", 9.25, 0.4125, False),  # (21.6 + 18) Wh of (24 + 72) Wh
        "battery:drain": ("board", 9.25),
    }
    assert values(look(Thermal(root))) == {
        "thermal:acpitz": ("board", 51.0),
        "thermal:INT3400 Thermal": ("other", 20.0),
        "thermal:x86_pkg_temp": ("cpu", 55.0),
        "thermal:iwlwifi_1": ("other", 43.0),
        "hwmon:coretemp:Package id 0": ("cpu", 56.0),
    }
    jetson = look(Jetson(root))
    assert jetson.readings == () and "not a Jetson" in missing(jetson)["jetson"]


def test_server(sysfs_tree: Tree) -> None:
    root = sysfs_tree("server")
    assert values(look(Rapl(root))) == {
        "rapl:package-0": ("cpu", 1000.0),
        "rapl:package-0/dram": ("memory", 2000.0),
        "rapl:package-1": ("cpu", 3000.0),
        "rapl:package-1/dram": ("memory", 4000.0),
    }
    assert values(look(Thermal(root))) == {
        "hwmon:coretemp:Package id 0": ("cpu", 61.0),
        "hwmon:coretemp:Package id 1": ("cpu", 64.0),
    }
    assert "no battery" in missing(look(Battery(root)))["battery"]


def test_the_sources_of_a_device_read_one_tree_most_trusted_first(sysfs_tree: Tree) -> None:
    found: dict[str, str] = {}
    for tree in ("orin_nano", "laptop"):
        sources = device_sources(sysfs_tree(tree))
        assert [source.name for source in sources] == [
            "jetson", "raspberrypi", "macsmc", "nvml", "gpu", "rapl", "battery", "thermal", "psutil"
        ]  # fmt: skip
        for source in sources:
            if source.name not in ("nvml", "psutil"):
                found |= {reading.source: source.name for reading in look(source).readings}
    for part, source_name in {
        "ina3221:VDD_IN": "jetson",
        "rapl:package-0": "rapl",
        "battery:BAT0+BAT1": "battery",
        "thermal:tj-thermal": "thermal",
        "hwmon:coretemp:Package id 0": "thermal",
    }.items():
        assert found[part] == source_name


@pytest.mark.parametrize("source", [Jetson, Rapl, Battery, Thermal])
def test_an_empty_tree_is_absent_with_a_reason(source: Callable[[Path], Source], tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        sample = look(source(root))
        assert sample.readings == () and len(sample.absences) == 1
        assert sample.absences[0].part == source(root).name and len(sample.absences[0].reason) > 20


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        ({1: "Tctl", 2: "Tdie"}, {"hwmon:k10temp:Tdie": 51.0}),  # a Threadripper 2950X: Tctl is 27 degrees above
        ({1: "Tctl", 3: "Tccd1"}, {"hwmon:k10temp:Tctl": 50.0}),
    ],
)
def test_the_temperature_of_an_amd_cpu(labels: dict[int, str], wanted: dict[str, float], tmp_path: Path) -> None:
    chip = tmp_path / "class/hwmon/hwmon2"
    chip.mkdir(parents=True)
    (chip / "name").write_text("k10temp\n")
    for number, label in labels.items():
        (chip / f"temp{number}_label").write_text(f"{label}\n")
        (chip / f"temp{number}_input").write_text(f"{49_000 + 1000 * number}\n")
    thermal = Thermal(tmp_path)
    thermal.discover()
    assert {one.source: one.celsius for one in thermal.read(0.0).readings} == wanted


def test_a_machine_without_rapl_is_told_what_to_try(tmp_path: Path) -> None:
    links = tmp_path / "docker/class/powercap"
    links.mkdir(parents=True)
    (links / "intel-rapl:0").symlink_to("../../devices/virtual/powercap/intel-rapl/intel-rapl:0")  # which is masked
    for root in (tmp_path, tmp_path / "docker"):
        (absent,) = look(Rapl(root)).absences
        assert absent.cure == (
            "on such a CPU: sudo modprobe intel_rapl_msr; Docker: run with --security-opt systempaths=unconfined"
        )


def test_labels_that_repeat_are_told_apart(tmp_path: Path) -> None:
    for index, celsius in enumerate((50, 51, 52)):
        put(tmp_path / f"class/thermal/thermal_zone{index}/type", "x86_pkg_temp")
        put(tmp_path / f"class/thermal/thermal_zone{index}/temp", celsius * 1000)
    names = ["thermal:x86_pkg_temp", "thermal:x86_pkg_temp.2", "thermal:x86_pkg_temp.3"]
    assert values(look(Thermal(tmp_path))) == {name: ("cpu", 50.0 + i) for i, name in enumerate(names)}


def test_the_pmic_of_a_jetson_nano_measures_no_temperature(tmp_path: Path) -> None:
    """Its driver gives 100 °C below the alarm, which would be the hottest sensor of a cool board."""
    for index, (kind, celsius) in enumerate((("CPU-therm", 31), ("PMIC-Die", 100), ("thermal-fan-est", 30))):
        put(tmp_path / f"class/thermal/thermal_zone{index}/type", kind)
        put(tmp_path / f"class/thermal/thermal_zone{index}/temp", celsius * 1000)
    assert values(look(Thermal(tmp_path))) == {
        "thermal:CPU-therm": ("cpu", 31.0),
        "thermal:thermal-fan-est": ("other", 30.0),
    }


def test_rapl_undoes_wraps_and_a_vanished_zone_counts_on(sysfs_tree: Tree) -> None:
    root = sysfs_tree("server")
    rapl, counter = Rapl(root), root / "class/powercap/intel-rapl:0:0/energy_uj"

    def dram(now_s: float) -> tuple[float | None, float | None]:
        rapl.discover()
        (reading,) = [r for r in rapl.read(now_s).readings if r.source == "rapl:package-0/dram"]
        return reading.joules, reading.watts

    put(counter, 65712000000)
    assert dram(1.0) == (65712.0, None)
    put(counter, 387)  # 999,613 µJ to the end of its range, then 0 again
    assert dram(1.25) == (65713.0, 4.0)
    put(counter, 1000387)
    assert dram(1.75) == (65714.0, 2.0)
    counter.rename(counter.with_name("away"))
    assert "does not exist" in missing(rapl.read(2.0))["rapl:package-0/dram"]
    put(counter, 7000387)
    assert dram(3.75) == (65720.0, 3.0)
    put(
        counter, 5
    )  # it has begun again: to the end of the range it would be 65.7 kJ, more than any device takes in 0.5 s
    assert dram(4.25) == (65720.0, None)
    put(counter, 2000005)
    assert dram(4.75) == (65722.0, 4.0)


def test_the_energy_of_a_sleep_is_not_that_of_the_moment_after_it(
    sysfs_tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In s2idle a package goes on counting, and the monotonic clock does not: 300 J in 0.25 s were 1,200 W."""
    root, asleep = sysfs_tree("laptop"), 40.0
    monkeypatch.setattr("balcony_runtime.sensors.sysfs.asleep_s", lambda: asleep)
    rapl, counter = Rapl(root), root / "class/powercap/intel-rapl:0/energy_uj"

    def package(now_s: float, uj: int) -> tuple[float | None, float | None]:
        put(counter, 81500000000 + uj)
        rapl.discover()
        (reading,) = [r for r in rapl.read(now_s).readings if r.source == "rapl:package-0"]
        return reading.joules, reading.watts

    assert package(1.0, 0) == (81500.0, None)
    assert package(1.25, 3000000) == (81503.0, 12.0)
    asleep += 600.0
    assert package(1.5, 303000000) == (81503.0, None)
    assert package(1.75, 306000000) == (81506.0, 12.0)


def test_rapl_without_a_pulse_is_absent(sysfs_tree: Tree) -> None:
    root = sysfs_tree("laptop")
    rapl = Rapl(root)
    assert list(values(look(rapl))) == ["rapl:package-0", "rapl:psys"]  # one read cannot tell whether a counter moves
    put(root / "class/powercap/intel-rapl:0/energy_uj", 81500000000 + 3000000)
    sample = rapl.read(1.5)
    assert [(r.source, r.joules, r.watts) for r in sample.readings] == [("rapl:package-0", 81503.0, 6.0)]
    assert missing(sample) == {"rapl:psys": "its counter does not move: the firmware does not update it"}


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A directory that every user may enter, and the user `nobody` while the test runs."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        user = os.geteuid()
        if user == 0:
            try:
                os.seteuid(65534)
            except OSError as error:
                pytest.skip(f"this container has no other user: {error}")
        try:
            yield directory
        finally:
            os.seteuid(user)


def test_rapl_of_root_names_its_cure(sysfs_tree: Tree, unprivileged: Path) -> None:
    user = os.geteuid()
    os.seteuid(os.getuid())
    root = Path(shutil.copytree(sysfs_tree("server"), unprivileged / "sys"))
    for file in root.glob("class/powercap/*/energy_uj"):
        file.chmod(0o400)
    (root / "class/powercap/intel-rapl:1/energy_uj").chmod(0o444)
    os.seteuid(user)
    if user == os.getuid():  # an ordinary user owns the copies, so that 0o400 would let it read
        for file in root.glob("class/powercap/*/energy_uj"):
            file.chmod(0o444 if "rapl:1/" in str(file) else 0)
    sample = look(Rapl(root))
    assert list(values(sample)) == ["rapl:package-1"]
    assert [absence.part for absence in sample.absences] == [
        "rapl:package-0", "rapl:package-0/dram", "rapl:package-1/dram"
    ]  # fmt: skip
    assert "permission denied" in sample.absences[0].reason and "intel-rapl:0/energy_uj" in sample.absences[0].reason
    assert "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj" in sample.absences[0].cure


@pytest.mark.parametrize(
    ("text", "number"),
    [("51000", 51000), (" -256000 \0", -256000), (str(-(2**63)), -(2**63)), (str(2**64 - 1), 2**64 - 1)],
)
def test_numbers_that_drivers_print(text: str, number: int, tmp_path: Path) -> None:
    put(tmp_path / "temp", text)
    assert read_number(tmp_path / "temp") == number_or_none(tmp_path / "temp") == number


@pytest.mark.parametrize("text", [str(-(2**63) - 1), str(2**64), "9" * 400])
def test_a_number_that_no_driver_prints_is_no_number(text: str, tmp_path: Path) -> None:
    put(tmp_path / "temp", text)
    assert number_or_none(tmp_path / "temp") is None
    with pytest.raises(ValueError, match="temp: has a number that no driver prints"):
        read_number(tmp_path / "temp")


def test_an_attribute_without_a_text_or_a_number_has_none(tmp_path: Path) -> None:
    for text in ("", "  \0\n", "on"):
        put(tmp_path / "state", text)
        assert text_or_none(tmp_path / "state") == (text if text == "on" else None)
        assert number_or_none(tmp_path / "state") is None
    assert text_or_none(tmp_path / "nowhere") is None and number_or_none(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOENT, "x", "/sys/a"), "it does not exist (any more) (/sys/a)"),
        (OSError(errno.ENODEV, "x", "/sys/a"), "the device is gone (/sys/a)"),
        (
            OSError(errno.EAGAIN, "x", "/sys/a"),
            "the driver has no value now, as for a Tegra GPU that is powered down (/sys/a)",
        ),
        (OSError(errno.EACCES, "x", "/sys/a"), "permission denied (/sys/a)"),
        (OSError(errno.ETIMEDOUT, "x"), "it does not answer"),
        (OSError(errno.EIO, "Input/output error", "/sys/a"), "Input/output error (/sys/a)"),
        (OSError("no number"), "no number"),
        (ValueError("'on' is no number"), "its file does not contain a number: 'on' is no number"),
    ],
)
def test_a_part_that_cannot_be_read_has_its_reason_in_words(error: OSError | ValueError, reason: str) -> None:
    assert absence("ina238:VIN", error) == Absence("ina238:VIN", reason, "")
    assert absence("ina238:VIN", error, "look").cure == "look"


def test_entries_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("hwmon10", "hwmon2", "hwmon1", "hwmon", "hwmonx", "xhwmon3", "hwmon4.old"):
        (tmp_path / name).mkdir()
    assert [path.name for path in numbered(tmp_path, "hwmon")] == ["hwmon1", "hwmon2", "hwmon10"]
    assert numbered(tmp_path / "nowhere", "hwmon") == []


def test_a_platform_that_a_second_package_sees_counts_once(sysfs_tree: Tree) -> None:
    root = sysfs_tree("server")
    for number, name in ((8, "psys"), (9, "psys-1")):
        put(root / f"class/powercap/intel-rapl:{number}/name", name)
        put(root / f"class/powercap/intel-rapl:{number}/energy_uj", 5_000_000)
    found = values(look(Rapl(root)))
    assert [found[f"rapl:{name}"][0] for name in ("package-0", "package-1", "psys", "psys-1")] == [
        "cpu",
        "cpu",
        "board",
        "other",
    ]
