"""What a sensor says: one reading, in SI units, with its age and its source.

Owns the type that sensors fill, traces keep and the controller weighs. It knows no sensor. What a device does not
measure is None, never 0: a controller that cannot see a quantity says so instead of steering by a made-up number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from balcony_edge.errors import InputError

#: What a reading is about. ``board`` is the whole device (Jetson VDD_IN, a laptop's battery drain, wall power), ``other`` a
#: part that is none of these alone (a supply rail of CPU and GPU together, a wireless card's temperature).
Scope = Literal["board", "cpu", "gpu", "memory", "battery", "process", "other"]


@dataclass(frozen=True, slots=True)
class Reading:
    """One sample of one source.

    Attributes:
        source: where it comes from, unique on a device: ``nvml:0``, ``rapl:package-0``, ``ina3221:VDD_IN``,
            ``thermal:cpu-thermal``, ``battery:BAT0``, ``psutil``.
        scope: what it is about.
        time_s: when it was taken, on the clock of the run (``time.monotonic`` in a live one).
        watts: power at that moment, or averaged by the sensor.
        joules: an energy counter since any fixed moment; it only grows (wraps are undone by the sensor). Where a part has
            none, the sampler sums up its watts.
        celsius: temperature.
        utilization: busy share, 0 to 1, of all users of the part.
        own_utilization: the same of this process alone, where it can be told apart.
        charge: battery charge, 0 to 1.
        charging: whether a battery is fed at the moment.
        memory_bytes: memory in use in this scope (``process``: private bytes of this process).
        memory_total_bytes: memory that there is.
        throttled: whether the device holds its clocks down at the moment.
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
    charge: float | None = None
    charging: bool | None = None
    memory_bytes: int | None = None
    memory_total_bytes: int | None = None
    throttled: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """What it says, ready for JSON: a field that was not measured is left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @staticmethod
    def from_dict(values: Any) -> Reading:
        """The reading that :meth:`to_dict` wrote.

        Raises:
            InputError: a field is unknown, missing, of another type or not finite; the message names it.
        """
        try:
            return _READING.validate_python(values)
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(map(str, problem["loc"])) or "reading"
            known = ", ".join(field.name for field in fields(Reading))
            raise InputError(f"{field} = {problem['input']!r}: {problem['msg']}: a reading has {known}") from error


_READING = TypeAdapter(Reading)


def adding_up(readings: Sequence[Reading], scope: Scope) -> list[Reading]:
    """Of the readings about one scope, in the order of trust, those whose power adds up to its own: all parts that the first
    source knows (CPU packages, GPUs), and of a whole board, of which there is one figure, the first alone.
    """
    parts = [r for r in readings if r.source.partition(":")[0] == readings[0].source.partition(":")[0]]
    return parts[:1] if scope == "board" else parts
