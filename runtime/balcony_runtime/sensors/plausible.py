"""The plausibility of readings: impossible values are dropped and counted, never corrected and never passed on.

Drivers sometimes return nonsense: −256 °C for a part without power, 0xFFFFFFFF for a chip off the bus, a counter that restarts
after a suspend. One such value would disturb a control loop for seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from balcony_edge.device.readings import Reading

#: Highest plausible power: a server of eight of the largest GPUs is specified at 14.3 kW (DGX B200).
MAX_WATTS = 20_000.0
#: Longest lag of an energy counter: NVML's moves every 20 to 100 ms, a firmware's every second.
_COUNTER_LAG_S = 1.0
#: Field → least and largest possible value. °C: the range in which electronics work (AEC-Q100 grade 0: −40 to 150 °C).
LIMITS: dict[str, tuple[float, float]] = {
    "watts": (0.0, MAX_WATTS),
    "joules": (0.0, math.inf),
    "celsius": (-55.0, 150.0),
    "utilization": (0.0, 1.0),
    "own_utilization": (0.0, 1.0),
    "charge": (0.0, 1.0),
    "memory_bytes": (0, 2**50),
    "memory_total_bytes": (1, 2**50),
}
_VALUES = (*LIMITS, "charging", "throttled")


@dataclass(slots=True)
class _Counter:
    """The last raw value, its time, and the counter's value: a sum of increases, so that rounding cannot decrease it."""

    raw_j: float
    time_s: float
    total_j: float


class Plausibility:
    """Cleans the readings of one source, which must arrive in order of time."""

    def __init__(self) -> None:
        self._counters: dict[str, _Counter] = {}
        #: Number of values dropped so far.
        self.dropped = 0
        #: The last dropped value, in words; empty if there was none.
        self.last_dropped = ""

    def counts(self, source: str) -> bool:
        """Whether a source has an energy counter of its own, even if its last reading did not contain it."""
        return source in self._counters

    def clean(self, reading: Reading) -> Reading | None:
        """The reading without impossible values and with an energy counter that only grows; None if nothing is left."""
        changes: dict[str, float | None] = {}
        for field, (least, most) in LIMITS.items():
            value = getattr(reading, field)
            if value is not None and not (least <= value <= most and math.isfinite(value)):
                self._drop(f"{reading.source}: {field} = {value:g}")
                changes[field] = None
        if reading.joules is not None and "joules" not in changes:
            changes["joules"] = self._count(reading.source, reading.joules, reading.time_s)
        if changes:
            reading = replace(reading, **changes)  # type: ignore[arg-type]  # the fields are numbers or None
        return reading if any(getattr(reading, field) is not None for field in _VALUES) else None

    def _count(self, source: str, raw_j: float, time_s: float) -> float | None:
        """A counter's value, continued across jumps; the value at the jump itself is dropped."""
        counter = self._counters.get(source)
        if counter is None:
            self._counters[source] = _Counter(raw_j, time_s, raw_j)
            return raw_j
        delta_j, elapsed_s = raw_j - counter.raw_j, time_s - counter.time_s
        jumped = not 0 <= delta_j <= MAX_WATTS * (elapsed_s + _COUNTER_LAG_S)
        if jumped:
            self._drop(f"{source}: joules jumped by {delta_j:g} in {elapsed_s:.1f} s")
        else:
            counter.total_j += delta_j
        counter.raw_j, counter.time_s = raw_j, time_s
        return None if jumped else counter.total_j

    def _drop(self, what: str) -> None:
        self.dropped += 1
        self.last_dropped = what
