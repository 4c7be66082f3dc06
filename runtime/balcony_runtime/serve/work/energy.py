"""Power and energy of the device's parts, for ``/props`` and the cost of an answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import get_args

from balcony_edge.budget import Rail
from balcony_edge.control.observed import watts
from balcony_edge.control.response import Counter, Sample
from balcony_edge.device.readings import Reading

Readings = Callable[[], tuple[Reading, ...]]


def powers(readings: tuple[Reading, ...]) -> dict[Rail, Sample]:
    """Power of each rail that a sensor measures."""
    now_s = time.monotonic()
    found = ((rail, watts(readings, rail, now_s)) for rail in get_args(Rail))
    return {rail: sample for rail, sample in found if sample is not None}


class EnergyMeter:
    """Energy of the device from now on, with everything that runs on it.

    A reading is up to a second old, so the energy of a short answer is about that of its time.
    """

    def __init__(self, readings: Readings) -> None:
        self._readings = readings
        self._before = self._counters()

    def joules(self) -> dict[Rail, float]:
        """Joules of each rail whose energy is counted."""
        joules = {}
        for rail, now in self._counters().items():
            before = self._before.get(rail)
            if before is not None and before.sources == now.sources:
                joules[rail] = now.total - before.total
        return joules

    def _counters(self) -> Mapping[Rail, Counter]:
        samples = powers(self._readings())
        return {rail: sample.counter for rail, sample in samples.items() if sample.counter is not None}
