"""What every source of readings implements, and how it says what it does not have.

A :class:`Source` knows one interface of the device (NVML, powercap, ...) and nothing of threads, rates or of what the values
are good for. It is asked by one thread only, may take its time and may raise: :mod:`balcony_runtime.sensors.sampler` copes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from balcony_edge.device.readings import Reading


@dataclass(frozen=True, slots=True)
class Absence:
    """Something that could not be read.

    Attributes:
        part: what is missing, named as in :attr:`Reading.source`, or the whole source (``nvml``).
        reason: why, as far as the system tells.
        cure: what the user can do about it; empty where there is nothing to do.
    """

    part: str
    reason: str
    cure: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one look at a source gave: readings, and what was looked for in vain."""

    readings: tuple[Reading, ...] = ()
    absences: tuple[Absence, ...] = ()


class Source(Protocol):
    """One interface of the device. All methods are called by one thread, :meth:`close` last."""

    @property
    def name(self) -> str:
        """Short and unique: ``nvml``, ``rapl``."""
        ...

    def discover(self) -> None:
        """Look what there is: before the first :meth:`read` and then now and again, since parts come and go.

        Finding nothing is no error: :meth:`read` then says why.
        """
        ...

    def read(self, now_s: float) -> Sample:
        """Read everything that was discovered once.

        Args:
            now_s: the time that readings carry, on a monotonic clock.
        """
        ...

    def close(self) -> None:
        """Give back what the source holds. May be called when nothing was opened."""
        ...
