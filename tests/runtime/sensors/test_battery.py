"""Batteries and what feeds them, as drivers of real devices show them in sysfs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from balcony_runtime.sensors.battery import Battery
from tests.runtime.sensors.test_sysfs import look, missing, put, values


def battery(root: Path, name: str = "BAT0", **attributes: object) -> None:
    for attribute, value in {"type": "Battery", **attributes}.items():
        put(root / "class/power_supply" / name / attribute, value)


@pytest.mark.parametrize(
    ("attributes", "wanted"),
    [
        # Current × voltage, a driver that signs the current, charge instead of energy.
        (
            {"status": "Discharging", "current_now": -1500000, "voltage_now": 11400000, "charge_now": 2000000,
             "charge_full": 4000000},
            {"battery:BAT0": ("battery", 17.1, 0.5, False), "battery:drain": ("board", 17.1)},
        ),
        ({"status": "Charging", "power_now": 30000000, "capacity": 42}, {"battery:BAT0": ("battery", 30.0, 0.42, True)}),
        ({"status": "Full", "power_now": 0, "energy_now": 50500000, "energy_full": 50000000},
         {"battery:BAT0": ("battery", 1.0, True)}),  # an aged battery above what its gauge learned
        ({"status": "Unknown", "capacity": 80}, {"battery:BAT0": ("battery", 0.8)}),
        ({"status": "Discharging", "capacity": 80}, {"battery:BAT0": ("battery", 0.8, False)}),  # measures no power
        ({"status": "Discharging", "power_now": 0}, {"battery:BAT0": ("battery", False)}),  # neither a 0 W device
    ],
)  # fmt: skip
def test_batteries(attributes: dict[str, object], wanted: dict[str, object], tmp_path: Path) -> None:
    battery(tmp_path, **attributes)
    sample = look(Battery(tmp_path))
    assert values(sample) == wanted
    assert ("battery:drain" in wanted) != ("battery:drain" in missing(sample))


@pytest.mark.parametrize("online", [1, 2])  # 2 is a charger whose voltage can be programmed
def test_a_weak_charger_hides_the_devices_draw(tmp_path: Path, online: int) -> None:
    battery(tmp_path, status="Discharging", power_now=3000000, capacity=50)
    put(tmp_path / "class/power_supply/usb/type", "USB")
    put(tmp_path / "class/power_supply/usb/online", online)
    assert values(look(Battery(tmp_path))) == {"battery:BAT0": ("battery", 3.0, 0.5, False)}


def test_batteries_in_watt_hours_and_ampere_hours_are_weighted_in_one_unit(tmp_path: Path) -> None:
    """BAT0: 20 of 100 Wh; BAT1: 4 of 5 Ah at 10 V, so 40 of 50 Wh. Without the voltage BAT1 would hardly count."""
    battery(tmp_path, "BAT0", status="Full", energy_now=20_000_000, energy_full=100_000_000)
    battery(tmp_path, "BAT1", status="Full", charge_now=4_000_000, charge_full=5_000_000, voltage_min_design=10_000_000)
    assert values(look(Battery(tmp_path)))["battery:BAT0+BAT1"] == ("battery", pytest.approx(0.4), True)
    (tmp_path / "class/power_supply/BAT1/voltage_min_design").unlink()  # without a voltage: the plain mean
    assert values(look(Battery(tmp_path)))["battery:BAT0+BAT1"] == ("battery", pytest.approx(0.5), True)
    put(tmp_path / "class/power_supply/BAT1/voltage_now", 10_000_000)  # the present one, if no nominal one is known
    assert values(look(Battery(tmp_path)))["battery:BAT0+BAT1"] == ("battery", pytest.approx(0.4), True)


@pytest.mark.parametrize(
    ("now", "full", "charge"),
    [
        (100, 100, 1.0),
        (109, 100, 1.0),
        (110, 100, 1.1),
        (0, 100, 0.0),
        (50, 0, 0.42),
    ],  # full = 0: the gauge knows nothing
)
def test_a_little_above_full_is_full_and_much_above_is_nonsense(
    now: int, full: int, charge: float, tmp_path: Path
) -> None:
    battery(tmp_path, status="Full", energy_now=now, energy_full=full, capacity=42)
    (reading,) = look(Battery(tmp_path)).readings
    assert reading.charge == pytest.approx(charge)


@pytest.mark.parametrize(
    ("status", "charging"),
    [("Charging", True), ("Full", True), ("Not charging", True), ("Discharging", False), ("Unknown", None)],
)
def test_a_battery_is_fed_by_its_status(status: str, charging: bool | None, tmp_path: Path) -> None:
    battery(tmp_path, status=status, capacity=80)
    (reading,) = look(Battery(tmp_path)).readings
    assert reading.charging is charging
    for online, fed in (("0", charging), ("1", charging if charging is not None else True)):
        put(tmp_path / "class/power_supply/AC/type", "Mains")
        put(tmp_path / "class/power_supply/AC/online", online)
        (reading,) = look(Battery(tmp_path)).readings
        assert reading.charging is fed


def test_one_battery_that_drains_decides(tmp_path: Path) -> None:
    """Watts and direction are those of the batteries that drain, while another one charges from them or is full."""
    battery(tmp_path, "BAT0", status="Discharging", power_now=9_000_000, capacity=50)
    battery(tmp_path, "BAT1", status="Charging", power_now=4_000_000, capacity=70)
    battery(tmp_path, "BAT2", status="Full", power_now=1_000_000, capacity=90)
    assert values(look(Battery(tmp_path))) == {
        "battery:BAT0+BAT1+BAT2": ("battery", 9.0, pytest.approx(0.7), False),
        "battery:drain": ("board", 9.0),
    }
    # one of two that drain measures nothing: no sum
    put(tmp_path / "class/power_supply/BAT1/status", "Discharging")
    put(tmp_path / "class/power_supply/BAT1/power_now", 0)
    sample = look(Battery(tmp_path))
    assert values(sample) == {"battery:BAT0+BAT1+BAT2": ("battery", pytest.approx(0.7), False)}
    assert missing(sample) == {"battery:drain": "the battery's driver measures no current"}


def test_a_charger_that_calls_itself_a_battery_does_not_hide_the_battery(tmp_path: Path) -> None:
    """A Galaxy S III under Linux 6: its charger max77693 has the type of a battery, a status, and no gauge."""
    battery(
        tmp_path, "max170xx_battery", status="Discharging", current_now=-400_000, voltage_now=4_000_000, capacity=60
    )
    battery(tmp_path, "max77693-charger", status="Discharging", health="Good", present=1, online=0)
    sample = look(Battery(tmp_path))
    assert values(sample) == {
        "battery:max170xx_battery": ("battery", 1.6, 0.6, False),
        "battery:drain": ("board", 1.6),
    }
    assert sample.absences == ()


def test_a_battery_of_a_mouse_and_one_without_status_are_not_the_devices(tmp_path: Path) -> None:
    battery(tmp_path, "BAT0", status="Discharging", power_now=5_000_000)
    battery(tmp_path, "hidpp", status="Discharging", capacity=10, scope="Device")
    battery(tmp_path, "BAT1", capacity=90)
    sample = look(Battery(tmp_path))
    assert values(sample) == {"battery:BAT0": ("battery", 5.0, False), "battery:drain": ("board", 5.0)}
    assert missing(sample) == {
        "battery:BAT1": "it reports no status: it was removed, or has no driver",
        "battery:BAT0": "no charge: neither charge, energy nor capacity can be read",
    }


@pytest.mark.parametrize(
    ("kind", "online", "drains"),
    [
        ("Mains", 1, False),
        ("USB", 1, False),
        ("USB_DCP", 1, False),
        ("USB_PD", 1, False),
        ("Wireless", 1, False),
        ("Mains", 0, True),
        ("UPS", 1, True),
    ],
)
def test_a_device_drains_its_battery_where_nothing_feeds_it(
    kind: str, online: int, drains: bool, tmp_path: Path
) -> None:
    battery(tmp_path, status="Discharging", power_now=5_000_000, capacity=50)
    battery(tmp_path, "supply", type=kind, online=online)
    sample = look(Battery(tmp_path))
    assert ("battery:drain" in values(sample)) is drains
    if not drains:
        assert missing(sample) == {"battery:drain": "the device does not run only on its battery"}


def test_two_batteries_that_drain_add_up_and_one_taken_out_is_named(tmp_path: Path) -> None:
    battery(tmp_path, "BAT0", status="Discharging", power_now=3000000, charge_now=1, charge_full=4)
    battery(tmp_path, "BAT1", status="Discharging", power_now=4500000, capacity=75)
    source = Battery(tmp_path)
    assert values(look(source)) == {
        "battery:BAT0+BAT1": ("battery", 7.5, 0.5, False),  # one battery does not report its capacity: the plain mean
        "battery:drain": ("board", 7.5),
    }
    shutil.rmtree(tmp_path / "class/power_supply/BAT1")
    sample = source.read(1.0)
    assert values(sample)["battery:BAT0"] == ("battery", 3.0, 0.25, False) and "BAT1" in "".join(missing(sample))
