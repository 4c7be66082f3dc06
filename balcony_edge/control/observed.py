"""Values of a budget's quantities in the sensors' readings, and the keys of a budget that no sensor measures.

Owns the choice among readings: which are fresh, which are plausible, and which powers add up to a rail. It does not know
the controller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from balcony_edge.budget import Budget
from balcony_edge.control.response import MOST_W, Counter, Sample
from balcony_edge.device.readings import STALE_S, Reading, Scope, adding_up

#: Range of plausible temperatures.
LEAST_C, MOST_C = -60, 200


def watts(readings: Sequence[Reading], rail: Scope, now_s: float) -> Sample | None:
    """Power of a rail, summed over its parts; None if no sensor measures it."""
    found = [
        reading
        for reading in readings
        if reading.scope == rail
        and reading.watts is not None
        and 0 <= reading.watts < MOST_W
        and _fresh(reading, now_s)
    ]
    found = adding_up(found, rail)
    if not found:
        return None
    value = sum(reading.watts or 0.0 for reading in found)
    joules = [reading.joules for reading in found if reading.joules is not None and math.isfinite(reading.joules)]
    counter = None
    if len(joules) == len(found):
        counter = Counter(sum(joules), max(r.time_s for r in found), tuple(r.source for r in found))
    return Sample(value, counter=counter)


def utilization(readings: Sequence[Reading], scope: Scope, now_s: float) -> Sample | None:
    """Busy share of CPUs or GPU, and our own part of it if the sensor reports one."""
    reading = newest(readings, scope, "utilization", now_s, 1.0)
    if reading is None or reading.utilization is None:
        return None
    own = reading.own_utilization
    own = own if own is not None and 0 <= own <= 1 else None

    def counter(total: float | None) -> Counter | None:
        return None if total is None else Counter(total, reading.time_s, (reading.source,))

    return Sample(
        reading.utilization, own, counter(reading.busy_s), None if own is None else counter(reading.own_busy_s)
    )


def hottest_c(readings: Sequence[Reading], now_s: float) -> float | None:
    """Degrees of the hottest sensor; None without a plausible fresh reading."""
    degrees = (reading.celsius for reading in readings if reading.celsius is not None and _fresh(reading, now_s))
    return max((value for value in degrees if LEAST_C <= value <= MOST_C), default=None)


def newest(readings: Sequence[Reading], scope: Scope, field: str, now_s: float, most: float) -> Reading | None:
    """First fresh reading of a scope whose ``field`` is present and between 0 and ``most``."""
    for reading in readings:
        if reading.scope == scope and _fresh(reading, now_s):
            value = getattr(reading, field)
            if value is not None and 0 <= value <= most:
                return reading
    return None


def unseen(budget: Budget, readings: Sequence[Reading], now_s: float) -> tuple[str, ...]:
    """Keys of a budget whose quantity has no usable reading, in the order of the budget's keys."""
    seen = {
        **dict.fromkeys(("power_w", "energy_j_per_token"), watts(readings, budget.power_rail, now_s)),
        **dict.fromkeys(("temperature_c", "critical_temperature_c"), hottest_c(readings, now_s)),
        "gpu_utilization": utilization(readings, "gpu", now_s),
        "cpu_utilization": utilization(readings, "cpu", now_s),
        "battery_floor_percent": newest(readings, "battery", "charge", now_s, 1.0),
        "memory_mb": newest(readings, "process", "memory_bytes", now_s, math.inf),
    }
    return tuple(key for key in budget.ceilings if seen.get(key) is None)


def _fresh(reading: Reading, now_s: float) -> bool:
    return now_s - reading.time_s <= STALE_S
