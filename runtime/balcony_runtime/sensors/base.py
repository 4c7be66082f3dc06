"""The interface of sources of readings, and of reports on missing quantities.

A :class:`Source` knows one interface of the device (NVML, powercap, ...) and nothing about threads, rates or the use of its
values. One thread reads it. A read may be slow and may raise; :mod:`balcony_runtime.sensors.sampler` handles both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from balcony_edge.device.readings import Reading


@dataclass(frozen=True, slots=True)
class Absence:
    """A part that could not be read.

    Attributes:
        part: missing part, named as in :attr:`Reading.source`, or the whole source (``nvml``).
        reason: reason, as far as the system tells.
        cure: advice to the user; empty if there is nothing to do.
    """

    part: str
    reason: str
    cure: str = ""


@dataclass(frozen=True, slots=True)
class SourceSample:
    """Result of one read of a source: readings, and parts that could not be read."""

    readings: tuple[Reading, ...] = ()
    absences: tuple[Absence, ...] = ()


class NothingOpen:
    """A source that holds nothing between two reads."""

    def close(self) -> None:
        """Nothing is held open."""


class Source(Protocol):
    """One interface of the device. One thread calls all methods, :meth:`close` last."""

    @property
    def name(self) -> str:
        """Short and unique name, such as ``nvml`` or ``rapl``."""
        ...

    def discover(self) -> None:
        """Look for parts: before the first :meth:`read` and then from time to time, since parts come and go.

        Finding nothing is not an error; :meth:`read` then gives the reason.
        """
        ...

    def read(self, now_s: float) -> SourceSample:
        """Read every discovered part once.

        Args:
            now_s: time of the readings, on a monotonic clock.
        """
        ...

    def close(self) -> None:
        """Free the source's resources. May also be called if nothing was opened."""
        ...
