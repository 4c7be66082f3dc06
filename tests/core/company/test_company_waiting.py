"""The order in which those that wait begin, whatever their weights are."""

from __future__ import annotations

from dataclasses import dataclass

from balcony_edge.control.company.waiting import MOST_OVERTAKEN, in_order, overtakes


@dataclass
class Waits:
    """A request that waits."""

    key: int
    weight: float
    overtaken: int = 0


def test_nobody_is_overtaken_by_later_ones_that_were_overtaken_as_often() -> None:
    """Ten of weight 2 came after one of weight 1, and all of them were overtaken by four of weight 3."""
    waiting = [Waits(0, 1.0), *(Waits(key, 2.0) for key in range(1, 11)), *(Waits(key, 3.0) for key in range(11, 15))]
    began = []
    while waiting:
        first = in_order(waiting, lambda one: one.weight)[0]
        waiting.remove(first)
        overtakes(first, waiting)
        began.append(first)
    assert [one.key for one in began[:5]] == [11, 12, 13, 14, 0]
    assert all(one.overtaken <= MOST_OVERTAKEN for one in began)
