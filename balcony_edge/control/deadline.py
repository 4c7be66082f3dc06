"""The room that a deadline leaves for the next token at each exit.

The rest of n tokens at exit i takes n × steady_i × m, where m is the mean slowdown, bursts included: the mean of the last 60
steps, or the filter's estimate from the last few if that is larger. With the asked probability the rest takes at most a margin
longer: a part grows with the root of n, and a share is for a load that has not begun.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from balcony_edge.control.decision import Observation
from balcony_edge.control.slowdown import Slowdown

#: Bursts come in runs: the sum over n tokens varies as if this many of them were always hit together.
BURST_TOKENS = 16
#: Extra time for the rest of a reply with a deadline, per deviation of the asked probability, for a load that has not
#: begun: 8 % at a probability of 0.9, 14 % at 0.99. A load of 1.4 that begins in mid-reply is then met where possible.
UNSEEN_LOAD = 0.06


def deadline_rooms(
    seen: Observation, slowdown: Slowdown, steady_ms: Sequence[float], lowest: int, quantile: float, luck: float | None
) -> tuple[list[float], list[float]]:
    """The room, and the time that is left for pending rows if an exit is entered for a dwell; it is spent only once.

    Both are prices per exit index; the last entry of the room is that of a step with catch-up.

    Args:
        seen: observation; its deadline runs.
        slowdown: slowdown filter.
        steady_ms: price of a later step at each exit.
        lowest: index of the shallowest exit that the budget allows.
        quantile: deviations above the mean that hold the asked probability.
        luck: None to keep time for chance, for a load that has not begun, and for the prompt also for the waits of
            ``max_pace_tps``; later ones are cut when the time runs out. A number to keep nothing, and to take the better of the
            two slowdowns: the factor by which the caller takes rooms for larger than they are, since these have no margin that
            it could give back.
    """
    budget, left_ms, remaining = seen.budget, 1000 * seen.left_s, seen.remaining
    kept = luck is None
    mean = max(slowdown.ratio_mean, slowdown.factor, 1e-6)
    if not kept:
        # A step that hung stays in the mean of 60 steps for long, and a burst that makes the last steps slow may end.
        mean = max(min(slowdown.ratio_mean, slowdown.factor), 1e-6)
    spread = math.sqrt(slowdown.ratio_variance * BURST_TOKENS * remaining) + UNSEEN_LOAD * remaining * mean
    margin_ms = quantile * spread * steady_ms[lowest] if kept else 0.0
    dwell = min(budget.dwell_tokens, remaining)
    pace_tps = budget.max_pace_tps if kept and not seen.made_tokens else None
    paced_ms = 1000 / pace_tps / mean if pace_tps else 0.0
    gaps_ms = [max(price_ms, paced_ms) for price_ms in steady_ms]
    rooms_ms, spare_ms = [], []
    for index, price_ms in enumerate(gaps_ms):
        below_ms = gaps_ms[max(index - 1, lowest)]
        room_ms = (left_ms - margin_ms) / mean - (remaining - 1) * below_ms
        rooms_ms.append(max(room_ms, 0.0) / (luck or 1.0))
        spare_ms.append(room_ms - below_ms - dwell * (price_ms - below_ms))
    return [*rooms_ms, min(rooms_ms)], spare_ms
