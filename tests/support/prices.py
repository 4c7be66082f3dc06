"""Prices, devices and helpers that several test files use.

Two cost models serve most tests. ``SMALL`` has round numbers for decisions that a reader can check by hand. ``DEMO`` has the
proportions of the demo model and serves runs on a simulated device (:class:`balcony_edge.simulation.plant.Plant`). A file
whose arithmetic is about other prices keeps its own.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from statistics import NormalDist

from balcony_edge.device.costs import CostModel, UnitCost
from balcony_edge.simulation.plant import Physics
from balcony_edge.simulation.simulate import SimulatedToken

#: Steady prices 5, 7 and 10 ms: 1 ms of head, stages of 3, 2 and 3.5 ms, balconies of 1 ms, a norm of 0.5 ms.
SMALL = CostModel(
    exits=(4, 6, 8),
    stages=(UnitCost(3.0, 0.25), UnitCost(2.0, 0.25), UnitCost(3.5, 0.25)),
    balconies=(UnitCost(1.0, 0.125), UnitCost(1.0, 0.125), UnitCost(0.5)),
    head=UnitCost(1.0),
)


def layers(count: int) -> UnitCost:
    """Decoder layers of the demo model's proportions: 4 % for each further row, attention that grows with the context."""
    return UnitCost(0.6 * count, 0.024 * count, 0.03 * count)


#: Steady prices at 64 rows of context: 12.1, 14.0, 15.8 and 21.3 ms.
DEMO = CostModel(
    exits=(14, 17, 20, 30),
    stages=(layers(14), layers(3), layers(3), layers(10)),
    balconies=(layers(1), layers(1), layers(1), UnitCost(0.05)),
    head=UnitCost(3.0),
    overhead_ms=0.15,
    switch_ms=0.25,
)
#: 8 W while a step runs and 2 W otherwise; 6 K/W, so 73 °C and 37 °C.
BOARD = Physics()
#: Deviation of the log of a step's time in a filter that tests call settled.
SETTLED_DEVIATION = 0.02
#: Share of a target that a step may take under a settled filter at probability 0.9.
MARGIN = math.exp(-NormalDist().inv_cdf(0.9) * SETTLED_DEVIATION)


def windows_w(tokens: Sequence[SimulatedToken], after_s: float, window_s: float = 5.0) -> list[float]:
    """Average power over every window of ``window_s`` seconds that begins with a token; the device's own, not its gauge's."""
    times, joules = [token.time_s for token in tokens], [0.0]
    for before, token in zip([0.0, *times], tokens, strict=False):
        joules.append(joules[-1] + token.watts * (token.time_s - before))
    found = []
    for begin in range(bisect.bisect(times, after_s), len(times)):
        end = bisect.bisect(times, times[begin] + window_s) - 1
        if end + 1 < len(times):
            found.append((joules[end + 1] - joules[begin + 1]) / (times[end] - times[begin]))
    return found
