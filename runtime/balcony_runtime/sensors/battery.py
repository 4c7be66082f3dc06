"""Batteries from power_supply: charge, direction, and the power of the device while it runs on them.

A device with several batteries (many laptops) gets one reading over all of them, with charges weighted by capacity, because a
charge floor is about their total. Batteries of mice and headsets (``scope`` is ``Device``) do not power the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from balcony_edge.device.readings import Reading
from balcony_runtime.sensors.base import Absence, NothingOpen, SourceSample
from balcony_runtime.sensors.sysfs import entries, number_or_none, text_or_none

#: Files of which a battery has at least one. A charger that calls itself a battery (max77693, bq24190) has none of them.
_GAUGES = {"capacity", "charge_now", "current_now", "energy_now", "power_now"}


@dataclass(frozen=True, slots=True)
class _State:
    """One battery: charge (0 to 1), capacity in µWh, unsigned W, status."""

    charge: float | None
    capacity_uwh: float | None
    watts: float | None
    status: str


class Battery(NothingOpen):
    """``battery:BAT0`` (or ``battery:BAT0+BAT1``), and ``battery:drain`` for the board while it runs only on batteries."""

    name = "battery"

    def __init__(self, sysfs: Path) -> None:
        self._directory = sysfs / "class/power_supply"
        self._batteries: tuple[Path, ...] = ()
        self._mains: tuple[Path, ...] = ()

    def discover(self) -> None:
        supplies = entries(self._directory)
        kinds = {supply: text_or_none(supply / "type") for supply in supplies}
        own = [supply for supply in supplies if text_or_none(supply / "scope") != "Device"]
        batteries = [supply for supply in own if kinds[supply] == "Battery"]
        gauged = [one for one in batteries if not _GAUGES.isdisjoint(file.name for file in entries(one))]
        self._batteries = tuple(gauged or batteries)
        # USB_DCP, USB_PD and others: some drivers tell the kind of charger in the type (power_supply_sysfs.c)
        feeding = ("Mains", "USB", "BrickID", "Wireless")
        self._mains = tuple(supply for supply in own if (kinds[supply] or "").startswith(feeding))

    def read(self, now_s: float) -> SourceSample:
        if not self._batteries:
            return SourceSample(absences=(Absence(self.name, "this device has no battery that the kernel knows"),))
        states = {path.name: _read(path) for path in self._batteries if text_or_none(path / "status")}
        gone = tuple(
            Absence(f"battery:{path.name}", "it reports no status: it was removed, or has no driver")
            for path in self._batteries
            if path.name not in states
        )
        if not states:
            return SourceSample(absences=gone)
        source = f"battery:{'+'.join(states)}"
        draining = [state for state in states.values() if state.status == "Discharging"]
        moving = draining or [state for state in states.values() if state.status == "Charging"]
        watts = [state.watts for state in moving if state.watts]  # 0 means that the driver does not measure power
        total = sum(watts) if watts and len(watts) == len(moving) else None
        known = any(state.status in ("Charging", "Full", "Not charging") for state in states.values())
        online = any((number_or_none(path / "online") or 0) > 0 for path in self._mains)
        fed = False if draining else True if known or online else None
        charge = _charge(list(states.values()))
        readings = [Reading(source, "battery", now_s, watts=total, charge=charge, charging=fed)]
        absences = list(gone)
        if charge is None:
            absences.append(Absence(source, "no charge: neither charge, energy nor capacity can be read"))
        if not draining or online:
            absences.append(Absence("battery:drain", "the device does not run only on its battery"))
        elif total is None:
            absences.append(Absence("battery:drain", "the battery's driver measures no current"))
        else:
            readings.append(Reading("battery:drain", "board", now_s, watts=total))
        return SourceSample(tuple(readings), tuple(absences))


def _read(path: Path) -> _State:
    """Read one battery. Units of power_supply: µW, µV, µA, µWh, µAh. Some drivers sign the current by its direction."""
    power = number_or_none(path / "power_now")
    current, voltage = number_or_none(path / "current_now"), number_or_none(path / "voltage_now")
    watts = None
    if power is not None:
        watts = abs(power) / 1e6
    elif current is not None and voltage is not None:
        watts = abs(current) * voltage / 1e12
    charge = capacity_uwh = None
    for kind in ("energy", "charge"):
        now, full = number_or_none(path / f"{kind}_now"), number_or_none(path / f"{kind}_full")
        if now is not None and full:
            # An aged battery can be above the full charge that its gauge has learned: 101 % means full.
            charge = min(now / full, 1.0) if now / full < 1.1 else now / full
            # Ah of batteries with different voltages are not comparable; the nominal voltage converts them to µWh.
            nominal = number_or_none(path / "voltage_min_design") or voltage
            capacity_uwh = float(full) if kind == "energy" else full * nominal / 1e6 if nominal else None
            break
    else:
        percent = number_or_none(path / "capacity")
        charge = None if percent is None else percent / 100
    return _State(charge, capacity_uwh, watts, text_or_none(path / "status") or "Unknown")


def _charge(states: list[_State]) -> float | None:
    """Charge over all batteries, weighted by capacity if all of them report it."""
    known = [(state.charge, state.capacity_uwh) for state in states if state.charge is not None]
    if not known or len(known) < len(states):
        return None
    weights = [capacity if all(c for _, c in known) and capacity else 1.0 for _, capacity in known]
    return sum(charge * weight for (charge, _), weight in zip(known, weights, strict=True)) / sum(weights)
