"""The order in which those that wait begin: streams, requests to a server, and simulated ones.

Whether there is time for one more stream is decided in :mod:`.goals`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

#: Later requests that may begin before one that waits. Without a bound, one that needs much memory or time would wait as
#: long as small ones come.
MOST_OVERTAKEN = 4


class Waiting(Protocol):
    """What waits to begin.

    Attributes:
        key: its number; later requests have greater ones.
        overtaken: number of later requests that began while it waited.
    """

    key: int
    overtaken: int


_W = TypeVar("_W", bound=Waiting)


def in_order(waiting: Iterable[_W], weight: Callable[[_W], float]) -> list[_W]:
    """The order in which they begin: first those that were overtaken too often, the oldest first, then by weight and age."""

    def place(one: _W) -> tuple[bool, float, int]:
        enough = one.overtaken >= MOST_OVERTAKEN  # then a weight would let later ones overtake again
        return not enough, 0.0 if enough else -weight(one), one.key

    return sorted(waiting, key=place)


def overtakes(one: Waiting, others: Iterable[Waiting]) -> None:
    """Count that ``one`` begins before others that wait."""
    for other in others:
        other.overtaken += other.key < one.key
