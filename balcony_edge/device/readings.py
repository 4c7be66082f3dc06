"""Sensor readings: values in SI units with their time and their source.

Owns the type that sensors fill, traces record and the controller reads. It knows no sensor. A quantity that a device does not
measure is None, never 0: a controller without a reading says so instead of steering by an invented number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from balcony_edge.errors import InputError

#: Seconds after which a reading no longer counts: two ticks of a sensor that answers once a second.
STALE_S = 2.0
#: Part that a reading is about. ``board`` is the whole device (Jetson VDD_IN, a laptop's battery drain, wall power); ``other``
#: is a part outside this list, or several at once (a supply rail of CPU and GPU together, a wireless card's temperature).
Scope = Literal["board", "cpu", "gpu", "memory", "battery", "process", "other"]


@dataclass(frozen=True, slots=True)
class Reading:
    """One sample of one source.

    Attributes:
        source: name of the source, unique on a device: ``nvml:0``, ``rapl:package-0``, ``ina3221:VDD_IN``,
            ``thermal:cpu-thermal``, ``battery:BAT0``, ``psutil:cpu``.
        scope: part that the reading is about.
        time_s: time of the reading, on the clock of the run (``time.monotonic`` in a live one).
        watts: power at that moment, or averaged by the sensor.
        joules: energy counter since any fixed moment; it only grows (the sensor undoes wraps). If a part has no counter, the
            sampler sums up its watts; the reading after a pause has no sum.
        celsius: temperature.
        utilization: busy share of the part, 0 to 1, by all its users.
        own_utilization: busy share of this process only, if the system separates it.
        busy_s, own_busy_s: sums of these shares over time, which the sampler makes; the reading after a pause has none.
        charge: battery charge, 0 to 1.
        charging: whether a battery is on external power.
        memory_bytes: memory in use in this scope (``process``: private bytes of this process).
        memory_total_bytes: size of the memory.
        throttled: whether the device holds its clocks down.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    source: str
    scope: Scope
    time_s: float
    watts: float | None = None
    joules: float | None = None
    celsius: float | None = None
    utilization: float | None = None
    own_utilization: float | None = None
    busy_s: float | None = None
    own_busy_s: float | None = None
    charge: float | None = None
    charging: bool | None = None
    memory_bytes: int | None = None
    memory_total_bytes: int | None = None
    throttled: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON-ready values, without those that were not measured or are no finite number."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {
            name: value
            for name, value in values
            if value is not None and (not isinstance(value, float) or math.isfinite(value))
        }

    @staticmethod
    def from_dict(values: Any) -> Reading:
        """Read the values that :meth:`to_dict` wrote.

        Raises:
            InputError: a field is unknown, missing, of another type or not finite; the message names it.
        """
        try:
            return _READING.validate_python(values)
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(map(str, problem["loc"])) or "reading"
            known = ", ".join(field.name for field in fields(Reading))
            raise InputError(
                f"{field} = {problem['input']!r}: {problem['msg']}: a reading has the fields {known}"
            ) from error


_READING = TypeAdapter(Reading)


def adding_up(readings: Sequence[Reading], scope: Scope) -> list[Reading]:
    """Readings whose power adds up to that of ``scope``, out of its readings in order of trust.

    These are all parts that the first source knows (CPU packages, GPUs). A whole board has one figure: the first reading only.
    """
    parts = [r for r in readings if r.source.partition(":")[0] == readings[0].source.partition(":")[0]]
    return parts[:1] if scope == "board" else parts
